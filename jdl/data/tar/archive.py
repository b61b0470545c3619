"""An archive's bytes: at random where that is possible, else in order.

    a plain tar on a disk          random     `pread`, from any thread or process
    a plain tar behind a URL      random     ranges through fsspec, retried when they fail
    a .gz with a seek file         seekable   `jdl index --seekable` (indexed_gzip)
    compressed, or no ranges       stream     going back means to start again
    standard input, "-"            stream     there is no going back

`open.open_archive` chooses among these.
"""

import abc
import contextlib
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jdl.core import check
from jdl.data.tar import inflate

UNKNOWN = 2**62  # the size of a tar whose end has not been reached yet
STDIN = "-"

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PIECE = 1 << 18  # bytes read at once in order
_KEPT = 1 << 20  # bytes before the last request that can be requested again


def _seek_and_read(fd: int, size: int, offset: int) -> bytes:
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


_SEEKING = threading.Lock()
_pread = getattr(os, "pread", _seek_and_read)  # Windows has no pread


def is_url(path: str) -> bool:
    """Whether `path` is read through fsspec.

    >>> is_url("https://example.org/a.tar"), is_url("C:/a.tar"), is_url("a.tar")
    (True, False, False)
    """
    return bool(_URL.match(path))


class Archive(abc.ABC):
    """The bytes of one tar."""

    path: str  # the file, the URL, or "-"
    size: int  # the tar's bytes; `UNKNOWN` until a reader in order has reached the end
    mode = "random"  # or "seekable" or "stream"
    rewinds = True  # whether earlier bytes can be read again, at whatever cost
    problem = ""  # why the bytes end too early, if they do
    # Bytes that a scan reads at once where headers are close together and where they are not, and
    # the distance up to which they are close.
    wide, narrow, stride = 1 << 20, 1 << 12, 1 << 15
    file: "StoredFile | None" = None  # that holds it; None for standard input

    @abc.abstractmethod
    def pread(self, size: int, offset: int) -> bytes:
        """The bytes [offset, offset + size) of the tar; fewer at its end."""

    def pread_many(self, places: list[tuple[int, int]]) -> Iterator[bytes]:
        """`pread` for each (size, offset), in this order."""
        return (self.pread(size, offset) for size, offset in places)

    def stamp(self) -> dict[str, Any]:
        """What distinguishes this archive, in this state, from all others."""
        return {} if self.file is None else self.file.stamp()

    def check_unchanged(self, stamp: dict[str, Any]) -> None:
        """Raises DataError unless the archive at the path still has that stamp."""
        if self.file is not None:
            self.file.check_unchanged(stamp)

    def release_memory(self) -> None:  # noqa: B027  # most keep nothing
        """Frees what it keeps in memory until it is read again."""

    def close(self) -> None:
        """Closes its file."""
        if self.file is not None:
            self.file.close()


class StoredFile(Archive):
    """The bytes of a file as it is stored: an archive by itself if it is a plain tar."""

    ranges = True  # whether any part of it can be read by itself

    @abc.abstractmethod
    def reader(self) -> inflate.Readable:
        """The file, to be read in order from its beginning."""


class LocalFile(StoredFile):
    """A file on a disk, read with `pread`."""

    def __init__(self, path: str):
        self.path = path
        flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
        try:
            self.fd = os.open(path, sum(flags, os.O_RDONLY))
        except OSError as error:
            raise check.DataError(f"Cannot open the archive {path!r}: {error.strerror}.") from error
        if not Path(path).is_file():  # a pipe or a folder cannot be read at random
            os.close(self.fd)
            raise check.DataError(f"{path!r} is not a regular file; a tar archive was expected.")
        self.size = os.fstat(self.fd).st_size
        self._close = weakref.finalize(self, os.close, self.fd)
        self._close.atexit = False

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        return _pread(self.fd, size, offset)

    def reader(self) -> inflate.Readable:
        """See `StoredFile`."""
        return open(self.path, "rb")

    def stamp(self) -> dict[str, Any]:
        """See `Archive`."""
        stat = os.fstat(self.fd)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(_pread(self.fd, 4096, 0))
        digest.update(_pread(self.fd, 4096, max(stat.st_size - 4096, 0)))
        for i in range(1, 17):
            digest.update(_pread(self.fd, 512, stat.st_size * i // 17 & -512))
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": digest.hexdigest()}

    def check_unchanged(self, stamp: dict[str, Any]) -> None:
        """See `Archive`."""
        # By its path: the open descriptor still reads an archive that has been replaced.
        try:
            stat = os.stat(self.path)
        except OSError as error:
            raise check.DataError(
                f"{self.path!r} is gone since it was indexed: {error.strerror}."
            ) from error
        if (stat.st_size, stat.st_mtime_ns) == (stamp["size"], stamp["mtime_ns"]):
            return
        with contextlib.closing(LocalFile(self.path)) as now:
            found = now.stamp()
        if (found["size"], found["digest"]) != (stamp["size"], stamp["digest"]):
            raise changed(self.path)
        stamp["mtime_ns"] = found["mtime_ns"]  # another modification time, the same contents

    def close(self) -> None:
        """See `Archive`."""
        self._close()


class Stream(Archive):
    """Bytes that come in order: decompressed, or from a server without ranges.

    Later bytes are reached by reading on, earlier ones by starting again: `reader` opens the stored
    bytes at their beginning.
    """

    mode = "stream"
    wide = narrow = 1 << 16

    def __init__(self, path: str, reader: Callable[[], inflate.Readable], file: StoredFile | None):
        self.path, self.size, self.rewinds, self.file = path, UNKNOWN, file is not None, file
        self._reader = reader
        self._lock = threading.Lock()
        self._input: inflate.Readable | None = None
        self._pieces: Iterator[inflate.Piece] = iter(())
        self._window, self._start = bytearray(), 0  # the bytes kept, and where they begin

    def release_memory(self) -> None:
        """See `Archive`."""
        with self._lock:
            if self.rewinds:
                self._end()

    def _end(self) -> None:
        if self._input is not None:
            self._input.close()
        self._input, self._pieces, self._window, self._start = None, iter(()), bytearray(), 0

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        with self._lock:
            if offset < self._start:
                if not self.rewinds:
                    raise check.DataError("Standard input cannot be read twice.")
                self._end()
            if self._input is None:
                self._input = self._reader()
                self._pieces = inflate.pieces(self._input, _PIECE)
            end = offset + size
            while self._start + len(self._window) < end:
                piece = next(self._pieces, inflate.Piece(b""))
                self.problem = piece.problem or self.problem
                if not piece.data:
                    self.size = self._start + len(self._window)
                    break
                self._window += piece.data
                behind = min(offset, self._start + len(self._window)) - _KEPT - self._start
                if behind > _KEPT:
                    del self._window[:behind]
                    self._start += behind
            at = offset - self._start
            return bytes(self._window[at : at + size])

    def close(self) -> None:
        """See `Archive`."""
        self.release_memory()
        super().close()


def changed(path: str) -> check.DataError:
    """The error for an archive that is not what it was."""
    return check.DataError(
        f"{path!r} has changed since it was indexed. Start again with the new one."
    )
