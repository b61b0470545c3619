"""Batches of images and labels, decoded ahead, through grain.

Threads make whole batches ahead (decoders release Python's lock), or spawned processes do; each
batch is a function of its place in the order alone, so any number of them gives the same batches.
What can only be read in order is read by one thread, through a window (see `window`).
"""

import hashlib
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data.augment import Augmentation
from jdl.data.batches import Batches
from jdl.data.loading import InOrder, Loaded
from jdl.data.order import Order
from jdl.data.plan import Plan, Span
from jdl.data.tar.source import TarSource
from jdl.data.window import Window, WindowOrder

logger = logging.getLogger("jdl.data")

_told: set[str] = set()  # archives whose way of being read has been told
_AHEAD_BYTES = 1 << 28  # decoded batches waiting, at most


class ImageBatches(Batches):
    """The data set that `from_tar` gives.

    Attributes:
      source: the `TarSource` it reads.
      size: (height, width) of every image.
    """

    def __init__(
        self,
        source: Any,
        plan: Plan,
        order: Order,
        *,
        size: tuple[int, int],
        resize: bool,
        labelled: bool,
        skip: bool,
        max_skipped: float,
        dtype: str,
        mean_std: tuple[np.ndarray, np.ndarray] | None,
        augmentation: Augmentation,
        grayscale: bool,
        exact: bool,
        max_pixels: int,
        threads: int,
        workers: int,
        cache_bytes: int,
    ):
        classes = source.classes if labelled else None
        fingerprint = _fingerprint(source)
        super().__init__(
            plan, order, classes=classes, fingerprint=fingerprint, max_skipped=max_skipped
        )
        self.source, self.size = source, size
        self._resize, self._labelled, self._skip, self._dtype = resize, labelled, skip, dtype
        self._decoding: dict[str, Any] = {
            "grayscale": grayscale,
            "exact": exact,
            "max_pixels": max_pixels,
        }
        self._mean_std, self._augmentation = mean_std, augmentation
        self._shape = (*size, 1 if grayscale else 3)
        one = int(np.prod(self._shape))
        batch_bytes = plan.rows * one * np.dtype(dtype).itemsize
        self.num_threads, self.num_workers = threads, workers
        self.ahead = min(2 * max(threads, workers), max(1, _AHEAD_BYTES // max(batch_bytes, 1)))
        fits = len(source) * one <= cache_bytes
        keeps = fits and not workers and not augmentation.random_windows
        self._cache = _Cache(len(source), self._shape) if keeps else None

    @property
    def _masked(self) -> bool:
        """Whether every batch has a mask."""
        return self.plan.padded or self._skip

    @property
    def loaded_spec(self) -> dict[str, Any]:
        """What a batch as loaded is made of: name -> jax.ShapeDtypeStruct."""
        import jax

        rows = self.plan.rows
        spec = {"image": jax.ShapeDtypeStruct((rows, *self._shape), np.dtype(self._dtype))}
        if self._labelled:
            spec["label"] = jax.ShapeDtypeStruct((rows,), np.dtype(np.int32))
        if self._masked:
            spec["mask"] = jax.ShapeDtypeStruct((rows,), np.dtype(np.float32))
        return spec

    def load(self, span: Span) -> Loaded:
        """What is made here of the batch of these places."""
        span = self.plan.mine(span)
        return self._load(span.epoch, self.order.records(*span), None)

    def _load(
        self, epoch: int, records: np.ndarray, held: Sequence[bytes | images.BadImage] | None
    ) -> Loaded:
        """The batch of these records, whose bytes may be there already."""
        rows, n = self.plan.rows, len(records)
        pixels = np.zeros((rows, *self._shape), np.uint8)
        mask = np.zeros(rows, np.float32)
        mask[:n] = 1.0
        skipped = []
        draws = self._augmentation.draws(epoch, records)
        missing: Sequence[int] = range(n)
        if self._cache is not None:
            missing = self._cache.fill(pixels, records)
        if held is None:
            data = self.source.read_many(records[missing])
        else:
            data = (held[row] for row in missing)
        for row in missing:
            record = int(records[row])
            try:
                pixels[row] = self._decode(next(data), record, draws[row])
            except images.BadImage as error:
                where = self.source.where(record)
                if not self._skip:
                    raise check.DataError(
                        f"Corrupt image: {where}: {error}. To leave such images out, pass "
                        'on_error="skip".'
                    ) from error
                skipped.append((where, str(error)))
                mask[row] = 0.0
            else:
                if self._cache is not None:
                    self._cache.put(record, pixels[row])
        self._augmentation.apply(pixels[:n], epoch, records, draws)
        batch: dict[str, np.ndarray] = {"image": pixels}
        if self._dtype == "float32":
            batch["image"] = self._scaled(pixels)
        batch["image"][mask == 0.0] = 0
        if self._labelled:
            batch["label"] = np.zeros(rows, np.int32)
            batch["label"][:n] = self.source.labels(records)
        if self._masked:
            batch["mask"] = mask
        return Loaded(batch, tuple(skipped))

    def _decode(self, data: bytes | images.BadImage, record: int, draws: np.ndarray) -> np.ndarray:
        if isinstance(data, images.BadImage):
            raise data
        size = self.size if self._resize else None
        window = self._augmentation.window(draws)
        pixels = images.decode(data, size=size, crop=window, **self._decoding)
        if pixels.shape != self._shape:
            height, width = pixels.shape[:2]
            raise check.DataError(
                f"{self.source.where(record)} is {height} × {width}, while the first image is "
                f"{self.size[0]} × {self.size[1]} (height × width). To bring all to one size, "
                "pass `size`, e.g. size=(128, 128)."
            )
        return pixels

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        scaled = pixels.astype(np.float32)
        if self._mean_std is None:
            scaled *= np.float32(1 / 255)
        else:
            mean, std = self._mean_std
            scaled *= 1 / (255 * std)
            scaled -= mean / std
        return scaled

    def start_loading(self, epoch: int, record: int) -> Any:
        """The batches from a position on; where reading is in order, one thread reads them."""
        order, plan = self.order, self.plan
        if not isinstance(order, WindowOrder):
            return super().start_loading(epoch, record)
        if self.source.mode == "stream":
            _tell_stream(self.source, order.window)
        window = Window(self.source, order)

        def read(number: int) -> Any:
            span = plan.mine(plan.span(epoch, record, number))
            try:
                return span.epoch, *window.take(*span)
            except Exception as error:
                return error

        def decode(number: int, read: Any) -> Loaded:
            if isinstance(read, Exception):
                return Loaded(None, error=read)
            try:
                return self._load(*read)
            except Exception as error:
                return Loaded(None, error=error)

        return InOrder(read, decode, plan.count(epoch, record), self.num_threads, self.ahead)


class _Cache:
    """Decoded images kept in memory, for data sets small enough."""

    def __init__(self, records: int, shape: tuple[int, ...]):
        self._pixels = np.empty((records, *shape), np.uint8)
        self._there = np.zeros(records, bool)
        self._lock = threading.Lock()

    def fill(self, pixels: np.ndarray, records: np.ndarray) -> Sequence[int]:
        """Copies what is there of `records` to the rows of `pixels`; gives the other rows."""
        with self._lock:
            there = self._there[records]
        pixels[: len(records)][there] = self._pixels[records[there]]
        return np.flatnonzero(~there).tolist()

    def put(self, record: int, pixels: np.ndarray) -> None:
        """Keeps one image."""
        with self._lock:
            self._pixels[record] = pixels
            self._there[record] = True


def _tell_stream(source: TarSource, window: int) -> None:
    """Says once that data are read in order, and what that costs."""
    if source.archives[0] in _told:
        return
    _told.add(source.archives[0])
    logger.warning(
        "%s is compressed, or comes without ranges: it is read in order, %s, and to go on from a "
        "position it is read up to there again. For a global shuffle and instant resume rewrite it "
        "once: jdl pack %s OUT-%%05d.tar",
        source.archives[0],
        f"shuffled through a window of {window} images" if window > 1 else "not shuffled",
        source.archives[0],
    )


def _fingerprint(source: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for index in source.indexes:
        digest.update(f"{index.stamp['size']} {index.stamp['digest']};".encode())
    return digest.hexdigest()
