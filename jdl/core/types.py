"""Types that all packages share, and the letters of array shapes.

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
ModelState: TypeAlias = Any  # a model's other arrays, such as batch statistics
Outputs: TypeAlias = Any  # a model's outputs: an array or a pytree, leading axis B
Batch: TypeAlias = Mapping[str, Any]  # name -> array with leading axis B
Key: TypeAlias = jax.Array  # a PRNG key

Loss: TypeAlias = Callable[[Outputs, Batch], jax.Array]  # (outputs, batch) -> float[B]
Metric: TypeAlias = Callable[[Outputs, Batch], jax.Array]  # (outputs, batch) -> float[B]


class Mode(enum.StrEnum):
    """The purpose of a model's run.

    >>> Mode("train") is Mode.TRAIN, str(Mode.PREDICT)
    (True, 'predict')
    """

    TRAIN = "train"  # with dropout, and batch statistics updated
    EVALUATE = "evaluate"  # outputs are compared with labels
    PREDICT = "predict"  # there are no labels
