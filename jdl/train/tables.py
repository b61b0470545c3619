"""Rows of named columns, streamed to a file: `.npz`, `.jsonl` or `.csv` by its suffix.

    with open_table("predictions.npz") as table:
        for …: table.write({"name": names, "probability": probabilities})

Memory holds one block of rows at a time, however many there are. The file appears when the context
ends without an error; otherwise nothing of it is left.
"""

import csv
import io
import itertools
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from jdl.core import check
from jdl.core.files import atomic_file

Columns = Mapping[str, np.ndarray | Sequence[str]]  # leading axis: rows

_CHUNK = 256  # names turned into an array at a time


class Table(Protocol):
    """A table that is being written."""

    def write(self, columns: Columns) -> None:
        """Appends rows; all calls have columns of the same names, types and row shapes."""


@contextmanager
def open_table(path: str | Path) -> Iterator[Table]:
    """A table to write to; the file appears at the end of the context.

    `.npz` holds an array for each column, text as fixed-width unicode, read with `numpy.load`;
    `.jsonl` an object for each row, arrays as nested lists; `.csv` a line for each row under a line
    of names, arrays spread over columns `name_0`, `name_1` … in row-major order.

    Args:
      path: the file; its suffix says the format.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open_table(f"{folder}/t.csv") as table:
    ...         table.write({"name": ["a", "b"], "code": np.array([[1, 2], [3, 4]])})
    ...     print(Path(f"{folder}/t.csv").read_text())
    name,code_0,code_1
    a,1,2
    b,3,4
    <BLANKLINE>
    """
    path = Path(path)
    kinds: dict[str, Callable[[BinaryIO, Path], Any]] = {
        ".npz": _NpzTable,
        ".jsonl": _JsonlTable,
        ".csv": _CsvTable,
    }
    ok = path.suffix.lower() in kinds
    check.argument(ok, "out", "a file name that ends in .npz, .jsonl or .csv", str(path))
    check.argument(not path.is_dir(), "out", "a file's name, not a folder's", str(path))
    make = kinds[path.suffix.lower()]
    with atomic_file(path) as file, closing(make(file, path.parent)) as table:
        yield table
        table.finish()


class _JsonlTable:
    def __init__(self, file: BinaryIO, folder: Path):
        self._file = file

    def write(self, columns: Columns) -> None:
        lists = {name: _plain(column) for name, column in columns.items()}
        for row in zip(*lists.values(), strict=True):
            self._file.write(json.dumps(dict(zip(lists, row, strict=True))).encode() + b"\n")

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _CsvTable:
    def __init__(self, file: BinaryIO, folder: Path):
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._headed = False

    def write(self, columns: Columns) -> None:
        flat: dict[str, Sequence[Any]] = {}
        for name, column in columns.items():
            values = _array(column)
            if values.ndim == 1:
                flat[name] = _plain(column)
            else:
                rows = values.reshape(len(values), math.prod(values.shape[1:]))
                flat |= {f"{name}_{i}": _plain(rows[:, i]) for i in range(rows.shape[1])}
        if not self._headed:
            self._writer.writerow(flat)
            self._headed = True
        self._writer.writerows(zip(*flat.values(), strict=True))

    def finish(self) -> None:
        self._text.flush()

    def close(self) -> None:
        self._text.detach()  # the file stays open


class _NpzTable:
    """Each column is written to its own file; at the end they become the members of one archive."""

    def __init__(self, file: BinaryIO, folder: Path):
        self._file, self._folder, self._open = file, folder, ExitStack()
        self._columns: dict[str, BinaryIO] = {}
        self._like: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}  # type, shape of a row
        self._rows = 0

    def write(self, columns: Columns) -> None:
        sizes = {len(column) for column in columns.values()}
        check.argument(len(sizes) == 1, "columns", "of one length", sizes)
        for name, column in columns.items():
            values = _array(column)
            if name not in self._columns:
                part = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
                self._columns[name] = self._open.enter_context(part)
                self._like[name] = (values.dtype, values.shape[1:])
            dtype, shape = self._like[name]
            if dtype.kind == "U":
                # Their width is known at the end only: until then as lines of JSON.
                lines = "".join(json.dumps(str(text)) + "\n" for text in column)
                self._columns[name].write(lines.encode())
                self._like[name] = (max(dtype, values.dtype, key=lambda d: d.itemsize), shape)
                continue
            same = (values.dtype, values.shape[1:]) == (dtype, shape)
            check.argument(same, name, f"of {dtype} and rows of {shape}", (values.dtype, shape))
            self._columns[name].write(np.ascontiguousarray(values).tobytes())
        self._rows += sizes.pop()

    def finish(self) -> None:
        with zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED) as archive:
            for name, column in self._columns.items():
                dtype, shape = self._like[name]
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (self._rows, *shape),
                }
                column.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_2_0(member, header)
                    if dtype.kind != "U":
                        shutil.copyfileobj(column, member, 1 << 16)
                        continue
                    while lines := [json.loads(x) for x in itertools.islice(column, _CHUNK)]:
                        member.write(np.array(lines, dtype).tobytes())

    def close(self) -> None:
        self._open.close()


def _array(column: np.ndarray | Sequence[str]) -> np.ndarray:
    """The column as an array of NumPy's own types: bfloat16 becomes float32."""
    values = np.asarray(column)
    return values.astype(np.float32) if values.dtype.kind == "V" else values


def _plain(column: np.ndarray | Sequence[str]) -> list[Any]:
    """The column as JSON can hold it; numbers that are not finite become None."""
    values = _array(column)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return _finite(values.tolist())
    return values.tolist()


def _finite(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite(v) for v in values]
    return values if math.isfinite(values) else None
