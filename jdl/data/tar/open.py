"""Opening an archive: for reading at random where that is possible, else in order."""

import os
import sys

from jdl.data.tar import inflate
from jdl.data.tar.archive import STDIN, Archive, LocalFile, StoredFile, Stream, is_url
from jdl.data.tar.remote import RemoteFile
from jdl.data.tar.seekable import SEEK_SUFFIX, Seekable


def open_archive(path: str) -> Archive:
    """The archive at `path`, a file, a URL, or "-"; a `DataError` if it cannot be opened."""
    if path == STDIN:
        return Stream(path, lambda: sys.stdin.buffer, None)
    file: StoredFile = RemoteFile(path) if is_url(path) else LocalFile(path)
    kind = inflate.compression(file.pread(8, 0)) if file.ranges else "unknown"
    if kind is None:
        return file
    if isinstance(file, LocalFile) and kind == "gzip" and os.path.isfile(path + SEEK_SUFFIX):
        return Seekable(file)
    return Stream(path, file.reader, file)
