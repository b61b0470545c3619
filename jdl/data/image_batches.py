"""Batches of images and labels, decoded ahead of the training step.

Threads make whole batches ahead (decoders release Python's lock), or spawned processes do. A batch
depends on its place in the order alone, so any number of them gives the same batches. Archives that
can only be read in order are read by one thread, through a window (see `window`).
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jdl.core import check
from jdl.data.batches import Batches
from jdl.data.decoding import Decoder
from jdl.data.images import BadImage
from jdl.data.loading import InOrder, Loaded
from jdl.data.order import Order
from jdl.data.plan import Plan, Span
from jdl.data.tar.source import TarSource
from jdl.data.window import Window, WindowOrder

logger = logging.getLogger("jdl.data")

_warned: set[str] = set()  # archives that the user knows to be read in order
_AHEAD_BYTES = 1 << 28  # decoded batches waiting, at most, unless each loader holds just one


@runtime_checkable
class Records(Protocol):
    """What a batch needs to know of its records."""

    def where(self, i: int) -> str:
        """The archive and member of record `i`, for messages."""

    def labels(self, records: np.ndarray) -> np.ndarray:
        """The labels of these records, [n, …]."""


class Assembler:
    """Makes a batch of the bytes of its records."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        label: tuple[tuple[int, ...], Any] | None,  # shape and type; None for batches without
        skip: bool,  # images that cannot be decoded; otherwise they are an error
        masked: bool,  # whether every batch has a mask, not only padded ones
        cache: "Cache | None" = None,  # images decoded before
    ):
        self.decoder, self.label, self.skip = decoder, label, skip
        self._masked, self._cache = masked, cache

    def spec(self, plan: Plan) -> dict[str, Any]:
        """What a batch is made of: name -> jax.ShapeDtypeStruct."""
        label = {} if self.label is None else {"label": self.label}
        image = {"image": (self.decoder.shape, self.decoder.dtype)}
        return plan.spec(image | label, masked=self._masked)

    def ahead(self, rows: int, loaders: int) -> int:
        """How many batches are made ahead: two a loader where memory allows, else one."""
        batch = rows * int(np.prod(self.decoder.shape)) * np.dtype(self.decoder.dtype).itemsize
        return max(loaders, min(2 * loaders, _AHEAD_BYTES // max(batch, 1)))

    def make(
        self,
        plan: Plan,
        epoch: int,
        records: np.ndarray,
        source: Records,
        read: Callable[[Sequence[int]], Iterator[bytes | BadImage]],
    ) -> Loaded:
        """The batch of these records, int64 [n], of an epoch; n ≤ `plan.rows`, others are padding.

        `read` gives the bytes of the records at these places of `records`.
        """
        rows, n = plan.rows, len(records)
        pixels = np.zeros((rows, *self.decoder.shape), np.uint8)
        mask = np.zeros(rows, np.float32)
        mask[:n] = 1.0
        augmentation = self.decoder.augmentation
        draws = augmentation.draws(epoch, records)
        skipped = []
        missing = range(n) if self._cache is None else self._cache.fill(pixels, records)
        for row, data in zip(missing, read(missing), strict=True):
            record = int(records[row])
            try:
                pixels[row] = self._decode(data, record, draws[row], source)
            except BadImage as error:
                where = source.where(record)
                if not self.skip:
                    raise check.DataError(
                        f"Corrupt image: {where}: {error}. To leave such images out, pass "
                        'on_error="skip".'
                    ) from error
                skipped.append((where, str(error)))
                mask[row] = 0.0
            else:
                if self._cache is not None:
                    self._cache.put(record, pixels[row])
        augmentation.apply(pixels[:n], epoch, records, draws)
        image = self.decoder.scale(pixels)
        image[mask == 0.0] = 0
        batch: dict[str, np.ndarray] = {"image": image}
        if self.label is not None:
            shape, dtype = self.label
            batch["label"] = np.zeros((rows, *shape), dtype)
            batch["label"][:n] = source.labels(records)
            batch["label"][mask == 0.0] = 0
        if self._masked or plan.padded:
            batch["mask"] = mask
        return Loaded(batch, tuple(skipped))

    def _decode(
        self, data: bytes | BadImage, record: int, draws: np.ndarray, source: Records
    ) -> np.ndarray:
        if isinstance(data, BadImage):
            raise data
        pixels = self.decoder.decode(data, self.decoder.augmentation.crop_of(draws))
        shape = self.decoder.shape
        if pixels.shape != shape:
            height, width = pixels.shape[:2]
            raise check.DataError(
                f"{source.where(record)} is {height} × {width}, while the first image is "
                f"{shape[0]} × {shape[1]} (height × width). To bring all to one size, "
                "pass `size`, e.g. size=(128, 128)."
            )
        return pixels


class ImageBatches(Batches):
    """The data set that `from_tar` returns; `size` is (height, width) of every image."""

    def __init__(
        self,
        source: TarSource,
        plan: Plan,
        order: Order,
        decoder: Decoder,
        *,
        label: tuple[tuple[int, ...], Any] | None,
        skip: bool,
        max_skipped: float,
        threads: int,
        workers: int,
        cache_bytes: int,
    ):
        super().__init__(
            plan,
            order,
            classes=None if label is None or source.target == "number" else source.classes,
            fingerprint=_fingerprint(source),
            max_skipped=max_skipped,
        )
        self.source, self.size = source, decoder.size and tuple(decoder.size)
        fits = len(source) * int(np.prod(decoder.shape)) <= cache_bytes
        keeps = fits and not workers and not decoder.augmentation.random_crops
        cache = Cache(len(source), decoder.shape) if keeps else None
        self._assembler = Assembler(decoder, label=label, skip=skip, masked=skip, cache=cache)
        self.num_threads, self.num_workers = threads, workers
        self.ahead = self._assembler.ahead(plan.rows, max(threads, workers))

    @property
    def loaded_spec(self) -> dict[str, Any]:
        """What a batch as loaded is made of: name -> jax.ShapeDtypeStruct."""
        return self._assembler.spec(self.plan)

    def load(self, span: Span) -> Loaded:
        """This process's part of the batch of these places."""
        span = self.plan.mine(span)
        records = self.order.records(*span)

        def read(rows: Sequence[int]) -> Iterator[bytes | BadImage]:
            return self.source.read_many(records[rows])

        return self._assembler.make(self.plan, span.epoch, records, self.source, read)

    def start_loading(self, epoch: int, record: int) -> Any:
        """The batches from a position on; one thread reads archives that are read in order."""
        order, plan = self.order, self.plan
        if not isinstance(order, WindowOrder):
            return super().start_loading(epoch, record)
        if self.source.mode == "stream":
            _warn_in_order(self.source, order.window)
        window = Window(self.source, order)

        def read(number: int) -> tuple[int, np.ndarray, list[bytes | BadImage]]:
            span = plan.mine(plan.span(epoch, record, number))
            return span.epoch, *window.take(*span)

        def decode(read: tuple[int, np.ndarray, list[bytes | BadImage]]) -> Loaded:
            of_epoch, records, data = read
            held = lambda rows: (data[row] for row in rows)  # noqa: E731
            return self._assembler.make(plan, of_epoch, records, self.source, held)

        return InOrder(read, decode, plan.count(epoch, record), self.num_threads, self.ahead)


class Cache:
    """Decoded images kept in memory, for data sets small enough."""

    def __init__(self, records: int, shape: tuple[int, ...]):
        self._pixels = np.empty((records, *shape), np.uint8)
        self._there = np.zeros(records, bool)
        self._lock = threading.Lock()

    def fill(self, pixels: np.ndarray, records: np.ndarray) -> list[int]:
        """Copies the images that it has to the rows of `pixels`; gives the other rows."""
        with self._lock:
            there = self._there[records]
        pixels[: len(records)][there] = self._pixels[records[there]]
        return np.flatnonzero(~there).tolist()

    def put(self, record: int, pixels: np.ndarray) -> None:
        """Keeps one image."""
        with self._lock:
            self._pixels[record] = pixels
            self._there[record] = True


def _warn_in_order(source: TarSource, window: int) -> None:
    """Warns once that an archive is read in order, and what that costs."""
    archive = source.archives[0]
    if archive in _warned:
        return
    _warned.add(archive)
    logger.warning(
        "%s is compressed, or comes without ranges: it is read in order, %s, and resuming at a "
        "position reads up to there again. For a global shuffle and instant resume rewrite it "
        "once: jdl pack %s OUT-%%05d.tar",
        archive,
        f"shuffled through a window of {window} images" if window > 1 else "not shuffled",
        archive,
    )


def _fingerprint(source: TarSource) -> str:
    """Of the archives and the images chosen from them; labels may change."""
    digest = hashlib.blake2b(digest_size=8)
    for index, chosen in zip(source.indexes, source.chosen, strict=True):
        digest.update(f"{index.stamp['size']} {index.stamp['digest']} {len(chosen)};".encode())
        digest.update(index.columns.offsets[chosen.all()].tobytes())
    return digest.hexdigest()
