r"""Damped steps by a dense curvature matrix B, for up to some thousands of parameters.

    δ(λ) = −(B + λI)⁻¹ g = −V (Λ + λI)⁻¹ Vᵀ g,    B = V Λ Vᵀ

A step that fails is tried again with more damping, or in a smaller region, at the cost of one
evaluation of f and no further derivative. A spectrum serves every λ; larger matrices are factored
again for each, see `jdl.optim.least_squares`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim.context import UpdateContext
from jdl.optim.damping import reduction_ratio, trust_radius
from jdl.optim.transformation import Step, accepted


class Spectrum(NamedTuple):
    """The spectrum of a symmetric matrix, or of a Jacobian's Gram matrix."""

    values: jax.Array  # eigenvalues Λ, ascending for a symmetric matrix, [k]
    vectors: jax.Array  # V, [n, k]
    sound: jax.Array  # whether the matrix was finite; if not, this is the identity's


class Model(NamedTuple):
    """The quadratic model of f around θ, in coordinates of its own, such as the eigenvectors'."""

    solve: Callable[[jax.Array], jax.Array]  # λ -> the step in these coordinates, [k]
    slope: Callable[[jax.Array], jax.Array]  # ⟨∇f, δ⟩ of a step
    curvature: Callable[[jax.Array], jax.Array]  # ⟨δ, B δ⟩
    step_of: Callable[[jax.Array], PyTree]  # the step in the parameters' coordinates
    size: int  # k
    mean: jax.Array  # of the eigenvalues of B
    floor: jax.Array  # the rounding error of B; a λ below it has no effect
    sound: jax.Array  # whether B was finite
    # Δ -> the λ whose step has that length, where a region bounds the steps.
    damping_for: Callable[[jax.Array], jax.Array] | None = None


class Tried(NamedTuple):
    """The last step tried."""

    tried: jax.Array  # evaluations made, int32
    damping: jax.Array  # λ
    radius: jax.Array  # Δ
    step: jax.Array  # δ in the model's coordinates
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


def completed(spectrum: Spectrum, g: jax.Array) -> Spectrum:
    """With the part of g outside the span of V as one more eigenvector, of eigenvalue 0.

    There is such a part where J has fewer rows than columns, and g is not Jᵀ r: in a chain.
    """
    with jax.default_matmul_precision("highest"):
        other = g - spectrum.vectors @ (spectrum.vectors.T @ g)
    length = jnp.linalg.norm(other)
    strays = length > 1e3 * jnp.finfo(g.dtype).eps * jnp.linalg.norm(g)
    unit = jnp.where(strays, other / jnp.where(strays, length, 1.0), 0.0)
    values = jnp.append(spectrum.values, 0.0)
    return Spectrum(values, jnp.column_stack([spectrum.vectors, unit]), spectrum.sound)


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

    raw = rotate(spectrum, scaled(ravel_pytree(ctx.grad)[0].astype(ctx.dtype)))
    slopes = rotate(spectrum, scaled(flat.astype(ctx.dtype)))
    return Model(
        solve=lambda lam: -slopes / (curvatures + lam),
        slope=lambda step: jnp.vdot(raw, step),
        curvature=lambda step: jnp.vdot(curvatures, step * step),
        step_of=step_of,
        size=slopes.size,
        mean=jnp.mean(curvatures),
        floor=floor,
        sound=spectrum.sound,
        damping_for=lambda radius: _damping_for(radius, slopes, curvatures),
    )


def accept(
    ctx: UpdateContext,
    state: Any,
    model: Model,
    *,
    use_radius: bool,
    retry: Callable[[Tried, Model], jax.Array],
    follow: Callable[[jax.Array, jax.Array], jax.Array],
    max_evaluations: int,
    **report: Any,
) -> Step:
    """Tries steps of growing λ, or of shrinking Δ, until one makes f fall as predicted.

    Args:
      ctx: the objective around θ.
      state: the optimizer's, with `learning_rate`, `damping` λ and `radius` Δ.
      model: of f.
      use_radius: whether Δ bounds the step, and λ follows from it.
      retry: λ of the next try, after one that failed.
      follow: the next step's first λ, from that of a step taken and its ρ.
      max_evaluations: maximum number of tries.
      **report: further arguments of `diagnostics.advance`.
    """
    scale = state.learning_rate.astype(ctx.dtype)
    end = _search(ctx, state, model, scale, use_radius, retry, max_evaluations)
    damping, radius = state.damping, state.radius
    if use_radius:
        on_boundary = jnp.linalg.norm(end.step) >= 0.99 * end.radius
        radius = trust_radius(end.radius, end.ratio, on_boundary)
    else:
        calm = follow(end.damping, end.ratio)
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
    retry: Callable[[Tried, Model], jax.Array],
    max_evaluations: int,
) -> Tried:
    def body(t: Tried) -> Tried:
        again = t.tried > 0
        lam = jnp.where(again, retry(t, model), t.damping)
        length = jnp.linalg.norm(t.step)
        smaller = jnp.where(again, 0.25 * jnp.minimum(t.radius, length), t.radius)
        if use_radius and model.damping_for is not None:
            lam = model.damping_for(smaller)
        step = model.solve(lam)
        value = ctx.value_fn(tree.add_scaled(ctx.params, scale, model.step_of(step)))
        predicted = scale * model.slope(step) + 0.5 * scale * scale * model.curvature(step)
        ratio = reduction_ratio(ctx.value, value, predicted, ctx.noise)
        return Tried(t.tried + 1, lam, smaller, step, value, ratio)

    return jax.lax.while_loop(
        lambda t: ctx.active & ~t.good & (t.tried < max_evaluations),
        body,
        Tried(
            jnp.zeros((), jnp.int32),
            state.damping.astype(ctx.dtype),
            state.radius.astype(ctx.dtype),
            jnp.zeros(model.size, ctx.dtype),
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
