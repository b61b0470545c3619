"""Vector algebra on pytrees, beyond `optax.tree`.

Inner products accumulate in at least float32, whatever the leaves' type, as second-order methods
need under bfloat16.
"""

import functools
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
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    dtype = accumulator(*(x.dtype for pair in pairs for x in pair))
    products = [jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in pairs]
    return functools.reduce(jnp.add, products, jnp.zeros((), dtype))


def norm(a: PyTree) -> jax.Array:
    """‖a‖₂ over all leaves."""
    return jnp.sqrt(vdot(a, a))


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
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(a)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def size(a: PyTree) -> int:
    """How many numbers the leaves hold.

    >>> size({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    9
    """
    return sum(x.size for x in jax.tree.leaves(a))
