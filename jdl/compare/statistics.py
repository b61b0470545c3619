"""Whether one optimizer beats another over problems and seeds, with its significance.

Everything is computed from the cost to reach the target, in the budget's own unit. A trial that
missed it has the cost ∞; none is dropped.
"""

import math
from collections.abc import Sequence
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


def win_matrix(costs: dict[str, np.ndarray]) -> dict[tuple[str, str], Duel]:
    """Every pair's duel."""
    return {(a, b): duel(costs[a], costs[b]) for a in costs for b in costs if a != b}


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
