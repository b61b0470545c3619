"""How far a run is: a live line on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

EVERY = 5.0  # seconds between plain lines


class StepProgress:
    """A hook for an Estimator that shows steps, loss and images a second.

    Args:
      total: the step the run is to end at.
      batch_size: images a step.
    """

    def __init__(self, total: int, batch_size: int):
        self._console = Console(stderr=True)
        self._total, self._batch_size = total, batch_size
        self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("train", total=total, numbers="compiling …")

    def __enter__(self) -> "StepProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Takes one row of the log."""
        if row["split"] != "train":
            return
        numbers = f"loss {row['loss']:.4g}"
        if self._first is None:
            self._first = (row["step"], row["seconds"])
        elif row["seconds"] > self._first[1]:
            rate = (row["step"] - self._first[0]) / (row["seconds"] - self._first[1])
            numbers += f"  {rate * self._batch_size:.0f} images/s"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=row["step"], numbers=numbers)
        elif time.monotonic() - self._printed >= EVERY or row["step"] == self._total:
            self._printed = time.monotonic()
            self._console.print(f"step {row['step']}/{self._total}  {numbers}", highlight=False)


def table(columns: list[str], rows: list[list[str]], title: str = "") -> None:
    """Prints a table on standard output; the first column to the left, the others to the right."""
    drawn = Table(
        title=title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        # Words may wrap, figures with their units and ranges may not.
        cells = [column, *(row[i] for row in rows)]
        unbroken = [x for c in cells for x in ([c] if any(map(str.isdigit, c)) else c.split())]
        width = max(map(len, unbroken), default=0)
        drawn.add_column(column, justify="left" if i == 0 else "right", min_width=width)
    for row in rows:
        drawn.add_row(*row)
    Console(highlight=False).print(drawn)
