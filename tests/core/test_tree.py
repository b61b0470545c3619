"""Vector algebra on pytrees against NumPy, and what XLA makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdl.core import tree

SHAPES = [(3,), (), (2, 5), (200, 100), (0,), (1, 20_000)]


def trees():
    rng = np.random.default_rng(0)
    return [{str(i): rng.normal(size=s) for i, s in enumerate(SHAPES)} for _ in range(2)]


def test_inner_products_are_those_of_float64_numpy():
    a, b = trees()
    want = sum(np.vdot(x, b[name]) for name, x in a.items())
    narrow = jax.tree.map(lambda x: x.astype(np.float32), (a, b))
    np.testing.assert_allclose(jax.jit(tree.vdot)(*narrow), want, rtol=1e-4)
    with jax.enable_x64(True):
        got = tree.vdot(*jax.tree.map(jnp.asarray, (a, b)))
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12)
        grad = jax.grad(lambda a: tree.vdot(a, b))(jax.tree.map(jnp.asarray, a))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), grad, b)
    halves = {"w": jnp.full(70_000, 1.0, jnp.bfloat16)}
    assert float(tree.vdot(halves, halves)) == 70_000
    assert float(tree.vdot({}, {})) == 0.0


def test_one_number_that_is_not_finite_is_found():
    a = jax.tree.map(np.float32, trees()[0])
    assert bool(tree.all_finite(a))
    assert bool(tree.all_finite({}))
    for name in ("1", "2", "3", "5"):
        for bad in (np.nan, -np.inf):
            worse = {
                **a,
                name: np.where(np.arange(a[name].size) == 0, np.float32(bad), a[name].ravel()),
            }
            assert not bool(tree.all_finite(worse))


def test_programs_grow_with_the_leaves_and_not_with_their_square():
    def instructions(leaves):
        a = [jnp.ones(4)] * leaves
        step = jax.jit(lambda a, b: tree.add_scaled(a, tree.vdot(a, b) * tree.norm(b), b))
        return step.lower(a, a).compile().as_text().count(" = ")

    assert instructions(160) < 2.5 * instructions(80)


def test_leaves_that_are_sharded_are_summed_where_they_are():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    a = {"w": jnp.arange(8.0), "b": jnp.ones(3)}
    want = tree.vdot(a, a)
    with jax.set_mesh(mesh):
        a["w"] = jax.device_put(a["w"], NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(jax.jit(tree.vdot)(a, a), want)
        assert bool(jax.jit(tree.all_finite)(a))
