"""One model written in two ways trains alike, in float64, whatever finds the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core.objective import Objective
from jdl.losses import squared_error
from jdl.optim import kfac, kfac_for
from tests.optim.loops import run, stepping


def numbers(*shape, seed=0, scale=0.5):
    return scale * np.random.default_rng(seed).normal(size=shape)


def trained(predict, params, batch, steps=4, told=True):
    objective = Objective.from_fns(predict, squared_error, batch)
    options = {"curvature": "gauss_newton", "factors_every": 1, "inverses_every": 2}
    optimizer = kfac_for(objective, params, **options) if told else kfac(**options)

    params, _, values = run(optimizer, objective, params, steps)
    assert values[-1] < values[0]
    assert stepping(optimizer)._cache_size() <= (1 if told else 2)
    return params, values


def layer(w, b, x):
    return jnp.tanh(x @ w + b[None])


def scanned(p, b):
    x, _ = jax.lax.scan(lambda x, wb: (layer(*wb, x), None), b["x"], (p["w"], p["b"]))
    return x


def looped(p, b):
    x = b["x"]
    for i in range(3):
        x = layer(p[f"w{i}"], p[f"b{i}"], x)
    return x


def ensemble(p, b):
    def one(w, c, v):
        return layer(w, c, b["x"]) @ v

    return jax.vmap(one)(p["w"], p["b"], p["v"]).transpose(1, 0, 2)


def members(p, b):
    return jnp.stack([layer(p[f"w{i}"], p[f"b{i}"], b["x"]) @ p[f"v{i}"] for i in range(3)], 1)


def hwio(p, b):
    y = jax.lax.conv_general_dilated(
        b["x"], p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(y + p["b"][None, None, None]).mean((1, 2)) @ p["v"]


def oihw(p, b):
    x = b["x"].transpose(0, 3, 1, 2)
    y = jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    y = jnp.tanh(y + p["b"][None, :, None, None]).mean((2, 3))
    return jax.vmap(lambda y: p["v"] @ y)(y)


def heads(p, b):
    q = jnp.einsum("btd,dhk->bthk", b["x"], p["q"]) + p["c"][None, None]
    return jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["o"])


def heads_first(p, b):
    q = jnp.einsum("btd,hdk->bhtk", b["x"], p["q"]) + p["c"][None]
    return jnp.einsum("bhtk,hkd->btd", jnp.tanh(q), p["o"])


def flat(p, b):
    q = jnp.tanh(b["x"] @ p["q"] + p["c"][None, None]).reshape(4, 2, 2, 3)
    return q.reshape(4, 2, 6) @ p["o"]


def stacked(p, names=("w", "b", "v")):
    return {k + str(i): x for k in names if k in p for i, x in enumerate(p[k])}


STACK = {"w": numbers(3, 4, 4), "b": numbers(3, 4, seed=1)}
MEMBERS = {"w": numbers(3, 4, 5), "b": numbers(3, 5, seed=1), "v": numbers(3, 5, 2, seed=2)}
CONV = {"w": numbers(3, 3, 2, 4), "b": numbers(4, seed=1), "v": numbers(4, 2, seed=2)}
OIHW = {**CONV, "w": CONV["w"].transpose(3, 2, 0, 1), "v": CONV["v"].T}
HEADS = {"q": numbers(4, 2, 3), "c": numbers(2, 3, seed=1), "o": numbers(2, 3, 4, seed=2)}
FIRST = {"q": HEADS["q"].transpose(1, 0, 2), "c": HEADS["c"][:, None], "o": HEADS["o"]}
FLAT = {"q": HEADS["q"].reshape(4, 6), "c": HEADS["c"].reshape(6), "o": HEADS["o"].reshape(6, 4)}
# name -> (model, parameters), the same written otherwise, and what brings the parameters there
PAIRS = {
    "scan = loop": ((scanned, STACK), (looped, stacked(STACK)), stacked, (8, 4)),
    "vmap = loop": ((ensemble, MEMBERS), (members, stacked(MEMBERS)), stacked, (8, 4)),
    "HWIO = OIHW": (
        (hwio, CONV),
        (oihw, OIHW),
        lambda p: {**p, "w": p["w"].transpose(3, 2, 0, 1), "v": p["v"].T},
        (8, 5, 5, 2),
    ),
    "heads = dense and reshape": (
        (heads, HEADS),
        (flat, FLAT),
        lambda p: {k: x.reshape(FLAT[k].shape) for k, x in p.items()},
        (4, 2, 4),
    ),
    "heads last = heads first": (
        (heads, HEADS),
        (heads_first, FIRST),
        lambda p: {**p, "q": p["q"].transpose(1, 0, 2), "c": p["c"][:, None]},
        (4, 2, 4),
    ),
}


OFTEN = [("scan = loop", True), ("scan = loop", False)]
RARE = [(name, told) for name in PAIRS for told in (True, False) if (name, told) not in OFTEN]


@pytest.mark.parametrize(
    ("name", "told"), [*OFTEN, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in RARE)]
)
def test_a_model_written_otherwise_trains_alike(name, told):
    with jax.enable_x64(True):
        (one, params), (other, others), change, shape = PAIRS[name]
        params, others = (jax.tree.map(jnp.asarray, p) for p in (params, others))
        x = jnp.asarray(numbers(*shape, seed=5, scale=1.0))
        y = jnp.cos(one(params, {"x": x}) + 1.0)
        batch = {"x": x, "label": y}
        got, values = trained(one, params, batch, told=told)
        want, same = trained(other, others, batch)
        np.testing.assert_allclose(values, same, rtol=1e-9)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), change(got), want
        )
