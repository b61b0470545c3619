"""Splits into training and test records: by a folder, or by a hash of the name.

A hash depends only on the name, or on the group that a record belongs to. So a record stays on its
side when others are added, and in other archives.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jdl.core import check
from jdl.data import labels as lb


class Holdout(NamedTuple):
    r"""One side of a split by hash: a record is a test record if hash(group) / 2⁶⁴ < `share`.

    Attributes:
      part: "train" or "test".
      share: the share of the groups to test on, in (0, 1).
      group: what stays on one side: None, each record for itself; "folder", an integer, a regular
        expression or a function, read from the name as labels are (see `TarSource`).
      seed: names the split.
      folder: split only the members of this folder, found as `split="train"` is; None for all.

    >>> test = Holdout("test", 0.5, group=1)
    >>> people = ["faces/ann/1.jpg", "faces/ann/2.jpg", "faces/bob/1.jpg", "faces/eve/1.jpg"]
    >>> [test.holds(name) for name in people]
    [False, False, True, False]
    """

    part: str
    share: float
    group: lb.Label = None
    seed: int = 0
    folder: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Holdout | None":
        """The holdout that `part:share[:group]` means; None if `text` is a folder's name.

        >>> Holdout.parse("test:0.1:folder")
        Holdout(part='test', share=0.1, group='folder', seed=0, folder=None)
        """
        match = re.fullmatch(r"(train|test):([0-9.]+)(?::(folder|-?\d+))?", text)
        if match is None:
            ok = not re.match(r"(train|test):", text)
            must = 'a folder, or such as "train:0.1", "test:0.1:folder" or "test:0.1:0"'
            check.argument(ok, "split", must, text)
            return None
        group = match[3] if match[3] in (None, "folder") else int(match[3])
        try:
            share = float(match[2])
        except ValueError:
            share = -1.0
        return cls(match[1], share, group).checked()

    def checked(self) -> "Holdout":
        """Itself, if its values are valid."""
        check.one_of("part", self.part, ("train", "test"))
        ok = isinstance(self.share, float) and 0.0 < self.share < 1.0
        check.argument(ok, "share", "a number in (0, 1)", self.share)
        return self

    def holds(self, name: str) -> bool:
        """Whether a record of this name is on this side."""
        return self.chooser()(name)

    def chooser(self) -> Callable[[str], bool]:
        """`holds`, fast for many names of few groups."""
        if self.group is None:
            return self._side
        group = lb.reader(self.group)
        known: dict[str, bool] = {}

        def holds(name: str) -> bool:
            of = group(name) or name
            if of not in known:
                known[of] = self._side(of)
            return known[of]

        return holds

    def _side(self, group: str) -> bool:
        digest = hashlib.blake2b(f"{self.seed}:{group}".encode(), digest_size=8).digest()
        tested = int.from_bytes(digest, "big") < self.share * 2**64
        return tested == (self.part == "test")


def parse_split(split: str | Holdout | None) -> str | Holdout | None:
    """`split` with a holdout's short form replaced by the `Holdout`, checked."""
    if isinstance(split, str):
        return Holdout.parse(split) or split
    return None if split is None else split.checked()


def split_folder(split: str | Holdout | None) -> str | None:
    """The folder that a split is in, or None."""
    folder = split.folder if isinstance(split, Holdout) else split
    return None if folder is None else lb.composed("/".join(lb.folder_parts(folder)))


def inside(folder: str, of: str) -> bool:
    """Whether a folder is the folder `of` or in it.

    >>> inside("train/7", "train"), inside("training", "train")
    (True, False)
    """
    return f"{folder}/".startswith(f"{of}/")


def find_folder(split: str, folders: Iterable[str]) -> str:
    """The folder that `split` names: from the root on, or else in the only top folder of all.

    >>> find_folder("train", ["digits-main/train/0", "digits-main/test/0"])
    'digits-main/train'
    """
    folders = list(folders)
    tops = {folder.partition("/")[0] for folder in folders}
    below = f"{min(tops, default='')}/{split}"
    if len(tops) > 1 or any(inside(folder, split) for folder in folders):
        return split
    return below if any(inside(folder, below) for folder in folders) else split


def no_such_split(
    where: str, split: str | Holdout, images: int, folders: Iterable[str]
) -> check.DataError:
    """The error for a split without images; `folders` are those of images there."""
    detail = ""
    if isinstance(split, str):
        parts = [folder.split("/") for folder in folders if folder]
        depth = 1 if len({part[0] for part in parts}) > 1 else 2
        first = dict.fromkeys("/".join(part[:depth]) for part in parts)
        there = ", ".join(map(repr, [*first][:10])) or "no folder"
        detail = f" No path begins with that folder. Paths begin with: {there}."
    return check.DataError(
        f"{where} has no images of the split {split!r} among its {images}.{detail}"
    )
