"""What holds for every optimizer that has a name."""

import functools

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

from jdl.core.check import ArgumentError
from jdl.core.model import from_linen
from jdl.core.objective import Objective
from jdl.losses import softmax_cross_entropy
from jdl.optim import by_name, diagnostics, kronecker, preconditioner
from jdl.optim.registry import REGISTRY
from jdl.optim.result import ResultCode
from jdl.optim.transformation import OPTIONAL, RANGES, check_options

EVERY = sorted(REGISTRY)
SECOND = [name for name in EVERY if REGISTRY[name].second_order]
# optax's own are trusted to optax, but for one of each kind; bfgs shares ssbroyden's code.
ALL = [
    *(x for x in SECOND if x != "bfgs"),
    "soap",
    "shampoo",
    "adam",
    "muon",
    "sgd",
    "sophia",
    "schedule_free_adamw",
]


def each(names):
    """The names as parameters: those of `ALL` in the slow run, the others before a release."""
    marks = {name: pytest.mark.slow if name in ALL else pytest.mark.release for name in names}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


def in_float64(test):
    """The test with 64-bit types, where numbers that should be equal are so to many digits."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return run


def predict(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return (hidden @ params["v"])[:, 0]


def loss(outputs, batch):
    return 0.5 * jnp.square(outputs - batch["y"])


def problem(dtype=np.float32, size=40):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 3))
    batch = {"x": x, "y": np.tanh(x @ rng.normal(size=(3, 2))) @ np.ones(2)}
    params = {
        "w": 0.5 * rng.normal(size=(3, 4)),
        "b": np.zeros(4),
        "v": 0.5 * rng.normal(size=(4, 1)),
    }

    def as_arrays(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)

    return Objective.from_fns(predict, loss, as_arrays(batch)), as_arrays(params)


def types(tree):
    return jax.tree.map(lambda x: str(x.dtype), tree)


def make_step(optimizer, mode="objective"):
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params, state, objective):
        value, grad, _ = objective.value_and_grad(params)
        extra = {"objective": objective} if mode == "objective" else {}
        with jax.numpy_dtype_promotion("standard"):  # optax itself is not strict
            updates, state = optimizer.update(
                grad,
                state,
                params,
                value=value,
                grad=grad,
                value_fn=objective.value,
                obj_fn=objective.value,
                **extra,
            )
            params = optax.apply_updates(params, updates)
        return params, state, value

    return step


def assert_same(a, b):
    """The same numbers, in float64; CG and undamped solves amplify rounding."""
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def needs_objective(name):
    return name in ("gauss_newton", "lm", "natural_gradient", "kfac")


def strict_update(optimizer, objective, params, state):
    value, grad, _ = objective.value_and_grad(params)
    return optimizer.update(
        grad, state, params, value=value, grad=grad, value_fn=objective.value, objective=objective
    )


@pytest.mark.parametrize("name", SECOND)
def test_in_short(name):
    """One small case of each: it decreases f, compiles once, keeps its types, counts its work."""
    objective, params = problem(size=12)
    bad = Objective.from_fns(predict, loss, {k: v * jnp.nan for k, v in objective.batch.items()})
    optimizer = by_name(name)
    step = jax.jit(make_step(optimizer))
    state = optimizer.init(params)
    structure, dtypes = jax.tree.structure(state), types(state)
    start = float(objective.value(params))
    for _ in range(4):
        params, state, _ = step(params, state, objective)
    after, state, _ = step(params, state, bad)
    jax.tree.map(np.testing.assert_array_equal, params, after)
    assert int(state.diagnostics.termination) == ResultCode.NOT_FINITE
    reached = float(objective.value(params))
    assert reached < 0.5 * start
    params, state, _ = step(params, state, objective)
    assert float(objective.value(params)) < reached
    assert step._cache_size() == 1
    assert jax.tree.structure(state) == structure
    assert types(state) == dtypes
    found = diagnostics.read(state)
    assert int(found.iterations) == 6
    assert int(found.evaluations) == round(float(found.values + found.gradients))


@pytest.mark.parametrize("mode", ["objective", "bare"])
@pytest.mark.parametrize("name", each(EVERY))
def test_decreases_a_frozen_objective_under_jit_compiling_once(name, mode):
    if mode == "bare" and name not in SECOND:
        pytest.skip("first-order ones see no difference")
    objective, params = problem()
    optimizer = by_name(name)
    if mode == "bare" and needs_objective(name):
        with pytest.raises(ArgumentError, match="objective"):
            make_step(optimizer, mode)(params, optimizer.init(params), objective)
        return
    step = jax.jit(make_step(optimizer, mode), donate_argnums=(0, 1))
    state = optimizer.init(params)
    structure, dtypes = jax.tree.structure(state), types(state)
    start = float(objective.value(params))
    for _ in range(8):
        params, state, value = step(params, state, objective)
        assert bool(jnp.isfinite(value))
    assert step._cache_size() == 1
    assert jax.tree.structure(state) == structure
    assert types(state) == dtypes
    assert float(objective.value(params)) < start
    if REGISTRY[name].second_order:
        assert float(objective.value(params)) < 0.5 * start


@pytest.mark.parametrize("name", each(ALL))
@in_float64
def test_runs_in_scan_and_gives_what_a_loop_gives(name):
    objective, params = problem(np.float64)
    optimizer = by_name(name)
    step = make_step(optimizer)

    def body(carry, _):
        params, state, value = step(*carry, objective)
        return (params, state), value

    start = (params, optimizer.init(params))
    (scanned, _), values = jax.jit(lambda s: jax.lax.scan(body, s, None, length=3))(start)
    looped = start
    for _ in range(3):
        looped = jax.jit(step)(*looped, objective)[:2]
    jax.tree.map(assert_same, scanned, looped[0])
    assert float(values[-1]) < float(values[0])


@pytest.mark.parametrize("name", each(ALL))
@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: optax.chain(optax.clip_by_global_norm(0.1), o),
        lambda o: optax.chain(optax.add_decayed_weights(1e-3), o, optax.scale(0.5)),
        lambda o: optax.masked(o, True),
    ],
    ids=["clip", "decay-scale", "masked"],
)
def test_composes_with_optax(name, wrap):
    objective, params = problem()
    optimizer = wrap(by_name(name))
    step = jax.jit(make_step(optimizer))
    state = optimizer.init(params)
    start = float(objective.value(params))
    for _ in range(6):
        params, state, _ = step(params, state, objective)
    assert float(objective.value(params)) < start
    assert (diagnostics.read(state) is not None) == (name in [*SECOND, "soap", "shampoo", "muon"])


@pytest.mark.parametrize("name", each(SECOND))
def test_is_strict_about_types_and_ranks(name):
    # The test run has strict dtype promotion and raises on rank promotion; no optax in the way.
    objective, params = problem()
    optimizer = by_name(name)
    update = jax.jit(functools.partial(strict_update, optimizer))
    updates, state = update(objective, params, optimizer.init(params))
    params = optax.apply_updates(params, updates)
    _, state = update(objective, params, state)
    assert int(diagnostics.read(state).iterations) == 2


@pytest.mark.parametrize("name", each(SECOND))
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_works_with_64_bit_types_enabled(name, dtype):
    with jax.enable_x64(True):
        objective, params = problem(dtype)
        optimizer = by_name(name)
        state = optimizer.init(params)
        start = float(objective.value(params))
        dtypes = types(state)
        step = jax.jit(make_step(optimizer))
        for _ in range(6):
            params, state, _ = step(params, state, objective)
        assert types(state) == dtypes
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert float(objective.value(params)) < 0.5 * start
        assert state.diagnostics.iterations.dtype == jnp.int32


@pytest.mark.parametrize("name", each(SECOND))
def test_works_in_bfloat16(name):
    objective, params = problem(jnp.bfloat16)
    optimizer = by_name(name)
    state = optimizer.init(params)
    dtypes = types(state)
    start = float(objective.value(params))
    step = jax.jit(make_step(optimizer))
    for _ in range(6):
        params, state, _ = step(params, state, objective)
    assert types(state) == dtypes
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert float(objective.value(params)) < start


def nan_beyond(x):
    return jnp.sum(jnp.where(x < 1.0, jnp.square(x - 2.0), jnp.nan))


def nan_everywhere(x):
    return jnp.sum(x) * jnp.nan


def infinite(x):
    return jnp.sum(jnp.log(jnp.zeros_like(x)) * x)


def unbounded(x):
    return jnp.sum(jnp.log(jnp.abs(x)))


def flat(x):
    return 0.0 * jnp.sum(x)


def kink(x):
    return jnp.sum(jnp.abs(x))


def huge(x):
    return 1e8 * jnp.sum(jnp.square(x - 1.0))


def tiny(x):
    return 1e-8 * jnp.sum(jnp.square(x - 1.0))


def saddle(x):
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


@pytest.mark.parametrize("name", each(SECOND))
def test_hard_functions_end_and_never_rise(name, minimize):
    if needs_objective(name):
        pytest.skip("bare functions are not for methods that need an objective")
    T = ResultCode
    for f, x in (
        (nan_beyond, [0.0, 0.5]),
        (nan_everywhere, [0.0, 0.5]),
        (infinite, [1.0, 2.0]),
        (unbounded, [1.0, 2.0]),
        (flat, [1.0, 2.0]),
        (kink, [1.0, 2.0]),
        (huge, [3.0, -2.0]),
        (tiny, [3.0, -2.0]),
        (saddle, [1.0, 1e-3]),
    ):
        run = minimize(by_name(name), f, jnp.array(x), steps=12)
        found = run.diagnostics
        if f in (nan_everywhere, infinite):
            assert int(found.termination) == T.NOT_FINITE, f.__name__
            np.testing.assert_array_equal(run.params, x)
        elif f is flat:
            assert int(found.termination) == T.STATIONARY
        else:
            # A rise by rounding is the most that a noise floor lets through.
            assert np.all(np.diff(run.values) <= 1e-5 * np.abs(run.values[:-1])), f.__name__
            assert run.values[-1] < run.values[0], f.__name__
        assert int(found.evaluations) <= 45 * 12
    assert run.values[-1] < -0.2  # the saddle was left


@pytest.mark.parametrize("name", each(SECOND))
def test_recovers_from_one_batch_that_is_not_finite(name):
    objective, params = problem()
    bad = Objective.from_fns(predict, loss, {k: v * jnp.nan for k, v in objective.batch.items()})
    optimizer = by_name(name)
    step = jax.jit(make_step(optimizer))
    state = optimizer.init(params)
    params, state, _ = step(params, state, objective)
    after, state, _ = step(params, state, bad)
    jax.tree.map(np.testing.assert_array_equal, params, after)
    state_without_ratio = state._replace(diagnostics=())
    assert not any(bool(jnp.any(jnp.isnan(x))) for x in jax.tree.leaves(state_without_ratio))
    again, state, _ = step(after, state, objective)
    assert float(objective.value(again)) < float(objective.value(after))


@pytest.mark.parametrize("name", SECOND)
def test_missing_extras_are_named(name):
    objective, params = problem()
    optimizer = by_name(name)
    with pytest.raises(ArgumentError, match=r"`value`, `grad`, `value_fn`|`residual_fn`"):
        optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ArgumentError, match="update needs `grad`\\."):
        optimizer.update(
            params,
            optimizer.init(params),
            params,
            value=jnp.ones(()),
            value_fn=objective.value,
            objective=objective,
        )


@pytest.mark.parametrize("name", SECOND)
def test_parameters_without_a_real_gradient_are_refused_by_name(name):
    for bad in (jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)):
        with pytest.raises(ArgumentError, match=r"params\['layer'\]\['w'\]"):
            by_name(name).init({"layer": {"w": bad}, "ok": jnp.ones(1)})


@pytest.mark.parametrize("name", SECOND)
def test_a_part_of_the_parameters_is_refused_in_words(name):
    objective, params = problem()
    optimizer = optax.masked(by_name(name), {"w": True, "b": False, "v": True})
    with pytest.raises(ArgumentError, match=r"whole_params=params"):
        make_step(optimizer)(params, optimizer.init(params), objective)


@pytest.mark.parametrize("name", each(SECOND))
@in_float64
def test_moves_a_part_of_the_parameters_as_if_there_were_no_others(name):
    objective, params = problem(np.float64)
    parts = {"w": "own", "b": "frozen", "v": "own"}
    optimizer = optax.partition({"own": by_name(name), "frozen": optax.set_to_zero()}, parts)

    def fixed(predict):
        return lambda p, batch: predict({**p, "b": params["b"]}, batch)

    alone = Objective.from_fns(fixed(predict), loss, objective.batch)
    alone_optimizer = by_name(name)

    def step(params, state):
        value, grad, _ = objective.value_and_grad(params)
        extra = {"value_fn": objective.value, "objective": objective, "whole_params": params}
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, **extra)
        return optax.apply_updates(params, updates), state

    step, alone_step = jax.jit(step), jax.jit(make_step(alone_optimizer))
    some = {"w": params["w"], "v": params["v"]}
    moved, state, own = params, optimizer.init(params), alone_optimizer.init(some)
    for _ in range(3):
        moved, state = step(moved, state)
        some, own, _ = alone_step(some, own, alone)
    np.testing.assert_array_equal(moved["b"], params["b"])
    assert float(objective.value(moved)) < 0.9 * float(objective.value(params))
    for leaf in some:
        assert_same(moved[leaf], some[leaf])


@pytest.mark.parametrize("name", each(ALL))
@in_float64
def test_vmap_gives_what_each_gives_alone(name):
    objective, params = problem(np.float64)
    optimizer = by_name(name)
    both = jax.tree.map(lambda x: jnp.stack([x, 0.8 * x]), params)
    step = make_step(optimizer)

    def steps(params):
        state = optimizer.init(params)
        for _ in range(1 if name == "gauss_newton" else 2):
            params, state, _ = step(params, state, objective)
        return params

    together = jax.jit(jax.vmap(steps))(both)
    alone = jax.jit(steps)
    for i in range(2):
        one = alone(jax.tree.map(lambda x, i=i: x[i], both))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one), strict=True):
            assert_same(a[i], b)


@pytest.mark.parametrize("name", each(ALL))
@in_float64
def test_two_devices_give_the_numbers_of_one_under_jit_and_pmap(name):
    objective, params = problem(np.float64)
    optimizer = by_name(name)
    step = jax.jit(make_step(optimizer))
    steps = 1 if name == "gauss_newton" else 3  # undamped, it amplifies rounding
    one, state = params, optimizer.init(params)
    for _ in range(steps):
        one, state, _ = step(one, state, objective)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = Objective.from_fns(predict, loss, jax.device_put(objective.batch, split))
    meshed, state = jax.device_put((params, optimizer.init(params)), whole)
    for _ in range(steps):
        meshed, state, _ = step(meshed, state, sharded)

    def mapped(params, state, batch):
        own = Objective.from_fns(predict, loss, batch, axis_name="devices")
        return make_step(optimizer)(params, state, own)

    pmapped = jax.pmap(mapped, axis_name="devices")
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), objective.batch)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (params, optimizer.init(params)))
    for _ in range(steps):
        *twice, _ = pmapped(*twice, halves)
    for a, b, c in zip(*map(jax.tree.leaves, (one, meshed, twice[0])), strict=True):
        assert_same(b, a)
        np.testing.assert_array_equal(c[0], c[1])
        assert_same(c[0], a)


def test_optax_line_searches_see_the_whole_gradient_under_pmap():
    objective, params = problem()
    optimizer = optax.lbfgs()
    one, *_ = jax.jit(make_step(optimizer))(params, optimizer.init(params), objective)

    def mapped(params, state, batch):
        own = Objective.from_fns(predict, loss, batch, axis_name="devices")
        return make_step(optimizer)(params, state, own)

    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), objective.batch)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (params, optimizer.init(params)))
    mapped_params, *_ = jax.pmap(mapped, axis_name="devices")(*twice, halves)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(mapped_params), strict=True):
        np.testing.assert_allclose(b[0], a, rtol=1e-3, atol=1e-4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        x = nn.Dropout(0.2, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("name", each(ALL))
def test_dropout_and_batch_norm_hold_still_within_a_step(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype(np.float32)
    batch = {"x": x, "label": np.argmax(x[:, :3], axis=1).astype(np.int32)}
    model = from_linen(Net())
    params, model_state = model.init(jax.random.key(0), x)
    objective = Objective(
        model, softmax_cross_entropy, model_state, batch, key=jax.random.key(1), inputs="x"
    )
    optimizer = by_name(name)
    step = jax.jit(make_step(optimizer))
    finals = []
    for _ in range(2):
        moved, state, values = params, optimizer.init(params), []
        for _ in range(5):
            moved, state, value = step(moved, state, objective)
            values.append(float(value))
        finals.append(moved)
    assert values[-1] < values[0]
    if name in SECOND and name not in ("natural_gradient", "kfac"):
        # Searched on the masks it was computed with, f never rises.
        assert np.all(np.diff(values) <= 1e-5)
    jax.tree.map(np.testing.assert_array_equal, *finals)


@pytest.mark.parametrize("name", each(ALL))
def test_a_state_saved_and_restored_goes_on_bit_for_bit(name, tmp_path):
    objective, params = problem()
    optimizer = by_name(name)
    step = jax.jit(make_step(optimizer))
    state = optimizer.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, objective)
    leaves, structure = jax.tree.flatten((params, state))
    np.savez(tmp_path / "state.npz", *[np.asarray(_plain(x)) for x in leaves])
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        restored = [_as(file[f"arr_{i}"], x) for i, x in enumerate(leaves)]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        named = {str(i): x for i, x in enumerate(leaves)}
        checkpointer.save(tmp_path / "orbax", named)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp_abstract, named)
        back = checkpointer.restore(tmp_path / "orbax", abstract)
    by_orbax = [back[str(i)] for i in range(len(leaves))]
    on = step(params, state, objective)
    for again in (restored, by_orbax):
        other = step(*jax.tree.unflatten(structure, again), objective)
        for a, b in zip(jax.tree.leaves(on), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(_plain(a), _plain(b))


def ocp_abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x):
    return jax.random.key_data(x) if _is_key(x) else x


def _as(saved, like):
    return jax.random.wrap_key_data(jnp.asarray(saved)) if _is_key(like) else jnp.asarray(saved)


@pytest.mark.parametrize("name", each([n for n in SECOND if not needs_objective(n)]))
def test_value_fn_may_give_more_than_the_value(name, minimize):
    def f(x):
        return jnp.sum(jnp.square(x - 1.0))

    optimizer, x = by_name(name), jnp.zeros(3)
    value, grad = jax.value_and_grad(f)(x)
    updates, _ = optimizer.update(
        grad, optimizer.init(x), x, value=value, grad=grad, value_fn=lambda x: (f(x), {"aux": x})
    )
    plain = minimize(optimizer, f, x, steps=1)
    np.testing.assert_allclose(updates, plain.params, rtol=1e-5)


@pytest.mark.parametrize("name", each(EVERY))
def test_what_is_tuned_is_state(name):
    search = REGISTRY[name].search
    objective, params = problem()
    optimizer = by_name(name)
    step = jax.jit(make_step(optimizer))
    results = []
    for x in (search.low, search.high):
        state = optimizer.init(params)
        state = optax.tree.set(state, **{search.parameter: jnp.asarray(x, jnp.float32)})
        moved, state, _ = step(params, state, objective)  # of SOAP, the first step is none
        results.append(step(moved, state, objective)[0])
    assert step._cache_size() == 1
    low, high = (jax.flatten_util.ravel_pytree(r)[0] for r in results)
    assert bool(jnp.any(low != high))


@pytest.mark.parametrize("name", each(["lbfgs", "cg", "newton", "hf"]))
def test_a_schedule_gives_the_rate_of_each_update(name, minimize):
    optimizer = by_name(name, lambda count: 1.0 / (1.0 + count))
    run = minimize(optimizer, lambda x: jnp.sum(jnp.square(x - 1.0)), jnp.zeros(2), steps=3)
    assert float(run.state.learning_rate) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", each(SECOND))
def test_work_is_counted_as_it_is_spent(name):
    objective, params = problem()
    half = {k: v[::2] for k, v in objective.batch.items()}
    objective = Objective.from_fns(predict, loss, objective.batch, curvature_batch=half)
    optimizer = by_name(name)
    step = jax.jit(make_step(optimizer))
    state = optimizer.init(params)
    for _ in range(3):
        params, state, _ = step(params, state, objective)
    found = diagnostics.read(state)
    size = sum(x.size for x in jax.tree.leaves(params))
    assert int(found.iterations) == 3
    assert int(found.evaluations) == round(float(found.values + found.gradients))
    assert float(found.gradients) >= 3
    if name == "newton":
        assert float(found.hessian_products) == 3 * size / 2
    if name == "hf":
        # A warm start costs a product more than the iterations do.
        products = float(found.gauss_newton_products)
        assert products == pytest.approx(0.5 * (int(found.linear_iterations) + 3))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("hf", "tolerance", 1.0),
        ("hf", "c1", 1.0),
        ("natural_gradient", "tolerance", 1.0),
        ("kfac", "factors_decay", 1.0),
        ("kfac", "damping_decrease", 1.0),
        ("lbfgs", "cautious", 1.0),
        ("lbfgs", "c2", 1.0),
        ("lbfgs", "c1", 0.9),
        ("cg", "c2", 0.5),
        ("cg", "c1", 0.1),
        ("gauss_newton", "rcond", 1.0),
        ("gauss_newton", "c1", 1.0),
    ],
)
def test_the_open_end_of_a_range_is_refused(name, option, value):
    with pytest.raises(ArgumentError, match=rf"`{option}` must be a number in .*\), got {value}"):
        by_name(name, **{option: value})


def test_none_is_refused_except_where_it_has_a_meaning():
    check_options(kl_clip=None, trust_region=None, rcond=None, restart_threshold=None)
    for name in RANGES.keys() - OPTIONAL:
        with pytest.raises(ArgumentError, match=f"`{name}` must be a number in .*, got None"):
            check_options(**{name: None})


@pytest.mark.parametrize(
    "make",
    [
        lambda: preconditioner.diagonal(decay=1.0),
        lambda: preconditioner.diagonal(power=0.0),
        lambda: preconditioner.diagonal(power=1.5),
        lambda: kronecker.preconditioner(decay=1.0),
    ],
)
def test_a_preconditioner_out_of_range_is_refused(make):
    with pytest.raises(ArgumentError, match="must be a number in"):
        make()


def test_first_order_ones_are_optax_to_the_bit():
    objective, params = problem()
    for name, optimizer in (
        ("sgd", optax.sgd(0.1)),
        ("nesterov", optax.sgd(0.1, momentum=0.9, nesterov=True)),
        ("adam", optax.adam(0.1)),
    ):
        ours, theirs = params, params
        state, their_state = by_name(name, 0.1).init(params), optimizer.init(params)
        for _ in range(3):
            ours, state, _ = make_step(by_name(name, 0.1))(ours, state, objective)
            theirs, their_state, _ = make_step(optimizer)(theirs, their_state, objective)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", each(SECOND))
@pytest.mark.parametrize("options", [{}, {"trust_region": 1.0}])
def test_strict_types_hold_in_float64(name, options):
    if options and name not in ("newton", "hf", "lm"):
        pytest.skip("without a trust region")
    with jax.enable_x64(True):
        objective, params = problem(np.float64)
        optimizer = by_name(name, **options)
        state = optimizer.init(params)
        _, after = jax.eval_shape(
            functools.partial(strict_update, optimizer), objective, params, state
        )
        assert types(after) == types(state)
