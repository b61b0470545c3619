"""From a member's name to its class, and the table of classes."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np

from jdl.core import check

Name: TypeAlias = str | int | np.integer | None  # what a function may give
Label: TypeAlias = str | int | re.Pattern[str] | Callable[[str], Name] | None

NO_LABEL = -1


def folder_parts(folder: str) -> list[str]:
    """The names in a folder's path, without the empty and the `.` ones.

    >>> folder_parts("./train/7")
    ['train', '7']
    """
    return [part for part in folder.split("/") if part not in ("", ".")]


def by_folder(label: str | int) -> Callable[[str], str | None]:
    """The function from a folder to the class of all that is in it.

    `"folder"` means the last name in its path, an integer the one at that place.
    """
    place = -1 if label == "folder" else label
    check.argument(
        isinstance(place, int) and not isinstance(place, bool),
        "label",
        '"folder", a place in the path, a compiled regular expression, a function, "cls", '
        '"json:FIELD", or None',
        label,
    )

    def of(folder: str) -> str | None:
        parts = folder_parts(folder)
        inside = -len(parts) <= int(place) < len(parts)
        return parts[int(place)] if inside else None

    return of


def by_name(label: re.Pattern[str] | Callable[[str], Name]) -> Callable[[str], str | None]:
    """The function from a member's full name to its class."""
    if not isinstance(label, re.Pattern):
        return _by_function(label)
    pattern = label
    check.argument(
        pattern.groups <= 1, "label", "a regular expression of at most one group", pattern.pattern
    )

    def of(name: str) -> str | None:
        match = pattern.search(name)
        return match[pattern.groups] if match else None

    return of


def _by_function(label: Callable[[str], Name]) -> Callable[[str], str | None]:
    def of(name: str) -> str | None:
        found: object = label(name)
        if found is None or isinstance(found, str):
            return found
        ok = isinstance(found, int | np.integer) and not isinstance(found, bool)
        check.argument(
            ok, "label", f"a function that gives a name, a number or None; of {name!r} one", found
        )
        return str(found)

    return of


def sidecar(label: object) -> tuple[str, str] | None:
    """Extension and JSON field of a WebDataset label: what stands in a member beside the image.

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
    """A member's key and extension, as WebDataset cuts a name: at its base's first dot.

    >>> sidecar_key("a.b/0001.left.jpg")
    ('a.b/0001', 'left.jpg')
    """
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def read_sidecar(data: bytes, field: str, where: str) -> str:
    """The class that a sidecar's bytes name: all of its text, or a field of its JSON.

    Raises:
      DataError: if they name none.
    """
    try:
        text = data.decode("utf-8").strip()
        value = json.loads(text)[field] if field else text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise check.DataError(f"{where} names no class: {error!r}.") from error
    ok = isinstance(value, str | int) and not isinstance(value, bool) and str(value)
    if not ok:
        raise check.DataError(f"{where} names no class, but {value!r}.")
    return str(value)


def class_table(names: Iterable[str]) -> tuple[str, ...]:
    """The classes in a stable order: by number if all are numbers, else by name.

    >>> class_table({"10", "9", "0"}), class_table({"b", "a"})
    (('0', '9', '10'), ('a', 'b'))
    """
    names = set(names)
    numbers = all(name.isascii() and name.isdigit() and len(name) < 19 for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if numbers else (0, name)))


def check_classes(classes: Sequence[str], seen: Iterable[str], where: str) -> tuple[str, ...]:
    """`classes` as a table, if it holds all that were seen.

    Raises:
      DataError: naming those it lacks.
    """
    table = tuple(classes)
    check.argument(
        not isinstance(classes, str) and all(isinstance(c, str) for c in table),
        "classes",
        "a sequence of names",
        classes,
    )
    check.argument(len(set(table)) == len(table), "classes", "names that differ", table[:20])
    strange = class_table(set(seen) - set(table))
    if strange:
        shown = ", ".join(map(repr, strange[:10])) + (", …" if len(strange) > 10 else "")
        known = ", ".join(map(repr, table[:10])) + (", …" if len(table) > 10 else "")
        raise check.DataError(
            f"{where} has {len(strange)} label(s) that were not there in training: {shown}. "
            f"The known classes are: {known}."
        )
    return table


def number(names: Sequence[str | None], classes: Sequence[str]) -> np.ndarray:
    """Each name's place in the table, of the smallest type; `NO_LABEL` where it has none."""
    places = {name: i for i, name in enumerate(classes)}
    found = (NO_LABEL if name is None else places.get(name, NO_LABEL) for name in names)
    return np.fromiter(found, label_type(len(classes)), len(names))


def label_type(classes: int) -> np.dtype:
    """The smallest type that numbers so many classes and `NO_LABEL`.

    >>> label_type(10), label_type(1000)
    (dtype('int8'), dtype('int16'))
    """
    return np.min_scalar_type(-max(classes, 1) - 1)
