"""Settles what only a whole archive tells: where links lead, and which of equal names counts.

It is as if the archive were unpacked into an empty folder. A hard link names an earlier member, a
symbolic one a path from its own folder, perhaps through other links; of equal names the last
counts. A followed link has the offset and size of its target. Links to folders are not followed,
since the images there would come twice. What is left out is noted.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from jdl.data.tar import format as fmt
from jdl.data.tar import scan as sc
from jdl.data.tar.archive import Archive
from jdl.data.tar.walk import Walk

End: TypeAlias = int | str | bytes  # of a link: a row, why there is none, or a path to be followed

_MAX_STEPS = 256  # folders and links that a link may lead through
_MAX_PATH = 4096  # bytes
_OUTSIDE = "which is outside the archive"
_FOLDER = "a folder; only links to files are followed"


def scan(archive: Archive) -> tuple[sc.Columns, tuple[sc.Damage, ...]]:
    """All members of an archive, its links followed, and its damage."""
    walk = Walk(archive)
    for _ in walk.steps():
        pass
    columns, hashes = walk.columns()
    keys = hashes + columns.folder_ids * np.int32(0x1E3779B1)  # wraps around
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if walk.links:
        columns = _settled(walk, columns, range(len(keys)))
    elif len(twice):
        columns = _settled(walk, columns, np.flatnonzero(np.isin(keys, twice)).tolist())
    walk.note_unlisted()
    return columns, tuple(walk.damage)


def _settled(walk: Walk, columns: sc.Columns, rows: Iterable[int]) -> sc.Columns:
    """The members; all links, and all members of equal names, are among these rows."""
    last: dict[bytes, int] = {}
    ends: dict[int, End] = {}
    older = []
    for row in rows:
        name = columns.name(row)
        if row in walk.links:
            hard, target = walk.links[row]
            path = fmt.plain(target)
            at = last.get(path) if hard else None
            absolute = b"/" if target.startswith(b"/") else b""
            none: End = "which no earlier member is named" if hard else absolute + path
            ends[row] = none if at is None else ends.get(at, at)
        if name in last:
            older.append(last[name])
        last[name] = row
    kinds, offsets = columns.kinds.copy(), columns.offsets.copy()
    places = offsets - fmt.BLOCK
    folders = sorted(folder + b"/" for folder in columns.folder_names()) if ends else []
    for row, end in ends.items():
        name = columns.name(row)
        if isinstance(end, bytes):
            end = _follow(name.rpartition(b"/")[0], end, last, ends, folders)
        if isinstance(end, int) and kinds[end] not in (sc.IMAGE, sc.OTHER):
            end = _FOLDER if kinds[end] == sc.FOLDER else "which is no complete file"
        if isinstance(end, str):
            detail = f"a link to {sc.text(walk.links[row][1][:200])!r}, {end}"
            walk.note("link", int(places[row]), name, detail, lost=False)
        else:
            columns.kinds[row] = sc.IMAGE if sc.image_name(columns.base(row)) else sc.OTHER
            columns.offsets[row], columns.sizes[row] = offsets[end], columns.sizes[end]
    for row in older:
        if columns.kinds[row] == sc.IMAGE:
            columns.kinds[row] = sc.OLDER
            detail = "a later member of the same name replaces it"
            walk.note("duplicate", int(places[row]), columns.name(row), detail, lost=False)
    # Elsewhere the order of the archive stays: it tells which members are one WebDataset sample.
    return _in_order(columns) if ends and walk.archive.mode != "random" else columns


def _follow(
    path: bytes,
    end: End | None,
    last: Mapping[bytes, int],
    ends: Mapping[int, End],
    folders: Sequence[bytes],
) -> int | str:
    """The row that the path `end` leads to from the folder `path`, or why it leads to none."""
    waiting: list[bytes] = []
    for _ in range(_MAX_STEPS):
        if isinstance(end, bytes):
            if end.startswith(b"/"):
                return _OUTSIDE
            waiting += end.split(b"/")[::-1] if end else []
            end = None
        if not waiting or len(waiting) > _MAX_STEPS or len(path) > _MAX_PATH:
            break
        part, end = waiting.pop(), None
        if part != b"..":
            name = path + b"/" + part if path else part
            end = ends.get(last.get(name, -1))
            path = path if isinstance(end, bytes) else name
        elif path.rpartition(b"/")[2] not in (b"", b".."):
            path = path.rpartition(b"/")[0]
        else:
            return _OUTSIDE
    if waiting or isinstance(end, bytes):
        return "which leads through too many folders and links, perhaps in a circle"
    end = ends.get(last.get(path, -1), last.get(path))
    if end is None or isinstance(end, bytes):
        at = bisect.bisect_left(folders, path + b"/")
        inside = not path or (at < len(folders) and folders[at].startswith(path + b"/"))
        return _FOLDER if inside else "which is not in the archive"
    return end


def _in_order(columns: sc.Columns) -> sc.Columns:
    """The same members by offset, so that a compressed archive is not read again for each link."""
    order = np.argsort(columns.offsets, kind="stable")
    lengths = np.diff(columns.base_ends, prepend=0)[order]
    bases = np.frombuffer(b"".join(map(columns.base, order.tolist())), np.uint8)
    rows = [column[order] for column in columns[:4]]
    return sc.Columns._make([*rows, np.cumsum(lengths), bases, *columns[6:]])
