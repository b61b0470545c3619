r"""Steps through a dense curvature matrix's spectrum, for up to some thousands of parameters.

    δ(λ) = −V (Λ + λI)⁻¹ Vᵀ g,    B = V Λ Vᵀ

One decomposition serves every λ: a step that fails is tried again with more damping, or a smaller
region, at the cost of one evaluation of f and no further derivative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import damping as damping_rules
from jdl.optim.context import UpdateContext


class Spectrum(NamedTuple):
    """A symmetric matrix's, or a Jacobian's Gram matrix's.

    Attributes:
      values: eigenvalues Λ, ascending for a symmetric matrix, [k].
      vectors: V, [n, k].
      sound: whether the matrix was finite; if not, this is the identity's.
    """

    values: jax.Array
    vectors: jax.Array
    sound: jax.Array


class Tried(NamedTuple):
    """The last step tried.

    Attributes:
      tried: evaluations made, int32.
      damping: λ.
      radius: Δ.
      step: δ in the eigenvectors' coordinates.
      value: f(θ + scale · δ).
      ratio: ρ.
    """

    tried: jax.Array
    damping: jax.Array
    radius: jax.Array
    step: jax.Array
    value: jax.Array
    ratio: jax.Array

    @property
    def good(self) -> jax.Array:
        """Whether f fell, by a share of what the model foretold."""
        return (self.tried > 0) & (self.ratio > 1e-4) & jnp.isfinite(self.value)


def check_size(optimizer: str, params: Params, most: int) -> None:
    """Refuses more parameters than a dense matrix should have rows."""
    size = tree.size(params)
    check.argument(
        size <= most,
        "params",
        f"at most {most} numbers, for {optimizer}'s dense matrix of their square",
        size,
        "Use jdl.optim.hessian_free, which needs no matrix, or raise `max_parameters`.",
    )


def dense(
    product: Callable[[PyTree], PyTree], params: Params, chunk_size: int, dtype: Any
) -> jax.Array:
    """The matrix whose products are given, `chunk_size` columns at a time, as an [m, n] array."""
    flat, unravel = ravel_pytree(params)

    def column(i: jax.Array) -> jax.Array:
        unit = jnp.zeros_like(flat).at[i].set(1.0)
        return ravel_pytree(product(unravel(unit)))[0]

    columns = jax.lax.map(column, jnp.arange(flat.size), batch_size=min(chunk_size, flat.size))
    return columns.T.astype(dtype)


def of_symmetric(matrix: jax.Array) -> Spectrum:
    """By an eigendecomposition."""
    # An eigensolver given NaN may not return; a matrix that is not finite becomes I.
    sound = jnp.all(jnp.isfinite(matrix))
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    values, vectors = jnp.linalg.eigh(jnp.where(sound, matrix, identity), symmetrize_input=True)
    return Spectrum(values, vectors, sound)


def of_jacobian(jacobian: jax.Array) -> Spectrum:
    """Jᵀ J's, by singular values, which leaves twice the digits that squaring would."""
    sound = jnp.all(jnp.isfinite(jacobian))
    m, n = jacobian.shape
    identity = jnp.eye(m, n, dtype=jacobian.dtype)
    safe = jnp.where(sound, jacobian, identity)
    _, singular, vectors = jnp.linalg.svd(safe, full_matrices=False)
    return Spectrum(jnp.square(singular), vectors.T, sound)


def rotate(spectrum: Spectrum, x: jax.Array) -> jax.Array:
    """Vᵀ x."""
    with jax.default_matmul_precision("highest"):
        return spectrum.vectors.T @ x


def search(
    here: UpdateContext,
    curvatures: jax.Array,
    slopes: jax.Array,
    raw_slopes: jax.Array,
    step_of: Callable[[jax.Array], PyTree],
    *,
    scale: jax.Array,
    damping: jax.Array,
    radius: jax.Array,
    use_radius: bool,
    max_evaluations: int,
) -> Tried:
    """Tries steps of growing λ, or of shrinking Δ, until one makes f fall as foretold.

    Args:
      here: the objective around θ.
      curvatures: Λ, positive, [k].
      slopes: Vᵀ g of the model, [k].
      raw_slopes: Vᵀ ∇f, [k].
      step_of: the step δ in the parameters' own coordinates.
      scale: the factor on δ.
      damping: the first λ.
      radius: the first Δ.
      use_radius: whether Δ rules, and λ follows from it.
      max_evaluations: tries at most.
    """
    dtype, active = here.value.dtype, here.active
    mean = jnp.mean(curvatures)

    def body(t: Tried) -> Tried:
        again = t.tried > 0
        # Far too little damping is left behind quickly; so is a region far too large.
        lam = jnp.where(again, jnp.maximum(4.0 * t.damping, 1e-3 * mean), t.damping)
        length = jnp.linalg.norm(t.step)
        smaller = jnp.where(again, 0.25 * jnp.minimum(t.radius, length), t.radius)
        if use_radius:
            lam = _damping_for(smaller, slopes, curvatures)
        step = -slopes / (curvatures + lam)
        value = here.value_fn(tree.add_scaled(here.params, scale, step_of(step)))
        # In the eigenvectors' coordinates the model is a sum.
        model = scale * jnp.vdot(raw_slopes, step)
        model += 0.5 * scale * scale * jnp.vdot(curvatures, step * step)
        ratio = damping_rules.reduction_ratio(here.value, value, model, here.noise)
        return Tried(t.tried + 1, lam, smaller, step, value, ratio)

    return jax.lax.while_loop(
        lambda t: active & ~t.good & (t.tried < max_evaluations),
        body,
        Tried(
            jnp.zeros((), jnp.int32),
            damping.astype(dtype),
            radius.astype(dtype),
            jnp.zeros_like(slopes),
            here.value,
            jnp.full_like(here.value, jnp.nan),
        ),
    )


def steered(
    end: Tried,
    state: Any,
    floor: jax.Array,
    increase: float,
    decrease: float,
    use_radius: bool,
    usable: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """λ and Δ for the next step, after a search.

    Args:
      end: what the search ended with.
      state: the optimizer's, with the `damping` and the `radius` that it began with.
      floor: what rounding leaves of the spectrum; λ below it is none.
      increase: the factor on λ where the model misled.
      decrease: that where it was right.
      use_radius: whether Δ is steered, and not λ.
      usable: False to leave both as they are.
    """
    damping, radius = state.damping, state.radius
    if use_radius:
        edge = jnp.linalg.norm(end.step) >= 0.99 * end.radius
        radius = damping_rules.trust_radius(end.radius, end.ratio, edge)
    else:
        calm = damping_rules.update_damping(
            end.damping, end.ratio, increase=increase, decrease=decrease, minimum=0.0
        )
        damping = jnp.where(end.good, jnp.where(calm > floor, calm, 0.0), end.damping)
    return (
        jnp.where(usable, damping.astype(jnp.float32), state.damping),
        jnp.where(usable, radius.astype(jnp.float32), state.radius),
    )


def _damping_for(radius: jax.Array, slopes: jax.Array, curvatures: jax.Array) -> jax.Array:
    """The λ ≥ 0 whose step has length Δ, or 0 where the undamped step is shorter.

    1 / ‖δ(λ)‖ is nearly linear in λ, so Newton's iteration on it converges in a few steps, from
    the left without overshooting.
    """

    def body(_: Any, lam: jax.Array) -> jax.Array:
        d = curvatures + lam
        step = slopes / d
        length = jnp.linalg.norm(step)
        falling = jnp.vdot(step, step / d) / jnp.maximum(length * length, 1e-30)
        return jnp.maximum(lam + (length / radius - 1.0) / jnp.maximum(falling, 1e-30), 0.0)

    return jax.lax.fori_loop(0, 20, body, jnp.zeros_like(radius))
