"""Every epoch is a permutation, and any is about as likely as any other."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdl.core.check import ArgumentError
from jdl.data.order import Mixture, Order, key, permuted


@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_permutation(n, seed, epoch):
    order = Order(n, shuffle=True, seed=seed)
    found = order.records(epoch, 0, n)
    np.testing.assert_array_equal(np.sort(found), np.arange(n))
    start, stop = n // 3, n // 2
    fresh = Order(n, shuffle=True, seed=seed)
    np.testing.assert_array_equal(fresh.records(epoch, start, stop), found[start:stop])


def test_the_order_never_changes_between_versions():
    # What checkpoints rely on: these numbers must never change.
    first = permuted(np.arange(8), 100, key(0, 0))
    assert first.tolist() == [4, 27, 45, 95, 37, 29, 3, 33]
    large = permuted(np.arange(4), 10**9, key(7, 3))
    assert large.tolist() == [79308000, 614366812, 593351200, 315931089]


def test_small_permutations_are_equally_likely():
    n, draws = 4, 600
    seen = Counter(tuple(permuted(np.arange(n), n, key(0, e)).tolist()) for e in range(draws))
    expected = draws / math.factorial(n)
    orders = itertools.permutations(range(n))
    chi = sum((seen[order] - expected) ** 2 / expected for order in orders)
    assert chi < 23 + 5 * math.sqrt(2 * 23)


@pytest.mark.parametrize("n", [20, 97])
def test_every_record_is_equally_likely_at_every_place(n):
    draws = 1000
    found = np.stack([permuted(np.arange(n), n, key(e, 1)) for e in range(draws)])
    counts = np.stack([np.bincount(column, minlength=n) for column in found.T])
    chi = ((counts - draws / n) ** 2 / (draws / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
    steps = np.bincount((found[:, 1] - found[:, 0]) % n, minlength=n)[1:]
    expected = draws / (n - 1)
    assert ((steps - expected) ** 2 / expected).sum() < n + 5 * math.sqrt(2 * n)


def test_without_shuffling():
    order = Order(10, shuffle=False, seed=3)
    assert order.records(5, 2, 20).tolist() == list(range(2, 10))


def test_an_empty_permutation_has_no_places():
    with pytest.raises(ArgumentError, match="`n` must be at least 1"):
        permuted(np.arange(3), 0, 1)
    assert permuted(np.arange(0), 0, 1).tolist() == []


def test_permutations_of_many_sizes_and_keys_at_once():
    sizes = np.array([1, 5, 64, 65, 10**9])
    keys = np.array([key(0, k) for k in range(5)], np.uint64)
    found = permuted(sizes - 1, sizes, keys)
    each = [permuted(np.array([n - 1]), int(n), int(k)) for n, k in zip(sizes, keys, strict=True)]
    assert found.tolist() == np.concatenate(each).tolist()


# ---------------------------------------------------------------------- mixtures


def sources(order, counts, epoch, start, stop):
    return np.searchsorted(np.cumsum(counts), order.records(epoch, start, stop), "right")


@pytest.mark.parametrize(
    "weights",
    [
        [1] * 600,
        [1] * 1500,
        [1] * 5 + [0.001],
        [1e-9, 1, 1e9],
        [0.1, 0.2, 0.7],
        [1.5**-k for k in range(100)],
        [0.9] + [0.1 / 1999] * 1999,
    ],
    ids=["600", "1500", "a thousandth", "extremes", "decimals", "geometric", "one of 2000"],
)
def test_sources_are_drawn_in_exact_proportion(weights):
    """After any number of blocks none of these is off by two draws."""
    whole = sum(map(Fraction, weights))
    shares = [Fraction(w) / whole for w in weights]
    counts = [50_000 // len(weights) + 1] * len(weights)
    order = Mixture(counts, weights, seed=3)
    blocks, before = order.num_records // order.block, np.zeros(len(weights), np.int64)
    for block in range(1, blocks + 1):
        drawn = sources(order, counts, 0, (block - 1) * order.block, block * order.block)
        before += np.bincount(drawn, minlength=len(weights))
        expected = [float(block * order.block * share) for share in shares]
        assert np.abs(before - expected).max() < 2


def test_a_rare_source_comes_as_often_as_asked_in_the_long_run():
    order = Mixture([10] * 6, [1] * 5 + [0.001], seed=0)
    far = 10**12
    start, end = (order._drawn(block)[-1] for block in (far, far + 10**6))
    assert (end - start) / (1000 * 10**6) == pytest.approx(0.001 / 5.001, rel=1e-5)


@given(
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=9),
    seed=st.integers(0, 100),
    first=st.sampled_from([0, 10**9]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_no_record_of_a_source_comes_again_before_all_others_have(counts, seed, first, data):
    n, of = len(counts), st.one_of(st.floats(1e-3, 1e3), st.integers(1, 1000))
    order = Mixture(counts, data.draw(st.lists(of, min_size=n, max_size=n)), seed=seed)
    total, starts = sum(counts), np.cumsum([0, *counts])
    epochs = range(first, first + 3000 // total + 1)
    found = np.concatenate([order.records(e, 0, total) for e in epochs])
    assert found.min() >= 0
    for k, count in enumerate(counts):
        mine = found[(starts[k] <= found) & (found < starts[k + 1])] - starts[k]
        # Far from the beginning the first round seen may have begun before.
        whole = [
            offset
            for offset in range(count if first else 1)
            if all(
                len(set(mine[at : at + count])) == min(count, len(mine) - at)
                for at in range(offset, len(mine), count)
            )
        ]
        assert whole, (k, mine)


@given(st.integers(0, 10**9), st.integers(0, 5999), st.integers(1, 700), st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_a_mixture_at_a_place_depends_on_the_place_alone(epoch, start, length, seed):
    counts, weights = [3000, 2, 998, 2000], [1, 2.5, 1e-4, 7]
    order = Mixture(counts, weights, seed=seed)
    whole = order.records(epoch, 0, 6000)
    fresh = Mixture(counts, weights, seed=seed)
    np.testing.assert_array_equal(
        fresh.records(epoch, start, start + length), whole[start : start + length]
    )


@pytest.mark.parametrize("n", [2, 1500])
def test_within_a_block_sources_come_at_random(n):
    counts = [24_000 // n] * n
    order = Mixture(counts, [1] * n, seed=1)
    found = sources(order, counts, 0, 0, 24_000)
    # As often as chance has it: the same source twice in a row, and each source in each twentieth
    # of a block.
    again = np.sum(found[1:] == found[:-1])
    assert abs(again - 24_000 / n) < 5 * math.sqrt(24_000 / n)
    place = np.arange(24_000) % order.block * 20 // order.block
    seen = np.bincount(found % 2 * 20 + place, minlength=40)
    assert ((seen - 600) ** 2 / 600).sum() < 39 + 5 * math.sqrt(2 * 39)
    other = sources(Mixture(counts, [1] * n, seed=2), counts, 0, 0, 24_000)
    assert abs(np.sum(found == other) - 24_000 / n) < 5 * math.sqrt(24_000 / n)


def test_the_order_of_a_mixture_never_changes_between_versions():
    order = Mixture([5, 100, 1000], [1, 0.5, 3.25], seed=4)
    assert order.records(2, 100, 108).tolist() == [162, 638, 515, 2, 880, 905, 639, 809]
    assert order.name == "mixture of 3 sources in blocks of 1000, cb6fb204a2978222"


def test_a_heavy_source_among_many_uneven_ones_is_never_off_by_more():
    """Roundings add up over the others, but not over the blocks."""
    uneven = np.random.default_rng(0).random(1499).tolist()
    order = Mixture([10] * 1500, [9 * sum(uneven), *uneven], seed=0)
    for first in (1, 10**12):
        blocks = range(first, first + 30)
        due = [b * order.block * order._weights[0] // order._total for b in blocks]
        assert max(abs(int(order._drawn(b)[0]) - n) for b, n in zip(blocks, due, strict=True)) < 2
