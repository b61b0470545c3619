"""Shampoo: numbers of facebookresearch/optimizers, roots against SciPy's, broken gradients."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdl.core.check import ArgumentError
from jdl.optim import by_name, diagnostics, shampoo
from jdl.optim.kronecker import inverses
from jdl.optim.kronecker.inverses import inverse_power
from jdl.optim.result import ResultCode

REFERENCE = json.loads((Path(__file__).parent / "torch_reference.json").read_text())
CASES = REFERENCE["shampoo"]
MATRICES = ("square", "another", "wide")
EVERY_SECOND = shampoo(0.1, precondition_every=2)
KL = shampoo(0.1, precondition_every=2, kl=True, grafting=None)
jitted = functools.cache(lambda optimizer: jax.jit(optimizer.update))


def arrays(tree, dtype=jnp.float32, names=(*MATRICES, "vector")):
    return {k: jnp.asarray(tree[k], dtype) for k in names}


def finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def after(optimizer, params, gradients, state=None):
    """The parameters and the state after these gradients."""
    state = optimizer.init(params) if state is None else state
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax itself is not strict
            updates, state = jitted(optimizer)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    "name", ["adam", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "adam")]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_ten_steps_are_those_of_facebookresearch_s_implementation(name, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        optimizer = shampoo(**CASES[name]["options"])
        gradients = [arrays(g, dtype, MATRICES) for g in REFERENCE["gradients"][:10]]
        found, _ = after(optimizer, arrays(REFERENCE["start"], dtype, MATRICES), gradients)
        for leaf, expected in CASES[name]["10"].items():
            np.testing.assert_allclose(found[leaf], expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_newton_s_roots_give_the_same_steps(name):
    with jax.enable_x64(True):
        optimizer = shampoo(**CASES[name]["options"], root="newton")
        gradients = [arrays(g, float, MATRICES) for g in REFERENCE["gradients"][:10]]
        found, _ = after(optimizer, arrays(REFERENCE["start"], float, MATRICES), gradients)
        for leaf, expected in CASES[name]["10"].items():
            np.testing.assert_allclose(found[leaf], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("newton", [False, True], ids=["eigh", "newton"])
@pytest.mark.parametrize(("condition", "tolerance"), [(10, 1e-12), (1e6, 1e-8), (1e9, 1e-5)])
def test_roots_are_scipy_s(newton, condition, tolerance):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    matrix = 1e-5 * (basis * np.geomspace(1, 1 / condition, 30)) @ basis.T
    with jax.enable_x64(True):
        for p in (1, 2, 4):
            expected = scipy.linalg.fractional_matrix_power(matrix, -1 / p)
            found, lost = inverse_power(
                jnp.asarray(np.stack([matrix, np.eye(30)])), jnp.zeros((2, 30, 30)), 1 / p, newton
            )
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found[0], expected, rtol=0, atol=tolerance * scale)
            np.testing.assert_allclose(found[1], np.eye(30), atol=1e-12)
            assert lost.tolist() == [0, 0]


@pytest.mark.parametrize("newton", [False, True], ids=["eigh", "newton"])
def test_roots_of_a_rank_deficient_matrix_are_right_where_it_is_not_zero(newton):
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(20, 3))
    values, vectors = np.linalg.eigh(columns @ columns.T)
    solve = jax.jit(functools.partial(inverse_power, exponent=0.25, newton=newton))
    for scale in (1e-30, 1.0, 1e30):
        matrix = jnp.asarray(scale * columns @ columns.T, jnp.float32)[None]
        (root,), _ = solve(matrix, jnp.zeros((1, 20, 20), jnp.float32))
        expected = (scale * values[-3:]) ** -0.25
        found = np.diag(vectors[:, -3:].T @ np.asarray(root, float) @ vectors[:, -3:])
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        assert np.abs(root).max() <= 100 * expected[-1]


def test_a_root_that_is_not_finite_is_the_last_good_one_and_counted(monkeypatch):
    """As where LAPACK's eigh does not converge, and gives NaN."""
    params = {"w": jnp.ones((3, 4))}
    gradients = [{"w": jnp.asarray(g)} for g in np.random.default_rng(0).normal(size=(4, 3, 4))]
    _, state = after(shampoo(precondition_every=2), params, gradients[:2])
    values = lambda matrix, shift: (matrix * jnp.nan, matrix[:, 0] * jnp.nan)  # noqa: E731
    monkeypatch.setattr(inverses, "eigen", values)
    params, broken = after(shampoo(precondition_every=2), params, gradients[2:], state)
    assert finite((params, broken.stacks, broken.mu, broken.nu))
    assert int(broken.diagnostics.left_out) == 2
    for old, new in zip(state.stacks[0].sides, broken.stacks[0].sides, strict=True):
        np.testing.assert_array_equal(old.root, new.root)
        assert not np.array_equal(old.factor, new.factor)


@pytest.mark.parametrize(
    "gradient",
    [
        np.zeros((6, 4)),
        1e-20 * np.ones((6, 4)),
        1e18 * np.random.default_rng(0).normal(size=(6, 4)),
        np.outer(np.arange(6.0), np.arange(4.0)),
        np.eye(6, 4)[:, ::-1] * [1e6, 1.0, 1e-6, 1e-12],
    ],
    ids=["zero", "tiny", "huge", "rank one", "graded"],
)
@pytest.mark.parametrize("optimizer", [EVERY_SECOND, KL], ids=["shampoo", "kl"])
def test_no_gradient_gives_nan(optimizer, gradient):
    params = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
    as_given = {"w": jnp.asarray(gradient, jnp.float32), "b": jnp.asarray(gradient[0], jnp.float32)}
    params, state = after(optimizer, params, 5 * [as_given])
    usual = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    params, state = after(optimizer, params, 5 * [{"w": usual, "b": usual[0]}], state)
    assert finite((params, state._replace(diagnostics=())))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("when", [0, 3])
def test_a_gradient_that_is_not_finite_leaves_no_trace_but_a_count(bad, when):
    gradients = [arrays(g) for g in REFERENCE["gradients"]][:5]
    broken = dict(gradients[0], square=jnp.full((3, 3), bad))
    params, state = after(EVERY_SECOND, arrays(REFERENCE["start"]), gradients)
    again, other = after(
        EVERY_SECOND, arrays(REFERENCE["start"]), [*gradients[:when], broken, *gradients[when:]]
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)
    same = lambda s: s._replace(diagnostics=())  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, same(state), same(other))
    assert int(other.diagnostics.left_out) == 1
    _, last = after(EVERY_SECOND, params, [broken], state)
    assert int(last.diagnostics.termination) == ResultCode.NOT_FINITE


@pytest.mark.parametrize("grafting", ["adam", None])
def test_vectors_and_long_sides_are_adamw_s(grafting):
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(3)}
    rng = np.random.default_rng(0)
    gradients = [{k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}
                 for _ in range(4)]  # fmt: skip
    optimizer = shampoo(0.1, b1=0.9, b2=0.97, max_size=1, weight_decay=0.1, grafting=grafting)
    ours, state = after(optimizer, params, gradients)
    theirs, _ = after(optax.adamw(0.1, b2=0.97, weight_decay=0.1), params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
    assert state.stacks == ()


def test_kl_shampoo_finds_the_kronecker_factors_of_a_covariance():
    """Where E[g gᵀ] = A ⊗ B, the minimum of the divergence, L ⊗ R is; Shampoo's L and R are not."""
    rng = np.random.default_rng(0)
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([1.0, 0.1, 0.01, 5.0])
    draws = np.sqrt(a) @ rng.normal(size=(1500, 3, 4)) @ np.sqrt(b)
    optimizer = shampoo(kl=True, grafting=None, shampoo_beta=0.995, weight_decay=0.0)
    params = {"w": jnp.zeros((3, 4))}
    step = lambda s, g: (optimizer.update({"w": g}, s)[1], None)  # noqa: E731
    state, _ = jax.lax.scan(step, optimizer.init(params), jnp.asarray(draws, jnp.float32))
    left, right = (np.asarray(side.factor[0], float) for side in state.stacks[0].sides)
    np.testing.assert_allclose(np.kron(left, right).diagonal(), np.kron(a, b).diagonal(), rtol=0.25)


def test_one_sided_keeps_the_smaller_side_and_no_square_is_kept_that_is_not_needed():
    params = {"w": jnp.ones((8, 2)), "v": jnp.ones((3, 5)), "u": jnp.ones((4, 1))}
    state = shampoo(one_sided=True, grafting=None).init(params)
    kept = [[side is not None for side in stack.sides] for stack in state.stacks]
    assert kept == [[True, False], [False, True]]  # in the order of the names: v, w
    assert [x.shape for x in jax.tree.leaves(state.nu)] == [(4, 1)]
    assert jax.tree.leaves(shampoo(grafting="sgd").init(params).nu) == []


@pytest.mark.slow
def test_factors_may_be_bfloat16_and_parameters_too():
    params = arrays(REFERENCE["start"], jnp.bfloat16)
    gradients = [arrays(g, jnp.bfloat16) for g in REFERENCE["gradients"]]
    wide, _ = after(shampoo(0.03), arrays(REFERENCE["start"]), [arrays(g) for g in gradients])
    for dtype in (None, "bfloat16"):
        moved, state = after(shampoo(0.03, factors_dtype=dtype), params, gradients)
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
    plain, _ = after(shampoo(0.03), params, gradients)
    static = ("exponent", "kl", "max_size", "one_sided")
    injected = optax.inject_hyperparams(shampoo, static_args=static)(learning_rate=0.03)
    scheduled = shampoo(lambda count: jnp.where(count < 100, 0.03, 0.0))
    masked = optax.masked(shampoo(0.03), dict.fromkeys(params, True))
    chained = optax.chain(optax.clip(1e6), shampoo(0.03))
    for optimizer in (injected, by_name("shampoo", 0.03), scheduled, masked, chained):
        params_there, state = after(optimizer, params, gradients)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, params_there)
        assert int(diagnostics.read(state).iterations) == len(gradients)
    doubled = [g for g in gradients for _ in range(2)]
    every_second, _ = after(optax.MultiSteps(shampoo(0.03), 2), params, doubled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, every_second)
    halves = {"square": "a", "another": "b", "wide": "a", "vector": "b"}
    split = optax.partition({"a": shampoo(0.03), "b": shampoo(0.03)}, halves)
    params_there, _ = after(split, params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, params_there)


def test_map_params_sees_the_moments():
    params = arrays(REFERENCE["start"])
    for optimizer in (shampoo(), by_name("shampoo")):
        mapped = optax.tree.map_params(
            optimizer, lambda _, name: name, optimizer.init(params), {k: k for k in params},
            transform_non_params=lambda _: None,
        )  # fmt: skip
        found = optax.tree.get(mapped, "mu")
        assert found == optax.tree.get(mapped, "nu") == {k: k for k in params}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"b1": 1.0}, "`b1`"),
        ({"shampoo_beta": 1.1}, "`shampoo_beta`"),
        ({"factors_eps": 0.0}, "`factors_eps`"),
        ({"precondition_every": 0}, "`precondition_every`"),
        ({"exponent": 0.3, "root": "newton"}, "`exponent`"),
        ({"exponent": 0.25, "kl": True}, "`exponent`"),
        ({"grafting": "adams"}, "`grafting`.*Did you mean 'adam'"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ArgumentError, match=words):
        shampoo(**options)


@pytest.mark.slow
def test_devices_share_the_roots_and_keep_the_factors_split(monkeypatch):
    start, *gradients = (arrays(x) for x in (REFERENCE["start"], *REFERENCE["gradients"][:4]))
    optimizer = shampoo(0.1, precondition_every=2, factors_eps=1e-3)
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
    assert set(shares) == {2}
    factors = [side.factor for stack in state.stacks for side in stack.sides]
    assert {str(x.sharding.spec) for x in factors if x.shape[1] % 2 == 0} == {str(rows.spec)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, alone)
