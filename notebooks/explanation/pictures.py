"""Draws the five pictures of `overview.md`: `python notebooks/explanation/pictures.py [FOLDER]`.

The tar's records and their order, K-FAC's factors and the resumed run are computed, not sketched.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax

import jdl
from jdl.compare import drawing
from jdl.data import digits
from jdl.data.order import key, permuted
from jdl.models import MLP

mpl.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, PINK = drawing.LINES[:4]
INK, MUTED, GRID, PAPER = drawing.INK, drawing.MUTED, drawing.GRID, drawing.PAPER


def canvas(height, width=100.0):
    """Axes without ticks in which one unit is the same in both directions."""
    figure = plt.figure(figsize=(8.4, 8.4 * height / width), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, wide, high, text, color=INK, **options):
    """A rectangle around its text, centred at x, y."""
    shape = mpl.patches.FancyBboxPatch(
        (x - wide / 2, y - high / 2),
        wide,
        high,
        boxstyle="round,pad=0,rounding_size=0.8",
        facecolor=mpl.colors.to_rgba(color, 0.08),
        edgecolor=color,
        linewidth=1.2,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color=INK, **{"fontsize": 9} | options)


def say(axes, x, y, text, **options):
    """Text without a frame."""
    axes.text(x, y, text, **{"fontsize": 9, "color": MUTED, "va": "center"} | options)


def arrow(axes, start, end, color=MUTED, bend=0.0):
    """An arrow from one place to another."""
    axes.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": color,
            "linewidth": 1.2,
            "shrinkA": 0,
            "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}",
        },
    )


def step():
    """One compiled step: what goes in, what the optimizer is given, what comes out."""
    figure, axes = canvas(42)
    shape = mpl.patches.Rectangle((20, 3), 60, 35, facecolor="none", edgecolor=GRID, linewidth=1.5)
    axes.add_patch(shape)
    say(axes, 21.5, 35.5, "one compiled step, the same for every optimizer")
    for y, text in ((28, "batch, key"), (20.5, "θ, model state"), (9, "optimizer state")):
        box(axes, 9, y, 15, 5, text)
    box(axes, 36, 24, 24, 9, "objective f\nmodel, loss, batch, key, state", BLUE)
    box(axes, 65, 13, 22, 13, "optimizer.update\n\nupdates, new state", ORANGE)
    arrow(axes, (16.5, 28), (24, 25.5))
    arrow(axes, (16.5, 20.5), (24, 22.5))
    arrow(axes, (16.5, 9), (54, 9))
    arrow(axes, (48, 26.5), (62, 19.5), BLUE, -0.2)
    say(axes, 57.5, 27.2, "f(θ) and ∇f(θ), always", color=BLUE)
    arrow(axes, (54, 15.5), (41, 19.5), ORANGE, -0.2)
    say(axes, 25.5, 15.8, "asks again, if it wants:\nf, ∇f at other θ; Hv, Gv", color=ORANGE)
    for y, text in ((17, "θ + updates"), (9, "new state, log")):
        box(axes, 91, y, 15, 5, text)
        arrow(axes, (76, y), (83.5, y))
    return figure


def objective():
    """What each optimizer asks of the objective."""
    figure, axes = canvas(42)
    rows = (
        ("sgd, adam, muon, soap, shampoo", 1),
        ("lbfgs, bfgs, nonlinear_cg", 2),
        ("newton", 3),
        ("hessian_free, kfac, natural_gradient", 4),
        ("gauss_newton, levenberg_marquardt", 5),
    )
    columns = (
        ("∇f(θ)", "one gradient"),
        ("f(θ + δ)", "the same batch,\nthe same key"),
        ("Hv", "product with\nthe Hessian"),
        ("Gv = Jᵀ L J v", "product with the\nGauss-Newton matrix"),
        ("J", "a row for\neach example"),
    )
    asked = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 3), 5: (0, 1, 4)}
    for j, (name, meaning) in enumerate(columns):
        x = 42 + 12.5 * j
        axes.text(x, 38.5, name, ha="center", va="center", color=BLUE, fontsize=10)
        say(axes, x, 33.5, meaning, ha="center", fontsize=7.5)
    for i, (names, kind) in enumerate(rows):
        y = 26 - 5.6 * i
        axes.axhline(y + 2.8, color=GRID, linewidth=1)
        axes.text(2, y, names, ha="left", va="center", color=INK, fontsize=9)
        for j in asked[kind]:
            axes.plot(42 + 12.5 * j, y, "o", color=ORANGE, markersize=8)
    return figure


def tar():
    """Twelve records of the bundled tar, their order in an epoch, batches of four."""
    figure, axes = canvas(46)
    batch = next(iter(digits("train", batch_size=1438, epochs=1)))
    chosen = np.arange(12) * 119
    images = batch["image"][chosen, :, :, 0]
    order = permuted(np.arange(12), 12, key(0, 0))
    say(axes, 2, 43.5, "the tar, in the order it was written, and the index: name, offset, size")
    say(
        axes,
        2,
        4.2,
        "epoch 0, seed 0: record π(k) at position k; each one read at a known offset",
    )
    say(
        axes,
        2,
        1.4,
        "batch b is a function of seed and b alone: any thread or host may make it",
    )
    for k in range(12):
        x = 2 + 8.1 * k
        axes.imshow(images[k], extent=(x, x + 6, 34.5, 40.5), cmap="gray_r", zorder=2)
        say(axes, x + 3, 32.8, f"#{chosen[k]}", ha="center", fontsize=7.5)
        color = (BLUE, ORANGE, GREEN)[k // 4]
        record = int(order[k])
        start, end = 2 + 8.1 * record + 3, x + 3
        axes.plot((start, end), (31.6, 17.8), color=color, linewidth=1.0, alpha=0.8, zorder=1)
        axes.imshow(images[record], extent=(x, x + 6, 11, 17), cmap="gray_r", zorder=2)
    for b, color in enumerate((BLUE, ORANGE, GREEN)):
        x = 1.2 + 8.1 * 4 * b
        shape = mpl.patches.Rectangle(
            (x, 10.2), 31.9, 7.6, facecolor="none", edgecolor=color, linewidth=1.5
        )
        axes.add_patch(shape)
        say(axes, x + 15.9, 7.6, f"batch {b}", ha="center", color=color)
    axes.set(xlim=(0, 100), ylim=(0, 46), aspect="auto")
    return figure


def kfac():
    """The exact Gauss-Newton block of a trained net's last layer, and A ⊗ S."""
    batch = next(iter(digits("train", batch_size=1438, epochs=1)))
    x = jnp.asarray(batch["image"].reshape(-1, 64) / 255.0)
    y = jnp.asarray(batch["label"])
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w": 0.3 * jax.random.normal(keys[0], (64, 6)),
        "v": 0.3 * jax.random.normal(keys[1], (7, 10)),
    }

    def inputs(params):
        hidden = jnp.tanh(x @ params["w"])
        return jnp.concatenate([hidden, jnp.ones((len(x), 1))], axis=1)

    def loss(params):
        logits = inputs(params) @ params["v"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    optimizer = optax.adam(0.03)
    state = optimizer.init(params)
    for _ in range(60):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
    a = inputs(params)
    p = jax.nn.softmax(a @ params["v"])
    curved = jnp.einsum("ni,ij->nij", p, jnp.eye(10)) - p[:, :, None] * p[:, None, :]
    exact = jnp.einsum("na,nb,nij->aibj", a, a, curved).reshape(70, 70) / len(x)
    first, second = a.T @ a / len(x), jnp.mean(curved, axis=0)
    product = jnp.kron(first, second)
    error = float(jnp.linalg.norm(exact - product) / jnp.linalg.norm(exact))

    figure, axes = canvas(42)
    limit = float(jnp.abs(exact).max()) / 2

    def matrix(values, x, y, size, text):
        scale = float(jnp.abs(values).max()) / 2 if len(values) < 70 else limit
        axes.imshow(
            values, extent=(x, x + size, y, y + size), cmap="RdBu_r", vmin=-scale, vmax=scale
        )
        say(axes, x + size / 2, y - 3.2, text, ha="center", fontsize=8)

    matrix(exact, 2, 11, 27, "the exact block, 70 × 70:\nmean over images of a aᵀ ⊗ L")
    matrix(product, 34, 11, 27, f"K-FAC's, 70 × 70: A ⊗ S\n{error:.0%} off in Frobenius norm")
    matrix(first, 68, 21, 8, "A, 7 × 7:\nmean of a aᵀ")
    matrix(second, 84, 20, 11, "S, 10 × 10:\nmean of L")
    say(axes, 31.5, 24.5, "≈", fontsize=16, ha="center", color=INK)
    say(axes, 64.5, 24.5, "=", fontsize=16, ha="center", color=INK)
    say(axes, 80, 24.5, "⊗", fontsize=16, ha="center", color=INK)
    say(axes, 65, 36, "a: inputs of the layer; L: Hessian of the\nloss in its outputs", fontsize=8)
    say(axes, 65, 8, "(A ⊗ S)⁻¹ = A⁻¹ ⊗ S⁻¹:\ntwo small inverses", color=ORANGE)
    axes.set(xlim=(0, 100), ylim=(0, 42), aspect="auto")
    return figure


def resume():
    """Training losses of a run in one piece, and of one that a new Estimator went on with."""

    def losses(folder, *pieces):
        for end in pieces:
            estimator = jdl.classifier(
                MLP(widths=(32,), dropout=0.2), optax.sgd(0.3), workdir=folder, log_every=1, seed=3
            )
            train = digits("train", batch_size=64, epochs=None, shuffle=True, seed=1)
            estimator.train(train, max_steps=end)
        rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if row["split"] == "train"]

    with tempfile.TemporaryDirectory() as folder:
        whole = losses(f"{folder}/whole", 40)
        parts = losses(f"{folder}/parts", 18, 40)
    assert whole == parts
    figure = plt.figure(figsize=(8.4, 3.5), facecolor=PAPER)
    axes = figure.add_axes((0.09, 0.15, 0.53, 0.79))
    axes.set_facecolor(PAPER)
    steps = np.arange(1, len(whole) + 1)
    axes.plot(steps, whole, color=BLUE, linewidth=1.6)
    axes.plot(steps[:18], parts[:18], "o", color=ORANGE, markersize=4)
    axes.plot(steps[18:], parts[18:], "o", color=GREEN, markersize=4)
    axes.axvline(18.5, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
    axes.annotate("the run is stopped", (18.9, max(whole)), color=MUTED, fontsize=9, va="top")
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel("training loss", color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    for y, color, text in (
        (0.86, BLUE, "a run in one piece"),
        (0.76, ORANGE, "another, up to its checkpoint"),
        (0.66, GREEN, "a new Estimator goes on: the same bits"),
    ):
        figure.text(0.66, y, text, color=color, fontsize=9)
    saved = (
        "In a checkpoint: parameters; the states of\n"
        "model, optimizer and hooks; step, seconds,\n"
        "random key; the position in the data, one\n"
        "number; averaged parameters"
    )
    figure.text(0.66, 0.2, saved, color=INK, fontsize=8, linespacing=1.5)
    return figure


PICTURES = (step, objective, tar, kfac, resume)

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
    for draw in PICTURES:
        figure = draw()
        figure.savefig(folder / f"{draw.__name__}.png", dpi=128, facecolor=PAPER)
        plt.close(figure)
