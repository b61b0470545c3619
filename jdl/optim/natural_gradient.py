r"""The natural gradient: steepest descent where distance is the change of the model's predictions.

    δ = −α (F + λI)⁻¹ g

F is the Fisher matrix, met only in products F v inside conjugate gradients. For losses that are
−log p of an exponential family in its natural parameters (softmax and sigmoid cross-entropy, half
the squared error) F is the Gauss-Newton matrix; the empirical Fisher puts the gradients of the
observed examples in its place, which costs less thought and holds less.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import damping as damping_rules
from jdl.optim import diagnostics as diag
from jdl.optim import linear_cg
from jdl.optim.context import (
    ScalarOrSchedule,
    check_params,
    check_scale,
    current_rate,
    descending,
    gather,
    schedule_value,
)
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.result import ResultCode


class NaturalGradientState(NamedTuple):
    """What the natural gradient carries from step to step: a gradient's memory.

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
    the reduction ratio is judged by f. A step that raises f is not taken back, as fits noisy
    mini-batches, but λ grows; one that leaves f not finite is not taken.

    Memory beyond the gradient's: five gradients in CG, one in the state.

    Args:
      learning_rate: α > 0, or a schedule.
      curvature: "fisher" for the Gauss-Newton matrix, the Fisher of losses that are −log p of an
        exponential family; "empirical_fisher" for Σᵢ gᵢ gᵢᵀ / B of the examples' own gradients.
      damping: the first λ ≥ 0, in units of the curvature of the mean loss.
      damping_increase: λ's factor when the reduction ratio is below ¼, ≥ 1; 1 with a decrease of 1
        holds λ where it is.
      damping_decrease: λ's factor when it is above ¾, in (0, 1].
      damping_minimum: the least λ, ≥ 0.
      kl_clip: steps are shortened to ½ ⟨δ, F δ⟩, the predictions' change in nats an example,
        ≤ this; > 0, or None for no bound.
      max_cg_iterations: CG iterations a step at most, ≥ 1.
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
    check_scale("learning_rate", learning_rate)
    check.one_of("curvature", curvature, ["fisher", "empirical_fisher"])
    check.in_range("damping", damping, 0.0)
    check.in_range("damping_increase", damping_increase, 1.0)
    check.in_range("damping_decrease", damping_decrease, 0.0, 1.0, open_low=True)
    check.in_range("damping_minimum", damping_minimum, 0.0)
    check.in_range("tolerance", tolerance, 0.0, 1.0, open_high=True)
    check.in_range("warm_start", warm_start, 0.0, 1.0)
    check.positive_int("max_cg_iterations", max_cg_iterations)
    if kl_clip is not None:
        check.in_range("kl_clip", kl_clip, 0.0, open_low=True)

    def init(params: Params) -> NaturalGradientState:
        check_params("natural_gradient", params)
        return NaturalGradientState(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            damping=jnp.array(damping, jnp.float32),
            direction=jax.tree.map(jnp.zeros_like, params),
            diagnostics=diag.init(damping),
        )

    def update(
        updates: PyTree,
        state: NaturalGradientState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, NaturalGradientState]:
        here = gather("natural_gradient", updates, params, **extras)
        objective = here.needed_objective("Fisher products")
        rate = current_rate(learning_rate, state)
        dtype = here.value.dtype
        lam = state.damping.astype(dtype)
        active = here.active
        products = objective.gnvp if curvature == "fisher" else objective.efvp
        solution = linear_cg.linear_cg(
            lambda v: tree.add_scaled(products(here.params, v), lam, v),
            tree.scale(-1.0, updates),
            tree.scale(warm_start, state.direction) if warm_start > 0 else None,
            max_iterations=max_cg_iterations,
            tolerance=tolerance,
            active=active,
        )
        direction, descends = descending(solution.x, here)
        # −gradient has no scale of its own: it goes no further than the rate.
        length = tree.norm(direction).astype(dtype)
        fallback = tree.scale(1.0 / jnp.maximum(1.0, length), direction)
        direction = tree.where(descends, direction, fallback)
        # ⟨δ, F δ⟩ can be read off CG's q(δ) = ⟨g, δ⟩ + ½⟨δ, (F + λI) δ⟩.
        square = tree.vdot(solution.x, solution.x).astype(dtype)
        bend = 2 * (solution.model - tree.vdot(updates, solution.x).astype(dtype)) - lam * square
        bend = jnp.where(descends, jnp.maximum(bend, 0.0), 0.0)
        scale = rate.astype(dtype)
        if kl_clip is not None:
            longest = jnp.sqrt(2 * kl_clip / jnp.where(bend > 0, bend, 1.0))
            scale = jnp.where(bend > 0, jnp.minimum(scale, longest), scale)
        new_value = here.value_fn(tree.add_scaled(here.params, scale, direction))
        slope = tree.vdot(here.grad, direction).astype(dtype)
        model = scale * slope + 0.5 * scale * scale * bend
        ratio = damping_rules.reduction_ratio(here.value, new_value, model, here.noise)
        moved = active & jnp.isfinite(new_value)
        calm = damping_rules.update_damping(
            lam,
            jnp.where(descends, ratio, -jnp.inf),
            increase=damping_increase,
            decrease=damping_decrease,
            minimum=min(damping_minimum, damping),
        )
        code = jnp.where(moved, ResultCode.ACCEPTED, ResultCode.NO_DECREASE)
        share = objective.curvature_share()
        told = diag.advance(
            state.diagnostics,
            step_size=jnp.where(moved, scale, 0.0),
            termination=diag.ending(code, here.finite, here.stationary, descends),
            values=active,
            gauss_newton_products=solution.products.astype(jnp.float32) * share,
            linear_iterations=solution.iterations,
            damping=lam,
            reduction_ratio=ratio,
            reused=reused,
        )
        nothing = jax.tree.map(jnp.zeros_like, here.params)
        new = NaturalGradientState(
            learning_rate=rate,
            damping=jnp.where(active, calm, lam).astype(jnp.float32),
            direction=tree.where(moved & descends, solution.x, nothing),
            diagnostics=told,
        )
        return tree.where(moved, tree.scale(scale, direction), nothing), new

    return optax.GradientTransformationExtraArgs(init, update)
