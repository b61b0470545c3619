import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.losses import squared_error
from jdl.optim import lbfgs
from jdl.optim.result import ResultCode

START = np.array([-1.2, 1.0] * 3, np.float32)


def rosenbrock(x):
    return jnp.sum(100.0 * jnp.square(x[1::2] - jnp.square(x[::2])) + jnp.square(1.0 - x[::2]))


@pytest.mark.parametrize("guard", ["cautious", "powell"])
def test_rosenbrock(guard, minimize):
    run = minimize(lbfgs(guard=guard), rosenbrock, jnp.asarray(START), tolerance=1e-3)
    np.testing.assert_allclose(run.params, np.ones(6), atol=3e-3)
    assert len(run.values) <= 60


def test_takes_no_more_evaluations_than_scipy_or_optax(minimize):
    run = minimize(lbfgs(), rosenbrock, jnp.asarray(START), tolerance=1e-3)
    # Handed its own last value and gradient again, the method spends one evaluation a trial.
    ours = int(run.diagnostics.evaluations) - int(run.diagnostics.iterations) + 1
    theirs = scipy.optimize.minimize(
        jax.value_and_grad(rosenbrock), START, jac=True, method="L-BFGS-B", options={"gtol": 1e-3}
    )
    assert ours <= 1.3 * theirs.nfev
    optax_run = minimize(optax.lbfgs(), rosenbrock, jnp.asarray(START), tolerance=1e-3)
    assert len(run.values) <= 1.3 * len(optax_run.values)


def test_its_own_value_and_gradient_can_be_reused():
    optimizer = lbfgs()
    both = optax.value_and_grad_from_state(rosenbrock)

    @jax.jit
    def step(x, state, reused):
        value, grad = both(x, state=state)
        updates, state = optimizer.update(
            grad, state, x, value=value, grad=grad, value_fn=rosenbrock, reused=reused
        )
        return optax.apply_updates(x, updates), state

    x, state = jnp.asarray(START), optimizer.init(jnp.asarray(START))
    for i in range(10):
        x, state = step(x, state, i > 0)
    value, grad = jax.value_and_grad(rosenbrock)(x)
    assert float(state.value) == pytest.approx(float(value), rel=1e-4)
    np.testing.assert_allclose(state.grad, grad, rtol=1e-2, atol=1e-2)
    # One gradient was handed over at the start; all others are the line search's.
    assert int(state.diagnostics.evaluations) < 10 + 10


@pytest.mark.parametrize("scaling", ["scalar", "diagonal"])
def test_the_direction_is_minus_h_g(scaling):
    """Against dense BFGS, H ← Vᵀ H V + ρ s sᵀ, started from the newest pair's scale."""
    rng = np.random.default_rng(1)
    q = rng.normal(size=(6, 6))
    a = jnp.asarray(q @ q.T / 6 + np.eye(6), jnp.float32)
    f = lambda x: 0.5 * x @ a @ x  # noqa: E731
    optimizer = lbfgs(memory_size=3, c2=0.9, scaling=scaling)
    x = jnp.ones(6)
    state = optimizer.init(x)
    pairs = []
    for _ in range(5):
        value, grad = jax.value_and_grad(f)(x)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
        pairs.append((np.asarray(updates, float), np.asarray(a @ updates, float)))
        x = optax.apply_updates(x, updates)
    d = np.ones(6)
    if scaling == "diagonal":
        for s, y in pairs:  # the diagonal of dense BFGS on B = φ diag(1/d)
            b = np.diag((y @ (d * y)) / (s @ y) / d)
            b = b - np.outer(b @ s, b @ s) / (s @ b @ s) + np.outer(y, y) / (s @ y)
            d = 1 / np.diag(b)
    s, y = pairs[-1]
    h = np.diag(d) * (s @ y) / (y @ (d * y))
    for s, y in pairs[-3:]:
        rho = 1 / (s @ y)
        v = np.eye(6) - rho * np.outer(y, s)
        h = v.T @ h @ v + rho * np.outer(s, s)
    value, grad = jax.value_and_grad(f)(x)
    updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
    direction = -h @ np.asarray(grad, float)
    np.testing.assert_allclose(
        updates / np.linalg.norm(updates), direction / np.linalg.norm(direction), atol=2e-3
    )


def test_the_diagonal_mends_bad_scaling(minimize):
    a = jnp.logspace(0, 4, 60)
    evaluations = {}
    for scaling in ("scalar", "diagonal", "auto"):
        f = lambda x: 0.5 * jnp.sum(a * jnp.square(x - 1.0))  # noqa: E731
        run = minimize(lbfgs(scaling=scaling), f, jnp.zeros(60), steps=400, tolerance=0.1)
        assert run.norms[-1] <= 0.1
        evaluations[scaling] = int(run.diagnostics.evaluations)
    assert evaluations["diagonal"] < 0.7 * evaluations["scalar"], evaluations
    assert evaluations["auto"] < 1.1 * evaluations["diagonal"], evaluations


def test_the_diagonal_is_left_out_where_it_misleads(minimize):
    """In a valley that bends, the diagonal of the last bend takes a quarter more steps than γ I."""

    def chain(x):
        return jnp.sum(100.0 * jnp.square(x[1:] - jnp.square(x[:-1])) + jnp.square(1.0 - x[:-1]))

    x = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, 20), jnp.float32)
    ours, theirs = (
        len(minimize(optimizer, chain, x, steps=200, tolerance=1e-3).values)
        for optimizer in (lbfgs(), optax.lbfgs())
    )
    assert ours <= 1.05 * theirs, (ours, theirs)


@pytest.mark.parametrize("guard", ["cautious", "powell"])
def test_negative_curvature_enters_no_pair(guard, minimize):
    def wavy(x):
        return jnp.sum(jnp.cos(x)) + 0.01 * jnp.sum(jnp.square(x))

    run = minimize(lbfgs(guard=guard), wavy, jnp.array([0.1, -0.3, 6.0]), steps=25)
    rho = np.asarray(run.state.rho)
    assert np.all(rho >= 0)
    assert np.all(np.isfinite(rho))
    assert np.diff(run.values).max() <= 1e-5
    assert run.norms[-1] < 1e-3


def test_pairs_hold_no_sampling_noise():
    """On quadratics that differ only in where their minimum lies, y = A s whatever the batch."""
    a = jnp.array([1.0, 4.0, 9.0])
    optimizer = lbfgs()
    x = jnp.ones(3)
    state = optimizer.init(x)
    for key in jax.random.split(jax.random.key(0), 6):
        shift = jax.random.normal(key, (3,))

        def f(x, shift=shift):
            return 0.5 * jnp.sum(a * jnp.square(x - shift))

        value, grad = jax.value_and_grad(f)(x)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
        x = optax.apply_updates(x, updates)
    used = int(state.stored)
    np.testing.assert_allclose(state.y[:used], a[None] * state.s[:used], rtol=1e-3, atol=1e-5)


def test_history_keeps_its_own_type():
    optimizer = lbfgs(memory_size=4, memory_dtype=jnp.bfloat16)
    state = optimizer.init({"w": jnp.ones((2, 3))})
    assert state.s["w"].dtype == jnp.bfloat16
    assert state.s["w"].shape == (4, 2, 3)
    half = lbfgs().init(jnp.ones(3, jnp.bfloat16))
    assert half.s.dtype == jnp.float32


def test_ends_at_the_noise_of_float32_without_wasting_evaluations(minimize):
    def f(x):
        return 100.0 + jnp.sum(jnp.array([1.0, 30.0, 1000.0]) * jnp.square(x - 1.0 / 3.0))

    run = minimize(lbfgs(), f, jnp.zeros(3), steps=60)
    assert run.norms[-1] < 2e-3  # values alone resolve 1e-5, a gradient of 0.2
    assert int(run.diagnostics.evaluations) < 4 * 60


def test_an_ascent_direction_from_a_chain_falls_back(minimize):
    optimizer = optax.chain(optax.scale(-1.0), lbfgs())
    run = minimize(optimizer, lambda x: jnp.sum(jnp.square(x)), jnp.ones(3), steps=1)
    assert int(run.diagnostics.termination) == ResultCode.STEEPEST_DESCENT
    assert np.all(np.asarray(run.params) < 1.0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"memory_size": -1}, "memory_size"),
        ({"guard": "brave"}, "guard"),
        ({"scaling": "matrix"}, "scaling"),
        ({"scaling": "kronecker", "damping": 0.0}, "damping"),
        ({"c2": 1.5}, "c2"),
        ({"c1": 0.95}, "c1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_evaluations": 0}, "max_evaluations"),
    ],
)
def test_arguments_out_of_range(options, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        lbfgs(**options)


@pytest.mark.slow
def test_kronecker_factors_scale_a_deep_network():
    x = jax.random.uniform(jax.random.key(1), (64, 12))
    keys = jax.random.split(jax.random.key(2), 6)
    params = {f"w{i}": 0.4 * jax.random.normal(k, (12, 12)) for i, k in enumerate(keys)}

    def predict(p, batch):
        y = batch["x"]
        for i in range(5):
            y = jnp.tanh(y @ p[f"w{i}"])
        return y @ p["w5"]

    objective = Objective.from_fns(predict, squared_error, {"x": x, "label": x})
    final = {}
    for scaling in ("diagonal", "kronecker"):
        optimizer = lbfgs(scaling=scaling)

        @jax.jit
        def step(params, state, optimizer=optimizer):
            value, grad, _ = objective.value_and_grad(params)
            updates, state = optimizer.update(
                grad, state, params, value=value, grad=grad, objective=objective
            )
            return optax.apply_updates(params, updates), state

        moved, state = params, optimizer.init(params)
        for _ in range(40):
            moved, state = step(moved, state)
        final[scaling] = float(objective.value(moved))
        assert step._cache_size() == 1
    assert final["kronecker"] < 0.5 * final["diagonal"]
    value, grad, _ = objective.value_and_grad(params)
    with pytest.raises(ArgumentError, match="`objective` must be given"):
        optimizer.update(
            grad, optimizer.init(params), params, value=value, grad=grad, value_fn=objective.value
        )
