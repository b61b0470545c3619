r"""BFGS with the dense inverse Hessian, for up to some thousands of parameters.

d = −H g,    H⁺ = (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ,    ρ = 1 / ⟨s, y⟩
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim.context import UpdateContext, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.transformation import Search, Step, along, bounded_scale, descending, second_order
from jdl.solvers.iterative import Stepping


class BFGSState(NamedTuple):
    """The state of `bfgs`, for n parameters."""

    learning_rate: jax.Array  # the line search's first trial step
    H: jax.Array  # the inverse Hessian, [n, n]
    value: jax.Array  # f after the last update
    grad: Params  # ∇f there
    diagnostics: Diagnostics  # see `jdl.optim.diagnostics`


def bfgs(
    learning_rate: float, *, scaled: bool, max_evaluations: int, search: Search
) -> optax.GradientTransformationExtraArgs:
    """BFGS; `scaled` for a first H of ⟨s, y⟩ / ⟨y, y⟩ I, not I, from the first pair on.

    References:
      Nocedal & Wright, Numerical Optimization (2006), algorithm 6.1 and (6.20).
    """

    def init(params: Params) -> dict[str, Any]:
        flat = ravel_pytree(params)[0]
        return {
            "H": jnp.eye(flat.size, dtype=flat.dtype),
            "value": jnp.full((), jnp.inf, scalar_dtype(params)),
            "grad": jax.tree.map(jnp.zeros_like, params),
        }

    def direction(ctx: UpdateContext, state: BFGSState) -> tuple[PyTree, jax.Array]:
        flat, unravel = ravel_pytree(ctx.updates)
        with jax.default_matmul_precision("highest"):
            return descending(unravel(-(state.H @ flat)), ctx)

    def accept(ctx: UpdateContext, state: BFGSState, proposal: tuple[PyTree, jax.Array]) -> Step:
        direction, descends = proposal
        new = state.diagnostics.iterations == 0
        rate = state.learning_rate.astype(ctx.dtype)
        first = jnp.where(new | ~descends, bounded_scale(direction, ctx, rate), rate)
        limits = {"c1": 1e-4, "c2": 0.9, "max_evaluations": max_evaluations}
        found = search(ctx, direction, first, state.diagnostics, **limits)
        moved = found.step > 0
        s = ravel_pytree(tree.scale(found.step, direction))[0]
        y = ravel_pytree(jax.tree.map(jnp.subtract, found.grad, ctx.grad))[0]
        with jax.default_matmul_precision("highest"):
            inverse = _updated(state.H, s, y, new & scaled)
        # After a failed search the matrix is not trusted.
        fresh = jnp.eye(s.size, dtype=s.dtype)
        fields = {
            "H": jnp.where(moved, inverse, jnp.where(ctx.active, fresh, state.H)),
            "value": jnp.where(ctx.finite, found.value, jnp.inf),
            "grad": tree.where(ctx.finite, found.grad, jax.tree.map(jnp.zeros_like, ctx.grad)),
        }
        return along(direction, found, descends, fields, gradients=found.evaluations)

    parts: Any = {"init": init, "direction": direction, "accept": accept}
    return second_order("bfgs", BFGSState, learning_rate, **parts)


def _updated(h: jax.Array, s: jax.Array, y: jax.Array, scaled: jax.Array) -> jax.Array:
    """H⁺, or H for a pair without positive curvature."""
    sy, yy = jnp.vdot(s, y), jnp.vdot(y, y)
    good = (sy > 0) & jnp.isfinite(1.0 / sy)
    rho = jnp.where(good, 1.0 / jnp.where(good, sy, 1.0), 0.0)
    h = jnp.where(scaled & good, sy / jnp.where(good, yy, 1.0), 1.0) * h
    hy = h @ y
    outer = jnp.outer(s, hy)
    return h - rho * (outer + outer.T) + rho * (1.0 + rho * jnp.vdot(y, hy)) * jnp.outer(s, s)


class BFGS(Stepping):
    """BFGS with a strong Wolfe line search, for up to some thousands of parameters.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      tol: on the norm of the gradient.
      **options: see `jdl.solvers.steps.Steps` and `jdl.solvers.options.SolverOptions`.

    >>> solver = BFGS(lambda x: jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0])))
    >>> solver.run(jnp.zeros(2)).params.round(3).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 500,
        tol: float = 1e-3,
        **options: Any,
    ):
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        self.optimizer = bfgs(
            self.steps.first,
            scaled=not self.steps.given,
            max_evaluations=self.steps.maxls,
            search=self.steps.search(self.unrolled),
        )
