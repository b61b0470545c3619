"""Jᵀ J of least squares, from residuals or an objective."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.derivatives import linearize
from jdl.optim import spectral
from jdl.optim.context import UpdateContext


class Curvature(NamedTuple):
    """Jᵀ J, dense."""

    matrix: jax.Array  # J itself, [m, n], or the Gauss-Newton matrix, [n, n]
    is_jacobian: bool  # whether it is J
    products: float  # the cost, in Gauss-Newton products of the full batch

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


def curvature(optimizer: str, ctx: UpdateContext, chunk_size: int) -> Curvature:
    """Jᵀ J around θ, computed `chunk_size` columns at a time; residuals take precedence."""
    size = tree.size(ctx.params)
    if ctx.residual_fn is not None:
        with jax.default_matmul_precision("highest"):
            _, push, _ = linearize(ctx.residual_fn, ctx.params)
            # A column is one tangent pushed forward: half of a product.
            matrix = spectral.dense(push, ctx.params, chunk_size, ctx.dtype)
            return Curvature(matrix, True, size / 2)
    check.argument(
        ctx.objective is not None,
        "residual_fn",
        "given, or an objective",
        None,
        f"{optimizer} minimizes least squares: pass residual_fn=r with f = ½‖r‖², or "
        "objective=jdl.Objective.from_fns(predict, loss, batch).",
    )
    assert ctx.objective is not None
    product = functools.partial(ctx.objective.gnvp, ctx.params)
    matrix = spectral.dense(product, ctx.params, chunk_size, ctx.dtype)
    return Curvature(matrix, False, size * ctx.curvature_share())
