"""Argument checks, and the errors that a user can correct.

Every message says which argument, what it must be, what it got and, where it helps, what to do.
The command line shows a `UserError` in one line and ends with exit code 2; any other exception is
a bug.
"""

import difflib
import math
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error that the caller can correct."""


class ArgumentError(UserError, ValueError):
    """An argument has a value that is not allowed."""


class DataError(UserError, ValueError):
    """A file or a batch has unexpected contents."""


class SourceError(DataError):
    """A Python file of the user's has a mistake; names in backquotes are the file's."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue, for example because the loss is not finite."""


class MissingExtraError(UserError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str | None, needed_for: str):
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed. "
            "Install it with: pip install " + (f"'jax-jdl[{extra}]'" if extra else package)
        )


def argument(ok: bool, name: str, must: str, got: Any, hint: str = "") -> None:
    """Raises unless `ok`.

    >>> argument(False, "batch_size", "a positive integer", -3)
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `batch_size` must be a positive integer, got -3.
    """
    if not ok:
        raise ArgumentError(f"`{name}` must be {must}, got {got!r}." + (f" {hint}" if hint else ""))


def positive_int(name: str, value: Any) -> int:
    """`value`, if it is an integer of at least 1."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    argument(ok, name, "a positive integer", value)
    return value


def positive_ints(**values: Any) -> None:
    """Raises for the first of these that is not an integer of at least 1."""
    for name, value in values.items():
        positive_int(name, value)


def reason(error: BaseException) -> str:
    """An error's first line, or its kind where it says nothing.

    >>> reason(ValueError("no such file")), reason(KeyError())
    ('no such file', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """`value`, if low ≤ value ≤ high, `<` where an end is open; not NaN, not None.

    >>> in_range("decay", 1.0, 0.0, 1.0, open_high=True)
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `decay` must be a number in [0.0, 1.0), got 1.0.
    """
    number = math.nan if value is None or isinstance(value, str) else value
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    ends = "(" if open_low else "[", ")" if open_high else "]"
    argument(bool(above and below), name, f"a number in {ends[0]}{low}, {high}{ends[1]}", value)
    return value


def one_of(name: str, value: Any, options: Iterable[Any]) -> Any:
    """`value`, if it is one of `options`; the error names the nearest.

    >>> one_of("optimizer", "adma", ["sgd", "adam"])
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `optimizer` must be one of sgd, adam, got 'adma'. \
Did you mean 'adam'?
    """
    options = list(options)
    if value not in options:
        names = [str(o) for o in options]
        near = _nearest(str(value), names)
        hint = f"Did you mean {near!r}?" if near else ""
        argument(False, name, f"one of {', '.join(names)}", value, hint)
    return value


def known(*arrays: Any) -> bool:
    """Whether the numbers are at hand: not inside `jit`, nor of what several processes share."""
    import jax

    return all(
        not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
        for x in arrays
    )


def values(name: str, x: Any, low: Any, high: Any, must: str, hint: str = "") -> None:
    """Raises for an array that is known and has NaN or values outside [low, high].

    >>> values("tokens", [0, 7], 0, 4, "numbers in [0, 5)")
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `tokens` must be numbers in [0, 5), got values from 0 to 7.
    """
    import numpy as np

    found = np.asarray(x if known(x) else ())
    if found.size and not ((found >= low) & (found <= high)).all():
        got = f"values from {float(found.min()):g} to {float(found.max()):g}"
        raise ArgumentError(f"`{name}` must be {must}, got {got}." + (f" {hint}" if hint else ""))


def _nearest(value: str, names: list[str]) -> str | None:
    """The longest name that `value` begins with, ignoring case and hyphens; or the nearest."""

    def plain(text: str) -> str:
        return "".join(c for c in text.casefold() if c.isalnum())

    begun = [n for n in names if len(plain(n)) > 1 and plain(value).startswith(plain(n))]
    alike = difflib.get_close_matches(value, names, n=1)
    return max(begun, key=len) if begun else next(iter(alike), None)
