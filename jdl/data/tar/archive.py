"""An archive's bytes: at random where that is possible, else in order.

    a plain tar on a disk          random     `pread`, from any thread or process
    a plain tar behind an URL      random     ranges through fsspec, tried again when they fail
    a .gz with a seek file         seekable   `jdl index --seekable` (indexed_gzip)
    compressed, or no ranges       in order   going back means to begin again
    standard input, "-"            in order   there is no going back

`open.open_archive` chooses among these.
"""

import abc
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jdl.core import check
from jdl.data.tar import inflate

UNKNOWN = 2**62  # the size of a tar whose end has not been met yet
STDIN = "-"

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PIECE = 1 << 18  # bytes read at once in order
_KEPT = 1 << 20  # bytes behind the last ones asked for that can be asked for again


def _seek_and_read(fd: int, size: int, offset: int) -> bytes:
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


_SEEKING = threading.Lock()
_pread = getattr(os, "pread", _seek_and_read)  # which Windows lacks


def is_url(path: str) -> bool:
    """Whether `path` is read through fsspec.

    >>> is_url("https://example.org/a.tar"), is_url("C:/a.tar"), is_url("a.tar")
    (True, False, False)
    """
    return bool(_URL.match(path))


class Archive(abc.ABC):
    """The bytes of one tar.

    Attributes:
      path: the file, the URL, or "-".
      size: how many bytes the tar has; `UNKNOWN` until a reader in order met the end.
      mode: "random", "seekable" or "stream".
      rewinds: whether bytes behind can be had again, at whatever cost.
      problem: why the bytes end before they should, if they do.
      wide, narrow, stride: bytes a scan reads at once where headers stand close together, where
        they do not, and the distance up to which they do.
    """

    path: str
    size: int
    mode = "random"
    rewinds = True
    problem = ""
    wide, narrow, stride = 1 << 20, 1 << 12, 1 << 15

    @abc.abstractmethod
    def pread(self, size: int, offset: int) -> bytes:
        """The bytes [offset, offset + size) of the tar; fewer at its end."""

    def pread_many(self, places: list[tuple[int, int]]) -> Iterator[bytes]:
        """`pread` for each (size, offset), in this order."""
        return (self.pread(size, offset) for size, offset in places)

    @abc.abstractmethod
    def stamp(self) -> dict[str, Any]:
        """What tells this archive, in this state, from all others."""

    @abc.abstractmethod
    def check_unchanged(self, stamp: dict[str, Any]) -> None:
        """Raises DataError unless the archive at the path is still the one of that stamp."""

    def rest(self) -> None:  # noqa: B027  # most keep nothing
        """Gives back what it keeps in memory until it is read again."""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Lets go of it."""


class Raw(Archive):
    """The bytes of a file as it is stored.

    Attributes:
      ranges: whether any part of it can be read by itself.
    """

    ranges = True

    @abc.abstractmethod
    def read_from(self, at: int) -> inflate.Readable:
        """The file, to be read in order from there."""


class LocalFile(Raw):
    """A plain file, read with `pread`."""

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

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        return _pread(self.fd, size, offset)

    def read_from(self, at: int) -> inflate.Readable:
        """The file, to be read in order from there."""
        file = open(self.path, "rb")  # noqa: SIM115
        file.seek(at)
        return file

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
        # By its path: an archive that was replaced is still there behind the open descriptor.
        try:
            stat = os.stat(self.path)
        except OSError as error:
            raise check.DataError(
                f"{self.path!r} is gone since it was indexed: {error.strerror}."
            ) from error
        if (stat.st_size, stat.st_mtime_ns) == (stamp["size"], stamp["mtime_ns"]):
            return
        now = LocalFile(self.path)
        try:
            found = now.stamp()
        finally:
            now.close()
        if (found["size"], found["digest"]) != (stamp["size"], stamp["digest"]):
            raise check.DataError(
                f"{self.path!r} has changed since it was indexed. Start again with the new one."
            )
        stamp["mtime_ns"] = found["mtime_ns"]  # touched, but the same

    def close(self) -> None:
        """See `Archive`."""
        os.close(self.fd)


class Forward(Archive):
    """Bytes that come in order: decompressed, or from where no range can be asked for.

    What lies ahead is reached by reading on, what lies behind by beginning again.
    """

    mode = "stream"
    wide = narrow = 1 << 16
    stride = 1 << 15

    def __init__(
        self,
        path: str,
        read_from: Callable[[int], inflate.Readable],
        raw: "Raw | None",
    ):
        self.path, self.size, self.rewinds = path, UNKNOWN, raw is not None
        self._read_from, self._raw = read_from, raw
        self._lock = threading.Lock()
        self._file: inflate.Readable | None = None
        self._pieces: Iterator[inflate.Piece] = iter(())
        self._window, self._start = bytearray(), 0

    def _begin(self) -> None:
        self._file = self._read_from(0)
        self._pieces = inflate.pieces(self._file, _PIECE)
        self._window, self._start = bytearray(), 0

    def rest(self) -> None:
        """Gives back its memory, if it can begin again when it is asked for more."""
        with self._lock:
            if self._file is not None and self.rewinds:
                self._file.close()
                self._file, self._pieces, self._window = None, iter(()), bytearray()

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        with self._lock:
            if self._file is None:
                self._begin()
            elif offset < self._start:
                if not self.rewinds:
                    raise check.DataError("Standard input cannot be read twice.")
                self._file.close()
                self._begin()
            end = offset + size
            while self._start + len(self._window) < end:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                if piece.problem:
                    self.problem = piece.problem
                    break
                self._window += piece.data
                behind = min(offset, self._start + len(self._window)) - _KEPT - self._start
                if behind > _KEPT:
                    del self._window[:behind]
                    self._start += behind
            have = self._start + len(self._window)
            if have < end:
                self.size = have
            at = offset - self._start
            return bytes(self._window[at : at + size])

    def stamp(self) -> dict[str, Any]:
        """See `Archive`."""
        return {} if self._raw is None else self._raw.stamp()

    def check_unchanged(self, stamp: dict[str, Any]) -> None:
        """See `Archive`."""
        if self._raw is not None:
            self._raw.check_unchanged(stamp)

    def close(self) -> None:
        """See `Archive`."""
        self.rest()
        if self._raw is not None:
            self._raw.close()
