"""A new permutation of the records for every epoch, computed at any place without memory.

At place `i` of an epoch is record π(i), for a pseudo-random permutation π of {0 … n−1} that depends
on the seed and the epoch. π is a Feistel network over pairs (l, r) with l, r < a, where a is the
least integer with a² ≥ n, so it permutes a² numbers; a result of n or more goes through it again
until it is less than n:

    l, r ← r, (l + F_k(r)) mod a        in each of `ROUNDS` rounds k

So a position in the data is one number, and resuming needs no replay. A checkpoint relies on the
order, so it is computed here and cannot change with a library's version.

References: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (generalized
Feistel, cycle walking); Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014 (the mixing function).
"""

import math
from collections.abc import Sequence

import numpy as np

from jdl.core import check

ROUNDS = 8
_MIN_SIDE = 8  # over fewer numbers the network does not reach all orders evenly
_BLOCK = 8192
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words; any changed bit changes half the bits (SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*numbers: int) -> int:
    """One 64-bit key of several integers; their order matters.

    >>> key(0, 1) == key(0, 1), key(0, 1) == key(1, 0)
    (True, False)
    """
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state + np.uint64((number * _GOLDEN + _GOLDEN) & _MASK))
    return int(state[0])


def permuted(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """π(positions), int64, for the permutation π of {0 … n−1} of this key.

    >>> sorted(permuted(np.arange(5), 5, key(0, 0)).tolist())
    [0, 1, 2, 3, 4]
    """
    check.argument(n > 0 or not len(positions), "n", "at least 1 where there are positions", n)
    side = np.uint64(max(math.isqrt(max(n - 1, 0)) + 1, _MIN_SIDE))
    keys = mix(np.uint64(key) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    x = positions.astype(np.uint64)
    beyond = np.arange(len(x))
    while len(beyond):
        left, right = np.divmod(x[beyond], side)
        for k in keys:
            left, right = right, (left + mix(right ^ k) % side) % side
        x[beyond] = left * side + right
        beyond = beyond[x[beyond] >= n]
    return x.astype(np.int64)


class Order:
    """Which record is at which place of which epoch.

    Args:
      num_records: n.
      shuffle: whether each epoch has its own permutation; otherwise the order is 0 … n−1.
      seed: for the permutations.
    """

    def __init__(self, num_records: int, *, shuffle: bool, seed: int):
        ok = isinstance(seed, int) and not isinstance(seed, bool)
        check.argument(ok, "seed", "an integer", seed)
        self.num_records, self.shuffle, self.seed = num_records, shuffle, seed
        # The last block computed: a batch at a time would cost more in calls than in arithmetic.
        self._block: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, np.int64))

    @property
    def name(self) -> str:
        """Distinguishes orders with the same number of records, seed and `shuffle`."""
        return "global"

    def plain(self) -> "Order":
        """The order 0 … n−1 of the same records."""
        return Order(self.num_records, shuffle=False, seed=0)

    def records(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The records at places [start, stop) of an epoch, int64."""
        stop = min(stop, self.num_records)
        if not self.shuffle:
            return np.arange(start, stop)
        of, first, block = self._block  # one read: other threads may replace it
        if of != epoch or start < first or stop > first + len(block):
            places = np.arange(start, min(max(stop, start + _BLOCK), self.num_records))
            first, block = start, permuted(places, self.num_records, key(self.seed, epoch))
            self._block = (epoch, first, block)
        return block[start - first : stop - first].copy()


class Mixture(Order):
    """Several sources in proportion to their weights, each repeated without end.

    In every `BLOCK` places each source has its share, rounded and at least one, at pseudo-random
    places. No record of a source comes a second time before all others of that source have come; an
    epoch has as many places as there are records in all.

    Args:
      counts: the number of records in each source; they are numbered source by source.
      weights: of each, positive.
      seed: for the order.

    >>> order = Mixture([10, 1000], [3.0, 1.0], seed=0)
    >>> float(np.mean(order.records(0, 0, 1000) < 10))
    0.75
    """

    BLOCK = 1000

    def __init__(self, counts: Sequence[int], weights: Sequence[float | int], *, seed: int):
        super().__init__(sum(counts), shuffle=True, seed=seed)
        self._counts, self._weights = list(counts), [float(w) for w in weights]
        exact = np.array(self._weights) / sum(self._weights) * self.BLOCK
        quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
        for k in np.argsort(np.floor(exact) - exact, kind="stable").tolist():
            quotas[k] += quotas.sum() < self.BLOCK
        quotas[np.argmax(quotas)] -= quotas.sum() - self.BLOCK
        self._quotas, self._starts = quotas, np.cumsum([0, *counts])

    @property
    def name(self) -> str:
        """See `Order`."""
        return f"mixture of {self._counts} by {self._weights}"

    def records(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """See `Order`."""
        places = epoch * self.num_records + np.arange(start, min(stop, self.num_records))
        blocks, inside = np.divmod(places, self.BLOCK)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            inside[here] = permuted(inside[here], self.BLOCK, key(self.seed, block, -1))
        ends = np.cumsum(self._quotas)
        sources = np.searchsorted(ends, inside, "right")
        found = np.empty(len(places), np.int64)
        for k in np.unique(sources).tolist():
            here, quota, n = sources == k, int(self._quotas[k]), self._counts[k]
            number = blocks[here] * quota + inside[here] - (int(ends[k]) - quota)
            rounds, number = np.divmod(number, n)
            for r in np.unique(rounds).tolist():
                those = rounds == r
                number[those] = permuted(number[those], n, key(self.seed, k, r))
            found[here] = self._starts[k] + number
        return found
