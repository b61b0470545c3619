r"""The natural gradient: steepest descent where distance is the change of the model's predictions.

    δ = −α (F + λI)⁻¹ g

F is the Fisher matrix, used only in products F v inside conjugate gradients. For losses that are
−log p of an exponential family in its natural parameters (softmax and sigmoid cross-entropy, half
the squared error) F is the Gauss-Newton matrix. The empirical Fisher takes the gradients of the
observed labels instead of the model's own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import linear_cg
from jdl.optim.context import UpdateContext
from jdl.optim.damping import reduction_ratio, update_damping
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.transformation import (
    ScalarOrSchedule,
    Step,
    accepted,
    check_options,
    descending,
    second_order,
)


class NaturalGradientState(NamedTuple):
    """The natural gradient's state, of one gradient's size.

    Attributes:
      learning_rate: α, float32; change it with `optax.tree.set`.
      damping: λ for the next step, float32; likewise.
      direction: the last solution, which the next CG starts from.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    damping: jax.Array
    direction: PyTree
    diagnostics: Diagnostics


def natural_gradient(
    learning_rate: ScalarOrSchedule = 0.3,
    *,
    curvature: str = "fisher",
    damping: float = 1.0,
    damping_increase: float = 1.5,
    damping_decrease: float = 2 / 3,
    damping_minimum: float = 1e-4,
    kl_clip: float | None = 0.5,
    max_cg_iterations: int = 20,
    tolerance: float = 1e-2,
    warm_start: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
    r"""The natural gradient by conjugate gradients, without a line search.

    `update` needs `value`, `grad` and `objective`. Within a chain g is the incoming update, while
    the reduction ratio uses f. A step that raises f is taken, since mini-batches are noisy,
    but raises λ; a step after which f is not finite is not taken.

    Memory: five gradients in CG, one in the state.

    Args:
      learning_rate: α > 0, or a schedule.
      curvature: "fisher" for the Gauss-Newton matrix, the Fisher of losses that are −log p of an
        exponential family; "empirical_fisher" for Σᵢ gᵢ gᵢᵀ / B of the examples' own gradients.
      damping: the first λ ≥ 0, in units of the curvature of the mean loss.
      damping_increase: λ's factor when the reduction ratio is below ¼, ≥ 1; 1 with a decrease of 1
        keeps λ constant.
      damping_decrease: λ's factor when it is above ¾, in (0, 1].
      damping_minimum: the least λ, ≥ 0.
      kl_clip: bound on ½ ⟨δ, F δ⟩, the predictions' change in nats per example, to which longer
        steps are shortened; > 0, or None for no bound.
      max_cg_iterations: maximum CG iterations per step, ≥ 1.
      tolerance: CG ends when its residual is this small relative to the gradient, in [0, 1).
      warm_start: factor on the last solution to start CG from, in [0, 1]; 0 starts from zero.

    Returns:
      An optax transformation, whose updates are the whole step.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real, at
        `update` for missing extras.

    >>> from jdl.core.objective import Objective
    >>> from jdl.losses import squared_error
    >>> batch = {"x": jnp.diag(jnp.array([1.0, 10.0])), "label": jnp.ones((2, 1))}
    >>> objective = Objective.from_fns(lambda w, b: b["x"] @ w, squared_error, batch)
    >>> optimizer, w = natural_gradient(1.0, damping=1e-4, kl_clip=None), jnp.zeros((2, 1))
    >>> value, grad, _ = objective.value_and_grad(w)
    >>> updates, _ = optimizer.update(
    ...     grad, optimizer.init(w), w, value=value, grad=grad, objective=objective)
    >>> [round(float(wi), 2) for wi in optax.apply_updates(w, updates)[:, 0]]  # 1 / x
    [1.0, 0.1]

    References:
      Amari, Natural gradient works efficiently in learning (1998).
      Pascanu & Bengio, Revisiting natural gradient for deep networks (2014): CG, exponential
      families.
      Martens, New insights and perspectives on the natural gradient method (2020), sections 8, 11.
    """
    check.one_of("curvature", curvature, ["fisher", "empirical_fisher"])
    check_options(
        damping=damping,
        damping_increase=damping_increase,
        damping_decrease=damping_decrease,
        damping_minimum=damping_minimum,
        kl_clip=kl_clip,
        max_cg_iterations=max_cg_iterations,
        tolerance=tolerance,
        warm_start=warm_start,
    )

    def init(params: Params) -> dict[str, Any]:
        return {
            "damping": jnp.array(damping, jnp.float32),
            "direction": jax.tree.map(jnp.zeros_like, params),
        }

    def direction(ctx: UpdateContext, state: NaturalGradientState) -> linear_cg.Solution:
        objective = ctx.needed_objective("Fisher products")
        lam = state.damping.astype(ctx.dtype)
        product = objective.gnvp if curvature == "fisher" else objective.efvp
        return linear_cg.linear_cg(
            lambda v: tree.add_scaled(product(ctx.params, v), lam, v),
            tree.scale(-1.0, ctx.updates),
            tree.scale(warm_start, state.direction) if warm_start > 0 else None,
            max_iterations=max_cg_iterations,
            tolerance=tolerance,
            active=ctx.active,
        )

    def accept(
        ctx: UpdateContext, state: NaturalGradientState, solution: linear_cg.Solution
    ) -> Step:
        lam = state.damping.astype(ctx.dtype)
        direction, descends = descending(solution.x, ctx, bounded=True)
        curvature = _curvature(ctx, solution, lam)
        curvature = jnp.where(descends, jnp.maximum(curvature, 0.0), 0.0)
        scale = state.learning_rate.astype(ctx.dtype)
        if kl_clip is not None:
            longest = jnp.sqrt(2 * kl_clip / jnp.where(curvature > 0, curvature, 1.0))
            scale = jnp.where(curvature > 0, jnp.minimum(scale, longest), scale)
        new_value = ctx.value_fn(tree.add_scaled(ctx.params, scale, direction))
        slope = tree.vdot(ctx.grad, direction).astype(ctx.dtype)
        predicted = scale * slope + 0.5 * scale * scale * curvature
        ratio = reduction_ratio(ctx.value, new_value, predicted, ctx.noise)
        moved = ctx.active & jnp.isfinite(new_value)
        next_damping = update_damping(
            lam,
            jnp.where(descends, ratio, -jnp.inf),
            increase=damping_increase,
            decrease=damping_decrease,
            minimum=min(damping_minimum, damping),
        )
        nothing = jax.tree.map(jnp.zeros_like, ctx.params)
        products = solution.products.astype(jnp.float32) * ctx.curvature_share()
        return Step(
            updates=tree.scale(scale, direction),
            moved=moved,
            step_size=scale,
            code=accepted(moved),
            fields={
                "damping": jnp.where(ctx.active, next_damping, lam).astype(jnp.float32),
                "direction": tree.where(moved & descends, solution.x, nothing),
            },
            report={
                "values": ctx.active,
                "gauss_newton_products": products,
                "linear_iterations": solution.iterations,
                "damping": lam,
                "reduction_ratio": ratio,
            },
            descends=descends,
        )

    return second_order(
        "natural_gradient",
        NaturalGradientState,
        learning_rate,
        init=init,
        direction=direction,
        accept=accept,
        damping=damping,
    )


def _curvature(ctx: UpdateContext, solution: linear_cg.Solution, lam: jax.Array) -> jax.Array:
    """⟨δ, F δ⟩, from CG's q(δ) = ⟨g, δ⟩ + ½⟨δ, (F + λI) δ⟩."""
    square = tree.vdot(solution.x, solution.x).astype(ctx.dtype)
    slope = tree.vdot(ctx.updates, solution.x).astype(ctx.dtype)
    return 2 * (solution.model - slope) - lam * square
