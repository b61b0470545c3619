"""Splits of data that come without: by a hash of the name, or of what a group has in common.

A record's side depends on nothing but its name, so it stays where it is when others are added,
and in other archives.
"""

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

from jdl.core import check
from jdl.data import labels as lb


class Holdout(NamedTuple):
    r"""One side of a split by hash: a record is tested on if hash(group) / 2⁶⁴ < `share`.

    Attributes:
      part: "train" or "test".
      share: of the groups, to test on; in (0, 1).
      group: what must not be torn apart: None, each record for itself; "folder", an integer, a
        regular expression or a function, read from the name as labels are (see `TarSource`).
      seed: names the split.

    >>> test = Holdout("test", 0.5, group=1)
    >>> people = ["faces/ann/1.jpg", "faces/ann/2.jpg", "faces/bob/1.jpg", "faces/eve/1.jpg"]
    >>> [test.holds(name) for name in people]
    [False, False, True, False]
    """

    part: str
    share: float
    group: lb.Label = None
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "Holdout | None":
        """What `part:share[:group]` says; None if `text` is no such thing, but a folder.

        >>> Holdout.parse("test:0.1:folder")
        Holdout(part='test', share=0.1, group='folder', seed=0)
        """
        match = re.fullmatch(r"(train|test):([0-9.]+)(?::(folder|-?\d+))?", text)
        if match is None:
            check.argument(
                not re.match(r"(train|test):", text),
                "split",
                'a folder, or such as "train:0.1", "test:0.1:folder" or "test:0.1:0"',
                text,
            )
            return None
        group: lb.Label = match[3]
        if match[3] not in (None, "folder"):
            group = int(match[3])
        try:
            share = float(match[2])
        except ValueError:
            share = -1.0
        return cls(match[1], share, group).checked()

    def checked(self) -> "Holdout":
        """Itself, if its values are sound."""
        check.one_of("part", self.part, ("train", "test"))
        ok = isinstance(self.share, float) and 0.0 < self.share < 1.0
        check.argument(ok, "share", "a number in (0, 1)", self.share)
        return self

    def holds(self, name: str) -> bool:
        """Whether a member of this name is on this side."""
        return self._side(self._group()(name) or name)

    def _group(self) -> Callable[[str], str | None]:
        if self.group is None:
            return lambda name: name
        if callable(self.group) or isinstance(self.group, re.Pattern):
            return lb.by_name(self.group)
        by_folder = lb.by_folder(self.group)
        return lambda name: by_folder(name.rpartition("/")[0])

    def chooser(self) -> Callable[[str], bool]:
        """`holds`, quick for many names of few groups."""
        group = self._group()
        known: dict[str, bool] = {}

        def holds(name: str) -> bool:
            of = group(name) or name
            if self.group is None:
                return self._side(of)
            if of not in known:
                known[of] = self._side(of)
            return known[of]

        return holds

    def _side(self, group: str) -> bool:
        digest = hashlib.blake2b(f"{self.seed}:{group}".encode(), digest_size=8).digest()
        tested = int.from_bytes(digest, "big") < self.share * 2**64
        return tested == (self.part == "test")
