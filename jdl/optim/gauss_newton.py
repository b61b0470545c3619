r"""Gauss-Newton for least squares, for up to some thousands of parameters.

    f(θ) = ½ ‖r(θ)‖²,    δ = −J⁺ r,    θ ← θ + α δ,    J = ∂r/∂θ

J⁺ is the pseudo-inverse: of all minimizers of ‖J δ + r‖ the shortest, so that a direction which no
residual feels is left alone. α by backtracking from 1. Where f is far from quadratic or J nearly
singular, `levenberg_marquardt` goes further.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim import least_squares, linesearch, spectral
from jdl.optim.context import (
    ScalarOrSchedule,
    check_params,
    check_scale,
    current_rate,
    descending,
    schedule_value,
)
from jdl.optim.damping import reduction_ratio
from jdl.optim.diagnostics import Diagnostics


class GaussNewtonState(NamedTuple):
    """What Gauss-Newton carries from step to step: scalars only.

    Attributes:
      learning_rate: the first trial step, float32; change it with `optax.tree.set`.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    diagnostics: Diagnostics


def gauss_newton(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    rcond: float | None = None,
    max_parameters: int = 5000,
    chunk_size: int = 64,
    c1: float = 1e-4,
    max_evaluations: int = 30,
) -> optax.GradientTransformationExtraArgs:
    r"""Gauss-Newton with a backtracking line search.

    `update` needs `value`, `grad` and one of
    - `residual_fn`: params -> a pytree of arrays r, with value ½ ‖r‖²;
    - `objective`: its generalized Gauss-Newton matrix on the curvature batch stands for Jᵀ J.
    Within a chain Jᵀ r is the incoming update, while line search and descent are judged by `grad`;
    a direction that does not descend gives way to −grad.

    Memory beyond the gradient's, for n parameters and m residuals: J and the factors of its
    decomposition, 2 (m n + n²) numbers; with an objective 3 n².

    Args:
      learning_rate: the line search's first trial step, > 0, or a schedule.
      rcond: singular values of J below this share of the largest count as zero, in [0, 1); None
        for machine precision times the number of parameters.
      max_parameters: n at most, ≥ 1.
      chunk_size: columns of J computed at once, ≥ 1.
      c1: sufficient decrease of the line search, in (0, 1).
      max_evaluations: trials of the line search at most, ≥ 1.

    Returns:
      An optax transformation, whose updates are the whole step α δ.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are too many or not
        real, at `update` for missing extras.

    >>> a = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> residuals = lambda x: a @ x - jnp.array([6.0, 0.0, 0.0])
    >>> optimizer, x = gauss_newton(), jnp.zeros(2)
    >>> value, grad = jax.value_and_grad(lambda x: 0.5 * jnp.sum(residuals(x) ** 2))(x)
    >>> updates, _ = optimizer.update(
    ...     grad, optimizer.init(x), x, value=value, grad=grad, residual_fn=residuals)
    >>> [round(float(xi), 3) for xi in optax.apply_updates(x, updates)]
    [5.0, -3.0]

    References:
      Nocedal & Wright, Numerical Optimization (2006), section 10.3.
      Schraudolph, Fast curvature matrix-vector products (2002): convex losses.
    """
    check_scale("learning_rate", learning_rate)
    check.in_range("c1", c1, 0.0, 1.0, open_low=True, open_high=True)
    if rcond is not None:
        check.in_range("rcond", rcond, 0.0, 1.0, open_high=True)
    check.positive_ints(
        max_parameters=max_parameters,
        chunk_size=chunk_size,
        max_evaluations=max_evaluations,
    )

    def init(params: Params) -> GaussNewtonState:
        check_params("gauss_newton", params)
        spectral.check_size("gauss_newton", params, max_parameters)
        rate = schedule_value(learning_rate, jnp.zeros((), jnp.int32))
        return GaussNewtonState(rate, diag.init())

    def update(
        updates: PyTree,
        state: GaussNewtonState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, GaussNewtonState]:
        here, curvature = least_squares.around(
            "gauss_newton", chunk_size, updates, params, **extras
        )
        rate = current_rate(learning_rate, state)
        dtype = here.value.dtype
        active = here.active

        flat, unravel = ravel_pytree(updates)
        spectrum = curvature.spectrum(jnp.ones(flat.size, dtype))
        share = flat.size * float(jnp.finfo(dtype).eps) if rcond is None else rcond
        # A matrix is known to less than the square of what its factor is known to.
        floor = share**2 if curvature.is_jacobian else max(share**2, float(jnp.finfo(dtype).eps))
        felt = spectrum.values > floor * jnp.max(spectrum.values)
        slopes = spectral.rotate(spectrum, flat.astype(dtype))
        coordinates = jnp.where(felt, -slopes / jnp.where(felt, spectrum.values, 1.0), 0.0)
        with jax.default_matmul_precision("highest"):
            wanted = unravel((spectrum.vectors @ coordinates).astype(flat.dtype))
        direction, descends = descending(wanted, here)
        # −gradient has no scale of its own: no first trial goes further than the rate.
        length = tree.norm(direction).astype(dtype)
        direction = tree.where(
            descends, direction, tree.scale(1.0 / jnp.maximum(1.0, length), direction)
        )
        slope = tree.vdot(direction, here.grad).astype(dtype)
        found = linesearch.backtracking(
            here.value_fn,
            here.params,
            direction,
            here.value,
            slope,
            initial_step=rate.astype(dtype),
            noise=here.noise,
            c1=c1,
            max_evaluations=max_evaluations,
            active=active,
        )
        moved = found.step > 0
        bend = jnp.vdot(spectrum.values, coordinates * coordinates)
        model = found.step * slope + 0.5 * found.step * found.step * bend
        ratio = reduction_ratio(here.value, found.value, model, here.noise)
        told = diag.advance(
            state.diagnostics,
            step_size=found.step,
            termination=diag.ending(
                found.termination,
                here.finite & (spectrum.sound | ~active),
                here.stationary,
                descends,
            ),
            values=found.evaluations,
            gauss_newton_products=curvature.products,
            reduction_ratio=jnp.where(moved & descends, ratio, jnp.nan),
            reused=reused,
        )
        nothing = jax.tree.map(jnp.zeros_like, here.params)
        step = tree.where(moved, tree.scale(found.step, direction), nothing)
        return step, GaussNewtonState(rate, told)

    return optax.GradientTransformationExtraArgs(init, update)
