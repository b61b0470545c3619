"""From tar archives to batches of images and labels, through grain.

    index → order → pread → decode, resize → batch

Threads make whole batches ahead (decoders release Python's lock); each is a function of its place
in the order alone, so any number of threads gives the same batches.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data import labels as lb
from jdl.data.batches import Batches, Loaded, Plan, Span
from jdl.data.order import Order
from jdl.data.paths import Paths
from jdl.data.tar import TarSource

_AHEAD_BYTES = 1 << 28  # decoded batches waiting, at most
_CACHE_BYTES = 1 << 25


def from_tar(
    paths: Paths,
    *,
    label: lb.Label = "folder",
    size: Sequence[int] | None = None,
    grayscale: bool = False,
    batch_size: int,
    epochs: int | None = 1,
    shuffle: bool | None = None,
    seed: int = 0,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    on_error: str = "raise",
    max_skipped: float = 0.1,
    drop_remainder: bool | None = None,
    dtype: str = "uint8",
    exact: bool = False,
    max_pixels: int = images.MAX_PIXELS,
    threads: int | None = None,
    cache_bytes: int = _CACHE_BYTES,
    keep_index: bool = True,
) -> "ImageBatches":
    """Batches `{"image": uint8[B, H, W, C], "label": int32[B]}` of the images in tar archives.

    Where an epoch's last batch is not full it is padded, and where a record is skipped its row is
    empty: then every batch has an entry `"mask"`, float32[B], 1 for rows that count and 0 for
    others, which losses and metrics here heed.

    Args:
      paths: a path, a glob, a brace range, a folder, or a list of these.
      label: what the class is read from: `"folder"`, an integer, a compiled regular expression, a
        function of the name (see `TarSource`); None for no labels.
      size: (height, width) to resize to; None if all images have one size already.
      grayscale: one channel rather than three.
      batch_size: rows in every batch, B.
      epochs: how often to go through the data; None for ever.
      shuffle: a new order each epoch; by default only where there is no end.
      seed: names the orders.
      split: only members whose path begins with this folder.
      classes: the class table of training, in an evaluation.
      on_error: at an image that cannot be decoded, `"raise"` an error or `"skip"` it; `"skip"`
        also accepts an archive that is damaged, for what is left of it.
      max_skipped: the share of an epoch's records that may be skipped before that is an error.
      drop_remainder: leave out an epoch's last records that fill no batch; by default only where
        there is no end.
      dtype: `"uint8"`, or `"float32"` for values in [0, 1].
      exact: decode JPEGs at full size (see `images.decode`).
      max_pixels: the most pixels an image may have.
      threads: how many decode; by default one a core. 0: none, batches are made when asked for.
      cache_bytes: decoded images are kept in memory if all of them fit in so many bytes.
      keep_index: whether to store an index that had to be made.

    Raises:
      DataError: if the archives do not hold what is asked for, naming what and where.

    >>> from jdl.data import digits_path
    >>> data = from_tar(digits_path(), split="test", grayscale=True, batch_size=100, threads=0)
    >>> {name: entry.shape for name, entry in next(iter(data)).items()}
    {'image': (100, 8, 8, 1), 'label': (100,), 'mask': (100,)}
    >>> data.num_records, data.batches_per_epoch
    (359, 4)
    """
    check.one_of("on_error", on_error, ("raise", "skip"))
    check.one_of("dtype", dtype, ("uint8", "float32"))
    check.in_range("max_skipped", max_skipped, 0.0, 1.0)
    check.positive_int("max_pixels", max_pixels)
    height_width = _check_size(size)
    _check_seed(seed)
    threads = _threads(threads)
    source = TarSource(paths, label=label, split=split, classes=classes, keep_index=keep_index)
    if on_error == "raise":
        _refuse_damage(source)
    if label is not None and (where := source.unlabelled()):
        raise check.DataError(
            f"{where} has no label: `label={label!r}` finds none in its name. For images without "
            "labels pass label=None."
        )
    plan = Plan.checked(len(source), batch_size, epochs, drop_remainder)
    order = Order(len(source), shuffle=epochs is None if shuffle is None else shuffle, seed=seed)
    return ImageBatches(
        source,
        plan,
        order,
        size=height_width or _common_size(source, grayscale, exact, max_pixels),
        resize=height_width is not None,
        labelled=label is not None,
        skip=on_error == "skip",
        max_skipped=max_skipped,
        dtype=dtype,
        grayscale=grayscale,
        exact=exact,
        max_pixels=max_pixels,
        threads=threads,
        cache_bytes=cache_bytes,
    )


class ImageBatches(Batches):
    """The data set that `from_tar` gives.

    Attributes:
      source: the `TarSource` it reads.
      size: (height, width) of every image.
    """

    def __init__(
        self,
        source: TarSource,
        plan: Plan,
        order: Order,
        *,
        size: tuple[int, int],
        resize: bool,
        labelled: bool,
        skip: bool,
        max_skipped: float,
        dtype: str,
        grayscale: bool,
        exact: bool,
        max_pixels: int,
        threads: int,
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
        self._masked = plan.padded or skip
        self._shape = (*size, 1 if grayscale else 3)
        one = int(np.prod(self._shape))
        batch_bytes = plan.batch_size * one * np.dtype(dtype).itemsize
        self.num_threads = threads
        self.ahead = min(2 * threads, max(1, _AHEAD_BYTES // max(batch_bytes, 1)))
        self._cache = _Cache(len(source), self._shape) if len(source) * one <= cache_bytes else None

    @property
    def element_spec(self) -> dict[str, Any]:
        """What a batch is made of: name -> jax.ShapeDtypeStruct."""
        import jax

        rows = self.plan.batch_size
        spec = {"image": jax.ShapeDtypeStruct((rows, *self._shape), np.dtype(self._dtype))}
        if self._labelled:
            spec["label"] = jax.ShapeDtypeStruct((rows,), np.dtype(np.int32))
        if self._masked:
            spec["mask"] = jax.ShapeDtypeStruct((rows,), np.dtype(np.float32))
        return spec

    def load(self, span: Span) -> Loaded:
        """The batch of these places."""
        records = self.order.records(*span)
        rows, n = self.plan.batch_size, len(records)
        pixels = np.zeros((rows, *self._shape), np.uint8)
        mask = np.zeros(rows, np.float32)
        mask[:n] = 1.0
        skipped = []
        missing: Sequence[int] = range(n)
        if self._cache is not None:
            missing = self._cache.fill(pixels, records)
        for row in missing:
            record = int(records[row])
            try:
                pixels[row] = self._decode(record)
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
        batch: dict[str, np.ndarray] = {"image": pixels}
        if self._dtype == "float32":
            batch["image"] = pixels.astype(np.float32) * np.float32(1 / 255)
        if self._labelled:
            batch["label"] = np.zeros(rows, np.int32)
            batch["label"][:n] = self.source.labels(records)
        if self._masked:
            batch["mask"] = mask
        return Loaded(batch, tuple(skipped))

    def _decode(self, record: int) -> np.ndarray:
        data = self.source[record].data
        pixels = images.decode(data, size=self.size if self._resize else None, **self._decoding)
        if pixels.shape != self._shape:
            height, width = pixels.shape[:2]
            raise check.DataError(
                f"{self.source.where(record)} is {height} × {width}, while the first image is "
                f"{self.size[0]} × {self.size[1]} (height × width). To bring all to one size, "
                "pass `size`, e.g. size=(128, 128)."
            )
        return pixels


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


def _common_size(
    source: TarSource, grayscale: bool, exact: bool, max_pixels: int
) -> tuple[int, int]:
    """The size of the first image that can be decoded."""
    problem = ""
    for record in range(min(len(source), 100)):
        try:
            data = source[record].data
            shape = images.decode(
                data, grayscale=grayscale, exact=exact, max_pixels=max_pixels
            ).shape
        except images.BadImage as error:
            problem = problem or f"{source.where(record)}: {error}"
        else:
            return shape[:2]
    raise check.DataError(f"None of the first images can be decoded. The first: {problem}.")


def _refuse_damage(source: TarSource) -> None:
    lost = [(path, damage) for path, damage in source.damage if damage.lost]
    if lost:
        path, damage = lost[0]
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        member = f", member {damage.name!r}" if damage.name else ""
        raise check.DataError(
            f"{path!r} is damaged: {damage.word} at byte {damage.offset}{member}: "
            f"{damage.detail}{more}. `jdl index` lists all damage; to use what can be read, pass "
            'on_error="skip".'
        )


def _fingerprint(source: TarSource) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for index in source.indexes:
        digest.update(f"{index.stamp['size']} {index.stamp['digest']};".encode())
    return digest.hexdigest()


def _threads(threads: int | None) -> int:
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
        return min(len(affinity(0)) if affinity else os.cpu_count() or 1, 16)
    ok = isinstance(threads, int) and not isinstance(threads, bool) and 0 <= threads <= 1024
    check.argument(ok, "threads", "an integer of 0 to 1024, or None", threads)
    return threads


def _check_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    ok = (
        isinstance(size, tuple | list)
        and len(size) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) and 0 < x <= 2**15 for x in size)
    )
    check.argument(ok, "size", "(height, width) of positive integers, or None", size)
    return size[0], size[1]


def _check_seed(seed: Any) -> None:
    ok = isinstance(seed, int) and not isinstance(seed, bool)
    check.argument(ok, "seed", "an integer", seed)
