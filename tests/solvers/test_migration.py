"""jaxopt's own kinds of problems under `from jdl import solvers as jaxopt`: the same results.

Every `script(lib)` is what a user of jaxopt wrote; `lib` is jaxopt before, jdl.solvers after.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(200, 8)), jnp.float32)
Y = jnp.asarray(rng.normal(size=200) + np.asarray(X) @ rng.normal(size=8), jnp.float32)
LABELS = jnp.asarray(rng.integers(0, 3, 200), jnp.int32)
TIMES = jnp.linspace(0.0, 4.0, 100)
DECAY = 2.0 * jnp.exp(-0.7 * TIMES) + 0.5 + 0.01 * jnp.asarray(rng.normal(size=100), jnp.float32)


def ridge(w, lam, data):
    x, y = data
    return 0.5 * jnp.mean(jnp.square(x @ w - y)) + 0.5 * lam * jnp.sum(jnp.square(w))


def closed_form(lam):
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    return np.linalg.solve(x.T @ x / 200 + lam * np.eye(8), x.T @ y / 200)


def logistic(params, lam, data):
    x, labels = data
    logits = x @ params["w"] + params["b"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses) + 0.5 * lam * jnp.sum(jnp.square(params["w"]))


def rosenbrock(x):
    return jnp.sum(100.0 * jnp.square(x[1:] - jnp.square(x[:-1])) + jnp.square(1.0 - x[:-1]))


def decay_residuals(p, t, y):
    return p[0] * jnp.exp(-p[1] * t) + p[2] - y


def zeros():
    return {"w": jnp.zeros((8, 3)), "b": jnp.zeros(3)}


@pytest.mark.slow
def test_lbfgs_logistic_regression(both):
    def script(lib):
        solver = lib.LBFGS(fun=logistic, maxiter=200, tol=1e-4, history_size=8)
        params, state = solver.run(zeros(), lam=0.01, data=(X, LABELS))
        error = solver.l2_optimality_error(params, lam=0.01, data=(X, LABELS))
        return params, state.value, state.error, state.iter_num, error

    ours, theirs = both(script)
    np.testing.assert_allclose(ours[0]["w"], theirs[0]["w"], atol=3e-3)
    assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=1e-5)
    assert float(ours[2]) <= 1e-4
    assert float(ours[4]) == pytest.approx(float(ours[2]), rel=0.05)
    assert int(ours[3]) <= 1.3 * int(theirs[3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LBFGS", "NonlinearCG", "GradientDescent"])
def test_ridge_regression_with_a_step_by_step_loop(name, both):
    def script(lib):
        solver = getattr(lib, name)(fun=ridge, tol=1e-4, maxiter=300)
        params = jnp.zeros(8)
        state = solver.init_state(params, 0.1, (X, Y))
        for _ in range(200):
            params, state = solver.update(params, state, 0.1, (X, Y))
            if state.error <= solver.tol:
                break
        return params

    ours, theirs = both(script)
    np.testing.assert_allclose(ours, closed_form(0.1), atol=1e-3)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_rosenbrock(both):
    start = jnp.asarray([-1.2, 1.0, -0.5, 0.8], jnp.float32)
    script = lambda lib: lib.LBFGS(rosenbrock, tol=1e-3).run(start).params  # noqa: E731
    ours, theirs = both(script)
    np.testing.assert_allclose(ours, np.ones(4), atol=2e-3)
    np.testing.assert_allclose(theirs, np.ones(4), atol=2e-3)


@pytest.mark.parametrize(
    "name", [pytest.param("GaussNewton", marks=pytest.mark.slow), "LevenbergMarquardt"]
)
def test_nonlinear_least_squares(name, both):
    def script(lib):
        solver = getattr(lib, name)(residual_fun=decay_residuals, maxiter=50, tol=1e-3)
        params, state = solver.run(jnp.array([1.5, 0.5, 0.3]), TIMES, y=DECAY)
        return params, state.value, state.residual

    ours, theirs = both(script)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-3)
    # jaxopt's Gauss-Newton tells value and residual of the parameters before its last step.
    assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=1e-3)
    np.testing.assert_allclose(ours[2], theirs[2], atol=1e-3)
    reference = scipy.optimize.least_squares(
        lambda p: np.asarray(decay_residuals(jnp.asarray(p, jnp.float32), TIMES, DECAY)),
        [1.5, 0.5, 0.3],
        diff_step=1e-3,
    )
    np.testing.assert_allclose(ours[0], reference.x, rtol=5e-3)


@pytest.mark.slow
def test_levenberg_marquardt_by_madsen_and_nielsen_s_criterion(both):
    def script(lib):
        options = {"stop_criterion": "madsen-nielsen", "xtol": 1e-4, "gtol": 1e-4}
        solver = lib.LevenbergMarquardt(decay_residuals, materialize_jac=True, **options)
        return solver.run(jnp.array([1.5, 0.5, 0.3]), TIMES, DECAY).params

    ours, theirs = both(script)
    np.testing.assert_allclose(ours, theirs, rtol=5e-3)


@pytest.mark.slow
def test_optax_solver_over_an_iterator(both):
    def batches():
        while True:
            for i in range(0, 200, 50):
                yield X[i : i + 50], LABELS[i : i + 50]

    def script(lib):
        solver = lib.OptaxSolver(opt=optax.adam(0.02), fun=logistic, maxiter=200)
        params, state = solver.run_iterator(zeros(), batches(), lam=0.01)
        return params, state.iter_num

    ours, theirs = both(script)
    assert int(ours[1]) == int(theirs[1]) == 200
    whole = lambda p: float(logistic(p, 0.01, (X, LABELS)))  # noqa: E731
    assert whole(ours[0]) == pytest.approx(whole(theirs[0]), rel=3e-3)


def test_optax_solver_s_run_is_optax_itself(both):
    def script(lib):
        data = tuple(jnp.asarray(np.asarray(a, np.float64)) for a in (X, Y))
        solver = lib.OptaxSolver(ridge, optax.adam(0.1), maxiter=37, tol=0.0)
        return solver.run(jnp.zeros(8), 0.1, data).params

    with jax.enable_x64(True):
        ours, theirs = both(script)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.slow
def test_auxiliary_output_is_that_of_the_solution(both):
    def fun(w, lam, data):
        return ridge(w, lam, data), {"norm": jnp.sum(jnp.square(w))}

    def script(lib):
        params, state = lib.LBFGS(fun, has_aux=True, tol=1e-4).run(jnp.zeros(8), 0.1, (X, Y))
        return state.aux["norm"], jnp.sum(jnp.square(params))

    ours, theirs = both(script)
    assert float(ours[0]) == pytest.approx(float(ours[1]), rel=1e-6)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LBFGS", "NonlinearCG", "GradientDescent"])
def test_a_function_that_gives_its_own_gradient(name, both):
    def fun(w, lam, data):
        x, y = data
        r = x @ w - y
        return ridge(w, lam, data), x.T @ r / 200 + lam * w

    def script(lib):
        solver = getattr(lib, name)(fun, value_and_grad=True, tol=1e-4, maxiter=300)
        return solver.run(jnp.zeros(8), 0.1, (X, Y)).params

    ours, theirs = both(script)
    np.testing.assert_allclose(ours, closed_form(0.1), atol=1e-3)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "LBFGS",
        pytest.param("NonlinearCG", marks=pytest.mark.slow),
        pytest.param("GradientDescent", marks=pytest.mark.slow),
    ],
)
def test_implicit_differentiation_of_a_regularization_parameter(name, both):
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)

    def script(lib):
        solver = getattr(lib, name)(ridge, tol=1e-9, maxiter=500)

        def validation(lam):
            data = jnp.asarray(x[:100]), jnp.asarray(y[:100])
            params = solver.run(jnp.ones(8), lam, data).params
            return jnp.mean(jnp.square(x[100:] @ params - y[100:]))

        return jax.value_and_grad(validation)(0.1)

    def exact(lam):
        w = np.linalg.solve(x[:100].T @ x[:100] / 100 + lam * np.eye(8), x[:100].T @ y[:100] / 100)
        return np.mean((x[100:] @ w - y[100:]) ** 2)

    slope = (exact(0.1 + 1e-4) - exact(0.1 - 1e-4)) / 2e-4
    with jax.enable_x64(True):
        ours, theirs = both(script)
    assert float(ours[0]) == pytest.approx(exact(0.1), rel=1e-9)
    assert float(ours[1]) == pytest.approx(slope, rel=1e-6)
    assert float(theirs[1]) == pytest.approx(slope, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GaussNewton", "LevenbergMarquardt"])
def test_implicit_differentiation_of_least_squares(name, both):
    def script(lib):
        solver = getattr(lib, name)(decay_residuals, maxiter=50, tol=1e-4)
        rate = lambda y: solver.run(jnp.array([1.5, 0.5, 0.3]), TIMES, y).params[1]  # noqa: E731
        return jax.grad(rate)(DECAY)

    ours, theirs = both(script)
    np.testing.assert_allclose(ours, theirs, rtol=5e-2, atol=2e-4)


@pytest.mark.slow
def test_vmap_over_1000_problems(both):
    centers = jnp.asarray(rng.normal(size=(1000, 3)), jnp.float32)
    scales = jnp.array([1.0, 10.0, 30.0])

    def fun(x, center):
        return jnp.sum(scales * jnp.square(x - center)) + 0.1 * jnp.sum((x - center) ** 4)

    def script(lib):
        solver = lib.LBFGS(fun, tol=1e-3, maxiter=100)
        params, state = jax.jit(jax.vmap(lambda c: solver.run(jnp.zeros(3), c)))(centers)
        return params, state.error

    ours, theirs = both(script)
    assert float(jnp.max(ours[1])) <= 1e-3
    np.testing.assert_allclose(ours[0], centers, atol=2e-3)
    np.testing.assert_allclose(ours[0], theirs[0], atol=3e-3)


@pytest.mark.slow
def test_box_constraints(both):
    def script(lib):
        solver = lib.LBFGSB(fun=ridge, tol=1e-4, maxiter=200)
        bounds = (jnp.zeros(8), 0.5 * jnp.ones(8))
        return solver.run(jnp.full(8, 0.2), bounds=bounds, lam=0.0, data=(X, Y)).params

    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    reference = scipy.optimize.lsq_linear(x, y, bounds=(0.0, 0.5))
    ours, theirs = both(script)
    np.testing.assert_allclose(ours, reference.x, atol=1e-3)
    np.testing.assert_allclose(theirs, reference.x, atol=1e-3)


@pytest.mark.slow
def test_newton_and_hessian_free_find_what_jaxopt_s_lbfgs_finds(both):
    def script(lib):
        names = ("Newton", "HessianFree") if hasattr(lib, "HessianFree") else ("LBFGS",)
        return [
            getattr(lib, name)(logistic, tol=1e-4).run(zeros(), 0.01, (X, LABELS)).params["w"]
            for name in names
        ]

    (newton, hessian_free), (lbfgs,) = both(script)
    np.testing.assert_allclose(newton, lbfgs, atol=5e-3)
    np.testing.assert_allclose(hessian_free, lbfgs, atol=5e-3)
