"""A file of trees as data: bracketed or, named .conllu, dependency trees; every node is a label."""

import functools
import logging
from typing import Any

from jdl.core import check
from jdl.data import Batches
from jdl.models.trees import Layout, Tree, pack, read_bracketed, read_conllu, vocabulary
from jdl.recipes.formulas import passes

MOST_ORDERED = 4  # children of a node, for a net that tells their places apart
logger = logging.getLogger("jdl.data")


@functools.cache
def read(path: str, on_error: str) -> tuple[Tree, ...]:
    """The file's trees; with "skip" those that can be read, and the log counts the others."""
    bad: list[check.DataError] = []
    reader = read_conllu if path.endswith(".conllu") else read_bracketed
    trees = tuple(reader(path, bad.append if on_error == "skip" else None))
    if bad:
        logger.warning("skipped %d of %d trees: %s", len(bad), len(bad) + len(trees), bad[0])
    check.argument(bool(trees), "--data", "a file with at least one tree", path)
    return trees


def learned(path: str, on_error: str) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Its words, in the order of their numbers; and (vocabulary, children), the net's shape.

    The children are those of a node at most; 0 for many, of which a net forgets the order.
    """
    trees = read(path, on_error)
    words, most = tuple(vocabulary(trees)), Layout.of(trees).children
    return words, (len(words) + 2, most if most <= MOST_ORDERED else 0)


def batches_of(
    path: str, *, size: Any, words: Any, on_error: str = "raise", **options: Any
) -> Batches:
    """The trees, packed; `size` and `words` as `learned` gives them, others as for images."""
    trees = read(path, on_error)
    classes = options.get("classes") or sorted({x for tree in trees for x in tree.labels if x})
    if options.get("label") == "none":
        trees = tuple(tree._replace(labels=("",) * len(tree.words)) for tree in trees)
    layout = Layout.of(trees)
    layout = layout._replace(children=size[1] or layout.children)
    numbers = {word: number for number, word in enumerate(words, start=2)}
    arrays = pack(trees, numbers, classes, layout)
    return passes(arrays, **options | {"classes": tuple(classes)})
