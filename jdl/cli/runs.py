"""The runs below a folder, with what each reached at its best.

Whether more or less of a metric is better, the metric declares (`jdl.metrics.direction`); of one
that does not, the last value is shown.

Examples:
  jdl runs
  jdl runs experiments --sort accuracy
"""

import json
import math
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

LOG = "metrics.jsonl"
# How a log's splits are told: its rows of `train` are of single batches.
SPLITS = {"all of train": "train", "train": "batch"}
SHOWN = ("test_accuracy", "test_loss", "validation_loss", "train_loss")


@dataclass
class Args:
    """Which runs, in which order."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = Path("runs")
    """where to look, and in all folders below"""
    sort: str | None = None
    """a metric such as accuracy or test_loss: the best run first; by default by name"""
    direction: Literal["min", "max"] | None = None
    """which value of that metric is the best; by default what the metric declares of itself"""
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
    check.argument(
        args.direction is None or args.sort is not None, "--direction", "given with --sort", None
    )
    held = {name for entry in found for name in entry["last"]}
    columns = [name for name in SHOWN if name in held]
    columns = columns or sorted(held & {"batch_loss", "batch_accuracy"})
    which = {name: _direction(name, found) or "last" for name in columns}
    if args.sort is not None:
        sort = _column(args.sort, held)
        best = args.direction or _direction(sort, found) or ""
        check.argument(
            bool(best),
            "--direction",
            f"min or max with --sort {args.sort}",
            None,
            f"No one has declared which value of {sort} is the best.",
        )
        which = {sort: best} | {name: at for name, at in which.items() if name != sort}
        sign = -1.0 if best == "max" else 1.0
        found.sort(key=lambda entry: sign * entry[best].get(sort, sign * math.inf))
    if args.as_json:
        for entry in found:
            print(json.dumps(entry))
        return
    from jdl.cli import output

    titles = [f"{'last' if at == 'last' else 'best'} {name}" for name, at in which.items()]
    output.table(
        ["run", "optimizer", "steps", "seconds", *titles],
        [
            [
                entry["run"],
                entry["optimizer"] or "",
                str(entry["steps"]),
                f"{entry['seconds']:.1f}",
                *(
                    f"{entry[at][name]:.4g}" if name in entry[at] else ""
                    for name, at in which.items()
                ),
            ]
            for entry in found
        ],
    )


def about(workdir: Path, root: Path) -> dict[str, Any]:
    """A run's settings and its figures, by split: `test_accuracy`, `train_loss`.

    Of each figure there is the last, the least and the greatest value; the best where the metric
    declares which that is.
    """
    from jdl.train.writers import read_directions, read_jsonl

    last: dict[str, float] = {}
    least: dict[str, float] = {}
    greatest: dict[str, float] = {}
    declared = {"loss": "min"} | read_directions(workdir)
    directions: dict[str, str] = {}
    steps, seconds = 0, 0.0
    optimizers: set[str] = set()
    for row in read_jsonl(workdir / LOG):
        step, second = row.pop("step", 0), row.pop("seconds", 0.0)
        steps = max(steps, int(step) if _is_finite(step) else 0)
        seconds = max(seconds, float(second) if _is_finite(second) else 0.0)
        row.pop("epoch", None)
        split = str(row.pop("split", ""))
        split = SPLITS.get(split, split)
        if isinstance(row.get("optimizer"), str):
            optimizers.add(row["optimizer"])
        for name, value in row.items():
            if not _is_finite(value):
                continue
            full = name if split == "evaluate" else f"{split}_{name}"
            last[full] = value
            least[full] = min(least.get(full, value), value)
            greatest[full] = max(greatest.get(full, value), value)
            if name in declared:
                directions[full] = declared[name]
    settings = _settings(workdir / "config.toml")
    named = settings.get("optimizer")
    optimizer = named if isinstance(named, str) else " ".join(sorted(optimizers)) or None
    place = str(workdir.relative_to(root)) if workdir != root else str(workdir)
    extremes = {"min": least, "max": greatest}
    return {
        "run": place,
        "model": settings.get("model"),
        "data": settings.get("data"),
        "optimizer": optimizer,
        "steps": steps,
        "seconds": seconds,
        "directions": directions,
        "best": {name: extremes[at][name] for name, at in directions.items()},
        "last": last,
        **extremes,
    }


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number that fits a float: others may have written the log."""
    from jdl.train.writers import is_number

    return is_number(value) and abs(value) <= sys.float_info.max


def _settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def _direction(name: str, found: list[dict[str, Any]]) -> str | None:
    """Which value of a metric is the best by the runs that declare it; None unless they agree."""
    declared = {entry["directions"].get(name) for entry in found} - {None}
    return declared.pop() if len(declared) == 1 else None


def _column(wanted: str, known: set[str]) -> str:
    """The metric of that name; of the test split where the split is left out."""
    from jdl.core import check

    splits = ("test", "validation", "train", "batch")
    for name in (wanted, *(f"{split}_{wanted}" for split in splits)):
        if name in known:
            return name
    return check.one_of("--sort", wanted, sorted(known))
