"""Kernels shared by positions, masked examples and tied layers, against NumPy."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core.objective import Objective
from jdl.losses import squared_error
from jdl.optim import kfac_for
from jdl.optim.kronecker import factors, moments
from jdl.optim.kronecker.probes import Probe

B, T, D, K = 4, 4, 3, 2  # as many positions as examples


pytestmark = pytest.mark.usefixtures("float64")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def factored(predict, params, x, mask=None, **options):
    """(A, G, D) of the one kernel of a model, in a batch of x and mask."""
    batch = {"x": jnp.asarray(x)} | ({} if mask is None else {"mask": jnp.asarray(mask)})
    batch["label"] = jnp.zeros(predict(params, batch).shape)
    objective = Objective.from_fns(predict, squared_error, batch)
    found = moments.find_layers(objective, params)
    ((i, layer),) = found.known.items()
    first, last = map(jnp.zeros, factors.sides(layer, factors.Options()))
    zeros = {i: Probe(first, last, jnp.zeros(first.shape[:1]))}
    (drawn, rest) = jax.jit(
        lambda p: moments.second_moments(
            objective, p, found, zeros, {}, jax.random.key(0), "gauss_newton", **options
        )
    )(params)
    _, d, k = layer.shape
    sides = zip(
        (drawn[i].first[0], drawn[i].last[0]), (d + (layer.bias is not None), k), strict=True
    )
    return *(x[(slice(n),) * x.ndim] for x, n in sides), rest


X, W = numbers(B, T, D), numbers(D, K, seed=1)
MASK = np.array([1.0, 0.0, 1.0, 1.0])
LAYOUTS = {
    "examples first": lambda w, x: jnp.tanh(x @ w),
    "time first": lambda w, x: jnp.tanh(x.swapaxes(0, 1) @ w).swapaxes(0, 1),
    "flattened": lambda w, x: jnp.tanh(x.reshape(-1, D) @ w).reshape(-1, T, K),
    "one example at a time": lambda w, x: jax.vmap(lambda x: jnp.tanh(x @ w))(x),
    "step by step": lambda w, x: jax.lax.scan(
        lambda h, x: (h, jnp.tanh(x @ w)), 0.0, x.swapaxes(0, 1)
    )[1].swapaxes(0, 1),
}


def model(layer):
    return lambda p, batch: layer(p["w"], batch["x"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_position_is_a_row_or_each_example_and_masked_ones_are_none(layout):
    x, predict, params = X[MASK > 0], model(LAYOUTS[layout]), {"w": jnp.asarray(W)}
    slope = 1 - np.tanh(x @ W) ** 2  # each output has one position's gradient
    want = np.diag((slope**2).sum((0, 1))) / len(x)
    a, g, _ = factored(predict, params, X, MASK)
    np.testing.assert_allclose(a, np.einsum("btd,bte->de", x, x) / x[..., 0].size, rtol=1e-9)
    np.testing.assert_allclose(g, want, rtol=1e-9)
    if layout == "step by step":  # where positions are steps, not an axis
        return
    a, g, _ = factored(predict, params, X, MASK, sharing="reduce")
    np.testing.assert_allclose(a, np.einsum("bd,be->de", x.mean(1), x.mean(1)) / len(x), rtol=1e-9)
    np.testing.assert_allclose(g, want, rtol=1e-9)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("layout", list(LAYOUTS)[:4])
def test_reduced_factors_are_exact_for_the_mean_over_positions(layout, mask):
    linear = {k: lambda w, x, f=f: jnp.arctanh(f(w, x)).mean(1) for k, f in LAYOUTS.items()}[layout]
    weights = np.ones(B) if mask is None else mask
    a, g, _ = factored(model(linear), {"w": jnp.asarray(W)}, X, mask, sharing="reduce")
    mean = X[weights > 0].mean(1)
    np.testing.assert_allclose(np.kron(a, g), np.kron(mean.T @ mean / len(mean), np.eye(K)), 1e-6)


@pytest.mark.parametrize("shape", [(B, D), (B, 1, D), (B, 1, 1, D)])
def test_with_one_position_an_example_both_kinds_of_sharing_are_the_plain_factors(shape):
    x, params = numbers(*shape), {"w": jnp.asarray(W)}
    rows = x.reshape(B, D)[MASK > 0]
    slope = 1 - np.tanh(rows @ W) ** 2
    for sharing in ("expand", "reduce"):
        a, g, _ = factored(model(lambda w, x: jnp.tanh(x @ w)), params, x, MASK, sharing=sharing)
        np.testing.assert_allclose(a, rows.T @ rows / len(rows), rtol=1e-9)
        np.testing.assert_allclose(g, np.diag((slope**2).sum(0)) / len(rows), rtol=1e-9)


def test_a_tied_table_has_the_factors_of_the_sum_of_both_uses():
    words, vocabulary = np.array([[0, 3, 3], [1, 0, 4]]), 5
    w = numbers(vocabulary, D, seed=1)

    def predict(p, batch):
        return jnp.tanh(p["w"][batch["x"]]) @ p["w"].T

    v_side, d_side, _ = factored(predict, {"w": jnp.asarray(w)}, words)
    h = np.tanh(w[words]).reshape(-1, D)
    slopes = (1 - h[:, None] ** 2) * w[None]  # of each position's outputs by its embedding
    embed = (
        np.bincount(words.ravel(), minlength=vocabulary) / words.size,
        np.einsum("rvd,rve->de", slopes, slopes) / len(words),
    )
    head = np.full(vocabulary, words.shape[1]), h.T @ h / words.size
    product = sum(np.multiply.outer(v, d) for v, d in (embed, head))
    by_d, by_v = np.einsum("vdd->v", product), product.sum(0)
    total = by_d.sum()
    np.testing.assert_allclose(
        np.multiply.outer(v_side, d_side), np.multiply.outer(by_d, by_v) / total, rtol=1e-9
    )


def test_unknown_parameters_are_named_once_with_the_reason_and_warned_of_where_all_are(caplog):
    batch = {"x": jnp.asarray(X[:, 0]), "label": jnp.zeros((B, K))}

    def run(predict, params):
        params = jax.tree.map(jnp.asarray, params)
        objective = Objective.from_fns(predict, squared_error, batch)
        optimizer = kfac_for(objective, params)
        for _ in range(2):
            value, grad, _ = objective.value_and_grad(params)
            optimizer.update(
                grad, optimizer.init(params), params, value=value, grad=grad, objective=objective
            )
        messages = [(r.levelname, r.getMessage()) for r in caplog.records]
        caplog.clear()
        return messages

    with caplog.at_level(logging.INFO, logger="jdl.optim.kronecker.summary"):
        both = run(lambda p, b: b["x"] @ p["w"] @ jnp.exp(p["v"]), {"w": W, "v": W[:K, :K]})
        (level, message) = both[0]
        assert (level, len(both), message.count("diagonal: ['v'] (used by exp)")) == ("INFO", 1, 1)
    with caplog.at_level(logging.WARNING, logger="jdl.optim.kronecker.summary"):
        ((level, message),) = run(lambda p, b: b["x"] @ jnp.exp(p["w"]), {"w": W})
        assert level == "WARNING"
        assert "used by exp" in message
