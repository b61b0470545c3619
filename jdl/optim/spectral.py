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
from jdl.optim.context import UpdateContext
from jdl.optim.damping import reduction_ratio, trust_radius, update_damping
from jdl.optim.transformation import Step, accepted


class Spectrum(NamedTuple):
    """The spectrum of a symmetric matrix, or of a Jacobian's Gram matrix."""

    values: jax.Array  # eigenvalues Λ, ascending for a symmetric matrix, [k]
    vectors: jax.Array  # V, [n, k]
    sound: jax.Array  # whether the matrix was finite; if not, this is the identity's


class Model(NamedTuple):
    """The quadratic model of f, in the coordinates of the curvature's eigenvectors."""

    curvatures: jax.Array  # Λ, made positive, [k]
    slopes: jax.Array  # Vᵀ g of the incoming updates, [k]
    raw_slopes: jax.Array  # Vᵀ ∇f, [k]
    floor: jax.Array  # the rounding error of the spectrum; a λ below it has no effect
    # The step in the parameters' coordinates, from the eigenvectors'.
    step_of: Callable[[jax.Array], PyTree]
    sound: jax.Array  # whether the curvature was finite


class Tried(NamedTuple):
    """The last step tried."""

    tried: jax.Array  # evaluations made, int32
    damping: jax.Array  # λ
    radius: jax.Array  # Δ
    step: jax.Array  # δ in the eigenvectors' coordinates
    value: jax.Array  # f(θ + scale · δ)
    ratio: jax.Array  # ρ

    @property
    def good(self) -> jax.Array:
        """Whether f fell, by a share of the predicted decrease."""
        return (self.tried > 0) & (self.ratio > 1e-4) & jnp.isfinite(self.value)


def check_size(optimizer: str, params: Params, most: int) -> None:
    """Refuses more parameters than the dense matrix may have rows."""
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
    """The matrix of a product, [m, n], computed `chunk_size` columns at a time."""
    flat, unravel = ravel_pytree(params)

    def column(i: jax.Array) -> jax.Array:
        unit = jnp.zeros_like(flat).at[i].set(1.0)
        return ravel_pytree(product(unravel(unit)))[0]

    columns = jax.lax.map(column, jnp.arange(flat.size), batch_size=min(chunk_size, flat.size))
    return columns.T.astype(dtype)


def of_symmetric(matrix: jax.Array) -> Spectrum:
    """The spectrum of a symmetric matrix, by an eigendecomposition."""
    # An eigensolver given NaN may not return; a matrix that is not finite becomes I.
    sound = jnp.all(jnp.isfinite(matrix))
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    values, vectors = jnp.linalg.eigh(jnp.where(sound, matrix, identity), symmetrize_input=True)
    return Spectrum(values, vectors, sound)


def of_jacobian(jacobian: jax.Array) -> Spectrum:
    """The spectrum of Jᵀ J from J's singular values: twice the digits Jᵀ J would give."""
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


def model(
    ctx: UpdateContext,
    spectrum: Spectrum,
    curvatures: jax.Array,
    floor: jax.Array,
    units: jax.Array | None = None,
) -> Model:
    """The model around θ, from a spectrum of D⁻¹ B D⁻¹ for D = diag(units), or of B."""
    flat, unravel = ravel_pytree(ctx.updates)

    def scaled(x: jax.Array) -> jax.Array:
        return x if units is None else x / units

    def step_of(coordinates: jax.Array) -> PyTree:
        with jax.default_matmul_precision("highest"):
            return unravel(scaled(spectrum.vectors @ coordinates).astype(flat.dtype))

    raw = ravel_pytree(ctx.grad)[0]
    return Model(
        curvatures=curvatures,
        slopes=rotate(spectrum, scaled(flat.astype(ctx.dtype))),
        raw_slopes=rotate(spectrum, scaled(raw.astype(ctx.dtype))),
        floor=floor,
        step_of=step_of,
        sound=spectrum.sound,
    )


def accept(
    ctx: UpdateContext,
    state: Any,
    model: Model,
    *,
    use_radius: bool,
    increase: float,
    decrease: float,
    max_evaluations: int,
    **report: Any,
) -> Step:
    """Tries steps of growing λ, or of shrinking Δ, until one makes f fall as predicted.

    Args:
      ctx: the objective around θ.
      state: the optimizer's, with `learning_rate`, `damping` λ and `radius` Δ.
      model: of f.
      use_radius: whether Δ bounds the step, and λ follows from it.
      increase: the factor on λ after a poor prediction.
      decrease: that after a good one.
      max_evaluations: maximum number of tries.
      **report: further arguments of `diagnostics.advance`.
    """
    scale = state.learning_rate.astype(ctx.dtype)
    end = _search(ctx, state, model, scale, use_radius, max_evaluations)
    damping, radius = state.damping, state.radius
    if use_radius:
        on_boundary = jnp.linalg.norm(end.step) >= 0.99 * end.radius
        radius = trust_radius(end.radius, end.ratio, on_boundary)
    else:
        calm = update_damping(
            end.damping, end.ratio, increase=increase, decrease=decrease, minimum=0.0
        )
        damping = jnp.where(end.good, jnp.where(calm > model.floor, calm, 0.0), end.damping)
    usable = ctx.active & model.sound
    return Step(
        updates=tree.scale(scale, model.step_of(end.step)),
        moved=end.good,
        step_size=scale,
        code=accepted(end.good),
        fields={
            "damping": jnp.where(usable, damping.astype(jnp.float32), state.damping),
            "radius": jnp.where(usable, radius.astype(jnp.float32), state.radius),
        },
        report={"values": end.tried, "damping": end.damping, "reduction_ratio": end.ratio} | report,
        sound=model.sound | ~ctx.active,
    )


def _search(
    ctx: UpdateContext,
    state: Any,
    model: Model,
    scale: jax.Array,
    use_radius: bool,
    max_evaluations: int,
) -> Tried:
    curvatures = model.curvatures
    mean = jnp.mean(curvatures)

    def body(t: Tried) -> Tried:
        again = t.tried > 0
        # A λ far too small, or a Δ far too large, is corrected in few tries.
        lam = jnp.where(again, jnp.maximum(4.0 * t.damping, 1e-3 * mean), t.damping)
        length = jnp.linalg.norm(t.step)
        smaller = jnp.where(again, 0.25 * jnp.minimum(t.radius, length), t.radius)
        if use_radius:
            lam = _damping_for(smaller, model.slopes, curvatures)
        step = -model.slopes / (curvatures + lam)
        value = ctx.value_fn(tree.add_scaled(ctx.params, scale, model.step_of(step)))
        # In the eigenvectors' coordinates the model is a sum.
        predicted = scale * jnp.vdot(model.raw_slopes, step)
        predicted += 0.5 * scale * scale * jnp.vdot(curvatures, step * step)
        ratio = reduction_ratio(ctx.value, value, predicted, ctx.noise)
        return Tried(t.tried + 1, lam, smaller, step, value, ratio)

    return jax.lax.while_loop(
        lambda t: ctx.active & ~t.good & (t.tried < max_evaluations),
        body,
        Tried(
            jnp.zeros((), jnp.int32),
            state.damping.astype(ctx.dtype),
            state.radius.astype(ctx.dtype),
            jnp.zeros_like(model.slopes),
            ctx.value,
            jnp.full_like(ctx.value, jnp.nan),
        ),
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
