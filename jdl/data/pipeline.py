"""From tar archives to batches of images and labels: what `from_tar` is asked for, checked.

    index → order → pread → decode, resize → batch

`image_batches` makes the batches.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data import labels as lb
from jdl.data.augment import Augment, Augmentation
from jdl.data.holdout import Holdout
from jdl.data.image_batches import ImageBatches
from jdl.data.order import Mixture, Order
from jdl.data.plan import Plan
from jdl.data.tar.archive import STDIN
from jdl.data.tar.paths import Paths, expand
from jdl.data.tar.source import TarSource
from jdl.data.window import WINDOW, WindowOrder

logger = logging.getLogger("jdl.data")

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
) -> ImageBatches:
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
    >>> data.num_records, data.steps_per_epoch
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
        counts = np.add.reduceat(source.counts, [0, *ends[:-1]]).tolist()
        for entry, count in zip(entries, counts, strict=True):
            if not count:
                raise check.DataError(
                    f"{os.fspath(entry)!r} has no images of the split asked for, so none can be "
                    "drawn from it. Leave it out of `paths` and `weights`, or choose another split."
                )
        return Mixture(counts, weights, seed=seed)
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
