"""Profiles, duels and intervals, against SciPy, brute force, and studies without a winner."""

import math

import numpy as np
import pytest
from scipy import stats

from jdl.compare import load_results
from jdl.compare.results import cost_to_target
from jdl.compare.statistics import (
    cost_ratio,
    detectable_ratio,
    duel,
    median_interval,
    performance_profiles,
    pooled_deviation,
    probability_of_improvement,
    t_quantile,
    t_tail,
    target_p_value,
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
    assert duel(costs["fast"], costs["slow"]) == (2, 0, 0.5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 101])
def test_student_s_distribution_is_scipys(freedom):
    for t in (-3.0, -0.5, 0.0, 0.3, 2.0, 10.0):
        assert t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), abs=1e-13)
    for p in (0.5, 0.8, 0.975, 0.999):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-7, abs=1e-9)


def test_the_test_of_the_target_is_scipys():
    x = np.random.default_rng(3).normal(0.9, 0.1, 7)
    expected = stats.ttest_1samp(x, 0.95, alternative="greater").pvalue
    assert target_p_value(x, 0.95, at_most=False) == pytest.approx(expected)
    assert target_p_value([*x, math.inf], 0.95, at_most=True) == 1.0
    assert target_p_value(x[:2], 0.95, at_most=True) is None
    expected = stats.norm.sf((0.95 - x[:2].mean()) / (0.1 / math.sqrt(2)))
    assert target_p_value(x[:2], 0.95, at_most=True, deviation=0.1) == pytest.approx(expected)


def test_the_probability_of_improvement_is_mann_and_whitney_s():
    rng = np.random.default_rng(4)
    one, other = ([rng.integers(0, 6, n).astype(float) for n in (7, 9)] for _ in range(2))
    found = probability_of_improvement(one, other)
    shares = [
        stats.mannwhitneyu(y, x).statistic / (len(x) * len(y))
        for x, y in zip(one, other, strict=True)
    ]
    assert found.value == pytest.approx(np.mean(shares))

    def averaged(*of, axis=-1):
        counted = [
            (x[..., :, None] < y[..., None, :]) + 0.5 * (x[..., :, None] == y[..., None, :])
            for x, y in (of[:2], of[2:])
        ]
        return np.mean([c.mean(axis=(-2, -1)) for c in counted], axis=0)

    interval = stats.bootstrap(
        (one[0], other[0], one[1], other[1]),
        averaged,
        method="percentile",
        vectorized=True,
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.low == pytest.approx(interval.low, abs=0.03)
    assert found.high == pytest.approx(interval.high, abs=0.03)


def test_the_ratio_of_one_problem_is_scipys_interval_of_paired_logarithms():
    x, y = np.random.default_rng(5).lognormal(size=(2, 8))
    paired = stats.ttest_rel(np.log(y), np.log(x))
    low, high = np.exp(paired.confidence_interval(0.95))
    found = cost_ratio([x], [y])
    assert found == pytest.approx((stats.gmean(y / x), low, high), rel=1e-6)
    assert cost_ratio([x], [np.append(y[1:], math.inf)]) is None


def test_the_detectable_ratio_is_found_with_its_power():
    """Two-sided z tests of simulated studies find it in about four of five."""
    rng, seeds, deviation = np.random.default_rng(6), 5, 0.1
    shift = math.log(detectable_ratio(deviation, seeds))
    x, y = rng.normal(0.0, deviation, (2, 20000, seeds))
    score = (y + shift - x).mean(axis=1) / (deviation * math.sqrt(2 / seeds))
    assert np.mean(np.abs(score) > stats.norm.isf(0.025)) == pytest.approx(0.8, abs=0.015)
    assert pooled_deviation([x[0], np.array([math.inf])]) == pytest.approx(np.std(x[0], ddof=1))
