import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdl
from jdl.core import check
from jdl.models.autoencoder import Autoencoder, denoising, penalized
from jdl.models.cnn import CNN
from jdl.models.dbn import DBN, as_loss, up_down
from jdl.models.gan import GAN
from jdl.models.layers import (
    ACTIVATIONS,
    INITIALIZERS,
    RandomShift,
    activation,
    example_keys,
    initializer,
    max_pool,
)
from jdl.models.mlp import MLP

KEY = jax.random.key(0)
ONE = {"devices": jax.devices()[:1]}

# name -> standard deviation of the weights of a layer of 400 inputs and 200 units
DEVIATIONS = {
    "he": np.sqrt(2 / 400),
    "glorot": np.sqrt(2 / 600),
    "lecun": np.sqrt(1 / 400),
    "orthogonal": np.sqrt(1 / 400),
    "sparse": np.sqrt(15 / 400),
    "normal": 0.01,
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initial_weights_have_their_scale(name):
    weights = np.asarray(initializer(name)(KEY, (400, 200), jnp.float32))
    assert weights.std() == pytest.approx(DEVIATIONS[name], rel=0.05)
    assert weights.mean() == pytest.approx(0.0, abs=0.01)
    if name == "orthogonal":
        np.testing.assert_allclose(weights.T @ weights, np.eye(200), atol=1e-5)
    if name == "sparse":
        assert ((weights != 0).sum(axis=0) == 15).all()


def test_activations_against_their_formulas():
    x = np.linspace(-3, 3, 25, dtype=np.float32)
    expected = {
        "relu": np.maximum(x, 0),
        "leaky_relu": np.where(x > 0, x, 0.01 * x),
        "sigmoid": 1 / (1 + np.exp(-x)),
        "tanh": np.tanh(x),
        "silu": x / (1 + np.exp(-x)),
        "elu": np.where(x > 0, x, np.expm1(x)),
        "selu": 1.05070098 * np.where(x > 0, x, 1.67326324 * np.expm1(x)),
        "softplus": np.log1p(np.exp(x)),
        "softsign": x / (1 + np.abs(x)),
        "linear": x,
    }
    assert expected.keys() == ACTIVATIONS.keys() - {"gelu"}
    for name, values in expected.items():
        np.testing.assert_allclose(activation(name)(jnp.asarray(x)), values, rtol=1e-4, atol=1e-6)


def test_a_net_takes_both_by_name_and_an_unknown_one_is_reported():
    net = MLP(widths=(20,), num_outputs=2, activation="tanh", kernel_init="sparse")
    params = net.init(KEY, jnp.ones((1, 30)))["params"]
    assert ((params["Dense_0"]["kernel"] != 0).sum(axis=0) == 15).all()
    for name, near in (("spars", "sparse"), ("lecun_normal", "lecun"), ("He-normal", "he")):
        with pytest.raises(check.ArgumentError, match=rf"`kernel_init`.*Did you mean '{near}'"):
            MLP(kernel_init=name).init(KEY, jnp.ones((1, 3)))


class Same(nn.Module):
    """Its input."""

    @nn.compact
    def __call__(self, image, train=False):
        return image


def test_images_shift_by_whole_pixels_in_training_alone():
    images = jax.random.uniform(KEY, (300, 5, 4, 2), minval=1.0, maxval=2.0)
    net = RandomShift(Same(), by=1)
    np.testing.assert_array_equal(net.apply({}, images), images)
    moved = np.asarray(net.apply({}, images, train=True, rngs={"dropout": KEY}))
    around = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    seen = set()
    for image, wide in zip(moved, around, strict=True):
        places = [(i, j) for i in range(3) for j in range(3)]
        found = [(i, j) for i, j in places if (wide[i : i + 5, j : j + 4] == image).all()]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 9
    with pytest.raises(check.ArgumentError, match="`by` must be"):
        RandomShift(Same(), by=0).apply({}, images)
    with pytest.raises(check.ArgumentError, match=r"`image` must be of shape \[B, H, W, C\]"):
        RandomShift(MLP()).init(KEY, jnp.ones((2, 9)))


@pytest.mark.parametrize("net", [MLP(dropout=1.0), CNN(dropout=-0.1)])
def test_a_share_of_units_to_drop_is_below_one(net):
    with pytest.raises(check.ArgumentError, match=r"`dropout` must be a number in \[0.0, 1.0\)"):
        net.init(KEY, jnp.ones((2, 8, 8, 1)))


@pytest.mark.parametrize("window", [(2, 2), (3, 1), (2, 3)])
def test_the_maximum_of_a_window_and_its_gradient_are_those_of_a_reduce_window(window):
    x, w = jax.random.normal(KEY, (2, 5, 6, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 3))
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(KEY, x)

    def loss(variables, pool):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y, _ = layer.apply(variables, y, mutable="batch_stats")
        return jnp.sum(pool(jnp.tanh(y), window, window) * w[:, : 6 // window[0], : 6 // window[1]])

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    got, want = grad(variables, max_pool), grad(variables, nn.max_pool)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_tie_gives_its_gradient_once_and_a_nan_stays():
    grad = jax.grad(lambda x: max_pool(x, (2, 2), (2, 2)).sum())(jnp.ones((1, 4, 4, 1)))
    assert float(grad.sum()) == 4.0
    for i in range(4):
        x = jnp.ones(4).at[i].set(jnp.nan).reshape(1, 2, 2, 1)
        assert jnp.isnan(max_pool(x, (2, 2), (2, 2))).all()


def test_examples_have_keys_of_their_own():
    """As uniform as draws of one key, and no two equal though the images differ in one pixel."""
    x = jnp.zeros((2000, 8, 8, 1)).reshape(2000, 64).at[jnp.arange(2000), jnp.arange(2000) % 64]
    x = x.set((jnp.arange(2000) // 64 + 1) / 255)
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(example_keys(x))
    assert len(np.unique(np.asarray(drawn), axis=0)) == 2000
    np.testing.assert_allclose(drawn.mean(0), 0.5, atol=4 / np.sqrt(12 * 2000))
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(3), atol=4 / np.sqrt(2000))


def drawing(name):
    """An Estimator of a model that draws random numbers in evaluation too."""
    ae = Autoencoder(widths=(8,))
    if name == "gan":
        gan = GAN.of_shape((8, 8, 1), width=4, latent=8)
        losses = {"metrics": {"discriminator": gan.discriminator_loss}} | ONE
        return jdl.Estimator(gan.model, gan.loss, "adam", **losses)
    if name == "up_down":
        dbn = DBN(widths=(12, 6))
        stack = [
            dbn.layer(i, []).init(jax.random.key(i), jnp.ones((2, n)))[0]
            for i, n in enumerate((64, 12))
        ]
        return jdl.Estimator(up_down(dbn, stack), as_loss, "adam", **ONE)
    net = denoising(ae) if name == "denoising" else penalized(ae, contraction=9.0)
    return jdl.autoencoder(net, "adam", **ONE)


@pytest.mark.parametrize("name", ["denoising", "contraction", "gan", "up_down"])
def test_evaluation_depends_neither_on_the_size_nor_on_the_order_of_batches(name):
    x = next(iter(jdl.data.digits("test", batch_size=100)))["image"]
    estimator = drawing(name)
    found, each = [], []
    for size, own in ((7, x), (16, x), (64, x), (64, x[::-1])):
        data = jdl.data.from_arrays(own, batch_size=size, epochs=1)
        found.append(list(estimator.initialize(data).evaluate(data).values()))
        outputs = estimator.predict(data)
        drawn = {"gan": "fake", "denoising": "corrupted", "contraction": "penalty"}.get(name)
        drawn = getattr(outputs, drawn) if drawn else outputs
        each.append(drawn if own is x else drawn[::-1])
    np.testing.assert_allclose(found, found[:1] * 4, rtol=2e-6)
    np.testing.assert_allclose(each, each[:1] * 4, atol=1e-3 * np.std(each[0]))
