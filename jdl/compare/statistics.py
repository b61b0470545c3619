"""Whether one optimizer beats another over problems and seeds, with its significance.

Costs are those to reach the target, in the budget's own unit. A trial that missed it has the cost
∞; none is dropped. Strata are the problems: seeds are compared and resampled within each.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jdl.core import check


class Profile(NamedTuple):
    """One optimizer's performance profile.

    Attributes:
      ratios: τ, ascending from 1.
      shares: the share of trials solved within τ times the best optimizer's cost.
      score: the mean share over τ in [1, 4], the area under the profile.
    """

    ratios: tuple[float, ...]
    shares: tuple[float, ...]
    score: float


class Duel(NamedTuple):
    """Two optimizers over all problems and seeds.

    Attributes:
      wins: how often the first had the smaller cost.
      losses: how often it had the larger; ties, two misses included, count for neither.
      p_value: of the exact two-sided sign test: the probability of a result at least as one-sided
        if both were equally likely to win.
    """

    wins: int
    losses: int
    p_value: float


def performance_profiles(costs: dict[str, np.ndarray], up_to: float = 4.0) -> dict[str, Profile]:
    """The performance profile of each optimizer.

    ρ(τ) is the share of trials whose cost is at most τ times the smallest of all optimizers on the
    same problem and seed. Trials that none solved count as unsolved by all.

    Args:
      costs: optimizer -> the cost of each trial, in the same order for all.
      up_to: the largest τ.

    >>> found = performance_profiles({"a": np.array([1.0, 4.0]), "b": np.array([2.0, 2.0])})
    >>> found["a"].shares[0], found["b"].shares[-1]
    (0.5, 1.0)

    References:
      Dolan & Moré, Benchmarking optimization software with performance profiles (2002), section 2.
      Dahl et al., Benchmarking neural network training algorithms (2023): the integral to τ = 4.
    """
    best = np.min(np.stack(list(costs.values())), axis=0)
    solved = np.isfinite(best)
    ratios = {}
    for name, cost in costs.items():
        ratio = np.full(len(best), np.inf)
        np.divide(cost, best, out=ratio, where=solved & (best > 0))
        ratio[solved & (best == 0)] = np.where(cost[solved & (best == 0)] == 0, 1.0, np.inf)
        ratios[name] = ratio
    steps = sorted({1.0, up_to} | {r for x in ratios.values() for r in x if 1.0 <= r <= up_to})
    profiles = {}
    for name, ratio in ratios.items():
        shares = [float(np.mean(ratio <= tau)) for tau in steps]
        pairs = zip(shares, np.diff(steps), strict=False)
        area = sum(share * width for share, width in pairs)
        profiles[name] = Profile(tuple(steps), tuple(shares), float(area / (up_to - 1.0)))
    return profiles


def duel(one: np.ndarray, other: np.ndarray) -> Duel:
    """Compares two optimizers' costs trial by trial.

    >>> duel(np.array([1.0, 1.0, 1.0, 1.0, 1.0]), np.array([2.0, 3.0, 2.0, math.inf, 2.0]))
    Duel(wins=5, losses=0, p_value=0.0625)
    """
    wins, losses = int(np.sum(one < other)), int(np.sum(one > other))
    number = wins + losses
    tail = sum(math.comb(number, k) for k in range(min(wins, losses) + 1)) / 2**number
    return Duel(wins, losses, min(1.0, 2.0 * tail))


def median_interval(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval of the median, by percentiles.

    Args:
      values: one for each seed; ∞ where the target was missed.
      level: the confidence level, in (0, 1).
      draws: the number of resamples.
      seed: for the resampling.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    (1.0, 5.0)

    References:
      Efron & Tibshirani, An introduction to the bootstrap (1993), chapter 13.
    """
    check.in_range("level", level, 0.0, 1.0, open_low=True, open_high=True)
    x = np.asarray(values, float)
    medians = np.sort(_medians(x, draws, seed))
    low = math.floor((1.0 - level) / 2.0 * draws)
    return float(medians[low]), float(medians[draws - 1 - low])


def _medians(x: np.ndarray, draws: int, seed: int) -> np.ndarray:
    samples = np.sort(x[np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))], axis=1)
    middle = len(x) // 2
    if len(x) % 2:
        return samples[:, middle]
    low, high = samples[:, middle - 1], samples[:, middle]
    return np.where(np.isfinite(high), (low + np.where(np.isfinite(high), high, 0.0)) / 2, high)


# ------------------------------------------------------------------ pairs, over strata


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def probability_of_improvement(
    one: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """P(X < Y) + ½ P(X = Y) for the costs X, Y of any two seeds, averaged over problems.

    Args:
      one: of each problem, the costs of the seeds, float[n].
      other: likewise.
      level: of the percentile interval of a bootstrap over seeds, stratified by problem.
      draws: the number of resamples.
      seed: for the resampling.

    >>> costs = [np.array([1.0, 2.0]), np.array([3.0, math.inf])]
    >>> probability_of_improvement(costs, [x + 2.0 for x in costs]).value
    0.8125

    References:
      Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice (2021),
      section 4.3.
    """
    rng = np.random.default_rng(seed)
    value, resampled = 0.0, np.zeros(draws)
    for x, y in zip(one, other, strict=True):
        better = (x[:, None] < y[None, :]) + 0.5 * (x[:, None] == y[None, :])
        i, j = (rng.integers(0, len(z), (draws, len(z))) for z in (x, y))
        resampled += better[i[:, :, None], j[:, None, :]].mean(axis=(1, 2))
        value += float(better.mean())
    low, high = np.quantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(*(float(v) / len(one) for v in (value, low, high)))


def cost_ratio(
    one: Sequence[np.ndarray], other: Sequence[np.ndarray], *, level: float = 0.95
) -> Interval | None:
    """How many times the first's cost the other's is: the geometric mean over problems and seeds.

    The interval is Student's, of the logarithms of the ratios seed by seed, whose variance is
    pooled over the problems. None where a cost is not finite and positive, or each problem has
    one seed.

    Args:
      one: of each problem, the costs of the seeds, float[n].
      other: likewise, of the same seeds.
      level: of the interval.

    >>> ratio = cost_ratio([np.array([1.0, 2.0, 4.0])], [np.array([2.0, 4.0, 8.0])])
    >>> round(ratio.value, 6)
    2.0
    """
    both = list(itertools.chain(one, other))
    if not all(np.all(np.isfinite(x) & (x > 0)) for x in both):
        return None
    logs = [np.log(y) - np.log(x) for x, y in zip(one, other, strict=True)]
    freedom = sum(len(d) - 1 for d in logs)
    if not freedom:
        return None
    mean = float(np.mean([d.mean() for d in logs]))
    variance = sum(float(np.sum((d - d.mean()) ** 2)) for d in logs) / freedom
    error = math.sqrt(variance * sum(1 / len(d) for d in logs)) / len(logs)
    reach = t_quantile((1.0 + level) / 2.0, freedom) * error
    return Interval(*(math.exp(mean + x) for x in (0.0, -reach, reach)))


def pooled_deviation(samples: Sequence[np.ndarray]) -> float | None:
    """The standard deviation within samples, pooled; None where each has fewer than two values.

    Samples with values that are not finite are left out.

    >>> pooled_deviation([np.array([1.0, 3.0]), np.array([10.0, 12.0]), np.array([5.0])])
    1.4142135623730951
    """
    kept = [x for x in samples if np.all(np.isfinite(x))]
    freedom = sum(len(x) - 1 for x in kept)
    if not freedom:
        return None
    return math.sqrt(sum(float(np.sum((x - x.mean()) ** 2)) for x in kept) / freedom)


def detectable_ratio(
    deviation: float, seeds: int, *, level: float = 0.05, power: float = 0.8
) -> float:
    """The smallest ratio of two costs that a two-sided z test of n seeds each finds.

        exp((z₁₋ₗ⸝₂ + z_power) σ √(2 / n))

    Args:
      deviation: σ of the logarithm of a cost over seeds, ≥ 0.
      seeds: n.
      level: l, of significance.
      power: the probability of finding it.

    >>> round(detectable_ratio(0.05, 5), 3)
    1.093
    """
    z = NormalDist().inv_cdf
    return math.exp((z(1.0 - level / 2.0) + z(power)) * deviation * math.sqrt(2.0 / seeds))


# ------------------------------------------------------------------ the target


def target_p_value(
    values: Sequence[float] | np.ndarray,
    threshold: float,
    at_most: bool,
    deviation: float | None = None,
) -> float | None:
    """The one-sided p of values over seeds against "the mean just misses the target".

    Student's t test for three values or more, else the z test with a known deviation.

    Args:
      values: one for each seed; p is 1 where one is not finite.
      threshold: the target.
      at_most: whether values below it meet it.
      deviation: for fewer than three values; None gives None for them.

    >>> target_p_value([0.9, 0.8, 0.7], 1.0, at_most=True)  # doctest: +ELLIPSIS
    0.0370...
    """
    x = np.asarray(values, float)
    if not np.all(np.isfinite(x)):
        return 1.0
    if len(x) < 3 and deviation is None:
        return None
    sigma = float(np.std(x, ddof=1)) if len(x) >= 3 else float(deviation or 0.0)
    ahead = float(threshold - x.mean()) * (1.0 if at_most else -1.0)
    if sigma == 0.0:
        return 0.0 if ahead > 0 else 1.0
    score = ahead / (sigma / math.sqrt(len(x)))
    return t_tail(score, len(x) - 1) if len(x) >= 3 else 1.0 - NormalDist().cdf(score)


def t_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution with a whole number of degrees of freedom.

    >>> round(t_tail(2.015, 5), 4)
    0.05

    References:
      Abramowitz & Stegun, Handbook of mathematical functions (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cos2, odd = math.cos(angle) ** 2, freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    inside = math.sin(angle) * total
    if odd:
        inside = 2.0 / math.pi * (angle + inside)
    return min(max((1.0 - inside) / 2.0, 0.0), 1.0)


def t_quantile(p: float, freedom: int) -> float:
    """The t with P(T ≤ t) = p, for p in [½, 1), by bisection.

    >>> round(t_quantile(0.975, 4), 4)
    2.7764
    """
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1.0 - p:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if t_tail(middle, freedom) > 1.0 - p else (low, middle)
    return (low + high) / 2.0
