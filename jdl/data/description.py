"""A description of archives: members, classes, damage. `jdl index` shows it."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from jdl.data import labels as lb
from jdl.data.tar import scan
from jdl.data.tar.archive import STDIN
from jdl.data.tar.index import TarIndex, open_index
from jdl.data.tar.paths import Paths, expand
from jdl.data.tar.source import TarSource, unread


class Description(NamedTuple):
    """The contents of archives.

    Attributes:
      archives: their paths.
      members: how many members they have, of any kind.
      images: how many of these are readable images.
      classes: class -> how many images; "" for images without a label.
      splits: first folder of the path -> how many images.
      kinds: kind of member -> how many.
      unread: extension -> how many members are images of a format that is not read, such as HEIC.
      damage: the defects, one dict each: word ("checksum", "truncated", "damaged", "sparse",
        "concatenated"), archive, offset, name, detail, lost.
      bytes: the archives' size.
      indexes: where each archive's index is kept; None for one in memory.
      modes: archive -> "random", "seekable" (at random, slowly) or "stream" (in order).
    """

    archives: list[str]
    members: int
    images: int
    classes: dict[str, int]
    splits: dict[str, int]
    kinds: dict[str, int]
    unread: dict[str, int]
    damage: list[dict[str, object]]
    bytes: int
    indexes: list[str | None]
    modes: dict[str, str]


_KIND_NAMES = {
    scan.IMAGE: "image",
    scan.OTHER: "other file",
    scan.FOLDER: "folder",
    scan.LINK: "link",
    scan.DEVICE: "device or pipe",
    scan.SPARSE: "sparse file",
    scan.CUT: "truncated file",
}


def describe(paths: Paths, *, label: lb.Label = "folder", keep_index: bool = True) -> Description:
    """The contents of archives; damage is reported, not raised.

    Args:
      paths: a path, a glob, a brace range, a folder, or a list of these.
      label: what the classes are read from, as in `TarSource`.
      keep_index: whether to store an index that had to be made.

    Raises:
      DataError: if a file is missing or cannot be read.

    >>> from jdl.data import digits_path
    >>> about = describe(digits_path(), keep_index=False)
    >>> about.members, about.images, about.splits, about.damage
    (1798, 1797, {'test': 359, 'train': 1438}, [])
    """
    archives = expand(paths)
    indexes = [open_index(path, keep=keep_index) for path in archives]
    kinds: Counter[str] = Counter()
    unreads: Counter[str] = Counter()
    of_splits: Counter[str] = Counter()
    for index in indexes:
        counts = np.bincount(index.columns.kinds, minlength=len(_KIND_NAMES))
        kinds.update({name: int(counts[kind]) for kind, name in _KIND_NAMES.items()})
        of_splits.update(_splits(index))
        unreads.update(unread(index))
    images = kinds["image"]
    classes: dict[str, int] = {}
    if images:
        classes = TarSource(indexes, label=label).count_classes()
        if rest := images - sum(classes.values()):
            classes[""] = rest
    return Description(
        archives=archives,
        members=sum(map(len, indexes)),
        images=images,
        classes=classes,
        splits=dict(sorted(of_splits.items())),
        kinds=dict(+kinds),
        unread=dict(unreads),
        damage=[{"archive": i.path, **each._asdict()} for i in indexes for each in i.damage],
        bytes=sum(index.stamp.get("size", index.size) for index in indexes),
        indexes=[index.file for index in indexes],
        modes={index.path: index.mode for index in indexes},
    )


def splits(paths: Paths, *, keep_index: bool = True) -> tuple[str, ...]:
    """Which of `train` and `test` the archives' paths begin with.

    >>> from jdl.data import digits_path
    >>> splits(digits_path(), keep_index=False)
    ('train', 'test')
    """
    there = {
        first
        for path in expand(paths)
        if path != STDIN  # it can be read only once
        for first in _splits(open_index(path, keep=keep_index))
    }
    return tuple(name for name in ("train", "test") if name in there)


def _splits(index: TarIndex) -> Counter[str]:
    ids = index.columns.folder_ids[index.columns.kinds == scan.IMAGE]
    counts = np.bincount(ids, minlength=len(index.columns.folder_ends))
    found: Counter[str] = Counter()
    for folder, count in zip(index.folders(), counts.tolist(), strict=True):
        if count and (first := lb.first_folder(folder + "/")):
            found[first] += count
    return found
