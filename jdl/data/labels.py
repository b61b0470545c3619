"""From a record's name to its class, and the table of classes."""

import codecs
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from jdl.core import check

Name: TypeAlias = str | int | np.integer | None  # what a user's function may return
Label: TypeAlias = str | int | re.Pattern[str] | Callable[[str], Name] | None

NO_LABEL = -1


def folder_parts(folder: str) -> list[str]:
    """The names in a folder's path, without the empty and the `.` ones.

    >>> folder_parts("./train/7")
    ['train', '7']
    """
    return [part for part in folder.split("/") if part not in ("", ".")]


def parse(text: str) -> Label:
    """The label that the words of a command line mean; `re:PATTERN` is a regular expression.

    >>> parse("none"), parse("-2"), parse("json:person"), parse("re:_(.)").pattern
    (None, -2, 'json:person', '_(.)')
    """
    if text.startswith("re:"):
        try:
            return re.compile(text[3:])
        except re.error as error:
            must = f"re: and a regular expression ({error})"
            raise check.ArgumentError(f"`label` must be {must}, got {text!r}.") from error
    if re.fullmatch(r"[+-]?\d{1,9}", text):
        return int(text)
    return None if text == "none" else text


def reader(label: Label) -> Callable[[str], str | None]:
    """The function from a member's name to its class, or to None where it has none.

    >>> reader("folder")("train/7/0001.png"), reader(0)("train/7/0001.png")
    ('7', 'train')
    """
    if isinstance(label, re.Pattern):
        return _by_pattern(label)
    if callable(label):
        return _by_function(label)
    place: Any = -1 if label == "folder" else label
    ok = isinstance(place, int) and not isinstance(place, bool)
    must = (
        '"folder", a place in the path, a compiled regular expression, a function, "cls", '
        '"json:FIELD", or None'
    )
    check.argument(ok, "label", must, label)

    def by_place(name: str) -> str | None:
        parts = folder_parts(name.rpartition("/")[0])
        return parts[place] if -len(parts) <= place < len(parts) else None

    return by_place


def _by_pattern(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    ok = pattern.groups <= 1
    check.argument(ok, "label", "a regular expression of at most one group", pattern.pattern)

    def by_pattern(name: str) -> str | None:
        match = pattern.search(name)
        return match[pattern.groups] if match else None

    return by_pattern


def _by_function(function: Callable[[str], Name]) -> Callable[[str], str | None]:
    def by_function(name: str) -> str | None:
        found: object = function(name)
        if found is None or isinstance(found, str):
            return found and composed(found)
        ok = isinstance(found, int | np.integer) and not isinstance(found, bool)
        must = f"a function that returns a name, a number or None; for {name!r} one"
        check.argument(ok, "label", must, found)
        return str(found)

    return by_function


def sidecar(label: object) -> tuple[str, str] | None:
    """Extension and JSON field of a WebDataset label, which is in a member beside the image.

    >>> sidecar("cls"), sidecar("json:person"), sidecar("folder")
    (('cls', ''), ('json', 'person'), None)
    """
    if not isinstance(label, str):
        return None
    extension, colon, field = label.partition(":")
    if extension == "json":
        return extension, field or "label"
    return (extension, "") if extension in ("cls", "txt") and not colon else None


def sidecar_key(name: str) -> tuple[str, str]:
    """A member's key and extension, split as WebDataset does at the first dot of the base name.

    >>> sidecar_key("a.b/0001.left.jpg")
    ('a.b/0001', 'left.jpg')
    """
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def read_sidecar(data: bytes, field: str, where: str) -> Any:
    """The value in a sidecar's bytes: all of its text, or a field of its JSON; or a `DataError`."""
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode().strip()
        return json.loads(text)[field] if field else text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise check.DataError(f"{where} names no class: {error!r}.") from error


def class_name(value: object, where: str) -> str:
    """`value` as a class, if it is a text or an integer."""
    ok = isinstance(value, str | int | np.integer) and not isinstance(value, bool) and str(value)
    if not ok:
        raise check.DataError(f"{where} names no class, but {value!r}.")
    return composed(str(value))


def composed(name: str) -> str:
    r"""`name` in Unicode's composed form (NFC), which members' names are in.

    >>> composed("cafe\u0301") == "caf\xe9"
    True
    """
    return unicodedata.normalize("NFC", name)


def class_table(names: Iterable[str]) -> tuple[str, ...]:
    """The classes in a stable order: numerical if all are numbers, else by name.

    >>> class_table({"10", "9", "0"}), class_table({"b", "a"})
    (('0', '9', '10'), ('a', 'b'))
    """
    names = set(names)
    numbers = all(name.isascii() and name.isdigit() and len(name) < 19 for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if numbers else (0, name)))


def table_of(classes: Sequence[str] | None, seen: Iterable[str], where: str) -> tuple[str, ...]:
    """`classes` as a table, by default those seen; a `DataError` names those missing in it."""
    if classes is None:
        return class_table(seen)
    ok = not isinstance(classes, str) and all(isinstance(c, str) for c in classes)
    check.argument(ok, "classes", "a sequence of names", classes)
    table = tuple(map(composed, classes))
    check.argument(len(set(table)) == len(table), "classes", "names that differ", table[:20])
    unknown = class_table(set(seen) - set(table))
    if unknown:
        raise check.DataError(
            f"{where} has {len(unknown)} label(s) that were not there in training: "
            f"{_first_ten(unknown)}. The known classes are: {_first_ten(table)}."
        )
    return table


def _first_ten(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")


def number(names: Sequence[str | None], classes: Sequence[str]) -> np.ndarray:
    """Each name's place in the table, in the smallest type; `NO_LABEL` for None."""
    places = {name: i for i, name in enumerate(classes)}
    found = (NO_LABEL if name is None else places.get(name, NO_LABEL) for name in names)
    return np.fromiter(found, label_type(len(classes)), len(names))


def label_type(classes: int) -> np.dtype:
    """The smallest type for the numbers of so many classes and `NO_LABEL`.

    >>> label_type(10), label_type(1000)
    (dtype('int8'), dtype('int16'))
    """
    return np.min_scalar_type(-max(classes, 1) - 1)
