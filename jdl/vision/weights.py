"""Reading files of weights that may be anybody's: pickles of NumPy arrays, and safetensors.

A pickle is a program. This one is not run: the few instructions that plain containers, strings and
arrays need are interpreted here, every other is refused, and arrays are made from the file's own
bytes, so that nothing is imported, called or allocated beyond the file's size.
"""

import math
import os
import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jdl.core import check

LARGEST = 1 << 31  # bytes of a file
MOST = 1 << 16  # containers and values in a pickle
_ARRAY, _DTYPE, _RECONSTRUCT = "ndarray", "dtype", "_reconstruct"
_GLOBALS = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _Name(str):
    """One of the three things of NumPy that a pickle may name."""


class _Type:
    """A dtype to be: its code, and the byte order told later."""

    def __init__(self, code: Any):
        ok = isinstance(code, str) and len(code) == 2 and code[0] in "fiu" and code[1] in "1248"
        _demand(ok, f"an array of type {code!r}")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        _demand(isinstance(state, tuple) and len(state) > 1, "a dtype in another form")
        _demand(state[1] in ("<", ">", "|", "="), f"byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array to be: its contents are told later."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        _demand(isinstance(state, tuple) and len(state) == 5, "an array in another form")
        _, shape, kind, fortran, data = state
        dims = shape if isinstance(shape, tuple) else (-1,)
        ok = isinstance(kind, _Type) and isinstance(data, bytes) and len(dims) <= 8
        ok = ok and all(type(n) is int and n >= 0 for n in dims)
        _demand(ok, "an array in another form")
        _demand(
            math.prod(dims) * kind.dtype.itemsize == len(data),
            f"an array of shape {dims} in {len(data)} bytes",
        )
        flat = np.frombuffer(data, kind.dtype)
        self.value = flat.reshape(dims, order="F" if fortran else "C")


def _demand(ok: bool, otherwise: str) -> None:
    if not ok:
        raise ValueError(otherwise)


def read_pickle(path: str | Path) -> Any:
    """The dicts, lists and tuples of NumPy arrays that a pickle holds, without unpickling it.

    Args:
      path: a file that `pickle.dump` wrote.

    Raises:
      DataError: if it holds anything but containers, strings, numbers and arrays of numbers.

    >>> import pickle, tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
    ...     pickle.dump({"conv1": [np.ones((3, 3), np.float32)]}, file)
    ...     file.flush()
    ...     read_pickle(file.name)["conv1"][0].shape
    (3, 3)
    """
    data = _bytes_of(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in what is refused anyway
            return _finished(_interpreted(data), 8, [MOST])
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise check.DataError(
            f"{path} is no pickle of plain NumPy arrays: it holds {error}. Nothing in it was run."
        ) from error


def _interpreted(data: bytes) -> Any:
    """Runs the instructions on a stack of ours."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for instruction, given, _ in pickletools.genops(data):
        op = instruction.name
        if op in ("PROTO", "FRAME"):
            continue
        if op == "STOP":
            _demand(len(stack) == 1, "no single object")
            return stack[0]
        if op == "MARK":
            marks.append(len(stack))
        elif op in _VALUES:
            stack.append(_VALUES[op](given))
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[given] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[given])
        elif op == "GLOBAL":
            stack.append(_named(*str(given).split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_named(module, name))
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            _demand(len(stack) >= count, "a tuple of nothing")
            stack[-count:] = [tuple(stack[-count:])]
        elif op in ("APPEND", "APPENDS"):
            items = since_mark() if op == "APPENDS" else [stack.pop()]
            _demand(isinstance(stack[-1], list), "an append to no list")
            stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = since_mark() if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _demand(isinstance(stack[-1], dict), "an item of no dict")
            _demand(all(type(key) is str for key in items[::2]), "a key that is no string")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif op == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_called(called, arguments))
        elif op == "BUILD":
            state = stack.pop()
            _demand(isinstance(stack[-1], _Type | _Array), "a state of something else")
            stack[-1].build(state)
        else:
            raise ValueError(f"the instruction {op}")
    raise ValueError("no end")


_VALUES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), lambda value: value),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), lambda value: value),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), lambda value: value),
}


def _named(module: Any, name: Any) -> _Name:
    ok = type(module) is str and type(name) is str and (module, name) in _GLOBALS
    _demand(ok, f"the name {module}.{name}")
    return _Name(_GLOBALS[module, name])


def _called(called: Any, arguments: Any) -> Any:
    _demand(isinstance(called, _Name) and isinstance(arguments, tuple), "a call")
    if called == _DTYPE:
        return _Type(arguments[0])
    ok = called == _RECONSTRUCT and isinstance(arguments[0], _Name) and arguments[0] == _ARRAY
    _demand(ok, f"a call of {called}")
    return _Array()


def _finished(value: Any, depth: int, left: list[int]) -> Any:
    """With arrays for what was to be arrays; `left` counts down: a thing may be there often."""
    left[0] -= 1
    _demand(depth > 0 and left[0] > 0, "containers too deep or too many")
    if isinstance(value, dict):
        return {key: _finished(each, depth - 1, left) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finished(each, depth - 1, left) for each in value)
    if isinstance(value, _Array):
        _demand(value.value is not None, "an array without contents")
        return value.value
    _demand(not isinstance(value, _Name | _Type), "a type")
    return value


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, by name.

    Raises:
      DataError: if it is damaged or something else.
      MissingExtraError: without the package safetensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise check.MissingExtraError(
            "safetensors", "vision", "Reading .safetensors files"
        ) from error
    _check_file(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise check.DataError(f"{path} cannot be read as safetensors: {error}.") from error


def _bytes_of(path: str | Path) -> bytes:
    _check_file(path)
    return Path(path).read_bytes()


def _check_file(path: str | Path) -> None:
    if not os.path.isfile(path):
        raise check.DataError(f"{path}: there is no such file of weights.")
    size = os.path.getsize(path)
    if size > LARGEST:
        raise check.DataError(f"{path} has {size} bytes, more than the {LARGEST} allowed.")
