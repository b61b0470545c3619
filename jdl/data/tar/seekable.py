"""Random access to a local .gz by a seek file, which lists where decompression can begin.

Seek files are made for gzip only. Measured on a tar of 30 kB images, images/s at random:
indexed_gzip 105 with a seek point every 256 kB (the seek file takes 12 % of the archive), 410 with
one every 64 kB (50 %); rapidgzip 48, and it aborts the interpreter unless closed in time; rapidgzip
on bzip2 5; indexed_zstd 114 on one frame; plain tars 96,000. Even the best is for looking something
up, not for training: rewrite with `jdl pack`, or read in order.
"""

import importlib.util
import os
import shlex
import threading
from typing import Any

from jdl.core import check
from jdl.core.files import atomic_file
from jdl.data.tar import inflate
from jdl.data.tar.archive import UNKNOWN, Archive, LocalFile

SEEK_SUFFIX = ".jdlseek"
SEEK_SPACING = 1 << 18
_FOOTER = 8  # bytes at a gzip file's end, with a checksum; its seek file ends with the same


class Seekable(Archive):
    """A local .gz with a seek file."""

    mode = "seekable"
    wide = narrow = 1 << 20

    def __init__(self, file: LocalFile):
        self.path, self.size, self.file = file.path, UNKNOWN, file
        self._lock = threading.Lock()
        try:
            with open(file.path + SEEK_SUFFIX, "rb") as kept:
                kept.seek(-_FOOTER, os.SEEK_END)
                if kept.read() != file.pread(_FOOTER, file.size - _FOOTER):
                    raise ValueError("it is of an earlier state of the archive")
            self._input = _indexed_gzip().IndexedGzipFile(
                file.path, spacing=SEEK_SPACING, index_file=file.path + SEEK_SUFFIX
            )
        except check.MissingExtraError:
            raise
        except Exception as error:  # indexed_gzip's own, for whatever the seek file holds
            raise check.DataError(
                f"The seek file {file.path + SEEK_SUFFIX!r} cannot be used: {error}. Remove it, or "
                f"make it anew with `jdl index --seekable {shlex.quote(file.path)}`."
            ) from error

    def pread(self, size: int, offset: int) -> bytes:
        """See `Archive`."""
        with self._lock:
            try:
                self._input.seek(offset)
                data = self._input.read(size)
            except Exception as error:  # zlib's and indexed_gzip's own, and EOFError
                raise check.DataError(
                    f"Cannot read {self.path!r} at byte {offset}: {error}. If its seek file is of "
                    f"an earlier state, remove {self.path + SEEK_SUFFIX!r}, or make it anew with "
                    f"`jdl index --seekable {shlex.quote(self.path)}`."
                ) from error
        if len(data) < size:
            self.size = offset + len(data)
        return data

    def close(self) -> None:
        """See `Archive`."""
        self._input.close()
        super().close()


def make_seekable(path: str) -> str:
    """Writes the seek file of a local .gz beside it, atomically; returns its path.

    Raises:
      DataError: if the archive is not gzip, or damaged.
      MissingExtraError: without indexed_gzip.
    """
    stored = LocalFile(path)
    kind = inflate.compression(stored.pread(8, 0))
    footer = stored.pread(_FOOTER, max(stored.size - _FOOTER, 0))
    stored.close()
    if kind != "gzip":
        what = kind or "not compressed"
        hint = "It needs none." if kind is None else "Rewrite it with `jdl pack`."
        raise check.DataError(f"{path!r} is {what}; seek files are made for gzip only. {hint}")
    try:
        with _indexed_gzip().IndexedGzipFile(path, spacing=SEEK_SPACING) as file:
            file.build_full_index()
            with atomic_file(path + SEEK_SUFFIX) as out:
                file.export_index(str(out.name))
                out.seek(0, os.SEEK_END)
                out.write(footer)
    except check.MissingExtraError:
        raise
    except Exception as error:
        raise check.DataError(f"No seek file could be made for {path!r}: {error}.") from error
    return path + SEEK_SUFFIX


def _indexed_gzip() -> Any:
    if importlib.util.find_spec("indexed_gzip") is None:
        raise check.MissingExtraError("indexed_gzip", "seekable", "Random access to a .gz")
    import indexed_gzip  # type: ignore[import-untyped]

    return indexed_gzip
