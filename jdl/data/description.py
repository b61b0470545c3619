"""A description of archives: members, classes, damage. `jdl index` shows it."""

from typing import NamedTuple

import numpy as np

from jdl.data import labels as lb
from jdl.data.tar import scan
from jdl.data.tar.archive import STDIN
from jdl.data.tar.index import TarIndex, open_index
from jdl.data.tar.paths import Paths, expand
from jdl.data.tar.source import TarSource


class Description(NamedTuple):
    """The contents of archives.

    Attributes:
      archives: their paths.
      members: how many members they have, of any kind.
      images: how many of these are readable images.
      classes: class -> how many images; "" for images without a label.
      splits: first folder of the path -> how many images.
      kinds: kind of member -> how many.
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
    kinds: dict[str, int] = {}
    counts: dict[str, int] = {}
    damage = []
    for index in indexes:
        for kind, name in _KIND_NAMES.items():
            found = int((index.columns.kinds == kind).sum())
            if found:
                kinds[name] = kinds.get(name, 0) + found
        for first, found in _splits(index).items():
            counts[first] = counts.get(first, 0) + found
        damage += [{"archive": index.path, **each._asdict()} for each in index.damage]
    images = kinds.get("image", 0)
    classes: dict[str, int] = {}
    if images:
        source = TarSource.from_indexes(indexes, label=label)
        classes = source.count_classes()
        if rest := images - sum(classes.values()):
            classes[""] = rest
    return Description(
        archives=archives,
        members=sum(map(len, indexes)),
        images=images,
        classes=classes,
        splits=dict(sorted(counts.items())),
        kinds=kinds,
        damage=damage,
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


def _splits(index: TarIndex) -> dict[str, int]:
    ids = index.columns.folder_ids[index.columns.kinds == scan.IMAGE]
    counts = np.bincount(ids, minlength=len(index.columns.folder_ends))
    found: dict[str, int] = {}
    for folder, count in zip(index.folders(), counts.tolist(), strict=True):
        parts = lb.folder_parts(folder)
        if count and parts:
            found[parts[0]] = found.get(parts[0], 0) + count
    return found
