"""Opening an archive wherever it is: at random where that can be had, else in order."""

import os
import sys

from jdl.data.tar import inflate
from jdl.data.tar.archive import STDIN, Archive, Forward, LocalFile, Raw, is_url
from jdl.data.tar.remote import RemoteFile
from jdl.data.tar.seekable import SEEK_SUFFIX, Seekable


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
    if is_url(path):
        raw: Raw = RemoteFile(path)
    else:
        raw = LocalFile(path)
    if not raw.ranges:
        return Forward(path, raw.read_from, raw)
    if inflate.compression(raw.pread(8, 0)) is None:
        return raw
    if isinstance(raw, LocalFile) and seekable and os.path.isfile(path + SEEK_SUFFIX):
        return Seekable(raw)
    return Forward(path, raw.read_from, raw)
