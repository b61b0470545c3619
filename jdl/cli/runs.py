"""The runs below a folder, with what each reached at its best.

Examples:
  jdl runs
  jdl runs experiments --sort accuracy
"""

import json
import math
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

LOG = "metrics.jsonl"
# How a log's splits are told: its rows of `train` are of single batches.
SPLITS = {"all of train": "train", "train": "batch"}
# Where more is better; of all other metrics the least is the best.
RISING = ("accuracy", "top", "gain")


@dataclass
class Args:
    """Which runs, in which order."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = Path("runs")
    """where to look, and in all folders below"""
    sort: str | None = None
    """a metric such as accuracy or test_loss: the best run first; by default by name"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print one JSON object a run"""


def run(args: Args) -> None:
    """Reads the logs, and prints a table."""
    from jdl.core import check

    check.argument(
        args.folder.is_dir(),
        "DIR",
        "a folder with runs in it",
        str(args.folder),
        "There is no such folder here; `jdl train` writes into runs/ unless told otherwise.",
    )
    found = [about(path.parent, args.folder) for path in sorted(args.folder.rglob(LOG))]
    check.argument(
        bool(found), "DIR", f"a folder with runs in it, each with a {LOG}", str(args.folder)
    )
    if args.sort is not None:
        sort = _column(args.sort, found)

        def rank(run: dict[str, Any]) -> float:
            value = run["best"].get(sort, math.nan)
            if math.isnan(value):
                return math.inf
            return -value if _rises(sort) else value

        found.sort(key=rank)
    if args.as_json:
        for entry in found:
            print(json.dumps(entry))
        return
    from jdl.cli import progress

    held = {name for entry in found for name in entry["best"]}
    columns = [name for name in ("test_accuracy", "test_loss", "train_loss") if name in held]
    columns = columns or sorted(held & {"batch_loss", "batch_accuracy"})
    progress.table(
        ["run", "optimizer", "steps", "seconds", *(f"best {c}" for c in columns)],
        [
            [
                entry["run"],
                entry["optimizer"] or "",
                str(entry["steps"]),
                f"{entry['seconds']:.1f}",
                *(f"{entry['best'][c]:.4g}" if c in entry["best"] else "" for c in columns),
            ]
            for entry in found
        ],
    )


def about(workdir: Path, root: Path) -> dict[str, Any]:
    """A run's settings and its best figures, by split: `test_accuracy`, `train_loss`."""
    best: dict[str, float] = {}
    steps, seconds = 0, 0.0
    optimizers: set[str] = set()
    for row in _rows(workdir / LOG):
        step, second = row.pop("step", 0), row.pop("seconds", 0.0)
        steps = max(steps, int(step) if _is_number(step) else 0)
        seconds = max(seconds, float(second) if _is_number(second) else 0.0)
        split = str(row.pop("split", ""))
        split = SPLITS.get(split, split)
        if isinstance(row.get("optimizer"), str):
            optimizers.add(row["optimizer"])
        for name, value in row.items():
            if not _is_number(value):
                continue
            full = name if split == "evaluate" else f"{split}_{name}"
            better = max if _rises(full) else min
            best[full] = better(best.get(full, value), value)
    settings = _settings(workdir / "config.toml")
    named = settings.get("optimizer")
    optimizer = named if isinstance(named, str) else " ".join(sorted(optimizers)) or None
    place = str(workdir.relative_to(root)) if workdir != root else str(workdir)
    return {
        "run": place,
        "model": settings.get("model"),
        "data": settings.get("data"),
        "optimizer": optimizer,
        "steps": steps,
        "seconds": seconds,
        "best": best,
    }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # a line that is being written, or another's
            if isinstance(row, dict):
                yield row


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that fits a float: others may have written the log."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def _rises(name: str) -> bool:
    return any(word in name for word in RISING)


def _column(wanted: str, found: list[dict[str, Any]]) -> str:
    """The metric of that name; of the test split where the split is left out."""
    from jdl.core import check

    known = sorted({name for entry in found for name in entry["best"]})
    for name in (wanted, f"test_{wanted}", f"train_{wanted}"):
        if name in known:
            return name
    return check.one_of("--sort", wanted, known)
