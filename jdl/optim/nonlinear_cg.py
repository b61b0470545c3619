r"""Nonlinear conjugate gradients, for full batches and mini-batches.

    dₖ = −gₖ + βₖ dₖ₋₁,   α by a line search that comes close to the minimum along d

β is computed at the end of an update from the gradients at both ends of its step, both taken on
that update's own objective: the line search has computed the second anyway. So β measures
curvature and no sampling noise under mini-batches; on a full batch it is the textbook's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim import linesearch
from jdl.optim.context import (
    ScalarOrSchedule,
    check_params,
    check_scale,
    current_rate,
    descending,
    gather,
    scalar_dtype,
    schedule_value,
)
from jdl.optim.diagnostics import Diagnostics

METHODS = ("polak_ribiere", "hestenes_stiefel", "dai_yuan", "hager_zhang")


class NonlinearCGState(NamedTuple):
    """What nonlinear CG carries from step to step: two gradients' worth of memory.

    Attributes:
      learning_rate: the length of the very first trial step, float32; change it with
        `optax.tree.set`.
      direction: the last direction d.
      beta: the β for the next one; 0 starts afresh along −g.
      step: the last accepted α; 0 before.
      slope: ⟨g, d⟩ of the last step.
      value: f at the point the last update led to, inf before; with the next, for
        `optax.value_and_grad_from_state`, which spares full-batch loops an evaluation a step.
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
) -> optax.GradientTransformationExtraArgs:
    r"""Nonlinear conjugate gradients with a strong Wolfe line search.

    With y = g⁺ − g over the last step along d:

        polak_ribiere     β = max(0, ⟨g⁺, y⟩ / ⟨g, g⟩)
        hestenes_stiefel  β = max(0, ⟨g⁺, y⟩ / ⟨d, y⟩)
        dai_yuan          β = ⟨g⁺, g⁺⟩ / ⟨d, y⟩
        hager_zhang       β = max(η, ⟨y − 2 d ⟨y, y⟩ / ⟨d, y⟩, g⁺⟩ / ⟨d, y⟩)
                          η = −1 / (‖d‖ min(0.01, ‖g‖))

    `update` needs `value`, `grad` and `value_fn` (or `objective`). Within a chain the incoming
    updates stand for g in the direction, while line search, β and descent are judged by `grad`; a
    direction that does not descend gives way to −grad.

    Args:
      learning_rate: length of the first trial step, > 0, or a schedule; later ones start from the
        last step times the ratio of slopes.
      method: the formula for β; hyphens count as underscores.
      restart_threshold: ν > 0; start afresh where |⟨g⁺, g⟩| ≥ ν ‖g⁺‖² (Powell); None for never.
      growth: a trial step starts at most this many times longer than the last step, ≥ 1.
      c1: sufficient decrease of the line search, in (0, c2).
      c2: curvature of the line search, in (c1, 0.5).
      max_evaluations: trials of the line search at most, ≥ 1.

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
    check_scale("learning_rate", learning_rate)
    method = method.replace("-", "_")
    check.one_of("method", method, METHODS)
    check.positive_int("max_evaluations", max_evaluations)
    check.in_range("growth", growth, 1.0)
    check.in_range("c2", c2, 0.0, 0.5, open_low=True, open_high=True)
    check.in_range("c1", c1, 0.0, c2, open_low=True, open_high=True)
    if restart_threshold is not None:
        check.in_range("restart_threshold", restart_threshold, 0.0, open_low=True)

    def init(params: Params) -> NonlinearCGState:
        check_params("nonlinear_cg", params)
        dtype = scalar_dtype(params)
        return NonlinearCGState(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            direction=jax.tree.map(jnp.zeros_like, params),
            beta=jnp.zeros((), dtype),
            step=jnp.zeros((), dtype),
            slope=jnp.zeros((), dtype),
            value=jnp.full((), jnp.inf, dtype),
            grad=jax.tree.map(jnp.zeros_like, params),
            diagnostics=diag.init(),
        )

    def update(
        updates: PyTree,
        state: NonlinearCGState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, NonlinearCGState]:
        here = gather("nonlinear_cg", updates, params, **extras)
        dtype = here.value.dtype
        rate = current_rate(learning_rate, state)
        active = here.active

        wanted = tree.add_scaled(tree.scale(-1.0, updates), state.beta, state.direction)
        direction, descends = descending(wanted, here)
        slope = tree.vdot(direction, here.grad).astype(dtype)
        fresh = rate.astype(dtype) / jnp.maximum(1.0, tree.norm(direction).astype(dtype))
        # The first-order change is expected to be that of the last step.
        ratio = jnp.where(slope < 0, state.slope / jnp.where(slope < 0, slope, 1.0), 1.0)
        next_step = state.step * jnp.clip(ratio, 1.0 / growth, growth)
        found = linesearch.strong_wolfe(
            here.value_and_grad,
            here.params,
            direction,
            here.value,
            here.grad,
            initial_step=jnp.where(next_step > 0, next_step, fresh),
            noise=here.noise,
            c1=c1,
            c2=c2,
            max_evaluations=max_evaluations,
            active=active,
        )
        assert found.grad is not None  # backtracking alone gives none
        moved = found.step > 0
        beta = _beta(method, direction, here.grad, found.grad)
        if restart_threshold is not None:
            overlap = jnp.abs(tree.vdot(found.grad, here.grad))
            lost = overlap >= restart_threshold * tree.vdot(found.grad, found.grad)
            beta = jnp.where(lost, 0.0, beta)
        beta = jnp.where(moved & jnp.isfinite(beta), beta, 0.0)
        nothing = jax.tree.map(jnp.zeros_like, here.params)
        # A step of zero length says nothing of the next one's: `step` 0 starts from the rate again.
        new = NonlinearCGState(
            learning_rate=rate,
            direction=tree.where(moved, direction, nothing),
            beta=beta.astype(dtype),
            step=found.step,
            slope=jnp.where(moved, slope, 0.0),
            value=jnp.where(here.finite, found.value, jnp.inf),
            grad=tree.where(here.finite, found.grad, nothing),
            diagnostics=diag.advance(
                state.diagnostics,
                step_size=found.step,
                termination=diag.ending(found.termination, here.finite, here.stationary, descends),
                gradients=found.evaluations,
                reused=reused,
            ),
        )
        return tree.where(moved, tree.scale(found.step, direction), nothing), new

    return optax.GradientTransformationExtraArgs(init, update)


def _beta(method: str, d: PyTree, g: PyTree, g_new: PyTree) -> jax.Array:
    """The β of the next direction; not finite where the formula breaks down."""
    y = jax.tree.map(jnp.subtract, g_new, g)
    gy = tree.vdot(g_new, y)
    if method == "polak_ribiere":
        return jnp.maximum(gy / tree.vdot(g, g), 0.0)
    dy = tree.vdot(d, y)
    if method == "hestenes_stiefel":
        return jnp.maximum(gy / dy, 0.0)
    if method == "dai_yuan":
        return tree.vdot(g_new, g_new) / dy
    beta = (gy - 2.0 * tree.vdot(y, y) * (tree.vdot(d, g_new) / dy)) / dy
    eta = -1.0 / (tree.norm(d) * jnp.minimum(0.01, tree.norm(g)))
    return jnp.maximum(beta, eta)
