"""A run's log: `metrics.jsonl` always; a table, TensorBoard, W&B or MLflow if asked for.

All writers take rows `{"step", "seconds", "epoch", "split", values…}` and can rewind: a run that
continues from an earlier checkpoint first drops the rows after it, so that no log has gaps or
duplicates; a service, which keeps what it was sent, is not sent such rows again.
"""

import csv
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import re
import struct
import time
import tomllib
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from jdl.core import check
from jdl.core.files import write_atomically

Row = Mapping[str, Any]

DIRECTIONS = "directions.json"
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # where one may not write


class Writer(Protocol):
    """Keeps rows."""

    def write(self, row: Row) -> None:
        """Appends one row."""

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step`."""


class JsonlWriter:
    """One flat JSON object a line; a number that is not finite becomes null."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, row: Row) -> None:
        """Appends one row, on a new line also after a last line that was cut short."""
        clean = {k: None if _not_finite(v) else v for k, v in row.items()}
        line = json.dumps(clean).encode() + b"\n"
        try:
            file = self.path.open("a+b")
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        with file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # the process that wrote it was killed
                    line = b"\n" + line
            file.write(line)

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step`, and lines that were cut short."""

        def stays(row: Row) -> bool:
            at = row.get("step", 0)
            return not is_number(at) or at <= step

        kept = [row for row in read_jsonl(self.path) if stays(row)]
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))


class CsvWriter:
    """A JSONL log as a CSV table; missing values and those that are not finite are left empty.

    A row is appended where the table has its columns; otherwise, or where another process has
    written to it, the whole table is rewritten from the log.

    Args:
      log: the JSONL log, to which each row is written first; the table is beside it.
    """

    def __init__(self, log: str | Path):
        self._log = Path(log)
        self.path = self._log.with_suffix(".csv")
        self._columns: list[str] = []
        self._size = -1  # the file's size after the last row

    def write(self, row: Row) -> None:
        """Appends one row."""
        if not row.keys() <= {*self._columns} or self._size != self._size_now():
            self._write_all()
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(_cells(row))
        self._size = self._size_now()

    def rewind(self, step: int) -> None:
        """Rewrites the table: the log has dropped the rows of steps after `step`."""
        del step
        if self.path.exists():
            self._write_all()

    def _size_now(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _write_all(self) -> None:
        rows = read_jsonl(self._log)
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(map(_cells, rows))
        write_atomically(self.path, text.getvalue())


class TensorBoardWriter:
    """Scalars for TensorBoard, a folder for each split; event types from the package tensorboardX.

    Event files can only grow: to rewind, an event is written that makes TensorBoard ignore all
    after its step. Each row is in the file at once; tensorboardX's own writer hands it to a thread,
    and a killed process would lose it.
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
        """Makes TensorBoard ignore the rows of steps after `step`."""
        self._files, self._void_from = {}, step + 1
        if self.directory.exists():
            for folder in self.directory.iterdir():
                self._begin(folder.name)

    def _begin(self, split: str) -> Path:
        """Begins the split's next file; TensorBoard reads them in the order of their names."""
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


Send = Callable[[int, dict[str, float]], None]  # of a step and its values; does not wait


class ServiceWriter:
    """Rows for a service: one run of it for a run directory, also after a restart.

    The values of a row are named `split/name`. The service's run begins, or goes on, before the
    first step, and has the settings in `config.toml`.

    Args:
      workdir: the run directory; its file `NAME.id` keeps which of the service's runs it is.
      name: among `SERVICES`.
    """

    def __init__(self, workdir: str | Path, name: str):
        self._workdir, self._name = Path(workdir), name
        title, self._begin = SERVICES[name]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # None of a mere folder of that name
            raise check.MissingExtraError(name, name, title)
        self._title, self._id = title, self._workdir / f"{name}.id"
        self._sent: set[tuple[Any, Any]] = set()  # (step, split) of rows that come again
        self._send: Send | None = None

    def write(self, row: Row) -> None:
        """Sends the row's numbers, and its seconds on the training clock."""
        step, split = row["step"], str(row["split"]).replace("/", "-")
        if (step, row["split"]) in self._sent:
            return
        values = {k: v for k, v in row.items() if is_number(v) and math.isfinite(v) and k != "step"}
        self._open()(step, {f"{split}/{name}": value for name, value in values.items()})

    def rewind(self, step: int) -> None:
        """Notes which rows, those of `metrics.jsonl` after `step`, are there already."""
        rows = read_jsonl(self._workdir / "metrics.jsonl") if self._id.exists() else []
        late = [row for row in rows if is_number(row.get("step")) and row["step"] > step]
        self._sent |= {(row["step"], row.get("split")) for row in late}
        self._open()

    def _open(self) -> Send:
        if self._send is None:
            path = self._workdir / "config.toml"
            config = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            identity = self._id.read_text(encoding="utf-8") if self._id.exists() else None
            try:
                found, self._send = self._begin(self._workdir, identity, config)
            except Exception as error:  # of the network or of the user's account, in many types
                raise check.UserError(
                    f"{self._title} does not begin the run: {error}."
                    + (f" Without {self._id} it would be a new one." if identity else "")
                ) from error
            self._workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(self._id, found)
        return self._send


_OPEN: dict[str, Any] = {}  # W&B's runs by id, which end with the process


def _wandb_run(workdir: Path, identity: str | None, config: dict[str, Any]) -> tuple[str, Send]:
    """A run of Weights & Biases; its own environment variables, such as WANDB_MODE, count."""
    import wandb

    identity = identity or uuid.uuid4().hex
    if identity in _OPEN:  # by an earlier Estimator of this process
        _OPEN.pop(identity).finish()
    workdir.mkdir(parents=True, exist_ok=True)  # else it takes a folder for temporary files
    run = _OPEN[identity] = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "jdl"),
        name=workdir.name,
        dir=str(workdir),
        config=config,
        id=identity,
        resume="allow",
        reinit="create_new",
    )
    return identity, lambda step, values: run.log(values, step=step)


def _mlflow_run(workdir: Path, identity: str | None, config: dict[str, Any]) -> tuple[str, Send]:
    """A run of MLflow, at its own MLFLOW_TRACKING_URI; it is finished as the process ends."""
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient()
    if identity is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jdl")
        known = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if known is None else known.experiment_id
        identity = str(client.create_run(experiment, run_name=workdir.name).info.run_id)
        settings = [Param(key, str(value)[:500]) for key, value in config.items()]
        client.log_batch(identity, params=settings)
    else:
        client.update_run(identity, status="RUNNING")
    run, last = identity, list[Any]()

    def send(step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        words = {re.sub(r"[^\w\-./ ]", "_", name): x for name, x in values.items()}  # all it takes
        metrics = [Metric(name, value, now, step) for name, value in words.items()]
        last[:] = [client.log_batch(run, metrics=metrics, synchronous=False)]

    def end() -> None:
        for operations in last:
            operations.wait()
        client.set_terminated(run)

    weakref.finalize(send, end)
    return identity, send


# name -> what people call it, and what begins or continues a run: `(workdir, id, config)`
SERVICES: dict[str, tuple[str, Callable[..., tuple[str, Send]]]] = {
    "wandb": ("Weights & Biases", _wandb_run),
    "mlflow": ("MLflow", _mlflow_run),
}


class Writers:
    """Several writers as one: `metrics.jsonl`, and what is asked for besides.

    Args:
      workdir: the run directory.
      besides: "csv" for `metrics.csv`, "tensorboard" for the folder `tensorboard`; "wandb" or
        "mlflow" for a run of the service.
      directions: the directions of the rows' values, see `declare`; called at the first row.
    """

    def __init__(
        self,
        workdir: str | Path,
        besides: Iterable[str] = (),
        directions: Callable[[], Mapping[str, str]] = dict,
    ):
        workdir = Path(workdir)
        self._workdir, self._directions = workdir, directions
        self._lines = JsonlWriter(workdir / "metrics.jsonl")
        kinds: dict[str, Callable[[], Writer]] = {
            "csv": lambda: CsvWriter(self._lines.path),
            "tensorboard": lambda: TensorBoardWriter(workdir / "tensorboard"),
            **{name: functools.partial(ServiceWriter, workdir, name) for name in SERVICES},
        }
        names = dict.fromkeys(check.one_of("logs", name, kinds) for name in besides)
        self._all: list[Writer] = [self._lines, *(kinds[name]() for name in names)]
        self._declared = False
        self._trained = False

    def write(self, row: Row) -> None:
        """Appends one row to all, unless it repeats an evaluation that is in the log already."""
        # Only a run without a step since its start can evaluate the same again.
        self._trained = self._trained or row["split"] == "train"
        if not self._trained and self._is_logged(row):
            return
        if not self._declared:
            declare(self._workdir, self._directions())
            self._declared = True
        for writer in self._all:
            writer.write(row)

    def _is_logged(self, row: Row) -> bool:
        def essence(row: Row) -> dict[str, Any]:
            return {k: v for k, v in row.items() if k not in ("seconds", "epoch")}

        before = reversed(read_jsonl(self._lines.path))
        same_step = itertools.takewhile(lambda x: x.get("step") == row["step"], before)
        return any(essence(x) == essence(row) for x in same_step)

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step` from all."""
        # The services' first, which read what the log is about to drop.
        for writer in sorted(self._all, key=lambda x: not isinstance(x, ServiceWriter)):
            writer.rewind(step)


def directions(metrics: Any) -> dict[str, str]:
    """Name -> "max" or "min" for the metrics of an Estimator that declare it.

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
    """What `jdl.metrics.direction` has declared for it, or for the function of a partial."""
    found = getattr(metric, "direction", None)
    if found is None and isinstance(metric, functools.partial):
        return _declared(metric.func)
    return found


def declare(workdir: str | Path, directions: Mapping[str, str]) -> None:
    """Adds to a run's `directions.json` whether the "max" or "min" of each value is best."""
    known = read_directions(workdir)
    if known != (found := known | dict(directions)):
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        write_atomically(Path(workdir) / DIRECTIONS, text)


def read_directions(workdir: str | Path) -> dict[str, str]:
    """Name -> "max" or "min" for the values that the run has declared."""
    try:
        found = json.loads((Path(workdir) / DIRECTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {name: best for name, best in known if best in ("min", "max")}


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, [] if there is none; lines that are not rows are left out."""
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
    """Whether a row's value is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _cells(row: Row) -> dict[str, Any]:
    def cell(value: Any) -> Any:
        if value is None or _not_finite(value):
            return ""
        return value if isinstance(value, str | int | float) else json.dumps(value)

    return {name: cell(value) for name, value in row.items()}
