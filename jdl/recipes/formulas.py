"""Generated trees as data: formulas of propositional logic, deeper in the test split."""

import functools
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import Batches, from_arrays
from jdl.models.trees import LOGIC, grow, pack

INPUTS = ("word", "children", "schedule")
WORDS = {word: i for i, word in enumerate([*LOGIC.constants, *LOGIC.operators], start=2)}
SHAPE = (len(WORDS) + 2,)  # the size of the vocabulary: all that the net must know of its inputs
CLASSES = ("0", "1")
SPLITS = {"train": (8000, (1, 2, 3, 4)), "test": (1000, (6, 7, 8))}  # number, depths


def trees_of(split: str | None, **options: Any) -> Batches:
    """The formulas of "train" or "test", labelled with their value; options as for `passes`."""
    check.one_of("--split", split, SPLITS)
    return passes(packed_trees(split), **options | {"classes": CLASSES})


def passes(
    arrays: Any, *, classes: Any, batch_size: int, shuffle: bool = False, seed: int = 0, **_: Any
) -> Batches:
    """One pass over packed trees; shuffled, passes without end. Other options are of images."""
    epochs = None if shuffle else 1
    return from_arrays(arrays, batch_size=batch_size, epochs=epochs, seed=seed, classes=classes)


@functools.cache
def packed_trees(split: str) -> dict[str, np.ndarray]:
    """The split's arrays, as `jdl.models.trees.pack`."""
    count, depths = SPLITS[split]
    rng = np.random.default_rng(list(SPLITS).index(split))
    return pack([grow(LOGIC, depths[i % len(depths)], rng) for i in range(count)], WORDS, CLASSES)
