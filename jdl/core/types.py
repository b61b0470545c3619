"""The vocabulary every other room speaks: modes, pytrees, and the letters of shapes.

Shape letters, in docstrings and annotations alike:

- B  examples in a batch       - H, W, C  an image's height, width and channels
- T  steps of a sequence       - F, K     features, classes
"""

import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any
Params: TypeAlias = Any  # a pytree of floating-point arrays
ModelState: TypeAlias = Any  # what a model carries from step to step, e.g. batch statistics
Outputs: TypeAlias = Any  # what a model gives: an array or a pytree, leading axis B
Batch: TypeAlias = Mapping[str, Any]  # name -> array with leading axis B
Key: TypeAlias = jax.Array  # a PRNG key

Loss: TypeAlias = Callable[[Outputs, Batch], jax.Array]  # (outputs, batch) -> float[B]
Metric: TypeAlias = Callable[[Outputs, Batch], jax.Array]  # (outputs, batch) -> float[B]


class Mode(enum.StrEnum):
    """What a model is run for.

    >>> Mode("train") is Mode.TRAIN, str(Mode.PREDICT)
    (True, 'predict')
    """

    TRAIN = "train"  # dropout drops, batch statistics move
    EVALUATE = "evaluate"  # outputs are compared with labels
    PREDICT = "predict"  # there are no labels
