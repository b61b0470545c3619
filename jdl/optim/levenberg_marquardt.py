r"""Levenberg-Marquardt for least squares, for up to some thousands of parameters.

    f(θ) = ½ ‖r(θ)‖²,    δ = −(Jᵀ J + λ D²)⁻¹ Jᵀ r,    J = ∂r/∂θ

D holds the largest column norms of J so far, so that the parameters' units do not matter. J is
decomposed once an update; a step that fails is tried again with more damping, or in a smaller
region, at the cost of one evaluation of f.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import tree
from jdl.core.types import Params, PyTree
from jdl.optim import least_squares, spectral
from jdl.optim.context import UpdateContext
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.transformation import ScalarOrSchedule, Step, check_options, second_order


class LevenbergMarquardtState(NamedTuple):
    """Levenberg-Marquardt's state, of one gradient's size.

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

    - `residual_fn`: params -> a pytree of arrays r, with value ½ ‖r‖²; `jdl.optim.Residuals` says
      what an example is, and is differentiated example by example, not parameter by parameter;
    - `objective`: its generalized Gauss-Newton matrix on the curvature batch takes the place of
      Jᵀ J; for `jdl.losses.squared_error` they are the same.
    Within a chain the incoming update is the gradient of the quadratic model; steps are accepted by
    the decrease of f.

    Memory beyond the gradient's, for n parameters and m residuals: J and the factors of its
    decomposition, 2 (m n + n²) numbers; with an objective of many outputs 3 n². Where m and n are
    both above 256, steps are found by Cholesky in the smaller space, see `least_squares`.

    Args:
      learning_rate: the factor on the step, > 0, or a schedule.
      damping: the first λ ≥ 0, in units of D².
      scaled: False for D = I.
      trust_region: the first radius Δ > 0 of a region ‖D δ‖ ≤ Δ, in place of damping, or None.
      max_parameters: the largest n allowed, ≥ 1.
      chunk_size: columns of J, for residuals without examples, computed at once, ≥ 1.
      max_evaluations: maximum tries per step, ≥ 1.

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
      Nielsen, Damping parameter in Marquardt's method (1999): factors 2, 4, 8 … after failures.
      Nocedal & Wright, Numerical Optimization (2006), section 10.3.
    """
    check_options(
        damping=damping,
        trust_region=trust_region,
        max_parameters=max_parameters,
        chunk_size=chunk_size,
        max_evaluations=max_evaluations,
    )

    def init(params: Params) -> dict[str, Any]:
        spectral.check_size("levenberg_marquardt", params, max_parameters)
        return {
            "damping": jnp.array(damping, jnp.float32),
            "radius": jnp.array(trust_region or jnp.inf, jnp.float32),
            "scale": jax.tree.map(jnp.zeros_like, params),
        }

    def direction(ctx: UpdateContext, state: LevenbergMarquardtState) -> _Proposal:
        curvature = least_squares.curvature("levenberg_marquardt", ctx, chunk_size)
        column_norms = jnp.sqrt(jnp.maximum(curvature.diagonal, 0.0))
        last, unravel = ravel_pytree(state.scale)
        norms = jnp.maximum(last.astype(ctx.dtype), column_norms)
        grown = jnp.where(jnp.isfinite(column_norms), norms, last.astype(ctx.dtype))
        # A parameter that no residual has depended on yet has no scale of its own.
        units = jnp.where(grown > 0, grown, 1.0) if scaled else jnp.ones_like(grown)
        if trust_region is None and not curvature.is_small:
            model = least_squares.factored(ctx, curvature, units)
        else:
            spectrum = curvature.spectrum(units)
            if len(curvature.matrix) < len(units):
                flat = ravel_pytree(ctx.updates)[0].astype(ctx.dtype)
                spectrum = spectral.completed(spectrum, flat / units)
            floor = jnp.finfo(ctx.dtype).eps * jnp.max(spectrum.values)
            curvatures = jnp.maximum(spectrum.values, jnp.where(floor > 0, floor, 1.0))
            model = spectral.model(ctx, spectrum, curvatures, floor, units)
        return _Proposal(model, unravel(grown.astype(last.dtype)), curvature.products)

    def accept(ctx: UpdateContext, state: LevenbergMarquardtState, proposal: _Proposal) -> Step:
        model = proposal.model
        step = spectral.accept(
            ctx,
            state,
            model,
            use_radius=trust_region is not None,
            retry=_retry,
            follow=_follow,
            max_evaluations=max_evaluations,
            gauss_newton_products=proposal.products,
        )
        usable = ctx.active & model.sound
        scale = tree.where(usable, proposal.scale, state.scale)
        return step._replace(fields={**step.fields, "scale": scale})

    return second_order(
        "levenberg_marquardt",
        LevenbergMarquardtState,
        learning_rate,
        init=init,
        direction=direction,
        accept=accept,
        damping=damping,
    )


def _retry(tried: spectral.Tried, model: spectral.Model) -> jax.Array:
    """2 λ, then 4, 8, 16 … times the last λ: close to where steps succeed, and soon far from 0."""
    lam = tried.damping
    factor = jnp.exp2(tried.tried.astype(lam.dtype))
    least = jnp.maximum(model.floor, jnp.finfo(lam.dtype).eps * model.mean)
    return jnp.maximum(factor * lam, least)


def _follow(damping: jax.Array, ratio: jax.Array) -> jax.Array:
    """λ falls after any fair prediction: in curved valleys few are good."""
    factor = jnp.where(ratio > 0.25, 1 / 3, jnp.where(ratio > 0.1, 1.0, 2.0))
    return jnp.minimum(factor.astype(damping.dtype) * damping, 1e10)


class _Proposal(NamedTuple):
    model: spectral.Model
    scale: PyTree  # D with this update's column norms
    products: float
