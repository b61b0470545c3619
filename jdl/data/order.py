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

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

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


def keys(*numbers: int | np.ndarray) -> np.ndarray:
    """64-bit keys of several integers, uint64; their order matters. Any may be an int64 array."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        word = np.asarray(number & _MASK if isinstance(number, int) else number).astype(np.uint64)
        state = mix(state + word * np.uint64(_GOLDEN) + np.uint64(_GOLDEN))
    return state


def key(*numbers: int) -> int:
    """One 64-bit key of several integers; their order matters.

    >>> key(0, 1) == key(0, 1), key(0, 1) == key(1, 0)
    (True, False)
    """
    return int(keys(*numbers)[0])


def permuted(positions: np.ndarray, n: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """π(positions), int64, for the permutation π of {0 … n−1} of this key.

    n < 2⁵², int64, and the key, uint64, are one for all positions, or [m], one for each.

    >>> sorted(permuted(np.arange(5), 5, key(0, 0)).tolist())
    [0, 1, 2, 3, 4]
    """
    x = positions.astype(np.uint64)
    ok = bool(np.all(np.asarray(n) > 0)) or not len(x)
    check.argument(ok, "n", "at least 1 where there are positions", n)
    below, word = (np.atleast_1d(np.asarray(a).astype(np.uint64)) for a in (n, key))
    side = np.sqrt(np.maximum(below, 1) - np.uint64(1)).astype(np.uint64) + np.uint64(1)
    side = np.maximum(side, np.uint64(_MIN_SIDE))
    rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)
    words = mix(word + rounds)
    beyond = np.arange(len(x))
    while len(beyond):
        left, right = np.divmod(x[beyond], side)
        for round_words in words:
            left, right = right, (left + mix(right ^ round_words) % side) % side
        x[beyond] = left * side + right
        again = x[beyond] >= below
        beyond = beyond[again]
        of_each = (below, side, words)
        below, side, words = (a if a.shape[-1] == 1 else a[..., again] for a in of_each)
    return x.astype(np.int64)


class Order:
    """Which record is at which place: 0 … n−1, or with `shuffle` a permutation for each epoch."""

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


class First(Order):
    """The first places of another order's epoch 0, as every epoch."""

    def __init__(self, of: Order, count: int):
        super().__init__(count, shuffle=of.shuffle, seed=of.seed)
        self._of = of

    @property
    def name(self) -> str:
        """See `Order`."""
        return f"the first {self.num_records} of {self._of.name}"

    def plain(self) -> "Order":
        """Itself: the same records."""
        return self

    def records(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """See `Order`."""
        return self._of.records(0, start, min(stop, self.num_records))


class Mixture(Order):
    """Several sources in proportion to their weights, each repeated without end.

    After any number of whole blocks of places, however large, each source has come in its share,
    rounded (see `_drawn`); within a block they come at pseudo-random places. No record of a source
    comes a second time before all others of that source have come; an epoch has as many places as
    there are records in all. Records are numbered source by source; of the weights, positive, the
    exact values count, as fractions. `block` is the number of places in a block.

    >>> order = Mixture([10, 1000], [3.0, 1.0], seed=0)
    >>> float(np.mean(order.records(0, 0, 1000) < 10))
    0.75
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float | int], *, seed: int):
        super().__init__(sum(counts), shuffle=True, seed=seed)
        exact = [Fraction(weight) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        common = math.gcd(*(int(weight * unit) for weight in exact))
        self._weights = [int(weight * unit) // common for weight in exact]
        self._total = sum(self._weights)
        numbers = range(len(counts))
        self._heaviest_first = sorted(numbers, key=self._weights.__getitem__, reverse=True)
        self._counts, self._starts = np.array(counts), np.cumsum([0, *counts])[:-1]
        self._phases = keys(seed, -1, np.arange(len(counts))).tolist()
        self.block = max(1000, 4 * len(counts))
        self._kept = [(-1, np.empty(0, np.int64))] * 8  # blocks in use, by their last digit

    @property
    def name(self) -> str:
        """See `Order`."""
        of = hashlib.blake2b(repr((self._counts.tolist(), self._weights)).encode(), digest_size=8)
        return f"mixture of {len(self._counts)} sources in blocks of {self.block}, {of.hexdigest()}"

    def records(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """See `Order`."""
        places = epoch * self.num_records + np.arange(start, min(stop, self.num_records))
        blocks, inside = np.divmod(places, self.block)
        found = np.empty(len(places), np.int64)
        for block in np.unique(blocks).tolist():
            of, records = self._kept[block % 8]
            if of != block:
                records = self._records_of(block)
                self._kept[block % 8] = (block, records)
            here = blocks == block
            found[here] = records[inside[here]]
        return found

    def _records_of(self, block: int) -> np.ndarray:
        """The records of a block, int64 [block]."""
        before = self._drawn(block)
        quotas = self._drawn(block + 1) - before
        places = np.arange(self.block)
        sources = np.repeat(np.arange(len(quotas)), quotas)
        sources = sources[permuted(places, self.block, key(self.seed, block, -1))]
        draws = np.empty(self.block, np.int64)  # of the source, numbered in the order of the places
        first = np.repeat(before - np.cumsum(quotas) + quotas, quotas)
        draws[np.argsort(sources, kind="stable")] = first + places
        counts = self._counts[sources]
        rounds, numbers = np.divmod(draws, counts)
        numbers = permuted(numbers, counts, keys(self.seed, sources, rounds))
        return self._starts[sources] + numbers

    def _drawn(self, block: int) -> np.ndarray:
        """How often each source is drawn before a block, int64 [sources].

        The heaviest source gets its share of all places, the next one its share of those left, and
        so on, each rounded by a phase of the source's own: ⌊x + φ⌋, φ in [0, 1). So the sum is
        exact, and no number ever falls from one block to the next.
        """
        drawn = [0] * len(self._weights)
        places, weights = block * self.block, self._total
        for k in self._heaviest_first:
            weight = self._weights[k]
            drawn[k] = (places * weight + (weights * self._phases[k] >> 64)) // weights
            places, weights = places - drawn[k], weights - weight
        return np.array(drawn)
