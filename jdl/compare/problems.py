"""Problems: a model, a loss, data, and a target."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jdl import losses, metrics
from jdl.compare.identity import as_label
from jdl.compare.results import Target
from jdl.core import check
from jdl.core.types import Batch, Loss, Metric, Params
from jdl.data import Holdout, from_arrays, from_tar, splits
from jdl.data.tar.paths import Paths, expand
from jdl.models.cnn import CNN

# (batch_size, seed, epochs) -> batches. For `epochs=None` an endless sequence of whole batches,
# shuffled by the seed; for `epochs=1` every example once, the last batch smaller, or padded with a
# "mask".
Data: TypeAlias = Callable[[int, int, int | None], Iterable[Batch]]

Build: TypeAlias = Callable[[tuple[int, ...], int], Any]  # (image shape, classes) -> model

VALIDATION = 1 / 6  # share of the training examples on which settings are chosen


class Split(NamedTuple):
    """The training data in two, for tuning: to train on, and to choose settings by.

    Attributes:
      train: as `Problem.train`, without the validation examples.
      validation: the validation examples.
      size: the number of examples of `train`.
    """

    train: Data
    validation: Data
    size: int


class Problem(NamedTuple):
    """A problem for the optimizers of a study.

    Attributes:
      name: its label, and the name of its directory.
      model: makes the model: a Linen module or a `jdl.Model`.
      loss: `loss(outputs, batch) -> float[B]`.
      train: `train(batch_size, seed, epochs)`, see `Data`.
      test: likewise; None if nothing is held out.
      size: the number of training examples.
      target: what counts as solved, fixed before anything runs.
      metrics: name -> `metric(outputs, batch) -> float[B]`, evaluated besides the loss.
      inputs: the entry of the batch that the model takes, or a tuple of several.
      about: facts for the report, as plain values; if they change, trials are run again.
      regularizer: a scalar function of the parameters, added to the training loss.
      split: the training data in two, for tuning; None to choose settings by the training loss.
      version: changes whenever results before and after cannot be compared.
    """

    name: str
    model: Callable[[], Any]
    loss: Loss
    train: Data
    test: Data | None
    size: int
    target: Target
    metrics: Mapping[str, Metric] = {"accuracy": metrics.accuracy}
    inputs: str | tuple[str, ...] = "image"
    about: Mapping[str, Any] = {}
    regularizer: Callable[[Params], Any] | None = None
    split: Split | None = None
    version: int = 1

    def evaluated(self) -> dict[str, Data]:
        """The data that trials are evaluated on: training and test data."""
        given = {"train": self.train, "test": self.test}
        return {name: data for name, data in given.items() if data is not None}


def arrays_problem(
    name: str,
    model: Callable[[], Any],
    loss: Loss,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray] | None = None,
    *,
    validation: float = VALIDATION,
    **fields: Any,
) -> Problem:
    """A problem whose data is arrays in memory.

    Args:
      name: its label.
      model: makes the model.
      loss: `loss(outputs, batch) -> float[B]`.
      train: entry of the batch -> array [n, …].
      test: likewise; None if nothing is held out.
      validation: the share of `train` on which settings are chosen, in [0, 0.9]; 0 for none.
      **fields: further fields of `Problem`, `target` among them.

    >>> from jdl.models import MLP
    >>> rows = {"image": np.eye(12, dtype=np.float32), "label": np.arange(12) % 3}
    >>> net = lambda: MLP(widths=(4,), num_outputs=3)
    >>> goal = Target("train_loss", "at most", 0.1)
    >>> problem = arrays_problem("rows", net, losses.softmax_cross_entropy, rows, target=goal)
    >>> problem.size, problem.split.size
    (12, 10)
    """
    check.in_range("validation", validation, 0.0, 0.9)
    size = len(next(iter(train.values())))
    order = np.random.default_rng(0).permutation(size)
    held = round(size * validation)
    split = None
    if held:
        parts = [{k: x[rows] for k, x in train.items()} for rows in (order[held:], order[:held])]
        kept, rest = (_batches(from_arrays, part) for part in parts)
        split = Split(kept, rest, size - held)
    about = {
        "test examples": 0 if test is None else len(next(iter(test.values()))),
        "model": one_line(model()),
        "loss": getattr(loss, "__name__", None) or getattr(loss, "func", loss).__name__,
        "fingerprint of the data": _digest(train, test or {}),
        **fields.pop("about", {}),
    }
    return Problem(
        name,
        model,
        loss,
        _batches(from_arrays, dict(train)),
        None if test is None else _batches(from_arrays, dict(test)),
        size,
        about=about,
        split=split,
        **fields,
    )


def _digest(*parts: Mapping[str, np.ndarray]) -> str:
    """Other data makes another problem, whose trials are run again."""
    found = hashlib.blake2b(digest_size=6)
    for name, x in (item for part in parts for item in sorted(part.items())):
        x = np.ascontiguousarray(x)
        content = x.data if x.dtype.kind in "biufc" else repr(x.tolist()).encode()
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(content)
    return found.hexdigest()


def _batches(source: Callable[..., Iterable[Batch]], *args: Any, **options: Any) -> Data:
    """`Data` from `jdl.data.from_arrays` or `from_tar` with these arguments."""
    return lambda batch_size, seed, epochs: source(
        *args, batch_size=batch_size, seed=seed, epochs=epochs, **options
    )


def plain_cnn(image_shape: tuple[int, ...], num_classes: int) -> Any:
    """The classic CNN without dropout; its dense layer is narrower for small images."""
    units = 1024 if min(image_shape[:2]) >= 64 else 128
    return CNN(num_classes=num_classes, units=units, dropout=0.0)


def tar_problem(
    paths: Paths,
    model: Build = plain_cnn,
    *,
    name: str | None = None,
    target: Target | None = None,
    loss: Loss = losses.softmax_cross_entropy,
    metrics: Mapping[str, Metric] = {"accuracy": metrics.accuracy},
    inputs: str | tuple[str, ...] = "image",
    about: Mapping[str, Any] = {},
    **options: Any,
) -> Problem:
    """A problem of the images in tar archives.

    If their members are under `train/` and `test/`, these are the training and the test data; else
    all of it is training data. Settings are chosen on a sixth of the training images, by a hash of
    their names.

    Args:
      paths: as for `jdl.data.from_tar`.
      model: `model(image_shape, num_classes)` builds it; without dropout a full-batch method
        minimizes a fixed function.
      name: its label; by default made of the archive's name and the model's.
      target: by default an accuracy of at least 90 %, on the test data if there is any.
      loss: `loss(outputs, batch) -> float[B]`.
      metrics: name -> `metric(outputs, batch) -> float[B]`.
      inputs: the entry of the batch that the model takes.
      about: further facts for the report.
      **options: further arguments of `from_tar`: size, grayscale, label, on_error …

    >>> from jdl.data import digits_path
    >>> problem = tar_problem(digits_path(), size=(8, 8), grayscale=True)
    >>> problem.size, str(problem.target)
    (1438, 'test accuracy ≥ 90 %')
    """
    keep_index = bool(options.get("keep_index", True))
    which = {name: options[name] for name in ("include", "exclude") if name in options}
    held_out = set(splits(paths, keep_index=keep_index, **which)) == {"train", "test"}
    train_split, test_split = ("train", "test") if held_out else (None, None)
    first = from_tar(paths, split=train_split, batch_size=1, epochs=1, **options)
    classes = first.classes
    image_shape = tuple(first.element_spec["image"].shape[1:])
    if held_out:
        # Raises here, before anything runs, for labels that the training data does not have.
        from_tar(paths, split=test_split, batch_size=1, classes=classes, **options)
    built = model(image_shape, len(classes or ()))

    def data(split: str | Holdout | None) -> Data:
        return _batches(from_tar, paths, split=split, classes=classes, **options)

    def side(part: str) -> Holdout:
        return Holdout(part, VALIDATION, folder=train_split)

    split = None
    if first.num_records >= 60:  # of fewer records, a random sixth may be empty
        kept: Any = data(side("train"))(1, 0, 1)
        split = Split(data(side("train")), data(side("test")), kept.num_records)
    archives = [Path(path).name for path in expand(paths)]
    if name is None:
        name = as_label(f"{Path(archives[0]).stem}-{type(built).__name__.lower()}")
    part = "test" if held_out else "train"
    listed = {
        "archives": archives,
        "bytes": [os.path.getsize(path) for path in expand(paths) if os.path.exists(path)],
        "image": "×".join(map(str, image_shape)),
        "classes": len(classes or ()),
        "held out": "test/" if held_out else "nothing: the metrics are of the training data",
        "model": one_line(built),
        "loss": getattr(loss, "__name__", repr(loss)),
        **{key: value for key, value in options.items() if key != "keep_index"},
        **about,
    }
    return Problem(
        name=name,
        model=lambda: built,
        loss=loss,
        train=data(train_split),
        test=data(test_split) if held_out else None,
        size=first.num_records,
        target=target or Target(f"{part}_accuracy", "at least", 0.9),
        metrics=metrics,
        inputs=inputs,
        about=listed,
        split=split,
    )


def one_line(model: Any) -> str:
    """A model as the call of its constructor, with functions by name.

    >>> from jdl.models import MLP
    >>> one_line(MLP(num_outputs=3, widths=(8,)))[:31]
    'MLP(widths=(8,), num_outputs=3,'
    """
    if not dataclasses.is_dataclass(model):
        return type(model).__name__
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    call = ", ".join(f"{name}={getattr(model, name)!r}" for name in fields)
    call = re.sub(r"<function (?:[\w.]*\.)?(?:<locals>\.)?(\w+)[^>]*>", r"\1", call)
    return f"{type(model).__name__}({call})"
