"""From tar archives to batches of images and labels: `from_tar`.

    index → order → pread → decode, resize → batch

Here its arguments are checked and put together; `image_batches` makes the batches.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data import labels as lb
from jdl.data.augment import Augmentation, Augments, functions
from jdl.data.choice import Some, told, unread
from jdl.data.decoding import Decoder
from jdl.data.holdout import Holdout
from jdl.data.image_batches import ImageBatches
from jdl.data.images import BadImage
from jdl.data.order import Mixture, Order
from jdl.data.plan import Plan
from jdl.data.tar.archive import STDIN
from jdl.data.tar.paths import Paths, expand
from jdl.data.tar.scan import Damage
from jdl.data.tar.source import TarSource
from jdl.data.targets import Table
from jdl.data.window import WINDOW, WindowOrder

logger = logging.getLogger("jdl.data")

_CACHE_BYTES = 1 << 25
_told: set[str] = set()


def from_tar(
    paths: Paths,
    *,
    label: lb.Label = "folder",
    labels: Table = None,
    target: str = "class",
    size: Sequence[int] | None = None,
    grayscale: bool = False,
    batch_size: int,
    epochs: int | None = 1,
    shuffle: bool | None = None,
    seed: int = 0,
    split: str | Holdout | None = None,
    include: Some = None,
    exclude: Some = None,
    weights: Sequence[float | int] | None = None,
    window: int | None = None,
    classes: Sequence[str] | None = None,
    on_error: str = "raise",
    max_skipped: float = 0.1,
    drop_remainder: bool | None = None,
    dtype: str = "uint8",
    normalize: tuple[Any, Any] | None = None,
    crop: str | None = None,
    crop_area: float | None = None,
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
    augment: Augments | None = None,
    exact: bool = False,
    max_pixels: int = images.MAX_PIXELS,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
    workers: int = 0,
    cache_bytes: int = _CACHE_BYTES,
    keep_index: bool = True,
) -> ImageBatches:
    """Batches `{"image": uint8[B, H, W, C], "label": int32[B]}` of the images in tar archives.

    If an epoch's last batch is not full it is padded, and if a record is skipped its row is zero.
    Every batch then has an entry `"mask"`, float32[B], 1 for examples that count and 0 for others;
    jdl's losses and metrics use it.

    Args:
      paths: a path, a URL, a glob, a brace range, a folder, or a list of these. For standard input
        see `standard_input`.
      label: what the class is read from: `"folder"`, an integer, a compiled regular expression, a
        function of the name, which returns None to leave a record out, `"cls"`, `"json:FIELD"`
        (see `TarSource`); None for no labels. Any other record without a label is an error.
      labels: in place of `label`, a table of names and values: a mapping, or the path of a .csv,
        .tsv, .json or .jsonl file, as `"labels.csv:COLUMN"` (see `TarSource`).
      target: `"class"`; `"number"` for labels float32[B], or [B, k] of k numbers each; or
        `"multilabel"` for float32[B, C], 1 for each of a record's classes.
      size: (height, width) to resize to; None if all images have one size already.
      grayscale: one channel rather than three.
      batch_size: examples in every batch, B.
      epochs: how many passes over the data; None for no end.
      shuffle: a new order each epoch; by default only with `epochs=None` or `weights`.
      seed: for the orders and the augmentation.
      split: only members in this folder, such as `"train"` or `"ds/train"`, or one side of a split
        by hash, such as `"train:0.1:folder"` (see `TarSource`).
      include: only members that match one of these patterns, such as `"left/*.png"`.
      exclude: patterns of members to leave out besides `jdl.data.LITTER` (see `TarSource`).
      weights: for each entry of the list `paths`, how often it is drawn from. Each is passed over
        without repetition, again and again; an epoch is as many records as there are in all.
      window: how many records are shuffled among each other in archives that are read in order.
        Archives that can be read at random are shuffled as a whole unless a window is given.
      classes: the class table of training, for an evaluation.
      on_error: at an image that cannot be decoded, or whose sidecar names no class, `"raise"` an
        error or `"skip"` it; `"skip"` also accepts a damaged archive and reads what is left of it.
      max_skipped: the share of an epoch's records that may be skipped before that is an error; one
        always may unless it is 0.
      drop_remainder: drop an epoch's last records that fill no batch; by default only with
        `epochs=None`.
      dtype: `"uint8"`, or `"float32"` for values in [0, 1].
      normalize: (mean, std), each a number or one number for each channel: values x in [0, 1]
        become (x − mean) / std.
      crop: `"center"` for the largest window with the aspect ratio of `size`, `"random"` for a
        random one, `"random_resized"` for one of random aspect ratio too, as torchvision's
        RandomResizedCrop; None for the whole image, stretched.
      crop_area: the least area of a random window, relative to the largest window, by default 0.35;
        with `"random_resized"` relative to the image, by default 0.08.
      crop_ratio: the least and the largest width / height with `"random_resized"`.
      flip: flip half of the images left to right.
      augment: `"color_jitter"`, `"rand_augment"`, `augment(pixels, rng) -> pixels`, uint8 [H, W, C]
        to the same, or a list of these, applied in order after crop and flip. Randomness depends on
        the seed, the epoch and the record alone. Mixup and cutmix: `Estimator(batch_transform=)`.
      exact: decode JPEGs at full size (see `images.decode`).
      max_pixels: the most pixels an image may have.
      shard: (part, parts): this process makes one part of every batch (see `Batches.shard`).
      threads: how many decode; by default one for each core. 0: batches are made when asked for.
      workers: spawned processes that decode instead; worth it on machines with more cores than
        threads can use under Python's lock. `jdl bench data` measures it.
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
    check.in_range("max_skipped", max_skipped, 0.0, 1.0)
    threads = min(cores(), 16) if threads is None else threads
    for name, count in (("threads", threads), ("workers", workers)):
        ok = isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= 1024
        check.argument(ok, name, "an integer of 0 to 1024", count)
    if window is not None:
        check.positive_int("window", window)
    augmentation = Augmentation(crop, crop_area, crop_ratio, flip, functions(augment), seed)
    decoder = Decoder(size, grayscale, dtype, normalize, exact, max_pixels, augmentation)
    if STDIN in ([paths] if isinstance(paths, str | os.PathLike) else paths):
        raise check.ArgumentError(
            "`paths` must be archives that can be read again, got standard input. Use "
            "jdl.data.standard_input, or write it to a file with `jdl pack - OUT-%05d.tar`."
        )
    source = TarSource(
        paths,
        label=label,
        labels=labels,
        target=target,
        split=split,
        include=include,
        exclude=exclude,
        classes=classes,
        on_error=on_error,
        keep_index=keep_index,
    )
    _tell_left_out(source)
    if on_error == "raise":
        refuse_damage((repr(path), damage) for path, damage in source.damage)
    if label is not None and (where := source.unlabelled()):
        raise check.DataError(
            f"{where} has no label: `label={label!r}` finds none in its name or beside it. For "
            "images without labels pass label=None."
        )
    shuffled = (epochs is None or weights is not None) if shuffle is None else shuffle
    order = _order(source, paths, weights, window, shuffled, seed)
    ok = not (workers and isinstance(order, WindowOrder))
    must = "0 for archives that are read in order: one thread reads them"
    check.argument(ok, "workers", must, workers)
    if size is None:
        decoder = replace(decoder, size=_common_size(source, decoder), resize=False)
    return ImageBatches(
        source,
        Plan.checked(len(source), batch_size, epochs, drop_remainder).sharded(*shard),
        order,
        decoder,
        label=None if label is None else source.label_spec,
        skip=on_error == "skip",
        max_skipped=max_skipped,
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
        check.argument(shuffle, "shuffle", "True with `weights`", shuffle)
        return _mixture(source, paths, weights, seed)
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


def _mixture(source: TarSource, paths: Paths, weights: Sequence[float | int], seed: int) -> Mixture:
    """The order that draws from each entry of `paths` by its weight."""
    entries = [] if isinstance(paths, str | os.PathLike) else paths
    ok = 0 < len(weights) == len(entries) and all(
        isinstance(w, int | float) and 0 < w < float("inf") for w in weights
    )
    check.argument(ok, "weights", "a positive number for each entry of the list `paths`", weights)
    ends = np.cumsum([len(expand(entry)) for entry in entries])
    counts = np.add.reduceat(source.counts, [0, *ends[:-1]]).tolist()
    for entry, count in zip(entries, counts, strict=True):
        if not count:
            raise check.DataError(
                f"{os.fspath(entry)!r} has no images of the split asked for, so none can be "
                "drawn from it. Leave it out of `paths` and `weights`, or choose another split."
            )
    return Mixture(counts, weights, seed=seed)


def _common_size(source: TarSource, decoder: Decoder) -> tuple[int, int]:
    """The size of the first image that can be decoded."""
    problem = ""
    for record in range(min(len(source), 100)):
        try:
            height, width, _ = decoder.decode(source[record].data).shape
        except BadImage as error:
            problem = problem or f"{source.where(record)}: {error}"
        else:
            return height, width
    raise check.DataError(f"None of the first images can be decoded. The first: {problem}.")


def refuse_damage(damages: Iterable[tuple[str, Damage]]) -> None:
    """Raises if, of these archives' damage, some has lost members."""
    lost = [(archive, damage) for archive, damage in damages if damage.lost]
    if lost:
        archive, damage = lost[0]
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        member = f", member {damage.name!r}" if damage.name else ""
        raise check.DataError(
            f"{archive} is damaged: {damage.word} at byte {damage.offset}{member}: "
            f"{damage.detail}{more}. `jdl index` lists all damage; to use what can be read, pass "
            'on_error="skip".'
        )


def _tell_left_out(source: TarSource) -> None:
    """Logs, once for each archive and choice, how many images are left out or not read."""
    lines = []
    if source.left_out:
        lines.append(f"some images are left out of {source.archives[0]!r}: {told(source.left_out)}")
    for index in source.indexes:
        if found := unread(index):
            listed = ", ".join(f"{n} × .{kind}" for kind, n in found.items())
            lines.append(f"{index.path!r}: images of these formats are not read: {listed}")
    for line in lines:
        if line not in _told:
            _told.add(line)
            logger.warning("%s", line)


def cores() -> int:
    """The processor cores that this process may use; in a container fewer than the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
