"""An archive's bytes, wherever it is: at random where that can be had, else in order.

    a plain tar on a disk          random     `pread`, from any thread or process
    a plain tar behind an URL      random     ranges through fsspec, tried again when they fail
    a .gz with a seek file         seekable   `jdl index --seekable` (indexed_gzip)
    compressed, or no ranges       in order   going back means to begin again
    standard input, "-"            in order   there is no going back

Seek files are made for gzip only. Measured on a tar of 30 kB images, images/s at random:
indexed_gzip 105 with a seek point every 256 kB (the seek file takes 12 % of the archive), 410 with
one every 64 kB (50 %); rapidgzip 48, and it ends the interpreter with an abort unless closed in
time; rapidgzip on bzip2 5; indexed_zstd 114 on one frame; plain tars 96,000. So even the best
serves to look something up, not to train: `jdl pack` rewrites once, or batches come in order.
"""

import hashlib
import importlib.util
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jdl.core import check
from jdl.data import inflate

logger = logging.getLogger("jdl.data")

UNKNOWN = 2**62  # the size of a tar whose end has not been met yet
STDIN = "-"
SEEK_SUFFIX = ".jdlseek"
SEEK_SPACING = 1 << 18

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PIECE = 1 << 18  # bytes read at once in order
_KEPT = 1 << 20  # bytes behind the last ones asked for that can be asked for again
_TRIES = 6
_FIRST_PAUSE = 0.1  # seconds; doubled after every further failure
_RECHECK = 30.0  # seconds between looks whether a remote archive is still the same
_REMOTE_PIECE = 1 << 22
_PATIENCE = 60.0  # seconds without a byte after which a remote read is given up and tried again


def is_url(path: str) -> bool:
    """Whether `path` is read through fsspec.

    >>> is_url("https://example.org/a.tar"), is_url("C:/a.tar"), is_url("a.tar")
    (True, False, False)
    """
    return bool(_URL.match(path))


class Archive:
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

    def pread(self, size: int, offset: int) -> bytes:
        """The bytes [offset, offset + size) of the tar; fewer at its end."""
        raise NotImplementedError

    def pread_many(self, places: list[tuple[int, int]]) -> Iterator[bytes]:
        """`pread` for each (size, offset), in this order."""
        return (self.pread(size, offset) for size, offset in places)

    def stamp(self) -> dict[str, Any]:
        """What tells this archive, in this state, from all others."""
        raise NotImplementedError

    def check_unchanged(self, stamp: dict[str, Any]) -> None:
        """Raises DataError unless the archive at the path is still the one of that stamp."""
        raise NotImplementedError

    def rest(self) -> None:
        """Gives back what it keeps in memory until it is read again."""

    def close(self) -> None:
        """Lets go of it."""


def open_archive(path: str, *, seekable: bool = True) -> Archive:
    """The archive at `path`: a file, an URL, or "-" for standard input.

    Args:
      path: where.
      seekable: whether to use a seek file that is there.

    Raises:
      DataError: if it cannot be opened.
    """
    if path == STDIN:
        return Forward(path, lambda at: sys.stdin.buffer, None)
    raw = RemoteFile(path) if is_url(path) else LocalFile(path)
    if isinstance(raw, RemoteFile) and not raw.ranges:
        return Forward(path, raw.read_from, raw)
    if inflate.compression(raw.pread(8, 0)) is None:
        return raw
    if isinstance(raw, LocalFile) and seekable and os.path.isfile(path + SEEK_SUFFIX):
        return Seekable(raw)
    return Forward(path, raw.read_from, raw)


class LocalFile(Archive):
    """A plain file, read with `pread`."""

    def __init__(self, path: str):
        self.path = path
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self.fd = os.open(path, flags)
        except OSError as error:
            raise check.DataError(f"Cannot open the archive {path!r}: {error.strerror}.") from error
        if not Path(path).is_file():  # a pipe or a folder cannot be read at random
            os.close(self.fd)
            raise check.DataError(f"{path!r} is not a regular file; a tar archive was expected.")
        self.size = os.fstat(self.fd).st_size

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        return os.pread(self.fd, size, offset)

    def read_from(self, at: int) -> inflate.Readable:
        """The file, to be read in order from there."""
        file = open(self.path, "rb")  # noqa: SIM115
        file.seek(at)
        return file

    def stamp(self) -> dict[str, Any]:
        """See `Archive`."""
        stat = os.fstat(self.fd)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(os.pread(self.fd, 4096, 0))
        digest.update(os.pread(self.fd, 4096, max(stat.st_size - 4096, 0)))
        for i in range(1, 17):
            digest.update(os.pread(self.fd, 512, stat.st_size * i // 17 & -512))
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
        raw: "LocalFile | RemoteFile | None",
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


class Seekable(Archive):
    """A local .gz with a file of places at which decompression can begin."""

    mode = "seekable"
    wide = narrow = 1 << 20

    def __init__(self, raw: LocalFile):
        self.path, self._raw = raw.path, raw
        try:
            self._file = _indexed_gzip().IndexedGzipFile(
                raw.path, spacing=SEEK_SPACING, index_file=raw.path + SEEK_SUFFIX
            )
        except check.MissingExtraError:
            raise
        except Exception as error:  # indexed_gzip's own, whatever stands in the file
            raise check.DataError(
                f"The seek file {raw.path + SEEK_SUFFIX!r} cannot be used: {error}. Remove it, or "
                "make it anew with `jdl index --seekable`."
            ) from error
        self._lock = threading.Lock()
        self.size = UNKNOWN

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        with self._lock:
            try:
                self._file.seek(offset)
                data = self._file.read(size)
            except Exception as error:  # zlib's and indexed_gzip's own, and EOFError
                raise check.DataError(
                    f"Cannot read {self.path!r} at byte {offset}: {error}. If its seek file does "
                    f"not belong to it, remove {self.path + SEEK_SUFFIX!r}."
                ) from error
        if len(data) < size:
            self.size = offset + len(data)
        return data

    def stamp(self) -> dict[str, Any]:
        """See `Archive`."""
        return self._raw.stamp()

    def check_unchanged(self, stamp: dict[str, Any]) -> None:
        """See `Archive`."""
        self._raw.check_unchanged(stamp)

    def close(self) -> None:
        """See `Archive`."""
        self._file.close()
        self._raw.close()


def make_seekable(path: str) -> str:
    """Writes the seek file of a local .gz beside it, at once or not at all; gives its path.

    Raises:
      DataError: if the archive is not gzip, or damaged.
      MissingExtraError: without indexed_gzip.
    """
    raw = LocalFile(path)
    kind = inflate.compression(raw.pread(8, 0))
    raw.close()
    if kind != "gzip":
        what = f"{kind}-compressed" if kind else "not compressed"
        hint = "It needs none." if kind is None else "Rewrite it with `jdl pack`."
        raise check.DataError(f"{path!r} is {what}; seek files are made for gzip alone. {hint}")
    file = _indexed_gzip().IndexedGzipFile(path, spacing=SEEK_SPACING)
    temporary = f"{path}{SEEK_SUFFIX}.{os.getpid()}.tmp"
    try:
        file.build_full_index()
        file.export_index(temporary)
        os.replace(temporary, path + SEEK_SUFFIX)
    except Exception as error:
        raise check.DataError(f"No seek file could be made for {path!r}: {error}.") from error
    finally:
        file.close()
        Path(temporary).unlink(missing_ok=True)
    return path + SEEK_SUFFIX


def _indexed_gzip() -> Any:
    if importlib.util.find_spec("indexed_gzip") is None:
        raise check.MissingExtraError("indexed_gzip", "seekable", "Random access to a .gz")
    import indexed_gzip  # type: ignore[import-untyped]

    return indexed_gzip


class RemoteFile(Archive):
    """A file behind an URL, read by ranges, each tried again when the connection fails."""

    wide, narrow, stride = 1 << 23, 1 << 16, 1 << 18

    def __init__(self, path: str):
        self.path = path
        self._checked = time.monotonic()
        self._fs, self._name = _file_system(path)
        self._http = path.startswith(("http://", "https://"))
        info = self._retried("look up", lambda: self._fs.info(self._name))
        self.size = UNKNOWN if info.get("size") is None else int(info["size"])
        self._tag = _tag(info)
        self._file: Any = None
        self.ranges = self.size != UNKNOWN and info.get("partial", True) and self._has_ranges()

    def _has_ranges(self) -> bool:
        if not self._http:
            return True
        self._file = self._fs.open(
            self._name, block_size=1 << 20, cache_type="none", size=max(self.size, 1)
        )
        if self.size < 2:
            return True
        try:
            return len(self._retried("read", lambda: self._file._fetch_range(1, 2))) == 1
        except ValueError:  # it sent the whole
            return False

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""

        def read() -> bytes:
            if self._http:
                data = self._file._fetch_range(offset, end)
            else:
                data = self._fs.cat_file(self._name, start=offset, end=end)
            if len(data) != end - offset:
                raise OSError(f"{len(data)} of {end - offset} bytes came")
            return data

        return self._retried("read", read)

    def pread_many(self, places: list[tuple[int, int]]) -> Iterator[bytes]:
        """See `Archive`."""
        # Waiting for one answer at a time would cost more than the bytes.
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(16, len(places)) or 1) as pool:
            yield from pool.map(lambda place: self.pread(*place), places)

    def read_from(self, at: int) -> inflate.Readable:
        """The file, to be read in order from there."""
        return _RemoteStream(self, at)

    def open_stream(self) -> Any:
        """A connection that brings the file from its beginning."""
        return self._fs.open(self._name, block_size=0)

    def stamp(self) -> dict[str, Any]:
        """See `Archive`."""
        digest = hashlib.blake2b(digest_size=16)
        if self.ranges:
            digest.update(self.pread(4096, 0))
            digest.update(self.pread(4096, max(self.size - 4096, 0)))
        return {"size": self.size, "mtime_ns": 0, "tag": self._tag, "digest": digest.hexdigest()}

    def check_unchanged(self, stamp: dict[str, Any]) -> None:
        """See `Archive`."""
        if time.monotonic() - self._checked < _RECHECK:
            return
        self._checked = time.monotonic()
        self._fs.invalidate_cache()
        info = self._retried("look up", lambda: self._fs.info(self._name))
        if (info.get("size") or UNKNOWN, _tag(info)) != (stamp["size"], stamp["tag"]):
            raise check.DataError(
                f"{self.path!r} has changed since it was indexed. Start again with the new one."
            )

    def _retried(self, what: str, action: Callable[[], Any]) -> Any:
        return retried(f"{what} {self.path!r}", action)


class _RemoteStream:
    """A remote file in order; after a broken connection it goes on where it was."""

    def __init__(self, remote: RemoteFile, at: int):
        self._remote, self._at = remote, at
        self._connection: Any = None

    def read(self, size: int) -> bytes:
        if self._remote.ranges:
            data = self._remote.pread(max(size, _REMOTE_PIECE), self._at)
        else:
            data = retried(f"read {self._remote.path!r}", lambda: self._next(size))
        self._at += len(data)
        return data

    def _next(self, size: int) -> bytes:
        try:
            if self._connection is None:
                self._connection = self._remote.open_stream()
                left = self._at
                while left:  # what has been read already comes once more
                    passed = len(self._connection.read(min(left, _REMOTE_PIECE)))
                    if not passed:
                        raise OSError("the file has become shorter")
                    left -= passed
            data = self._connection.read(size)
            if not data and self._remote.size not in (UNKNOWN, self._at):
                raise OSError(f"it ended after {self._at} of {self._remote.size} bytes")
        except Exception:
            self.close()
            raise
        return data

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def retried(what: str, action: Callable[[], Any]) -> Any:
    """What `action` gives, tried a few times with growing pauses between.

    Raises:
      DataError: with the last failure; at once if the file does not exist or may not be read.
    """
    pause = _FIRST_PAUSE
    for number in range(1, _TRIES + 1):
        try:
            return action()
        except ValueError:
            raise
        except Exception as error:  # each file system has errors of its own
            if _final(error):
                raise check.DataError(
                    f"Cannot {what}: no such file, or no permission ({error})."
                ) from error
            if number == _TRIES:
                reason = str(error) or type(error).__name__
                raise check.DataError(f"Cannot {what}, tried {_TRIES} times: {reason}.") from error
            logger.info("%s failed (%r); trying again in %.1f s", what, error, pause)
            time.sleep(pause)
            pause *= 2
    raise AssertionError


def _final(error: Exception) -> bool:
    """Whether trying again is of no use; fsspec says "not found" of broken connections too."""
    if not isinstance(error, FileNotFoundError | PermissionError):
        return False
    status = getattr(error.__cause__, "status", 404 if error.__cause__ is None else 599)
    return 400 <= status < 500


def _file_system(path: str) -> tuple[Any, str]:
    if importlib.util.find_spec("fsspec") is None:
        raise check.MissingExtraError("fsspec", "remote", f"Reading {path!r}")
    import fsspec  # type: ignore[import-untyped]

    options: dict[str, Any] = {}
    try:
        if path.startswith(("http://", "https://")):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_PATIENCE)
            options = {"client_kwargs": {"timeout": timeout}}
        return fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(path.split(":")[0], "aiohttp")
        raise check.MissingExtraError(package, "remote", f"Reading {path!r}") from error
    except ValueError as error:
        raise check.DataError(f"Cannot read {path!r}: {error}.") from error


def _tag(info: dict[str, Any]) -> str:
    """What a file system says of a file's version."""
    for key in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "created"):
        if info.get(key):
            return str(info[key])
    return ""
