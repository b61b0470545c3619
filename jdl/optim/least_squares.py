r"""Jᵀ J of least squares, and steps in the smaller of the spaces of parameters and of residuals.

    δ(λ) = −(Jᵀ J + λI)⁻¹ Jᵀ r = −Jᵀ (J Jᵀ + λI)⁻¹ r

Where the smaller side of J has at most `DECOMPOSED` entries J is decomposed by its singular values.
Beyond that the smaller of the two matrices is factored by Cholesky for each λ, which is much
faster, and refined once by products with J itself: the step then has a relative error of about
ε κ² for the condition κ of J, down to λ = 10 ε tr(J Jᵀ), where ε is the type's precision.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.derivatives import linearize
from jdl.core.types import Params, PyTree
from jdl.optim import spectral
from jdl.optim.context import UpdateContext
from jdl.optim.residuals import Linearized, Residuals, of_objective

DECOMPOSED = 256


class Curvature(NamedTuple):
    """Jᵀ J, dense."""

    matrix: jax.Array  # J itself, [m, n], or the Gauss-Newton matrix, [n, n]
    is_jacobian: bool  # whether it is J
    products: float  # the cost, in Gauss-Newton products of the full batch
    residual: jax.Array | None = None  # r with Jᵀ r the gradient, [m], where it is known

    @property
    def diagonal(self) -> jax.Array:
        """Of Jᵀ J, [n]."""
        if self.is_jacobian:
            return jnp.sum(jnp.square(self.matrix), axis=0)
        return jnp.diag(self.matrix)

    @property
    def is_small(self) -> bool:
        """Whether it is decomposed."""
        return min(self.matrix.shape) <= DECOMPOSED

    def spectrum(self, scale: jax.Array) -> spectral.Spectrum:
        """Of D⁻¹ Jᵀ J D⁻¹, for D = diag(scale)."""
        if self.is_jacobian:
            return spectral.of_jacobian(self.matrix / scale[None])
        return spectral.of_symmetric(self.matrix / (scale[:, None] * scale[None]))


def curvature(optimizer: str, ctx: UpdateContext, chunk_size: int) -> Curvature:
    """Jᵀ J around θ; residuals take precedence.

    By rows where examples are known, else `chunk_size` columns at a time.
    """
    size = tree.size(ctx.params)
    fn, found = ctx.residual_fn, None
    if isinstance(fn, Linearized):
        found = fn
    elif isinstance(fn, Residuals):
        found = fn.linearized(ctx.params)
    elif fn is not None:
        found = by_columns(fn, ctx.params, chunk_size)
    elif ctx.objective is not None:
        with contextlib.suppress(NotImplementedError):  # a rule that cannot be batched
            found = of_objective(ctx.objective, ctx.params, ctx.dtype)
    if found is not None:
        residual = None if found.residual is None else found.residual.astype(ctx.dtype)
        return Curvature(found.jacobian.astype(ctx.dtype), True, found.products, residual)
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


def by_columns(
    residual_fn: Callable[[Params], PyTree], params: Params, chunk_size: int
) -> Linearized:
    """J of any function, `chunk_size` columns at a time."""
    with jax.default_matmul_precision("highest"):
        value, push, _ = linearize(residual_fn, params)
        residual = ravel_pytree(value)[0]
        jacobian = spectral.dense(push, params, chunk_size, residual.dtype)
    # A column is one tangent pushed forward: half of a product.
    return Linearized(jacobian, residual, tree.size(params) / 2)


def factored(ctx: UpdateContext, curvature: Curvature, units: jax.Array) -> spectral.Model:
    """The model of f in D δ, for D = diag(units), by Cholesky in the smaller space."""
    flat, unravel = ravel_pytree(ctx.updates)
    eps = jnp.finfo(ctx.dtype).eps
    b = curvature.matrix / (units[None] if curvature.is_jacobian else units[:, None] * units[None])
    g, raw = (x.astype(ctx.dtype) / units for x in (flat, ravel_pytree(ctx.grad)[0]))
    r = curvature.residual
    in_samples = curvature.is_jacobian and r is not None and b.shape[0] < b.shape[1]
    with jax.default_matmul_precision("highest"):
        matrix = (b @ b.T if in_samples else b.T @ b) if curvature.is_jacobian else b
    floor = 10 * eps * jnp.trace(matrix)

    def product(x: jax.Array) -> jax.Array:
        """With the smaller matrix, by J where it is known."""
        if not curvature.is_jacobian:
            return matrix @ x
        return b @ (b.T @ x) if in_samples else b.T @ (b @ x)

    def solve(lam: jax.Array, rhs: jax.Array) -> jax.Array:
        factor = jax.scipy.linalg.cho_factor(matrix + lam * jnp.eye(len(matrix), dtype=b.dtype))
        x = jax.scipy.linalg.cho_solve(factor, rhs)
        return x + jax.scipy.linalg.cho_solve(factor, rhs - product(x) - lam * x)

    def step(lam: jax.Array) -> jax.Array:
        lam = jnp.maximum(lam, floor)
        with jax.default_matmul_precision("highest"):
            if not in_samples or r is None:
                return -solve(lam, g[:, None])[:, 0]
            # What transformations before this one in a chain added to the gradient may not be a
            # combination of J's rows.
            other = g - b.T @ r
            strays = jnp.linalg.norm(other) > 1e3 * eps * jnp.linalg.norm(g)
            other = jnp.where(strays, other, 0.0)
            c = solve(lam, jnp.stack([r, b @ other], axis=1))
            return -b.T @ (c[:, 0] - c[:, 1] / lam) - other / lam

    def bend(x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.sum(jnp.square(b @ x)) if curvature.is_jacobian else x @ (b @ x)

    return spectral.Model(
        solve=step,
        slope=lambda x: jnp.vdot(raw, x),
        curvature=bend,
        step_of=lambda x: unravel((x / units).astype(flat.dtype)),
        size=flat.size,
        mean=jnp.trace(matrix) / len(matrix),
        floor=floor,
        sound=jnp.all(jnp.isfinite(matrix)),
    )
