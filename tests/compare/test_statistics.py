"""Profiles, duels and intervals, against SciPy, brute force, and studies without a winner."""

import math

import numpy as np
import pytest
from scipy import stats

from jdl.compare import load_results
from jdl.compare.results import cost_to_target
from jdl.compare.statistics import (
    duel,
    median_interval,
    performance_profiles,
    win_matrix,
)
from jdl.core.check import ArgumentError


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (7, 3), (12, 12), (2, 9)])
def test_the_sign_test_is_scipys(wins, losses):
    one = np.array([1.0] * wins + [2.0] * losses + [math.inf, 3.0])
    other = np.array([2.0] * wins + [1.0] * losses + [math.inf, 3.0])
    found = duel(one, other)
    assert found[:2] == (wins, losses)
    expected = 1.0 if wins + losses == 0 else stats.binomtest(wins, wins + losses).pvalue
    assert found.p_value == pytest.approx(expected)


def test_identical_optimizers_rarely_differ_significantly():
    """Twenty studies of two that are the same, 10 problems × seeds each, at the 5 % level."""
    rng = np.random.default_rng(0)
    significant = 0
    for _ in range(400):
        a, b = rng.lognormal(size=(2, 10))
        significant += duel(a, b).p_value < 0.05
    assert significant / 400 <= 0.05
    assert significant > 0


def test_profiles_count_what_each_took_times_the_best():
    rng = np.random.default_rng(1)
    costs = {name: rng.lognormal(size=12) for name in "abc"}
    costs["a"][3] = math.inf
    for x in costs.values():
        x[5] = math.inf  # that nobody solved
    profiles = performance_profiles(costs)
    best = np.min(list(costs.values()), axis=0)
    for name, profile in profiles.items():
        for tau, share in zip(profile.ratios, profile.shares, strict=True):
            solved = [
                math.isfinite(b) and c <= tau * b * (1 + 1e-12)
                for c, b in zip(costs[name], best, strict=True)
            ]
            assert share == pytest.approx(np.mean(solved))
        fine = np.linspace(1, 4, 30001)
        shares = [profile.shares[np.searchsorted(profile.ratios, t, "right") - 1] for t in fine]
        assert profile.score == pytest.approx(np.mean(shares), abs=1e-3)
    assert sum(p.shares[0] for p in profiles.values()) == pytest.approx(11 / 12)


def test_the_interval_of_the_median_is_scipys():
    x = np.random.default_rng(2).lognormal(size=15)
    low, high = median_interval(x, draws=20000)
    found = stats.bootstrap(
        (x,), np.median, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert low == pytest.approx(found.low, rel=0.05)
    assert high == pytest.approx(found.high, rel=0.05)
    assert median_interval([1.0, 2.0, math.inf, math.inf])[1] == math.inf
    with pytest.raises(ArgumentError, match=r"`level` must be a number in \(0.0, 1.0\)"):
        median_interval(x, level=1.0)


def test_costs_are_read_from_a_study(plant):
    workdir = plant(
        {
            ("fast", 0): [(0.0, 1.0, 0), (2.0, 0.05, 0)],
            ("fast", 1): [(0.0, 1.0, 0), (3.0, 0.05, 0)],
            ("slow", 0): [(0.0, 1.0, 0), (4.0, 0.05, 0)],
            ("slow", 1): [(0.0, 1.0, 0), (6.0, 0.5, 0)],
        }
    )
    costs = cost_to_target(load_results(workdir))
    assert costs["fast"].tolist() == [2.0, 3.0]
    assert costs["slow"].tolist() == [4.0, math.inf]
    assert win_matrix(costs)["fast", "slow"] == (2, 0, 0.5)
