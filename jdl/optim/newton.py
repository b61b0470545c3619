r"""Newton's method with the exact, dense Hessian, for up to some thousands of parameters.

    δ = −V (|Λ| + λI)⁻¹ Vᵀ g,    H = V Λ Vᵀ

Taking |Λ| for Λ turns away from saddle points instead of into them. The eigenvectors are found once
an update; a step that fails is tried again with more damping (or a smaller region) at the cost of
one evaluation of f and no further derivative.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim import spectral
from jdl.optim.context import (
    ScalarOrSchedule,
    check_params,
    check_scale,
    current_rate,
    gather,
    hessian_product,
    schedule_value,
)
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.result import ResultCode


class NewtonState(NamedTuple):
    """What Newton's method carries from step to step: scalars only.

    Attributes:
      learning_rate: the factor on the step, float32; change it with `optax.tree.set`.
      damping: λ that the next step tries first, float32; likewise.
      radius: Δ of the trust region, where one is used, float32.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    damping: jax.Array
    radius: jax.Array
    diagnostics: Diagnostics


def newton(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: float = 0.0,
    saddle_free: bool = True,
    trust_region: float | None = None,
    max_parameters: int = 5000,
    chunk_size: int = 64,
    max_evaluations: int = 25,
) -> optax.GradientTransformationExtraArgs:
    r"""Saddle-free Newton with Levenberg damping or a trust region.

    `update` needs `value`, `grad` and `value_fn`, or `objective`, whose Hessian is then the one on
    its curvature batch. Within a chain the model's gradient is the incoming update, while decrease
    is judged by the true f.

    An update takes the n² numbers of the Hessian, as many of its eigenvectors, and the activations
    of `chunk_size` Hessian products, and costs n products and an eigendecomposition, about 9 n³
    operations.

    Args:
      learning_rate: the factor on the step, > 0, or a schedule.
      damping: the first λ ≥ 0. 0 is plain Newton: damping then enters where a step fails, in units
        of the mean |eigenvalue|, and leaves again as steps succeed.
      saddle_free: |Λ| for Λ; False takes Λ itself, shifted until it is positive.
      trust_region: the first radius Δ > 0 of a trust region ‖δ‖ ≤ Δ that stands in for damping;
        each step is the region's exact minimizer of the model. None for damping.
      max_parameters: n at most, ≥ 1.
      chunk_size: Hessian columns computed at once, ≥ 1.
      max_evaluations: tries a step at most, ≥ 1.

    Returns:
      An optax transformation, whose updates are the whole step.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are too many or not
        real, at `update` for missing extras.

    >>> def f(x):
    ...     return jnp.sum(jnp.array([1.0, 10.0]) * jnp.square(x - 1.0))
    >>> optimizer, x = newton(), jnp.zeros(2)
    >>> value, grad = jax.value_and_grad(f)(x)
    >>> updates, state = optimizer.update(
    ...     grad, optimizer.init(x), x, value=value, grad=grad, value_fn=f)
    >>> [round(float(xi), 3) for xi in optax.apply_updates(x, updates)]
    [1.0, 1.0]

    References:
      Dauphin et al., Identifying and attacking the saddle point problem (2014): |Λ|.
      Nocedal & Wright, Numerical Optimization (2006), sections 3.4 and 4.3.
    """
    check_scale("learning_rate", learning_rate)
    check.in_range("damping", damping, 0.0)
    check.positive_ints(
        max_parameters=max_parameters, chunk_size=chunk_size, max_evaluations=max_evaluations
    )
    if trust_region is not None:
        check.in_range("trust_region", trust_region, 0.0, open_low=True)

    def init(params: Params) -> NewtonState:
        check_params("newton", params)
        spectral.check_size("newton", params, max_parameters)
        return NewtonState(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            damping=jnp.array(damping, jnp.float32),
            radius=jnp.array(trust_region or jnp.inf, jnp.float32),
            diagnostics=diag.init(damping),
        )

    def update(
        updates: PyTree,
        state: NewtonState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, NewtonState]:
        here = gather("newton", updates, params, **extras)
        objective = here.objective
        rate = current_rate(learning_rate, state)
        dtype = here.value.dtype
        scale = rate.astype(dtype)
        active = here.active

        product = hessian_product(here)
        if objective is not None:
            product = lambda v: objective.hvp(here.params, v)  # noqa: E731
        spectrum = spectral.of_symmetric(spectral.dense(product, here.params, chunk_size, dtype))
        eigenvalues, size = spectrum.values, spectrum.values.size
        flat, unravel = ravel_pytree(updates)
        slopes = spectral.rotate(spectrum, flat.astype(dtype))
        raw_slopes = spectral.rotate(spectrum, ravel_pytree(here.grad)[0].astype(dtype))

        def step_of(coordinates: jax.Array) -> PyTree:
            with jax.default_matmul_precision("highest"):
                return unravel((spectrum.vectors @ coordinates).astype(flat.dtype))

        largest = jnp.max(jnp.abs(eigenvalues))
        # Smaller eigenvalues are rounding errors; with none at all, −g is the only step there is.
        floor = jnp.where(largest > 0, jnp.finfo(dtype).eps * largest, 1.0)
        if saddle_free:
            curvatures = jnp.maximum(jnp.abs(eigenvalues), floor)
        else:
            curvatures = eigenvalues + jnp.maximum(floor - eigenvalues[0], 0.0)

        end = spectral.search(
            here,
            curvatures,
            slopes,
            raw_slopes,
            step_of,
            scale=scale,
            damping=state.damping,
            radius=state.radius,
            use_radius=trust_region is not None,
            max_evaluations=max_evaluations,
        )
        moved, delta = end.good, step_of(end.step)
        nothing = jax.tree.map(jnp.zeros_like, here.params)
        code = jnp.where(moved, ResultCode.ACCEPTED, ResultCode.NO_DECREASE)
        concave = moved & (eigenvalues[0] < -floor)
        code = jnp.where(concave, ResultCode.NEGATIVE_CURVATURE, code)
        descends = jnp.asarray(True)
        share = 1.0 if objective is None else objective.curvature_share()
        told = diag.advance(
            state.diagnostics,
            step_size=jnp.where(moved, scale, 0.0),
            termination=diag.ending(
                code, here.finite & (spectrum.sound | ~active), here.stationary, descends
            ),
            values=end.tried,
            hessian_products=size * share,
            damping=end.damping,
            reduction_ratio=end.ratio,
            reused=reused,
        )
        next_damping, next_radius = spectral.steered(
            end, state, floor, 4.0, 0.25, trust_region is not None, here.active
        )
        new = NewtonState(
            learning_rate=rate,
            damping=next_damping,
            radius=next_radius,
            diagnostics=told,
        )
        step = tree.where(moved, tree.scale(scale, delta), nothing)
        return step, new

    return optax.GradientTransformationExtraArgs(init, update)
