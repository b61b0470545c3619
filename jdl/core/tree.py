"""Vector algebra on pytrees, beyond `optax.tree`.

Inner products accumulate in at least float32, whatever the leaves' type, as second-order methods
need under bfloat16.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jdl.core.types import PyTree


def accumulator(*dtypes: Any) -> Any:
    """The type to sum values of `dtypes` in: the widest of them, at least float32.

    >>> accumulator(jnp.bfloat16).__name__
    'float32'
    """
    wide = [d for d in map(jnp.dtype, dtypes) if jnp.issubdtype(d, jnp.inexact) and d.itemsize > 4]
    return max(wide, key=lambda d: d.itemsize).type if wide else jnp.float32


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """⟨a, b⟩ = Σ aᵢ bᵢ over all leaves, accumulated in at least float32.

    >>> float(vdot({"w": jnp.ones((2, 3))}, {"w": 2.0 * jnp.ones((2, 3))}))
    12.0
    """
    dtype = accumulator(*(x.dtype for x in jax.tree.leaves((a, b))))
    return _total([jnp.sum(x * y) for x, y in packed(dtype, a, b)], dtype)


def norm(a: PyTree) -> jax.Array:
    """‖a‖₂ over all leaves."""
    return jnp.sqrt(vdot(a, a))


def scaled_norm(a: PyTree) -> jax.Array:
    """‖a‖₂ where its square may overflow or vanish, at the cost of a second pass.

    >>> print(f"{scaled_norm([jnp.array([3e-30, 4e-30])]):.3g}")
    5e-30
    """
    most = largest(a)
    unit = jnp.where((most > 0) & jnp.isfinite(most), most, 1.0)
    return unit * norm(jax.tree.map(lambda x: x.astype(unit.dtype) / unit, a))


def largest(a: PyTree) -> jax.Array:
    """max |aᵢ| over all leaves, in at least float32; NaN with a NaN among them."""
    dtype = accumulator(*(x.dtype for x in jax.tree.leaves(a)))
    parts = [jnp.max(jnp.abs(x), initial=0.0) for (x,) in packed(dtype, a)]
    return jax.lax.cummax(jnp.stack(parts))[-1] if parts else jnp.zeros((), dtype)


def add_scaled(a: PyTree, scale: jax.Array | float, b: PyTree) -> PyTree:
    """a + scale·b, in the types of `a`'s leaves."""
    return jax.tree.map(lambda x, y: x + (jnp.asarray(scale, x.dtype) * y.astype(x.dtype)), a, b)


def scale(factor: jax.Array | float, a: PyTree) -> PyTree:
    """factor·a, in the types of `a`'s leaves."""
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, a)


def where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """`a` where the scalar `condition` holds, else `b`; leaf by leaf, without branching."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def all_finite(a: PyTree) -> jax.Array:
    """Whether no leaf holds a NaN or an infinity."""
    parts = packed(accumulator(*(x.dtype for x in jax.tree.leaves(a))), a)
    finite = _total([jnp.all(jnp.isfinite(x)) for (x,) in parts], jnp.int32)
    return finite == len(parts)


def size(a: PyTree) -> int:
    """How many numbers the leaves hold.

    >>> size({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    9
    """
    return sum(x.size for x in jax.tree.leaves(a))


def packed(dtype: Any, *trees: PyTree) -> list[tuple[jax.Array, ...]]:
    """The trees' leaves, one by one in one type; small ones as a single vector.

    A sum is compiled for each leaf, which takes longer than all of the model where they are many.
    """
    rows = list(zip(*(map(jnp.asarray, jax.tree.leaves(t)) for t in trees), strict=True))
    rows = [tuple(x.astype(dtype) for x in row) for row in rows]

    def small(row: tuple[jax.Array, ...]) -> bool:
        return row[0].size <= 1 << 14 and not any(any(jax.typeof(x).sharding.spec) for x in row)

    few = [tuple(x.ravel() for x in row) for row in rows if small(row)]
    vectors = [tuple(map(jnp.concatenate, zip(*few, strict=True)))] if few else []
    return vectors + [row for row in rows if not small(row)]


def _total(parts: list[jax.Array], dtype: Any) -> jax.Array:
    """Σ of scalars.

    XLA copies a chain of additions into each kernel that uses their sum: its work would grow with
    the square of the number of leaves. A cumulative sum is computed once.
    """
    if not parts:
        return jnp.zeros((), dtype)
    return jnp.cumsum(jnp.stack(parts).astype(dtype))[-1]
