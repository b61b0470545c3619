"""Reading files of weights: pickles of NumPy arrays, and safetensors."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from jdl.core import check

LARGEST = 1 << 31  # bytes of a file
_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # makes an empty array, which is then filled
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _Unpickler(pickle.Unpickler):
    """Finds only NumPy's arrays and dtypes; see "Restricting Globals" in the manual of pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return _ALLOWED[module, name]


def read_pickle(path: str | Path) -> Any:
    """The dicts, lists and tuples of NumPy arrays that a pickle holds.

    It can run no code. It is meant for files of installed packages: a crafted pickle could still
    exhaust the memory.

    Args:
      path: a file that `pickle.dump` wrote.

    Raises:
      DataError: if it holds anything but dicts, lists, tuples and arrays of numbers.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
    ...     pickle.dump({"conv1": [np.ones((3, 3), np.float32)]}, file)
    ...     file.flush()
    ...     read_pickle(file.name)["conv1"][0].shape
    (3, 3)
    """
    _check_file(path)
    try:
        tree = _Unpickler(io.BytesIO(Path(path).read_bytes())).load()
        _check_arrays(tree, set())
    except Exception as error:  # unpickling raises whatever a damaged file leads to
        raise check.DataError(
            f"{path} is not a pickle of plain NumPy arrays: it holds {error}."
        ) from error
    return tree


def _check_arrays(tree: Any, seen: set[int]) -> None:
    """Raises unless the leaves are arrays of numbers; `seen` are containers already checked."""
    if isinstance(tree, dict | list | tuple):
        if id(tree) not in seen:
            seen.add(id(tree))
            for each in tree.values() if isinstance(tree, dict) else tree:
                _check_arrays(each, seen)
    elif not isinstance(tree, np.ndarray) or tree.dtype.kind not in "fiu":
        raise ValueError(f"{type(tree).__name__} in place of an array of numbers")


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, by name.

    Raises:
      DataError: if the file is damaged or of another kind.
      MissingExtraError: if the package safetensors is not installed.
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


def _check_file(path: str | Path) -> None:
    if not os.path.isfile(path):
        raise check.DataError(f"{path}: there is no such file.")
    size = os.path.getsize(path)
    if size > LARGEST:
        raise check.DataError(f"{path} has {size} bytes, more than the {LARGEST} allowed.")
