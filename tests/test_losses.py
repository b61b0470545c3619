"""Losses against optax's and closed forms; labels that are no class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from jdl import losses, metrics
from jdl.core import check
from jdl.core.objective import Objective

K = 5
LABELS = jnp.array([[0, 4, 2], [1, -1, -1], [-1, -1, -1], [3, 3, -1]])
COUNTED = np.asarray(LABELS) >= 0
ours = losses.softmax_cross_entropy


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_sequences_loss_is_the_mean_of_optaxs_over_its_positions():
    z, labels = jnp.asarray(numbers(4, 3, K)), jnp.arange(12).reshape(4, 3) % K
    want = optax.softmax_cross_entropy_with_integer_labels(z, labels).mean(axis=1)
    np.testing.assert_allclose(ours(z, {"label": labels}), want, rtol=1e-6)
    probabilities = jax.nn.softmax(numbers(4, 3, K, seed=1))
    want = optax.softmax_cross_entropy(z, probabilities).mean(axis=1)
    np.testing.assert_allclose(ours(z, {"label": probabilities}), want, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8"])
def test_ignored_positions_count_nothing(dtype):
    z, ignored = jnp.asarray(numbers(4, 3, K)), -1 if dtype != "uint8" else 255
    labels = jnp.asarray(np.asarray(LABELS).astype(dtype))
    each = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(LABELS, 0))
    want = np.sum(np.where(COUNTED, each, 0), axis=1) / np.maximum(COUNTED.sum(axis=1), 1)
    loss = functools.partial(ours, ignore=ignored)
    np.testing.assert_allclose(loss(z, {"label": labels}), want, rtol=1e-6)
    grads = jax.jit(jax.grad(lambda z: loss(z, {"label": labels}).sum()))(z)
    assert np.all((np.abs(grads).sum(axis=-1) > 0) == COUNTED)


def test_a_mask_of_counts_makes_the_objective_the_mean_over_all_positions():
    batch = {"image": numbers(4, 3, K), "label": LABELS}
    batch["mask"] = jnp.asarray(COUNTED.sum(axis=1), jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(batch["image"], jnp.maximum(LABELS, 0))
    loss = functools.partial(ours, ignore=-1)
    for microbatches in (1, 2):
        f = Objective.from_fns(lambda w, b: w * b["image"], loss, batch, microbatches=microbatches)
        np.testing.assert_allclose(f.value(jnp.ones(())), each[COUNTED].mean(), rtol=1e-6)


def test_microbatches_give_the_same_products_of_sequences():
    with jax.enable_x64(True):
        batch = {
            "x": jnp.float64(numbers(4, 3, 2)),
            "label": LABELS,
            "mask": jnp.array([1, 1, 0, 1]),
        }
        loss = functools.partial(ours, ignore=-1, label_smoothing=0.1, z_loss=0.1)
        w, v = (jnp.float64(numbers(2, K, seed=seed)) for seed in (1, 2))
        whole, cut = (
            Objective.from_fns(lambda w, b: b["x"] @ w, loss, batch, microbatches=n) for n in (1, 2)
        )
        for name in ("gnvp", "hvp"):  # the same, as the net is linear
            found = [jax.jit(getattr(f, name))(w, v) for f in (whole, cut)]
            h = 1e-5
            want = (whole.grad(w + h * v) - whole.grad(w - h * v)) / (2 * h)
            np.testing.assert_allclose(found, [want, want], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(whole.grad(w), cut.grad(w), rtol=1e-12)


def test_label_smoothing_is_optaxs_and_z_loss_the_square_of_log_z():
    z, labels = jnp.asarray(numbers(6, K)), jnp.arange(6) % K
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, K), 0.1)
    want = optax.softmax_cross_entropy(z, smooth) + 0.02 * special.logsumexp(z, axis=1) ** 2
    loss = functools.partial(ours, label_smoothing=0.1, z_loss=0.02)
    for targets in (labels, jax.nn.one_hot(labels, K)):
        np.testing.assert_allclose(loss(z, {"label": targets}), want, rtol=1e-6)


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        z, v = np.float64(numbers(4, 3, K)), np.float64(numbers(4, 3, K, seed=1))
        loss = functools.partial(ours, ignore=-1, label_smoothing=0.2, z_loss=0.1)
        f = jax.jit(lambda t: loss(jnp.asarray(z + t * v), {"label": LABELS}).sum())
        np.testing.assert_allclose(jax.grad(f)(0.0), (f(1e-5) - f(-1e-5)) / 2e-5, rtol=1e-8)


def test_bfloat16_outputs_give_float32_losses():
    z = jnp.asarray(numbers(4, 3, K), jnp.bfloat16)
    loss = jax.jit(functools.partial(ours, ignore=-1, label_smoothing=0.1, z_loss=0.01))
    found, want = (loss(x, {"label": LABELS}) for x in (z, z.astype(jnp.float32)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("stray", [-1, K, -100])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_a_label_that_is_no_class_is_an_error_and_nan_under_jit(stray, shape):
    z, labels = jnp.asarray(numbers(*shape, K)), np.zeros(shape, np.int32)
    labels[1] = stray
    batch = {"label": labels}
    with pytest.raises(check.ArgumentError, match=rf"class numbers in \[0, 5\), got \[{stray}\]"):
        ours(z, batch)
    for function in (ours, metrics.accuracy, metrics.top_k_accuracy(2)):
        found = jax.jit(function)(z, batch)
        assert np.isnan(found).tolist() == [False, True, False]
    masked = batch | {"mask": np.float32([1, 0, 1])}  # padding
    assert np.isfinite(ours(z, masked)).tolist() == [True, False, True]
    f = Objective.from_fns(lambda w, b: w * z, ours, masked)
    value, grad, _ = f.value_and_grad(jnp.ones(()))
    assert np.isfinite(value)
    assert np.isfinite(grad)


def test_targets_that_are_no_probabilities_are_refused():
    z = jnp.zeros((1, 2))
    with pytest.raises(check.ArgumentError, match=r"in \[0, 1\], got values from 0 to 16"):
        losses.sigmoid_cross_entropy(z, {"label": jnp.array([[0.0, 16.0]])})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignore": 1}, "`ignore` must be None with probabilities"),
        ({"label_smoothing": 1.5}, "`label_smoothing` must be a number in"),
        ({"z_loss": -1.0}, "`z_loss` must be a number in"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(check.ArgumentError, match=words):
        ours(jnp.zeros((2, K)), {"label": jnp.ones((2, K)) / K}, **options)


@pytest.mark.parametrize(
    ("outputs", "labels", "words"),
    [
        ((2, 4, 4, K), (2,), "`outputs` must be of shape .* flatten its images"),
        ((2, K), (2, 1), r"`batch\['label'\]` must be of shape \(2,\)"),
        ((2, 3, K), (2, 4), r"`batch\['label'\]` must be of shape \(2, 3\)"),
    ],
)
def test_wrong_shapes_are_named(outputs, labels, words):
    with pytest.raises(check.ArgumentError, match=words):
        ours(jnp.zeros(outputs), {"label": jnp.zeros(labels, jnp.int32)})


def test_metrics_of_sequences_are_means_over_counted_positions():
    z, batch = jnp.asarray(numbers(4, 3, K)), {"label": LABELS}
    hits = z.argmax(-1) == np.asarray(LABELS)
    with np.errstate(invalid="ignore"):
        want = np.sum(hits, axis=1) / COUNTED.sum(axis=1)
    np.testing.assert_allclose(metrics.accuracy(z, batch, ignore=-1), want)
    top = metrics.top_k_accuracy(K)(z, batch, ignore=-1)
    np.testing.assert_allclose(top, [1, 1, np.nan, 1])
    mask = jnp.array([1.0, 0.0, 1.0])  # as many as positions
    found = metrics.confusion_matrix(z[:3], {"label": LABELS[:3], "mask": mask})
    want = np.zeros((K, K))
    np.add.at(want, (np.asarray(LABELS[0]), z[0].argmax(-1)), 1.0)
    np.testing.assert_array_equal(found, want)
    with pytest.raises(check.ArgumentError, match=r"class numbers of shape \(4, 3\)"):
        metrics.accuracy(z, {"label": LABELS[:, 0]})
