"""The runs below a folder, with the best value of each metric.

A metric declares whether larger or smaller values are better (`jdl.metrics.direction`); for one
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

from jdl.cli import options, output
from jdl.core import check

LOG = "metrics.jsonl"
SPLITS = {"all of train": "train", "train": "batch"}  # a log's `train` rows are single batches
SHOWN = ("test_accuracy", "test_loss", "validation_loss", "train_loss")


@dataclass
class Args:
    """The options of `jdl runs`."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = Path("runs")
    """the folder to search, with all folders below it"""
    sort: str | None = None
    """a metric such as accuracy or test_loss: the best run first; by default sorted by name"""
    direction: Literal["min", "max"] | None = None
    """whether that metric's best value is its smallest or largest; by default what it declares"""
    as_json: options.Json = False


def run(args: Args) -> None:
    """Reads the logs, and prints a table or one JSON object for each run."""
    ok = args.folder.is_dir()
    must = "a folder with runs in it"
    hint = "There is no such folder; `jdl train` writes into runs/ by default."
    check.argument(ok, "DIR", must, str(args.folder), hint)
    ok = args.direction is None or args.sort is not None
    check.argument(ok, "--direction", "given with --sort", None)
    found = [about(path.parent, args.folder) for path in sorted(args.folder.rglob(LOG))]
    must = f"a folder with runs in it, each with a {LOG}"
    check.argument(bool(found), "DIR", must, str(args.folder))
    known = {name for entry in found for name in entry["last"]}
    columns = [name for name in SHOWN if name in known]
    columns = columns or sorted(known & {"batch_loss", "batch_accuracy"})
    which = {name: _direction(name, found) or "last" for name in columns}
    if args.sort is not None:
        sort = _column(args.sort, known)
        best = args.direction or _direction(sort, found) or ""
        ok = bool(best)
        must = f"min or max with --sort {args.sort}"
        hint = f"The runs do not declare which value of {sort} is the best."
        check.argument(ok, "--direction", must, None, hint)
        which = {sort: best} | {name: at for name, at in which.items() if name != sort}
        sign = -1.0 if best == "max" else 1.0
        found.sort(key=lambda entry: sign * entry[best].get(sort, sign * math.inf))
    if args.as_json:
        for entry in found:
            print(json.dumps(entry))
        return
    titles = [f"{'last' if at == 'last' else 'best'} {name}" for name, at in which.items()]
    rows = []
    for entry in found:
        values = [entry[at].get(name) for name, at in which.items()]
        row = [entry["run"], entry["optimizer"] or "", str(entry["steps"])]
        row += [f"{entry['seconds']:.1f}", *("" if v is None else f"{v:.4g}" for v in values)]
        rows.append(row)
    output.table(["run", "optimizer", "steps", "seconds", *titles], rows)


def about(workdir: Path, root: Path) -> dict[str, Any]:
    """A run's settings, and the last, smallest, largest and best value of each split's metrics."""
    from jdl.train.writers import read_directions, read_jsonl

    series: dict[str, list[float]] = {}
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
            if _is_finite(value):
                full = name if split == "evaluate" else f"{split}_{name}"
                series.setdefault(full, []).append(value)
                if name in declared:
                    directions[full] = declared[name]
    settings = _settings(workdir / "config.toml")
    named = _with_options(settings)
    extremes = {
        "min": {name: min(values) for name, values in series.items()},
        "max": {name: max(values) for name, values in series.items()},
    }
    return {
        "run": str(workdir.relative_to(root)) if workdir != root else str(workdir),
        "model": settings.get("model"),
        "data": settings.get("data"),
        "optimizer": named if isinstance(named, str) else " ".join(sorted(optimizers)) or None,
        "steps": steps,
        "seconds": seconds,
        "directions": directions,
        "best": {name: extremes[at][name] for name, at in directions.items()},
        "last": {name: values[-1] for name, values in series.items()},
        **extremes,
    }


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number that fits a float: other programs may write such logs too."""
    from jdl.train.writers import is_number

    return is_number(value) and abs(value) <= sys.float_info.max


def _settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def _with_options(settings: dict[str, Any]) -> Any:
    """A run's optimizer, with what `jdl train` was told of it in parentheses."""
    told = [f"{x}" for x in settings.get("option", ())]
    names = ("learning_rate", "weight_decay", "clip", "schedule", "warmup", "decay_to")
    usual = {"schedule": "constant"}
    told += [f"{x}={settings[x]}" for x in names if settings.get(x, 0) not in (0, usual.get(x, 0))]
    return f"{settings['optimizer']}({', '.join(told)})" if told else settings.get("optimizer")


def _direction(name: str, found: list[dict[str, Any]]) -> str | None:
    """The direction that the runs declare for a metric; None unless they agree."""
    declared = {entry["directions"].get(name) for entry in found} - {None}
    return declared.pop() if len(declared) == 1 else None


def _column(wanted: str, known: set[str]) -> str:
    """The metric of that name; without a split, the first split that has it, test before others."""
    splits = ("test", "validation", "train", "batch")
    for name in (wanted, *(f"{split}_{wanted}" for split in splits)):
        if name in known:
            return name
    return check.one_of("--sort", wanted, sorted(known))
