"""A trial in its directory: run, resumed or moved aside, and how it ended recorded.

config.toml     what it is
metrics.jsonl   its rows
directions.json which of their values are best at their smallest, which at their largest
checkpoints/    where it goes on when it was cut short
error.txt       the trace of what ended it
result.json     how it ended; written last
"""

import contextlib
import errno
import gc
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jdl.compare import feeds, machine, trial
from jdl.compare.budget import Budget
from jdl.compare.optimizers import Entry
from jdl.compare.problems import Problem
from jdl.compare.results import Row
from jdl.compare.trial import Outcome
from jdl.core import check
from jdl.core.files import write_atomically
from jdl.train.lock import run_lock
from jdl.train.writers import JsonlWriter, declare, directions

logger = logging.getLogger("jdl.compare")


def run(
    directory: Path,
    config: str,
    problem: Problem,
    entry: Entry,
    seed: int,
    budget: Budget,
    evaluation: Callable[[], feeds.Evaluation],
    told: Callable[[Row], None] = lambda row: None,
    *,
    evaluations: int,
    devices: Sequence[jax.Device],
    clock: Callable[[], float] = time.perf_counter,
    cut: Callable[[Row], bool] = lambda row: False,
) -> Outcome:
    """Runs the trial to its end, whatever that is; an error ends the trial, not the study.

    Args:
      directory: the trial's; another process's trial there is left alone.
      config: the text of `config.toml`; what was cut short is gone on with where it is the same.
      problem: as for `trial.run`, and so are all that follow but two.
      entry: the optimizer.
      seed: of the initial parameters.
      budget: how much it may spend.
      evaluation: gives the problem's evaluation.
      told: receives the rows of evaluations.
      evaluations: how many.
      devices: to train on.
      clock: reads the training clock.
      cut: whether to end the trial.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run_lock(directory.parent / f".{directory.name}"))
        except check.UserError as error:  # another process runs it, and records it
            return Outcome("missing", str(error), 0.0, "")
        except OSError as error:
            return failed(_words(error, directory))
        try:
            _prepare(directory, config)
            best = directions(problem.metrics).items()
            parts = ("train", "validation", "test")
            declare(directory, {f"{part}_{name}": at for part in parts for name, at in best})
            writer = JsonlWriter(directory / "metrics.jsonl")

            def write_row(row: Row) -> None:
                writer.write(row)
                told(row)

            gc.collect()  # so that the last trial's garbage is not collected on this one's clock
            ended = trial.run(
                problem,
                entry,
                seed,
                budget=budget,
                evaluations=evaluations,
                train_on=feeds.training(problem, entry, seed, devices),
                evaluate=evaluation(),
                write=write_row,
                devices=devices,
                directory=directory,
                clock=clock,
                cut=cut,
            )
        except Exception as error:
            ended = failed(_words(error, directory))
        write(directory, ended)
        return ended


def write(directory: Path, ended: Outcome) -> None:
    """Records how a trial ended; without that, it has not."""
    text = json.dumps(ended._asdict() | {"commit": machine.commit()}, indent=1) + "\n"
    try:
        write_atomically(directory / "result.json", text)
    except OSError as error:
        logger.warning("%s could not be written: %s", directory / "result.json", error)


def failed(words: str) -> Outcome:
    """How a trial ended that an error ended."""
    return Outcome("failed", words, 0.0, "")


def _prepare(directory: Path, config: str) -> None:
    """Makes the directory ready: to go on in, or empty.

    What had ended there lies under `earlier`; what was cut short without a checkpoint is dropped.
    """
    same = directory / "config.toml"
    if (directory / "result.json").exists():
        earlier = directory.parent / "earlier"
        earlier.mkdir(exist_ok=True)
        number = len(list(earlier.glob(f"{directory.name}-*"))) + 1
        directory.rename(earlier / f"{directory.name}-{number}")
    elif (directory / "checkpoints").exists():
        if same.exists() and same.read_text(encoding="utf-8") == config:
            return
        shutil.rmtree(directory / "checkpoints")
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.toml", "metrics.jsonl", "error.txt"):
        (directory / name).unlink(missing_ok=True)
    write_atomically(same, config)


def _words(error: Exception, directory: Path) -> str:
    """What went wrong, in a line; the whole trace lies in the trial's directory."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk of {directory} is full. Make room and start the study again."
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return f"{type(error).__name__}: {first_line}"
    return f"{type(error).__name__}: {first_line} (more in {directory / 'error.txt'})"
