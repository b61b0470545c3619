"""The natural gradient against dense Fisher matrices and the exponential family's closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl import losses
from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.optim import natural_gradient


def problem(loss=losses.softmax_cross_entropy):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(30, 4)), jnp.float32)
    batch = {"x": x, "label": jnp.asarray(rng.integers(0, 3, 30), jnp.int32)}
    objective = Objective.from_fns(lambda w, b: b["x"] @ w, loss, batch)
    return objective, jnp.asarray(0.3 * rng.normal(size=(4, 3)), jnp.float32)


def step(optimizer, objective, w, state=None):
    value, grad, _ = objective.value_and_grad(w)
    state = optimizer.init(w) if state is None else state
    return optimizer.update(grad, state, w, value=value, grad=grad, objective=objective)


EXACT = {"tolerance": 1e-6, "max_cg_iterations": 60, "warm_start": 0.0, "kl_clip": None}


def test_the_models_fisher_is_the_expectation_over_its_own_labels():
    objective, w = problem()
    x = objective.batch["x"]
    p = jax.nn.softmax(x @ w)
    fisher = np.zeros((12, 12))
    for i in range(30):
        for k in range(3):
            g = np.outer(x[i], p[i] - np.eye(3)[k]).ravel()
            fisher += float(p[i, k]) * np.outer(g, g) / 30
    optimizer = natural_gradient(1.0, damping=0.1, **EXACT)
    updates, _ = step(optimizer, objective, w)
    wanted = -np.linalg.solve(fisher + 0.1 * np.eye(12), np.ravel(objective.grad(w)))
    np.testing.assert_allclose(np.ravel(updates), wanted, rtol=1e-3, atol=1e-4)


def test_the_empirical_fisher_is_that_of_the_observed_labels():
    objective, w = problem()
    x, label = objective.batch["x"], objective.batch["label"]
    residual = jax.nn.softmax(x @ w) - jax.nn.one_hot(label, 3)
    g = np.einsum("bi,bk->bik", x, residual).reshape(30, 12)
    optimizer = natural_gradient(1.0, curvature="empirical_fisher", damping=0.1, **EXACT)
    updates, _ = step(optimizer, objective, w)
    matrix = g.T @ g / 30 + 0.1 * np.eye(12)
    wanted = -np.linalg.solve(matrix, np.ravel(objective.grad(w)))
    np.testing.assert_allclose(np.ravel(updates), wanted, rtol=1e-3, atol=1e-4)


def test_steps_are_as_long_as_the_divergence_allows():
    objective, w = problem()
    bounded = {**EXACT, "kl_clip": 1e-4}
    updates, _ = step(natural_gradient(1.0, damping=0.1, **bounded), objective, w)
    x = objective.batch["x"]
    before, after = jax.nn.log_softmax(x @ w), jax.nn.log_softmax(x @ (w + updates))
    divergence = float(jnp.mean(jnp.sum(jnp.exp(before) * (before - after), axis=1)))
    assert divergence == pytest.approx(1e-4, rel=0.1)


def test_it_does_not_depend_on_how_outputs_are_parametrized():
    """With λ → 0 a linear change of parameters leaves the predictions' path alone."""
    objective, w = problem()
    change = jnp.diag(jnp.array([1.0, 3.0, 0.5, 2.0]))
    other = Objective.from_fns(
        lambda v, b: b["x"] @ change @ v, losses.softmax_cross_entropy, objective.batch
    )
    optimizer = natural_gradient(0.5, damping=1e-6, damping_minimum=0.0, **EXACT)
    updates, _ = step(optimizer, objective, w)
    turned, _ = step(optimizer, other, jnp.linalg.solve(change, w))
    x = objective.batch["x"]
    ours, theirs = x @ updates, x @ change @ turned
    # Logits are determined up to a constant an example.
    ours, theirs = (z - z.mean(1, keepdims=True) for z in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=2e-2)


def test_fits_a_regression():
    objective, w = problem()
    optimizer = natural_gradient()
    update = jax.jit(lambda w, state: step(optimizer, objective, w, state))
    state, start = optimizer.init(w), float(objective.value(w))
    for _ in range(25):
        updates, state = update(w, state)
        w = optax.apply_updates(w, updates)
    assert float(optax.tree.norm(objective.grad(w))) < 1e-3
    assert float(objective.value(w)) < start
    assert float(state.diagnostics.linear_iterations) > 25


def test_an_objective_is_asked_for():
    x = jnp.zeros(2)
    optimizer = natural_gradient()
    with pytest.raises(ArgumentError, match=r"`objective`.*from_fns"):
        optimizer.update(
            x, optimizer.init(x), x, value=jnp.zeros(()), grad=x, value_fn=lambda x: jnp.sum(x)
        )


@pytest.mark.parametrize(
    ("options", "name"),
    [({"curvature": "true"}, "curvature"), ({"damping": -1.0}, "damping"),
     ({"kl_clip": 0.0}, "kl_clip"), ({"warm_start": 2.0}, "warm_start")],
)  # fmt: skip
def test_arguments_out_of_range(options, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        natural_gradient(**options)
