"""Jacobians by examples, and steps in the smaller space, against dense algebra in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jdl import losses, solvers
from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.core.types import Batch
from jdl.optim import Residuals, least_squares, levenberg_marquardt
from jdl.optim.residuals import of_objective


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def families(points=7, hidden=5, seed=0):
    """A small network's values inside and slopes at two ends, and its parameters."""
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(hidden,))), "a": jnp.asarray(rng.normal(size=3))}

    def net(p, x):
        return jnp.tanh(p["w"] * x["t"]).sum() * p["a"][0] + p["a"][1]

    inside = {"t": jnp.asarray(rng.normal(size=points)), "y": jnp.asarray(rng.normal(size=points))}
    ends = {"t": jnp.array([-1.0, 1.0])}
    slope = jax.grad(lambda t, p: net(p, {"t": t}))
    values = Residuals.of(lambda p, x: net(p, x) - x["y"], inside, weight=0.5)
    return values + Residuals.of(lambda p, x: {"s": slope(x["t"], p), "a": p["a"]}, ends), params


def flat_jacobian(residuals, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jacobian(lambda v: residuals(unravel(v)))(flat))


def test_the_jacobian_by_examples_is_jax_s_of_all():
    residuals, params = families()
    r = np.asarray(residuals(params))
    assert r.shape == (7 + 2 * 4,)
    inside, weight = residuals.examples[0], 0.5
    net = np.tanh(np.outer(inside["t"], params["w"])).sum(1) * params["a"][0] + params["a"][1]
    np.testing.assert_allclose(r[:7], weight**0.5 * (net - inside["y"]), rtol=1e-12)
    found = jax.jit(lambda r, p: r.linearized(p))(residuals, params)
    np.testing.assert_allclose(found.jacobian, flat_jacobian(residuals, params), rtol=1e-12)
    np.testing.assert_allclose(found.residual, r, rtol=1e-12)
    # Of 15 residuals of 9 examples: as much as the gradient of each residual of an example.
    assert found.products == pytest.approx(0.75 * 15 / 9)


def test_examples_must_have_one_leading_axis():
    for examples in (jnp.float64(1.0), {"a": jnp.ones(2), "b": jnp.ones(3)}, jnp.ones((0, 2))):
        with pytest.raises(ArgumentError, match="examples"):
            Residuals.of(lambda p, x: p, examples)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
@pytest.mark.parametrize(("damping", "chained"), [(1e-6, False), (0.3, False), (0.3, True)])
def test_a_factored_step_is_the_dense_one(monkeypatch, shape, damping, chained):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=shape), rng.normal(size=shape[0])
    a *= np.logspace(0, 2, shape[1])
    rows = Residuals.of(lambda x, row: row["a"] @ x - row["b"], {"a": a, "b": b})
    x = jnp.asarray(rng.normal(size=shape[1]))
    grad = jnp.asarray(a.T @ (a @ x - b))
    # Of little length: what no residual answers to is divided by λ.
    incoming = grad + jnp.asarray(chained * 0.01 * damping * rng.normal(size=shape[1]))
    value = 0.5 * jnp.sum(jnp.square(rows(x)))
    optimizer = levenberg_marquardt(damping=damping)
    steps = {}
    for name, limit in {"decomposed": 100, "factored": 8}.items():
        monkeypatch.setattr(least_squares, "DECOMPOSED", limit)
        steps[name], state = optimizer.update(
            incoming, optimizer.init(x), x, value=value, grad=grad, residual_fn=rows
        )
        assert float(state.diagnostics.damping) == pytest.approx(damping)
    d2 = np.sum(a * a, axis=0)
    expected = -np.linalg.solve(a.T @ a + damping * np.diag(d2), incoming)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(steps["factored"], steps["decomposed"], atol=1e-8 * scale)
    np.testing.assert_allclose(steps["factored"], expected, atol=1e-8 * scale)


def test_gauss_newton_in_sample_space_takes_the_shortest_step(monkeypatch):
    monkeypatch.setattr(least_squares, "DECOMPOSED", 8)
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(20, 60)), rng.normal(size=20)
    rows = Residuals.of(lambda x, row: row["a"] @ x - row["b"], {"a": a, "b": b})
    solver = solvers.GaussNewton(rows, maxiter=1)
    found = solver.run(jnp.zeros(60)).params
    np.testing.assert_allclose(found, np.linalg.lstsq(a, b)[0], atol=1e-10)


def classifier(loss="softmax_cross_entropy", classes=4, n=12):
    rng = np.random.default_rng(3)
    batch: Batch = {
        "image": jnp.asarray(rng.normal(size=(n, 6))),
        "label": jnp.asarray(rng.integers(0, classes, n)),
        "mask": jnp.asarray([1.0] * (n - 2) + [0.0] * 2),
    }
    if loss == "squared_error":
        batch["label"] = jnp.asarray(rng.normal(size=(n, classes)))
    params = {"a": jnp.asarray(rng.normal(size=(6, 5))), "b": jnp.asarray(rng.normal(size=(5, 4)))}

    def predict(p, batch, key=None):
        return jnp.tanh(batch["image"] @ p["a"]) @ p["b"]

    return Objective.from_fns(predict, getattr(losses, loss), batch), params


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "squared_error"])
def test_an_objective_s_rows_give_its_gauss_newton_matrix_and_gradient(loss):
    objective, params = classifier(loss)
    rows = of_objective(objective, params, jnp.float64)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = lambda v: jax.flatten_util.ravel_pytree(objective.gnvp(params, unravel(v)))[0]  # noqa: E731
    dense = jax.vmap(product)(jnp.eye(flat.size))
    np.testing.assert_allclose(rows.jacobian.T @ rows.jacobian, dense, atol=1e-12)
    grad = jax.flatten_util.ravel_pytree(objective.grad(params))[0]
    np.testing.assert_allclose(rows.jacobian.T @ rows.residual, grad, atol=1e-10)


def test_examples_that_are_not_independent_are_not_taken_apart():
    objective, params = classifier()
    parts = objective.model.apply, objective.loss

    def centered(p, state, batch, **options):
        z, state = parts[0](p, state, batch, **options)
        return z - z.mean(axis=0, keepdims=True), state

    def contrasted(outputs, batch):
        return parts[1](outputs, batch) - jnp.mean(parts[1](outputs, batch))

    model = objective.model._replace(apply=centered)
    for changed in (
        replace(objective, model=model),
        replace(objective, loss=contrasted),
        replace(objective, regularizer=lambda p: 0.5 * jnp.sum(p["a"] ** 2)),
        replace(objective, microbatches=2),
        replace(objective, key=jax.random.key(0)),
    ):
        assert of_objective(changed, params, jnp.float64) is None
    assert of_objective(objective, params, jnp.float64) is not None


@pytest.mark.parametrize("points", [30, 4000])
def test_a_solver_takes_residuals_of_examples(points):
    t = np.linspace(0, 3, points)
    y = 2.5 * np.exp(-1.3 * t) + 0.5 + 0.05 * np.sin(17 * t)

    def residual(p, x):
        return p[0] * jnp.exp(-p[1] * x["t"]) + p[2] - x["y"]

    rows = Residuals.of(residual, {"t": jnp.asarray(t), "y": jnp.asarray(y)}, weight=1 / points)
    start = jnp.array([1.0, 0.1, 0.0])
    solver = solvers.LevenbergMarquardt(rows, maxiter=100, tol=1e-12)
    found = solver.run(start)
    expected = scipy.optimize.least_squares(lambda p: np.asarray(rows(p)), start, xtol=1e-14)
    np.testing.assert_allclose(found.params, expected.x, rtol=1e-7)
