"""The files that a path, a glob, a brace range, a folder, or a list of these stands for."""

import difflib
import glob
import itertools
import os
import re
from collections.abc import Sequence
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
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?")


def expand(paths: Paths) -> list[str]:
    """The files that `paths` stands for, in a stable order.

    A path that exists is used as it is, whatever characters it has; URLs are not looked up; a
    folder stands for the `*.tar` in it, or the compressed ones if there is no plain one;
    `{00..30}`, `{0..30..2}` and `{a,b}` are expanded; `*`, `?` and `[…]` match, except the files
    that jdl itself keeps beside archives. One file under two names is refused.

    Raises:
      DataError: if a file does not exist, or a pattern matches none.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found = list(itertools.chain.from_iterable(_expand_one(os.fspath(path)) for path in paths))
    check.argument(bool(found), "paths", "at least one archive", list(paths))
    named: dict[tuple[int, int] | str, str] = {}
    for path in found:
        file = _identity(path)
        if file in named:
            check.argument(False, "paths", "archives named once each", [named[file], path])
        named[file] = path
    return found


def _identity(path: str) -> tuple[int, int] | str:
    """What all names of one file have in common."""
    if path == STDIN or is_url(path):
        return path
    stat = os.stat(path)
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path)


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
    """`pattern` with its braces expanded, as bash does; at most a million.

    >>> braces("faces-{008..010}.tar")
    ['faces-008.tar', 'faces-009.tar', 'faces-010.tar']
    >>> braces("{a,b}-{4..1..3}.tar")
    ['a-4.tar', 'a-1.tar', 'b-4.tar', 'b-1.tar']
    """
    for match in _BRACES.finditer(pattern):
        numbers, options = _RANGE.fullmatch(match[1]), match[1].split(",")
        if not numbers and len(options) == 1:
            continue
        tails = braces(pattern[match.end() :])
        values = _range(*numbers.groups()) if numbers else range(len(options))
        ok = len(values) * len(tails) <= _MAX_FILES
        check.argument(ok, "paths", f"braces of at most {_MAX_FILES} files", pattern)
        if numbers:  # padded to a common width, as bash does
            padded = any(re.match(r"-?0\d", end) for end in numbers.groups()[:2])
            width = max(map(len, numbers.groups()[:2])) if padded else 0
            options = [str(value).zfill(width) for value in values]
        return [pattern[: match.start()] + option + tail for option in options for tail in tails]
    return [pattern]


def _range(first: str, last: str, step: str | None) -> range:
    """From the first to the last, up or down, whatever the sign of the step."""
    a, b, by = int(first), int(last), abs(int(step or 1)) or 1
    return range(a, b + 1, by) if a <= b else range(a, b - 1, -by)


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
