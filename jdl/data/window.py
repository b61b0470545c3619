"""Shuffling archives that can only be read in order: through a window, exactly resumable.

The window holds the next W records of the stream. At each place one of them, drawn by the seed, the
epoch and the place, is taken and the next record of the stream replaces it; at the end the window
empties. Archives come in a new order each epoch. The record at a place depends on the place alone,
so resuming somewhere means reading up to there without decoding.

W records are in memory, however large the archives. A record can come at most W − 1 places early,
so shuffling is not global: rewrite with `jdl pack` for that.
"""

import numpy as np

from jdl.data.images import BadImage
from jdl.data.order import Order, key, mix, permuted
from jdl.data.tar.source import TarSource

WINDOW = 2048
_DRAWS = 512


class WindowOrder(Order):
    """The order of a window shuffle, W = 1 for none; records are numbered archive by archive."""

    def __init__(self, counts: np.ndarray, *, window: int, seed: int):
        super().__init__(int(counts.sum()), shuffle=window > 1, seed=seed)
        self.counts, self.window = counts, window

    @property
    def name(self) -> str:
        """See `Order`."""
        return f"window of {self.window} over {len(self.counts)} archives"

    def plain(self) -> "WindowOrder":
        """See `Order`."""
        return WindowOrder(self.counts, window=1, seed=0)

    def stream(self, epoch: int) -> np.ndarray:
        """Each archive's first record and number of records, in reading order, int64 [2, n]."""
        n = len(self.counts)
        archives = np.arange(n)
        if self.shuffle:
            archives = permuted(archives, n, key(self.seed, epoch, -2))
        first = np.cumsum(self.counts) - self.counts
        return np.stack([first[archives], self.counts[archives]])

    def records(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """See `Order`."""
        draws = Draws(self, epoch)
        draws.skip(start)
        stop = min(stop, self.num_records)
        return draws.records([draws.draw()[0] for _ in range(start, stop)])


class Draws:
    """Which of the stream's records is taken at each place, one after the other."""

    def __init__(self, order: WindowOrder, epoch: int):
        self._n = order.num_records
        self._key = key(order.seed, epoch, -3)
        self.slots = list(range(min(order.window, self._n)))  # places in the stream
        self.place = 0
        self._draws: list[int] = []
        first, counts = order.stream(epoch)
        self._ends = np.cumsum(counts)
        self._shifts = first - (self._ends - counts)  # from places in the stream to records

    def draw(self) -> tuple[int, int | None]:
        """The stream's number taken at the next place, and the one that replaces it."""
        slots, at = self.slots, self.place % _DRAWS
        if not at or not self._draws:
            block = np.arange(self.place - at, self.place - at + _DRAWS, dtype=np.uint64)
            self._draws = (mix(mix(block + np.uint64(self._key))) >> np.uint64(32)).tolist()
        slot = self._draws[at] * len(slots) >> 32
        out, coming = slots[slot], self.place + len(slots)
        self.place += 1
        if coming < self._n:
            slots[slot] = coming
            return out, coming
        slots[slot] = slots[-1]
        slots.pop()
        return out, None

    def skip(self, places: int) -> None:
        """Draws for so many places."""
        for _ in range(places):
            self.draw()

    def records(self, numbers: list[int]) -> np.ndarray:
        """The records at these places of the stream."""
        at = np.array(numbers, np.int64)
        return at + self._shifts[np.searchsorted(self._ends, at, "right")]


class Window:
    """The bytes of the records in the window, for one reader."""

    def __init__(self, source: TarSource, order: WindowOrder):
        self._source, self._order = source, order
        self._epoch, self._draws = -1, Draws(order, 0)
        self._held: dict[int, bytes | BadImage] = {}

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, list[bytes | BadImage]]:
        """The records at places [start, stop) and their bytes; earlier ones are dropped."""
        if epoch != self._epoch or start < self._draws.place:
            self._epoch, self._draws = epoch, Draws(self._order, epoch)
            self._held = {}
            self._draws.skip(start)
            self._read(sorted(self._draws.slots))
        between = start - self._draws.place  # records of other hosts
        drawn = [self._draws.draw() for _ in range(self._draws.place, stop)]
        self._read([coming for _, coming in drawn if coming is not None])
        data = [self._held.pop(out) for out, _ in drawn]
        return self._draws.records([out for out, _ in drawn[between:]]), data[between:]

    def _read(self, numbers: list[int]) -> None:
        for start in range(0, len(numbers), 256):
            some = numbers[start : start + 256]
            data = self._source.read_many(self._draws.records(some))
            self._held |= zip(some, data, strict=True)
