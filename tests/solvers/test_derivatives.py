"""Derivatives of solutions: forward, reverse, of bounds, of closures, of unrolled iterations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl import solvers
from jdl.solvers import implicit
from jdl.solvers.least_squares import _triangular_factor

A = np.array([[3.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 5.0]])
B = np.array([1.0, 2.0, -3.0])
INVERSE = np.linalg.inv(A)


@pytest.fixture
def float64():
    """Derivatives are exact: in float64 they agree to many digits."""
    with jax.enable_x64(True):
        yield


def quadratic(x, b):
    return 0.5 * jnp.vdot(x, jnp.asarray(A, x.dtype) @ x) - jnp.vdot(b, x)


@pytest.mark.parametrize("name", ["LBFGS", "Newton"])
def test_forward_and_reverse_mode_are_the_inverse(name, float64):
    solver = getattr(solvers, name)(quadratic, tol=1e-10)
    solution = lambda b: solver.run(jnp.zeros(3), b).params  # noqa: E731
    np.testing.assert_allclose(jax.jacrev(solution)(jnp.asarray(B)), INVERSE, atol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(solution)(jnp.asarray(B)), INVERSE, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_a_leaf_whose_condition_does_not_depend_on_the_argument(dtype):
    x = jax.random.normal(jax.random.key(0), (50, 3))
    y = x @ jnp.arange(3.0) + 1.0

    def ridge(p, strength):
        free = p["b"].astype(jnp.float32)
        return jnp.mean((x @ p["w"] + free - y) ** 2) + strength * jnp.sum(p["w"] ** 2)

    start = {"w": jnp.zeros(3), "b": jnp.zeros((), dtype)}
    total = lambda s: jnp.sum(solvers.LBFGS(ridge, tol=1e-5).run(start, s).params["w"])  # noqa: E731
    centered, target = np.asarray(x - x.mean(0, keepdims=True)), np.asarray(y - y.mean())
    exact = lambda s: np.sum(  # noqa: E731
        np.linalg.solve(centered.T @ centered / 50 + s * np.eye(3), centered.T @ target / 50)
    )
    slope = (exact(0.1 + 1e-3) - exact(0.1 - 1e-3)) / 2e-3
    for derivative in (jax.grad, jax.jacfwd):
        assert float(derivative(total)(0.1)) == pytest.approx(slope, rel=2e-2)


def test_closures_and_a_solve_of_one_s_own(float64):
    calls = []

    def solve(product, b):
        calls.append(1)
        return implicit.dense(product, b)

    def first(b):
        solver = solvers.LBFGS(lambda x: quadratic(x, b), tol=1e-10, implicit_diff_solve=solve)
        return solver.run(jnp.zeros(3)).params[0]

    np.testing.assert_allclose(jax.jit(jax.grad(first))(jnp.asarray(B)), INVERSE[0], atol=1e-12)
    assert calls


def test_in_a_box_only_free_variables_have_derivatives_and_bounds_have_them_too(float64):
    solver = solvers.LBFGSB(quadratic, tol=1e-10)
    b = jnp.asarray(B)
    upper = jnp.array([jnp.inf, 0.3, jnp.inf])  # the second variable's bound is active

    def solution(upper, b):
        return solver.run(jnp.zeros(3), (-jnp.inf, upper), b).params

    x = solution(upper, b)
    free = np.array([0, 2])
    block = np.linalg.inv(A[np.ix_(free, free)])
    expected = block @ (B[free] - A[free, 1] * 0.3)
    np.testing.assert_allclose(x, [expected[0], 0.3, expected[1]], atol=1e-9)
    by_bound, by_b = jax.jacrev(solution, (0, 1))(upper, b)
    full = np.zeros((3, 3))
    full[np.ix_(free, free)] = block
    np.testing.assert_allclose(by_b, full, atol=1e-12)
    np.testing.assert_allclose(by_bound[1, 1], 1.0, atol=1e-12)
    np.testing.assert_allclose(by_bound[free, 1], -block @ A[free, 1], atol=1e-12)


@pytest.mark.parametrize("name", ["OptaxSolver", "GradientDescent"])
def test_iterations_of_given_length_are_differentiated_themselves(name, float64):
    def run(rate):
        options = {"maxiter": 5, "tol": 0.0, "implicit_diff": False}
        if name == "OptaxSolver":
            solver = solvers.OptaxSolver(quadratic, optax.sgd(rate), **options)
        else:
            solver = solvers.GradientDescent(
                quadratic, stepsize=lambda i: rate, acceleration=False, **options
            )
        return jnp.sum(solver.run(jnp.zeros(3), jnp.asarray(B)).params)

    def by_hand(rate):
        x = jnp.zeros(3)
        for _ in range(5):
            x = x - rate * (A @ x - B)
        return jnp.sum(x)

    assert float(jax.grad(run)(0.1)) == pytest.approx(float(jax.grad(by_hand)(0.1)), rel=1e-12)


def test_a_warm_start_continues_with_the_optimizer_s_state(float64):
    solver = solvers.LBFGS(quadratic, tol=1e-10)
    first = solver.run(jnp.zeros(3), jnp.asarray(B))
    cold = solver.run(first.params, jnp.asarray(1.5 * B))
    warm = solver.run(first, jnp.asarray(1.5 * B))
    np.testing.assert_allclose(warm.params, INVERSE @ (1.5 * B), atol=1e-9)
    assert int(warm.state.iter_num) <= int(cold.state.iter_num)


def test_the_triangular_factor_has_the_matrix_s_singular_values():
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(3000, 12)))[0]
    v = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    for condition in (1e1, 1e5):
        matrix = ((u * np.logspace(0, -np.log10(condition), 12)) @ v.T).astype(np.float32)
        factor = np.asarray(_triangular_factor(jnp.asarray(matrix.T)), np.float64)
        expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        found = np.linalg.svd(factor, compute_uv=False)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        np.testing.assert_allclose(factor.T @ factor, matrix.T @ matrix, atol=1e-5)


def test_the_triangular_factor_of_badly_scaled_columns():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(20000, 4)) * [1e-15, 1.0, 1e8, 0.0]).astype(np.float32)
    factor = np.asarray(_triangular_factor(jnp.asarray(matrix.T)), np.float64)
    lengths = np.linalg.norm(matrix.astype(np.float64), axis=0)
    np.testing.assert_allclose(np.linalg.norm(factor, axis=0), lengths, rtol=1e-5)
    scaled, found = (a[:, :3] / lengths[:3] for a in (matrix.astype(np.float64), factor))
    np.testing.assert_allclose(found.T @ found, scaled.T @ scaled, atol=1e-5)


def test_tall_least_squares_goes_by_the_reduced_jacobian():
    rng = np.random.default_rng(1)
    t = jnp.linspace(0.0, 4.0, 12000)
    model = lambda p: p[0] * jnp.exp(-p[1] * t) + p[2] * jnp.cos(3.0 * t)  # noqa: E731
    y = model(jnp.array([2.0, 0.7, 0.5])) + 0.01 * jnp.asarray(rng.normal(size=12000), jnp.float32)
    solver = solvers.LevenbergMarquardt(lambda p: model(p) - y, tol=1e-2)
    params, state = solver.run(jnp.array([1.0, 0.3, 0.0]))
    np.testing.assert_allclose(params, [2.0, 0.7, 0.5], atol=2e-3)
    assert int(state.iter_num) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LBFGS", "GradientDescent"])
def test_python_s_own_loop_has_the_same_solution_and_derivatives(name):
    weights = jnp.array([1.0, 2.0, 3.0])

    def fun(x, a):
        return jnp.sum(weights * jnp.square(x - a))

    solver = getattr(solvers, name)(fun, maxiter=60, jit=False)
    np.testing.assert_allclose(solver.run(jnp.zeros(3), 2.0).params, 2.0, atol=1e-3)
    slope = jax.grad(lambda a: jnp.sum(solver.run(jnp.zeros(3), a).params))(2.0)
    np.testing.assert_allclose(slope, 3.0, rtol=1e-4)
