"""Where a run's numbers go: `metrics.jsonl` always, `metrics.csv` and TensorBoard besides.

All writers take rows `{"step", "seconds", "epoch", "split", values…}`, and can rewind: a run that
goes on from an earlier checkpoint first drops what lies beyond it, so that no log has gaps or
doubles.
"""

import contextlib
import csv
import errno
import functools
import io
import itertools
import json
import math
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from jdl.core import check

Row = Mapping[str, Any]

DIRECTIONS = "directions.json"
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # how the system refuses to write


class Writer(Protocol):
    """What keeps rows."""

    def write(self, row: Row) -> None:
        """Takes one row."""

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step`."""


@contextlib.contextmanager
def appearing(path: str | Path) -> Iterator[BinaryIO]:
    """A file that takes its name when all has been written, and else leaves the old one as it was.

    Its permissions are those of the old one; of a new one, those the umask gives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, text: str) -> None:
    """Replaces the file as a whole, or leaves the old one as it was."""
    with appearing(path) as file:
        file.write(text.encode())


class JsonlWriter:
    """One flat JSON object a line; a number that is not finite becomes null."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, row: Row) -> None:
        """Appends one row; a last line cut short stays a line of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        clean = {k: None if _not_finite(v) else v for k, v in row.items()}
        begin = "\n" if _is_cut(self.path) else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(begin + json.dumps(clean) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step`, and lines cut short."""

        def stays(row: Row) -> bool:
            at = row.get("step", 0)
            return not is_number(at) or at <= step

        kept = [row for row in read_jsonl(self.path) if stays(row)]
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))


class CsvWriter:
    """One line a row under a line of names; what a row lacks, or is not finite, is left empty.

    A row with a name that is new widens the table, which is then written anew.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._columns: list[str] = []
        self._size = -1  # of the file when its columns were these

    def write(self, row: Row) -> None:
        """Appends one row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._size != self._size_now():  # at first, and when another process has written
            self._columns, rows = self._read()
            if _is_cut(self.path):
                self._write_all(self._columns, rows)
        if new := [name for name in row if name not in self._columns]:
            self._write_all([*self._columns, *new], self._read()[1])
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(_cells(row))
        self._size = self._size_now()

    def _size_now(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step`, and a last line cut short."""
        columns, rows = self._read()
        if self.path.exists():
            self._write_all(columns, [row for row in rows if int(row["step"]) <= step])

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return [], []
        text = self.path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        whole = [row for row in reader if None not in row and None not in row.values()]
        return list(reader.fieldnames or []), whole

    def _write_all(self, columns: list[str], rows: Iterable[Row]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())
        self._columns = columns


class TensorBoardWriter:
    """Scalars for TensorBoard, one folder a split; event types from the package tensorboardX.

    Event files only grow: to rewind is to write that all after the step is void, which TensorBoard
    heeds. What is written is in the file at once: tensorboardX's own writer would leave it with a
    thread, and a killed run would lose it.
    """

    def __init__(self, directory: str | Path):
        try:
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import masked_crc32c
        except ImportError:
            raise check.MissingExtraError("tensorboardX", "tensorboard", "TensorBoard") from None
        self.directory = Path(directory)
        self._events, self._checksum = event_pb2, masked_crc32c
        self._files: dict[str, Path] = {}
        self._void_from: int | None = None

    def write(self, row: Row) -> None:
        """Writes the row's numbers, and its seconds on the training clock."""
        split = str(row["split"])
        event = self._events.Event(wall_time=time.time(), step=row["step"])
        for name, value in row.items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if number and name != "step":
                event.summary.value.add(tag=name, simple_value=value)
        self._append(self._files.get(split) or self._begin(split), event)

    def rewind(self, step: int) -> None:
        """Voids the numbers of steps after `step`."""
        self._files, self._void_from = {}, step + 1
        if self.directory.exists():
            for folder in self.directory.iterdir():
                self._begin(folder.name)

    def _begin(self, split: str) -> Path:
        """Makes the split's next file; TensorBoard reads them in the order of their names."""
        folder = self.directory / split.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{len(list(folder.iterdir())):06d}"
        path = self._files[split] = folder / name
        void = self._void_from or 0
        self._append(path, self._events.Event(step=void, file_version="brain.Event:2"))
        if self._void_from is not None:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._append(path, self._events.Event(step=void, session_log=start))
        return path

    def _append(self, path: Path, event: Any) -> None:
        """One record: length and its checksum, bytes and theirs."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        parts = [length, self._crc(length), data, self._crc(data)]
        with path.open("ab") as file:
            file.write(b"".join(parts))

    def _crc(self, data: bytes) -> bytes:
        return struct.pack("<I", self._checksum(data))


class Writers:
    """Several writers as one: `metrics.jsonl`, and what is asked for besides.

    Args:
      workdir: the run directory.
      besides: "csv" for `metrics.csv`, "tensorboard" for the folder `tensorboard`.
      directions: gives the directions of the rows' values, see `declare`; asked at the first row.
    """

    def __init__(
        self,
        workdir: str | Path,
        besides: Iterable[str] = (),
        directions: Callable[[], Mapping[str, str]] = dict,
    ):
        workdir = Path(workdir)
        self._workdir, self._directions = workdir, directions
        self._declared = False
        kinds: dict[str, Callable[[], Writer]] = {
            "csv": lambda: CsvWriter(workdir / "metrics.csv"),
            "tensorboard": lambda: TensorBoardWriter(workdir / "tensorboard"),
        }
        names = [check.one_of("logs", name, kinds) for name in besides]
        self._lines = JsonlWriter(workdir / "metrics.jsonl")
        self._all: list[Writer] = [self._lines]
        self._stepped = False
        self._all += [kinds[name]() for name in dict.fromkeys(names)]

    def write(self, row: Row) -> None:
        """Gives one row to all, but for an evaluation that was made and told before."""
        # Only a run that has made no step since it was taken up can evaluate the same again.
        self._stepped = self._stepped or row["split"] == "train"
        if not self._stepped and self._told_before(row):
            return
        if not self._declared:
            declare(self._workdir, self._directions())
            self._declared = True
        for writer in self._all:
            writer.write(row)

    def _told_before(self, row: Row) -> bool:
        def essence(row: Row) -> dict[str, Any]:
            return {k: v for k, v in row.items() if k not in ("seconds", "epoch")}

        before = reversed(read_jsonl(self._lines.path))
        same_step = itertools.takewhile(lambda x: x.get("step") == row["step"], before)
        return any(essence(x) == essence(row) for x in same_step)

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step` from all."""
        for writer in self._all:
            writer.rewind(step)


def directions(metrics: Any) -> dict[str, str]:
    """Name -> "max" or "min" of what `Estimator(metrics=…)` is given, as far as it is declared.

    >>> from jdl.metrics import accuracy
    >>> directions({"accuracy": accuracy, "length": len})
    {'loss': 'min', 'accuracy': 'max'}
    """
    declared = _declared(metrics)
    if isinstance(metrics, Mapping):
        declared = {name: _declared(metric) for name, metric in metrics.items()}
    each = declared.items() if isinstance(declared, Mapping) else ()
    return {"loss": "min", **{name: best for name, best in each if best in ("min", "max")}}


def _declared(metric: Any) -> Any:
    """What `jdl.metrics.direction` has declared of it, or of the function that it is a part of."""
    found = getattr(metric, "direction", None)
    if found is None and isinstance(metric, functools.partial):
        return _declared(metric.func)
    return found


def declare(workdir: str | Path, directions: Mapping[str, str]) -> None:
    """Adds to a run's `directions.json` which values are best at their "max" or "min"."""
    known = read_directions(workdir)
    if known != (found := known | dict(directions)):
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        write_atomically(Path(workdir) / DIRECTIONS, text)


def read_directions(workdir: str | Path) -> dict[str, str]:
    """Name -> "max" or "min", as far as the run has declared them."""
    try:
        found = json.loads((Path(workdir) / DIRECTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {name: best for name, best in known if best in ("min", "max")}


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file; lines that hold none, such as one cut short, are left out.

    An empty list where there is no file.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def is_number(value: Any) -> bool:
    """Whether a row's value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_cut(path: Path) -> bool:
    """Whether the file's last line is without its end: its process was killed as it wrote."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _cells(row: Row) -> dict[str, Any]:
    def cell(value: Any) -> Any:
        if value is None or _not_finite(value):
            return ""
        return value if isinstance(value, str | int | float) else json.dumps(value)

    return {name: cell(value) for name, value in row.items()}
