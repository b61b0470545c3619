"""A run's progress: a live line on a terminal, a plain line every few seconds elsewhere."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from jdl.cli import output

EVERY = 5.0  # seconds between plain lines
RECENT = 20  # rows of the log over which speed is measured


class StepProgress:
    """A hook for an Estimator that shows steps, loss, speed and the remaining time.

    Speed is measured over the last rows of the log: images per second, and the time of a step on
    the training clock, which excludes evaluation and saving. `wait` is the share of it spent
    waiting for data. `total` is the run's last step.
    """

    def __init__(self, total: int, batch_size: int | None):  # None without images
        self._console = Console(stderr=True)
        self._total, self._batch_size = total, batch_size
        self._printed = time.monotonic()
        self._recent: deque[_Point] = deque(maxlen=RECENT)
        self._run: Any = None  # the run of the recent rows, and how often it was restored
        self._bar = Progress(
            MofNCompleteColumn(table_column=Column("step", min_width=2 * len(str(total)) + 1)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # the remaining width
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=total, numbers="compiling …")

    def __enter__(self) -> "StepProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:  # it prints an empty line elsewhere
            self._bar.stop()

    def compiled(self, estimator: Any) -> None:
        """Prints how much memory the training needs, before the first step."""
        print(f"memory: {output.memory(estimator)}", flush=True)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Takes one row of the log."""
        if row["split"] != "train":
            return
        waited = row.get("data_wait", 0.0)
        run = (getattr(row, "estimator", None), getattr(row, "restores", 0))
        if run != self._run:
            self._recent.clear()
        self._run = run
        self._recent.append(_Point(row["step"], row["seconds"], time.monotonic()))
        numbers = "  ".join([f"loss {row['loss']:.3g}", *self._speed(waited)])
        if self._console.is_terminal:
            self._bar.update(self._task, completed=row["step"], numbers=numbers)
        elif time.monotonic() - self._printed >= EVERY or row["step"] == self._total:
            self._printed = time.monotonic()
            text = f"step {row['step']}/{self._total}  {numbers}"
            self._console.print(text, highlight=False, soft_wrap=True)

    def _speed(self, waited: float) -> list[str]:
        first, last = self._recent[0], self._recent[-1]
        steps, seconds = last.step - first.step, last.seconds - first.seconds
        if steps < 1 or seconds <= 0.0:
            return []
        left = (self._total - last.step) * (last.at - first.at) / steps
        in_step, unit = (self._batch_size, "images") if self._batch_size else (1, "steps")
        return [
            f"{steps * in_step / seconds:.4g} {unit}/s",
            f"{_seconds(seconds / steps)}/step",
            f"wait {waited:.0%}",
            f"ETA {_clock(left)}",
        ]


class _Point(NamedTuple):
    step: int
    seconds: float  # on the training clock
    at: float  # on the wall's


def _seconds(value: float) -> str:
    """Seconds with three digits and a unit.

    >>> _seconds(0.01234), _seconds(0.00005), _seconds(2.5)
    ('12.3 ms', '50 µs', '2.5 s')
    """
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1.0:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3725.4), _clock(59.7)
    ('1:02:05', '1:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
