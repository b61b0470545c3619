"""A file behind a URL: by ranges if its server has them, retried when connections fail.

All that fsspec reads: http and https (with aiohttp), s3:// (with s3fs), gs:// (with gcsfs).
"""

import asyncio
import hashlib
import importlib.util
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from jdl.core import check
from jdl.data.tar import inflate
from jdl.data.tar.archive import UNKNOWN, StoredFile, changed

logger = logging.getLogger("jdl.data")

_TRIES = 6
_FIRST_PAUSE = 0.1  # seconds; doubled after each failure
_RECHECK = 30.0  # seconds between checks that a remote archive is unchanged
_PIECE = 1 << 22
_TIMEOUT = 60.0  # seconds without a byte after which a read is retried
_CONNECTIONS = 100  # at most, to an object store; to web servers that is aiohttp's own limit
_GAP = 1 << 15  # unwanted bytes between two places that cost no more than another request
_LONGEST = 1 << 21  # bytes of a request for several places
_WAITING = 1 << 23  # bytes asked for at once, unless one place has more


class RemoteFile(StoredFile):
    """A file behind a URL, read by ranges, each retried when the connection fails."""

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
        except ValueError:  # it sent the whole file
            return False

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        (data,) = self._ask([(size, offset)])
        return data

    def pread_many(self, places: list[tuple[int, int]]) -> Iterator[bytes]:
        """See `Archive`. The first places are asked for at once, the next while these are used."""
        asked = map(self._ask, _grouped(places))
        first = next(asked, iter(()))
        one_ahead = itertools.pairwise(itertools.chain([first], asked, [None]))
        return (data for answers, _ in one_ahead for data in answers or ())

    def _ask(self, places: list[tuple[int, int]]) -> Iterator[bytes]:
        """Asks for all these places at the same time; the result waits for them and gives them."""
        from fsspec.asyn import get_loop  # type: ignore[import-untyped]

        spans = [(min(at, self.size), min(at + size, self.size)) for size, at in places]
        requests, within = _merged(spans)

        async def fetch() -> list[bytes]:
            return await asyncio.gather(*(self._fetch_retried(*each) for each in requests))

        # One task for all: a thread's turn in the event loop costs as much as a request.
        loop = self._fs.loop if self._fs.async_impl else get_loop()
        asking = asyncio.run_coroutine_threadsafe(fetch(), loop)

        def answers() -> Iterator[bytes]:
            data = asking.result()
            for (start, end), of in zip(spans, within, strict=True):
                first = requests[of][0]
                yield data[of][start - first : end - first]

        return answers()

    async def _fetch_retried(self, start: int, end: int) -> bytes:
        failures = 0
        while True:
            try:
                data = await self._fetch(start, end)
                if len(data) != end - start:
                    raise OSError(f"{len(data)} of {end - start} bytes came")
                return data
            except Exception as error:
                pause = _pause(f"read {self.path!r}", error, failures := failures + 1)
            await asyncio.sleep(pause)

    async def _fetch(self, start: int, end: int) -> bytes:
        if start == end:
            return b""
        if self._http:
            return await self._file.async_fetch_range(start, end)
        if self._fs.async_impl:
            return await self._fs._cat_file(self._name, start=start, end=end)
        return await asyncio.to_thread(self._fs.cat_file, self._name, start=start, end=end)

    def reader(self) -> inflate.Readable:
        """See `StoredFile`."""
        return _RemoteStream(self)

    def open_stream(self) -> Any:
        """A connection that reads the file from its beginning."""
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
            raise changed(self.path)

    def _retried(self, what: str, action: Callable[[], Any]) -> Any:
        return retried(f"{what} {self.path!r}", action)


class _RemoteStream:
    """A remote file in order; after a broken connection it continues where it was."""

    def __init__(self, remote: RemoteFile):
        self._remote, self._at = remote, 0
        self._connection: Any = None

    def read(self, size: int) -> bytes:
        if self._remote.ranges:
            data = self._remote.pread(max(size, _PIECE), self._at)
        else:
            data = retried(f"read {self._remote.path!r}", lambda: self._next(size))
        self._at += len(data)
        return data

    def _next(self, size: int) -> bytes:
        try:
            if self._connection is None:
                self._connection = self._remote.open_stream()
                left = self._at
                while left:  # skip what has been read already
                    passed = len(self._connection.read(min(left, _PIECE)))
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


def _grouped(places: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The places, (size, offset), in groups that bound the bytes that are asked for at once."""
    start = total = 0
    for at, (size, _) in enumerate(places):
        total += size + _GAP
        if total > _WAITING and at > start:
            yield places[start:at]
            start, total = at, size + _GAP
    if places:
        yield places[start:]


def _merged(spans: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """The requests, [start, end), that cover these spans, and which of them holds each span."""
    requests: list[tuple[int, int]] = []
    within = [0] * len(spans)
    for at in sorted(range(len(spans)), key=spans.__getitem__):
        start, end = spans[at]
        first, last = requests[-1] if requests else (start, start)
        near = start - last <= _GAP and end - first <= _LONGEST
        if requests and (near or end <= last):
            requests[-1] = first, max(last, end)
        else:
            requests.append((start, end))
        within[at] = len(requests) - 1
    return requests, within


def retried(what: str, action: Callable[[], Any]) -> Any:
    """The result of `action`, retried with growing pauses; a `DataError` with the last failure."""
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            pause = _pause(what, error, failures := failures + 1)
        time.sleep(pause)


def _pause(what: str, error: Exception, failures: int) -> float:
    """Seconds to wait after so many failures; raises if a retry is useless or none is left."""
    if isinstance(error, ValueError):
        raise error
    if _final(error):
        why = f"no such file, or no permission ({error})"
        raise check.DataError(f"Cannot {what}: {why}.") from error
    if failures == _TRIES:
        reason = str(error) or type(error).__name__
        raise check.DataError(f"Cannot {what}, tried {_TRIES} times: {reason}.") from error
    pause = _FIRST_PAUSE * 2 ** (failures - 1)
    logger.info("%s failed (%r); trying again in %.1f s", what, error, pause)
    return pause


def _final(error: Exception) -> bool:
    """Whether a retry is useless; fsspec says "not found" for broken connections too."""
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

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_TIMEOUT)
            options = {"client_kwargs": {"timeout": timeout}}
        elif path.startswith("s3://"):  # botocore's default is 10; users' own settings stay
            own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options = {"config_kwargs": {"max_pool_connections": _CONNECTIONS} | own}
        return fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(path.split(":")[0], "aiohttp")
        raise check.MissingExtraError(package, "remote", f"Reading {path!r}") from error
    except ValueError as error:
        raise check.DataError(f"Cannot read {path!r}: {error}.") from error


def _tag(info: dict[str, Any]) -> str:
    """What a file system says about a file's version."""
    for key in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "created"):
        if info.get(key):
            return str(info[key])
    return ""
