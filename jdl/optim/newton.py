r"""Newton's method with the exact, dense Hessian, for up to some thousands of parameters.

    δ = −V (|Λ| + λI)⁻¹ Vᵀ g,    H = V Λ Vᵀ

Taking |Λ| for Λ steps away from saddle points instead of into them. The eigenvectors are computed
once an update; a step that fails is tried again with more damping, or in a smaller region, at the
cost of one evaluation of f.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core.types import Params
from jdl.optim import spectral
from jdl.optim.context import UpdateContext, hessian_product
from jdl.optim.damping import update_damping
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.result import ResultCode
from jdl.optim.transformation import ScalarOrSchedule, Step, check_options, second_order


class NewtonState(NamedTuple):
    """Newton's state: scalars only.

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
    its curvature batch. Within a chain the incoming update is the gradient of the
    quadratic model; steps are accepted by the decrease of f.

    An update takes the n² numbers of the Hessian, as many of its eigenvectors, and the activations
    of `chunk_size` Hessian products, and costs n products and an eigendecomposition, about 9 n³
    operations.

    Args:
      learning_rate: the factor on the step, > 0, or a schedule.
      damping: the first λ ≥ 0. 0 is plain Newton: λ rises where a step fails, in units of the mean
        |eigenvalue|, and falls to 0 again as steps succeed.
      saddle_free: whether to take |Λ| for Λ; False takes Λ itself, shifted until it is positive.
      trust_region: the first radius Δ > 0 of a trust region ‖δ‖ ≤ Δ in place of damping; each step
        is the exact minimizer of the model within the region. None for damping.
      max_parameters: the largest n allowed, ≥ 1.
      chunk_size: Hessian columns computed at once, ≥ 1.
      max_evaluations: maximum tries per step, ≥ 1.

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
    check_options(
        damping=damping,
        trust_region=trust_region,
        max_parameters=max_parameters,
        chunk_size=chunk_size,
        max_evaluations=max_evaluations,
    )

    def init(params: Params) -> dict[str, Any]:
        spectral.check_size("newton", params, max_parameters)
        return {
            "damping": jnp.array(damping, jnp.float32),
            "radius": jnp.array(trust_region or jnp.inf, jnp.float32),
        }

    def direction(ctx: UpdateContext, state: NewtonState) -> tuple[spectral.Model, jax.Array]:
        del state
        product = hessian_product(ctx)
        if ctx.objective is not None:
            product = functools.partial(ctx.objective.hvp, ctx.params)
        matrix = spectral.dense(product, ctx.params, chunk_size, ctx.dtype)
        spectrum = spectral.of_symmetric(matrix)
        eigenvalues = spectrum.values
        largest = jnp.max(jnp.abs(eigenvalues))
        # Smaller eigenvalues are rounding errors; if all are zero, the step is −g.
        floor = jnp.where(largest > 0, jnp.finfo(ctx.dtype).eps * largest, 1.0)
        if saddle_free:
            curvatures = jnp.maximum(jnp.abs(eigenvalues), floor)
        else:
            curvatures = eigenvalues + jnp.maximum(floor - eigenvalues[0], 0.0)
        return spectral.model(ctx, spectrum, curvatures, floor), eigenvalues[0] < -floor

    def accept(
        ctx: UpdateContext, state: NewtonState, proposal: tuple[spectral.Model, jax.Array]
    ) -> Step:
        model, concave = proposal
        step = spectral.accept(
            ctx,
            state,
            model,
            use_radius=trust_region is not None,
            # A λ far too small is corrected in few tries.
            retry=lambda t, model: jnp.maximum(4.0 * t.damping, 1e-3 * model.mean),
            follow=functools.partial(update_damping, increase=4.0, decrease=0.25, minimum=0.0),
            max_evaluations=max_evaluations,
            hessian_products=model.size * ctx.curvature_share(),
        )
        concave &= step.moved
        return step._replace(code=jnp.where(concave, ResultCode.NEGATIVE_CURVATURE, step.code))

    return second_order(
        "newton",
        NewtonState,
        learning_rate,
        init=init,
        direction=direction,
        accept=accept,
        damping=damping,
    )
