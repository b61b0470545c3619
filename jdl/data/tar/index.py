"""The index of one archive: where every member is, kept in a file beside the archive.

The file is raw arrays after a JSON header. Nothing in it is executed, and all of it is checked
before use. It is used only for the archive it was made from (size, modification time, and a digest
of about twenty pieces of the contents), and rebuilt otherwise.

An index of up to 16 MiB, about 400,000 members, is read into memory. A larger one is mapped, so
that processes share one copy: it takes a descriptor, and must be replaced (`mv`) and not
overwritten (`cp`) while it is in use; jdl itself only replaces.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from jdl.core import check
from jdl.core.files import atomic_file
from jdl.data.tar import resolve, scan
from jdl.data.tar.archive import STDIN, changed, is_url
from jdl.data.tar.open import open_archive
from jdl.data.tar.scan import Columns, Damage

logger = logging.getLogger("jdl.data")

SUFFIX = ".jdlidx"
_MAGIC = b"JDLINDEX3\n"
_MAX_HEADER = 1 << 24
_ALIGN = 64
_READ = 1 << 24  # bytes of an index that is read; larger ones are mapped
_ROWS = 1 << 16  # rows checked at once, to bound a worker's memory
_TYPES = ("int64", "int64", "uint8", "int32", "int64", "uint8", "int64", "uint8")  # of the columns


@dataclass(eq=False)
class TarIndex:
    """The members of one archive."""

    path: str  # the archive
    columns: Columns  # the members
    damage: tuple[Damage, ...]  # the archive's defects
    stamp: dict[str, Any]  # what distinguishes the archive (see `Archive.stamp`)
    size: int  # the tar's bytes, decompressed
    file: str | None = None  # the file that holds it, or None if there is none
    mode: str = "random"  # how the archive can be read (see `archive`)

    def __len__(self) -> int:
        return len(self.columns.sizes)

    def name(self, i: int) -> str:
        """The full name of member `i`."""
        return scan.text(self.columns.name(i))

    def folders(self) -> list[str]:
        """All folders' names, in the order of the columns' `folder_ids`."""
        return [scan.text(folder) for folder in self.columns.folder_names()]

    def __reduce__(self) -> Any:
        """Worker processes open the file anew; an index without a file is pickled whole."""
        if self.file is not None:
            return _reopen, (self.path, self.file, self.stamp, self.mode)
        own = (self.path, self.columns, self.damage, self.stamp, self.size, None, self.mode)
        return TarIndex, own


def open_index(path: str, *, keep: bool = True) -> TarIndex:
    """The index of the archive at `path`, read from its file or made.

    A file that is not a tar gets an empty index whose `damage` says so. Offsets in a compressed
    archive are those in the decompressed tar. With `keep` an index that had to be made is stored:
    beside the archive or, if that is not allowed, in the cache directory.

    Raises:
      DataError: if the archive is missing or cannot be read.
    """
    beside = [] if is_url(path) else [path + SUFFIX]
    files = [] if path == STDIN else [*beside, cached(path)]
    archive = open_archive(path)
    try:
        stamp = archive.stamp()
        for file in files:
            try:
                return _load(path, file, stamp, archive.mode)
            except FileNotFoundError:
                continue
            except (ValueError, OSError) as error:
                logger.info("not using the index %r: %s", file, error)
        if archive.mode == "stream" and path != STDIN:
            logger.warning(
                "%r is compressed, or comes without ranges: it has to be read once from end to end "
                "to index it.",
                path,
            )
        columns, damage = resolve.scan(archive)
        if archive.stamp() != stamp:
            raise check.DataError(f"{path!r} changed while it was being indexed. Try again.")
        size = archive.size
    finally:
        archive.close()
    index = TarIndex(path, columns, damage, stamp, size, mode=archive.mode)
    for file in files if keep else []:
        try:
            save(index, file)
        except OSError as error:
            logger.info("cannot keep an index at %r: %s", file, error)
        else:
            return _load(path, file, stamp, archive.mode)
    return index


def cached(path: str) -> str:
    """The place of the index of `path` when it cannot be beside it."""
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = os.environ.get("JDL_CACHE") or os.path.join(usual, "jdl")
    name = path if is_url(path) else os.path.realpath(path)
    name = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return os.path.join(root, "index", name + SUFFIX)


def save(index: TarIndex, file: str) -> None:
    """Writes the index atomically: no reader sees half of it."""
    lengths = {field: len(array) for field, array in index.columns._asdict().items()}
    header = {"stamp": index.stamp, "size": index.size, "damage": index.damage, "lengths": lengths}
    start = json.dumps(header).encode()
    with atomic_file(file, sync=False) as out:
        out.write(_MAGIC + len(start).to_bytes(8, "little") + start)
        for array in index.columns:
            out.write(bytes(-out.tell() % _ALIGN))
            out.write(np.ascontiguousarray(array).data)


def _load(path: str, file: str, stamp: dict[str, Any], mode: str) -> TarIndex:
    """The index in `file`; a `ValueError` unless it is valid and of the archive with that stamp."""
    if not os.path.isfile(file):
        raise FileNotFoundError(file)
    large = os.path.getsize(file) > _READ
    data = np.memmap(file, np.uint8, "r") if large else np.fromfile(file, np.uint8)
    prefix = len(_MAGIC) + 8
    _require(data[: len(_MAGIC)].tobytes() == _MAGIC, "it is of another kind or version")
    length = int.from_bytes(data[len(_MAGIC) : prefix].tobytes(), "little")
    _require(length <= min(_MAX_HEADER, len(data) - prefix), "its header is cut short")
    try:
        header = json.loads(data[prefix : prefix + length].tobytes())
        same = header["stamp"] == stamp
        damage = tuple(
            Damage(str(word), int(at), str(name), str(detail), bool(lost))
            for word, at, name, detail, lost in header["damage"]
        )
        size = int(header["size"])
        lengths = [int(header["lengths"][field]) for field in Columns._fields]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is malformed ({error!r})") from error
    _require(same, "it is of another archive, or of an earlier state of this one")
    arrays, at = [], prefix + length
    for count, dtype in zip(lengths, _TYPES, strict=True):
        at += -at % _ALIGN
        nbytes = count * np.dtype(dtype).itemsize
        _require(count >= 0 and at + nbytes <= len(data), "its arrays are cut short")
        arrays.append(data[at : at + nbytes].view(dtype))
        at += nbytes
    columns = Columns(*map(np.asarray, arrays))
    _check_columns(columns, size)
    return TarIndex(path, columns, damage, stamp, size, file, mode)


def _check_columns(columns: Columns, size: int) -> None:
    """Checks that all members lie inside the archive, since the index file is untrusted."""
    n = len(columns.sizes)
    _require(all(len(c) == n for c in columns[:5]), "its columns differ in length")
    _require(_rising(columns.base_ends, len(columns.bases)), "its names do not add up")
    _require(_rising(columns.folder_ends, len(columns.folders)), "its folders do not add up")
    for start in range(0, n, _ROWS):
        offsets, sizes, kinds, ids = (c[start : start + _ROWS] for c in columns[:4])
        _require(ids.min() >= 0 and ids.max() < len(columns.folder_ends), "it lacks a folder")
        inside = kinds != scan.CUT
        fits = offsets.min() >= 512 and sizes.min() >= 0 and (sizes[inside] <= size).all()
        fits = fits and (offsets[inside] <= size - sizes[inside]).all()
        _require(fits, "a member lies outside the archive")


def _rising(ends: np.ndarray, total: int) -> bool:
    bounds = bool(ends[0] >= 0 and ends[-1] == total) if len(ends) else total == 0
    return bounds and bool((ends[1:] >= ends[:-1]).all())


def _require(ok: bool | np.bool_, problem: str) -> None:
    if not ok:
        raise ValueError(problem)


def _reopen(path: str, file: str, stamp: dict[str, Any], mode: str) -> TarIndex:
    try:
        return _load(path, file, stamp, mode)
    except (ValueError, OSError):
        index = open_index(path, keep=False)
    if any(index.stamp[key] != stamp[key] for key in stamp if key != "mtime_ns"):
        raise changed(path)  # the rows chosen before are those of another archive
    return index
