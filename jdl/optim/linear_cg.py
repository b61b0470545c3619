r"""Preconditioned conjugate gradients, with the stopping rules of second-order optimizers.

Minimizes the quadratic model q(x) = ½⟨x, A x⟩ − ⟨b, x⟩ over pytrees, given only products A v. The
program has a single product, in the loop's body (a warm start's A x₀ is iteration zero), and the
loop ends after `max_iterations` for any A. `_stopping` decides where it ends.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.types import PyTree
from jdl.optim.diagnostics import Number

# Why the loop ended.
RUNNING, CONVERGED, PROGRESS, EXHAUSTED, CURVATURE, BOUNDARY, BROKEN = range(7)


class Solution(NamedTuple):
    """What conjugate gradients found."""

    # The last iterate; with negative curvature, the last before it (or the first direction, if
    # the first had it); with a radius, on the boundary if the path left the region.
    x: PyTree
    model: jax.Array  # q(x), at most q(x₀)
    iterations: jax.Array  # int32
    products: jax.Array  # int32; one more with a warm start
    reason: jax.Array  # why it ended, int32: a constant of this module
    kept: PyTree  # iterates at geometrically spaced iterations, leading axis K, a ring buffer
    kept_model: jax.Array  # q of each, [K]; inf where the ring is not filled
    kept_count: jax.Array  # how many were kept in all; the newest is at (kept_count − 1) mod K


class _State(NamedTuple):
    x: PyTree
    residual: PyTree  # A x − b
    direction: PyTree
    rz: jax.Array  # ⟨r, M⁻¹ r⟩
    norms: tuple[jax.Array, jax.Array, jax.Array]  # ⟨x, Mx⟩, ⟨x, Mp⟩, ⟨p, Mp⟩
    model: jax.Array
    history: jax.Array  # q at each iteration
    iteration: jax.Array
    products: jax.Array
    next_kept: jax.Array
    kept: PyTree
    kept_model: jax.Array
    kept_count: jax.Array
    reason: jax.Array


def linear_cg(
    product: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree | None = None,
    *,
    preconditioner: Callable[[PyTree], PyTree] | None = None,
    max_iterations: int = 250,
    tolerance: Number = 0.0,
    progress: float = 0.0,
    radius: jax.Array | None = None,
    num_kept: int = 1,
    spacing: float = 1.3,
    active: jax.Array | bool = True,
) -> Solution:
    """Solves A x = b approximately.

    Args:
      product: v -> A v, A symmetric; without negative curvature A is positive definite.
      b: the right-hand side, a pytree of floating-point arrays.
      x0: the warm start; None for zero, which saves a product.
      preconditioner: r -> M⁻¹ r, M symmetric positive definite; None for the identity.
      max_iterations: ≥ 1.
      tolerance: ends when ‖A x − b‖ ≤ tolerance · ‖b‖.
      progress: ends at iteration i when q < 0 and (q − q[i−k]) / q < k · progress with
        k = max(10, i/10): in the last k iterations q fell by less than that fraction each. 0 for
        never.
      radius: Δ of a trust region ‖x‖_M ≤ Δ; needs x0 = None. Steps leaving it, and directions of
        negative curvature, end on its boundary.
      num_kept: K, how many iterates to keep.
      spacing: γ; iterates ⌈γʲ⌉ are kept, and the last.
      active: False to do nothing and return zero (or x0).

    >>> a = jnp.array([[4.0, 1.0], [1.0, 3.0]])
    >>> solution = linear_cg(lambda v: a @ v, jnp.array([1.0, 2.0]), tolerance=1e-5)
    >>> [round(float(x), 4) for x in solution.x], int(solution.iterations)
    ([0.0909, 0.6364], 2)

    References:
      Martens, Deep learning via Hessian-free optimization (2010), sections 4.4 to 4.7.
      Steihaug, The conjugate gradient method and trust regions (1983).
      Conn, Gould & Toint, Trust-region methods (2000), section 7.5.1: ‖x‖_M by recurrence.
    """
    if radius is not None and x0 is not None:
        raise ValueError("a trust region needs x0 = None")
    solve = (lambda r: r) if preconditioner is None else preconditioner
    bb = tree.vdot(b, b)
    dtype = bb.dtype
    zero = jnp.zeros((), dtype)
    tolerance2 = jnp.square(jnp.asarray(tolerance, dtype)) * bb
    warm = x0 is not None
    zeros = jax.tree.map(jnp.zeros_like, b)
    start = zeros if x0 is None else x0
    fine = jnp.asarray(active) & jnp.isfinite(bb) & (bb > 0)
    initial = _State(
        x=start,
        residual=tree.scale(-1.0, b),
        # Iteration zero of a warm start multiplies x₀ itself, for its residual.
        direction=start,
        rz=jnp.ones((), dtype),
        norms=(zero, zero, zero),
        model=zero,
        history=jnp.zeros((max_iterations + 1,), dtype),
        iteration=jnp.asarray(-1 if warm else 0, jnp.int32),
        products=jnp.zeros((), jnp.int32),
        next_kept=jnp.ones((), jnp.int32),
        kept=jax.tree.map(lambda x: jnp.zeros((num_kept, *x.shape), x.dtype), b),
        kept_model=jnp.full((num_kept,), jnp.inf, dtype),
        kept_count=jnp.zeros((), jnp.int32),
        reason=jnp.where(fine, RUNNING, CONVERGED).astype(jnp.int32),
    )

    def body(s: _State) -> _State:
        first = s.iteration < 0  # only ever with a warm start
        xx, xp, pp = s.norms
        # A solve may cost as much as a product; iteration zero of a warm start needs none.
        z = jax.lax.cond(first, lambda r: r, solve, s.residual) if warm else solve(s.residual)
        rz = tree.vdot(s.residual, z).astype(dtype)
        beta = jnp.where(s.iteration > 0, rz / s.rz, 0.0)
        direction = jax.tree.map(
            lambda z, p: jnp.where(first, p, beta.astype(p.dtype) * p - z), z, s.direction
        )
        xp, pp = beta * xp, rz + beta * beta * pp
        ap = product(direction)
        curvature = tree.vdot(direction, ap).astype(dtype)
        concave = ~first & (curvature <= 0)
        alpha, reason = _step_length(rz / curvature, concave, s.iteration, (xx, xp, pp), radius)
        alpha = jnp.where(first, 0.0, alpha)
        x = tree.add_scaled(s.x, alpha, direction)
        residual = tree.add_scaled(s.residual, jnp.where(first, 1.0, alpha), ap)
        # q = ½⟨x, A x − 2b⟩ = ½⟨x, r − b⟩: no product needed.
        model = 0.5 * (tree.vdot(x, residual) - tree.vdot(x, b)).astype(dtype)
        norms = (xx + 2 * alpha * xp + alpha * alpha * pp, xp + alpha * pp, pp)

        i = s.iteration + 1
        history = s.history.at[i].set(model)
        done = tree.vdot(residual, residual).astype(dtype) <= tolerance2
        stop = _stopping(i, model, history, done, max_iterations, progress)
        reason = jnp.where((reason == RUNNING) & (~first | done), stop, reason)
        # M is positive definite: only rounding makes ⟨r, M⁻¹ r⟩ zero or negative.
        spent = ~first & (rz <= 0)
        broken = ~(jnp.isfinite(model) & jnp.isfinite(rz) & jnp.isfinite(curvature))
        reason = jnp.where(spent, CONVERGED, jnp.where(broken, BROKEN, reason)).astype(jnp.int32)
        # An iterate that is not finite, or made of rounding errors, is dropped.
        x = tree.where(broken | spent, s.x, x)
        model = jnp.where(broken | spent, s.model, model)

        keep = ~first & ((i == s.next_kept) | (reason != RUNNING))
        slot = s.kept_count % num_kept
        kept = jax.tree.map(
            lambda ring, x: ring.at[slot].set(jnp.where(keep, x, ring[slot])), s.kept, x
        )
        following = jnp.ceil(spacing * i.astype(dtype)).astype(jnp.int32)
        return _State(
            x=x,
            residual=residual,
            direction=direction,
            rz=rz,
            norms=norms,
            model=model,
            history=history,
            iteration=i,
            products=s.products + 1,
            next_kept=jnp.where(i == s.next_kept, jnp.maximum(following, i + 1), s.next_kept),
            kept=kept,
            kept_model=s.kept_model.at[slot].set(jnp.where(keep, model, s.kept_model[slot])),
            kept_count=s.kept_count + keep.astype(jnp.int32),
            reason=reason,
        )

    end = jax.lax.while_loop(lambda s: s.reason == RUNNING, body, initial)
    return Solution(
        x=end.x,
        model=end.model,
        iterations=jnp.maximum(end.iteration, 0),
        products=end.products,
        reason=end.reason,
        kept=end.kept,
        kept_model=end.kept_model,
        kept_count=end.kept_count,
    )


def _step_length(
    alpha: jax.Array,
    concave: jax.Array,
    iteration: jax.Array,
    norms: tuple[jax.Array, jax.Array, jax.Array],
    radius: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The step along the direction, `alpha` unless curvature or boundary limit it; the reason."""
    xx, xp, pp = norms
    reason = jnp.asarray(RUNNING)
    if radius is None:
        # With negative curvature in the first iteration, the result is the direction itself.
        alpha = jnp.where(concave, jnp.where(iteration == 0, 1.0, 0.0), alpha)
    else:
        outside = concave | (xx + 2 * alpha * xp + alpha * alpha * pp >= radius * radius)
        gap = jnp.maximum(radius * radius - xx, 0.0)
        boundary = gap / (xp + jnp.sqrt(jnp.maximum(xp * xp + pp * gap, 0.0)))
        alpha = jnp.where(outside, boundary, alpha)
        reason = jnp.where(outside, BOUNDARY, reason)
    return alpha, jnp.where(concave, CURVATURE, reason)


def _stopping(
    i: jax.Array,
    model: jax.Array,
    history: jax.Array,
    done: jax.Array,
    max_iterations: int,
    progress: float,
) -> jax.Array:
    """Why CG stops after iteration i, or RUNNING.

    By iterations, or slow progress of q (Martens 2010, section 4.4), or the residual.
    """
    k = jnp.maximum(10, (i + 9) // 10)
    gained = model - history[jnp.maximum(i - k, 0)]
    slow = (i > k) & (model < 0) & (gained >= k.astype(model.dtype) * progress * model)
    slow &= progress > 0
    code = jnp.where(done, CONVERGED, RUNNING)
    code = jnp.where(slow, PROGRESS, code)
    return jnp.where(i >= max_iterations, EXHAUSTED, code)
