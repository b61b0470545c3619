"""Any model as a trunk: layers by name, the same values whichever way they are found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdl
from jdl.core import check
from jdl.models import CNN
from jdl.recipes import registry
from jdl.vision import pretrained, trunk

GRAY = (8, 8, 1)


@pytest.fixture(scope="module")
def cnn():
    module = CNN(num_classes=3, units=8)
    return module, module.init(jax.random.key(0), jnp.ones((1, *GRAY)))["params"]


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))


def test_linen_layers_are_what_the_module_computes(cnn, x):
    module, params = cnn
    found = trunk.of_linen(module, params, image_shape=GRAY, classes=("a", "b", "c"))
    gray = x @ jnp.array([[0.299], [0.587], [0.114]])
    features = found.features(x, ("Conv_0", "output"))
    kernel, bias = params["Conv_0"]["kernel"], params["Conv_0"]["bias"].reshape(1, 1, 1, -1)
    expected = jax.lax.conv_general_dilated(
        gray, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(features["Conv_0"], expected + bias, rtol=1e-4, atol=1e-5)
    logits = module.apply({"params": params}, gray)
    np.testing.assert_allclose(features["output"], logits, rtol=1e-4, atol=1e-5)
    assert found.head == "output"


def test_a_models_layers_equal_its_linen_modules(cnn, x):
    module, params = cnn
    linen = trunk.of_linen(module, params, image_shape=GRAY)
    model = trunk.of_model(jdl.from_linen(module), params, image_shape=GRAY)
    assert model.layers == ("conv_1", "conv_2", "dot_1", "dot_2", "output")
    pairs = {"conv_1": "Conv_0", "conv_2": "Conv_1", "dot_2": "logits", "output": "output"}
    mine, theirs = model.features(x, model.layers), linen.features(x, linen.layers)
    bias = params["logits"]["bias"].reshape(1, -1)
    for a, b in pairs.items():
        shift = bias if a == "dot_2" else 0
        if a.startswith("conv"):
            shift = params[b]["bias"].reshape(1, 1, 1, -1)
        np.testing.assert_allclose(mine[a] + shift, theirs[b], rtol=1e-4, atol=1e-5)


def of_function(f, weights):
    model = jdl.from_fns(lambda key, x: weights, lambda w, x: f(w, x.reshape(-1, 12)))
    return trunk.of_model(model, weights, image_shape=(2, 2, 3))


def test_layers_within_calls_are_found_and_keep_their_derivatives():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda p, t: (product(*p), 7.0 * (t[0] @ p[1] + p[0] @ t[1])))

    @jax.custom_vjp
    def again(x, w):
        return jnp.tanh(x @ w)

    again.defvjp(lambda x, w: (again(x, w), (x, w)), lambda kept, g: (5.0 * g @ kept[1].T, kept[1]))

    def network(w, x):
        x = nn.relu(product(x, w[0]))
        x = jax.checkpoint(lambda x: again(x, w[1]) @ w[1])(x)
        return x + jax.lax.fori_loop(0, 3, lambda _, y: y @ w[1], x)

    weights = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((12, 4), (4, 4)))]
    found = of_function(network, weights)
    assert found.layers == ("dot_1", "dot_2", "dot_3", "output")  # a loop is one step
    images = jax.random.uniform(jax.random.key(2), (2, 2, 2, 3))
    variables, x = found.params, images.reshape(2, 12)
    features = found.features(images, found.layers)
    np.testing.assert_allclose(features["dot_1"], x @ weights[0], rtol=1e-5)
    np.testing.assert_allclose(features["output"], network(weights, x), rtol=1e-5)

    def output(images, edits=None):
        return found.apply(variables, images, ("output",), edits)["output"].sum()

    expected = jax.jit(jax.grad(lambda x: network(weights, x).sum()))(x).reshape(images.shape)
    np.testing.assert_allclose(jax.jit(jax.grad(output))(images), expected, rtol=1e-4, atol=1e-5)
    edits = {"dot_1": jnp.ones((2, 4))}
    shifted = network(
        [jnp.concatenate([weights[0], jnp.ones((1, 4))]), weights[1]],
        jnp.pad(x, [(0, 0), (0, 1)], constant_values=1.0),
    )
    np.testing.assert_allclose(jax.jit(output)(images, edits), shifted.sum(), rtol=1e-5)


def test_layers_without_a_path_from_the_picture_are_refused():
    def network(w, x):
        made = jax.jit(lambda w, x: (w @ w, x @ w))(w, x)  # one call holds both
        noise = nn.relu(made[0]) @ w
        return made[1] + noise[:1]

    found = of_function(network, jnp.eye(12))
    assert (found.layers, found.blind) == (("dot_2", "output"), ("dot_1", "dot_3"))
    for layer in found.blind:
        with pytest.raises(check.ArgumentError, match=r"depends on the picture.*without it"):
            found.features(jnp.ones((1, 2, 2, 3)), layer)
    with pytest.raises(check.UserError, match="no layers with names that depend"):
        of_function(lambda w, x: w @ w, jnp.eye(12))


@pytest.mark.slow
def test_a_gans_layers_are_its_discriminators(tmp_path):
    """They depend on the picture, each has one name, and `blind` ones of the generator are none."""
    from jdl.cli.main import main
    from jdl.models.gan import GAN

    command = ["train", "gan", "--steps", "1", "--batch-size", "8", "--workdir", str(tmp_path)]
    assert main(command) == 0
    found = pretrained.load_trunk(tmp_path)
    assert found.layers == ("Conv_0", "Conv_1", "Dense_0", "output")
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    gray = images @ jnp.array([[0.299], [0.587], [0.114]])
    net = GAN.of_shape((8, 8, 1)).discriminator
    logits = net.apply({"params": found.params["params"]}, gray)
    np.testing.assert_allclose(found.features(images, "output")["output"], logits, atol=1e-5)


@pytest.mark.slow
def test_a_denoising_nets_layers_are_those_of_the_picture_without_noise(tmp_path, x):
    from jdl.cli.main import main

    assert main(["train", "denoising", "--steps", "1", "--workdir", str(tmp_path)]) == 0
    found = pretrained.load_trunk(tmp_path)
    assert len({layer.split("#")[0] for layer in found.layers}) == len(found.layers)
    gray = x @ jnp.array([[0.299], [0.587], [0.114]])
    gray = jax.image.resize(gray, (len(x), 8, 8, 1), "linear")
    outputs = registry.denoised_by((8, 8, 1)).apply({"params": found.params["params"]}, gray)
    np.testing.assert_allclose(found.features(x, "output")["output"], outputs, atol=1e-5)


def test_names_of_layers_keep_their_order_through_rematerialization():
    @jax.checkpoint
    def network(w, x):
        for _ in range(11):
            x = jnp.tanh(x @ w)
        return x

    names = tuple(f"dot_{i}" for i in range(1, 12))
    assert of_function(network, jnp.eye(12)).layers == (*names, "output")


@pytest.mark.slow
def test_edits_reach_the_layers_after(cnn, x):
    module, params = cnn
    for found, layer in (
        (trunk.of_linen(module, params, image_shape=GRAY), "Conv_1"),
        (trunk.of_model(jdl.from_linen(module), params, image_shape=GRAY), "conv_2"),
    ):
        before = found.features(x, (layer, "output"))
        edit = jnp.ones_like(before[layer])
        after = found.apply(found.params, x, (layer, "output"), {layer: edit})
        np.testing.assert_allclose(after[layer], before[layer] + 1, rtol=1e-5, atol=1e-5)
        assert np.abs(after["output"] - before["output"]).max() > 1e-3


@pytest.mark.slow
def test_nnx_models_and_other_sizes():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.dense = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.dense(nnx.relu(self.conv(x)).mean(axis=(1, 2)))

    model = jdl.from_nnx(Net)
    params, state = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    found = trunk.of_model(model, params, state, image_shape=(8, 8, 3))
    assert found.layers == ("conv_1", "dot_1", "output")
    assert found.features(jnp.ones((1, 30, 20, 3)), "conv_1")["conv_1"].shape == (1, 8, 8, 4)
    assert trunk.usual_layer(found) == "conv_1"


def test_shared_modules_have_numbers():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3, name="mix")
            return dense(nn.relu(dense(x)))

    module, x = Twice(), jnp.ones((1, 4, 4, 3))
    params = module.init(jax.random.key(0), x)["params"]
    found = trunk.of_linen(module, params, image_shape=(4, 4, 3))
    assert found.layers == ("mix", "mix#2", "output")
    before = found.features(x, found.layers)
    one = jnp.ones_like(x)
    second = found.apply(found.params, x, found.layers, {"mix#2": one})
    np.testing.assert_array_equal(second["mix"], before["mix"])
    np.testing.assert_allclose(second["output"], before["output"] + 1, rtol=1e-6)
    weights = params["mix"]
    first = found.apply(found.params, x, found.layers, {"mix": one})
    expected = nn.relu(before["mix"] + 1) @ weights["kernel"] + weights["bias"].reshape(1, 1, 1, 3)
    np.testing.assert_allclose(first["output"], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_run_directory_is_a_trunk(digits_run, x):
    found = pretrained.load_trunk(digits_run)
    assert found.classes == tuple("0123456789")
    logits = found.features(x, "output")["output"]
    assert logits.shape == (2, 10)
    assert found.layers[0] == "Conv_0"
    np.testing.assert_array_equal(
        pretrained.load_trunk(digits_run).features(x, "output")["output"], logits
    )


@pytest.mark.slow
def test_an_untrained_run_is_refused(digits_run, tmp_path):
    (tmp_path / "config.toml").write_bytes((digits_run / "config.toml").read_bytes())
    with pytest.raises(check.UserError, match="no checkpoint"):
        pretrained.load_trunk(tmp_path)


@pytest.mark.slow
def test_a_boltzmann_machines_hidden_units_are_a_layer(tmp_path):
    from jdl.cli.main import main
    from jdl.models.rbm import RBM

    assert main(["train", "rbm", "--steps", "2", "--workdir", str(tmp_path)]) == 0
    found = pretrained.load_trunk(tmp_path)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    gray = images @ jnp.array([[0.299], [0.587], [0.114]])
    hidden = RBM(hidden=128).transform(found.params["params"], gray)
    np.testing.assert_allclose(found.features(images, "output")["output"], hidden, atol=1e-5)
    assert found.head is None
