"""A Python file's model, loss and data as one more recipe and data set of `jdl train`."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import optax

from jdl.core import check
from jdl.core.types import Batch
from jdl.data import Batches, from_arrays
from jdl.train.estimator import Estimator
from jdl.train.model_file import Arrays, ModelFile, checked, load
from jdl.train.step import scale_images


def is_file(name: str) -> bool:
    """Whether a model's or data set's name is that of a Python file."""
    return name.endswith(".py")


def absolute(name: str) -> str:
    """The name; of a Python file its absolute path."""
    return str(Path(name).absolute()) if is_file(name) else name


def sha256(path: str) -> str:
    """The fingerprint of a file's bytes."""
    if not Path(path).is_file():
        raise check.SourceError(f"There is no model file {path}.")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def opened(path: str) -> ModelFile:
    """The file, executed once in a process while it is the same."""
    return _opened(absolute(path), sha256(path))


_opened = functools.lru_cache(4)(lambda path, digest: load(path))


def parts(path: str) -> dict[str, Arrays]:
    """The arrays of the file's `data` as "train", and of its `test` as "test"."""
    return _parts(absolute(path), sha256(path))


@functools.lru_cache(2)
def _parts(path: str, digest: str) -> dict[str, Arrays]:
    file = _opened(path, digest)
    file.must_define("data")
    return file.parts()


def batches_of(
    path: str, *, split: str | None, batch_size: int, classes: Any = None, **options: Any
) -> Batches:
    """Batches of the file's arrays: one pass, or without end if shuffled; options as for images."""
    shuffle = options.get("shuffle", False)
    return from_arrays(
        parts(path)[split or "train"],
        batch_size=batch_size,
        epochs=options.get("epochs", None if shuffle else 1),
        shuffle=shuffle,
        seed=options.get("seed", 0),
        classes=opened(path).class_names(parts(path)["train"]) if classes is None else classes,
    )


def inputs(model: str, data: str, batch_size: int) -> tuple[list[Any], int]:
    """What the model takes of a batch of the file's arrays, as shapes; and the number of classes.

    Args:
      model: the model's file.
      data: the file of its data.
      batch_size: of the batch.
    """
    arrays, names = parts(data)["train"], opened(model).inputs
    batch = {
        k: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for k, x in arrays.items()
    }
    scaled = jax.eval_shape(functools.partial(scale_images, inputs=names), batch)
    found = [scaled[name] for name in ((names,) if isinstance(names, str) else names)]
    return found, len(opened(data).class_names(arrays))


def facts(file: ModelFile, source: str, some: Batch, classes: tuple[str, ...]) -> dict[str, Any]:
    """Checks the file on the data it will be trained on; returns fields of `RunConfig`.

    Args:
      file: that defines model and loss.
      source: the data's name.
      some: some of them, where they are images.
      classes: their names.
    """
    of_file = is_file(source)
    arrays = parts(source) if of_file else {"train": {k: x for k, x in some.items() if k != "mask"}}
    found = checked(file, arrays, len(classes))
    one_each = isinstance(found.outputs, jax.Array) and found.outputs.ndim == 2
    outputs = found.outputs.shape[1] if one_each else 0
    if of_file and outputs > len(classes) > 0 and opened(source).get("classes") is None:
        classes = tuple(map(str, range(outputs)))  # the last ones have no examples
    return {
        "file_kind": "classifier" if classes and outputs == len(classes) else "own",
        "file_sha256": sha256(str(file.path)),
        "classes": classes,
        "image_shape": found.image_shape,
    }


def estimator(
    file: ModelFile,
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    metrics: Any = None,
    **options: Any,
) -> Estimator:
    """An Estimator of the file's loss, metrics and inputs; `metrics` are further ones."""
    own = file.metrics(num_classes)
    own = own if metrics is None else {**(own if isinstance(own, dict) else {}), **metrics}
    return Estimator(model, file.loss, optimizer, metrics=own, inputs=file.inputs, **options)
