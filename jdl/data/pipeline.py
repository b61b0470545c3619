"""From tar archives to batches of images and labels, through grain.

    index → order → pread → decode, resize → batch

Threads make whole batches ahead (decoders release Python's lock), or spawned processes do; each
batch is a function of its place in the order alone, so any number of them gives the same batches.
What can only be read in order is read by one thread, through a window (see `window`).
"""

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data import labels as lb
from jdl.data.archive import STDIN
from jdl.data.augment import Augment, Augmentation
from jdl.data.batches import Batches, Loaded, Plan, Span
from jdl.data.holdout import Holdout
from jdl.data.order import Mixture, Order
from jdl.data.paths import Paths, expand
from jdl.data.tar import TarSource
from jdl.data.window import WINDOW, InOrder, Window, WindowOrder

logger = logging.getLogger("jdl.data")

_told: set[str] = set()  # archives whose way of being read has been told
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
    split: str | Holdout | None = None,
    weights: Sequence[float | int] | None = None,
    window: int | None = None,
    classes: Sequence[str] | None = None,
    on_error: str = "raise",
    max_skipped: float = 0.1,
    drop_remainder: bool | None = None,
    dtype: str = "uint8",
    normalize: tuple[Any, Any] | None = None,
    crop: str | None = None,
    crop_area: float = 0.35,
    flip: bool = False,
    augment: Augment | None = None,
    exact: bool = False,
    max_pixels: int = images.MAX_PIXELS,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
    workers: int = 0,
    cache_bytes: int = _CACHE_BYTES,
    keep_index: bool = True,
) -> "ImageBatches":
    """Batches `{"image": uint8[B, H, W, C], "label": int32[B]}` of the images in tar archives.

    Where an epoch's last batch is not full it is padded, and where a record is skipped its row is
    empty: then every batch has an entry `"mask"`, float32[B], 1 for rows that count and 0 for
    others, which losses and metrics here heed.

    Args:
      paths: a path, an URL, a glob, a brace range, a folder, or a list of these; `"-"` for standard
        input (see `standard_input`).
      label: what the class is read from: `"folder"`, an integer, a compiled regular expression, a
        function of the name, `"cls"`, `"json:FIELD"` (see `TarSource`); None for no labels.
      size: (height, width) to resize to; None if all images have one size already.
      grayscale: one channel rather than three.
      batch_size: rows in every batch, B.
      epochs: how often to go through the data; None for ever.
      shuffle: a new order each epoch; by default only where there is no end, or weights.
      seed: names the orders, and all that is random in augmentation.
      split: only members whose path begins with this folder, or one side of a split by hash, such
        as `"train:0.1:folder"` (see `TarSource`).
      weights: one for each entry of the list `paths`: how often each is drawn from. Each is gone
        through without repetition, again and again; an epoch is as many records as there are.
      window: how many records are shuffled among each other where archives can only be read in
        order; where they can be read at random all are, unless a window is given.
      classes: the class table of training, in an evaluation.
      on_error: at an image that cannot be decoded, `"raise"` an error or `"skip"` it; `"skip"`
        also accepts an archive that is damaged, for what is left of it.
      max_skipped: the share of an epoch's records that may be skipped before that is an error.
      drop_remainder: leave out an epoch's last records that fill no batch; by default only where
        there is no end.
      dtype: `"uint8"`, or `"float32"` for values in [0, 1].
      normalize: (mean, std), numbers or one a channel: values x in [0, 1] become (x − mean) / std.
      crop: `"center"` for the largest window of the shape of `size`, `"random"` for one by chance;
        None for the whole image, stretched.
      crop_area: the least share of the largest window's area that a random one has.
      flip: mirror half of the images left to right.
      augment: `augment(pixels, rng) -> pixels`, uint8 [H, W, C] to the same, after crop and flip.
        All chance is a function of the seed, the epoch and the record alone.
      exact: decode JPEGs at full size (see `images.decode`).
      max_pixels: the most pixels an image may have.
      shard: (part, parts): of every batch this process makes one part (see `Batches.shard`).
      threads: how many decode; by default one a core. 0: none, batches are made when asked for.
      workers: spawned processes that decode instead; worth it where there are more cores than
        Python's lock lets threads use. `jdl bench data` measures it.
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
    mean_std = _check_normalize(normalize, dtype, grayscale)
    augmentation = Augmentation(crop, crop_area, flip, augment, seed).checked(size is not None)
    check.argument(
        isinstance(workers, int) and not isinstance(workers, bool) and 0 <= workers <= 1024,
        "workers",
        "an integer of 0 to 1024",
        workers,
    )
    if window is not None:
        check.positive_int("window", window)
    if STDIN in ([paths] if isinstance(paths, str | os.PathLike) else paths):
        raise check.ArgumentError(
            "`paths` must be archives that can be read again, got standard input. Use "
            "jdl.data.standard_input, or write it to a file with `jdl pack - OUT-%05d.tar`."
        )
    source = TarSource(paths, label=label, split=split, classes=classes, keep_index=keep_index)
    if on_error == "raise":
        _refuse_damage(source)
    if label is not None and (where := source.unlabelled()):
        raise check.DataError(
            f"{where} has no label: `label={label!r}` finds none in its name or beside it. For "
            "images without labels pass label=None."
        )
    shuffled = (epochs is None or weights is not None) if shuffle is None else shuffle
    order = _order(source, paths, weights, window, shuffled, seed)
    check.argument(
        not (workers and isinstance(order, WindowOrder)),
        "workers",
        "0 for what is read in order: one reader feeds threads",
        workers,
    )
    plan = Plan.checked(len(source), batch_size, epochs, drop_remainder).sharded(*shard)
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
        mean_std=mean_std,
        augmentation=augmentation,
        grayscale=grayscale,
        exact=exact,
        max_pixels=max_pixels,
        threads=threads,
        workers=workers,
        cache_bytes=cache_bytes,
    )


def _order(
    source: TarSource,
    paths: Paths,
    weights: Sequence[float | int] | None,
    window: int | None,
    shuffle: bool,
    seed: int,
) -> Order:
    in_order = source.mode == "stream"
    if weights is not None:
        check.argument(not in_order, "weights", "None for archives read in order", weights)
        check.argument(shuffle, "shuffle", "True where there are weights", shuffle)
        check.argument(
            not isinstance(paths, str | os.PathLike)
            and len(weights) == len(paths)
            and all(isinstance(w, int | float) and 0 < w < float("inf") for w in weights),
            "weights",
            "a positive number for each entry of the list `paths`",
            weights,
        )
        entries = [paths] if isinstance(paths, str | os.PathLike) else paths
        ends = np.cumsum([len(expand(entry)) for entry in entries])
        return Mixture(np.add.reduceat(source.counts, [0, *ends[:-1]]).tolist(), weights, seed=seed)
    if in_order or (window is not None and shuffle):
        width = (window or WINDOW) if shuffle else 1
        return WindowOrder(source.counts, window=width, seed=seed)
    if source.mode == "seekable":
        logger.warning(
            "%s is read at random through its seek file, some hundred images a second. For the "
            "speed of the decoder rewrite it once: jdl pack %s OUT-%%05d.tar",
            source.archives[0],
            source.archives[0],
        )
    return Order(len(source), shuffle=shuffle, seed=seed)


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
    def element_spec(self) -> dict[str, Any]:
        """What a batch is made of: name -> jax.ShapeDtypeStruct."""
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


def _fingerprint(source: Any) -> str:
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


def _check_normalize(
    normalize: Any, dtype: str, grayscale: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    if normalize is None:
        return None
    try:
        mean, std = (np.asarray(x, np.float32) for x in normalize)
        channels = 1 if grayscale else 3
        ok = {mean.shape, std.shape} <= {(), (channels,)} and bool(np.all(std > 0))
    except (TypeError, ValueError):
        ok = False
    check.argument(ok, "normalize", "(mean, std > 0), numbers or one a channel", normalize)
    check.argument(dtype == "float32", "dtype", '"float32" where there is normalize', dtype)
    return mean, std


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
