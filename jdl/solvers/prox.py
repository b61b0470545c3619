r"""Proximity operators with jaxopt's signatures, for `jdl.solvers.ProximalGradient`.

prox(x, hyperparams, s) = argmin_y ½ ‖x − y‖² + s g(y)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.types import PyTree

Prox = Callable[..., PyTree]


def prox_none(x: PyTree, hyperparams: Any = None, scaling: Any = 1.0) -> PyTree:
    """g = 0."""
    del hyperparams, scaling
    return x


def prox_lasso(x: PyTree, l1reg: Any = None, scaling: Any = 1.0) -> PyTree:
    """g = Σ λ |y|, for λ = l1reg: a number, or a pytree like x.

    >>> prox_lasso(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    return prox_elastic_net(x, (1.0 if l1reg is None else l1reg, 0.0), scaling)


def prox_non_negative_lasso(x: PyTree, l1reg: Any = None, scaling: Any = 1.0) -> PyTree:
    """g = Σ λ y for y ≥ 0."""
    return jax.tree.map(
        lambda x, l1: jnp.maximum(x - scaling * l1, 0.0),
        x,
        _like(x, 1.0 if l1reg is None else l1reg),
    )


def prox_elastic_net(x: PyTree, hyperparams: Any = None, scaling: Any = 1.0) -> PyTree:
    """g = Σ λ (|y| + ½ γ y²), for hyperparams (λ, γ)."""
    l1, ratio = (_like(x, v) for v in ((1.0, 1.0) if hyperparams is None else hyperparams))

    def leaf(x: jax.Array, l1: jax.Array, ratio: jax.Array) -> jax.Array:
        shrunk = jnp.sign(x) * jnp.maximum(jnp.abs(x) - scaling * l1, 0.0)
        return shrunk / (1.0 + scaling * l1 * ratio)

    return jax.tree.map(leaf, x, l1, ratio)


def prox_group_lasso(x: PyTree, l2reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    """g = λ ‖y‖, the norm over all of x; 0 at 0."""
    square = tree.vdot(x, x)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))  # its derivative at 0 is no number
    shrunk = jnp.maximum(1.0 - (1.0 if l2reg is None else l2reg) * scaling / length, 0.0)
    return tree.scale(jnp.where(square > 0, shrunk, 0.0), x)


def prox_ridge(x: PyTree, l2reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    """g = ½ λ ‖y‖²."""
    return tree.scale(1.0 / (1.0 + scaling * (1.0 if l2reg is None else l2reg)), x)


def prox_non_negative_ridge(x: PyTree, l2reg: Any = 1.0, scaling: Any = 1.0) -> PyTree:
    """g = ½ λ ‖y‖² for y ≥ 0."""
    return jax.tree.map(lambda x: jnp.maximum(x, 0.0), prox_ridge(x, l2reg, scaling))


def make_prox_from_projection(projection: Callable[..., PyTree]) -> Prox:
    """g = 0 on the set that `projection(x, hyperparams)` projects onto, ∞ elsewhere."""
    return lambda x, hyperparams=None, scaling=1.0: projection(x, hyperparams)


def _like(x: PyTree, value: Any) -> PyTree:
    """`value` for each leaf of x where it is a single number; else as it is."""
    structure: Any = jax.tree.structure(x)
    if jax.tree.structure(value) != structure:
        value = jax.tree.map(lambda _: value, x)
    return jax.tree.map(lambda leaf, value: jnp.asarray(value, leaf.dtype), x, value)
