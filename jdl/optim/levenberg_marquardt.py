r"""Levenberg-Marquardt for least squares, for up to some thousands of parameters.

    f(θ) = ½ ‖r(θ)‖²,    δ = −(Jᵀ J + λ D²)⁻¹ Jᵀ r,    J = ∂r/∂θ

D holds the largest column norms of J met so far, so that no parameter's unit matters. J is
decomposed once an update; a step that fails is tried again with more damping, or in a smaller
region, at the cost of one evaluation of f.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim import least_squares, spectral
from jdl.optim.context import (
    ScalarOrSchedule,
    check_params,
    check_scale,
    current_rate,
    schedule_value,
)
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.result import ResultCode


class LevenbergMarquardtState(NamedTuple):
    """What Levenberg-Marquardt carries from step to step: a gradient's memory.

    Attributes:
      learning_rate: the factor on the step, float32; change it with `optax.tree.set`.
      damping: λ that the next step tries first, float32; likewise.
      radius: Δ of the trust region, where one is used, float32.
      scale: D, shaped as the parameters.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    damping: jax.Array
    radius: jax.Array
    scale: PyTree
    diagnostics: Diagnostics


def levenberg_marquardt(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: float = 1e-3,
    scaled: bool = True,
    trust_region: float | None = None,
    max_parameters: int = 5000,
    chunk_size: int = 64,
    max_evaluations: int = 25,
) -> optax.GradientTransformationExtraArgs:
    r"""Levenberg-Marquardt with damping by the reduction ratio, or in Moré's trust region.

    `update` needs `value`, `grad` and one of
    - `residual_fn`: params -> a pytree of arrays r, with value ½ ‖r‖²;
    - `objective`: its generalized Gauss-Newton matrix on the curvature batch stands for Jᵀ J, which
      for `jdl.losses.squared_error` is the same, and for other convex losses their own.
    Within a chain the model's gradient is the incoming update, while decrease is judged by f.

    Memory beyond the gradient's, for n parameters and m residuals: J and the factors of its
    decomposition, 2 (m n + n²) numbers; with an objective 3 n². Both come at `chunk_size` columns
    at once.

    Args:
      learning_rate: the factor on the step, > 0, or a schedule.
      damping: the first λ ≥ 0, in units of D².
      scaled: False for D = I.
      trust_region: the first radius Δ > 0 of a region ‖D δ‖ ≤ Δ, in place of damping, or None.
      max_parameters: n at most, ≥ 1.
      chunk_size: columns of J computed at once, ≥ 1.
      max_evaluations: tries a step at most, ≥ 1.

    Returns:
      An optax transformation, whose updates are the whole step.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are too many or not
        real, at `update` for missing extras.

    >>> def residuals(x):  # Rosenbrock's
    ...     return jnp.stack([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])
    >>> f = lambda x: 0.5 * jnp.sum(jnp.square(residuals(x)))
    >>> optimizer, x = levenberg_marquardt(), jnp.array([-1.2, 1.0])
    >>> state = optimizer.init(x)
    >>> @jax.jit
    ... def step(x, state):
    ...     value, grad = jax.value_and_grad(f)(x)
    ...     updates, state = optimizer.update(
    ...         grad, state, x, value=value, grad=grad, residual_fn=residuals)
    ...     return optax.apply_updates(x, updates), state
    >>> for _ in range(20):
    ...     x, state = step(x, state)
    >>> [round(float(xi), 3) for xi in x]
    [1.0, 1.0]

    References:
      Moré, The Levenberg-Marquardt algorithm: implementation and theory (1978): D, the region.
      Nocedal & Wright, Numerical Optimization (2006), section 10.3.
    """
    check_scale("learning_rate", learning_rate)
    check.in_range("damping", damping, 0.0)
    check.positive_ints(
        max_parameters=max_parameters,
        chunk_size=chunk_size,
        max_evaluations=max_evaluations,
    )
    if trust_region is not None:
        check.in_range("trust_region", trust_region, 0.0, open_low=True)

    def init(params: Params) -> LevenbergMarquardtState:
        check_params("levenberg_marquardt", params)
        spectral.check_size("levenberg_marquardt", params, max_parameters)
        return LevenbergMarquardtState(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            damping=jnp.array(damping, jnp.float32),
            radius=jnp.array(trust_region or jnp.inf, jnp.float32),
            scale=jax.tree.map(jnp.zeros_like, params),
            diagnostics=diag.init(damping),
        )

    def update(
        updates: PyTree,
        state: LevenbergMarquardtState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, LevenbergMarquardtState]:
        here, curvature = least_squares.around(
            "levenberg_marquardt", chunk_size, updates, params, **extras
        )
        rate = current_rate(learning_rate, state)
        dtype = here.value.dtype
        factor = rate.astype(dtype)
        active = here.active

        flat, unravel = ravel_pytree(updates)
        column_norms = jnp.sqrt(jnp.maximum(curvature.diagonal, 0.0))
        last = ravel_pytree(state.scale)[0].astype(dtype)
        grown = jnp.where(jnp.isfinite(column_norms), jnp.maximum(last, column_norms), last)
        # A parameter that no residual has felt yet has no scale of its own.
        d = jnp.where(grown > 0, grown, 1.0) if scaled else jnp.ones_like(grown)
        spectrum = curvature.spectrum(d)
        slopes = spectral.rotate(spectrum, flat.astype(dtype) / d)
        raw_slopes = spectral.rotate(spectrum, ravel_pytree(here.grad)[0].astype(dtype) / d)
        floor = jnp.finfo(dtype).eps * jnp.max(spectrum.values)
        curvatures = jnp.maximum(spectrum.values, jnp.where(floor > 0, floor, 1.0))

        def step_of(coordinates: jax.Array) -> PyTree:
            with jax.default_matmul_precision("highest"):
                return unravel((spectrum.vectors @ coordinates / d).astype(flat.dtype))

        end = spectral.search(
            here,
            curvatures,
            slopes,
            raw_slopes,
            step_of,
            scale=factor,
            damping=state.damping,
            radius=state.radius,
            use_radius=trust_region is not None,
            max_evaluations=max_evaluations,
        )
        moved, delta = end.good, step_of(end.step)
        code = jnp.where(moved, ResultCode.ACCEPTED, ResultCode.NO_DECREASE)
        told = diag.advance(
            state.diagnostics,
            step_size=jnp.where(moved, factor, 0.0),
            termination=diag.ending(
                code,
                here.finite & (spectrum.sound | ~active),
                here.stationary,
                jnp.asarray(True),
            ),
            values=end.tried,
            gauss_newton_products=curvature.products,
            damping=end.damping,
            reduction_ratio=end.ratio,
            reused=reused,
        )
        nothing = jax.tree.map(jnp.zeros_like, here.params)
        usable = active & spectrum.sound
        next_damping, next_radius = spectral.steered(
            end, state, floor, 2.0, 0.1, trust_region is not None, usable
        )
        new = LevenbergMarquardtState(
            learning_rate=rate,
            damping=next_damping,
            radius=next_radius,
            scale=tree.where(usable, unravel(grown.astype(flat.dtype)), state.scale),
            diagnostics=told,
        )
        return tree.where(moved, tree.scale(factor, delta), nothing), new

    return optax.GradientTransformationExtraArgs(init, update)
