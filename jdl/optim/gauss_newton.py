r"""Gauss-Newton for least squares, for up to some thousands of parameters.

    f(θ) = ½ ‖r(θ)‖²,    δ = −J⁺ r,    θ ← θ + α δ,    J = ∂r/∂θ

J⁺ is the pseudo-inverse: δ is the shortest minimizer of ‖J δ + r‖, zero along directions that no
residual depends on; in units of the lengths of J's columns where these differ widely. α is found by
backtracking from 1. Where f is far from quadratic or J nearly singular, `levenberg_marquardt` gets
further.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import tree
from jdl.core.types import Params, PyTree
from jdl.optim import least_squares, linesearch, spectral
from jdl.optim.context import UpdateContext
from jdl.optim.damping import reduction_ratio
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.transformation import (
    ScalarOrSchedule,
    Step,
    along,
    check_options,
    descending,
    second_order,
)


class GaussNewtonState(NamedTuple):
    """Gauss-Newton's state: scalars only.

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

    - `residual_fn`: params -> a pytree of arrays r, with value ½ ‖r‖²; `jdl.optim.Residuals` says
      what an example is, and is differentiated example by example, not parameter by parameter;
    - `objective`: its generalized Gauss-Newton matrix on the curvature batch takes the place of
      Jᵀ J.
    Within a chain the incoming update takes the place of Jᵀ r, while the line search uses `grad`;
    −grad replaces a direction that does not descend.

    Memory beyond the gradient's, for n parameters and m residuals: J and the factors of its
    decomposition, 2 (m n + n²) numbers; with an objective of many outputs 3 n². Where m and n are
    both above 256 and `rcond` is None, the step is found by Cholesky in the smaller space, see
    `least_squares`.

    Args:
      learning_rate: the line search's first trial step, > 0, or a schedule.
      rcond: singular values of J below this fraction of the largest count as zero, in [0, 1); None
        for machine precision times the number of parameters. Columns whose lengths differ by more
        than its root are scaled to length 1 first.
      max_parameters: the largest n allowed, ≥ 1.
      chunk_size: columns of J, for residuals without examples, computed at a time, ≥ 1.
      c1: sufficient decrease of the line search, in (0, 1).
      max_evaluations: maximum trials of the line search, ≥ 1.

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
    check_options(
        rcond=rcond,
        c1=c1,
        max_parameters=max_parameters,
        chunk_size=chunk_size,
        max_evaluations=max_evaluations,
    )

    def init(params: Params) -> dict[str, Any]:
        spectral.check_size("gauss_newton", params, max_parameters)
        return {}

    def direction(ctx: UpdateContext, state: GaussNewtonState) -> _Proposal:
        del state
        curvature = least_squares.curvature("gauss_newton", ctx, chunk_size)
        units = _units(ctx, curvature, rcond)
        if rcond is None and not curvature.is_small:
            model = least_squares.factored(ctx, curvature, units)
        else:
            model = _inverted(ctx, curvature, units, rcond)
        step = model.solve(model.floor)
        norms = tree.norm(step) * tree.norm(ravel_pytree(ctx.grad)[0] / units)
        direction, descends = descending(model.step_of(step), ctx, bounded=True, norms=norms)
        bend = model.curvature(step)
        return _Proposal(direction, descends, bend, model.sound, curvature.products)

    def accept(ctx: UpdateContext, state: GaussNewtonState, proposal: _Proposal) -> Step:
        direction, descends, curvature, sound, products = proposal
        slope = tree.vdot(direction, ctx.grad).astype(ctx.dtype)
        found = linesearch.backtracking(
            ctx.value_fn,
            ctx.params,
            direction,
            ctx.value,
            slope,
            initial_step=state.learning_rate.astype(ctx.dtype),
            noise=ctx.noise,
            c1=c1,
            max_evaluations=max_evaluations,
            active=ctx.active,
        )
        predicted = found.step * slope + 0.5 * found.step * found.step * curvature
        ratio = reduction_ratio(ctx.value, found.value, predicted, ctx.noise)
        step = along(
            direction,
            found,
            descends,
            {},
            values=found.evaluations,
            gauss_newton_products=products,
            reduction_ratio=jnp.where((found.step > 0) & descends, ratio, jnp.nan),
        )
        return step._replace(sound=sound | ~ctx.active)

    return second_order(
        "gauss_newton",
        GaussNewtonState,
        learning_rate,
        init=init,
        direction=direction,
        accept=accept,
    )


def _share(ctx: UpdateContext, rcond: float | None) -> float:
    """Singular values below this share of the largest count as zero."""
    return tree.size(ctx.params) * float(jnp.finfo(ctx.dtype).eps) if rcond is None else rcond


def _units(
    ctx: UpdateContext, curvature: least_squares.Curvature, rcond: float | None
) -> jax.Array:
    """The lengths of J's columns where they are very unlike, else 1.

    Else their units would decide which singular values count as zero.
    """
    lengths = jnp.sqrt(jnp.maximum(curvature.diagonal, 0.0))
    known = (lengths > 0) & jnp.isfinite(lengths)
    shortest = jnp.min(jnp.where(known, lengths, jnp.inf))
    unlike = shortest < _share(ctx, rcond) ** 0.5 * jnp.max(jnp.where(known, lengths, 0.0))
    return jnp.where(known & unlike, lengths, 1.0)


def _inverted(
    ctx: UpdateContext,
    curvature: least_squares.Curvature,
    units: jax.Array,
    rcond: float | None,
) -> spectral.Model:
    """The model with the pseudo-inverse: no step along the smallest singular vectors."""
    spectrum, share = curvature.spectrum(units), _share(ctx, rcond)
    eps = float(jnp.finfo(ctx.dtype).eps)
    # Eigenvalues are squares of J's singular values; a matrix has no digits below eps.
    least = share**2 if curvature.is_jacobian else max(share**2, eps)
    kept = spectrum.values > least * jnp.max(spectrum.values)
    curvatures = jnp.where(kept, spectrum.values, jnp.inf)
    model = spectral.model(ctx, spectrum, curvatures, jnp.zeros((), ctx.dtype), units)
    return model._replace(
        curvature=lambda step: jnp.vdot(jnp.where(kept, spectrum.values, 0.0), step * step)
    )


class _Proposal(NamedTuple):
    direction: PyTree
    descends: jax.Array
    curvature: jax.Array  # ⟨δ, Jᵀ J δ⟩ of the Gauss-Newton step
    sound: jax.Array
    products: float
