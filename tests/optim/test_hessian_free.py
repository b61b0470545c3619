import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.optim import hessian_free
from jdl.optim.result import ResultCode


def rosenbrock(x):
    return jnp.sum(100.0 * jnp.square(x[1::2] - jnp.square(x[::2])) + jnp.square(1.0 - x[::2]))


def least_squares(size=30, features=6, condition=10.0, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(size, features)) * np.geomspace(1, condition, features)).astype(
        np.float32
    )
    y = (x @ rng.normal(size=features)).astype(np.float32)
    predict = lambda w, batch: batch["x"] @ w  # noqa: E731
    loss = lambda z, batch: 0.5 * jnp.square(z - batch["y"])  # noqa: E731
    return Objective.from_fns(predict, loss, {"x": jnp.asarray(x), "y": jnp.asarray(y)}), x, y


def updates_of(optimizer, objective, params, state=None, /, **changes):
    state = optimizer.init(params) if state is None else state
    value, grad, _ = objective.value_and_grad(params)
    extra = {"value": value, "grad": grad, "value_fn": objective.value, "objective": objective}
    return jax.jit(lambda: optimizer.update(grad, state, params, **{**extra, **changes}))()


@pytest.mark.parametrize("preconditioner", [None, "diagonal"])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_undamped_least_squares_takes_one_step(curvature, preconditioner):
    objective, x, y = least_squares()
    optimizer = hessian_free(
        damping=0.0, curvature=curvature, tolerance=1e-6, preconditioner=preconditioner
    )
    updates, state = updates_of(optimizer, objective, jnp.zeros(6))
    np.testing.assert_allclose(updates, np.linalg.lstsq(x, y)[0], atol=1e-2)
    found = state.diagnostics
    assert float(found.reduction_ratio) == pytest.approx(1.0, abs=1e-2)
    assert (float(found.hessian_products) > 0) == (curvature == "hessian")


def test_the_damped_step_solves_the_damped_system():
    objective, x, y = least_squares()
    lam = 0.7
    updates, state = updates_of(hessian_free(damping=lam, tolerance=1e-6), objective, jnp.zeros(6))
    b = x.T @ x / len(x)
    expected = np.linalg.solve(b + lam * np.eye(6), x.T @ y / len(x))
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)
    assert float(state.damping) == pytest.approx(lam * 2 / 3)  # the undamped model is exact here
    assert float(state.diagnostics.damping) == pytest.approx(lam)


def test_gauss_newton_equals_the_hessian_of_a_linear_model():
    objective, *_ = least_squares()
    one, _ = updates_of(hessian_free(curvature="gauss_newton"), objective, jnp.ones(6))
    other, _ = updates_of(hessian_free(curvature="hessian"), objective, jnp.ones(6))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"trust_region": 1.0}, {"preconditioner": "diagonal"}, {"warm_start": 0.0}]
)
def test_rosenbrock_by_hessian_products_alone(options, minimize):
    run = minimize(
        hessian_free(**options), rosenbrock, jnp.array([-1.2, 1.0] * 3), tolerance=1e-3, steps=60
    )
    np.testing.assert_allclose(run.params, np.ones(6), atol=1e-2)
    assert np.all(np.diff(run.values) <= 1e-5 * np.abs(run.values[:-1]))


@pytest.mark.parametrize("options", [{}, {"trust_region": 1.0}])
def test_leaves_a_saddle(options, minimize):
    def saddle(x):
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4

    run = minimize(hessian_free(**options), saddle, jnp.array([1e-3, 1e-3]), steps=30)
    assert run.values[-1] == pytest.approx(-0.25, abs=1e-3)


def test_negative_curvature_is_reported():
    f = lambda x: -jnp.sum(jnp.square(x)) + jnp.sum(x**4)  # noqa: E731
    x = jnp.array([0.1, 0.1])
    value, grad = jax.value_and_grad(f)(x)
    optimizer = hessian_free(trust_region=0.3)
    updates, state = optimizer.update(
        grad, optimizer.init(x), x, value=value, grad=grad, value_fn=f
    )
    assert int(state.diagnostics.termination) == ResultCode.NEGATIVE_CURVATURE
    assert float(jnp.linalg.norm(updates)) == pytest.approx(0.3, rel=1e-3)


def test_a_step_the_model_misjudges_is_shortened_and_damps_more():
    f = lambda x: jnp.sum(jnp.log(jnp.cosh(x)))  # noqa: E731 - Newton diverges from here
    x = jnp.array([3.0])
    value, grad = jax.value_and_grad(f)(x)
    optimizer = hessian_free(damping=1e-4)
    updates, state = optimizer.update(
        grad, optimizer.init(x), x, value=value, grad=grad, value_fn=f
    )
    assert float(f(x + updates)) < float(value)
    assert float(state.diagnostics.step_size) < 1.0
    assert float(state.damping) == pytest.approx(1.5e-4)


def test_backtracks_to_an_earlier_cg_iterate():
    """Where later CG iterations fit the curvature batch and harm the batch itself."""
    objective, x, y = least_squares(condition=30.0)
    rng = np.random.default_rng(3)
    other = {"x": jnp.asarray(x[:8] + rng.normal(size=(8, 6)).astype(np.float32)), "y": y[:8]}
    objective = Objective.from_fns(
        objective.model.apply.predict, objective.loss, objective.batch, curvature_batch=other
    )
    loose = {"damping": 0.0, "tolerance": 0.0, "progress": 0.0, "max_cg_iterations": 12}
    one, _ = updates_of(hessian_free(num_candidates=1, **loose), objective, jnp.zeros(6))
    several, more = updates_of(hessian_free(num_candidates=8, **loose), objective, jnp.zeros(6))
    assert float(objective.value(several)) <= float(objective.value(one))
    assert float(more.diagnostics.values) > 1


def test_the_next_solve_starts_from_the_last():
    objective, *_ = least_squares(condition=100.0)
    optimizer = hessian_free(damping=1e-3)
    updates, state = updates_of(optimizer, objective, jnp.zeros(6))
    np.testing.assert_array_equal(state.direction, updates)
    _, again = updates_of(optimizer, objective, jnp.zeros(6), state)
    cold = int(state.diagnostics.linear_iterations)
    assert int(again.diagnostics.linear_iterations) - cold <= cold


def test_gauss_newton_needs_an_objective():
    objective, *_ = least_squares()
    with pytest.raises(ArgumentError, match=r"`objective`.*from_fns"):
        updates_of(hessian_free(curvature="gauss_newton"), objective, jnp.zeros(6), objective=None)


def test_one_product_and_few_evaluations_in_the_program():
    """What makes the step compile fast: each kind of work stands in it once or twice."""
    objective, *_ = least_squares()
    x = jnp.zeros(6)

    def step(params, state):
        value, grad, _ = objective.value_and_grad(params)
        return optimizer.update(
            grad,
            state,
            params,
            value=value,
            grad=grad,
            value_fn=objective.value,
            objective=objective,
        )

    optimizer = hessian_free()
    text = str(jax.make_jaxpr(step)(x, optimizer.init(x)))
    # gradient: 2; product: linearize, push, pull, at most 3; value: two loops.
    assert text.count("dot_general[") <= 7
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in text.replace("\n", "")


def test_weight_decay_gives_ridge_regression():
    objective, x, y = least_squares()
    optimizer = hessian_free(l2_reg=0.5, damping=0.0, tolerance=1e-6, progress=0.0)
    updates, _ = updates_of(optimizer, objective, jnp.zeros(6))
    ridge = np.linalg.solve(x.T @ x / len(x) + 0.5 * np.eye(6), x.T @ y / len(x))
    np.testing.assert_allclose(updates, ridge, rtol=1e-3, atol=1e-4)


def test_structural_damping_solves_with_the_hidden_units_jacobian():
    """Against the dense (G + λI + κλ HᵀH/B)⁻¹ g of a recurrent net."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        batch = {
            "x": jnp.asarray(rng.normal(size=(8, 5, 2)), jnp.float64),
            "y": jnp.asarray(rng.normal(size=8), jnp.float64),
        }

        def hidden(p, batch):
            def cell(h, x):
                h = jnp.tanh(h @ p["w"] + x @ p["u"])
                return h, h

            start = jnp.zeros((batch["x"].shape[0], 3))
            return jax.lax.scan(cell, start, batch["x"].swapaxes(0, 1))[1]

        def predict(p, batch):
            return hidden(p, batch)[-1] @ p["v"]

        objective = Objective.from_fns(predict, lambda z, b: 0.5 * jnp.square(z - b["y"]), batch)
        params = {
            "w": jnp.asarray(rng.normal(size=(3, 3)), jnp.float64),
            "u": jnp.asarray(rng.normal(size=(2, 3)), jnp.float64),
            "v": jnp.asarray(rng.normal(size=3), jnp.float64),
        }
        flat, unravel = ravel_pytree(params)
        jacobian = jax.jacobian(lambda p: predict(unravel(p), batch))(flat)
        states = jax.jacobian(lambda p: hidden(unravel(p), batch).ravel())(flat)
        lam, kappa = 0.25, 2.0
        matrix = jacobian.T @ jacobian / 8 + lam * (
            np.eye(flat.size) + kappa * states.T @ states / 8
        )
        wanted = -np.linalg.solve(matrix, ravel_pytree(objective.grad(params))[0])
        optimizer = hessian_free(
            damping=lam,
            structural_damping=kappa,
            hidden=hidden,
            tolerance=1e-12,
            progress=0.0,
            num_candidates=1,
        )
        _, state = updates_of(optimizer, objective, params)
        np.testing.assert_allclose(ravel_pytree(state.direction)[0], wanted, rtol=1e-8)


@pytest.mark.slow
def test_kronecker_factors_spare_iterations():
    """On a net whose inputs differ three hundredfold in scale, to the same residual."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 12)) * np.geomspace(0.03, 10, 12)
    batch = {
        "x": jnp.asarray(x, jnp.float32),
        "y": jnp.asarray(rng.normal(size=(64, 2)), jnp.float32),
    }

    def predict(p, batch):
        return jnp.tanh(batch["x"] @ p["w"]) @ p["v"]

    def loss(z, batch):
        return 0.5 * jnp.sum(jnp.square(z - batch["y"]), axis=1)

    objective = Objective.from_fns(predict, loss, batch)
    params = {
        "w": jnp.asarray(0.02 * rng.normal(size=(12, 8)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
    }
    spent = {}
    for name in (None, "kronecker"):
        optimizer = hessian_free(
            damping=1e-3, preconditioner=name, tolerance=1e-3, progress=0.0, warm_start=0.0
        )
        _, state = updates_of(optimizer, objective, params)
        spent[name] = int(state.diagnostics.linear_iterations)
    assert spent["kronecker"] < 0.6 * spent[None], spent


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"structural_damping": 1.0}, "hidden"),
        ({"l2_reg": -1.0}, "l2_reg"),
        ({"curvature": "fisher"}, "curvature"),
        ({"preconditioner": "cholesky"}, "preconditioner"),
        ({"damping": -1.0}, "damping"),
        ({"warm_start": 1.5}, "warm_start"),
        ({"trust_region": 0.0}, "trust_region"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"max_cg_iterations": 0}, "max_cg_iterations"),
    ],
)
def test_arguments_out_of_range(options, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        hessian_free(**options)
