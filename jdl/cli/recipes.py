"""The models by name, and the settings recommended for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jdl.core import check


class Recipe(NamedTuple):
    """A model by name, with sane settings.

    Attributes:
      build: `build(image_shape, num_classes) -> model`.
      kind: "classifier", which `jdl predict` asks for classes, "autoencoder" or another word.
      optimizer: the recommended optimizer's name.
      steps: the recommended number of steps, on the bundled digits.
      batch_size: the recommended batch size.
      estimator: `estimator(model, optimizer, **options) -> Estimator`; by default the premade one
        of the kind.
      prepare: `prepare(model, data, workdir, seed) -> model`, before the first step of a run.
      pictures: `pictures(estimator, data, workdir) -> paths` of what it drew at the end of a run;
        `data` is the last split evaluated.
    """

    build: Callable[[tuple[int, ...], int], Any]
    kind: str
    optimizer: str
    steps: int
    batch_size: int
    estimator: Callable[..., Any] | None = None
    prepare: Callable[[Any, Any, Path, int], Any] | None = None
    pictures: Callable[[Any, Any, Path], list[Path]] | None = None


def recipe(name: str) -> Recipe:
    """The recipe of that name; an unknown name is refused and the nearest told."""
    return RECIPES[check.one_of("model", name, RECIPES)]


def _cnn(image_shape: tuple[int, ...], num_classes: int) -> Any:
    from jdl.models.cnn import CNN

    return CNN(num_classes=num_classes, units=1024 if min(image_shape[:2]) >= 64 else 128)


def _mlp(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del image_shape
    from jdl.models.mlp import MLP

    return MLP(num_outputs=num_classes, widths=(500, 500))


def _rnn(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del image_shape
    from jdl.models.rnn import RNN

    return RNN(num_outputs=num_classes)


def _autoencoder(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del num_classes
    import math

    from jdl.models.autoencoder import Autoencoder
    from jdl.models.layers import sparse_init

    widths = (1000, 500, 250, 30) if math.prod(image_shape) >= 256 else (128, 64, 16)
    return Autoencoder(widths=widths, kernel_init=sparse_init(15))


RECIPES = {
    "mlp": Recipe(_mlp, "classifier", "adam", 400, 64),
    "cnn": Recipe(_cnn, "classifier", "adam", 400, 64),
    "rnn": Recipe(_rnn, "classifier", "adam", 600, 64),
    "autoencoder": Recipe(_autoencoder, "autoencoder", "adam", 1500, 64),
}
