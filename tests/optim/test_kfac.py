"""K-FAC against float64 NumPy, closed forms, and what must hold of its steps."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jdl
from jdl import losses
from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.models.layers import max_pool
from jdl.optim import hessian_free, kfac, kronecker, quadratic
from jdl.optim.diagnostics import COSTS
from jdl.optim.kronecker import factors, inverses, moments
from jdl.optim.quadratic import solve_pair
from tests.optim.loops import run, stepping


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def predict(p, batch):
    hidden = jnp.tanh(batch["x"] @ p["w"] + p["b"][None])
    return hidden @ p["v"] + p["c"][None]


squares = functools.partial(losses.squared_error, target="y")


def problem(dtype=jnp.float32, size=24, loss=squares, **options):
    batch = {"x": numbers(size, 5), "y": numbers(size, 3, seed=1)}
    params = {
        "w": numbers(5, 4, seed=2),
        "b": numbers(4, seed=3),
        "v": numbers(4, 3, seed=4),
        "c": numbers(3, seed=5),
    }
    batch, params = jax.tree.map(lambda x: jnp.asarray(x, dtype), (batch, params))
    return Objective.from_fns(predict, loss, batch, **options), params


@functools.cache  # the defaults are compiled once for all tests
def made(**options):
    return kfac(**options)


# ------------------------------------------------------------------ factors and inverses


def factored(objective, params, damping, refreshes=1, **options):
    found = moments.find_layers(objective, params)
    options = factors.Options("gauss_newton", **options)

    @jax.jit
    def refreshed(objective, params):
        state = factors.init(params, options)
        for i in range(refreshes):
            key = jax.random.key(i)
            state = factors.refresh_moments(objective, params, found, state, key, options)
            state, _ = factors.refresh_inverses(found, state, jnp.float32(damping))
        return state

    return found, refreshed(objective, params)


def test_inverses_are_those_of_float64_numpy():
    objective, params = problem()
    found, state = factored(objective, params, 0.09)
    for i, layer in found.known.items():
        assert layer.bias is not None
        first, last = (np.asarray(m[0], np.float64) for m in state.moments[i])
        pi = np.sqrt(np.trace(first) / len(first) / (np.trace(last) / len(last)))
        for moment, inverse, shift in zip(
            (first, last), state.inverses[i], (pi * 0.3, 0.3 / pi), strict=True
        ):
            want = np.linalg.inv(moment + shift * np.eye(len(moment)))
            np.testing.assert_allclose(inverse[0], want, rtol=1e-4, atol=1e-5)
    # a matrix of several blocks, as large layers have
    a = numbers(700, 600)
    moment = a.T @ a / 700
    stack = jnp.asarray(moment, jnp.float32)[None]
    got = jax.jit(inverses.inverse)(stack, jnp.full(stack.shape[:2], 0.1))[0]
    np.testing.assert_allclose(got[0], np.linalg.inv(moment + 0.1 * np.eye(600)), atol=2e-4)


def test_the_preconditioner_solves_with_the_damped_kronecker_product():
    objective, params = problem()
    found, state = factored(objective, params, 0.09)
    vector = jax.tree.map(lambda x: jnp.cos(7.0 * x), params)
    got = jax.jit(lambda s, v: factors.apply(found, s, v, jnp.float32(0.09)))(state, vector)
    for kernel, bias, i in (("w", "b", 3), ("v", "c", 2)):
        inverse = np.kron(*(np.asarray(m[0], np.float64) for m in state.inverses[i]))
        stacked = np.concatenate([vector[kernel], vector[bias][None]])
        want = (inverse @ stacked.reshape(-1)).reshape(stacked.shape)
        np.testing.assert_allclose(got[kernel], want[:-1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[bias], want[-1], rtol=1e-4, atol=1e-4)


def test_eigenvalue_correction_is_the_diagonal_in_the_eigenbases():
    # One layer, squared error: per-example curvature of [w; b] is (ā āᵀ) ⊗ I exactly.
    batch = {"x": jnp.asarray(numbers(16, 3), jnp.float32), "y": jnp.zeros((16, 2))}
    objective = Objective.from_fns(lambda p, b: b["x"] @ p["w"] + p["b"][None], squares, batch)
    params = {"b": jnp.zeros(2), "w": jnp.zeros((3, 2))}
    found, state = factored(objective, params, 0.1, eigen=True, refreshes=3)
    first = np.asarray(state.inverses[1].first[0], np.float64)
    bordered = np.concatenate([batch["x"], np.ones((16, 1))], axis=1)
    exact = np.mean((bordered @ first) ** 2, axis=0)[:, None] * np.ones((1, 2))
    np.testing.assert_allclose(state.squares[1][0], exact, rtol=1e-3)
    vector = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
    got = factors.apply(found, state, vector, jnp.float32(0.1))
    truth = np.kron(bordered.T @ bordered / 16, np.eye(2)) + 0.1 * np.eye(8)
    want = np.linalg.solve(truth, np.ones(8)).reshape(4, 2)
    np.testing.assert_allclose(got["w"], want[:3], rtol=1e-3)
    np.testing.assert_allclose(got["b"], want[3], rtol=1e-3)


def test_sides_beyond_the_limit_are_diagonal():
    objective, params = problem()
    _, state = factored(objective, params, 0.09, max_size=5)
    first, last = state.moments[3]
    assert (first.shape, last.shape) == ((1, 6), (1, 4, 4))
    bordered = np.concatenate([objective.batch["x"], np.ones((24, 1))], axis=1)
    np.testing.assert_allclose(first[0], np.mean(bordered**2, axis=0), rtol=1e-5)
    assert "diagonal 6 and 4×4" in kronecker.describe(objective, params, max_size=5)
    _, _, values = run(made(max_size=5), objective, params, 6)
    assert values[-1] < 0.5 * values[0]


def test_work_is_shared_by_cost():
    costs = [n**3 for n in (10, 1000, 30, 900, 20, 500, 500)]
    shares_ = inverses.assignment(costs, 3)
    loads = [sum(n for n, d in zip(costs, shares_, strict=True) if d == i) for i in range(3)]
    assert max(loads) == 1000**3
    assert sum(loads) == sum(costs)


# ------------------------------------------------------------------ steps


def test_one_step_solves_a_linear_layer():
    # A ⊗ I is the whole curvature, so a step with little damping is Newton's.
    x = jnp.asarray(numbers(30, 4), jnp.float32)
    batch = {"x": x, "y": x @ jnp.asarray(numbers(4, 3, seed=1), jnp.float32) + 1.0}
    objective = Objective.from_fns(lambda p, b: b["x"] @ p["w"] + p["b"][None], squares, batch)
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    optimizer = made(damping=1e-7, damping_minimum=1e-8, curvature="gauss_newton")
    params, state, values = run(optimizer, objective, params, 1)
    np.testing.assert_allclose(params["b"], np.ones(3), atol=1e-3)
    assert float(objective.value(params)) < 1e-5 * values[0]
    assert float(state.diagnostics.reduction_ratio) == pytest.approx(1.0, abs=1e-3)


def test_steps_do_not_depend_on_an_affine_change_of_the_inputs():
    with jax.enable_x64(True):
        objective, params = problem(jnp.float64)
        change, shift = np.eye(5) + 0.3 * numbers(5, 5, seed=8), numbers(5, seed=9)
        x = np.asarray(objective.batch["x"])
        moved = Objective.from_fns(
            predict, squares, {"x": jnp.asarray(x @ change + shift), "y": objective.batch["y"]}
        )
        w = np.linalg.solve(change, np.asarray(params["w"]))
        same = params | {"w": jnp.asarray(w), "b": params["b"] - jnp.asarray(shift @ w)}
        np.testing.assert_allclose(moved.value(same), objective.value(params))
        options = {"damping": 1e-10, "damping_minimum": 1e-10, "inverses_every": 1}
        # the first layer's dead directions aside, only λ itself depends on coordinates
        optimizer = made(**options, factors_every=1, max_backtracks=12)
        _, _, values = run(optimizer, objective, params, 4)
        _, _, others = run(optimizer, moved, same, 4)
        np.testing.assert_allclose(values, others, rtol=1e-3)
        sgd = [float(objective.value(p)) for p in (params, same)]
        assert sgd[0] != pytest.approx(sgd[1], rel=1e-3)  # coordinates do differ


@pytest.mark.parametrize(
    "options",
    [{}, {"eigen": True}, pytest.param({"curvature": "empirical_fisher"}, marks=pytest.mark.slow)],
)
def test_a_frozen_batch_decreases_monotonically(options):
    objective, params = problem()
    _, state, values = run(made(**options), objective, params, 30)
    assert np.all(np.diff(values) <= 1e-6 * values[0])
    assert values[-1] < 0.2 * values[0]
    assert float(state.damping) < 1.0


def test_a_model_that_lies_is_halved_and_damped():
    # exp makes the Gauss-Newton model far too optimistic for one long step.
    batch = {"x": jnp.ones((4, 1)), "y": jnp.full((4, 1), 1e4)}
    objective = Objective.from_fns(lambda p, b: jnp.exp(b["x"] @ p["w"]), squares, batch)
    optimizer = made(damping=1e-4)
    _, state, values = run(optimizer, objective, {"w": jnp.zeros((1, 1))}, 1)
    found = state.diagnostics
    assert float(found.reduction_ratio) < 0  # the whole step would have raised f, or overflowed
    assert float(state.damping) > 1e-4
    assert float(found.values) > 1
    _, _, values = run(optimizer, objective, {"w": jnp.zeros((1, 1))}, 40)
    assert np.all(np.diff(values) <= 0)
    assert values[-1] < 0.5 * values[0]


def test_f_is_tried_where_damping_changes_and_after_a_poor_step():
    objective, params = problem(loss=functools.partial(losses.squared_error, target="y"))
    step, state, tried = stepping(made(damping=1.0)), made(damping=1.0).init(params), []
    for _ in range(12):
        before = float(state.diagnostics.values)
        params, state, _ = step(params, state, objective)
        tried.append(float(state.diagnostics.values) - before)
        assert float(state.diagnostics.reduction_ratio) > 0.5
    assert tried == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert float(state.longest) > 0
    short = state._replace(longest=jnp.float32(0))
    _, after, _ = step(params, short, objective)
    assert float(after.diagnostics.values) == float(state.diagnostics.values) + 1
    low = state.diagnostics._replace(reduction_ratio=jnp.float32(0.4))
    _, after, _ = step(params, state._replace(diagnostics=low), objective)
    assert float(after.diagnostics.values) == float(state.diagnostics.values) + 1


def test_a_step_longer_than_the_last_ones_is_tried():
    # Gauss-Newton steps on r(w) = w² + 0.1 from 0.78: to 0.33, to 0.01, and from there to −5, where
    # f is 10⁴ times larger; with the damping, to −4.
    batch = {"x": jnp.ones((4, 1)), "y": jnp.full((4, 1), -0.1)}
    objective = Objective.from_fns(lambda p, b: jnp.square(b["x"] * p["w"]), squares, batch)
    optimizer = kfac(damping=1e-4, gradient_decay=0.0)
    params, _, values = run(optimizer, objective, {"w": jnp.full((1, 1), 0.7807)}, 3)
    assert np.all(np.diff(values) <= 0)
    assert abs(float(params["w"][0, 0])) < 1


def test_the_mean_of_gradients_takes_the_first_ones_equally_and_none_that_is_not_finite():
    objective, params = problem()
    optimizer = made(gradient_decay=0.6)
    step = stepping(optimizer)
    state, mean = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for k, factor in enumerate((1.0, -2.0, jnp.nan, 3.0)):
        batch = {**objective.batch, "y": factor * objective.batch["y"]}
        now = Objective.from_fns(predict, squares, batch)
        grad, kept = jax.grad(now.value)(params), min(0.6, k / (k + 1))
        if np.isfinite(factor):
            mean = jax.tree.map(lambda m, g, kept=kept: kept * m + (1 - kept) * g, mean, grad)
        params, state, *_ = step(params, state, now)
        for got, want in zip(*map(jax.tree.leaves, (state.gradient, mean)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("time", "share"), [(128, 16 / 40), (8, 32 / 40), (4, 1.0)])
def test_positions_of_sequences_count_as_examples_of_the_model(time, share):
    batch = {"x": numbers(40, time, 3), "y": numbers(40, time, 2, seed=1)}
    objective = Objective.from_fns(
        lambda p, b: b["x"] @ p, squares, jax.tree.map(jnp.asarray, batch)
    )
    _, state, _ = run(made(), objective, jnp.zeros((3, 2)), 1)
    assert float(state.diagnostics.gauss_newton_products) == pytest.approx(share)


@pytest.mark.slow
def test_what_is_not_finite_never_enters_the_factors():
    objective, params = problem()
    bad = jax.tree.map(lambda x: x * jnp.nan, objective.batch)
    bad = Objective.from_fns(predict, squares, bad)
    optimizer = made(factors_every=1, inverses_every=1)
    step, state = stepping(optimizer), optimizer.init(params)
    for objective_ in (bad, objective, bad):
        before = params
        params, state, _ = step(params, state, objective_)
        for x in jax.tree.leaves(state._replace(diagnostics=())):
            assert bool(jnp.all(jnp.isfinite(x)))
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert list(map(int, state.kronecker.refreshes)) == [0, 0, 1, 1]  # two biases, two kernels
    assert state.kronecker.left_out.tolist() == [0, 0, 0, 0]  # such a step has no estimate
    # a finite loss whose curvature is not: the factors stay as they were
    jagged = Objective.from_fns(
        predict, lambda z, b: jnp.sum(jnp.sqrt(jnp.abs(z - b["y"])), axis=1), objective.batch
    )
    aimed = jagged.batch | {"y": predict(params, jagged.batch)}
    jagged = Objective.from_fns(predict, jagged.loss, aimed)
    value = jagged.value(params)
    zeros = jax.tree.map(jnp.ones_like, params)
    _, state = jax.jit(optimizer.update)(
        zeros, state, params, value=value, grad=zeros, objective=jagged
    )
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.kronecker))


@pytest.mark.slow
def test_the_kl_clip_bounds_the_change_of_predictions():
    objective, params = problem(loss=functools.partial(losses.sigmoid_cross_entropy, target="y"))
    lengths, model_of = [], jax.jit(quadratic.quadratic)
    for clip in (None, 1e-3):
        moved, _, _ = run(made(damping=0.01, kl_clip=clip), objective, params, 1)
        step = jax.tree.map(jnp.subtract, moved, params)
        (curvature,) = model_of(objective, params, [step]).curvature.reshape(-1)
        lengths.append(0.5 * float(curvature))
    assert lengths[0] > 1e-2
    assert lengths[1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
def test_weight_decay_is_an_l2_penalty():
    plain, params = problem()
    decay = 0.1
    penalized = Objective.from_fns(
        predict,
        squares,
        plain.batch,
        regularizer=lambda p: 0.5 * decay * sum(jnp.sum(x**2) for x in jax.tree.leaves(p)),
    )
    a, _, _ = run(made(damping=0.01, l2_reg=decay), plain, params, 25)
    b, _, _ = run(made(damping=0.01), penalized, params, 25)
    assert float(penalized.value(a)) < 0.5 * float(penalized.value(params))
    np.testing.assert_allclose(penalized.value(a), penalized.value(b), rtol=0.03)
    free, _, _ = run(made(damping=0.01), plain, params, 25)
    assert optax.tree.norm(a) < optax.tree.norm(free)


def test_two_weights_are_solved_for_or_one():
    m, s = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([1.0, -2.0])
    got = solve_pair(jnp.asarray(m, jnp.float32), jnp.asarray(s, jnp.float32))
    np.testing.assert_allclose(got, -np.linalg.solve(m, s), rtol=1e-6)
    singular = solve_pair(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([-1.0, 0.0]))
    assert singular.tolist() == [0.5, 0.0]


# ------------------------------------------------------------------ models


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(3, name="outputs")(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.RNN(nn.LSTMCell(6), name="layer")(x)
        return nn.Dense(3, name="outputs")(h[:, -1])


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        pytest.param(Convolutional(), (6, 6, 1), id="cnn"),
        pytest.param(Recurrent(), (5, 2), id="lstm", marks=pytest.mark.slow),
    ],
)
def test_networks_learn_with_dropout_and_batch_norm(module, shape):
    data = {
        "image": jnp.asarray(numbers(32, *shape), jnp.float32),
        "label": jnp.arange(32, dtype=jnp.int32) % 3,
    }
    model = jdl.from_linen(module)
    params, model_state = model.init(jax.random.key(0), data["image"])
    optimizer = made()

    @jax.jit
    def step(params, model_state, state, key):
        objective = Objective(model, losses.softmax_cross_entropy, model_state, data, key=key)
        value, grad, aux = objective.value_and_grad(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, objective=objective
        )
        return optax.apply_updates(params, updates), aux.model_state, state, value

    state, values = optimizer.init(params), []
    for i in range(15):
        key = jax.random.key(i)
        params, model_state, state, value = step(params, model_state, state, key)
        values.append(float(value))
    assert np.mean(values[-3:]) < 0.6 * values[0]
    objective = Objective(
        model, losses.softmax_cross_entropy, model_state, data, key=jax.random.key(0)
    )
    described = kronecker.describe(objective, params)
    kernels = [n for n in described.splitlines() if n.startswith("factored")]
    assert len(kernels) == (2 if shape == (6, 6, 1) else 9)
    assert ("['norm']['scale']" in described) == (shape == (6, 6, 1))


class Cells(nn.Module):
    cell: type[nn.Module]

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.RNN(self.cell(4))(x)[:, -1])


# Computed with JAX 0.10.2, where K-FAC walked through scans by code of its own.
LOSSES = {
    "rnn": [1.2726743, 0.9607907, 0.8561468, 0.7362465, 0.6330460],
    "lstm": [1.1290222, 1.0400529, 0.9790400, 0.9102108, 0.8363013],
    "hessian-free rnn": [1.2726743, 1.0076880, 0.8680682, 0.7358870, 0.5920195],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_every_release_of_jax_takes_the_same_steps_through_a_scan(name):
    data = {
        "image": jnp.asarray(numbers(16, 5, 2), jnp.float32),
        "label": jnp.arange(16, dtype=jnp.int32) % 3,
    }
    model = jdl.from_linen(Cells(nn.LSTMCell if name == "lstm" else nn.SimpleCell))
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), data["image"])
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [jnp.asarray(numbers(*s.shape, seed=i) / 2, s.dtype) for i, s in enumerate(leaves)]
    params = jax.tree.unflatten(structure, drawn)
    optimizer = (
        hessian_free(preconditioner="kronecker") if "free" in name else made(gradient_decay=0.0)
    )
    objective = Objective(model, losses.softmax_cross_entropy, {}, data)
    *_, values = run(optimizer, objective, params, len(LOSSES[name]))
    np.testing.assert_allclose(values, LOSSES[name], rtol=0, atol=1e-5)


def test_any_loss_has_a_route_and_the_log_has_it_once(caplog):
    def lambda_loss(z, b):
        return optax.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(b["y"])).sum(axis=1)

    objective, params = problem(loss=lambda_loss)
    account = jdl.optim.kronecker.describe(objective, params)  # its public path
    assert "factored: ['w'] with ['b'] (dense, 6×6 and 4×4)" in account
    assert account.endswith("by draws from the loss's output Hessian (diagonal)")
    with caplog.at_level(logging.INFO, logger="jdl.optim.kronecker.summary"):
        for _ in range(2):
            _, _, values = run(made(), objective, params, 8)
    assert values[-1] < values[0]
    assert [r.getMessage() for r in caplog.records] == ["kfac:\n" + account]
    assert kronecker.describe(objective, params, curvature="empirical_fisher").endswith(
        "the loss's own gradients"
    )


@pytest.mark.parametrize("eigen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transposed_kernels_step_as_plain_ones(eigen):
    w, v = (jnp.asarray(numbers(*s, seed=2), jnp.float32) for s in ((5, 7), (7, 3)))
    batch = {"x": numbers(24, 5), "y": numbers(24, 3, seed=1)}
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    plain = lambda p, b: jnp.tanh(b["x"] @ p["w"]) @ p["v"]  # noqa: E731
    other = lambda p, b: jax.vmap(lambda x: p["v"] @ jnp.tanh(p["w"] @ x))(b["x"])  # noqa: E731
    found = []
    for predict, params in ((plain, {"w": w, "v": v}), (other, {"w": w.T, "v": v.T})):
        objective = Objective.from_fns(predict, squares, batch)
        assert kronecker.describe(objective, params).count("factored") == 2
        found.append(run(made(eigen=eigen), objective, params, 3)[2])
    np.testing.assert_allclose(*found, rtol=1e-3)
    assert found[0][-1] < found[0][0]


def test_part_of_the_parameters():
    objective, params = problem()
    optimizer = optax.partition(
        {"kfac": kfac(), "rest": optax.sgd(0.01)},
        {"w": "kfac", "b": "kfac", "v": "rest", "c": "rest"},
    )
    state, start = optimizer.init(params), float(objective.value(params))

    @jax.jit
    def step(params, state):
        value, grad, _ = objective.value_and_grad(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, objective=objective, whole_params=params
        )
        return optax.apply_updates(params, updates), state

    moved = params
    for _ in range(6):
        moved, state = step(moved, state)
    assert float(objective.value(moved)) < 0.7 * start
    assert all(bool(jnp.any(moved[k] != params[k])) for k in params)


# ------------------------------------------------------------------ devices


@pytest.mark.slow
def test_under_a_mesh_the_inverses_are_split_and_steps_are_the_same():
    objective, params = problem(size=32)
    # exact factors: under pmap each device draws for itself
    optimizer = made(curvature="gauss_newton", inverses_every=2, factors_every=2)
    alone, _, _ = run(optimizer, objective, params, 5)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    batch = jax.device_put(dict(objective.batch), split)
    shared = Objective.from_fns(predict, squares, batch)
    placed = jax.device_put(params, whole)
    step, state = stepping(optimizer), jax.device_put(optimizer.init(params), whole)
    for _ in range(5):
        placed, state, _ = step(placed, state, shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), alone, placed)

    @functools.partial(jax.pmap, axis_name="d", in_axes=(None, None, 0))
    def mapped(params, state, batch):
        objective = Objective.from_fns(predict, squares, batch, axis_name="d")
        value, grad, _ = objective.value_and_grad(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, objective=objective
        )
        return optax.apply_updates(params, updates), state

    halves = jax.tree.map(lambda x: x.reshape(2, 16, *x.shape[1:]), dict(objective.batch))
    state = optimizer.init(params)
    for _ in range(5):
        params, state = jax.tree.map(lambda x: x[0], mapped(params, state, halves))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), alone, params)


def test_every_device_inverts_its_share_only():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    wide = [jnp.asarray(a.T @ a, jnp.float32) for a in (numbers(9, n) for n in (3, 8, 6, 7))]
    matrices = [*(a[None] for a in wide), jnp.stack([2.0 * wide[0], wide[0], 3.0 * wide[0]])]
    shifts = [jnp.full(a.shape[:2], 0.5) for a in matrices]
    seen = []

    def solve(matrix, shift):
        note = functools.partial(lambda n, d: seen.append((int(d), n)), matrix.shape)
        jax.debug.callback(note, jax.lax.axis_index("data"))
        return inverses.inverse(matrix, shift)

    solved = jax.jit(lambda m, s: inverses.shared(solve, m, s, axis_name=None, mesh=mesh))(
        matrices, shifts
    )
    jax.effects_barrier()
    each = [(1, n, n) for n in (3, 6, 7, 8)]  # once in all, and of the three blocks two each
    assert sorted(n for _, n in seen) == [*each, (2, 3, 3), (2, 3, 3)]
    assert {d for d, n in seen if n[0] == 1} == {0, 1}
    for (inverse,), matrix in zip(solved, matrices, strict=True):
        want = np.linalg.inv(np.asarray(matrix, np.float64) + 0.5 * np.eye(matrix.shape[1])[None])
        np.testing.assert_allclose(inverse, want, rtol=1e-3, atol=1e-4)


def test_split_factors_are_gathered_only_when_they_are_inverted():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    whole = [numbers(n, 8, 8).astype(np.float32) for n in (1, 1, 3)]
    whole = [a.mT @ a for a in map(jnp.asarray, whole)]

    @functools.partial(jax.jit, in_shardings=(rows, rows, None), out_shardings=(rows, rows))
    def step(matrices, old, due):
        added = lambda matrices: [m + a.mT @ a for m, a in zip(matrices, old, strict=True)]  # noqa: E731
        matrices = jax.lax.cond(due, added, lambda matrices: matrices, matrices)

        def inverted(matrices):
            shifts = [jnp.full(m.shape[:2], jnp.trace(m[0])) for m in matrices]
            return [x for (x,) in inverses.shared(inverses.inverse, matrices, shifts, None, mesh)]

        return matrices, jax.lax.cond(due, inverted, lambda matrices: old, matrices)

    split = jax.device_put(whole, rows)
    text = step.lower(split, split, True).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert "all-gather" in text
    assert "all-gather" not in entry[: entry.index("\n}")]
    for inverse, matrix in zip(step(split, split, True)[1], whole, strict=True):
        want = np.asarray(matrix, np.float64) + np.asarray(matrix.mT @ matrix, np.float64)
        shift = np.trace(want[0]) * np.eye(8)[None]
        np.testing.assert_allclose(inverse, np.linalg.inv(want + shift), rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------ the account of work


def test_work_and_diagnostics():
    objective, params = problem()
    _, state, _ = run(made(factors_every=2, inverses_every=4), objective, params, 8)
    found = state.diagnostics
    assert int(found.iterations) == 8
    assert float(found.gradients) == 8 + 4
    assert float(found.gauss_newton_products) == 8
    mults = 6 * 4 + 5 * 3  # inputs with the bias × outputs
    squares_ = 6**2 + 4**2 + 5**2 + 3**2
    products = 6 * 4 * 10 + 5 * 3 * 8
    refreshed, applied = 4 * 24 * squares_, 8 * products
    cubes = 6**3 + 4**3 + 5**3 + 3**3  # so little that no layers take turns
    inversions = (float(found.factor_work) * 3 * 24 * mults - refreshed - applied) / cubes
    assert inversions == pytest.approx(round(inversions), abs=1e-3)
    assert inversions >= 2
    counted = sum(getattr(found, name) * cost for name, cost in COSTS.items()) + found.factor_work
    assert float(found.gradient_equivalents) == pytest.approx(float(counted), rel=1e-5)


def test_arguments_are_checked():
    for options, name in (
        ({"damping": 0.0}, "damping"),
        ({"curvature": "true"}, "curvature"),
        ({"factors_every": 0}, "factors_every"),
        ({"kl_clip": -1.0}, "kl_clip"),
        ({"max_backtracks": -1}, "max_backtracks"),
    ):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            kfac(**options)
    objective, params = problem()
    value, grad, _ = objective.value_and_grad(params)
    with pytest.raises(ArgumentError, match="`objective` must be given"):
        kfac().update(
            grad, kfac().init(params), params, value=value, grad=grad, value_fn=objective.value
        )


# ------------------------------------------------------------------ as a preconditioner


def test_where_the_factors_are_exact_conjugate_gradients_are_done_at_once():
    # One linear layer, squared error: A ⊗ I is the curvature, and A is ill-conditioned.
    scales = jnp.asarray(10.0 ** np.linspace(-1.0, 1.0, 12), jnp.float32)
    x = jnp.asarray(numbers(40, 12), jnp.float32) * scales[None]
    y = jnp.asarray(numbers(40, 3, seed=1), jnp.float32)
    objective = Objective.from_fns(lambda p, b: b["x"] @ p["w"], squares, {"x": x, "y": y})
    iterations = {}
    for name, chosen in (
        ("none", None),
        ("drawn", "kronecker"),
        ("exact", kronecker.preconditioner("gauss_newton")),
    ):
        optimizer = hessian_free(
            preconditioner=chosen, damping=1e-5, tolerance=1e-3, progress=0.0, warm_start=0.0
        )
        _, state, _ = run(optimizer, objective, {"w": jnp.zeros((12, 3))}, 1)
        iterations[name] = int(state.diagnostics.linear_iterations)
    assert iterations["exact"] <= 5
    assert iterations["drawn"] <= 9
    assert iterations["none"] >= 18
