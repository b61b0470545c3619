"""The state holds what the model's layers need, and not what their shapes would allow."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jdl.core.objective import Objective
from jdl.losses import softmax_cross_entropy
from jdl.optim import kfac, kfac_for
from jdl.optim.kronecker import factors, inverses
from jdl.optim.kronecker.blocks import Layer
from jdl.optim.kronecker.layers import Layers


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
        assert size(state) <= 3 * size(params)


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
    # factors and inverses, the last step, the mean of gradients, and at most a curvature diagonal
    least = 2 * 4 * (numbers + rounding) + 2 * size(params)
    assert least <= told <= least + size(params) + 500
    assert size(state_of(predict, params, batch, told=False)) <= 1.5 * told


def held(first, last, dtype):
    """A layer's state with these factors."""
    d, k = len(first) - 1, len(last)
    layer = Layer(0, None, "dense", (("i", d), ("o", k)), (False,), (False, False), False, 0)
    found, options = Layers({0: layer}, {}), factors.Options(dtype=dtype)
    state = factors.init({"w": jnp.zeros((d, k))}, options, found)

    def filled(x, like):
        return jnp.zeros(like.shape, like.dtype).at[0, : len(x), : len(x)].set(x)

    pair = (filled(x, like) for x, like in zip((first, last), state.moments[0], strict=True))
    return found, state._replace(moments=(factors.Pair(*pair),))


def test_rounded_factors_with_a_few_large_coordinates_have_inverses():
    size, large, scale = 1000, 4, 30.0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, size))
    x[:, :large] = scale * (rng.normal(size=(512, 1)) + 0.01 * rng.normal(size=(512, large)))
    first = np.zeros((size + 1, size + 1))
    first[:size, :size] = x.T @ x / 512
    found, state = held(
        jnp.asarray(first, jnp.bfloat16), jnp.eye(8, dtype=jnp.bfloat16), "bfloat16"
    )
    state, _ = jax.jit(lambda s: factors.refresh_inverses(found, s, jnp.float32(1e-4)))(state)
    assert (state.inverted.tolist(), state.left_out.tolist()) == ([pytest.approx(1e-4)], [0])
    inverse = np.asarray(state.inverses[0].first[0, large:size, large:size], np.float32)
    assert np.linalg.eigvalsh(inverse)[0] > 0


@pytest.mark.parametrize("size", [1, 31, 300])
def test_inverses_are_those_of_dense_float64_matrices(size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, 2 * size + 3))
    matrices = x @ x.swapaxes(1, 2) / size
    shift = rng.uniform(0.01, 0.1, size=(2, size))
    with jax.enable_x64(True):
        (found,) = inverses.inverse(jnp.asarray(matrices), jnp.asarray(shift))
    expected = np.linalg.inv(matrices + shift[:, :, None] * np.eye(size))
    np.testing.assert_allclose(found, expected, atol=1e-11)
    single, *_ = inverses.inverse(jnp.asarray(matrices, jnp.float32), jnp.float32(shift))
    np.testing.assert_allclose(single, expected, atol=1e-4 * np.abs(expected).max())


def test_layers_whose_inversions_are_much_work_take_turns(monkeypatch):
    monkeypatch.setattr(factors, "MUCH", 1)
    form = (("i", 4), ("o", 3))
    layers = [Layer(i, None, "dense", form, (False,), (False, False), False, 0) for i in (0, 1)]
    found = Layers(dict(enumerate(layers)), {})
    state = factors.init([jnp.ones((4, 3))] * 2, factors.Options(), found)
    state = state._replace(moments=jax.tree.map(lambda x: 3.0 * x, state.inverses))  # 3 I
    step = functools.partial(
        factors.refresh_inverses, found, damping=jnp.float32(1.0), every=4, whole=False
    )
    step, work, new = jax.jit(step), [], []
    for k in range(8):
        old = state.inverses
        state, done = step(state, count=k)
        work.append(int(done))
        new.append(
            [bool(jnp.any(a.last != b.last)) for a, b in zip(old, state.inverses, strict=True)]
        )
    one = 5**3 + 3**3
    assert work == [one, one, 0, 0] * 2
    assert new == [[True, False], [False, True], *[[False, False]] * 6]  # the same ones again
    shift = np.sqrt(3 / (5 * 3 / 4))  # √λ/π, π² the ratio of the mean eigenvalues of A and G
    np.testing.assert_allclose(state.inverses[1].last[0], np.eye(3) / (3 + shift), rtol=1e-6)


def test_a_failed_inversion_keeps_the_last_one_and_is_counted():
    bad = jnp.array([[1.0, 9.0], [9.0, 1.0]])
    found, state = held(bad, jnp.eye(3), None)
    after, _ = factors.refresh_inverses(found, state, jnp.float32(1e-4))
    assert after.left_out.tolist() == [1]
    jax.tree.map(np.testing.assert_array_equal, after.inverses, state.inverses)


class Rows(nn.Module):
    """A digit's rows attend to each other."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.mark.slow
def test_factors_in_bfloat16_train_as_those_in_float32():
    digits = load_digits()
    images, labels = np.float32(digits.images / 16), np.int32(digits.target)
    net = Rows()
    start = net.init(jax.random.key(0), images[:2])["params"]
    values = {}
    for dtype in ("float32", "bfloat16"):
        batch = {"x": images[:256], "label": labels[:256]}
        predict = lambda p, b: net.apply({"params": p}, b["x"])  # noqa: E731
        objective = Objective.from_fns(predict, softmax_cross_entropy, batch)
        optimizer = kfac_for(objective, start, factors_dtype=dtype)

        @jax.jit
        def steps(params, state, batches, objective=objective, optimizer=optimizer):
            def step(carry, examples):
                params, state = carry
                mine = dataclasses.replace(objective, batch=examples)
                value, grad, _ = mine.value_and_grad(params)
                updates, state = optimizer.update(
                    grad, state, params, value=value, grad=grad, objective=mine
                )
                return (optax.apply_updates(params, updates), state), value

            return jax.lax.scan(step, (params, state), batches)

        order = np.random.default_rng(0).integers(0, len(images), (25, 256))
        batches = {"x": images[order], "label": labels[order]}
        (params, state), _ = steps(start, optimizer.init(start), batches)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))
        assert int(state.diagnostics.left_out) == 0
        whole = dataclasses.replace(objective, batch={"x": images, "label": labels})
        values[dtype] = float(whole.value(params))
    assert values["float32"] < 0.2
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.2)
