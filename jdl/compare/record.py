"""A trial in its directory: run, resumed or moved aside, and its outcome recorded.

config.toml     its settings
metrics.jsonl   its rows
directions.json which metrics are to be small, and which large
checkpoints/    from which an interrupted trial resumes
error.txt       the traceback of an error that ended it
result.json     the outcome; written last
"""

import contextlib
import errno
import gc
import json
import logging
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

from jdl.compare import feeds, machine, trial
from jdl.compare.results import Row
from jdl.compare.trial import Outcome, Task
from jdl.core import check
from jdl.core.files import write_atomically
from jdl.train.lock import run_lock
from jdl.train.writers import JsonlWriter, declare, directions

logger = logging.getLogger("jdl.compare")


def run(
    directory: Path,
    config: str,
    task: Task,
    evaluation: Callable[[], feeds.Evaluation],
    on_row: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Runs the trial to its end; an error ends the trial, not the study.

    Args:
      directory: the trial's; if another process runs it there, it is left alone.
      config: the text of `config.toml`; an unfinished trial with the same text is resumed.
      task: the trial.
      evaluation: makes the problem's evaluation.
      on_row: receives the rows of evaluations.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run_lock(directory.parent / f".{directory.name}"))
        except check.UserError as error:  # another process runs it, and records it
            return Outcome("missing", str(error))
        except OSError as error:
            return Outcome("failed", _words(error, directory))
        try:
            _prepare(directory, config)
            best = directions(task.problem.metrics).items()
            parts = ("train", "validation", "test")
            declare(directory, {f"{part}_{name}": at for part in parts for name, at in best})
            writer = JsonlWriter(directory / "metrics.jsonl")

            def write_row(row: Row) -> None:
                writer.write(row)
                on_row(row)

            gc.collect()  # so that the last trial's garbage is not collected on this one's clock
            ended = trial.run(
                task,
                train_on=feeds.training(task.problem, task.entry, task.seed, task.devices),
                evaluate=evaluation(),
                write=write_row,
                directory=directory,
            )
        except Exception as error:
            ended = Outcome("failed", _words(error, directory))
        write(directory, ended)
        return ended


def write(directory: Path, ended: Outcome) -> None:
    """Records how a trial ended; without that, it has not."""
    text = json.dumps(ended._asdict() | {"commit": machine.commit()}, indent=1) + "\n"
    try:
        write_atomically(directory / "result.json", text)
    except OSError as error:
        logger.warning("%s could not be written: %s", directory / "result.json", error)


def _prepare(directory: Path, config: str) -> None:
    """Makes the directory ready: with a checkpoint to resume from, or empty.

    A finished trial is moved to `earlier`; an unfinished one without a checkpoint is deleted.
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
    """The error in a line; its traceback is written to the trial's directory."""
    line = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk of {directory} is full. Make room and start the study again."
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return line
    return f"{line} (more in {directory / 'error.txt'})"
