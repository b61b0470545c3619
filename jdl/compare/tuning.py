"""Equal tuning: the same number of trials for every optimizer, at the same points of its space.

The first trial is the default; trial k after it is at the same quasi-random point uₖ in [0, 1]ᵈ, by
Halton's sequence, of the optimizer's own ranges, each on its own scale:

    value = low · (high / low)^u    (log)

In the first half of the trials only the main number, such as the rate, differs from the default:
it decides most, and a few points of many dimensions are far from each other.

Settings are chosen on validation data, with a seed that the reported trials do not use.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jdl.core import check
from jdl.optim.registry import TuningRange

SAME = 0.01  # points closer to the default than this share of every range are skipped
PRIMES = (2, 3, 5, 7, 11, 13)
NUMBERS = ("all", "main")
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
      numbers: "all" of each optimizer's space, or its "main" number alone.

    >>> Tuning(trials=8, share=0.5).checked().criterion
    'validation_loss'
    """

    trials: int
    share: float = 1.0
    criterion: str = "validation_loss"
    defaults: bool = True
    numbers: str = "all"

    def checked(self) -> "Tuning":
        """The same, if its values are valid."""
        check.positive_int("trials", self.trials)
        check.in_range("share", self.share, 0.0, 1.0, open_low=True)
        check.one_of("numbers", self.numbers, NUMBERS)
        return self

    def space(self, ranges: Sequence[TuningRange]) -> tuple[TuningRange, ...]:
        """Those of the ranges that are tuned."""
        return tuple(ranges[:1] if self.numbers == "main" else ranges)

    def criterion_of(self, validates: bool) -> str:
        """The column to use, for a problem with or without validation data."""
        if not validates and self.criterion.startswith("validation_"):
            return "train_loss"
        return self.criterion


def points(
    space: Sequence[TuningRange], trials: int, default: Mapping[str, int | float] | None = None
) -> list[dict[str, int | float]]:
    """The values to try, by parameter: the default, then those at the points of Halton's sequence.

    Args:
      space: at most six ranges, the main one first.
      trials: how many points.
      default: the first; None for none, and for all numbers to vary from the start.

    >>> space = [TuningRange("learning_rate", 1e-4, 1.0), TuningRange("warmup", 0.0, 0.3, "linear")]
    >>> points(space, 3, {"learning_rate": 0.5, "warmup": 0.0})[1:]
    [{'learning_rate': 0.01, 'warmup': 0.0}, {'learning_rate': 0.001, 'warmup': 0.2}]

    References:
      Halton, On the efficiency of certain quasi-random sequences of points (1960).
      Bergstra & Bengio, Random search for hyper-parameter optimization (2012), section 5.
    """
    found = [] if default is None else [dict(default)]
    for k in itertools.count(1):
        if len(found) >= trials:
            return found
        values = {x.parameter: x.at(place(k, base)) for x, base in zip(space, PRIMES, strict=False)}
        if default is not None and len(found) < (trials + 1) // 2:
            values = {**default, space[0].parameter: values[space[0].parameter]}
        if default is None or any(
            abs(x.share(values[x.parameter]) - x.share(default[x.parameter])) > SAME for x in space
        ):
            found.append(values)
    raise AssertionError("unreachable")


def place(k: int, base: int = 2) -> float:
    """The k-th number of van der Corput's sequence: k's digits in that base mirrored.

    >>> [place(k) for k in (1, 2, 3, 4)]
    [0.5, 0.25, 0.75, 0.125]
    """
    found, unit = 0.0, 1.0 / base
    while k:
        found, k, unit = found + unit * (k % base), k // base, unit / base
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
