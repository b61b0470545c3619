"""Projections onto simple sets with jaxopt's signatures, by `optax.projections`.

Each is `projection(x, hyperparams) -> x`, for `jdl.solvers.ProjectedGradient`.
"""

from collections.abc import Callable
from typing import Any

import jax
from optax import projections

from jdl.core.types import PyTree


def _of(projection: Callable[..., PyTree], *args: Any) -> PyTree:
    with jax.numpy_dtype_promotion("standard"):  # optax itself is not strict
        return projection(*args)


def projection_non_negative(x: PyTree, hyperparams: Any = None) -> PyTree:
    """max(x, 0)."""
    del hyperparams
    return _of(projections.projection_non_negative, x)


def projection_box(x: PyTree, hyperparams: tuple[Any, Any]) -> PyTree:
    """The nearest point with lower ≤ x ≤ upper, for hyperparams (lower, upper).

    >>> import jax.numpy as jnp
    >>> projection_box(jnp.array([-1.0, 0.5, 3.0]), (0.0, 1.0)).tolist()
    [0.0, 0.5, 1.0]
    """
    return _of(projections.projection_box, x, *hyperparams)


def projection_hypercube(x: PyTree, unit: Any = 1.0) -> PyTree:
    """The nearest point with 0 ≤ x ≤ unit."""
    return _of(projections.projection_hypercube, x, unit)


def projection_simplex(x: PyTree, value: Any = 1.0) -> PyTree:
    """The nearest point with x ≥ 0 and Σ x = value.

    >>> import jax.numpy as jnp
    >>> projection_simplex(jnp.array([1.0, 0.5, -2.0])).tolist()
    [0.75, 0.25, 0.0]
    """
    return _of(projections.projection_simplex, x, value)


def projection_l1_sphere(x: PyTree, value: Any = 1.0) -> PyTree:
    """The nearest point with Σ |x| = value."""
    return _of(projections.projection_l1_sphere, x, value)


def projection_l1_ball(x: PyTree, max_value: Any = 1.0) -> PyTree:
    """The nearest point with Σ |x| ≤ max_value."""
    return _of(projections.projection_l1_ball, x, max_value)


def projection_l2_sphere(x: PyTree, value: Any = 1.0) -> PyTree:
    """The nearest point with ‖x‖ = value."""
    return _of(projections.projection_l2_sphere, x, value)


def projection_l2_ball(x: PyTree, max_value: Any = 1.0) -> PyTree:
    """The nearest point with ‖x‖ ≤ max_value."""
    return _of(projections.projection_l2_ball, x, max_value)


def projection_linf_ball(x: PyTree, max_value: Any = 1.0) -> PyTree:
    """The nearest point with max |x| ≤ max_value."""
    return _of(projections.projection_linf_ball, x, max_value)


def projection_hyperplane(x: PyTree, hyperparams: tuple[Any, Any]) -> PyTree:
    """The nearest point with ⟨a, x⟩ = b, for hyperparams (a, b)."""
    return _of(projections.projection_hyperplane, x, *hyperparams)


def projection_halfspace(x: PyTree, hyperparams: tuple[Any, Any]) -> PyTree:
    """The nearest point with ⟨a, x⟩ ≤ b, for hyperparams (a, b)."""
    return _of(projections.projection_halfspace, x, *hyperparams)
