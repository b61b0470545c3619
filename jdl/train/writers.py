"""Where a run's numbers go: `metrics.jsonl`, one flat object a line."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, text: str) -> None:
    """Replaces the file as a whole, or leaves the old one as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class JsonlWriter:
    """Appends rows `{"step", "seconds", "epoch", "split", values…}` to a file.

    A run that goes on from an earlier checkpoint first drops the rows beyond it, so that the log
    has neither gaps nor doubles.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row; a number that is not finite becomes null."""
        clean = {k: None if _not_finite(v) else v for k, v in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step`, and a last line cut short."""
        kept = [row for row in read_jsonl(self.path) if row.get("step", 0) <= step]
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last line cut short; none where there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
