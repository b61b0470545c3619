import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.optim import newton

OPTIONS = [{}, {"saddle_free": False}, {"trust_region": 1.0}]


def rosenbrock(x):
    return jnp.sum(100.0 * jnp.square(x[1::2] - jnp.square(x[::2])) + jnp.square(1.0 - x[::2]))


def test_a_quadratic_takes_one_step(minimize):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(8, 8))
    a = jnp.asarray(q @ q.T + np.eye(8), jnp.float32)
    b = jnp.asarray(rng.normal(size=8), jnp.float32)
    run = minimize(newton(), lambda x: 0.5 * x @ a @ x - b @ x, jnp.zeros(8), steps=1)
    np.testing.assert_allclose(run.params, np.linalg.solve(a, b), rtol=1e-3, atol=1e-4)
    assert float(run.diagnostics.reduction_ratio) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_rosenbrock(options, minimize):
    run = minimize(
        newton(**options), rosenbrock, jnp.array([-1.2, 1.0] * 2), tolerance=1e-3, steps=60
    )
    np.testing.assert_allclose(run.params, np.ones(4), atol=1e-3)
    assert np.all(np.diff(run.values) <= 1e-5 * np.abs(run.values[:-1]))


def test_converges_quadratically(minimize):
    with jax.enable_x64(True):
        f = lambda x: jnp.sum(jnp.exp(x) - 2.0 * x)  # noqa: E731
        run = minimize(newton(), f, jnp.array([0.5, 1.0, 1.3]), steps=7)
        norms = np.array(run.norms)
        near = norms[(norms < 0.1) & (norms > 1e-7)]
        assert np.all(near[1:] < near[:-1] ** 1.7)
        assert norms[-1] < 1e-12


@pytest.mark.parametrize("options", OPTIONS)
def test_leaves_a_saddle(options, minimize):
    def saddle(x):
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4

    run = minimize(newton(**options), saddle, jnp.array([1.0, 1e-4]), steps=40)
    assert run.values[-1] == pytest.approx(-0.25, abs=1e-3)


def test_the_damped_step_is_that_of_the_shifted_hessian():
    a = jnp.array([1.0, 5.0, -3.0])
    f = lambda x: 0.5 * jnp.sum(a * jnp.square(x))  # noqa: E731
    x = jnp.array([1.0, 1.0, 0.2])
    value, grad = jax.value_and_grad(f)(x)
    optimizer = newton(damping=0.5)
    updates, _ = optimizer.update(grad, optimizer.init(x), x, value=value, grad=grad, value_fn=f)
    np.testing.assert_allclose(updates, -grad / (jnp.abs(a) + 0.5), rtol=1e-4)


@pytest.mark.parametrize("radius", [0.01, 0.5, 100.0])
def test_the_trust_region_step_is_the_exact_minimizer(radius):
    a = jnp.array([1.0, 5.0, 30.0])
    f = lambda x: 0.5 * jnp.sum(a * jnp.square(x))  # noqa: E731
    x = jnp.ones(3)
    value, grad = jax.value_and_grad(f)(x)
    optimizer = newton(trust_region=radius)
    updates, _ = optimizer.update(grad, optimizer.init(x), x, value=value, grad=grad, value_fn=f)
    length = float(jnp.linalg.norm(updates))
    assert length == pytest.approx(min(radius, 3.0**0.5), rel=1e-3)
    # Optimality: (H + λ I) δ = −g with λ ≥ 0.
    lam = (-grad / updates) - a
    np.testing.assert_allclose(lam, lam[0], atol=2e-3 * float(jnp.max(a + lam)))
    assert float(lam[0]) > -1e-3


def test_chunks_do_not_change_the_hessian(minimize):
    a, b = (
        minimize(newton(chunk_size=c), rosenbrock, jnp.array([-1.2, 1.0] * 4), steps=3).params
        for c in (1, 3)
    )
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_uses_the_curvature_batch_and_the_regularizer():
    batch = {"x": jnp.eye(2), "y": jnp.ones(2)}
    objective = Objective.from_fns(
        lambda w, b: b["x"] @ w,
        lambda z, b: 0.5 * jnp.square(z - b["y"]),
        batch,
        regularizer=lambda w: 0.5 * jnp.sum(jnp.square(w)),
    )
    w = jnp.zeros(2)
    value, grad, _ = objective.value_and_grad(w)
    optimizer = newton()
    updates, _ = optimizer.update(
        grad, optimizer.init(w), w, value=value, grad=grad, objective=objective
    )
    np.testing.assert_allclose(updates, np.full(2, 1 / 3), rtol=1e-4)


def test_more_parameters_than_it_can_hold_are_refused():
    with pytest.raises(ArgumentError, match=r"5001.*hessian_free"):
        newton().init({"w": jnp.zeros(5001)})
    newton(max_parameters=5001).init({"w": jnp.zeros(5001)})
