"""Modules of Equinox, Haiku and Keras: against NumPy, with batch statistics and dropout."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl.core import check
from jdl.data import from_arrays

PACKAGES = {"equinox": "equinox", "haiku": "dm-haiku", "keras": "keras"}
WIDE = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
LABEL = (WIDE[:, 0] > 0).astype(np.int32)


@pytest.fixture(autouse=True)
def as_these_packages_run():
    """They mix types and ranks."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def imported(package):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(package)


def equinox_dense():
    eqx = imported("equinox")

    def build(key):
        keys = jax.random.split(key)
        first = eqx.nn.Linear(5, 4, key=keys[0])
        return eqx.nn.Sequential([first, eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(4, 2, key=keys[1])])

    return jdl.from_equinox(build)


def haiku_dense():
    hk = imported("haiku")
    return jdl.from_haiku(lambda x: hk.Linear(2)(jnp.tanh(hk.Linear(4)(x))))


def keras_dense():
    keras = imported("keras")
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)]
    return jdl.from_keras(keras.Sequential([keras.Input((5,)), *layers]))


def equinox_norm(rate):
    eqx = imported("equinox")

    class Net(eqx.Module):
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout

        def __init__(self):
            self.norm = eqx.nn.BatchNorm(5, axis_name="batch", momentum=0.9, mode="batch")
            self.drop = eqx.nn.Dropout(rate)

        def __call__(self, x, state, *, key=None):
            x, state = self.norm(x, state)
            return self.drop(x, key=key), state

    return jdl.from_equinox(lambda key: eqx.nn.make_with_state(Net)())


def haiku_norm(rate):
    hk = imported("haiku")

    def forward(x, is_training):
        x = hk.BatchNorm(True, True, 0.9, eps=1e-5)(x, is_training)
        return hk.dropout(hk.next_rng_key(), rate, x) if is_training else x

    return jdl.from_haiku(forward)


def keras_norm(rate):
    keras = imported("keras")
    norm = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
    layers = [keras.Input((5,)), norm, keras.layers.Dropout(rate)]
    return jdl.from_keras(keras.Sequential(layers))


DENSE = [equinox_dense, haiku_dense, keras_dense]
NORM = [equinox_norm, haiku_norm, keras_norm]


@pytest.mark.parametrize("make", DENSE)
def test_dense_layers_are_numpy_s(make):
    model = make()
    params, state = model.init(jax.random.key(0), WIDE)
    assert state == {}
    arrays = [np.asarray(x) for x in jax.tree.leaves(params)]
    w1, w2 = (
        next(x if x.shape == shape else x.T for x in arrays if x.shape in (shape, shape[::-1]))
        for shape in ((5, 4), (4, 2))
    )
    b1, b2 = (next(x for x in arrays if x.shape == (width,)) for width in (4, 2))
    outputs, _ = model.apply(params, state, WIDE)
    np.testing.assert_allclose(outputs, np.tanh(WIDE @ w1 + b1) @ w2 + b2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", DENSE[:2])
def test_the_key_gives_the_parameters(make):
    model = make()
    a, b, c = (jax.tree.leaves(model.init(jax.random.key(i), WIDE)[0]) for i in (0, 0, 1))
    assert all(bool((x == y).all()) for x, y in zip(a, b, strict=True))
    assert any(bool((x != y).any()) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("optimizer", [optax.adam(0.03), "kfac"], ids=["adam", "kfac"])
@pytest.mark.parametrize("make", DENSE)
def test_they_are_trained(make, optimizer):
    data = from_arrays(WIDE, LABEL, batch_size=32, epochs=None, seed=0)
    estimator = jdl.classifier(make(), optimizer)
    before = estimator.train(data, steps=1).evaluate(data)["loss"]
    assert estimator.train(data, steps=30).evaluate(data)["loss"] < 0.9 * before


@pytest.mark.parametrize("make", NORM)
def test_batch_statistics_are_kept_and_used_outside_of_training(make):
    model = make(0.0)
    params, state = model.init(jax.random.key(0), WIDE)
    mean, variance = WIDE.mean(axis=0), WIDE.var(axis=0)
    outputs, new = model.apply(params, state, WIDE, key=jax.random.key(0), train=True)
    np.testing.assert_allclose(outputs, (WIDE - mean) / np.sqrt(variance + 1e-5), atol=1e-4)
    for _ in range(150):  # 0.9^150 is 1e-7
        _, new = model.apply(params, new, WIDE, key=jax.random.key(0), train=True)
    half, same = model.apply(params, new, WIDE[:32])
    spread = np.sqrt(variance + 1e-5)
    # Equinox keeps the unbiased variance, 64 / 63 of the other.
    np.testing.assert_allclose(half, (WIDE[:32] - mean) / spread, rtol=0.01, atol=1e-3)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.all(a == b)), same, new))
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("make", NORM)
def test_dropout_goes_by_the_key_and_only_in_training(make):
    model = make(0.5)
    params, state = model.init(jax.random.key(0), WIDE)
    first, again, other = (
        np.asarray(model.apply(params, state, WIDE, key=jax.random.key(i), train=True)[0])
        for i in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert 0.3 < (first == 0).mean() < 0.7
    rows = (first == 0).sum(axis=1)
    assert len({*rows.tolist()}) > 1  # each example drops its own
    assert (np.asarray(model.apply(params, state, WIDE)[0]) != 0).all()


@pytest.mark.parametrize("make", NORM)
def test_a_run_with_state_resumes(make, tmp_path):
    data = from_arrays(WIDE, np.abs(WIDE), batch_size=32, epochs=None, seed=0)

    def run(workdir, *ends):
        for end in ends:
            estimator = jdl.Estimator(
                make(0.5), jdl.losses.squared_error, "adam", workdir=tmp_path / workdir
            )
            estimator.train(data, max_steps=end)
        return [np.asarray(x) for x in jax.tree.leaves((estimator.params, estimator.model_state))]

    for once, twice in zip(run("once", 6), run("twice", 3, 6), strict=True):
        np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_package_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    said = (
        f"jdl.from_{module} needs the package '{PACKAGES[module]}'.*pip install {PACKAGES[module]}$"
    )
    with pytest.raises(check.MissingExtraError, match=said):
        getattr(jdl, f"from_{module}")(lambda key: None)


def test_what_keras_cannot_say_is_refused(monkeypatch):
    keras = imported("keras")
    with pytest.raises(check.ArgumentError, match="`model` must be a Keras model or layer"):
        jdl.from_keras(lambda x: x)
    with pytest.raises(check.ArgumentError, match=r"must be built.*Begin it with keras\.Input"):
        jdl.from_keras(keras.Sequential([keras.layers.Dense(2)]))
    dense = keras.layers.Dense(2, kernel_regularizer="l2")
    with pytest.raises(check.ArgumentError, match="without losses of its own"):
        jdl.from_keras(keras.Sequential([keras.Input((3,)), dense]))
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(check.ArgumentError, match="KERAS_BACKEND=jax before"):
        jdl.from_keras(dense)
