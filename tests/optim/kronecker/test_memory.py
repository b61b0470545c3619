"""The state holds what the model's layers need, and not what their shapes would allow."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jdl.core.objective import Objective
from jdl.losses import softmax_cross_entropy
from jdl.optim import kfac, kfac_for


class Language(nn.Module):
    vocabulary: int = 4000
    depth: int = 6
    width: int = 256
    heads: int = 8
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(tokens) + nn.Embed(64, self.width)(jnp.arange(tokens.shape[1]))[None]
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            mask = nn.make_causal_mask(tokens)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary)(x)


def size(state):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def state_of(predict, params, batch, told, **options):
    objective = Objective.from_fns(predict, softmax_cross_entropy, batch)
    optimizer = kfac_for(objective, params, **options) if told else kfac(**options)
    return jax.eval_shape(optimizer.init, params)


@functools.cache
def language(**options):
    net, tokens = Language(**options), jnp.zeros((4, 16), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), tokens)
    return lambda p, b: net.apply(p, b["x"]), params, {"x": tokens, "label": tokens}


@pytest.mark.parametrize(("dtype", "most"), [(None, 10), ("bfloat16", 6)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_needs_ten_times_its_parameters_or_six_in_bfloat16(tied, dtype, most):
    predict, params, batch = language(tied=tied)
    for told in (True, False):
        state = state_of(predict, params, batch, told, factors_dtype=dtype)
        assert size(state) <= most * size(params)


@pytest.mark.parametrize("tied", [False, True])
def test_a_large_vocabulary_has_no_square(tied):
    predict, params, batch = language(vocabulary=50_000, width=512, depth=1, tied=tied)
    for told in (True, False):
        state = state_of(predict, params, batch, told)
        assert max(x.size for x in jax.tree.leaves(state)) == 50_000 * 512  # the last step
        assert size(state) <= 2 * size(params)


def ensemble(p, b):
    def one(p):
        return jnp.tanh(jnp.tanh(b["x"] @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]) @ p["u"]

    return jnp.mean(jax.vmap(one)(p), axis=0)


def cnn(p, b):
    """As in Equinox: one example at a time, channels first, kernels [out, in]."""

    def one(x):
        for w, c in ((p["w"], p["b"]), (p["v"], p["c"])):
            numbers = ("NCHW", "OIHW", "NCHW")
            y = jax.lax.conv_general_dilated(x[None], w, (2, 2), "SAME", dimension_numbers=numbers)
            x = jnp.tanh(y[0] + c)
        return p["u"] @ x.reshape(-1)

    return jax.vmap(one)(b["x"])


def shapes(**sizes):
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in sizes.items()}


ENSEMBLE = shapes(w=(8, 64, 32), b=(8, 32), v=(8, 32, 32), c=(8, 32), u=(8, 32, 10))
CNN = shapes(w=(8, 1, 3, 3), b=(8, 1, 1), v=(8, 8, 3, 3), c=(8, 1, 1), u=(10, 392))
# name -> (model, parameters, an input, the factors' numbers by hand)
SMALL = {
    "ensemble": (ensemble, ENSEMBLE, (16, 64), 8 * (65**2 + 33**2 + 33**2 + 2 * 32**2 + 10**2)),
    "cnn": (cnn, CNN, (16, 1, 28, 28), 10**2 + 73**2 + 393**2 + 2 * 8**2 + 10**2),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_state_is_what_its_layers_need(name):
    predict, params, shape, numbers = SMALL[name]
    batch = {"x": jnp.zeros(shape), "label": jnp.zeros(shape[0], jnp.int32)}
    wide = -(-393 // 8) * 8
    rounding = wide**2 - 393**2 if name == "cnn" else 0
    told = size(state_of(predict, params, batch, told=True))
    # factors and inverses, the last step, and at most another curvature diagonal
    least = 2 * 4 * (numbers + rounding) + size(params)
    assert least <= told <= least + size(params) + 500
    assert size(state_of(predict, params, batch, told=False)) <= 1.5 * told
