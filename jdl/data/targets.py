"""Where records' labels come from; and targets other than a class: numbers, several classes."""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jdl.core import check
from jdl.data import labels as lb
from jdl.data.tar.archive import Archive
from jdl.data.tar.index import TarIndex
from jdl.data.tar.samples import samples

logger = logging.getLogger("jdl.data")

Table: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | None

ClassOf: TypeAlias = Callable[[str], str | None]
SKIPPED = object()  # the value of a record that is skipped
TARGETS = ("class", "number", "multilabel")

_FILE = re.compile(r"(.*\.(csv|tsv|jsonl?))(?::(.+))?", re.IGNORECASE | re.DOTALL)
_NAMES = ("name", "file", "filename", "file_name", "path", "image")  # of the column with names
_MAX_BYTES = 1 << 28  # of a table
_MAX_SIDECAR = 1 << 20  # bytes of a member that names a class
_CHOSEN = -2  # in a column of sidecars' rows: an image that is to get one
_MAX_CLASSES = 1 << 16  # of which a record may have several


def is_table(text: str) -> bool:
    """Whether a text names a table, such as `labels.csv` or `labels.csv:COLUMN`."""
    return _FILE.fullmatch(text) is not None


def read_table(labels: Table) -> dict[str, Any]:
    """Name -> value, with names as an index has them.

    Raises:
      DataError: if the file is no table, or holds two values for one name.

    >>> read_table({"./a/1.png": "cat"})
    {'a/1.png': 'cat'}
    """
    if isinstance(labels, Mapping):
        return _as_table(labels.items(), "labels")
    found = _FILE.fullmatch(os.fspath(labels or ""))
    must = "a mapping, or the path of a .csv, .tsv, .json or .jsonl file, also with :COLUMN"
    if found is None:
        raise check.ArgumentError(f"`labels` must be {must}, got {labels!r}.")
    path, kind, column = found[1], found[2].lower(), found[3]
    try:
        if (size := os.path.getsize(path)) > _MAX_BYTES:
            raise ValueError(f"it has {size} bytes, more than the {_MAX_BYTES} a table may have")
        text = Path(path).read_text("utf-8-sig")
        rows: Any
        if kind in ("csv", "tsv"):
            rows = _csv(text, "," if kind == "csv" else "\t", column)
        elif kind == "json":
            rows = json.loads(text, object_pairs_hook=_object)
        else:
            lines = filter(str.strip, text.split("\n"))
            rows = (json.loads(line, object_pairs_hook=_object) for line in lines)
        return _as_table(_pairs(rows, column), path)
    except check.UserError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError, LookupError, TypeError) as error:
        raise check.DataError(f"{path!r} cannot be read as a table of labels: {error}.") from error


def _as_table(pairs: Iterable[tuple[Any, Any]], where: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        key = lb.composed("/".join(lb.folder_parts(str(name).strip())))
        value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        value = list(value) if isinstance(value, tuple) else value
        if key in table and table[key] != value:
            raise check.DataError(f"{where!r} has two values for {key!r}.")
        table[key] = value
    return table


def _csv(text: str, delimiter: str, column: str | None) -> Iterator[dict[str, str]]:
    """The rows by columns' names; where none is known, the first column is that of names."""
    cells = csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True)
    rows = [row for row in cells if row]
    head = [cell.strip() for cell in rows[0]] if rows else []
    named = any(cell.lower() in _NAMES for cell in head)
    headed = named or column is not None
    if column not in (None, *head):
        raise ValueError(f"it has no column {column!r}, but {', '.join(map(repr, head))}")
    if not named:
        head = [_NAMES[0], *(head[1:] if headed else map(str, range(1, len(head))))]
    if len({*head}) < len(head):
        raise ValueError(f"two columns have one name: {', '.join(map(repr, head))}")
    for row in rows[headed:]:
        if len(row) != len(head):
            raise ValueError(f"{row[:1]} has {len(row)} columns instead of {len(head)}")
        yield dict(zip(head, map(str.strip, row), strict=True))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name comes twice in an object that begins with {pairs[0][0]!r}")
    return found


def _pairs(rows: Any, column: str | None) -> Iterator[tuple[str, Any]]:
    """Names and values of an object name -> value, or of rows; several further columns make a list.

    Their order is the first row's.
    """
    if isinstance(rows, dict):
        for name, value in rows.items():
            yield name, value if column is None else value[column]
        return
    others: list[str] = []
    for row in rows:
        key = next((key for key in row if key.lower() in _NAMES), None)
        if key is None:
            raise ValueError(f"one of its entries has none of {', '.join(_NAMES)}")
        others = others or [each for each in row if each != key]
        wanted = others if column is None else [column]
        if not {*wanted} <= {*row} or (column is None and len(row) > 1 + len(others)):
            one, other = (", ".join(map(repr, each)) for each in (row, wanted))
            raise ValueError(f"{row[key]!r} has the columns {one}, instead of {other}")
        values = [row[each] for each in wanted]
        yield row[key], values[0] if len(values) == 1 else values


def by_table(
    labels: Table, indexes: Sequence[TarIndex], rows: Sequence[np.ndarray], as_classes: bool
) -> list[list[Any]]:
    """For each archive, each chosen row's value in a table; None for other rows."""
    names = [i.name(row) for i, some in zip(indexes, rows, strict=True) for row in some.tolist()]
    values = iter(look_up(labels, names, as_classes))
    found: list[list[Any]] = [[None] * len(index) for index in indexes]
    for column, some in zip(found, rows, strict=True):
        for row in some.tolist():
            column[row] = next(values)
    return found


def by_folder(index: TarIndex, rows: np.ndarray, class_of: ClassOf) -> list[str | None]:
    """Each folder's class; None for those without chosen rows."""
    ids, folders = index.columns.folder_ids[rows], index.folders()
    every = zip(folders, np.bincount(ids, minlength=len(folders)).tolist(), strict=True)
    return [class_of(f"{folder}/") if chosen else None for folder, chosen in every]


def by_member(index: TarIndex, rows: np.ndarray, class_of: ClassOf) -> list[str | None]:
    """Each chosen row's class by its name; None for other rows."""
    found: list[str | None] = [None] * len(index)
    for row in rows.tolist():
        found[row] = class_of(index.name(row))
    return found


def by_sidecar(
    index: TarIndex, handle: Archive, rows: np.ndarray, extension: str, field: str, as_class: bool
) -> tuple[list[Any], dict[int, str]]:
    """Each row's class or value in the sidecar of its sample; what is wrong with which sidecars."""
    column = np.full(len(index), -1, np.int64)  # an image's sidecar
    column[rows] = _CHOSEN
    beside, bad = column.data, dict[int, str]()  # which is faster for single rows
    for sample in samples(index, (ending := extension.encode(),)):
        problem, sidecar = sample.problem or sample.twice, sample.sidecars.get(ending, -1)
        for row in sample.images:
            if beside[row] == _CHOSEN:
                beside[row] = -1 if problem else sidecar
                if problem:
                    bad[row] = f"{index.path!r}: {problem}."
    found: dict[int, Any] = {}
    unread: dict[int, str] = {}
    at = np.unique(column[column >= 0])  # in the archive's order
    sizes, offsets = index.columns.sizes[at].tolist(), index.columns.offsets[at].tolist()
    least = [min(size, _MAX_SIDECAR) for size in sizes]
    contents = handle.pread_many(list(zip(least, offsets, strict=True)))
    for row, size, data in zip(at.tolist(), sizes, contents, strict=True):
        try:  # where it is is looked up only for an error
            if size > _MAX_SIDECAR:
                raise check.DataError(f" names no class: it has {size} bytes.")
            value = lb.read_sidecar(data, field, "")
            found[row] = lb.class_name(value, "") if as_class else value
        except check.DataError as error:
            unread[row] = f"{index.path!r}, member {index.name(row)!r}{error}"
    if unread:
        bad |= {row: unread[beside[row]] for row in rows.tolist() if beside[row] in unread}
    return [found.get(row) for row in beside.tolist()], bad


def look_up(labels: Table, names: Sequence[str], as_classes: bool) -> list[Any]:
    """Each record's value, by one rule for all: by path, else by the last parts of paths.

    An entry may lack a record's first folders or extension, or have more folders before them.

    Raises:
      DataError: if a record has none, or it is unclear which is whose.

    >>> look_up({"1": "cat", "2": "dog"}, ["a/2.png", "a/1.png"], True)
    ['dog', 'cat']
    """
    where = "`labels`" if isinstance(labels, Mapping) else repr(labels and os.fspath(labels))
    table = read_table(labels)

    stems = [re.sub(r"\.[^./]*\Z", "", name) for name in names]
    fewest, why = len(names) + 1, "does not tell the records apart"
    for records, by_last in ((names, False), (names, True), (stems, False), (stems, True)):
        of = {_last(record) if by_last else record: record for record in records}
        found: dict[str, list[Any]] = {record: [] for record in records}
        unused = 0
        for name, value in table.items():
            record = of.get(_last(name) if by_last else name)
            if record is None or not (_ends(record, name) or _ends(name, record)):
                unused += 1
            elif value not in found[record]:
                found[record].append(value)
        if len(of) < len(names) or max(map(len, found.values())) > 1:
            continue
        missing = [names[i] for i, record in enumerate(records) if not found[record]]
        if not missing:
            logger.info("%s: %d of %d entries are of no record", where, unused, len(table))
            values = [found[record][0] for record in records]
            if not as_classes:
                return values
            return [lb.class_name(values[i], f"{where}, {n!r},") for i, n in enumerate(names)]
        if len(missing) < fewest:
            fewest = len(missing)
            why = f"has no entry for {fewest} of {len(names)} records, such as {missing[0]!r}"
    raise check.DataError(
        f"{where} {why}. An entry may lack a path's first folders, or its extension, if that "
        "leaves no doubt."
    )


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _ends(path: str, part: str) -> bool:
    return f"/{path}".endswith(f"/{part}")


def encode(
    values: Sequence[Any], target: str, classes: Sequence[str] | None, where: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The targets, float32 [n] or [n, k], or a bit for each class, and the classes.

    A value is for "number" a number, or k; for "multilabel" the names of classes, in a list or with
    `|` between them. `classes` are by default those found; `where` names a record in messages.

    >>> decode(*encode(["cat|dog", ["dog"], ""], "multilabel", None, str)[:1], "multilabel", 2)
    array([[1., 1.],
           [0., 1.],
           [0., 0.]], dtype=float32)
    """
    if target == "multilabel":
        named = [_several(value, i, where) for i, value in enumerate(values)]
        seen = {name for names in named for name in names}
        table = lb.table_of(classes, seen, where(0))
        must = f"one of at most {_MAX_CLASSES} classes"
        check.argument(len(table) <= _MAX_CLASSES, "target", must, target, f"{len(table)} found.")
        place = {name: i for i, name in enumerate(table)}
        bits = np.zeros((len(values), -(-len(table) // 8)), np.uint8)
        for row, names in zip(bits, named, strict=True):
            for i in {place[name] for name in names}:
                row[i // 8] |= 128 >> i % 8
        return bits, table
    given = [(i, value) for i, value in enumerate(values) if value is not SKIPPED]
    shape = (len(given[0][1]),) if given and isinstance(given[0][1], list) else ()
    numbers = np.zeros((len(values), *shape), np.float32)
    for i, value in given:
        try:
            numbers[i] = [float(x) for x in value] if shape else float(value)
            ok = not shape or (isinstance(value, list) and len(value) == shape[0])
            ok = ok and bool(np.isfinite(numbers[i]).all())
        except (TypeError, ValueError, OverflowError):
            ok = False
        if not ok:
            must = f"{shape[0]} finite numbers" if shape else "a finite number"
            raise check.DataError(f"{where(i)} must have {must} as its target, got {value!r}.")
    return numbers, ()


def decode(targets: np.ndarray, target: str, classes: int) -> np.ndarray:
    """The targets of some records, float32, as batches hold them."""
    if target != "multilabel":
        return targets
    return np.unpackbits(targets, axis=1, count=classes).astype(np.float32)


def _several(value: Any, i: int, where: Callable[[int], str]) -> list[str]:
    if value is SKIPPED:
        return []
    if isinstance(value, str):
        value = filter(None, map(str.strip, value.split("|")))
    elif not isinstance(value, list):
        raise check.DataError(f"{where(i)} must have a list of classes as target, got {value!r}.")
    return [lb.class_name(name, where(i)) for name in value]
