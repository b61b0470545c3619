"""Proximal and projected gradient descent against jaxopt and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import linear_model

from jdl import solvers
from jdl.core.check import ArgumentError

rng = np.random.default_rng(5)
X, Y = rng.normal(size=(40, 6)), rng.normal(size=40)
POINTS = {"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def least_squares(w, scale=1.0):
    return 0.5 * scale * jnp.mean(jnp.square(jnp.asarray(X) @ w - jnp.asarray(Y)))


OPERATORS = {
    "prox_none": (None,),
    "prox_lasso": (0.3,),
    "prox_non_negative_lasso": (0.3,),
    "prox_elastic_net": ((0.3, 0.7),),
    "prox_group_lasso": (0.4,),
    "prox_ridge": (0.4,),
    "prox_non_negative_ridge": (0.4,),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_proximity_operators_are_jaxopts(name, scaling, both):
    point = jax.tree.map(jnp.asarray, POINTS)
    ours, theirs = both(lambda lib: getattr(lib.prox, name)(point, *OPERATORS[name], scaling))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, theirs)


SETS = {
    "projection_non_negative": (),
    "projection_box": ((-0.2, 0.3),),
    "projection_hypercube": (0.4,),
    "projection_simplex": (1.5,),
    "projection_l1_sphere": (0.8,),
    "projection_l1_ball": (0.8,),
    "projection_l2_sphere": (0.8,),
    "projection_l2_ball": (0.8,),
    "projection_linf_ball": (0.3,),
    "projection_hyperplane": ((np.arange(1.0, 5.0), 0.7),),
    "projection_halfspace": ((np.arange(1.0, 5.0), -0.7),),
}


@pytest.mark.parametrize("name", SETS)
def test_projections_are_jaxopts(name, both):
    point = jnp.asarray([0.9, -0.4, 0.2, 0.6])
    rest = jax.tree.map(jnp.asarray, SETS[name])
    ours, theirs = both(lambda lib: getattr(lib.projection, name)(point, *rest))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("acceleration", [True, False])
def test_the_lasso_is_scikit_learns(acceleration):
    strength = 0.05
    solver = solvers.ProximalGradient(
        least_squares, solvers.prox.prox_lasso, tol=1e-10, maxiter=5000, acceleration=acceleration
    )
    found = solver.run(jnp.zeros(6), strength)
    theirs = linear_model.Lasso(alpha=strength, fit_intercept=False, tol=1e-12).fit(X, Y)
    np.testing.assert_allclose(found.params, theirs.coef_, atol=1e-8)
    assert np.array_equal(np.asarray(found.params) == 0, theirs.coef_ == 0)
    assert int(found.state.status) == solvers.ResultCode.CONVERGED


def test_without_momentum_and_with_a_given_step_the_iterates_are_jaxopts(both):
    def script(lib):
        options = {"stepsize": 0.2, "maxiter": 7, "tol": 1e-12, "acceleration": False}
        solver = lib.ProximalGradient(least_squares, lib.prox.prox_lasso, **options)
        return solver.run(jnp.ones(6), 0.05).params

    np.testing.assert_allclose(*both(script), rtol=1e-10)


@pytest.mark.parametrize("name", ["projection_simplex", "projection_l2_ball"])
def test_a_constrained_solution_and_its_derivatives_are_jaxopts(name, both):
    def script(lib):
        projection = getattr(lib.projection, name)
        solver = lib.ProjectedGradient(least_squares, projection, tol=1e-11, maxiter=3000)

        def solution(size, scale):
            return solver.run(jnp.ones(6) / 6, size, scale=scale).params

        return solution(0.1, 2.0), jax.jacrev(solution, (0, 1))(0.1, 2.0)

    with jax.numpy_dtype_promotion("standard"):  # optax's derivative of the simplex's is not strict
        ours, theirs = both(script)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_what_converged_is_what_is_returned():
    """Momentum may put the last gradient's point at the solution, and the iterate beside it."""
    solver = solvers.ProximalGradient(
        lambda w: 0.5 * jnp.square(w - 1.0), stepsize=0.05, tol=2e-2, maxiter=2000
    )
    found = jax.vmap(solver.run, in_axes=(0, None))(jnp.linspace(-3.0, 0.5, 200), None)
    assert (np.asarray(found.state.status) == solvers.ResultCode.CONVERGED).all()
    np.testing.assert_allclose(found.params, 1.0, atol=2.5e-2)


def test_the_hyperparameters_may_be_given_by_name_and_a_run_goes_on():
    solver = solvers.ProximalGradient(least_squares, solvers.prox.prox_lasso, tol=1e-9)
    once = solver.run(jnp.zeros(6), hyperparams_prox=0.1).params
    np.testing.assert_allclose(once, solver.run(jnp.zeros(6), 0.1).params, atol=0)
    short = solvers.ProximalGradient(least_squares, solvers.prox.prox_lasso, maxiter=4, tol=1e-9)
    found = solver.run(short.run(jnp.zeros(6), 0.1), 0.1).params
    np.testing.assert_allclose(found, once, atol=1e-8)
    state, params = solver.init_state(jnp.zeros(6), 0.1), jnp.zeros(6)
    for _ in range(int(solver.run(jnp.zeros(6), 0.1).state.iter_num)):
        params, state = solver.update(params, state, 0.1)
    np.testing.assert_allclose(params, once, atol=1e-12)


def test_the_group_lasso_is_zero_at_zero_and_can_be_differentiated_there():
    gradient = jax.grad(lambda x: jnp.sum(solvers.prox.prox_group_lasso(x, 1.0)))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, 0.0)


def test_polyaks_steps_are_jaxopts(both):
    def script(lib):
        options = {"maxiter": 9, "tol": 0.0, "max_stepsize": 2.0, "delta": 0.1}
        solver = lib.PolyakSGD(least_squares, **options)
        return solver.run(jnp.ones(6)).params

    np.testing.assert_allclose(*both(script), rtol=1e-8)
    with pytest.raises(ArgumentError, match="variant"):
        solvers.PolyakSGD(least_squares, variant="SPS")
