"""What commands print: tables on standard output, progress on standard error."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Report(NamedTuple):
    """A table, and the JSON that `--json` prints instead."""

    found: Mapping[str, Any]  # the JSON object
    columns: Sequence[str]  # these three as `table`
    rows: Sequence[Sequence[str]]
    title: str
    note: str  # a line below the table

    def show(self, *, as_json: bool) -> None:
        """Prints the object, or the table and the note."""
        if as_json:
            print(json.dumps(self.found))
            return
        table(self.columns, self.rows, self.title)
        print(self.note)


def visible(text: str) -> str:
    r"""`text` with escapes in place of what a terminal would obey or cannot show.

    >>> print(visible("\x1b[2Jcat\u202e"))
    \x1b[2Jcat\u202e
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def amount(nbytes: int) -> str:
    """Bytes with three digits and a unit.

    >>> amount(557_351_940), amount(1_234_567_890), amount(96)
    ('557 MB', '1.23 GB', '96 bytes')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"


def memory(estimator: Any) -> str:
    """The estimate of `jdl.Estimator.memory`, by parts."""
    if not estimator.memory:
        return "unknown"
    found = {name: amount(n) for name, n in estimator.memory.items()}
    parts = ", ".join(f"{name} {found[name]}" for name in ("state", "batches", "temporaries"))
    return f"{found['peak']} on each device ({parts})"


def say(text: str) -> None:
    """Prints a line that may hold names from an archive."""
    print(visible(text))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table; the first column is aligned to the left, the others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns, rows = [*map(visible, columns)], [[visible(cell) for cell in row] for row in rows]
    drawn = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    least = natural = 2  # characters in a line
    for i, column in enumerate(columns):
        # Words may wrap; numbers with their units and ranges may not.
        cells = [column, *(row[i] for row in rows)]
        unbroken = [x for c in cells for x in ([c] if any(map(str.isdigit, c)) else c.split())]
        width = max(map(len, unbroken), default=0)
        least, natural = least + width + 3, natural + max(map(len, cells)) + 3
        drawn.add_column(column, justify="left" if i == 0 else "right", min_width=width)
    for row in rows:
        drawn.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    if least > console.width:  # rich would leave out the last columns; the terminal wraps lines
        console.width = natural
    if title:
        console.print(visible(title))
    console.print(drawn)


def print_tenths(done: int, of: int) -> None:
    """Prints how many steps are done, ten times in all."""
    if done * 10 // of != (done - 1) * 10 // of:
        print(f"step {done}/{of}", file=sys.stderr, flush=True)
