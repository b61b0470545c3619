r"""How far to trust a quadratic model: damping and trust regions by the reduction ratio.

    ρ = (f(θ + δ) − f(θ)) / (q(δ) − q(0))

is 1 where the model q predicts f exactly, and small or negative where it predicts badly.
"""

import jax
import jax.numpy as jnp

from jdl.optim.diagnostics import Number


def reduction_ratio(
    value: jax.Array, new_value: jax.Array, model: jax.Array, noise: Number = 0.0
) -> jax.Array:
    """ρ, actual over predicted change.

    Where both changes are within the rounding noise of f the ratio carries no information and is
    set to 1: otherwise damping would explode at every optimum. A change that is not finite, or a
    predicted rise, gives −inf.

    Args:
      value: f(θ).
      new_value: f(θ + δ).
      model: q(δ) − q(0), undamped, normally < 0.
      noise: how much f may vary by rounding alone, ≥ 0.

    >>> one, three, minus_four = jnp.asarray(1.0), jnp.asarray(3.0), jnp.asarray(-4.0)
    >>> float(reduction_ratio(three, one, minus_four))
    0.5
    """
    change = new_value - value
    unclear = (jnp.abs(change) <= noise) & (jnp.abs(model) <= noise)
    ratio = jnp.where(model < 0, change / jnp.where(model < 0, model, 1.0), -jnp.inf)
    ratio = jnp.where(jnp.isfinite(change), ratio, -jnp.inf)
    return jnp.where(unclear, 1.0, ratio)


def update_damping(
    damping: jax.Array,
    ratio: jax.Array,
    *,
    increase: float = 1.5,
    decrease: float = 2 / 3,
    minimum: float = 1e-10,
    maximum: float = 1e10,
) -> jax.Array:
    """The next λ: larger where the model was poor (ρ < ¼), smaller where it was good (ρ > ¾).

    Args:
      damping: λ ≥ 0.
      ratio: ρ; NaN counts as poor.
      increase: factor ≥ 1.
      decrease: factor in (0, 1].
      minimum: the least λ.
      maximum: the greatest λ.

    >>> float(update_damping(jnp.asarray(2.0), jnp.asarray(-0.5)))
    3.0

    References:
      Martens, Deep learning via Hessian-free optimization (2010), section 4.1.
      Nocedal & Wright, Numerical Optimization (2006), section 10.3.
    """
    factor = jnp.where(ratio > 0.75, decrease, jnp.where(ratio >= 0.25, 1.0, increase))
    return jnp.clip(damping * factor.astype(damping.dtype), minimum, maximum)


def trust_radius(
    radius: jax.Array,
    ratio: jax.Array,
    on_boundary: jax.Array,
    *,
    maximum: float = 1e10,
) -> jax.Array:
    """The next Δ: a quarter where the model was poor; double where it was good and Δ was reached.

    Args:
      radius: Δ > 0.
      ratio: ρ; NaN counts as poor.
      on_boundary: whether the step reached ‖δ‖ = Δ.
      maximum: the greatest Δ.

    >>> float(trust_radius(jnp.asarray(1.0), jnp.asarray(0.9), jnp.asarray(True)))
    2.0

    References:
      Nocedal & Wright, Numerical Optimization (2006), algorithm 4.1.
    """
    grown = jnp.where((ratio > 0.75) & on_boundary, 2.0 * radius, radius)
    return jnp.clip(jnp.where(ratio >= 0.25, grown, 0.25 * radius), 1e-20, maximum)
