r"""Levenberg-Marquardt after Madsen and Nielsen, as jaxopt has it, and plain Gauss-Newton steps.

    (Jᵀ J + μ I) δ = −Jᵀ r,    ϱ = (f(x) − f(x + δ)) / ½ ⟨δ, μ δ − Jᵀ r⟩

    ϱ > 0:    x ← x + δ,   μ ← μ max(⅓, 1 − (2ϱ − 1)³),   ν ← 2
    else:     μ ← ν μ,     ν ← 2ν

One try an iteration, and every operation of it has a derivative: runs may be unrolled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve, solve_triangular
from jax.scipy.sparse.linalg import cg

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.context import gather, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.result import ResultCode

LARGEST = 2.0**32  # of μ and ν
SOLVERS = ["cholesky", "lu", "qr", "inv"]
Solver = str | Callable[..., jax.Array]


class MadsenNielsenState(NamedTuple):
    """The state of `madsen_nielsen`."""

    damping: jax.Array  # μ for the next step; before the first in units of the largest (Jᵀ J)ᵢᵢ
    increase_factor: jax.Array  # ν
    velocity: jax.Array  # the last step tried, raveled, without acceleration
    diagnostics: Diagnostics  # see `jdl.optim.diagnostics`


def madsen_nielsen(
    damping: float,
    *,
    solver: Solver = "cholesky",
    geodesic: bool = False,
    largest_ratio: float = 0.75,
) -> optax.GradientTransformationExtraArgs:
    """Levenberg-Marquardt; `update` needs `residual_fn`, and takes `jac_fn`, params -> J.

    Args:
      damping: μ's first value in units of the largest diagonal entry of Jᵀ J; 0 for Gauss-Newton
        steps, which are taken whether they descend or not.
      solver: "cholesky", "lu" or "inv" for Jᵀ J + μ I; "qr" for the rows (J, √μ I); or
        `solver(product, b, ridge=μ, init=last)`, where `product` multiplies by Jᵀ J.
      geodesic: whether to add the acceleration −½ (Jᵀ J + μ I)⁻¹ Jᵀ r'' along the step.
      largest_ratio: a step is refused where its acceleration is longer than this times the step.

    References:
      Madsen & Nielsen, Introduction to Optimization and Data Fitting (2010), algorithm 6.18.
      Transtrum & Sethna, Improvements to the Levenberg-Marquardt algorithm (2012): acceleration.
    """
    check.argument(
        callable(solver) or solver in SOLVERS, "solver", f"a function or {SOLVERS}", solver
    )

    def init(params: Params) -> MadsenNielsenState:
        dtype = scalar_dtype(params)
        flat = ravel_pytree(params)[0]
        return MadsenNielsenState(
            damping=jnp.asarray(damping, dtype),
            increase_factor=jnp.asarray(2.0, dtype),
            velocity=jnp.zeros_like(flat),
            diagnostics=diag.init(damping),
        )

    def update(
        updates: PyTree,
        state: MadsenNielsenState,
        params: Params | None = None,
        *,
        reused: Any = False,
        jac_fn: Callable[[Params], jax.Array] | None = None,
        **extras: Any,
    ) -> tuple[PyTree, MadsenNielsenState]:
        ctx = gather("madsen_nielsen", updates, params, **extras)
        residual_fn = ctx.residual_fn
        assert residual_fn is not None
        x, unravel = ravel_pytree(ctx.params)
        gradient = ravel_pytree(updates)[0]
        residual = lambda x: ravel_pytree(residual_fn(unravel(x)))[0]  # noqa: E731
        jacobian = jax.jacfwd(residual) if jac_fn is None else lambda x: jac_fn(unravel(x))
        with jax.default_matmul_precision("highest"):
            j = None if callable(solver) and damping == 0 else jacobian(x)
            mu = state.damping
            if j is not None:
                first = damping * jnp.max(jnp.sum(j * j, axis=0))
                mu = jnp.where(state.diagnostics.iterations == 0, first, mu)
            solved = _solver(solver, residual, x, j, mu)
            velocity = solved(gradient, init=state.velocity)
            delta, short = -velocity, jnp.asarray(True)
            if geodesic:
                slope = lambda x: jax.jvp(residual, (x,), (velocity,))[1]  # noqa: E731
                curved = jax.jvp(slope, (x,), (velocity,))[1]
                acceleration = solved(jax.vjp(residual, x)[1](curved)[0])
                delta -= 0.5 * acceleration
                ratio = tree.norm(acceleration) / tree.norm(velocity)
                short = ratio <= largest_ratio
        if damping == 0:
            good, gain = tree.all_finite(delta), jnp.ones_like(mu)
        else:
            value = ctx.value_fn(unravel(x + delta))
            gain = (ctx.value - value) / (0.5 * jnp.vdot(delta, mu * delta - gradient))
            good = (gain > 0) & short & tree.all_finite(delta)
        nu = state.increase_factor
        less = mu * jnp.maximum(1.0 / 3.0, 1.0 - (2.0 * gain - 1.0) ** 3)
        new = MadsenNielsenState(
            damping=jnp.where(good, less, jnp.minimum(nu * mu, LARGEST)),
            increase_factor=jnp.where(good, 2.0, jnp.minimum(2.0 * nu, LARGEST)),
            velocity=velocity,
            diagnostics=diag.advance(
                state.diagnostics,
                step_size=jnp.where(good, 1.0, 0.0),
                termination=jnp.where(ctx.finite, ResultCode.ACCEPTED, ResultCode.NOT_FINITE),
                damping=mu,
                values=0 if damping == 0 else 1,
                gauss_newton_products=x.size,
                reused=reused,
            ),
        )
        return unravel(jnp.where(good, delta, 0.0)), new

    return optax.GradientTransformationExtraArgs(init, update)


def _solver(
    solver: Solver, residual: Callable[..., Any], x: jax.Array, j: jax.Array | None, mu: jax.Array
) -> Callable[..., jax.Array]:
    """(b, start) -> (Jᵀ J + μ I)⁻¹ b."""
    if callable(solver):
        _, push = jax.linearize(residual, x)
        pull = jax.linear_transpose(push, x)
        product = lambda v: pull(push(v))[0]  # noqa: E731
        return lambda b, **start: solver(product, b, ridge=mu, **start)
    assert j is not None
    identity = jnp.eye(x.size, dtype=x.dtype)
    if solver == "qr":
        r = jnp.linalg.qr(jnp.concatenate([j, jnp.sqrt(mu) * identity]), mode="r")
        return lambda b, **_: solve_triangular(r, solve_triangular(r, b, trans=1))
    matrix = j.T @ j + mu * identity
    if solver == "inv":
        return lambda b, **_: jnp.linalg.inv(matrix) @ b
    return lambda b, **_: solve(matrix, b, assume_a="pos" if solver == "cholesky" else "gen")


def conjugate_gradients(product: Any, b: jax.Array, **_: Any) -> jax.Array:
    """A Gauss-Newton step by conjugate gradients; from zero, it is the shortest one."""
    return cg(product, b)[0]
