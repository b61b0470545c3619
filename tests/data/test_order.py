"""Every epoch is a permutation, and any is about as likely as any other."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdl.core.check import ArgumentError
from jdl.data.order import Order, key, permuted


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
    n, draws = 4, 1200
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
