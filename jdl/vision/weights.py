"""Reading files of weights: pickles of NumPy arrays, and safetensors."""

import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jdl.core import check

LARGEST = 1 << 31  # bytes of a file
MOST = 1 << 16  # opcodes in a pickle, and values in what it holds
DEEPEST = 32  # containers in one another


class _Dtype:
    """Stands for a dtype."""

    def __init__(self, code: Any, *_: Any):
        if not (type(code) is str and len(code) == 2 and code[0] in "fiu" and code[1] in "1248"):
            raise ValueError("an array of other things than floats or integers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if not (type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "|", "=")):
            raise ValueError("a dtype of unknown form")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for an array, which will be a view of bytes in the pickle."""

    array: np.ndarray | None = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        ok = type(shape) is tuple and len(shape) <= 32 and type(data) is bytes
        ok = ok and all(type(size) is int and size >= 0 for size in shape)
        if not ok or type(kind) is not _Dtype:
            raise ValueError("an array of unknown form")
        flat = np.frombuffer(data, kind.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


_ALLOWED = {
    ("numpy", "ndarray"): None,  # only an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}
_OPCODES = """
    proto frame mark stop global stack_global reduce build
    none true false binint binint1 binint2 binunicode short_binunicode
    binbytes short_binbytes binbytes8 empty_tuple tuple tuple1 tuple2 tuple3
    empty_list append appends empty_dictionary setitem setitems
    binput long_binput memoize binget long_binget
""".split()  # noqa: SIM905


def _limited(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """The method of `_Unpickler` for an opcode, behind checks."""
    name = run.__name__.removeprefix("load_")

    def step(unpickler: "_Unpickler") -> None:
        unpickler.opcodes += 1
        if name not in _OPCODES:
            raise ValueError(f"the opcode {name}, which arrays do not need")
        if unpickler.opcodes > MOST:
            raise ValueError(f"more than {MOST} opcodes")
        if name == "build" and not isinstance(unpickler.stack[-2], _Dtype | _Array):
            raise ValueError("the state of another object")  # that of a class would change it
        if name in ("setitem", "setitems"):  # the hash of a deep tuple can crash
            keys = unpickler.stack[-2 if name == "setitem" else 0 :: 2]
            if not all(type(key) is str for key in keys):
                raise ValueError("a key that is not a string")
        run(unpickler)

    return step


class _Unpickler(pickle._Unpickler):
    """Finds only the stand-ins, as NumPy's own `__setstate__` can crash on a damaged pickle.

    This is pickle's implementation in Python. The one in C allocates a memo as large as the
    largest index that the file names; this one has a dict. The opcodes left out could allocate
    more than the file's bytes (BYTEARRAY8) or make other objects.
    """

    dispatch: ClassVar = {code: _limited(run) for code, run in pickle._Unpickler.dispatch.items()}
    opcodes = 0
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"the name {module}.{name}")
        return _ALLOWED[module, name]


def read_pickle(path: str | Path) -> Any:
    """The dicts, lists and tuples of NumPy arrays that a pickle holds.

    No code of the file is run, whatever it holds, and the memory needed is in proportion to the
    file's size. The arrays are read-only and have the byte order of the file.

    Args:
      path: a file that `pickle.dump` wrote, with protocol 3 or 4; keys of dicts are strings.

    Raises:
      DataError: if it holds anything but dicts, lists, tuples and arrays of floats or integers,
        more than 65,536 of them, or containers more than 32 deep.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
    ...     pickle.dump({"conv1": [np.ones((3, 3), np.float32)]}, file, protocol=4)
    ...     file.flush()
    ...     read_pickle(file.name)["conv1"][0].shape
    (3, 3)
    """
    _check_file(path)
    try:
        tree = _Unpickler(io.BytesIO(Path(path).read_bytes())).load()
        return _with_arrays(tree, iter(range(MOST)))
    except Exception as error:  # unpickling raises whatever a damaged file leads to
        raise check.DataError(
            f"{path} is not a pickle of plain NumPy arrays: "
            f"{type(error).__name__}: {str(error)[:200]}."
        ) from error


def _with_arrays(tree: Any, left: Iterator[int], depth: int = 0) -> Any:
    """`tree` with arrays in place of their stand-ins; a container in two places counts twice."""
    if next(left, None) is None or depth > DEEPEST:
        raise ValueError(f"more than {MOST} values, or containers more than {DEEPEST} deep")
    if type(tree) is dict:
        return {key: _with_arrays(each, left, depth + 1) for key, each in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_with_arrays(each, left, depth + 1) for each in tree)
    if type(tree) is not _Array or tree.array is None:
        raise ValueError(f"{type(tree).__name__} in place of an array of numbers")
    return tree.array


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, by name; a `DataError` if it cannot be read."""
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


def _check_file(path: str | Path) -> None:
    if not os.path.isfile(path):
        raise check.DataError(f"{path}: there is no such file.")
    size = os.path.getsize(path)
    if size > LARGEST:
        raise check.DataError(f"{path} has {size} bytes, more than the {LARGEST} allowed.")
