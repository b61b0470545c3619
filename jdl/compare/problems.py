"""Problems: a model, a loss, data, and the target that counts as solved."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jdl import losses, metrics
from jdl.compare.results import Target
from jdl.core.types import Batch, Loss, Metric

# (batch_size, seed, epochs) -> batches. For `epochs=None` without end, shuffled by the seed, whole;
# for `epochs=1` every example once, the last batch smaller, or padded with a "mask".
Data: TypeAlias = Callable[[int, int, int | None], Iterable[Batch]]

Build: TypeAlias = Callable[[tuple[int, ...], int], Any]  # (image shape, classes) -> model


class Problem(NamedTuple):
    """What the optimizers of a study are to solve.

    Attributes:
      name: its label, and its directory.
      model: makes the model: a Linen module or a `jdl.Model`.
      loss: `loss(outputs, batch) -> float[B]`.
      train: `train(batch_size, seed, epochs)`, see `Data`.
      test: likewise; None where nothing is held out.
      size: how many training examples there are.
      target: fixed before anything runs.
      metrics: name -> `metric(outputs, batch) -> float[B]`, evaluated besides the loss.
      inputs: the entry of the batch that the model is given, or a tuple of several.
      about: what the report lists, by plain values; where it differs, a trial is run anew.
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


def digits_cnn(target: Target | None = None) -> Problem:
    """The bundled 8×8 handwritten digits and a small CNN, which every method can solve in seconds.

    No dropout: a method that sees all the data at each step is to see one and the same function.

    >>> problem = digits_cnn()
    >>> problem.size, str(problem.target)
    (1438, 'test accuracy ≥ 95 %')
    """
    from jdl.data import digits_path

    def build(image_shape: tuple[int, ...], num_classes: int) -> Any:
        del image_shape
        from jdl.models.cnn import CNN, Block

        blocks = (Block(filters=16, kernel_size=(3, 3)), Block(filters=32, kernel_size=(3, 3)))
        return CNN(num_classes=num_classes, blocks=blocks, units=64, dropout=0.0)

    return tar_problem(
        digits_path(),
        build,
        name="digits-cnn",
        target=target or Target("test_accuracy", "at least", 0.95),
        about={"data": "the 1,797 bundled handwritten digits (UCI / scikit-learn, CC BY 4.0)"},
        grayscale=True,
        keep_index=False,
    )


def plain_cnn(image_shape: tuple[int, ...], num_classes: int) -> Any:
    """The classic CNN without dropout; its dense layer is narrower for small images."""
    from jdl.models.cnn import CNN

    units = 1024 if min(image_shape[:2]) >= 64 else 128
    return CNN(num_classes=num_classes, units=units, dropout=0.0)


def tar_problem(
    paths: Any,
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

    Where their members lie under `train/` and `test/`, the one is trained on and the other tested
    on; else everything is trained on and nothing is held out.

    Args:
      paths: as for `jdl.data.from_tar`.
      model: `model(image_shape, num_classes)` builds it; without dropout, full-batch methods see
        one function all the way.
      name: its label; by default made of the archive's name and the model's.
      target: by default an accuracy of at least 90 %, on the test data where there are any.
      loss: `loss(outputs, batch) -> float[B]`.
      metrics: name -> `metric(outputs, batch) -> float[B]`.
      inputs: the entry of the batch that the model is given.
      about: what else the report is to list.
      **options: further arguments of `from_tar`: size, grayscale, label, on_error …
    """
    from jdl.data import from_tar, splits
    from jdl.data.paths import expand

    keep_index = bool(options.get("keep_index", True))
    held_out = set(splits(paths, keep_index=keep_index)) == {"train", "test"}
    train_split, test_split = ("train", "test") if held_out else (None, None)
    first = from_tar(paths, split=train_split, batch_size=1, epochs=1, **options)
    classes = first.classes
    image_shape = tuple(first.element_spec["image"].shape[1:])
    if held_out:
        # Labels that training does not know are told here, before anything runs.
        from_tar(paths, split=test_split, batch_size=1, classes=classes, **options)
    built = model(image_shape, len(classes or ()))

    def data(split: str | None) -> Data:
        def batches(batch_size: int, seed: int, epochs: int | None) -> Iterable[Batch]:
            return from_tar(
                paths,
                split=split,
                classes=classes,
                batch_size=batch_size,
                seed=seed,
                epochs=epochs,
                **options,
            )

        return batches

    archives = [Path(path).name for path in expand(paths)]
    if name is None:
        name = f"{Path(archives[0]).stem}-{type(built).__name__.lower()}"
        name = re.sub(r"[^A-Za-z0-9._+=-]+", "_", name)
    split = "test" if held_out else "train"
    listed = {
        "archives": archives,
        "image": "×".join(map(str, image_shape)),
        "classes": len(classes or ()),
        "held out": "test/" if held_out else "nothing: the metrics are of the training data",
        "model": _one_line(built),
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
        target=target or Target(f"{split}_accuracy", "at least", 0.9),
        metrics=metrics,
        inputs=inputs,
        about=listed,
    )


def _one_line(model: Any) -> str:
    """A model as its constructor's call, functions by their names.

    >>> from jdl.models import MLP
    >>> _one_line(MLP(num_outputs=3, widths=(8,)))[:31]
    'MLP(widths=(8,), num_outputs=3,'
    """
    if not dataclasses.is_dataclass(model):
        return type(model).__name__
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    told = ", ".join(f"{name}={getattr(model, name)!r}" for name in fields)
    told = re.sub(r"<function (?:[\w.]*\.)?(?:<locals>\.)?(\w+)[^>]*>", r"\1", told)
    return f"{type(model).__name__}({told})"
