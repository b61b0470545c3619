"""Decompression in order and in constant memory: gzip, bzip2, xz, zstd, or none.

However large a few bytes expand, at most one piece of that is in memory.
"""

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jdl.core import check

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    # zstd's skippable frames, which pzstd and seekable zstd begin with
    **{bytes([0x50 + n]) + b"\x2a\x4d\x18": "zstd" for n in range(16)},
    # not read, but named
    b"\x04\x22\x4d\x18": "lz4 file",
    b"\x1f\x9d": "compress file",
    b"LZIP\x01": "lzip file",
    b"PK\x03\x04": "zip archive",
    b"7z\xbc\xaf\x27\x1c": "7z archive",
}
_MAX_MEMORY = 1 << 28  # bytes that an xz file may make its reader keep


@runtime_checkable
class Readable(Protocol):
    """A file that is read in order."""

    def read(self, size: int, /) -> bytes:
        """The next bytes: `size` of them, or fewer from a pipe; none at the end."""

    def close(self) -> None:
        """Closes it."""


class Piece(NamedTuple):
    """The next bytes, or why they end too early."""

    data: bytes
    problem: str = ""


def compression(head: bytes) -> str | None:
    r"""How a file that begins with `head` is compressed.

    >>> compression(b"\x1f\x8b\x08"), compression(b"train/")
    ('gzip', None)
    """
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def pieces(file: Readable, size: int) -> Iterator[Piece]:
    """The decompressed bytes of `file`, in pieces of about `size`; the last may name a problem."""
    data = _at_least(8, file, size)
    kind = compression(data)
    if kind is None:
        while data:
            yield Piece(data)
            data = file.read(size)
        return
    if kind not in _STARTS:
        readable = "a tar that is plain or compressed with gzip, bzip2, xz or zstd"
        yield Piece(b"", f"it is a {kind}, not {readable}")
        return
    decompressor = _STARTS[kind]()
    while True:
        try:
            out = decompressor.decompress(data, size)
        except _errors(kind) as error:
            yield Piece(b"", f"its {kind} data are damaged: {error}")
            return
        data = b""
        if out:
            yield Piece(out)
        if decompressor.eof:  # compressed files may be chained, with zeros between and after
            data = _at_least(8, file, size, decompressor.unused_data)
            if not data:
                return
            if compression(data) != kind:
                yield Piece(b"", f"its {kind} data are followed by {len(data)} or more other bytes")
                return
            decompressor = _STARTS[kind]()
        elif decompressor.needs_input:
            data = file.read(size)
            if not data:
                yield Piece(b"", f"its {kind} data are cut short")
                return


def _at_least(count: int, file: Readable, size: int, data: bytes | None = None) -> bytes:
    """At least so many bytes if the file has them, without zeros after compressed `data`."""
    padded = data is not None
    data = (data or b"").lstrip(b"\0")
    while len(data) < count:
        more = file.read(size)
        if not more:
            break
        data += more
        data = data.lstrip(b"\0") if padded else data
    return data.lstrip(b"\0") if padded else data


class _Gzip:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)
        self._rest = b""

    def decompress(self, data: bytes, size: int) -> bytes:
        out = self._zlib.decompress(self._rest + data, size)
        self._rest = self._zlib.unconsumed_tail
        self._full = len(out) == size
        return out

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._rest and not self._full


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        try:
            from backports import zstd
        except ImportError as error:
            raise check.MissingExtraError("backports.zstd", "zstd", "Reading .zst") from error
    return zstd


def _errors(kind: str) -> tuple[type[Exception], ...]:
    zstd = (_zstd().ZstdError,) if kind == "zstd" else ()
    return (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, *zstd)


_STARTS: dict[str, Callable[[], Any]] = {
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(memlimit=_MAX_MEMORY),
    "zstd": lambda: _zstd().ZstdDecompressor(),
}
