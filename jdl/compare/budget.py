"""The budget of each trial of a study."""

from typing import NamedTuple

from jdl.core import check

# kind -> the column of an evaluation's row that counts it, and its unit
KINDS = {
    "seconds": ("seconds", "s of training"),
    "epochs": ("epoch", "epochs"),
    "work": ("work", "gradients of the whole training set"),
    "steps": ("step", "steps"),
}


class Budget(NamedTuple):
    """A number of seconds of training, epochs, units of work, or steps.

    Attributes:
      amount: how much, > 0.
      kind: "seconds" on the training clock; "epochs", passes over the data; "work", in gradients of
        the whole training set, see `jdl.optim.diagnostics.COSTS`; or "steps".

    >>> str(Budget(30.0)), str(Budget(100, "epochs"))
    ('30 s of training', '100 epochs')
    """

    amount: float | int
    kind: str = "seconds"

    @classmethod
    def checked(cls, amount: float | int, kind: str) -> "Budget":
        """The budget, if its values are valid."""
        check.one_of("budget", kind, KINDS)
        return cls(check.in_range(kind, float(amount), 0.0, 1e9, open_low=True), kind)

    @property
    def column(self) -> str:
        """The column of an evaluation's row that counts it."""
        return KINDS[self.kind][0]

    def __str__(self) -> str:
        return f"{self.amount:g} {KINDS[self.kind][1]}"

    def in_words(self, amount: str) -> str:
        """An amount with its unit.

        >>> Budget(3, "seconds").in_words("0.25")
        '0.25 s'
        """
        unit = {"seconds": "s", "work": "gradients of work"}.get(self.kind, self.kind)
        return f"{amount} {unit}"
