"""A description of archives: members, classes, damage. `jdl index` shows it."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from jdl.data import labels as lb
from jdl.data.choice import Patterns, Some, folder_counts, unread
from jdl.data.holdout import Holdout, find_folder
from jdl.data.tar import scan
from jdl.data.tar.archive import STDIN
from jdl.data.tar.index import TarIndex, open_index
from jdl.data.tar.paths import Paths, expand
from jdl.data.tar.source import TarSource
from jdl.data.targets import Table


class Description(NamedTuple):
    """The contents of archives.

    Attributes:
      archives: their paths.
      members: how many members they have, of any kind.
      images: how many of these are readable images.
      classes: class -> how many images; "" for images without a label; without those left out.
      left_out: pattern -> how many images it leaves out, as `TarSource.left_out`.
      splits: first folder of the path -> how many images; where all are in one folder that holds
        `train` or `test`, its folders.
      kinds: kind of member -> how many.
      unread: extension -> how many members are images of a format that is not read, such as HEIC.
      damage: the defects, one dict each: word ("checksum", "truncated", "damaged", "sparse",
        "concatenated", "link", "duplicate"), archive, offset, name, detail, lost.
      bytes: the archives' size.
      indexes: where each archive's index is kept; None for one in memory.
      modes: archive -> "random", "seekable" (at random, slowly) or "stream" (in order).
    """

    archives: list[str]
    members: int
    images: int
    classes: dict[str, int]
    left_out: dict[str, int]
    splits: dict[str, int]
    kinds: dict[str, int]
    unread: dict[str, int]
    damage: list[dict[str, object]]
    bytes: int
    indexes: list[str | None]
    modes: dict[str, str]


_NAMES = ("train", "test")
_KIND_NAMES = {
    scan.IMAGE: "image",
    scan.OTHER: "other file",
    scan.FOLDER: "folder",
    scan.LINK: "link",
    scan.DEVICE: "device or pipe",
    scan.SPARSE: "sparse file",
    scan.CUT: "truncated file",
    scan.OLDER: "older version of an image",
}


def describe(
    paths: Paths,
    *,
    label: lb.Label = "folder",
    labels: Table = None,
    split: str | Holdout | None = None,
    include: Some = None,
    exclude: Some = None,
    keep_index: bool = True,
) -> Description:
    """The contents of archives; damage is reported, not raised.

    Args:
      paths: a path, a glob, a brace range, a folder, or a list of these.
      label: what the classes are read from, as in `TarSource`.
      labels: a table of them in place of `label`, as in `TarSource`.
      split: of which members the classes are counted, as in `TarSource`.
      include: patterns of members to use, as in `TarSource`.
      exclude: patterns of members to leave out, as in `TarSource`.
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
    for index in indexes:
        counts = np.bincount(index.columns.kinds, minlength=len(_KIND_NAMES))
        kinds.update({name: int(counts[kind]) for kind, name in _KIND_NAMES.items()})
        unreads.update(unread(index))
    of_splits, left_out = _splits(indexes, Patterns.checked(include, exclude))
    classes: dict[str, int] = {}
    if of_splits:
        source = TarSource(
            indexes, label=label, labels=labels, split=split, include=include, exclude=exclude
        )
        classes, left_out = source.count_classes(), source.left_out
        if rest := len(source) - sum(classes.values()):
            classes[""] = rest
    return Description(
        archives=archives,
        members=sum(map(len, indexes)),
        images=kinds["image"],
        classes=classes,
        left_out=dict(left_out),
        splits=dict(sorted((of_splits - Counter({"": of_splits[""]})).items())),
        kinds=dict(+kinds),
        unread=dict(unreads),
        damage=[{"archive": i.path, **each._asdict()} for i in indexes for each in i.damage],
        bytes=sum(index.stamp.get("size", index.size) for index in indexes),
        indexes=[index.file for index in indexes],
        modes={index.path: index.mode for index in indexes},
    )


def splits(
    paths: Paths, *, include: Some = None, exclude: Some = None, keep_index: bool = True
) -> tuple[str, ...]:
    """Which of the splits `train` and `test` the archives have, as `TarSource` finds them.

    Args:
      paths: a path, a glob, a brace range, a folder, or a list of these.
      include: patterns of members to use, as in `TarSource`.
      exclude: patterns of members to leave out, as in `TarSource`.
      keep_index: whether to store an index that had to be made.

    >>> from jdl.data import digits_path
    >>> splits(digits_path(), keep_index=False)
    ('train', 'test')
    """
    # Standard input can be read only once.
    indexes = [open_index(path, keep=keep_index) for path in expand(paths) if path != STDIN]
    there, _ = _splits(indexes, Patterns.checked(include, exclude))
    return tuple(name for name in _NAMES if find_folder(name, there) in there)


def _splits(indexes: list[TarIndex], patterns: Patterns) -> tuple[Counter[str], Counter[str]]:
    """How many images each split has, "" for those in no folder; how many are left out."""
    chosen, out = zip(*map(patterns.images, indexes), strict=True) if indexes else ((), ())
    folders = folder_counts(indexes, chosen)
    below = any("/" in find_folder(name, folders) for name in _NAMES)
    found: Counter[str] = Counter()
    for folder, count in folders.items():
        found["/".join(folder.split("/")[: 1 + below])] += count
    return found, sum(out, Counter())
