import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl.core import check
from jdl.core.model import from_linen
from jdl.models.autoencoder import (
    Autoencoder,
    ConvAutoencoder,
    Reconstruction,
    Variational,
    corrupt,
    denoising,
    penalized,
)

KEY = jax.random.key(0)
ONE = {"devices": jax.devices()[:1]}
X = jax.random.uniform(KEY, (6, 4, 4, 1))


def test_a_linear_code_with_tied_weights_finds_the_principal_subspace():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)) * np.linspace(2.0, 0.3, 8)
    x = (x @ np.linalg.qr(rng.normal(size=(8, 8)))[0]).astype(np.float32)
    x -= x.mean(0)
    net = Autoencoder(widths=(3,), activation="linear", tied=True)
    data = jdl.data.from_arrays(x, batch_size=256, seed=0)
    estimator = jdl.autoencoder(net, "adam", loss="squared_error", **ONE).train(data, steps=1500)
    pca = PCA(3).fit(x)
    best = np.square(x - pca.inverse_transform(pca.transform(x))).sum(1).mean()
    found = estimator.evaluate(jdl.data.from_arrays(x, batch_size=256, epochs=1))["squared_error"]
    assert found == pytest.approx(best, rel=0.01)
    assert set(estimator.params) == {"encoder_0", "reconstruction_bias"}


def test_tied_layers_are_the_encoder_s_transposed():
    net = Autoencoder(widths=(7, 3), tied=True)
    params = net.init(KEY, X)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)
    code = np.asarray(net.apply({"params": params}, X, method="encode"))
    own = jax.tree.map(np.asarray, params)
    h = 1 / (1 + np.exp(-(code @ own["encoder_1"]["kernel"].T + own["decoder_0_bias"])))
    expected = h @ own["encoder_0"]["kernel"].T + own["reconstruction_bias"]
    found = net.apply({"params": params}, X)
    np.testing.assert_allclose(found.reshape(6, -1), expected, rtol=1e-4, atol=1e-5)
    again = net.apply({"params": params}, jnp.asarray(code), (4, 4, 1), method="decode")
    np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_contractive_penalty_is_the_jacobian_s_norm_on_average():
    net = Autoencoder(widths=(5, 3), code_activation="sigmoid")
    model = penalized(net, contraction=2.0, sparsity=0.5, probes=400)
    params, state = model.init(KEY, X)
    outputs, _ = model.apply(params, state, X)
    step, expected = 1e-3, np.zeros(6)
    encode = jax.jit(lambda x: net.apply({"params": params}, x, method="encode"))
    for i in range(16):  # central differences, one pixel at a time
        e = step * jax.nn.one_hot(i, 16).reshape(1, 4, 4, 1)
        column = (np.asarray(encode(X + e), np.float64) - np.asarray(encode(X - e))) / (2 * step)
        expected += 2.0 * np.square(column).sum(1)
    expected += 0.5 * np.abs(np.asarray(encode(X))).sum(1)
    np.testing.assert_allclose(outputs.penalty, expected, rtol=0.05)
    np.testing.assert_allclose(outputs.outputs, net.apply({"params": params}, X), rtol=1e-6)


def test_the_contractive_penalty_goes_through_an_activation_with_its_own_rule():
    sine = jax.custom_vjp(jnp.sin)
    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))

    def penalty_and_slope(activation):
        model = penalized(Autoencoder(widths=(5, 3), activation=activation), contraction=2.0)
        params, state = model.init(KEY, X)
        of = lambda params: model.apply(params, state, X)[0].penalty.sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(of))(params)

    found, expected = map(penalty_and_slope, (sine, jnp.sin))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


@pytest.mark.slow
def test_the_variational_bound_holds_and_is_what_is_trained():
    net = Variational(widths=(8,), code=1)
    model = from_linen(net)
    params, state = model.init(KEY, X)
    params = jax.tree.map(lambda p: 2.0 * p, params)
    x = (X > 0.5).astype(jnp.float32)
    batch = {"image": x}

    def nats(outputs):
        return jdl.losses.sigmoid_cross_entropy(outputs, batch, target="image")

    def loss(key):
        outputs = model.apply(params, state, x, key=key, train=True)[0]
        return nats(outputs.outputs) + outputs.penalty

    bound = jax.vmap(loss)(jax.random.split(KEY, 500)).mean(0)
    # −log p(x) by quadrature over the code.
    codes = np.linspace(-8, 8, 400, dtype=np.float32)

    def of_code(code):
        return nats(
            net.apply({"params": params}, jnp.full((6, 1), code), (4, 4, 1), method="decode")
        )

    log_p = -np.asarray(jax.vmap(of_code)(jnp.asarray(codes)), np.float64)
    log_p += -0.5 * codes[:, None] ** 2 - 0.5 * np.log(2 * np.pi) + np.log(codes[1] - codes[0])
    exact = -np.logaddexp.reduce(log_p, axis=0)
    assert (np.asarray(bound) > exact - 0.05).all()
    mean, log_variance = net.apply({"params": params}, x, method="encode")
    m, s = np.asarray(mean, np.float64), np.exp(np.asarray(log_variance, np.float64) / 2)
    z = m + s * np.random.default_rng(0).normal(size=(6, 200_000))
    log_ratio = -0.5 * ((z - m) / s) ** 2 - np.log(s) + 0.5 * z**2  # log q(z)/p(z)
    penalty = model.apply(params, state, x)[0].penalty
    np.testing.assert_allclose(penalty, log_ratio.mean(1), atol=0.02)


@pytest.mark.parametrize(("noise", "values"), [("masking", {0.0}), ("salt_and_pepper", {0.0, 1.0})])
def test_noise_touches_the_stated_share(noise, values):
    x = jnp.full((100, 100), 0.5)
    found = np.asarray(corrupt(x, KEY, noise, 0.3))
    assert set(np.unique(found)) == values | {0.5}
    assert (found != 0.5).mean() == pytest.approx(0.3, abs=0.02)
    for value in values:
        assert (found == value).mean() == pytest.approx(0.3 / len(values), abs=0.02)


def test_gaussian_noise_has_the_stated_deviation():
    found = np.asarray(corrupt(jnp.full((200, 200), 0.5), KEY, "gaussian", 0.3))
    assert found.std() == pytest.approx(0.3, rel=0.02)
    assert found.mean() == pytest.approx(0.5, abs=0.01)


def peak(x, y):
    return -10 * np.log10(np.square(np.asarray(x) - np.asarray(y)).mean())


def test_a_denoiser_learns_to_clean_digits():
    model = denoising(Autoencoder(widths=(256, 64), activation="relu"), "gaussian", 0.3)
    data = jdl.data.digits(batch_size=64, epochs=None, shuffle=True)
    estimator = jdl.autoencoder(model, "adam", log_every=200, **ONE).train(data, steps=600)
    test = jdl.data.digits("test", batch_size=359)
    outputs = estimator.predict(test)
    clean = next(iter(test))["image"] / 255.0
    cleaned = np.asarray(jax.nn.sigmoid(outputs.outputs))
    assert peak(cleaned, clean) > peak(outputs.corrupted, clean) + 4.0
    assert peak(jax.nn.sigmoid(outputs.of_clean), clean) > peak(cleaned, clean)


@pytest.mark.slow
def test_the_convolutional_one_learns():
    data = jdl.data.digits(batch_size=64, epochs=None, shuffle=True)
    estimator = jdl.autoencoder(
        ConvAutoencoder(filters=(8, 16), code=16), optax.adam(3e-3), log_every=100, **ONE
    )
    estimator.train(data, steps=400)
    images = next(iter(jdl.data.digits("train", batch_size=1438)))["image"] / 255.0
    variance = np.square(images - images.mean(0)).sum((1, 2, 3)).mean()
    found = estimator.evaluate(jdl.data.digits("test", batch_size=359))["squared_error"]
    assert found < 0.45 * variance


def test_the_variational_one_learns():
    data = jdl.data.digits(batch_size=64, epochs=None, shuffle=True)
    estimator = jdl.autoencoder(Variational(widths=(64,), code=8), "adam", log_every=300, **ONE)
    before = estimator.train(data, steps=1).evaluate(jdl.data.digits("test", batch_size=359))
    after = estimator.train(data, steps=600).evaluate(jdl.data.digits("test", batch_size=359))
    assert after["loss"] < 0.65 * before["loss"]


def test_mistakes_are_reported():
    with pytest.raises(check.ArgumentError, match="multiples of 4"):
        ConvAutoencoder(filters=(4, 4)).init(KEY, jnp.ones((1, 6, 8, 1)))
    with pytest.raises(check.ArgumentError, match="Did you mean 'masking'"):
        denoising(Autoencoder(), "maskin", 0.2)
    with pytest.raises(check.ArgumentError, match="level"):
        denoising(Autoencoder(), "masking", 1.2)
    with pytest.raises(check.ArgumentError, match="contraction"):
        penalized(Autoencoder(), contraction=-1.0)
    assert isinstance(denoising(Autoencoder((4,)), "masking", 0.0).init(KEY, X), tuple)
    assert Reconstruction(X, X[:, 0, 0, 0]).of_clean is None
