"""Least squares as Gauss-Newton and Levenberg-Marquardt see it: residuals, or an objective."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import spectral
from jdl.optim.context import UpdateContext, gather
from jdl.optim.masking import Part

Residuals = Callable[[Params], PyTree]


class Curvature(NamedTuple):
    """Jᵀ J, dense.

    Attributes:
      matrix: J itself, [m, n], or the Gauss-Newton matrix, [n, n].
      is_jacobian: which of the two.
      products: what it cost, in Gauss-Newton products of the full batch.
    """

    matrix: jax.Array
    is_jacobian: bool
    products: float

    @property
    def diagonal(self) -> jax.Array:
        """Of Jᵀ J, [n]."""
        if self.is_jacobian:
            return jnp.sum(jnp.square(self.matrix), axis=0)
        return jnp.diag(self.matrix)

    def spectrum(self, scale: jax.Array) -> spectral.Spectrum:
        """Of D⁻¹ Jᵀ J D⁻¹, for D = diag(scale)."""
        if self.is_jacobian:
            return spectral.of_jacobian(self.matrix / scale[None])
        return spectral.of_symmetric(self.matrix / (scale[:, None] * scale[None]))


def around(
    optimizer: str,
    chunk_size: int,
    updates: PyTree,
    params: Params | None,
    *,
    residual_fn: Residuals | None = None,
    value_fn: Any = None,
    objective: Any = None,
    whole_params: Params | None = None,
    **extras: Any,
) -> tuple[UpdateContext, Curvature]:
    """The objective of an update and Jᵀ J, `chunk_size` columns at a time; see `context.gather`.

    `residual_fn` goes before `objective`, and stands in for a missing `value_fn`.
    """
    check.argument(
        residual_fn is not None or objective is not None,
        "residual_fn",
        "given, or an objective",
        None,
        f"{optimizer} needs least squares' own structure: pass residual_fn=r with f = ½‖r‖², or "
        "objective=jdl.Objective.from_fns(predict, loss, batch).",
    )
    if value_fn is None and residual_fn is not None:
        value_fn = _half_square(residual_fn)
    extras |= {"value_fn": value_fn, "objective": objective, "whole_params": whole_params}
    here = gather(optimizer, updates, params, **extras)
    whole: Any = jax.tree.structure(whole_params)
    masked = whole_params is not None and whole != jax.tree.structure(params)
    if residual_fn is not None and masked:
        residual_fn = Part(params, whole_params).function(residual_fn)
    return here, _curvature(here, residual_fn, chunk_size)


def _half_square(residual_fn: Residuals) -> Callable[[Params], Any]:
    def value(params: Params) -> Any:
        residuals = residual_fn(params)
        return 0.5 * tree.vdot(residuals, residuals)

    return value


def _curvature(here: UpdateContext, residual_fn: Residuals | None, chunk_size: int) -> Curvature:
    dtype = here.value.dtype
    size = ravel_pytree(here.params)[0].size
    if residual_fn is None:
        objective = here.needed_objective("Gauss-Newton products")
        product = lambda v: objective.gnvp(here.params, v)  # noqa: E731
        matrix = spectral.dense(product, here.params, chunk_size, dtype)
        return Curvature(matrix, False, size * objective.curvature_share())
    with jax.default_matmul_precision("highest"):
        _, push = jax.linearize(residual_fn, here.params)
        # A column is a tangent pushed forward: half of a product.
        return Curvature(spectral.dense(push, here.params, chunk_size, dtype), True, size / 2)
