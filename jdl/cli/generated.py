"""Generated trees as data for the command line: formulas of logic, deeper in the test split."""

import functools
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import from_arrays
from jdl.models.trees import LOGIC, grow, pack

INPUTS = ("word", "children", "schedule")
WORDS = {word: i for i, word in enumerate([*LOGIC.constants, *LOGIC.operators], start=2)}
CLASSES = ("0", "1")
SPLITS = {"train": (8000, (1, 2, 3, 4)), "test": (1000, (6, 7, 8))}  # how many, depths


def trees_of(split: str | None, *, batch_size: int, shuffle: bool = False, **options: Any) -> Any:
    """The split's formulas, packed, labelled with the root's value.

    Args:
      split: "train" or "test", whose formulas are deeper than any of the others.
      batch_size: trees in a batch.
      shuffle: whether to go on for ever, each epoch in a new order.
      **options: `seed` names the orders; what images alone have is passed over.
    """
    check.one_of("--split", split, SPLITS)
    data = from_arrays(
        _packed(split),
        batch_size=batch_size,
        epochs=None if shuffle else 1,
        seed=options.get("seed", 0),
        classes=CLASSES,
    )
    data.shape = (len(WORDS) + 2,)  # all that the net needs to know of its inputs
    return data


@functools.cache
def _packed(split: str) -> dict[str, np.ndarray]:
    count, depths = SPLITS[split]
    rng = np.random.default_rng(list(SPLITS).index(split))
    return pack([grow(LOGIC, depths[i % len(depths)], rng) for i in range(count)], WORDS, CLASSES)
