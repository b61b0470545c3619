"""A picture of trees: each node's word, and the probability that a recursive net gives it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jdl.core.types import Params
from jdl.models.recursive import TreeLSTM


def draw_trees(
    net: TreeLSTM,
    params: Params,
    packed: Mapping[str, np.ndarray],
    words: Mapping[str, int],
    path: Path,
    count: int = 6,
) -> Path:
    """Draws the first trees: a node's color is the probability of class 1, a cross marks errors.

    The net has two classes and `every_node=True`; `packed` are arrays of `jdl.models.trees.pack`.
    """
    from matplotlib.figure import Figure

    some = {name: array[:count] for name, array in packed.items()}
    leaves = [(0, 0), (0, some["word"].shape[1] - some["children"].shape[1]), (0, 0)]
    children = np.pad(some["children"], leaves, constant_values=some["word"].shape[1])
    inputs = (some[name] for name in ("word", "children", "schedule"))
    logits = np.asarray(net.apply({"params": params}, *inputs))
    shares = 1.0 / (1.0 + np.exp(logits[..., 0] - logits[..., 1]))
    names = {number: word for word, number in words.items()} | {0: "", 1: "?"}
    columns = min(count, 3)
    rows = -(-len(some["word"]) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    for i in range(len(some["word"])):
        axes = figure.add_subplot(rows, columns, i + 1)
        places = _places(children[i])
        for node, (x, y) in places.items():
            for child in children[i][node]:
                if child in places:
                    axes.plot([x, places[child][0]], [y, places[child][1]], color="0.7", lw=0.8)
        at = np.array([places[node] for node in places])
        colors = shares[i][list(places)]
        axes.scatter(at[:, 0], at[:, 1], c=colors, cmap="coolwarm", vmin=0, vmax=1, s=150, zorder=2)
        for node, (x, y) in places.items():
            word = names[int(some["word"][i, node])]
            word = {"true": "1", "false": "0"}.get(word, word)
            axes.text(x, y, word, size=6, ha="center", va="center", zorder=3)
        wrong = [n for n in places if (shares[i][n] > 0.5) != some["labels"][i, n]]
        marked = np.array([places[n] for n in wrong]).reshape(-1, 2)
        axes.scatter(marked[:, 0], marked[:, 1], marker="x", s=300, color="black", zorder=4)
        axes.set_title(f"root: p(true) = {shares[i][0]:.3f}, is {bool(some['label'][i])}", size=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    return path


def _places(children: np.ndarray) -> dict[int, tuple[float, float]]:
    """Node -> (x, −depth): leaves side by side, parents above the middle of their children."""
    absent = len(children)
    order, depth = [], {0: 0}
    todo = [0]
    while todo:  # parents before children, left before right
        node = todo.pop()
        order.append(node)
        below = [int(k) for k in children[node] if k < absent]
        depth |= dict.fromkeys(below, depth[node] + 1)
        todo += below[::-1]
    x: dict[int, float] = {}
    leaves = 0
    for node in order:
        if (children[node] == absent).all():
            x[node], leaves = float(leaves), leaves + 1
    for node in reversed(order):
        if node not in x:
            x[node] = float(np.mean([x[int(k)] for k in children[node] if k < absent]))
    return {node: (x[node], -float(depth[node])) for node in order}
