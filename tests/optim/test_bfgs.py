"""BFGS and the self-scaled Broyden method against formulas, SciPy and a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jdl import solvers
from jdl.core.check import ArgumentError
from jdl.optim import bfgs, by_name
from jdl.optim.bfgs import _updated
from jdl.optim.linesearch import LineSearchResult


def _published(h, s, y, sbs):
    """Urbán, Stefanou and Pons (2025), formulas 7 to 23, as the paper writes them."""
    n, rho = len(s), 1 / (y @ s)
    hy = h @ y
    yhy = y @ hy
    hk, bk = yhy * rho, sbs * rho
    ak = hk * bk - 1
    minus = min(1.0, hk * (1 - np.sqrt(ak / (1 + ak))))
    theta = max((minus - 1) / ak, min(1 / minus, (1 - bk) / bk))
    sigma = 1 + theta * ak
    root, least = sigma ** (1 / (1 - n)), min(1.0, 1 / bk)
    tau = least * min(root, 1 / theta) if theta > 0 else min(least * root, sigma)
    phi = (1 - theta) / (1 + ak * theta)
    v = np.sqrt(yhy) * (s * rho - hy / yhy)
    inner = h - np.outer(hy, hy) / yhy + phi * np.outer(v, v)
    return inner / tau + rho * np.outer(s, s)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), scale=st.floats(-6, 6))
@example(seed=1034, n=2, scale=-5.96875)
def test_the_update_is_the_published_one_keeps_curvature_and_the_secant_equation(seed, n, scale):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n)) + 2 * np.eye(n)
    h = 10.0**scale * root @ root.T
    s = rng.normal(size=n)
    hessian = rng.normal(size=(n, n)) + 3 * np.eye(n)
    y = hessian @ hessian.T @ s
    sbs = float(s @ np.linalg.solve(h, s))
    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in (h, s, y, s @ y)]
        found, plain = np.asarray(_updated(*given, jnp.asarray(sbs))), np.asarray(_updated(*given))
    expected = _published(h, s, y, sbs)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())
    left = np.eye(n) - np.outer(s, y) / (s @ y)
    of_bfgs = left @ h @ left.T + np.outer(s, s) / (s @ y)
    np.testing.assert_allclose(plain, of_bfgs, rtol=1e-6, atol=1e-8 * np.abs(of_bfgs).max())
    for matrix in (found, plain):
        rounding = 1e-11 * np.linalg.norm(matrix) * np.linalg.norm(y)
        atol = 1e-6 * np.abs(s).max() + rounding
        np.testing.assert_allclose(matrix @ y, s, rtol=1e-5, atol=atol)
        values = np.linalg.eigvalsh(matrix)
        assert values[0] > -1e-9 * values[-1]


def _rosenbrock(x):
    return jnp.sum(100.0 * jnp.square(x[1:] - jnp.square(x[:-1])) + jnp.square(1.0 - x[:-1]))


@pytest.mark.parametrize("update", ["bfgs", "ssbroyden"])
def test_it_finds_the_minimum_of_rosenbrocks_function(update):
    with jax.enable_x64(True):
        found = solvers.BFGS(_rosenbrock, update=update, tol=1e-9).run(jnp.full(10, -1.0))
        np.testing.assert_allclose(found.params, np.ones(10), atol=1e-8)
        assert int(found.state.iter_num) < 120


def test_without_scaling_and_with_exact_steps_it_is_conjugate_gradients_on_a_quadratic():
    """Nocedal and Wright, theorem 6.4: n steps, and H is the inverse Hessian."""
    with jax.enable_x64(True):
        hessian = jnp.diag(jnp.array([1.0, 3.0, 10.0, 40.0]))
        value = lambda x: 0.5 * x @ hessian @ x  # noqa: E731

        def exact(ctx, direction, first, last, **limits):
            step = -(ctx.grad @ direction) / (direction @ hessian @ direction)
            new = ctx.params + step * direction
            one = jnp.ones((), jnp.int32)
            return LineSearchResult(step, value(new), 0.0 * step, hessian @ new, one, one)

        optimizer, x = bfgs(scaled=False, search=exact), jnp.ones(4)
        state = optimizer.init(x)
        for _ in range(4):
            f, grad = jax.value_and_grad(value)(x)
            updates, state = optimizer.update(grad, state, x, value=f, grad=grad, value_fn=value)
            x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(x, 0.0, atol=1e-12)
        np.testing.assert_allclose(state.H, jnp.linalg.inv(hessian), atol=1e-10)


def _poisson():
    """½ mean of the squared residuals of u″ = −π² sin πx, u = x (1 − x) net(x), 1-20-20-1."""
    points = jnp.linspace(0.02, 0.98, 60)

    def net(params, x):
        h = jnp.atleast_1d(x)
        for w, b in params[:-1]:
            h = jnp.tanh(h @ w + b)
        return (h @ params[-1][0] + params[-1][1])[0]

    def u(params, x):
        return x * (1.0 - x) * net(params, x)

    def residual(params, x):
        bend = jax.grad(jax.grad(lambda x: u(params, x)))(x)
        return bend + jnp.pi**2 * jnp.sin(jnp.pi * x)

    def value(params):
        return 0.5 * jnp.mean(jnp.square(jax.vmap(lambda x: residual(params, x))(points)))

    def error(params):
        x = jnp.linspace(0.0, 1.0, 201)
        found, exact = jax.vmap(lambda x: u(params, x))(x), jnp.sin(jnp.pi * x)
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

    rng, start = np.random.default_rng(0), []
    for a, b in ((1, 20), (20, 20), (20, 1)):
        start.append((jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / (a + b))), jnp.zeros(b)))
    return value, error, start


@pytest.mark.slow
def test_self_scaling_gains_digits_on_a_physics_informed_network():
    with jax.enable_x64(True):
        value, error, start = _poisson()
        errors = {
            update: float(
                error(solvers.BFGS(value, update=update, maxiter=600, tol=0.0).run(start).params)
            )
            for update in ("bfgs", "ssbroyden")
        }
    assert errors["ssbroyden"] < 1e-7
    assert errors["ssbroyden"] < 0.1 * errors["bfgs"]


def test_too_many_parameters_and_unknown_updates_are_refused():
    with pytest.raises(ArgumentError, match="at most 3 numbers"):
        bfgs(max_parameters=3).init(jnp.zeros(4))
    with pytest.raises(ArgumentError, match="ssbroyden"):
        bfgs(update="broyden")
    assert by_name("ssbroyden").init(jnp.zeros(2)).H.shape == (2, 2)
