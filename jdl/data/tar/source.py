"""Images in tar archives: a grain data source over one archive or many.

Nothing is unpacked. An index (see `index`) lists where every member is, and `pread` reads it there,
from any thread or process, without a shared file position. Compressed archives are read the same
way, but efficiently only in their own order (see `jdl.data.window`).
"""

import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from jdl.core import check
from jdl.data import labels as lb
from jdl.data.choice import Patterns, Some, folder_counts, told
from jdl.data.holdout import Holdout, find_folder, inside, no_such_split, parse_split, split_folder
from jdl.data.images import BadImage
from jdl.data.tar import scan
from jdl.data.tar.archive import Archive, is_url
from jdl.data.tar.index import TarIndex, open_index
from jdl.data.tar.open import open_archive
from jdl.data.tar.paths import Paths, expand
from jdl.data.tar.selection import Selection
from jdl.data.targets import (
    SKIPPED,
    TARGETS,
    Table,
    by_folder,
    by_member,
    by_sidecar,
    by_table,
    decode,
    encode,
)

_MAX_ENCODED = 1 << 28  # bytes of one image file: 256 MiB
_GROUP = 256  # records requested at once from several remote archives, at most,
_GROUP_BYTES = 1 << 25  # and their bytes, unless one record has more
# How many more archives this process keeps open, by its limit; others are opened for each read.
_open_left = [min(256, os.sysconf("SC_OPEN_MAX") % 2**31 // 4 if hasattr(os, "sysconf") else 256)]


class Record(NamedTuple):
    """One image file.

    Attributes:
      name: its full name in the archive.
      data: its bytes.
      label: its number in the source's `classes`, or -1; another target is an array.

    >>> from jdl.data import digits_path
    >>> record = TarSource(digits_path(), keep_index=False)[0]
    >>> record.name, record.data[1:4], record.label
    ('test/0/0020.png', b'PNG', 0)
    """

    name: str
    data: bytes
    label: int | np.ndarray | np.floating


class TarSource:
    """The images in one tar archive or several, as a grain `RandomAccessDataSource`.

    Its records are the regular members that have an image's extension and are complete, without
    those that `exclude` leaves out, in the order of the paths and of each archive.

    Args:
      paths: a path, a URL, a glob, a brace range (`faces-{000..015}.tar`), a folder, or a list of
        these; or a list of open indexes.
      label: what a record's class is read from: `"folder"`, the folder it is in; an integer, the
        folder at that place of its path; a compiled regular expression, its (only) group; a
        function of the record's name, which returns None to leave the record out; `"cls"`, the
        text of the member `key.cls` beside `key.jpg`, as in WebDataset; `"json:person"`, the field
        `person` of `key.json`; or None, no labels.
      labels: in place of `label`, a table of names and values: a mapping; or a .csv, .tsv, .json or
        .jsonl file, as `"labels.csv"`, or `"labels.csv:age"` for one of several columns. A name is
        a member's path, or its last parts, with or without extension, if that leaves no doubt.
      target: `"class"`; `"number"`, float32 targets of a number, or k numbers, for each record; or
        `"multilabel"`, float32 [classes] of 0 and 1, from a list of classes or a text `"cat|dog"`.
      split: only members in this folder, such as `"train"` or `"ds/train"`, from the root on or
        in the only top folder of all; or one side of a split by hash, a `Holdout` or its short
        form: `"train:0.1"` and `"test:0.1"` hold out a tenth by name, `"test:0.1:folder"` whole
        folders, `"test:0.1:1"` whole groups that share the second folder of the path.
      include: only members that match one of these patterns, such as `"left/*.png"` (see
        `jdl.data.choice.Patterns`).
      exclude: patterns of members to leave out besides those of `jdl.data.LITTER`, such as hidden
        files and `*.seg.*`; `"!*.seg.*"` takes one of these back, and `()` leaves out none.
      classes: the class table of training, for an evaluation; by default all classes found.
      on_error: at a sidecar of an image that names no class, `"raise"` an error, or `"skip"` the
        image: it has no label, and reading it is an error.
      keep_index: whether to store an index that had to be made.

    Attributes:
      archives: the archives' paths.
      indexes: the archives' indexes.
      classes: the names of the classes; a label is a number in this table.
      label_spec: shape and type of a record's label: (), int32, unless `target` says otherwise.
      left_out: how many images each pattern leaves out; under "include" those that no pattern of
        `include` matches, under "label" those whose label function returns None.

    Raises:
      DataError: if an archive is missing or not a tar, holds no images, has no such split, or has
        labels that are not in `classes`.

    >>> from jdl.data import digits_path
    >>> source = TarSource(digits_path(), split="train")
    >>> len(source), source.classes[:3], source[0].name
    (1438, ('0', '1', '2'), 'train/0/0000.png')
    """

    def __init__(
        self,
        paths: Paths | Sequence[TarIndex],
        *,
        label: lb.Label = "folder",
        labels: Table = None,
        target: str = "class",
        split: str | Holdout | None = None,
        include: Some = None,
        exclude: Some = None,
        classes: Sequence[str] | None = None,
        on_error: str = "raise",
        keep_index: bool = True,
    ):
        check.one_of("on_error", on_error, ("raise", "skip"))
        self._skip, self._bad = on_error == "skip", dict[tuple[int, int], str]()
        self.indexes = _open_indexes(paths, keep_index)
        self.archives = [index.path for index in self.indexes]
        self._open_files()
        self._select(split, Patterns.checked(include, exclude))
        self._label(label, labels, target, classes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        """Record `i`, counted from the end where negative."""
        archive, row = self._find(i)
        (data,) = self.read_many([i])
        if isinstance(data, BadImage):
            raise data
        label = self.labels([i])[0]
        label = int(label) if self._targets is None else label
        return Record(self.indexes[archive].name(row), data, label)

    def __repr__(self) -> str:
        return f"TarSource({_few(self.archives)}, {len(self)} images)"

    # ------------------------------------------------------------------ what it holds

    @property
    def damage(self) -> list[tuple[str, scan.Damage]]:
        """The archives' damage: (archive, damage)."""
        return [(index.path, each) for index in self.indexes for each in index.damage]

    def name(self, i: int) -> str:
        """The name of record `i`, without reading it."""
        archive, row = self._find(i)
        return self.indexes[archive].name(row)

    def where(self, i: int) -> str:
        """Archive and member of record `i`, for messages."""
        archive, row = self._find(i)
        return f"{self.archives[archive]!r}, member {self.indexes[archive].name(row)!r}"

    def labels(self, records: Sequence[int] | np.ndarray) -> np.ndarray:
        """The labels of these records, int32 [n], -1 where there is none; or as `target` says."""
        if self._targets is not None:
            records = np.asarray(records, np.int64)
            return decode(self._targets[records], self.target, len(self.classes))
        found = np.full(len(records), lb.NO_LABEL, np.int32)
        archives, rows = self._locate(records)
        for archive in np.unique(archives).tolist():
            here = archives == archive
            found[here] = self._labels_of(archive, rows[here])
        return found

    @property
    def label_spec(self) -> tuple[tuple[int, ...], Any]:
        """Shape and type of a record's label."""
        one = self.labels([0])
        return one.shape[1:], one.dtype

    def _labels_of(self, archive: int, rows: np.ndarray) -> np.ndarray:
        by_folder = self._label_is_by_folder
        at = self.indexes[archive].columns.folder_ids[rows] if by_folder else rows
        return self._labels[archive][at]

    def count_classes(self) -> dict[str, int]:
        """The number of records in each class."""
        if self._targets is not None:
            sums = decode(self._targets, self.target, len(self.classes)).sum(axis=0).tolist()
            return dict(zip(self.classes, map(int, sums), strict=True)) if self.classes else {}
        counts = np.zeros(len(self.classes) + 1, np.int64)
        for archive, rows in enumerate(self._rows):
            labels = self._labels_of(archive, rows.all()).astype(np.int64)
            counts += np.bincount(labels + 1, minlength=len(counts))
        return {name: int(n) for name, n in zip(self.classes, counts[1:], strict=True)}

    def unlabelled(self) -> str | None:
        """Archive and member of a record that has no label and is not skipped, if there is one."""
        before = 0
        if self._targets is not None:
            return None
        for archive, chosen in enumerate(self._rows):
            rows = chosen.all()
            for i in np.flatnonzero(self._labels_of(archive, rows) == lb.NO_LABEL).tolist():
                if (archive, int(rows[i])) not in self._bad:
                    return self.where(before + i)
            before += len(chosen)
        return None

    # ------------------------------------------------------------------ selection and labels

    def _select(self, split: str | Holdout | None, patterns: Patterns) -> None:
        """Sets `_rows`, each archive's images, and `_ends`, the number of images up to each."""
        split = parse_split(split)
        self.left_out: Counter[str] = Counter()
        chosen = []
        for index in self.indexes:
            wanted, out = patterns.images(index)
            chosen.append(wanted)
            self.left_out += out
        if not (images := sum(int(wanted.sum()) for wanted in chosen)):
            raise self._no_images()
        folders: dict[str, int] = {}
        if (folder := split_folder(split)) is not None:
            folders = folder_counts(self.indexes, chosen)
            folder = find_folder(folder, folders)
            for index, wanted in zip(self.indexes, chosen, strict=True):
                here = [inside(each, folder) for each in index.folders()]
                wanted &= np.array(here, bool)[index.columns.folder_ids]
        if isinstance(split, Holdout):
            in_split = split.chooser()
            for index, wanted in zip(self.indexes, chosen, strict=True):
                for row in np.flatnonzero(wanted).tolist():
                    wanted[row] = in_split(index.name(row))
        self._set_rows(chosen)
        if split is not None and not len(self):
            raise no_such_split(_few(self.archives), split, images, folders)

    def _set_rows(self, chosen: list[np.ndarray]) -> None:
        self._rows = [Selection(wanted) for wanted in chosen]
        self._ends = np.cumsum([len(rows) for rows in self._rows])

    def _no_images(self) -> check.DataError:
        members = sum(map(len, self.indexes))
        known = ", ".join(sorted(e.decode() for e in scan.IMAGE_EXTENSIONS))
        why = f"none readable with an extension of {known}"
        for path, damage in self.damage[:1]:
            why = f"{path!r} is damaged ({damage.word}): {damage.detail}"
        if self.left_out:
            why = f"all its images are left out, {told(self.left_out)}"
        return check.DataError(f"{_few(self.archives)} holds no images: {members} members; {why}.")

    def _label(
        self, label: lb.Label, table: Table, target: str, classes: Sequence[str] | None
    ) -> None:
        """Sets `classes` and the labels: by folder, by row, or the targets of records."""
        check.one_of("target", target, TARGETS)
        check.argument(table is None or label == "folder", "label", "left out with `labels`", label)
        self.target, self._targets = target, None
        named = self._named(label, table)
        if callable(label):
            self._leave_out_unnamed(named)
        if target != "class":
            check.argument(label is not None, "label", "given with this target", label)
            values: list[Any] = []
            for archive, column in enumerate(named):
                rows = self._rows[archive].all()
                ids = self.indexes[archive].columns.folder_ids
                at = (ids[rows] if self._label_is_by_folder else rows).tolist()
                for row, place in zip(rows.tolist(), at, strict=True):
                    values.append(SKIPPED if (archive, row) in self._bad else column[place])
            self._targets, self.classes = encode(values, target, classes, self.where)
            return
        seen = {name for names in named for name in names if name is not None}
        self.classes = lb.table_of(classes, seen, _few(self.archives))
        self._labels = [lb.number(names, self.classes) for names in named]

    def _named(self, label: lb.Label, table: Table) -> list[list[Any]]:
        """For each archive, each folder's or row's class or value; None where there is none."""
        sidecar, as_class = lb.sidecar(label), self.target == "class"
        in_name = table is None and not sidecar
        self._label_is_by_folder = in_name and isinstance(label, str | int | None)
        rows = [chosen.all() for chosen in self._rows]
        if table is not None:
            return by_table(table, self.indexes, rows, as_class)
        if sidecar:
            return [self._by_sidecar(i, some, *sidecar) for i, some in enumerate(rows)]
        if label is None:
            return [[None] * len(index.folders()) for index in self.indexes]
        by = by_folder if self._label_is_by_folder else by_member
        class_of = lb.reader(label)
        return [by(index, some, class_of) for index, some in zip(self.indexes, rows, strict=True)]

    def _leave_out_unnamed(self, named: list[list[str | None]]) -> None:
        """Leaves out the records whose label function returned None."""
        before = len(self)
        self._set_rows([np.array([name is not None for name in names]) for names in named])
        if out := before - len(self):
            self.left_out["label"] = out
        if not len(self):
            raise self._no_images()

    def _by_sidecar(self, archive: int, rows: np.ndarray, extension: str, field: str) -> list[Any]:
        handle = self._handle(archive)
        index, as_class = self.indexes[archive], self.target == "class"
        found, bad = by_sidecar(index, handle, rows, extension, field, as_class)
        if self._files.get(archive) is not handle:
            handle.close()
        if bad and not self._skip:
            hint = 'To leave such images out, pass on_error="skip".'
            raise check.DataError(f"{next(iter(bad.values()))} {hint}")
        self._bad |= {(archive, row): why for row, why in bad.items()}
        return found

    def _locate(self, records: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Archives and rows of these records, int64; negative ones count from the end."""
        records, n = np.asarray(records, np.int64), len(self)
        if len(outside := records[(records < -n) | (records >= n)]):
            raise IndexError(f"record {outside[0]} of {n}")
        records = records % n
        if len(self._rows) == 1:
            return np.zeros(len(records), np.int64), self._rows[0].rows(records)
        archives = np.searchsorted(self._ends, records, "right")
        rows = np.empty(len(records), np.int64)
        for archive in np.unique(archives).tolist():
            here = archives == archive
            start = int(self._ends[archive - 1]) if archive else 0
            rows[here] = self._rows[archive].rows(records[here] - start)
        return archives, rows

    def _find(self, i: int) -> tuple[int, int]:
        """Archive and row of record `i`."""
        archives, rows = self._locate([i])
        return int(archives[0]), int(rows[0])

    # ------------------------------------------------------------------ reading

    @property
    def mode(self) -> str:
        """How it is read: "random", "seekable" (at random, slowly), or "stream" (in order)."""
        modes = {index.mode for index in self.indexes}
        return next(mode for mode in ("stream", "seekable", "random") if mode in modes)

    @property
    def chosen(self) -> tuple[Selection, ...]:
        """The rows of each archive's index that are its records."""
        return tuple(self._rows)

    @property
    def counts(self) -> np.ndarray:
        """The number of records in each archive, int64 [archives]."""
        return np.diff(self._ends, prepend=0)

    def read_many(self, records: Sequence[int] | np.ndarray) -> "Iterator[bytes | BadImage]":
        """The bytes of these records, in this order; a `BadImage` for one that is too large.

        Raises:
          DataError: if an archive is not what it was when it was indexed.
        """
        archives, rows = self._locate(records)
        if len(self.archives) > 1 and any(map(is_url, self.archives)):
            yield from self._read_grouped(archives, rows)
            return
        at = 0
        while at < len(rows):
            archive, start = int(archives[at]), at
            while at < len(rows) and archives[at] == archive:
                at += 1
            yield from self._read(archive, rows[start:at])

    def _read_grouped(self, archives: np.ndarray, rows: np.ndarray) -> "Iterator[bytes | BadImage]":
        """The same, asking all archives at the same time, which a network makes worthwhile."""
        sizes = np.zeros(len(rows), np.int64)
        for archive in np.unique(archives).tolist():
            here = archives == archive
            of_members = self.indexes[archive].columns.sizes[rows[here]]
            sizes[here] = np.minimum(of_members, _MAX_ENCODED)
        start = 0
        while start < len(rows):
            total = np.cumsum(sizes[start : start + _GROUP])
            end = start + max(int(np.searchsorted(total, _GROUP_BYTES, "right")), 1)
            asked = []
            for archive in np.unique(archives[start:end]).tolist():
                places = np.flatnonzero(archives[start:end] == archive)
                asked.append((places.tolist(), self._read(archive, rows[start + places])))
            found: dict[int, bytes | BadImage] = {}
            for of, data in asked:
                found |= zip(of, data, strict=True)
            yield from (found.pop(place) for place in range(end - start))
            start = end

    def _read(self, archive: int, rows: np.ndarray) -> "Iterator[bytes | BadImage]":
        """Records of one archive. A server is asked for them now, not when the first is taken."""
        reader = self._reader(archive, rows)
        next(reader)
        return reader

    def _reader(self, archive: int, rows: np.ndarray) -> "Iterator[bytes | BadImage]":
        index = self.indexes[archive]
        sizes = index.columns.sizes[rows].tolist()
        offsets = index.columns.offsets[rows].tolist()
        handle = self._handle(archive)
        kept = self._files.get(archive) is handle
        try:
            handle.check_unchanged(index.stamp)
            fits = [(s, at) for s, at in zip(sizes, offsets, strict=True) if s <= _MAX_ENCODED]
            read = handle.pread_many(fits)
            yield b""  # for `_read`
            if self._last is not None and self._last is not handle:
                self._last.release_memory()
            self._last = handle
            for row, size in zip(rows.tolist(), sizes, strict=True):
                if size > _MAX_ENCODED:
                    problem = f"it has {size} bytes, more than the {_MAX_ENCODED} an image may have"
                    yield BadImage(problem)
                    continue
                data = next(read)
                if len(data) != size:
                    raise check.DataError(
                        f"{index.path!r} ends inside the member {index.name(row)!r}; it has become "
                        "shorter since it was indexed."
                    )
                yield BadImage(bad) if (bad := self._bad.get((archive, row))) else data
        finally:
            if not kept:
                handle.close()

    _targets: np.ndarray | None = None  # of all records, where they are no class numbers
    _last: Archive | None = None  # the archive read last

    def _handle(self, archive: int) -> Archive:
        if self._process != os.getpid():
            # A forked child shares the places in files with its parent, and locks may be held.
            self._finalizer.detach()
            self._open_files()
        handle = self._files.get(archive)
        if handle is not None:
            return handle
        handle = open_archive(self.archives[archive])
        with self._lock:
            if archive in self._files:  # another thread was faster
                handle.close()
                return self._files[archive]
            if _open_left[0] > 0 or is_url(self.archives[archive]):  # a URL needs no descriptor
                _open_left[0] -= 1
                self._files[archive] = handle
        return handle

    def _open_files(self) -> None:
        self._files: dict[int, Archive] = {}
        self._last, self._process = None, os.getpid()
        self._lock = threading.Lock()
        # Only when no thread can be reading: a closed descriptor's number may be used for another
        # file.
        self._finalizer = weakref.finalize(self, _close_all, self._files)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_files", "_last", "_lock", "_finalizer")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_files()


def _open_indexes(paths: Paths | Sequence[TarIndex], keep: bool) -> tuple[TarIndex, ...]:
    given = () if isinstance(paths, str | os.PathLike) else tuple(paths)
    indexes = tuple(index for index in given if isinstance(index, TarIndex))
    if indexes and len(indexes) == len(given):
        return indexes
    return tuple(open_index(path, keep=keep) for path in expand(cast(Paths, paths)))


def _close_all(files: dict[int, Archive]) -> None:
    while files:
        files.popitem()[1].close()
        _open_left[0] += 1


def _few(archives: list[str]) -> str:
    more = f" (with {len(archives) - 1} more)" if len(archives) > 1 else ""
    return f"{archives[0]!r}{more}"
