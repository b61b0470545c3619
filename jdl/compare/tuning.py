"""Equal tuning: the same number of trials for every optimizer, at the same points of its range.

The first trial is the default; trial k after it is at the same quasi-random point uₖ of the
optimizer's own range, on a log scale:

    value = low · (high / low)^uₖ

Settings are chosen on validation data, with a seed that the reported trials do not use.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jdl.core import check
from jdl.optim.registry import TuningRange

SAME = 0.1  # values closer to the default than this, in logarithm, are skipped
SEED = 10_000  # of initial parameters and data order while tuning
FIRST, FROM = 3, 0.1

RULE = (
    "A trial is cut when its best value so far is worse than the median of the best values that "
    "the same optimizer's earlier trials had by then; never before a tenth of the budget, nor "
    f"among the first {FIRST}."
)


class Tuning(NamedTuple):
    """How settings are chosen, the same for every optimizer.

    Attributes:
      trials: the number of values tried for each optimizer.
      share: the budget of a tuning trial as a share of a reported trial's, in (0, 1].
      criterion: a column, minimized or maximized by its metric's direction; the training loss for
        a problem without validation data.
      defaults: whether the untuned optimizers are reported too.

    >>> Tuning(trials=8, share=0.5).checked().criterion
    'validation_loss'
    """

    trials: int
    share: float = 1.0
    criterion: str = "validation_loss"
    defaults: bool = True

    def checked(self) -> "Tuning":
        """The same, if its values are valid."""
        check.positive_int("trials", self.trials)
        check.in_range("share", self.share, 0.0, 1.0, open_low=True)
        return self

    def criterion_of(self, validates: bool) -> str:
        """The column to use, for a problem with or without validation data."""
        if not validates and self.criterion.startswith("validation_"):
            return "train_loss"
        return self.criterion


def values(search: TuningRange, trials: int, default: float | None = None) -> list[float]:
    """The values to try: the default, then log-uniform ones by van der Corput's sequence.

    >>> values(TuningRange("learning_rate", 1e-4, 1.0), 4, 0.5)
    [0.5, 0.01, 0.001, 0.1]

    References:
      Bergstra & Bengio, Random search for hyper-parameter optimization (2012), section 5.
    """
    ratio = search.high / search.low
    found = [] if default is None else [float(default)]
    for k in itertools.count(1):
        value = float(f"{search.low * ratio ** place(k):.4g}")
        if len(found) >= trials:
            return found
        if default is None or abs(math.log(value / default)) > SAME:
            found.append(value)
    raise AssertionError("unreachable")


def place(k: int) -> float:
    """The k-th number of van der Corput's sequence in base 2: k's digits mirrored.

    >>> [place(k) for k in (1, 2, 3, 4)]
    [0.5, 0.25, 0.75, 0.125]
    """
    found, unit = 0.0, 0.5
    while k:
        found, k, unit = found + unit * (k % 2), k // 2, unit / 2
    return found


class Curve(NamedTuple):
    """One trial's (cost so far, value) in order; small values are good."""

    points: tuple[tuple[float, float], ...]

    def best(self, spent: float) -> float | None:
        """The best value by then; None if the trial did not get that far."""
        if not self.points or self.points[-1][0] < spent * (1.0 - 0.05):
            return None
        return min((value for at, value in self.points if at <= spent), default=None)


def hopeless(now: Curve, earlier: Sequence[Curve], budget: float) -> bool:
    """Whether a trial is to be cut, by the median stopping rule; see `RULE`.

    Args:
      now: the trial's curve so far.
      earlier: those of the optimizer's earlier trials.
      budget: of a trial.

    >>> good = [Curve(((1.0, 0.5), (9.0, x))) for x in (0.1, 0.2, 0.3)]
    >>> hopeless(Curve(((1.0, 0.5), (5.0, 0.6))), good, 10.0)
    False
    >>> hopeless(Curve(((1.0, 0.7), (5.0, 0.6))), good, 10.0)
    True

    References:
      Golovin et al., Google Vizier: a service for black-box optimization (2017), section 3.2.
    """
    if len(earlier) < FIRST or not now.points:
        return False
    spent = now.points[-1][0]
    if spent < FROM * budget:
        return False
    there = [best for curve in earlier if (best := curve.best(spent)) is not None]
    if not there:
        return False
    return min(value for _, value in now.points) > statistics.median(there)
