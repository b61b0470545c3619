"""A Laplace posterior knows better than its mode how sure it may be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

import jdl
from jdl import curvature, losses
from jdl.models import MLP


def digits(split, size):
    batch = next(iter(jdl.data.digits(split, batch_size=size, dtype="float32")))
    return {name: jnp.asarray(batch[name]) for name in ("image", "label")}


def scores(p, label, bins=10):
    """Negative log-likelihood and expected calibration error."""
    likelihood = -np.mean(np.log(p[np.arange(len(label)), label] + 1e-12))
    confidence, right = p.max(axis=1), p.argmax(axis=1) == label
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [np.sum(confidence[index == i]) - np.sum(right[index == i]) for i in range(bins)]
    return likelihood, np.sum(np.abs(gaps)) / len(label)


@pytest.mark.slow
def test_a_laplace_posterior_is_better_calibrated_on_rotated_digits():
    train, test = digits("train", 1438), digits("test", 359)
    model = jdl.from_linen(MLP(widths=(16,), num_outputs=10, activation="tanh"))
    params, state = model.init(jax.random.key(0), train["image"][:1])
    loss = losses.softmax_cross_entropy
    decay = lambda p: 0.5 / 1438 * sum(jnp.vdot(x, x) for x in jax.tree.leaves(p))  # noqa: E731
    fitted = jdl.Objective(model, loss, state, train, train=False, regularizer=decay)
    adam = optax.adam(1e-2)

    @jax.jit
    def trained(params):
        def step(carry, _):
            params, state = carry
            with jax.numpy_dtype_promotion("standard"):
                updates, state = adam.update(fitted.grad(params), state, params)
            return (optax.apply_updates(params, updates), state), ()

        return jax.lax.scan(step, (params, adam.init(params)), length=1500)[0][0]

    params = trained(params)
    make = lambda batch: jdl.Objective(model, loss, state, batch, train=False)  # noqa: E731
    land = curvature.Landscape(make, [train], params)
    last = curvature.operator(land, kind="gauss_newton").submatrix("outputs")
    posteriors = [
        curvature.Laplace(land, matrix, precision=1.0)
        for matrix in (curvature.kfac_operator(land), curvature.decompose(last))
    ]
    label, found = np.asarray(test["label"]), []
    for angle in range(0, 91, 15):
        image = ndimage.rotate(test["image"], angle, axes=(1, 2), reshape=False, order=1)
        batch = {"image": jnp.asarray(image), "label": test["label"]}
        outputs = model.apply(params, state, batch["image"], key=None, train=False)[0]
        point = scores(np.asarray(jax.nn.softmax(outputs)), label)
        others = []
        for posterior in posteriors:
            mean, covariance = posterior.predict(batch)
            np.testing.assert_allclose(mean, outputs, atol=1e-3)
            root = np.linalg.cholesky(covariance + 1e-5 * np.eye(10))
            noise = np.random.default_rng(0).standard_normal((100, *mean.shape))
            drawn = jnp.asarray(mean + np.einsum("bij,sbj->sbi", root, noise))
            others.append(scores(np.asarray(jax.nn.softmax(drawn)).mean(axis=0), label))
        found.append([point, *others])
    point, kfac, head = np.mean(found, axis=0)
    assert np.all(kfac < 0.75 * point)  # 2.6 and .32 where the point estimate has 4.5 and .51
    assert np.all(head < 0.95 * point)
