"""jaxopt's arguments mean here what they mean there: the same iterates where the algorithm is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl import solvers

rng = np.random.default_rng(3)
A, B = rng.normal(size=(30, 4)), rng.normal(size=30)
START = np.array([-1.2, 1.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rosenbrock(x, a=1.0):
    return 100.0 * jnp.square(x[1] - jnp.square(x[0])) + jnp.square(a - x[0])


def convex(x):  # where every pair has positive curvature
    return jnp.mean(jnp.log(jnp.cosh(jnp.asarray(A) @ x - jnp.asarray(B))))


def residuals(x):
    return jnp.sqrt(2.0) * jnp.stack([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])


BACK = {"linesearch": "backtracking", "use_gamma": True}
RUNS = {
    "LBFGS": {"stepsize": 0.5, "history_size": 3},
    "LBFGS without gamma": {"stepsize": lambda k: 0.1 * (k + 1), "use_gamma": False},
    "LBFGS of no history": {"stepsize": 0.1, "history_size": 0},
    "LBFGS backtracking": {**BACK, "max_stepsize": 8.0},
    "LBFGS from the longest": {**BACK, "linesearch_init": "max", "max_stepsize": 8.0},
    "LBFGS from the last": {**BACK, "linesearch_init": "current", "max_stepsize": 0.5},
    "BFGS": {"stepsize": 0.5},
    "GradientDescent": {"stepsize": 0.1, "acceleration": False},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_iterates_as_jaxopt_s(name, both):
    def script(lib):
        options = {"maxiter": 6, "tol": 1e-12, **RUNS[name]}
        solver = getattr(lib, name.split()[0])(convex, **options)
        params, state = solver.run(jnp.zeros(4))
        # jaxopt's gradient descent tells the distance of the step, not ∇f at its end.
        return params, state.iter_num, solver.l2_optimality_error(params)

    ours, theirs = both(script)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


def test_states_have_jaxopt_s_fields(both):
    def script(lib):
        solver = lib.LBFGS(convex, stepsize=0.5, maxiter=4, history_size=4)
        state = solver.run(jnp.zeros(4)).state
        return state.s_history, state.y_history, state.rho_history, state.gamma, state.grad

    ours, theirs = both(script)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    for name in ("iter_num", "num_fun_eval", "num_grad_eval", "num_linesearch_iter"):
        assert getattr(solvers.LBFGS(rosenbrock).init_state(START), name).dtype == jnp.int64
    with pytest.raises(AttributeError, match="damping_factor"):
        solvers.LBFGS(rosenbrock).init_state(START).damping_factor  # noqa: B018


@pytest.mark.parametrize("condition", ["armijo", "goldstein", "strong-wolfe", "wolfe"])
def test_backtracking_takes_jaxopt_s_steps(condition, both):
    def script(lib):
        options = {"condition": condition, "decrease_factor": 0.6, "max_stepsize": 0.9}
        search = lib.BacktrackingLineSearch(rosenbrock, **options)
        solver = lib.LBFGS(rosenbrock, linesearch=search, use_gamma=True, maxiter=2, tol=1e-9)
        params, state = solver.run(jnp.asarray(START))
        return params, state.stepsize

    ours, theirs = both(script)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("solver", ["cholesky", "lu", "qr", "inv"])
def test_levenberg_marquardt_after_madsen_and_nielsen(solver, both):
    def script(lib):
        run = lib.LevenbergMarquardt(
            residuals,
            maxiter=8,
            tol=1e-12,
            damping_parameter=1e-3,
            solver=solver,
            geodesic=solver == "lu",
            materialize_jac=True,
        ).run(jnp.asarray(START))
        state = run.state
        return run.params, state.iter_num, state.damping_factor, state.increase_factor

    ours, theirs = both(script)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_levenberg_marquardt_with_a_solver_and_a_jacobian_of_one_s_own():
    def dense(product, b, ridge, init=None):
        return jnp.linalg.solve(jax.vmap(product)(jnp.eye(2)) + ridge * jnp.eye(2), b)

    options = {"maxiter": 8, "tol": 1e-12, "damping_parameter": 1e-3}
    run = lambda **more: solvers.LevenbergMarquardt(residuals, **options, **more).run(START).params  # noqa: E731
    expected = run()
    np.testing.assert_allclose(run(solver=dense), expected, rtol=1e-9)
    np.testing.assert_allclose(run(jac_fun=jax.jacrev(residuals)), expected, rtol=1e-9)


def test_reverse_mode_through_an_unrolled_run(both):
    def script(lib, **options):
        names = ("LBFGS", "BFGS", "NonlinearCG")
        solve = lambda name, a: getattr(lib, name)(  # noqa: E731
            rosenbrock, implicit_diff=False, maxiter=40, tol=1e-6, maxls=15, **options
        ).run(jnp.zeros(2), a)
        names = names[:1] if options else names
        return [jax.grad(lambda a, name=name: solve(name, a).params[0])(1.2) for name in names]

    np.testing.assert_allclose(script(solvers), 1.0, rtol=1e-3)  # x₀* = a
    options = {"linesearch": "backtracking", "use_gamma": True}
    ours, theirs = both(lambda lib: script(lib, **options))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("name", ["GaussNewton", "LevenbergMarquardt"])
def test_reverse_mode_through_unrolled_least_squares(name):
    def solution(a):
        r = lambda x: jnp.stack([10.0 * (x[1] - x[0] ** 2), a - x[0]])  # noqa: E731
        return getattr(solvers, name)(r, implicit_diff=False, tol=1e-8).run(START).params

    np.testing.assert_allclose(jax.jacrev(solution)(1.2), [1.0, 2.4], rtol=1e-6)


@pytest.mark.parametrize("name", ["LBFGS", "NonlinearCG", "GradientDescent"])
def test_complex_parameters_are_two_real_ones(name):
    m = jnp.asarray(rng.normal(size=(4, 2)) + 1j * rng.normal(size=(4, 2)))
    loss = lambda z: jnp.sum(jnp.abs(m @ z - 1.0) ** 2)  # noqa: E731
    z = jnp.array([1 - 1j, 1j])
    real = lambda x: loss(jax.lax.complex(x[0], x[1]))  # noqa: E731
    make = getattr(solvers, name)
    one, state = make(loss, maxiter=5).run(z)
    other = make(real, maxiter=5).run(jnp.stack([z.real, z.imag])).params
    np.testing.assert_allclose(one, jax.lax.complex(other[0], other[1]), rtol=1e-12)
    np.testing.assert_allclose(state.grad, jax.grad(loss)(one), rtol=1e-9)
    best = np.linalg.lstsq(np.asarray(m), np.ones(4), rcond=None)[0]
    np.testing.assert_allclose(make(loss, tol=1e-8).run(z).params, best, rtol=1e-5)


def test_each_call_of_the_function_counts_without_jit():
    calls = []

    def fun(x):
        calls.append(1)
        return rosenbrock(x)

    for make in (solvers.LBFGS, solvers.BFGS):
        calls.clear()
        make(fun, stepsize=1e-3, maxiter=5, tol=1e-9, jit=False).run(jnp.asarray(START))
        assert len(calls) == 6


def test_roots_of_other_solvers_have_derivatives(both):
    x, y = jnp.asarray(A), jnp.asarray(B)

    def script(lib):
        def optimality(w, strength, x, y):
            return x.T @ (x @ w - y) + strength * w

        def solve(init, strength, x, y):
            return jnp.linalg.solve(x.T @ x + strength * jnp.eye(4), x.T @ y)

        decorated = lib.implicit_diff.custom_root(optimality)(solve)
        return [
            jax.jacrev(decorated, argnums=1)(None, 2.0, x, y),
            jax.jacrev(lambda y: decorated(None, y=y, x=x, strength=2.0))(y),
        ]

    ours, theirs = both(script)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
