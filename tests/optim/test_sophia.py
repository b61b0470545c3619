"""Sophia by name: optax's steps, and the curvature's diagonal that they divide by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jdl
from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.data import from_arrays
from jdl.losses import softmax_cross_entropy
from jdl.optim import by_name
from jdl.optim.sophia import curvature_diagonal

START = jnp.array([1.0, -2.0, 0.5])


def quartic(x):
    """Its Hessian is diagonal, so that any signs give it exactly."""
    return jnp.sum(jnp.array([1.0, 2.0, 3.0]) * x**4 + x)


def steps(optimizer, name, count=25):
    @jax.jit
    @jax.numpy_dtype_promotion("standard")
    def step(x, state):
        updates, state = optimizer.update(jax.grad(quartic)(x), state, x, **{name: quartic})
        return optax.apply_updates(x, updates), state

    x, state = START, optimizer.init(START)
    for _ in range(count):
        x, state = step(x, state)
    return x, state


@pytest.mark.parametrize("name", ["obj_fn", "value_fn"])
def test_steps_on_a_function_are_optax_s_with_hutchinson(name):
    ours, state = steps(by_name("sophia", 0.05), name)
    theirs, _ = steps(optax.contrib.sophia(0.05, gamma=0.05), "obj_fn")
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert int(optax.tree.get(state, "hessian_fn_state")) == 3  # in updates 0, 10 and 20


def predict(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]


def classified(**options):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 3))}
    floats = {"x": rng.normal(size=(6, 3)), "mask": np.array([1, 1, 0, 1, 1, 1])}
    params, batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, floats))
    batch["label"] = jnp.arange(6) % 3
    return params, Objective.from_fns(predict, softmax_cross_entropy, batch, **options)


def gauss_newton_diagonal(params, batch):
    """diag Σᵢ mᵢ Jᵢᵀ (diag pᵢ − pᵢ pᵢᵀ) Jᵢ / Σᵢ mᵢ, from dense matrices."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = np.asarray(jax.jacobian(lambda p: predict(unravel(p), batch))(flat))
    p = np.asarray(jax.nn.softmax(predict(params, batch)))
    hessian = np.eye(3) * p[:, :, None] - p[:, :, None] * p[:, None]
    mask = np.asarray(batch["mask"])
    each = np.einsum("bij,bik,bkj->bj", jacobian, hessian, jacobian)
    return unravel(jnp.asarray(mask @ each / mask.sum(), jnp.float32))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_of_a_classifier_the_estimate_is_gauss_newton_s_on_average(microbatches):
    params, objective = classified(microbatches=microbatches)
    estimate = curvature_diagonal()

    def draw(state):
        found, state = estimate.update(params, state, params, objective=objective)
        return found, state

    found, states = jax.jit(jax.vmap(draw))(jnp.arange(4000, dtype=jnp.int32))
    np.testing.assert_array_equal(states, jnp.arange(1, 4001))
    wanted = gauss_newton_diagonal(params, objective.batch)
    for leaf, exact in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        error = jnp.std(leaf, axis=0) / 4000**0.5
        assert np.all(leaf >= 0)
        assert np.all(np.abs(jnp.mean(leaf, axis=0) - exact) < 4.5 * error)
        assert np.all(error < 0.06 * exact)
        assert not np.allclose(leaf[0], leaf[1])


def squares(params, batch):
    return (params**2)[None] * batch["x"]


def half_square(outputs, batch):
    return jnp.sum(0.5 * jnp.square(outputs - batch["y"]), axis=1)


def test_of_a_loss_within_the_model_the_estimate_is_hutchinson_s():
    x = jnp.array([1.0, 2.0, 3.0])
    batch, grad = {"x": x[None], "y": jnp.ones((1, 3))}, jnp.zeros(3)

    def within(outputs, batch):
        return half_square(outputs, batch)

    within.of_outputs = False
    gauss_newton = (2 * x * START) ** 2
    hessian = gauss_newton + 2 * x * (x * START**2 - 1)  # both diagonal: no draw matters
    estimate = curvature_diagonal()
    for loss, wanted in ((half_square, gauss_newton), (within, hessian)):
        objective = Objective.from_fns(squares, loss, batch)
        found, _ = estimate.update(grad, estimate.init(START), START, objective=objective)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_without_a_function_it_is_refused():
    optimizer = by_name("sophia")
    standard = jax.numpy_dtype_promotion("standard")
    with standard, pytest.raises(ArgumentError, match="sophia's update needs `value_fn`"):
        optimizer.update(START, optimizer.init(START), START)


def test_an_estimator_trains_by_the_name_alone(caplog):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    label = np.argmax(x[:, :3], axis=1).astype(np.int32)
    data = from_arrays(x, label, batch_size=32, shuffle=True, seed=0)
    with caplog.at_level("INFO", "jdl.optim.sophia"):
        made = jdl.classifier(jdl.models.MLP(widths=(8,), num_outputs=3), by_name("sophia", 3e-2))
        made.train(data, steps=60)
    assert "Gauss-Newton-Bartlett, softmax" in caplog.text
    assert made.evaluate(from_arrays(x, label, batch_size=32))["accuracy"] > 0.9
