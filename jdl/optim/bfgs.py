r"""BFGS and the self-scaled Broyden method, with a dense inverse Hessian.

    d = −H g,    H⁺ = [H − H y yᵀ H / ⟨y, H y⟩ + φ ⟨y, H y⟩ v vᵀ] / τ + s sᵀ / ⟨s, y⟩
    v = s / ⟨s, y⟩ − H y / ⟨y, H y⟩

BFGS is φ = τ = 1. In the self-scaled Broyden method both follow from how well H predicted the last
pair, so that eigenvalues of H that are far too large shrink in few steps: on least squares of small
physics-informed networks it gets several digits further than BFGS.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import spectral
from jdl.optim.context import UpdateContext, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.transformation import (
    ScalarOrSchedule,
    Search,
    Step,
    along,
    bounded_scale,
    check_options,
    descending,
    second_order,
    wolfe,
)


class BFGSState(NamedTuple):
    """The state of `bfgs`, for n parameters.

    Attributes:
      learning_rate: the line search's first trial, float32; change it with `optax.tree.set`.
      H: the inverse Hessian, [n, n].
      stored: how many pairs are in it; 0 again after a failed search.
      value: f after the last update; +∞ before.
      grad: ∇f there, for a solver that needs no second evaluation.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    H: jax.Array
    stored: jax.Array
    value: jax.Array
    grad: Params
    diagnostics: Diagnostics


def bfgs(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    update: str = "bfgs",
    scaled: bool = True,
    max_parameters: int = 10_000,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_evaluations: int = 20,
    search: Search = wolfe,
) -> optax.GradientTransformationExtraArgs:
    r"""BFGS, or the self-scaled Broyden method, with a strong Wolfe line search.

    `update` needs `value`, `grad` and `value_fn` (or `objective`). Within a chain the direction is
    built from the incoming updates, while the line search uses `grad`; −grad replaces a direction
    that does not descend. Memory: n² numbers, and as many while H changes.

    Args:
      learning_rate: the line search's first trial step, > 0, or a schedule. Before the first pair
        −grad is scaled to this length where it is longer.
      update: "bfgs", or "ssbroyden" for the self-scaled Broyden method.
      scaled: whether the first H is ⟨s, y⟩ / ⟨y, y⟩ I, from the first pair on, and not I.
      max_parameters: the largest n allowed, ≥ 1.
      c1: sufficient decrease of the line search, in (0, c2).
      c2: curvature of the line search, in (c1, 1).
      max_evaluations: maximum trials of the line search, ≥ 1.
      search: the line search, a `jdl.optim.transformation.Search`.

    Returns:
      An optax transformation, whose updates are the whole step α d.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are too many or not
        real, at `update` for missing extras.

    >>> def f(x):
    ...     return jnp.sum(jnp.array([1.0, 10.0]) * jnp.square(x - 1.0))
    >>> optimizer, x = bfgs(update="ssbroyden"), jnp.zeros(2)
    >>> state = optimizer.init(x)
    >>> for _ in range(6):
    ...     value, grad = jax.value_and_grad(f)(x)
    ...     updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
    ...     x = optax.apply_updates(x, updates)
    >>> [round(float(xi), 3) for xi in x]
    [1.0, 1.0]

    References:
      Nocedal & Wright, Numerical Optimization (2006), algorithm 6.1 and (6.20).
      Al-Baali & Khalfan, Wide interval for efficient self-scaling quasi-Newton algorithms (2005).
      Urbán, Stefanou & Pons, Unveiling the optimization process of physics informed neural networks
      (2025), section 3: φ and τ.
    """
    check.one_of("update", update, ["bfgs", "ssbroyden"])
    check_options(max_parameters=max_parameters, max_evaluations=max_evaluations, c2=c2)
    check.in_range("c1", c1, 0.0, c2, open_low=True, open_high=True)

    def init(params: Params) -> dict[str, Any]:
        spectral.check_size("bfgs", params, max_parameters)
        flat = ravel_pytree(params)[0]
        return {
            "H": jnp.eye(flat.size, dtype=tree.accumulator(flat.dtype)),
            "stored": jnp.zeros((), jnp.int32),
            "value": jnp.full((), jnp.inf, scalar_dtype(params)),
            "grad": jax.tree.map(jnp.zeros_like, params),
        }

    def direction(ctx: UpdateContext, state: BFGSState) -> tuple[PyTree, jax.Array]:
        flat, unravel = ravel_pytree(ctx.updates)
        with jax.default_matmul_precision("highest"):
            wanted = -(state.H @ flat.astype(state.H.dtype))
        return descending(unravel(wanted.astype(flat.dtype)), ctx)

    def accept(ctx: UpdateContext, state: BFGSState, proposal: tuple[PyTree, jax.Array]) -> Step:
        direction, descends = proposal
        new = state.stored == 0
        rate = state.learning_rate.astype(ctx.dtype)
        # Without curvature −grad has no scale of its own: the first trial goes at most `rate` far.
        first = jnp.where(new | ~descends, bounded_scale(direction, ctx, rate), rate)
        limits = {"c1": c1, "c2": c2, "max_evaluations": max_evaluations}
        found = search(ctx, direction, first, state.diagnostics, **limits)
        moved = found.step > 0
        s, y, u = (
            ravel_pytree(x)[0].astype(state.H.dtype)
            for x in (
                tree.scale(found.step, direction),
                jax.tree.map(jnp.subtract, found.grad, ctx.grad),
                ctx.updates,
            )
        )
        sy, yy = jnp.vdot(s, y), jnp.vdot(y, y)
        good = moved & (sy > 0) & jnp.isfinite(1.0 / sy)
        fitted = new & good & scaled
        h = jnp.where(fitted, sy / jnp.where(good, yy, 1.0), 1.0) * state.H
        # H⁻¹ s is −α u, but not along −grad, nor for a matrix of another scale.
        known = good & descends & ~fitted
        sbs = jnp.where(known, -found.step * jnp.vdot(s, u), sy) if update == "ssbroyden" else None
        with jax.default_matmul_precision("highest"):
            inverse = _updated(h, s, y, jnp.where(good, sy, 1.0), sbs, known)
        failed = ctx.active & ~moved  # the matrix is not trusted any more
        kept = jnp.where(failed, jnp.eye(s.size, dtype=h.dtype), state.H)
        fields = {
            "H": jnp.where(good, inverse, kept),
            "stored": jnp.where(failed, 0, state.stored + good.astype(jnp.int32)),
            "value": jnp.where(ctx.finite, found.value, jnp.inf),
            "grad": tree.where(ctx.finite, found.grad, jax.tree.map(jnp.zeros_like, ctx.grad)),
        }
        return along(direction, found, descends, fields, gradients=found.evaluations)

    parts: Any = {"init": init, "direction": direction, "accept": accept}
    return second_order("bfgs", BFGSState, learning_rate, **parts)


def _updated(
    h: jax.Array,
    s: jax.Array,
    y: jax.Array,
    sy: jax.Array,
    sbs: jax.Array | None = None,
    known: jax.Array | bool = True,
) -> jax.Array:
    """H⁺, for sy = ⟨s, y⟩ > 0.

    By BFGS; by the self-scaled Broyden method for sbs = ⟨s, H⁻¹ s⟩, where that is known.
    """
    hy, rho = h @ y, 1.0 / sy
    yhy = jnp.vdot(y, hy)
    both = jnp.outer(s, hy)
    if sbs is None:
        return h - rho * (both + both.T) + rho * (1.0 + rho * yhy) * jnp.outer(s, s)
    known &= yhy > 0
    safe = jnp.where(known, yhy, sy)
    phi, tau = _scaled_broyden(jnp.where(known, sbs, sy) * rho, safe * rho, s.size)
    phi, tau = (jnp.where(known & (tau > 0), x, 1.0) for x in (phi, tau))
    change = (phi - 1.0) / safe * jnp.outer(hy, hy) - phi * rho * (both + both.T)
    return (h + change) / tau + rho * (1.0 + phi * rho * yhy / tau) * jnp.outer(s, s)


def _scaled_broyden(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """φ and τ from b = ⟨s, H⁻¹ s⟩ / ⟨s, y⟩ and h = ⟨y, H y⟩ / ⟨s, y⟩.

    b h ≥ 1, by Cauchy and Schwarz. θ is the parameter of Broyden's class for H⁻¹, in its interval.
    """
    a = jnp.maximum(b * h - 1.0, jnp.finfo(h.dtype).eps)
    low = jnp.minimum(1.0, h * (1.0 - jnp.sqrt(a / (1.0 + a))))
    theta = jnp.maximum((low - 1.0) / a, jnp.minimum(1.0 / low, (1.0 - b) / b))
    sigma = 1.0 + a * theta
    root = jnp.abs(sigma) ** (-1.0 / max(n - 1, 1))
    positive = theta > 0
    most = jnp.where(positive, 1.0 / jnp.where(positive, theta, 1.0), jnp.inf)
    shrunk = jnp.minimum(1.0, 1.0 / b)
    tau = jnp.where(positive, shrunk * jnp.minimum(root, most), jnp.minimum(shrunk * root, sigma))
    return (1.0 - theta) / sigma, tau
