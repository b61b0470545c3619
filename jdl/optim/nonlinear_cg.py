r"""Nonlinear conjugate gradients, for full batches and mini-batches.

    dₖ = −gₖ + βₖ dₖ₋₁,   α by a line search that comes close to the minimum along d

β is computed at the end of an update from the gradients at both ends of its step, both of that
update's own objective; the line search has already computed the second. So on mini-batches β
measures curvature without sampling noise; on a full batch it is the textbook's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim.context import UpdateContext, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.transformation import (
    ScalarOrSchedule,
    Search,
    Step,
    along,
    bounded_scale,
    check_options,
    descending,
    second_order,
    wolfe,
)

METHODS = ("polak_ribiere", "fletcher_reeves", "hestenes_stiefel", "dai_yuan", "hager_zhang")


class NonlinearCGState(NamedTuple):
    """Nonlinear CG's state: two gradients' worth of memory.

    Attributes:
      learning_rate: the length of the very first trial step, float32; change it with
        `optax.tree.set`.
      direction: the last direction d.
      beta: the β for the next one; 0 restarts along −g.
      step: the last accepted α; 0 before.
      slope: ⟨g, d⟩ of the last step.
      value: f after the last update, inf before the first; with `grad`, for
        `optax.value_and_grad_from_state`, which saves full-batch loops one evaluation per step.
      grad: ∇f at that point.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    direction: PyTree
    beta: jax.Array
    step: jax.Array
    slope: jax.Array
    value: jax.Array
    grad: Params
    diagnostics: Diagnostics


def nonlinear_cg(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    method: str = "hager_zhang",
    restart_threshold: float | None = None,
    growth: float = 10.0,
    c1: float = 1e-4,
    c2: float = 0.1,
    max_evaluations: int = 20,
    search: Search = wolfe,
) -> optax.GradientTransformationExtraArgs:
    r"""Nonlinear conjugate gradients with a strong Wolfe line search.

    With y = g⁺ − g over the last step along d:

        polak_ribiere     β = max(0, ⟨g⁺, y⟩ / ⟨g, g⟩)
        fletcher_reeves   β = ⟨g⁺, g⁺⟩ / ⟨g, g⟩
        hestenes_stiefel  β = max(0, ⟨g⁺, y⟩ / ⟨d, y⟩)
        dai_yuan          β = ⟨g⁺, g⁺⟩ / ⟨d, y⟩
        hager_zhang       β = max(η, ⟨y − 2 d ⟨y, y⟩ / ⟨d, y⟩, g⁺⟩ / ⟨d, y⟩)
                          η = −1 / (‖d‖ min(0.01, ‖g‖))

    `update` needs `value`, `grad` and `value_fn` (or `objective`). Within a chain the incoming
    updates take the place of g in the direction, while line search and β use `grad`; −grad replaces
    a direction that does not descend.

    Args:
      learning_rate: length of the first trial step, > 0, or a schedule; later ones start from the
        last step times the ratio of slopes.
      method: the formula for β; hyphens count as underscores.
      restart_threshold: ν > 0; restarts along −g where |⟨g⁺, g⟩| ≥ ν ‖g⁺‖² (Powell); None for
        never.
      growth: the first trial step is at most this many times the last step, ≥ 1.
      c1: sufficient decrease of the line search, in (0, c2).
      c2: curvature of the line search, in (c1, 0.5).
      max_evaluations: maximum trials of the line search, ≥ 1.
      search: the line search, a `jdl.optim.transformation.Search`.

    Returns:
      An optax transformation, whose updates are the whole step α d.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real, at
        `update` for missing extras.

    >>> def f(x):
    ...     return jnp.sum(jnp.array([1.0, 10.0]) * jnp.square(x - 1.0))
    >>> optimizer, x = nonlinear_cg(), jnp.zeros(2)
    >>> state = optimizer.init(x)
    >>> for _ in range(6):
    ...     value, grad = jax.value_and_grad(f)(x)
    ...     updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
    ...     x = optax.apply_updates(x, updates)
    >>> [round(float(xi), 3) for xi in x]
    [1.0, 1.0]

    References:
      Hager & Zhang, A survey of nonlinear conjugate gradient methods (2006), sections 2 and 5.
      Nocedal & Wright, Numerical Optimization (2006), section 5.2; (3.60) for the first trial.
    """
    method = method.replace("-", "_")
    check.one_of("method", method, METHODS)
    check_options(
        max_evaluations=max_evaluations, growth=growth, restart_threshold=restart_threshold
    )
    check.in_range("c2", c2, 0.0, 0.5, open_low=True, open_high=True)
    check.in_range("c1", c1, 0.0, c2, open_low=True, open_high=True)

    def init(params: Params) -> dict[str, Any]:
        dtype = scalar_dtype(params)
        return {
            "direction": jax.tree.map(jnp.zeros_like, params),
            "beta": jnp.zeros((), dtype),
            "step": jnp.zeros((), dtype),
            "slope": jnp.zeros((), dtype),
            "value": jnp.full((), jnp.inf, dtype),
            "grad": jax.tree.map(jnp.zeros_like, params),
        }

    def direction(ctx: UpdateContext, state: NonlinearCGState) -> tuple[PyTree, jax.Array]:
        negative = tree.scale(-1.0, ctx.updates)
        return descending(tree.add_scaled(negative, state.beta, state.direction), ctx)

    def accept(
        ctx: UpdateContext, state: NonlinearCGState, proposal: tuple[PyTree, jax.Array]
    ) -> Step:
        direction, descends = proposal
        slope = tree.vdot(direction, ctx.grad).astype(ctx.dtype)
        rate = state.learning_rate.astype(ctx.dtype)
        first = bounded_scale(direction, ctx, rate)
        # The first-order change is expected to be that of the last step.
        ratio = jnp.where(slope < 0, state.slope / jnp.where(slope < 0, slope, 1.0), 1.0)
        next_step = state.step * jnp.clip(ratio, 1.0 / growth, growth)
        first = jnp.where(next_step > 0, next_step, first)
        limits = {"c1": c1, "c2": c2, "max_evaluations": max_evaluations}
        found = search(ctx, direction, first, state.diagnostics, **limits)
        assert found.grad is not None  # backtracking alone gives none
        moved = found.step > 0
        beta = _beta(method, direction, ctx.grad, found.grad)
        if restart_threshold is not None:
            overlap = jnp.abs(tree.vdot(found.grad, ctx.grad))
            lost = overlap >= restart_threshold * tree.vdot(found.grad, found.grad)
            beta = jnp.where(lost, 0.0, beta)
        nothing = jax.tree.map(jnp.zeros_like, ctx.params)
        fields = {
            "direction": tree.where(moved, direction, nothing),
            "beta": jnp.where(moved & jnp.isfinite(beta), beta, 0.0).astype(ctx.dtype),
            # Where no step was taken this is 0, and the next search starts from the rate again.
            "step": found.step,
            "slope": jnp.where(moved, slope, 0.0),
            "value": jnp.where(ctx.finite, found.value, jnp.inf),
            "grad": tree.where(ctx.finite, found.grad, nothing),
        }
        return along(direction, found, descends, fields, gradients=found.evaluations)

    return second_order(
        "nonlinear_cg",
        NonlinearCGState,
        learning_rate,
        init=init,
        direction=direction,
        accept=accept,
    )


def _beta(method: str, d: PyTree, g: PyTree, g_new: PyTree) -> jax.Array:
    """The β of the next direction; not finite where the formula breaks down."""
    y = jax.tree.map(jnp.subtract, g_new, g)
    gy = tree.vdot(g_new, y)
    if method == "polak_ribiere":
        return jnp.maximum(gy / tree.vdot(g, g), 0.0)
    if method == "fletcher_reeves":
        return tree.vdot(g_new, g_new) / tree.vdot(g, g)
    dy = tree.vdot(d, y)
    if method == "hestenes_stiefel":
        return jnp.maximum(gy / dy, 0.0)
    if method == "dai_yuan":
        return tree.vdot(g_new, g_new) / dy
    beta = (gy - 2.0 * tree.vdot(y, y) * (tree.vdot(d, g_new) / dy)) / dy
    eta = -1.0 / (tree.norm(d) * jnp.minimum(0.01, tree.norm(g)))
    return jnp.maximum(beta, eta)
