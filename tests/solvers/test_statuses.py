"""How runs end, what they say, and what is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import solvers
from jdl.core.check import ArgumentError, DataError
from jdl.solvers import ResultCode
from jdl.solvers.options import SolverOptions


def bowl(x):
    return jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0]))


def rosenbrock(x):
    return 100.0 * jnp.square(x[1] - jnp.square(x[0])) + jnp.square(1.0 - x[0])


OBJECTIVE = jdl.Objective.from_fns(
    lambda x, batch: bowl(x) * batch["one"], lambda outputs, _: outputs, {"one": jnp.ones(1)}
)
SOLVERS = {
    "LBFGS": solvers.LBFGS,
    "NonlinearCG": solvers.NonlinearCG,
    "Newton": solvers.Newton,
    "HessianFree": solvers.HessianFree,
    "GradientDescent": solvers.GradientDescent,
    "OptaxSolver": lambda fun, **options: solvers.OptaxSolver(fun, optax.sgd(0.04), **options),
    "boxed": lambda fun, **options: solvers.LBFGS(fun, bounds=(-5.0, 5.0), **options),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_each_solver_converges_and_stops_at_nan_and_after_its_iterations(name):
    def fun(x, ruin):
        return bowl(x) + ruin

    solver = SOLVERS[name](fun, tol=1e-3, maxiter=300)
    params, state = solver.run(jnp.zeros(2), 0.0)
    np.testing.assert_allclose(params, 1.0, atol=1e-3)
    assert int(state.status) == ResultCode.CONVERGED
    assert float(state.error) <= 1e-3
    assert 0 < int(state.iter_num) < 300
    state = solver.run(jnp.zeros(2), jnp.nan).state
    assert int(state.status) == ResultCode.NOT_FINITE
    assert int(state.iter_num) == 0
    assert "not finite" in solver.message(state)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
    ],
    ids=["lbfgs", "backtracking"],
)
def test_optax_s_line_searches(optimizer):
    own = lambda x: (bowl(x), jax.grad(bowl)(x))  # noqa: E731
    for fun, given in ((bowl, False), (own, True), (OBJECTIVE, False)):
        solver = solvers.OptaxSolver(fun, optimizer, value_and_grad=given, tol=1e-3)
        params, state = solver.run(jnp.zeros(2))
        assert int(state.status) == ResultCode.CONVERGED
        np.testing.assert_allclose(params, 1.0, atol=1e-3)


def test_an_optimizer_that_waits_is_not_stuck():
    late = optax.join_schedules([optax.constant_schedule(r) for r in (0.0, 0.04)], [20])
    gathers = optax.MultiSteps(optax.sgd(0.04), 20).gradient_transformation()
    for optimizer in (gathers, optax.sgd(late)):
        state = solvers.OptaxSolver(bowl, optimizer, maxiter=3000).run(jnp.zeros(2)).state
        assert int(state.status) == ResultCode.CONVERGED
    state = solvers.OptaxSolver(bowl, optax.sgd(0.0)).run(jnp.zeros(2)).state
    assert int(state.status) == ResultCode.NO_PROGRESS


@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_aux_and_optimizer_states_of_any_type(jit):
    key = jax.random.key(5, impl="rbg")
    aux = {"n": 3, "x": 0.5, "yes": True, "key": key, "small": jnp.int8(-3), "y": np.ones(2)}
    solver = solvers.LBFGS(lambda x: (bowl(x), aux), has_aux=True, jit=jit)
    found = solver.run(jnp.zeros(2)).state.aux
    assert (int(found["n"]), float(found["x"]), bool(found["yes"])) == (3, 0.5, True)
    assert int(found["small"]) == -3
    assert bool(found["key"] == key)
    noisy = optax.noisy_sgd(0.04, eta=1e-6, key=key)
    solver = solvers.OptaxSolver(bowl, noisy, implicit_diff=True, tol=1e-2, jit=jit)
    assert int(solver.run(jnp.zeros(2)).state.status) == ResultCode.CONVERGED


def test_too_few_iterations_are_reported():
    solver = solvers.LBFGS(rosenbrock, maxiter=3)
    state = solver.run(jnp.array([-1.2, 1.0])).state
    assert (int(state.status), int(state.iter_num)) == (ResultCode.MAX_ITERATIONS, 3)


@pytest.mark.parametrize("name", ["LBFGS", "NonlinearCG", "GradientDescent", "boxed"])
def test_a_tolerance_below_the_resolution_ends_without_progress(name):
    def fun(x):  # the gradient cannot come below 1e-4 or so in float32
        return 1e3 * bowl(x) + jnp.sum(jnp.square(x + 3.3))

    solver = SOLVERS[name](fun, tol=1e-12, maxiter=2000)
    params, state = solver.run(jnp.array([0.3, 0.7]))
    assert int(state.status) in (ResultCode.NO_PROGRESS, ResultCode.CONVERGED)
    assert int(state.iter_num) < 1000
    assert int(state.status) == ResultCode.CONVERGED or "precision" in solver.message(state)
    np.testing.assert_allclose(params, [1.0 - 4.3 / 1001, 1.0 - 4.3 / 10001], atol=1e-3)


def test_a_wrong_gradient_is_a_failed_line_search_and_the_check_names_it():
    wrong = lambda x: (bowl(x) - 11.0, -jax.grad(bowl)(x))  # noqa: E731
    state = solvers.LBFGS(wrong, value_and_grad=True).run(jnp.zeros(2)).state
    assert int(state.status) == ResultCode.LINE_SEARCH_FAILED
    assert bool(state.failed_linesearch)
    with pytest.raises(ArgumentError, match="200"):
        jdl.minimize(wrong, jnp.zeros(2), value_and_grad=True, check_gradient=True)
    twice = lambda x: (bowl(x), 2.0 * jax.grad(bowl)(x))  # noqa: E731
    with pytest.raises(ArgumentError, match="gradient"):
        solvers.check_gradient(twice, jnp.zeros(2), value_and_grad=True)
    right = lambda x: (rosenbrock(x), jax.grad(rosenbrock)(x))  # noqa: E731
    assert solvers.check_gradient(right, jnp.array([-1.2, 1.0]), value_and_grad=True) < 0.03


def test_a_point_that_is_stationary_already_needs_no_update():
    state = solvers.LBFGS(bowl).run(jnp.ones(2)).state
    assert (int(state.status), int(state.iter_num)) == (ResultCode.CONVERGED, 0)


@pytest.mark.parametrize(
    ("fun", "params", "said"),
    [
        (lambda x: x, jnp.zeros(2), "real scalar"),
        (lambda x: jnp.sum(x).astype(jnp.int32), jnp.zeros(2), "real scalar"),
        (lambda x: (jnp.sum(x), x), jnp.zeros(2), "has_aux=True"),
        (lambda x: jnp.sum(x), jnp.zeros(2, jnp.int32), "floating-point"),
        (lambda x: jnp.sum(x), {}, "at least one array"),
    ],
)
def test_what_cannot_be_minimized_is_refused_in_words(fun, params, said):
    with pytest.raises(ArgumentError, match=said):
        solvers.LBFGS(fun).run(params)


def test_a_gradient_of_other_shapes_is_refused():
    with pytest.raises(ArgumentError, match="gradient"):
        solvers.LBFGS(lambda x: (bowl(x), jnp.zeros(3)), value_and_grad=True).run(jnp.zeros(2))


def test_shapes_that_change_between_iterations_are_refused():
    solver = solvers.LBFGS(lambda x: jnp.sum(x * x))
    state = solver.init_state(jnp.ones(3))
    with pytest.raises(ArgumentError, match=r"float32\[2\]"):
        solver.update(jnp.ones(2), state)
    data = iter([jnp.ones(4), jnp.ones(3)])
    stochastic = solvers.OptaxSolver(lambda x, data: jnp.sum(x) * jnp.sum(data), optax.sgd(0.1))
    with pytest.raises(DataError, match="Item 1"):
        stochastic.run_iterator(jnp.ones(2), data)
    with pytest.raises(DataError, match="nothing"):
        stochastic.run_iterator(jnp.ones(2), iter([]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: solvers.LBFGS(bowl, linesearch="brent"), "linesearch"),
        (lambda: solvers.LBFGS(bowl, linesearch_init="min"), "linesearch_init"),
        (lambda: solvers.LBFGS(bowl, condition="weak"), "condition"),
        (lambda: solvers.LBFGS(bowl, max_stepsize=0.0), "max_stepsize"),
        (lambda: solvers.LBFGS(bowl, history_size=-1), "history_size"),
        (lambda: solvers.LBFGS(bowl, bounds=(0.0, 1.0), unroll=True), "implicit_diff=True"),
        (lambda: solvers.LBFGS(bowl, tol=-1.0), "tol"),
        (lambda: solvers.LBFGS(bowl, maxiter=-1), "maxiter"),
        (lambda: solvers.NonlinearCG(bowl, method="fletcher"), "dai_yuan"),
        (lambda: solvers.LevenbergMarquardt(bowl, solver="svd"), "solver"),
        (
            lambda: solvers.LevenbergMarquardt(bowl, solver="qr", materialize_jac=False),
            "materialize_jac",
        ),
        (lambda: solvers.HessianFree(bowl, curvature="gauss_newton"), "Objective"),
        (lambda: solvers.LBFGSB(bowl).run(jnp.zeros(2), 3.0), "bounds"),
        (lambda: solvers.LBFGS(bowl, bounds=(0.0, jnp.ones(3))).run(jnp.zeros(2)), "shape"),
        (lambda: solvers.LBFGS(bowl, bounds=(1.0, jnp.array([2.0, 0.5]))), "at most the upper"),
        (lambda: solvers.LBFGS(bowl, bounds=(0.0, jnp.nan)), "at most the upper"),
        (lambda: solvers.LBFGSB(bowl).run(jnp.zeros(2), (1.0, 0.0)), "at most the upper"),
        (lambda: jdl.minimize(bowl, jnp.zeros(2), bounds=(1.0, 0.0)), "at most the upper"),
        (lambda: jdl.minimize(OBJECTIVE, jnp.zeros(2), method="gauss_newton"), "hessian_free"),
        (lambda: jdl.minimize(OBJECTIVE, jnp.zeros(2), method="levenberg_marquardt"), "residuals"),
        (
            lambda: solvers.HessianFree(
                jax.value_and_grad(bowl), value_and_grad=True, preconditioner="diagonal"
            ),
            "preconditioner",
        ),
        (lambda: jdl.minimize(bowl, jnp.zeros(2), method="lbgfs"), "lbfgs"),
    ],
)
def test_options_without_a_meaning_are_refused_in_words(make, said):
    with pytest.raises(ArgumentError, match=said):
        make()


def test_names_that_are_not_here_say_where_to_go():
    with pytest.raises(ArgumentError, match="optimistix"):
        solvers.Broyden(bowl)
    with pytest.raises(ArgumentError, match=r"optax\.tree"):
        solvers.tree_util.tree_add(1, 2)
    with pytest.raises(ArgumentError, match="qpax"):
        solvers.OSQP()
    with pytest.raises(AttributeError, match="LBFGS"):
        solvers.LBGFS  # noqa: B018
    with pytest.raises(TypeError, match="histroy_size"):
        solvers.LBFGS(bowl, histroy_size=3)


def test_verbose_prints_a_table_and_a_callback_sees_each_iteration(capsys):
    seen = []
    solver = solvers.LBFGS(
        rosenbrock, verbose=True, callback=lambda params, state: seen.append((params, state))
    )
    params, state = solver.run(jnp.array([-1.2, 1.0]))
    assert [int(s.iter_num) for _, s in seen] == list(range(1, int(state.iter_num) + 1))
    np.testing.assert_array_equal(seen[-1][0], params)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "LBFGS"
    assert lines[1].split() == ["iteration", "value", "error", "step", "calls"]
    assert len(lines) == 2 + len(seen)
    assert float(lines[-1].split()[1]) == pytest.approx(float(state.value), rel=1e-4)


def test_a_run_is_compiled_once():
    traces = []

    def fun(x, c):
        traces.append(1)
        return jnp.sum(jnp.square(x - c))

    solver = solvers.LBFGS(fun)
    solver.run(jnp.zeros(2), jnp.ones(2))
    count = len(traces)
    solver.run(jnp.full(2, 0.5), jnp.zeros(2))
    assert len(traces) == count


def test_without_jit_the_function_sees_numbers():
    seen = []

    def fun(x):
        seen.append(isinstance(x, jax.core.Tracer))
        return bowl(x)

    value_and_grad = lambda x: (fun(x), jax.grad(bowl)(x))  # noqa: E731
    solver = solvers.OptaxSolver(value_and_grad, optax.sgd(0.04), value_and_grad=True, jit=False)
    solver.implicit_diff = False
    np.testing.assert_allclose(solver.run(jnp.zeros(2)).params, 1.0, atol=1e-2)
    assert False in seen


def test_minimize_reports_what_happened():
    result = jdl.minimize(rosenbrock, jnp.array([-1.2, 1.0]), tol=1e-3)
    assert result.success
    assert result.status is ResultCode.CONVERGED
    assert result.iterations == int(result.state.iter_num)
    text = str(result)
    for said in ("minimize by lbfgs", "converged", "iterations", "float32[2]"):
        assert said in text
    assert repr(result) == text


def test_minimize_by_every_method():
    residuals = lambda x: jnp.stack([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])  # noqa: E731
    start = jnp.array([-1.2, 1.0])
    for method in ("gauss_newton", "levenberg_marquardt"):
        result = jdl.minimize(residuals, start, method=method, maxiter=200)
        np.testing.assert_allclose(result.params, 1.0, atol=1e-3)
    result = jdl.minimize(rosenbrock, start, method=optax.adam(0.05), maxiter=3000, tol=1e-3)
    np.testing.assert_allclose(result.params, 1.0, atol=1e-2)


def test_the_check_takes_residuals_by_half_their_square():
    residuals = lambda x: {"a": jnp.stack([x[1] - x[0] ** 2, 1.0 - x[0]]), "b": x}  # noqa: E731
    for method in ("gauss_newton", "levenberg_marquardt"):
        result = jdl.minimize(residuals, jnp.ones(2), method=method, check_gradient=True)
        assert result.success

    @jax.custom_vjp
    def wrong(x):
        return x - 1.0

    wrong.defvjp(lambda x: (x - 1.0, None), lambda _, g: (3.0 * g,))
    with pytest.raises(ArgumentError, match="gradient"):
        jdl.minimize(wrong, jnp.zeros(2), method="gauss_newton", check_gradient=True)


def test_an_update_from_outside_the_box_starts_from_its_edge():
    solver = solvers.LBFGS(bowl, bounds=(2.0, 3.0))
    start = jnp.array([-5.0, 2.5])
    params, state = start, solver.init_state(start)
    assert float(state.value) == float(bowl(jnp.array([2.0, 2.5])))
    for _ in range(10):
        params, state = solver.update(params, state)
        assert bool(jnp.all((params >= 2.0) & (params <= 3.0)))
    np.testing.assert_array_equal(params, 2.0)
    np.testing.assert_array_equal(solver.update(start, state).params, 2.0)


def test_minimize_is_for_concrete_arrays():
    with pytest.raises(ArgumentError, match="LBFGS"):
        jax.jit(lambda x: jdl.minimize(bowl, x).value)(jnp.zeros(2))


def test_an_objective_is_minimized_with_gauss_newton_products():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
    y = x @ jnp.array([1.0, -2.0, 0.5])
    objective = jdl.Objective.from_fns(
        lambda w, batch: batch["x"] @ w,
        lambda outputs, batch: 0.5 * jnp.square(outputs - batch["y"]),
        {"x": x, "y": y},
    )
    for method in ("hessian_free", "lbfgs", "newton"):
        result = jdl.minimize(objective, jnp.zeros(3), method=method, tol=1e-4)
        np.testing.assert_allclose(result.params, [1.0, -2.0, 0.5], atol=1e-3)


def test_the_table_of_defaults_is_what_the_constructors_have():
    rows = [line.split() for line in solvers.__doc__.splitlines()]
    table = {row[0]: row[1:] for row in rows if row and hasattr(solvers, row[0])}
    assert len(table) == 14
    for name, (*maxiter, tol) in table.items():
        parameters = inspect.signature(getattr(solvers, name)).parameters
        assert parameters["tol"].default == float(tol), name
        if name != "minimize":
            assert [str(parameters["maxiter"].default)] == maxiter, name


def test_signatures_list_the_shared_options():
    for name in ("LBFGS", "NonlinearCG", "Newton", "LevenbergMarquardt", "OptaxSolver"):
        parameters = inspect.signature(getattr(solvers, name)).parameters
        assert set(SolverOptions.__annotations__) <= set(parameters), name
    assert inspect.signature(solvers.OptaxSolver).parameters["implicit_diff"].default is False


@pytest.mark.parametrize("method", ["hager-zhang", "hager_zhang", "dai_yuan", "dai-yuan"])
def test_formulas_are_spelled_with_hyphens_or_underscores(method):
    run = solvers.NonlinearCG(bowl, method=method).run(jnp.zeros(2))
    np.testing.assert_allclose(run.params, 1.0, atol=1e-3)


def test_methods_go_by_short_and_long_names():
    for short, long in (("hf", "hessian_free"), ("cg", "nonlinear_cg")):
        one = jdl.minimize(bowl, jnp.zeros(2), method=short)
        other = jdl.minimize(bowl, jnp.zeros(2), method=long)
        np.testing.assert_array_equal(one.params, other.params)
        assert one.method == other.method


@pytest.mark.parametrize("name", ["LBFGS", "NonlinearCG", "Newton", "GradientDescent"])
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_gradients_whose_squares_are_no_numbers(name, scale):
    solver = SOLVERS[name](lambda x: scale * bowl(x), tol=1e-5 * scale, maxiter=100)
    params, state = solver.run(jnp.zeros(2))
    assert int(state.status) == ResultCode.CONVERGED
    np.testing.assert_allclose(params, 1.0, atol=1e-3)
    np.testing.assert_allclose(state.grad, scale * jax.grad(bowl)(params), atol=1e-5 * scale)
    assert np.isfinite(float(solver.init_state(jnp.zeros(2)).error / scale))
