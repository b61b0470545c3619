"""Which members of an archive are records: by patterns of their names."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from jdl.core import check
from jdl.data.labels import composed
from jdl.data.tar import scan
from jdl.data.tar.index import TarIndex

Some: TypeAlias = str | Sequence[str] | None

# Hidden files and folders, what NAS systems, macOS and Windows put beside files, WebDataset's
# companions of an image, and pictures of the whole data set.
LITTER = (
    *(".*", "@eaDir/", "__MACOSX/", "#recycle/", "$RECYCLE.BIN/", "lost+found/"),
    *("*.seg.*", "*.mask.*", "/preview.*", "/thumbnail.*"),
)

_UNREAD = re.compile(rb"\.(hei[cf]|jxl|svg|psd|dng|cr[23]|nef|arw|raw)")  # names of images
_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^]/]+\]|.", re.DOTALL)
_WILD = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class Patterns(NamedTuple):
    """Patterns of the names to use and of those to leave out, written as in a `.gitignore`.

    `*`, `?` and `[a-z]` stand for characters of one name, `**` for any folders. A pattern without
    `/` matches a file or folder anywhere, one with `/` from the root on, one that ends in `/` only
    folders. All that is in a folder that matches, matches.

    >>> found = Patterns.checked("train/", ("*.depth.png", "!.*"))
    >>> [found.refuses(f"{name}.png") for name in ("train/0/.1", "train/1.seg", "test/2")]
    [None, '*.seg.*', 'include']
    """

    include: tuple[str, ...] | None  # patterns of names to use; None for all
    exclude: tuple[str, ...]  # patterns of names to leave out, whatever `include` says

    @classmethod
    def checked(cls, include: Some, exclude: Some) -> "Patterns":
        """The patterns of the arguments `include` and `exclude` of `TarSource`."""
        taken = None if include is None else _listed("include", include)
        negated = [pattern for pattern in taken or () if pattern.startswith("!")]
        check.argument(not negated, "include", "without !, which only `exclude` takes", negated)
        if exclude is None:
            return cls(taken, LITTER)
        given, out = _listed("exclude", exclude), [*LITTER] if len(exclude) else []
        for pattern in given:
            if pattern.startswith("!"):
                out.remove(check.one_of("a pattern after ! in exclude", pattern[1:], out))
            elif pattern not in out:
                out.append(pattern)
        return cls(taken, tuple(out))

    def refuses(self, name: str) -> str | None:
        """The pattern that leaves this name out, or "include"; None if it is used."""
        if at := _matching(_compiled(self.exclude), name):
            return self.exclude[at - 1]
        outside = self.include is not None and not _matching(_compiled(self.include), name)
        return "include" if outside else None

    def images(self, index: TarIndex) -> tuple[np.ndarray, Counter[str]]:
        """The images to use, bool [members]; how many each pattern leaves out, as `refuses`."""
        wanted = index.columns.kinds == scan.IMAGE
        by = _match_all(self.exclude, index, wanted)
        counts = np.bincount(by, minlength=len(self.exclude) + 1).tolist()
        out = +Counter(dict(zip(self.exclude, counts[1:], strict=True)))
        wanted &= by == 0
        if self.include is not None:
            taken = wanted & (_match_all(self.include, index, wanted) > 0)
            if outside := int(wanted.sum() - taken.sum()):
                out["include"] = outside
            wanted = taken
        return wanted, out


def _listed(argument: str, patterns: str | Sequence[str]) -> tuple[str, ...]:
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    ok = all(isinstance(p, str) and p.strip("/!") for p in given)
    ok = ok and all("**" not in part or part == "**" for p in given for part in p.split("/"))
    check.argument(ok, argument, "patterns such as '*.png', 'masks/' or '**/left/*'", patterns)
    given = tuple(composed(pattern) for pattern in given)
    try:
        _compiled(given)
    except (re.error, OverflowError) as error:
        check.argument(False, argument, f"patterns as in a .gitignore ({error})", patterns)
    return given


@functools.lru_cache(64)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression, whose group i + 1 is pattern i."""
    return re.compile("|".join(f"({_expression(p)})" for p in patterns) or "(?!)", re.DOTALL)


def _expression(pattern: str) -> str:
    def translated(token: str) -> str:
        if token[0] == "[" and len(token) > 2:
            negated = token[1] in "!^"
            inside = re.escape(token[1 + negated : -1]).replace(r"\-", "-")
            return f"[{'^/' * negated}{inside}]"
        return _WILD.get(token) or re.escape(token)

    at_root = "/" in pattern.rstrip("/")
    body = "".join(map(translated, _TOKEN.findall(pattern.strip("/"))))
    # `.*` is not for the folder above.
    begin = "^" if at_root else r"(?:^|/)(?!\.\.?(?:/|\Z))"
    return begin + body + ("/" if pattern.endswith("/") else r"(?:/|\Z)")


def _matching(expression: re.Pattern[str], name: str) -> int:
    """The number of the pattern that matches, from 1; 0 for none."""
    found = expression.search(name)
    return (found.lastindex or 0) if found else 0


def _match_all(patterns: tuple[str, ...], index: TarIndex, among: np.ndarray) -> np.ndarray:
    """The pattern that matches each member, from 1; 0 for none. Each folder is tried once."""
    expression, columns = _compiled(patterns), index.columns
    folders = [_matching(expression, f"{f}/") if f else 0 for f in index.folders()]
    found = np.array(folders, np.int16)[columns.folder_ids]
    found[~among] = 0
    for row in np.flatnonzero(among & (found == 0) & _candidates(patterns, columns)).tolist():
        found[row] = _matching(expression, index.name(row))
    return found


def _candidates(patterns: tuple[str, ...], columns: scan.Columns) -> np.ndarray:
    """Whether a base name may match, bool [members]: if wildcards stood for anything."""
    loose = [
        "".join(".*" if len(t) > 1 or t in "*?" else re.escape(t) for t in _TOKEN.findall(last))
        for pattern in patterns
        if (last := pattern.rpartition("/")[2])  # "" for folders alone
    ]
    text = "|".join(loose) or "(?!)"
    expression = re.compile(text.encode("utf-8", "surrogateescape"), re.DOTALL)
    spans = itertools.pairwise(itertools.chain([0], columns.base_ends.data))
    match = functools.partial(expression.fullmatch, columns.bases.data)
    return np.fromiter((match(*span) is not None for span in spans), bool, len(columns.base_ends))


def folder_counts(indexes: Sequence[TarIndex], chosen: Sequence[np.ndarray]) -> Counter[str]:
    """How many of the chosen members are in each folder, of those that hold any."""
    found: Counter[str] = Counter()
    for index, wanted in zip(indexes, chosen, strict=True):
        ids = index.columns.folder_ids[wanted]
        counts = np.bincount(ids, minlength=len(index.columns.folder_ends)).tolist()
        found.update(dict(zip(index.folders(), counts, strict=True)))
    return +found


def unread(index: TarIndex) -> dict[str, int]:
    """The members named as images of a format that is not read: extension -> how many."""
    columns = index.columns
    others = columns.kinds == scan.OTHER
    if not others.any():
        return {}
    names, ends = columns.bases.tobytes().lower(), columns.base_ends
    found: Counter[str] = Counter()
    for match in _UNREAD.finditer(names):
        row = int(np.searchsorted(ends, match.end()))
        start = int(ends[row - 1]) if row else 0
        if ends[row] == match.end() and others[row] and names[start : start + 2] != b"._":
            found[match[1].decode()] += 1
    return dict(found)


def told(left_out: Mapping[str, int]) -> str:
    """What leaves out how many, and how to keep them.

    >>> told({".*": 2, "include": 1})
    "2 by '.*', 1 by 'include' (exclude='!PATTERN' takes a pattern back)"
    """
    by = ", ".join(f"{n} by {pattern!r}" for pattern, n in sorted(left_out.items()))
    return f"{by} (exclude='!PATTERN' takes a pattern back)"
