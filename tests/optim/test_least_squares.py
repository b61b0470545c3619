"""Levenberg-Marquardt and Gauss-Newton against numpy's least squares and MINPACK's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jdl import losses
from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.optim import diagnostics, gauss_newton, levenberg_marquardt
from jdl.optim.result import ResultCode


def run(optimizer, residuals, x, steps=60, **extra):
    def f(x):
        return 0.5 * jnp.sum(jnp.square(residuals(x)))

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(f)(x)
        updates, state = optimizer.update(
            grad, state, x, value=value, grad=grad, residual_fn=residuals, **extra
        )
        return optax.apply_updates(x, updates), state

    state = optimizer.init(x)
    for _ in range(steps):
        x, state = step(x, state)
    return x, state, float(f(x))


def linear(m, n, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(m, n)).astype(np.float32)
    if rank is not None:
        a = a[:, :rank] @ rng.normal(size=(rank, n)).astype(np.float32)
    return a, rng.normal(size=m).astype(np.float32)


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 4, None), (4, 9, None), (12, 6, 3)])
def test_gauss_newton_takes_the_shortest_solution_in_one_step(m, n, rank):
    a, b = linear(m, n, rank)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with jax.enable_x64(True):
        optimizer = gauss_newton(rcond=1e-5)
        x, state, _ = run(optimizer, lambda x: jnp.asarray(a) @ x - b, jnp.zeros(n), steps=1)
        np.testing.assert_allclose(x, np.linalg.lstsq(a, b, rcond=1e-5)[0], rtol=1e-9, atol=1e-9)
        assert float(state.diagnostics.reduction_ratio) == pytest.approx(1.0, abs=1e-6)


def test_undamped_levenberg_marquardt_is_gauss_newton():
    a, b = linear(12, 4)
    residuals = lambda x: jnp.tanh(jnp.asarray(a) @ x) - 0.3 * b  # noqa: E731
    one, *_ = run(gauss_newton(), residuals, jnp.zeros(4), steps=1)
    other, *_ = run(levenberg_marquardt(damping=0.0), residuals, jnp.zeros(4), steps=1)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_damped_step_is_that_of_the_normal_equations(scaled):
    a, b = linear(10, 3)
    a *= np.array([1.0, 10.0, 100.0], np.float32)
    optimizer = levenberg_marquardt(damping=0.5, scaled=scaled)
    x, *_ = run(optimizer, lambda x: jnp.asarray(a) @ x - b, jnp.zeros(3), steps=1)
    d = np.sum(a * a, axis=0) if scaled else np.ones(3)
    wanted = np.linalg.solve(a.T @ a + 0.5 * np.diag(d), a.T @ b)
    np.testing.assert_allclose(x, wanted, rtol=1e-3)


def test_the_objective_gives_what_the_residuals_give():
    with jax.enable_x64(True):
        a, b = linear(12, 4)
        batch = {"x": jnp.asarray(a, jnp.float64), "y": jnp.asarray(b, jnp.float64)}
        objective = Objective.from_fns(
            lambda w, batch: jnp.tanh(batch["x"] @ w),
            lambda z, batch: 0.5 * jnp.square(z - batch["y"]),
            batch,
        )
        x = 0.1 * jnp.ones(4)
        value, grad, _ = objective.value_and_grad(x)

        def residuals(w):  # the mean over the batch: residuals over the root of its size
            return (jnp.tanh(batch["x"] @ w) - batch["y"]) / 12**0.5

        for optimizer in (levenberg_marquardt(damping=0.1), gauss_newton()):
            steps = {}
            for name, extra in (("o", {"objective": objective}), ("r", {"residual_fn": residuals})):
                steps[name], state = optimizer.update(
                    grad, optimizer.init(x), x, value=value, grad=grad, **extra
                )
                assert int(state.diagnostics.termination) == ResultCode.ACCEPTED
            np.testing.assert_allclose(steps["o"], steps["r"], rtol=1e-9)


def test_other_convex_losses_take_their_own_curvature():
    """Logistic regression: Gauss-Newton is Newton, and one step is numpy's."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    batch = {"x": jnp.asarray(x), "label": jnp.asarray(rng.integers(0, 2, 40), jnp.float32)}
    objective = Objective.from_fns(
        lambda w, batch: batch["x"] @ w, losses.sigmoid_cross_entropy, batch
    )
    w = jnp.zeros(3)
    value, grad, _ = objective.value_and_grad(w)
    optimizer = gauss_newton()
    updates, _ = optimizer.update(
        grad, optimizer.init(w), w, value=value, grad=grad, objective=objective
    )
    hessian = x.T @ x / 4 / 40  # σ′(0) = ¼
    np.testing.assert_allclose(updates, -np.linalg.solve(hessian, grad), rtol=1e-3)


@pytest.mark.parametrize("trust_region", [None, 1.0])
def test_levenberg_marquardt_ends_where_minpack_does(trust_region):
    with jax.enable_x64(True):
        t = np.linspace(0, 3, 20)
        y = 2.5 * np.exp(-1.3 * t) + 0.5 + 0.05 * np.sin(17 * t)

        def residuals(p):
            return p[0] * jnp.exp(-p[1] * jnp.asarray(t)) + p[2] - jnp.asarray(y)

        optimizer = levenberg_marquardt(trust_region=trust_region)
        x, _, _ = run(optimizer, residuals, jnp.array([1.0, 0.1, 0.0]), steps=60)
        found = scipy.optimize.least_squares(
            lambda p: np.asarray(residuals(p)), [1.0, 0.1, 0.0], method="lm", xtol=1e-12
        )
        np.testing.assert_allclose(x, found.x, rtol=1e-6)


@pytest.mark.parametrize("name", ["rosenbrock", "lanczos"])
def test_levenberg_marquardt_gets_through_curved_valleys(name):
    """Whose damping must be small, but not too small, all along; both minima are 0."""
    with jax.enable_x64(True):
        t = 0.05 * jnp.arange(24.0)
        sums = lambda p: jnp.exp(-jnp.outer(t, p[3:])) @ p[:3]  # noqa: E731
        y = sums(jnp.array([0.0951, 0.8607, 1.5576, 1.0, 3.0, 5.0]))
        residuals, start, steps = {
            "rosenbrock": (
                lambda x: jnp.stack([100.0 * (x[1] - x[0] ** 2), 1.0 - x[0]]),
                jnp.array([-1.2, 1.0]),
                80,
            ),
            "lanczos": (lambda p: sums(p) - y, jnp.array([1.2, 5.6, 6.5, 0.3, 5.5, 7.6]), 140),
        }[name]
        value = run(levenberg_marquardt(), residuals, start, steps=steps)[2]
        assert value < 1e-18


def test_residuals_in_a_region_without_values_end_in_words():
    def residuals(x):
        return jnp.log(x)  # NaN below zero

    x, state, value = run(levenberg_marquardt(), residuals, jnp.array([5.0]), steps=30)
    assert float(x[0]) == pytest.approx(1.0, abs=1e-3)
    assert value < 1e-6
    x, state, _ = run(levenberg_marquardt(), residuals, jnp.array([-1.0]), steps=3)
    assert int(state.diagnostics.termination) == ResultCode.NOT_FINITE
    assert float(x[0]) == -1.0


def test_what_it_does_without_is_named():
    x = jnp.zeros(2)
    for optimizer in (levenberg_marquardt(), gauss_newton()):
        with pytest.raises(ArgumentError, match=r"`residual_fn`.*objective"):
            optimizer.update(x, optimizer.init(x), x, value=jnp.zeros(()), grad=x)
        with pytest.raises(ArgumentError, match=r"6000.*hessian_free"):
            optimizer.init(jnp.zeros(6000))
    assert diagnostics.read(levenberg_marquardt().init(x)) is not None


@pytest.mark.parametrize(
    ("make", "options", "name"),
    [
        (levenberg_marquardt, {"damping": -1.0}, "damping"),
        (levenberg_marquardt, {"trust_region": 0.0}, "trust_region"),
        (levenberg_marquardt, {"max_parameters": 0}, "max_parameters"),
        (gauss_newton, {"rcond": 2.0}, "rcond"),
        (gauss_newton, {"c1": 0.0}, "c1"),
    ],
)
def test_arguments_out_of_range(make, options, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        make(**options)


@pytest.mark.parametrize("ratio", [1e6, 1e10])
def test_columns_of_any_lengths_are_columns(ratio):
    low, high = 1.0 / ratio**0.5, ratio**0.5
    f = lambda p: jnp.stack([low * p[0] - 1, high * p[1] - 1, low * p[0] + high * p[1] - 2])  # noqa: E731
    x, _ = run(gauss_newton(), f, jnp.zeros(2), steps=3)[:2]
    np.testing.assert_allclose(x * jnp.array([low, high]), 1.0, rtol=1e-5)
