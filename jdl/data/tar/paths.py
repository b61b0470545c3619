"""The files that a path, a glob, a brace range, a folder, or a list of these stands for."""

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from jdl.core import check
from jdl.data.tar.archive import STDIN, is_url
from jdl.data.tar.index import SUFFIX
from jdl.data.tar.seekable import SEEK_SUFFIX

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_MAX_FILES = 1_000_000
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BESIDE = (SUFFIX, SEEK_SUFFIX)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def expand(paths: Paths) -> list[str]:
    """The files that `paths` stands for, in a stable order.

    A path that exists is used as it is, whatever characters it has; URLs are not looked up; a
    folder stands for the `*.tar` in it, or the compressed ones if there is no plain one; `{0..3}`
    and `{a,b}` are expanded, with leading zeros; `*`, `?` and `[…]` match, except the files that
    jdl itself keeps beside archives.

    Raises:
      DataError: if a file does not exist, or a pattern matches none.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found = list(itertools.chain.from_iterable(_expand_one(os.fspath(path)) for path in paths))
    check.argument(bool(found), "paths", "at least one archive", list(paths))
    twice = sorted({path for path in found if found.count(path) > 1}) if len(found) < 1000 else []
    check.argument(not twice, "paths", "archives named once each", twice)
    return found


def _expand_one(path: str) -> list[str]:
    if os.path.isdir(path):
        inside = tars_in(Path(path))
        if not inside:
            raise check.DataError(f"The folder {path!r} holds no *.tar file.")
        return inside
    if os.path.exists(path) or path == STDIN:
        return [path]
    if is_url(path):
        return braces(path)
    found: list[str] = []
    for one in braces(path):
        matches = [one]
        if glob.has_magic(one):
            matches = sorted(m for m in glob.glob(one) if not m.endswith(_BESIDE))
        missing = [match for match in matches if not os.path.exists(match)]
        if missing or not matches:
            raise check.DataError(_missing(missing[0] if missing else one))
        found += matches
    return found


def tars_in(folder: Path) -> list[str]:
    """The plain tars in a folder, or the compressed ones if there is no plain one."""
    files = sorted(str(p) for p in folder.iterdir() if p.is_file())
    plain = [p for p in files if p.endswith(".tar")]
    return plain or [p for p in files if p.endswith(_COMPRESSED)]


def braces(pattern: str) -> list[str]:
    """`pattern` with its braces expanded.

    >>> braces("faces-{008..010}.tar")
    ['faces-008.tar', 'faces-009.tar', 'faces-010.tar']
    >>> braces("{a,b}.tar")
    ['a.tar', 'b.tar']
    """
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    body = match[1]
    options: Iterable[str] = body.split(",")
    if numbers := _RANGE.fullmatch(body):
        first, last = int(numbers[1]), int(numbers[2])
        check.argument(
            first <= last < first + _MAX_FILES,
            "paths",
            f"an increasing brace range of at most {_MAX_FILES} files",
            pattern,
        )
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        options = (str(i).zfill(width) for i in range(first, last + 1))
    head, tail = pattern[: match.start()], braces(pattern[match.end() :])
    return [head + option + rest for option in options for rest in tail]


def _missing(path: str) -> str:
    if glob.has_magic(path):
        return f"No file matches {path!r}."
    folder = os.path.dirname(path) or "."
    try:
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(folder), n=1)
    except OSError:
        return f"There is no archive {path!r}: the folder {folder!r} cannot be read."
    hint = f" Did you mean {os.path.join(os.path.dirname(path), near[0])!r}?" if near else ""
    return f"There is no archive {path!r}.{hint}"
