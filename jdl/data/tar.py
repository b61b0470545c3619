"""Images in tar archives, read at random: a grain data source over one archive or many.

Nothing is unpacked. An index (see `tar_index`) says where every member stands, and `pread` reads
one there, from any thread or process, without a position that readers would have to share.
"""

import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdl.core import check
from jdl.data import labels as lb
from jdl.data import tar_scan
from jdl.data.images import BadImage
from jdl.data.paths import Paths, expand
from jdl.data.tar_index import TarIndex, make_stamp, open_archive, open_index

_MAX_ENCODED = 1 << 28  # bytes of one image file: 256 MiB
_MAX_OPEN = 256  # archives kept open; further ones are opened for each read


class Record(NamedTuple):
    """One member.

    Attributes:
      name: its full name in the archive.
      data: its bytes.
      label: its place in the source's `classes`, or -1.
    """

    name: str
    data: bytes
    label: int


class TarSource:
    """The images in one tar archive or several, as a grain `RandomAccessDataSource`.

    Readable images are regular members with an image's extension, whole in the archive, and not
    macOS's `._` companions. Their order is that of the paths, then that of the archive.

    Args:
      paths: a path, a glob, a brace range (`faces-{000..015}.tar`), a folder, or a list of these.
      label: what a member's class is read from: `"folder"`, the folder it lies in; an integer, the
        folder at that place of its path; a compiled regular expression, its (only) group; a
        function of the member's name; or None, no labels.
      split: only members whose path begins with this folder.
      classes: the class table, if it is to be another's: that of training, in an evaluation.
      keep_index: whether to store an index that had to be made.

    Attributes:
      archives: the archives' paths.
      classes: the names of the classes; their places are the labels.

    Raises:
      DataError: if an archive is missing or no tar, holds no images, has no such split, or has
        labels that `classes` lacks.

    >>> from jdl.data import digits_path
    >>> source = TarSource(digits_path(), split="train")
    >>> len(source), source.classes[:3], source[0].name
    (1438, ('0', '1', '2'), 'train/0/0000.png')
    """

    def __init__(
        self,
        paths: Paths,
        *,
        label: lb.Label = "folder",
        split: str | None = None,
        classes: Sequence[str] | None = None,
        keep_index: bool = True,
    ):
        indexes = [open_index(path, keep=keep_index) for path in expand(paths)]
        self._set_up(indexes, label, split, classes)

    @classmethod
    def from_indexes(
        cls,
        indexes: Sequence[TarIndex],
        *,
        label: lb.Label = "folder",
        split: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> "TarSource":
        """A source over archives whose indexes are open already."""
        source = cls.__new__(cls)
        source._set_up(list(indexes), label, split, classes)
        return source

    def _set_up(
        self,
        indexes: list[TarIndex],
        label: lb.Label,
        split: str | None,
        classes: Sequence[str] | None,
    ) -> None:
        self._indexes = indexes
        self.archives = [index.path for index in indexes]
        self._open_files()
        self._select(split)
        self._label(label, classes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        """Record `i`, counted from the end where negative."""
        archive, row = self._find(i)
        index = self._indexes[archive]
        return Record(index.name(row), self._read(archive, row), int(self.labels([i])[0]))

    def __repr__(self) -> str:
        more = f" and {len(self.archives) - 1} more" if len(self.archives) > 1 else ""
        return f"TarSource({self.archives[0]!r}{more}, {len(self)} images)"

    # ------------------------------------------------------------------ what it holds

    @property
    def indexes(self) -> tuple[TarIndex, ...]:
        """The archives' indexes."""
        return tuple(self._indexes)

    @property
    def damage(self) -> list[tuple[str, tar_scan.Damage]]:
        """What is wrong with the archives: (archive, damage)."""
        return [(index.path, each) for index in self._indexes for each in index.damage]

    def name(self, i: int) -> str:
        """The name of record `i`, without reading it."""
        archive, row = self._find(i)
        return self._indexes[archive].name(row)

    def where(self, i: int) -> str:
        """Archive and member of record `i`, for messages."""
        archive, row = self._find(i)
        return f"{self.archives[archive]!r}, member {self._indexes[archive].name(row)!r}"

    def labels(self, records: Sequence[int] | np.ndarray) -> np.ndarray:
        """The labels of these records, int32 [n]; -1 where there is none."""
        found = np.full(len(records), lb.NO_LABEL, np.int32)
        for place, i in enumerate(records):
            archive, row = self._find(int(i))
            of = self._labels[archive]
            if of is not None:
                by_folder = self._label_is_by_folder
                at = self._indexes[archive].columns.folder_ids[row] if by_folder else row
                found[place] = of[at]
        return found

    def count_classes(self) -> dict[str, int]:
        """How many images each class has."""
        counts = np.zeros(len(self.classes) + 1, np.int64)
        for index, rows, of in zip(self._indexes, self._rows, self._labels, strict=True):
            if of is not None:
                at = index.columns.folder_ids[rows] if self._label_is_by_folder else rows
                counts += np.bincount(of[at] + 1, minlength=len(counts))
        return {name: int(n) for name, n in zip(self.classes, counts[1:], strict=True)}

    def unlabelled(self) -> str | None:
        """Archive and member of an image that has no label; None if all have one."""
        for k, (index, rows, of) in enumerate(
            zip(self._indexes, self._rows, self._labels, strict=True)
        ):
            if of is None:
                return self.where(0)
            at = index.columns.folder_ids[rows] if self._label_is_by_folder else rows
            without = np.flatnonzero(of[at] == lb.NO_LABEL)
            if len(without):
                return f"{self.archives[k]!r}, member {index.name(int(rows[without[0]]))!r}"
        return None

    # ------------------------------------------------------------------ selection and labels

    def _select(self, split: str | None) -> None:
        """Sets `_rows`, each archive's images, and `_ends`, how many there are up to each."""
        self._rows: list[np.ndarray] = []
        folders: Counter[str] = Counter()
        images = 0
        for index in self._indexes:
            wanted = index.columns.kinds == tar_scan.IMAGE
            images += int(wanted.sum())
            if split is not None:
                first = [(lb.folder_parts(f) or [""])[0] for f in index.folders()]
                folders.update(first)
                wanted &= np.array([f == split for f in first], bool)[index.columns.folder_ids]
            rows = np.flatnonzero(wanted)
            self._rows.append(rows.astype(np.uint32 if len(index) < 2**32 else np.int64))
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        if not images:
            members = sum(map(len, self._indexes))
            known = ", ".join(sorted(e.decode() for e in tar_scan.IMAGE_EXTENSIONS))
            raise check.DataError(
                f"{_few(self.archives)} holds no images: {members} members, none with an "
                f"extension of {known}."
            )
        if not len(self):
            there = [name for name, _ in folders.most_common(10) if name]
            raise check.DataError(
                f"{_few(self.archives)} has no images of the split {split!r}: no path begins with "
                f"that folder. Paths begin with: {', '.join(map(repr, there)) or 'no folder'}."
            )

    def _label(self, label: lb.Label, classes: Sequence[str] | None) -> None:
        """Sets `classes`, and `_labels`: each archive's labels by folder, or by row."""
        self._label_is_by_folder = not (callable(label) or isinstance(label, re.Pattern))
        named: list[list[str | None]] = []
        for index, rows in zip(self._indexes, self._rows, strict=True):
            if label is None:
                continue
            if self._label_is_by_folder:
                used = np.zeros(len(index.columns.folder_ends), bool)
                used[index.columns.folder_ids[rows]] = True
                of = lb.by_folder(label)  # type: ignore[arg-type]
                every = zip(index.folders(), used.tolist(), strict=True)
                named.append([of(folder) if use else None for folder, use in every])
            else:
                of = lb.by_name(label)  # type: ignore[arg-type]
                chosen: list[str | None] = [None] * len(index)
                for row in rows.tolist():
                    chosen[row] = of(index.name(row))
                named.append(chosen)
        seen = {name for names in named for name in names if name is not None}
        self.classes = (
            lb.class_table(seen)
            if classes is None
            else lb.check_classes(classes, seen, _few(self.archives))
        )
        self._labels: list[np.ndarray | None] = [lb.number(n, self.classes) for n in named]
        if label is None:
            self._labels = [None] * len(self._indexes)

    def _find(self, i: int) -> tuple[int, int]:
        """Archive and row of record `i`."""
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"record {i} of {n}")
        i = i % n
        archive = int(np.searchsorted(self._ends, i, "right"))
        start = int(self._ends[archive - 1]) if archive else 0
        return archive, int(self._rows[archive][i - start])

    # ------------------------------------------------------------------ reading

    def _read(self, archive: int, row: int) -> bytes:
        index = self._indexes[archive]
        size, offset = int(index.columns.sizes[row]), int(index.columns.offsets[row])
        if size > _MAX_ENCODED:
            raise BadImage(f"it has {size} bytes, more than the {_MAX_ENCODED} an image may have")
        fd = self._files.get(archive)
        if fd is None:
            fd = self._open(archive)
        try:
            self._check_unchanged(fd, index)
            data = os.pread(fd, size, offset)
        finally:
            if archive not in self._files:
                os.close(fd)
        if len(data) != size:
            raise check.DataError(
                f"{index.path!r} ends inside the member {index.name(row)!r}; it has been cut "
                "since it was indexed."
            )
        return data

    def _open(self, archive: int) -> int:
        fd = open_archive(self.archives[archive])
        with self._lock:
            if archive in self._files:  # another thread was faster
                os.close(fd)
                return self._files[archive]
            if len(self._files) < _MAX_OPEN:
                self._files[archive] = fd
        return fd

    def _check_unchanged(self, fd: int, index: TarIndex) -> None:
        stat = os.fstat(fd)
        if (stat.st_size, stat.st_mtime_ns) == (index.stamp["size"], index.stamp["mtime_ns"]):
            return
        stamp = make_stamp(fd)
        if (stamp["size"], stamp["digest"]) != (index.stamp["size"], index.stamp["digest"]):
            raise check.DataError(
                f"{index.path!r} has changed since it was indexed. Start again with the new one."
            )
        index.stamp = stamp  # touched, but the same

    def _open_files(self) -> None:
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        # No earlier than when no thread can be reading: a closed descriptor's number may come to
        # mean another file.
        weakref.finalize(self, _close_all, self._files)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_files", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_files()


def _close_all(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def _few(archives: list[str]) -> str:
    more = f" (with {len(archives) - 1} more)" if len(archives) > 1 else ""
    return f"{archives[0]!r}{more}"
