"""A predict function and its parameters as one file, which runs without the model's code.

The file is an uncompressed zip archive: `predict.stablehlo`, made by `jax.export`; `leaf-00000` …,
the bytes of the parameters and the model's state; `about.json`. JAX reads such functions for six
months after the version that wrote them. Sizes are checked and nothing is unpickled, but the
function is a program: load it only from a source you trust.
"""

import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jdl.core import check
from jdl.core.files import atomic_file
from jdl.core.types import Batch, Outputs, PyTree

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_FUNCTION, _ABOUT, _LEAF = "predict.stablehlo", "about.json", "leaf-{:05d}"


def save(
    path: str | Path,
    predict: Callable[[PyTree, PyTree, Batch], Outputs],
    params: PyTree,
    model_state: PyTree,
    inputs: Batch,
    *,
    platforms: Sequence[str] = PLATFORMS,
    any_batch_size: bool = True,
    shapes: Mapping[str, str] | None = None,
    constraints: Sequence[str] = (),
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `predict(params, model_state, batch) -> outputs` and its first two arguments.

    Args:
      path: the file.
      predict: a pure function that returns arrays, or dicts, lists and tuples of them.
      params: its first argument, arrays.
      model_state: its second, arrays.
      inputs: a batch with the entries that it reads, for their shapes and types.
      platforms: what it runs on.
      any_batch_size: whether the leading axis has any size; else it has that of `inputs`.
      shapes: entry -> its shape with symbolic sizes, such as "b, 4*h, 4*w, 3".
      constraints: on these sizes, such as "h >= 2".
      notes: information for the reader, of JSON's types.

    Returns:
      The path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     double, batch = lambda p, state, batch: p * batch["x"], {"x": jnp.ones(3)}
    ...     path = save(f"{folder}/double", double, jnp.full(1, 2.0), {}, batch)
    ...     predict = load_exported(path)
    >>> predict({"x": jnp.arange(4.0)}).tolist()
    [0.0, 2.0, 4.0, 6.0]
    """
    _flatbuffers()
    for platform in platforms:
        check.one_of("platforms", platform, PLATFORMS)
    leaves, structure = jax.tree.flatten((params, model_state))

    def function(leaves: list[Any], batch: dict[str, Any]) -> Outputs:
        params, model_state = jax.tree.unflatten(structure, leaves)
        return predict(params, model_state, batch)

    scope = export.SymbolicScope(tuple(constraints))

    def shape(name: str, x: Any) -> jax.ShapeDtypeStruct:
        sizes = ["b" if any_batch_size else len(x), *x.shape[1:]]
        text = (shapes or {}).get(name, ",".join(map(str, sizes)))
        return jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), x.dtype)

    whole = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    given = {name: shape(name, x) for name, x in inputs.items()}
    made = export.export(jax.jit(function), platforms=tuple(platforms))(whole, given)
    about = {
        "jax": jax.__version__,
        "inputs": {
            name: {
                "shape": [n if isinstance(n, int) else None for n in x.shape],
                "dtype": str(x.dtype),
            }
            for name, x in given.items()
        },
        "notes": dict(notes or {}),
        "leaves": len(leaves),
    }
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_ABOUT, json.dumps(about))
        archive.writestr(_FUNCTION, bytes(made.serialize()))
        for i, leaf in enumerate(leaves):
            with archive.open(_LEAF.format(i), "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(leaf).tobytes())
    return Path(path)


class ExportedModel:
    """A predict function read from a file.

    Attributes:
      inputs: name -> (shape, dtype) of the entries it reads; None stands for any size.
      platforms: what it runs on.
      notes: what `save` was given.
    """

    def __init__(self, exported: export.Exported, leaves: list[Any], about: Mapping[str, Any]):
        self._call, self._leaves = jax.jit(exported.call), leaves
        self.platforms = tuple(exported.platforms)
        self.notes = dict(about.get("notes", {}))
        self.inputs = {
            name: (tuple(x["shape"]), np.dtype(x["dtype"])) for name, x in about["inputs"].items()
        }

    def __call__(self, batch: Batch) -> Outputs:
        """The outputs for a batch, a dict of arrays; entries it does not read are ignored."""
        given = {}
        for name, (shape, dtype) in self.inputs.items():
            check.argument(name in batch, "batch", f"a dict with {list(self.inputs)}", list(batch))
            x = batch[name]
            same = len(x.shape) == len(shape) and all(
                theirs in (mine, None) for mine, theirs in zip(x.shape, shape, strict=True)
            )
            wanted = f"{dtype}{['any' if n is None else n for n in shape]}"
            got = f"{x.dtype}{list(x.shape)}"
            check.argument(same and x.dtype == dtype, f"batch[{name!r}]", wanted, got)
            given[name] = x
        return self._call(self._leaves, given)


def load_exported(path: str | Path) -> ExportedModel:
    """Reads what `save` wrote.

    Args:
      path: the file.

    Raises:
      DataError: the file is missing, damaged, or of another kind.
    """
    _flatbuffers()
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
            if not stored:  # so that nothing in it is larger than the file
                raise ValueError("a member is compressed")
            about = json.loads(archive.read(_ABOUT))
            number = int(about["leaves"])
            if number != sum(name.startswith("leaf-") for name in archive.namelist()):
                raise ValueError("arrays are missing")
            exported = export.deserialize(bytearray(archive.read(_FUNCTION)))
            leaves = [
                _array(archive.read(_LEAF.format(i)), exported.in_avals[i]) for i in range(number)
            ]
        return ExportedModel(exported, leaves, about)
    except FileNotFoundError:
        raise check.DataError(f"There is no file {str(path)!r}.") from None
    except Exception as error:
        raise check.DataError(
            f"{str(path)!r} is not an exported predict function, or damaged: {error}."
        ) from error


def _array(data: bytes, like: Any) -> jax.Array:
    if len(data) != math.prod(like.shape) * like.dtype.itemsize:
        raise ValueError("an array does not have the size that the function takes")
    return jnp.asarray(np.frombuffer(data, like.dtype).reshape(like.shape))


def _flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401  jax.export needs it and does not require it
    except ImportError:
        raise check.MissingExtraError("flatbuffers", "export", "Exporting") from None
