import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl.core.check import ArgumentError
from jdl.optim import nonlinear_cg
from jdl.optim.nonlinear_cg import METHODS


def rosenbrock(x):
    return jnp.sum(100.0 * jnp.square(x[1::2] - jnp.square(x[::2])) + jnp.square(1.0 - x[::2]))


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_takes_as_many_steps_as_it_has_eigenvalues(method, minimize):
    with jax.enable_x64(True):
        a = jnp.asarray(np.repeat([1.0, 3.0, 10.0, 40.0], 3))
        f = lambda x: 0.5 * jnp.sum(a * jnp.square(x - 1.0))  # noqa: E731
        # Conjugacy needs exact line searches.
        run = minimize(nonlinear_cg(method=method, c1=1e-6, c2=1e-5), f, jnp.zeros(12), steps=5)
        assert run.norms[4] < 1e-3 * run.norms[0]


@pytest.mark.parametrize("method", ["polak_ribiere", "hestenes_stiefel", "hager_zhang"])
def test_rosenbrock(method, minimize):
    run = minimize(
        nonlinear_cg(method=method), rosenbrock, jnp.array([-1.2, 1.0]), tolerance=1e-3, steps=150
    )
    np.testing.assert_allclose(run.params, np.ones(2), atol=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_never_rises_and_descends_far(method, minimize):
    run = minimize(nonlinear_cg(method=method), rosenbrock, jnp.array([-1.2, 1.0]), steps=60)
    assert np.all(np.diff(run.values) <= 1e-5 * np.abs(run.values[:-1]))
    assert run.values[-1] < 0.3 * run.values[0]


def betas(g, g_new, d):
    y = g_new - g
    dy = d @ y
    return {
        "polak_ribiere": max(g_new @ y / (g @ g), 0.0),
        "fletcher_reeves": g_new @ g_new / (g @ g),
        "hestenes_stiefel": max(g_new @ y / dy, 0.0),
        "dai_yuan": g_new @ g_new / dy,
        "hager_zhang": max(
            (y - 2 * d * (y @ y) / dy) @ g_new / dy,
            -1 / (np.linalg.norm(d) * min(0.01, np.linalg.norm(g))),
        ),
    }


@pytest.mark.parametrize("method", METHODS)
def test_beta_is_the_formula_on_the_batch_of_its_own_step(method):
    f = lambda x, shift: jnp.sum(jnp.cosh(x - shift) + 0.3 * jnp.square(x))  # noqa: E731
    optimizer = nonlinear_cg(method=method)
    x = jnp.array([1.0, -2.0, 0.5])
    state = optimizer.init(x)
    for shift in (0.0, 0.4, -0.2):

        def own(x, shift=shift):
            return f(x, shift)

        value, grad = jax.value_and_grad(own)(x)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=own)
        x = optax.apply_updates(x, updates)
        after = np.asarray(jax.grad(own)(x), float)
        expected = betas(np.asarray(grad, float), after, np.asarray(state.direction, float))
        assert float(state.beta) == pytest.approx(expected[method], rel=1e-2, abs=1e-5)


def test_powell_restarts_where_gradients_lose_orthogonality(minimize):
    f = lambda x: jnp.sum(jnp.square(jnp.square(x)))  # noqa: E731
    run = minimize(nonlinear_cg(restart_threshold=1e-9), f, jnp.array([1.0, 2.0]), steps=3)
    assert float(run.state.beta) == 0.0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "polak"}, "method"),
        ({"c2": 0.7}, "c2"),
        ({"growth": 0.5}, "growth"),
        ({"restart_threshold": 0.0}, "restart_threshold"),
    ],
)
def test_arguments_out_of_range(options, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        nonlinear_cg(**options)
