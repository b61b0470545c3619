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
    count: int = 4,
) -> Path:
    """Draws trees of about 25 nodes: a node's color is the probability of class 1.

    The net has two classes and `every_node=True`; `packed` are arrays of `jdl.models.trees.pack`.
    A square marks a node whose class is wrong.
    """
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    sizes = np.sum(packed["word"][:100] > 0, axis=1)
    chosen = np.argsort(np.abs(sizes - 25), kind="stable")[:count]
    some = {name: array[chosen] for name, array in packed.items()}
    leaves = [(0, 0), (0, some["word"].shape[1] - some["children"].shape[1]), (0, 0)]
    children = np.pad(some["children"], leaves, constant_values=some["word"].shape[1])
    inputs = (some[name] for name in ("word", "children", "schedule"))
    logits = np.asarray(net.apply({"params": params}, *inputs))
    shares = 1.0 / (1.0 + np.exp(logits[..., 0] - logits[..., 1]))
    names = {number: word for word, number in words.items()} | {0: "", 1: "?"}
    names = {number: {"true": "1", "false": "0"}.get(word, word) for number, word in names.items()}
    # Light enough for black words.
    colors = ListedColormap(0.4 + 0.6 * matplotlib.colormaps["coolwarm"](np.linspace(0, 1, 64)))
    placed = [_places(own) for own in children]
    widest = max(x for places in placed for x, _ in places.values()) + 1
    figure = Figure(figsize=(max(6.0, 0.34 * widest), 3.2 * len(placed)), layout="constrained")
    every = figure.subplots(len(placed), 1, squeeze=False)[:, 0]
    for axes, tree, places in zip(every, range(len(placed)), placed, strict=True):
        at = np.array(list(places.values()))
        for node, (x, y) in places.items():
            for child in children[tree][node]:
                if child in places:
                    axes.plot([x, places[child][0]], [y, places[child][1]], color="0.6", lw=0.8)
        own = {"c": shares[tree][list(places)], "cmap": colors, "vmin": 0, "vmax": 1}
        shown = axes.scatter(at[:, 0], at[:, 1], **own, s=260, zorder=2)
        for node, (x, y) in places.items():
            word = names[int(some["word"][tree, node])]
            axes.text(x, y, word, size=8, ha="center", va="center", zorder=3)
        wrong = [n for n in places if (shares[tree][n] > 0.5) != some["labels"][tree, n]]
        at = np.array([places[n] for n in wrong]).reshape(-1, 2)
        axes.scatter(*at.T, marker="s", s=330, facecolor="none", edgecolor="black", zorder=4)
        truth = f"the net says {shares[tree][0]:.3f}, true is {int(some['label'][tree])}"
        axes.set_title(
            f"{len(places)} nodes, {len(wrong)} wrong; root: {truth}", size=10, loc="left"
        )
        axes.set_axis_off()
        axes.margins(0.03, 0.15)
    figure.colorbar(shown, ax=list(every), label="probability of true; squares: wrong", shrink=0.4)
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
