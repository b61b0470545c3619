"""Rows of named columns, streamed to a file: `.npz`, `.jsonl` or `.csv` by its suffix.

    with open_table("predictions.npz") as table:
        for …: table.write({"name": names, "probability": probabilities})

Memory holds one block of rows at a time, however many there are. The file appears, whole, when the
block ends without an error; nothing is left of it otherwise.
"""

import csv
import itertools
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from jdl.core import check

Columns = Mapping[str, np.ndarray | Sequence[str]]  # leading axis: rows

_CHUNK = 256  # names turned into an array at a time


class Table(Protocol):
    """A table in the making."""

    def write(self, columns: Columns) -> None:
        """Appends rows; every call with columns of the same names, types and row shapes."""


@contextmanager
def open_table(path: str | Path) -> Iterator[Table]:
    """A table to write to; it is at `path` when the context ends.

    `.npz` holds an array a column, text as fixed-width unicode, to be read with `numpy.load`;
    `.jsonl` an object a row, arrays as nested lists; `.csv` a line a row under a line of names,
    arrays spread over columns `name_0`, `name_1` … in row-major order.

    Args:
      path: where to; the suffix says the format.

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
    kinds: dict[str, Callable[[Path], Any]] = {
        ".npz": _NpzTable,
        ".jsonl": _JsonlTable,
        ".csv": _CsvTable,
    }
    ok = path.suffix.lower() in kinds
    check.argument(ok, "out", "a file name that ends in .npz, .jsonl or .csv", str(path))
    check.argument(not path.is_dir(), "out", "a file's name, not a folder's", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        table = kinds[path.suffix.lower()](made)
        try:
            yield table
        except BaseException:
            table.close()
            raise
        table.finish()
        os.replace(made, path)


class _JsonlTable:
    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")

    def write(self, columns: Columns) -> None:
        lists = {name: _plain(column) for name, column in columns.items()}
        for row in zip(*lists.values(), strict=True):
            self._file.write(json.dumps(dict(zip(lists, row, strict=True))) + "\n")

    def finish(self) -> None:
        _sync(self._file)
        self.close()

    def close(self) -> None:
        self._file.close()


class _CsvTable:
    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
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
        _sync(self._file)
        self.close()

    def close(self) -> None:
        self._file.close()


class _NpzTable:
    """Columns grow in files of their own; at the end they become the members of one archive."""

    def __init__(self, path: Path):
        self._path, self._open = path, ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._like: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}  # type, shape of a row
        self._rows = 0

    def write(self, columns: Columns) -> None:
        sizes = {len(column) for column in columns.values()}
        check.argument(len(sizes) == 1, "columns", "of one length", sizes)
        for name, column in columns.items():
            values = _array(column)
            if name not in self._files:
                part = self._path.with_name(f"{len(self._files)}.part")
                self._files[name] = self._open.enter_context(part.open("w+b"))
                self._like[name] = (values.dtype, values.shape[1:])
            dtype, shape = self._like[name]
            if dtype.kind == "U":
                # Their width is known at the end only: until then as lines of JSON.
                lines = "".join(json.dumps(str(text)) + "\n" for text in column)
                self._files[name].write(lines.encode())
                self._like[name] = (max(dtype, values.dtype, key=lambda d: d.itemsize), shape)
                continue
            same = (values.dtype, values.shape[1:]) == (dtype, shape)
            check.argument(same, name, f"of {dtype} and rows of {shape}", (values.dtype, shape))
            self._files[name].write(np.ascontiguousarray(values).tobytes())
        self._rows += sizes.pop()

    def finish(self) -> None:
        with zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED) as archive:
            for name, file in self._files.items():
                dtype, shape = self._like[name]
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (self._rows, *shape),
                }
                file.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_2_0(member, header)
                    if dtype.kind != "U":
                        shutil.copyfileobj(file, member, 1 << 16)
                        continue
                    while lines := [json.loads(x) for x in itertools.islice(file, _CHUNK)]:
                        member.write(np.array(lines, dtype).tobytes())
        with self._path.open("rb+") as made:
            _sync(made)
        self.close()

    def close(self) -> None:
        self._open.close()


def _array(column: np.ndarray | Sequence[str]) -> np.ndarray:
    """As an array of a type that files know: bfloat16 becomes float32."""
    values = np.asarray(column)
    return values.astype(np.float32) if values.dtype.kind == "V" else values


def _plain(column: np.ndarray | Sequence[str]) -> list[Any]:
    """As JSON can hold it; numbers that are not finite become None."""
    values = _array(column)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return _finite(values.tolist())
    return values.tolist()


def _finite(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite(v) for v in values]
    return values if math.isfinite(values) else None


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
