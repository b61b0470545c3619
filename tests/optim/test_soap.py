"""SOAP: its authors' numbers, the rotation it must find, and gradients that break others."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.losses import squared_error
from jdl.optim import by_name, diagnostics, soap
from jdl.optim.kronecker import describe, inverses
from jdl.optim.kronecker.factors import told
from jdl.optim.matrices import layers_of
from jdl.optim.result import ResultCode

REFERENCE = json.loads((Path(__file__).parent / "torch_reference.json").read_text())


def arrays(tree, dtype=jnp.float32):
    leaf = lambda x: isinstance(x, list)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree, is_leaf=leaf)


EVERY_SECOND = soap(0.1, precondition_every=2)
jitted = functools.cache(lambda optimizer: jax.jit(optimizer.update))


def finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def after(optimizer, params, gradients, state=None):
    """The parameters and the state after these gradients."""
    state = optimizer.init(params) if state is None else state
    update = jitted(optimizer)
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax itself is not strict
            updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_ten_steps_are_those_of_its_authors_implementation(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        theirs = REFERENCE["soap"]["options"]
        optimizer = soap(
            theirs["lr"],
            b1=theirs["betas"][0],
            b2=theirs["betas"][1],
            shampoo_beta=theirs["shampoo_beta"],
            weight_decay=theirs["weight_decay"],
            precondition_every=theirs["precondition_frequency"],
            max_size=theirs["max_precond_dim"],
        )
        gradients = [arrays(g, dtype) for g in REFERENCE["gradients"]]
        params, state = after(optimizer, arrays(REFERENCE["start"], dtype), gradients[:5])
        later, _ = after(optimizer, params, gradients[5:], state)
        for steps, found in (("4", params), ("10", later)):
            for name, expected in REFERENCE["soap"][steps].items():
                np.testing.assert_allclose(found[name], expected, rtol=0, atol=tolerance)


def test_the_bases_find_the_rotation_of_a_quadratic():
    """f = ½ ‖D₁ Uᵀ W V D₂‖², whose gradients' factors have the eigenvectors U and V."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (5, 4))
    scales = np.outer([16.0, 8.0, 4.0, 2.0, 1.0], [27.0, 9.0, 3.0, 1.0])
    optimizer = soap(1e-3, precondition_every=1, shampoo_beta=0.995)
    gradients = [jnp.asarray(u @ (scales * rng.normal(size=(5, 4))) @ v.T) for _ in range(600)]
    _, state = after(optimizer, jnp.zeros((5, 4)), gradients)
    for side, expected in zip(state.stacks[0].sides, (u, v), strict=True):
        overlap = np.abs(expected.T @ side.basis[0])  # a column stays where it started
        np.testing.assert_allclose(
            overlap[:, np.argmax(overlap, axis=1)], np.eye(len(expected)), atol=0.15
        )
        np.testing.assert_allclose(
            side.basis[0].T @ side.basis[0], np.eye(len(expected)), atol=1e-5
        )


@pytest.mark.parametrize(
    "gradient",
    [
        np.zeros((6, 4)),
        1e-20 * np.ones((6, 4)),
        1e-30 * np.eye(6, 4),
        1e18 * np.random.default_rng(0).normal(size=(6, 4)),
        np.outer(np.arange(6.0), np.arange(4.0)),
        np.eye(6, 4)[:, ::-1] * [1e6, 1.0, 1e-6, 1e-12],
    ],
    ids=["zero", "tiny", "denormal", "huge", "rank one", "graded"],
)
def test_no_gradient_gives_nan(gradient):
    params = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
    gradient = arrays({"w": gradient.tolist(), "b": gradient[0].tolist()})
    params, state = after(EVERY_SECOND, params, 7 * [gradient])
    assert finite((params, state._replace(diagnostics=())))
    usual = np.random.default_rng(1).normal(size=(6, 4)).tolist()
    usual = arrays({"w": usual, "b": usual[0]})
    params, state = after(EVERY_SECOND, params, 5 * [usual], state)
    assert finite((params, state._replace(diagnostics=())))
    for side in state.stacks[0].sides:
        square = side.basis.mT @ side.basis
        np.testing.assert_allclose(square, np.eye(square.shape[-1])[None], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_gradient_that_is_not_finite_leaves_no_trace_but_a_count(bad, when):
    optimizer = EVERY_SECOND
    gradients = [arrays(g) for g in REFERENCE["gradients"]][:6]
    broken = dict(gradients[0], square=jnp.full((3, 3), bad))
    params, state = after(optimizer, arrays(REFERENCE["start"]), gradients)
    again, other = after(
        optimizer, arrays(REFERENCE["start"]), [*gradients[:when], broken, *gradients[when:]]
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)
    same = lambda s: s._replace(diagnostics=())  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, same(state), same(other))
    assert int(other.diagnostics.left_out) == 1
    _, last = after(optimizer, params, [broken], state)
    assert int(last.diagnostics.termination) == ResultCode.NOT_FINITE


def test_vectors_and_long_sides_are_adams():
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(3)}
    rng = np.random.default_rng(0)
    gradients = [{k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}
                 for _ in range(4)]  # fmt: skip
    ours, state = after(soap(0.1, max_size=1, weight_decay=0.0, eps=1e-12), params, gradients)
    theirs, _ = after(optax.adam(0.1, b1=0.95, b2=0.95, eps=1e-12), params, gradients[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
    assert state.stacks == ()


def test_one_sided_rotates_the_smaller_side():
    state = soap(one_sided=True).init(
        {"w": jnp.ones((8, 2)), "v": jnp.ones((3, 5)), "u": jnp.ones((4, 1))}
    )
    kept = [[side is not None for side in stack.sides] for stack in state.stacks]
    assert kept == [[True, False], [False, True]]  # in the order of the names: v, w


def test_leaves_of_equal_sides_are_one_stack():
    params = {f"layer{i}": jnp.ones((4, 4) if i % 2 else (4, 2, 2)) for i in range(5)}
    (stack,) = soap().init(params).stacks
    assert stack.sides[0].factor.shape == (5, 4, 4)


def test_the_axes_of_a_model_are_those_of_its_layers():
    """Stacked layers are blocks, which shapes alone do not tell; their biases are no matrices."""

    def predict(p, batch):
        def layer(x, kernel_and_bias):
            kernel, bias = kernel_and_bias
            return jnp.tanh(x @ kernel + bias[None]), None

        return jax.lax.scan(layer, batch["x"], (p["kernels"], p["biases"]))[0]

    params = {"kernels": jnp.ones((6, 3, 3)), "biases": jnp.ones((6, 3))}
    batch = {"x": jnp.ones((7, 3)), "label": jnp.ones((7, 3))}
    objective = Objective.from_fns(predict, squared_error, batch)
    with told(objective, params):
        state = soap().init(params)
    assert [x.sides[0].factor.shape for x in state.stacks] == [(6, 3, 3)]
    assert [x.shape for x in layers_of(params).values()] == [(1, 6, 3), (1, 6, 9)]
    gradients = jax.tree.map(lambda x: jnp.ones_like(x), params)
    assert finite(after(soap(), params, 3 * [gradients], state)[0])


@pytest.mark.slow
def test_factors_may_be_bfloat16_and_parameters_too():
    params = arrays(REFERENCE["start"], jnp.bfloat16)
    gradients = [arrays(g, jnp.bfloat16) for g in REFERENCE["gradients"]]
    wide, _ = after(soap(0.03), arrays(REFERENCE["start"]), [arrays(g) for g in gradients])
    for dtype in (None, "bfloat16"):
        moved, state = after(soap(0.03, factors_dtype=dtype), params, gradients)
        assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("float32")}
        kept = {x.dtype for x in jax.tree.leaves(state.stacks)}
        assert kept == {jnp.dtype(dtype or "float32")}
        for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(wide), strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.15)


@pytest.mark.slow
def test_it_works_in_optax_s_wrappers():
    params = arrays(REFERENCE["start"])
    gradients = [arrays(g) for g in REFERENCE["gradients"]]
    plain, _ = after(soap(0.03), params, gradients)
    injected = optax.inject_hyperparams(
        soap, static_args=("max_size", "one_sided", "factors_dtype")
    )(learning_rate=0.03)
    named = by_name("soap", 0.03)
    scheduled = soap(lambda count: jnp.where(count < 100, 0.03, 0.0))
    for optimizer in (injected, named, scheduled, optax.chain(optax.clip(1e6), soap(0.03))):
        params_there, state = after(optimizer, params, gradients)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, params_there)
        assert int(diagnostics.read(state).iterations) == len(gradients)
    every_second, _ = after(optax.MultiSteps(soap(0.03), 2), params, 2 * gradients)
    assert finite(every_second)
    halves = {"square": "a", "another": "b", "wide": "a", "vector": "b"}
    split, _ = after(optax.partition({"a": soap(0.03), "b": soap(0.03)}, halves), params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, split)


def test_map_params_sees_the_moments():
    params = arrays(REFERENCE["start"])
    for optimizer in (soap(), by_name("soap")):
        state = optimizer.init(params)
        mapped = optax.tree.map_params(
            optimizer, lambda _, name: name, state, {k: k for k in params},
            transform_non_params=lambda _: None,
        )  # fmt: skip
        found = optax.tree.get(mapped, "mu")
        assert found == optax.tree.get(mapped, "nu") == {k: k for k in params}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"b1": 1.0}, "`b1`"),
        ({"shampoo_beta": -0.1}, "`shampoo_beta`"),
        ({"precondition_every": 0}, "`precondition_every`"),
        ({"max_size": 0}, "`max_size`"),
        ({"weight_decay": -1.0}, "`weight_decay`"),
        ({"factors_dtype": "int8"}, "`factors_dtype`"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ArgumentError, match=words):
        soap(**options)


def test_weight_decay_without_parameters_is_refused():
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ArgumentError, match="`params`"):
        soap().update(params, soap().init(params))


@pytest.mark.slow
def test_devices_share_the_refresh_and_keep_the_factors_split(monkeypatch):
    start, *gradients = (arrays(x) for x in (REFERENCE["start"], *REFERENCE["gradients"][:5]))
    optimizer = soap(0.1, precondition_every=2)
    alone, _ = after(optimizer, start, gradients)
    shares = []
    assignment = inverses.assignment
    monkeypatch.setattr(inverses, "assignment", lambda c, n: shares.append(n) or assignment(c, n))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = (NamedSharding(mesh, P(*names)) for names in ((), (None, "data")))
    params, state = jax.device_put((start, optimizer.init(start)), whole)
    split = lambda x: jax.device_put(x, whole if x.shape[1] % 2 else rows)  # noqa: E731
    state = state._replace(stacks=jax.tree.map(split, state.stacks))
    update = jax.jit(lambda *args: optimizer.update(*args))
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert shares
    assert set(shares) == {2}
    factors = [side.factor for stack in state.stacks for side in stack.sides]
    assert {str(x.sharding.spec) for x in factors if x.shape[1] % 2 == 0} == {str(rows.spec)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, alone)


def two_layers():
    params = {"v": 0.1 * jnp.ones((4, 2)), "w": 0.1 * jnp.ones((3, 4))}
    batch = {"x": jnp.ones((10, 3)), "label": jnp.ones((10, 2))}

    def predict(params, batch):
        return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]

    return params, Objective.from_fns(predict, squared_error, batch)


def worked(optimizer, steps):
    """`factor_work` after these steps, in multiplications."""
    params, objective = two_layers()
    state = optimizer.init(params)
    for _ in range(steps):
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = jitted(optimizer)(grads, state, params, objective=objective)
    gradient = 3 * 10 * (3 * 4 + 4 * 2)
    found = diagnostics.read(state)
    assert float(found.gradient_equivalents) == pytest.approx(steps + float(found.factor_work))
    return float(found.factor_work) * gradient


def test_work_is_that_of_the_products():
    step = 3 * (12 * (3 + 4) + 8 * (4 + 2))
    refresh = 2 * (12 * (3 + 4) + 8 * (4 + 2)) + 7 * (27 + 64 + 64 + 8)
    two = soap(0.01, precondition_every=2)
    assert worked(two, steps=3) == pytest.approx(3 * step + 2 * refresh, rel=1e-5)
    one_side = soap(0.01, precondition_every=2, one_sided=True)
    step, refresh = 3 * (12 * 3 + 8 * 2), 2 * (12 * 3 + 8 * 2) + 7 * (27 + 8)
    assert worked(one_side, steps=1) == pytest.approx(step + refresh, rel=1e-5)


def test_a_state_s_memory_is_described():
    params, objective = two_layers()
    for optimizer in (soap(), by_name("soap"), by_name("muon")):
        with told(objective, params):
            state = optimizer.init(params)
        held, size = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (state, params))
        assert describe(objective, params, optimizer=optimizer) == (
            f"memory: {held / 1e6:.3g} MB of state, {held / size:.2g} times the parameters"
        )
