r"""L-BFGS with a strong Wolfe line search, for full batches and mini-batches.

    d = −H g,   α by line search along d,   s = α d,   y = ∇f(θ + s) − ∇f(θ)

H is built from the last m pairs (s, y) by the two-loop recursion. Both gradients of y are those of
the same objective, with the same batch and dropout masks; the line search has already computed the
second. So the pairs hold curvature without sampling noise on mini-batches too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import kronecker
from jdl.optim.context import UpdateContext, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.linesearch import LineSearchResult
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


class LBFGSState(NamedTuple):
    """L-BFGS's state: 2m + 2 gradients' worth of memory for m pairs.

    Attributes:
      learning_rate: the first trial step, float32; change it with `optax.tree.set`.
      s: steps, leading axis m, a ring buffer.
      y: gradient differences, likewise.
      rho: 1 / ⟨s, y⟩, [m]; 0 for a slot that is empty.
      stored: pairs stored since the history was last cleared, int32.
      scale: the diagonal D, shaped as the parameters; the factors of `scaling="kronecker"`;
        otherwise ().
      votes: the moving average of +1 for a step that D foretold better than I and −1 for one that
        it foretold worse; 1 for `scaling="diagonal"`.
      value: f after the last update, inf before the first; with `grad`, for
        `optax.value_and_grad_from_state`, which saves full-batch loops every second evaluation.
      grad: ∇f at that point.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    s: PyTree
    y: PyTree
    rho: jax.Array
    stored: jax.Array
    scale: PyTree
    votes: jax.Array
    value: jax.Array
    grad: Params
    diagnostics: Diagnostics


def lbfgs(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    memory_size: int = 10,
    memory_dtype: Any = None,
    scaling: str = "auto",
    damping: float = 0.01,
    factors_every: int = 10,
    guard: str = "cautious",
    cautious: float = 1e-6,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_evaluations: int = 20,
    search: Search = wolfe,
) -> optax.GradientTransformationExtraArgs:
    r"""Limited-memory BFGS.

        H = Vₘᵀ … V₁ᵀ H₀ V₁ … Vₘ + Σ ρ s sᵀ terms,   V = I − ρ y sᵀ,   H₀ = (⟨s, y⟩ / ⟨y, D y⟩) D

    `update` needs `value`, `grad` and `value_fn` (or `objective`). Within a chain the direction is
    built from the incoming updates, while the line search uses `grad`; −grad replaces a direction
    that does not descend.

    Args:
      learning_rate: the line search's first trial step, > 0, or a schedule. While the history is
        empty, −grad is scaled to this length where it is longer.
      memory_size: m ≥ 0, how many pairs; 0 for steepest descent.
      memory_dtype: the type pairs are stored in; None for the parameters' own, at least float32.
      scaling: "diagonal" for a D updated by BFGS on the diagonal, for badly scaled parameters;
        "scalar" for D = I, which needs one gradient's memory less; "auto" for the first where D y
        lies closer to s than y does for most new pairs, else the second; "none" for H₀ = I;
        "kronecker" for Kronecker factors of the model (D = (F + λ)⁻¹), which needs `objective` and
        K-FAC's memory, and on deep networks with large batches is worth it many times over.
      damping: λ > 0 of `scaling="kronecker"`, in units of the curvature of the mean loss.
      factors_every: steps from one refresh of those factors to the next, ≥ 1.
      guard: "cautious" leaves out pairs of negligible or negative curvature; "powell" corrects
        them by moving y towards H⁻¹ s.
      cautious: ε in [0, 1); a pair enters if ⟨s, y⟩ > ε ‖s‖ ‖y‖.
      c1: sufficient decrease of the line search, in (0, c2).
      c2: curvature of the line search, in (c1, 1).
      max_evaluations: maximum trials of the line search, ≥ 1.
      search: the line search, a `jdl.optim.transformation.Search`.

    Returns:
      An optax transformation, whose updates are the whole step α d.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real, at
        `update` for missing extras.

    >>> def f(x):
    ...     return jnp.sum(jnp.array([1.0, 10.0]) * jnp.square(x - 1.0))
    >>> optimizer, x = lbfgs(), jnp.zeros(2)
    >>> state = optimizer.init(x)
    >>> for _ in range(6):
    ...     value, grad = jax.value_and_grad(f)(x)
    ...     updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
    ...     x = optax.apply_updates(x, updates)
    >>> [round(float(xi), 3) for xi in x]
    [1.0, 1.0]

    References:
      Nocedal & Wright, Numerical Optimization (2006), algorithms 7.4 and 7.5; procedure 18.2.
      Gilbert & Lemaréchal, Some numerical experiments with variable-storage quasi-Newton algorithms
      (1989), section 4.2: the diagonal.
      Li & Fukushima, On the global convergence of the BFGS method for nonconvex unconstrained
      optimization problems (2001): cautious updates.
      Schraudolph, Yu & Günter, A stochastic quasi-Newton method for online convex optimization
      (2007): both gradients of a pair on one batch.
    """
    check_options(
        memory_size=memory_size or 1,
        max_evaluations=max_evaluations,
        cautious=cautious,
        c2=c2,
        factors_every=factors_every,
    )
    check.one_of("scaling", scaling, ["auto", "diagonal", "scalar", "none", "kronecker"])
    check.in_range("damping", damping, 0.0, open_low=True)
    diagonal = scaling in ("auto", "diagonal")
    factors = kronecker.preconditioner(every=factors_every) if scaling == "kronecker" else None
    check.one_of("guard", guard, ["cautious", "powell"])
    check.in_range("c1", c1, 0.0, c2, open_low=True, open_high=True)

    def init(params: Params) -> dict[str, Any]:
        def like(x: jax.Array, fill: float, *lead: int) -> jax.Array:
            return jnp.full((*lead, *x.shape), fill, memory_dtype or tree.accumulator(x.dtype))

        scale: PyTree = ()
        if diagonal:
            scale = jax.tree.map(lambda x: like(x, 1.0), params)
        elif factors is not None:
            scale = factors.init(params)
        return {
            "s": jax.tree.map(lambda x: like(x, 0.0, memory_size), params),
            "y": jax.tree.map(lambda x: like(x, 0.0, memory_size), params),
            "rho": jnp.zeros((memory_size,), scalar_dtype(params)),
            "stored": jnp.zeros((), jnp.int32),
            "scale": scale,
            "votes": jnp.full((), float(scaling == "diagonal"), scalar_dtype(params)),
            "value": jnp.full((), jnp.inf, scalar_dtype(params)),
            "grad": jax.tree.map(jnp.zeros_like, params),
        }

    def direction(ctx: UpdateContext, state: LBFGSState) -> tuple[PyTree, jax.Array, PyTree]:
        scale, scaled = state.scale, lambda x: x
        if diagonal:
            scaled = lambda x: tree.where(state.votes > 0.6, _times(scale, x), x)  # noqa: E731
        elif factors is not None:
            k, lam = state.diagnostics.iterations, jnp.asarray(damping, ctx.dtype)
            key = jax.random.fold_in(jax.random.key(0), k)
            scale, scaled = factors.step(scale, ctx, None, lam, k, key, ctx.active)
        first = scaled if factors is not None else lambda x: x
        fitted = scaling != "none"
        step = tree.scale(-1.0, _two_loop(ctx.updates, state, scaled, first, fitted))
        return *descending(step, ctx), scale

    def accept(
        ctx: UpdateContext, state: LBFGSState, proposal: tuple[PyTree, jax.Array, PyTree]
    ) -> Step:
        direction, descends, scale = proposal
        state = state._replace(scale=scale)
        # Without curvature −grad has no scale of its own: the first trial goes at most `rate` far.
        rate = state.learning_rate.astype(ctx.dtype)
        unscaled = ((state.stored == 0) & (factors is None)) | ~descends
        first = jnp.where(unscaled, bounded_scale(direction, ctx, rate), rate)
        limits = {"c1": c1, "c2": c2, "max_evaluations": max_evaluations}
        found = search(ctx, direction, first, state.diagnostics, **limits)
        fields = remembered(ctx, state, direction, descends, found)
        own = 0.0 if factors is None else factors.gradients * ctx.curvature_share()
        work = found.evaluations.astype(jnp.float32) + own
        return along(direction, found, descends, fields, gradients=work)

    def remembered(
        ctx: UpdateContext,
        state: LBFGSState,
        direction: PyTree,
        descends: jax.Array,
        found: LineSearchResult,
    ) -> dict[str, Any]:
        """The next state's fields: the history with the pair of this step in it."""
        assert found.grad is not None  # backtracking alone gives none
        moved = found.step > 0
        nothing = jax.tree.map(jnp.zeros_like, ctx.params)
        step = tree.where(moved, tree.scale(found.step, direction), nothing)
        change = jax.tree.map(jnp.subtract, found.grad, ctx.grad)
        if guard == "powell":
            # B s = H⁻¹ s = −α · updates costs nothing; along −grad H was not used.
            bs = tree.scale(-found.step, ctx.updates)
            change = tree.where(descends, _powell(step, change, bs), change)
        s, y, rho, stored = _remember(state, step, change, moved, cautious)
        failed = ctx.active & ~moved
        scale, votes = state.scale, state.votes
        if diagonal:
            new = (_rescale(scale, step, change), 0.9 * votes + 0.1 * _vote(scale, step, change))
            scale, voted = tree.where(stored > state.stored, new, (scale, votes))
            votes = voted if scaling == "auto" else votes
            scale = tree.where(failed, jax.tree.map(jnp.ones_like, scale), scale)
        return {
            "s": s,
            "y": y,
            # After a failed search along a quasi-Newton direction the history is not trusted.
            "rho": jnp.where(failed, 0.0, rho),
            "stored": jnp.where(failed, 0, stored),
            "scale": scale,
            "votes": votes,
            "value": jnp.where(ctx.finite, found.value, jnp.inf),
            "grad": tree.where(ctx.finite, found.grad, nothing),
        }

    return second_order(
        "lbfgs", LBFGSState, learning_rate, init=init, direction=direction, accept=accept
    )


def _two_loop(
    grad: PyTree, state: LBFGSState, scaled: Callable[[PyTree], PyTree], first: Any, fitted: bool
) -> PyTree:
    """H g by the two-loop recursion over all m slots, newest first, then oldest first.

    `scaled` is D, `first` H without pairs; not `fitted`, H₀ is always `first`. Empty slots have
    ρ = 0 and change nothing; a fixed count is a loop that reverse mode can differentiate.
    """
    m = state.rho.shape[0]
    dtype = state.rho.dtype
    if m == 0:
        return first(grad)

    def pair(ring: PyTree, slot: jax.Array) -> PyTree:
        return jax.tree.map(
            lambda r, g: jax.lax.dynamic_index_in_dim(r, slot, keepdims=False).astype(g.dtype),
            ring,
            grad,
        )

    def newest_first(j: jax.Array, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        q, alphas = carry
        slot = (state.stored - 1 - j) % m
        alpha = state.rho[slot] * tree.vdot(pair(state.s, slot), q).astype(dtype)
        return tree.add_scaled(q, -alpha, pair(state.y, slot)), alphas.at[slot].set(alpha)

    def oldest_first(j: jax.Array, r: PyTree, alphas: jax.Array) -> PyTree:
        slot = (state.stored + j) % m
        beta = state.rho[slot] * tree.vdot(pair(state.y, slot), r).astype(dtype)
        return tree.add_scaled(r, alphas[slot] - beta, pair(state.s, slot))

    q, alphas = jax.lax.fori_loop(0, m, newest_first, (grad, jnp.zeros((m,), dtype)))
    if fitted:
        newest = pair(state.y, (state.stored - 1) % m)
        rho_yy = state.rho[(state.stored - 1) % m] * tree.vdot(newest, scaled(newest)).astype(dtype)
        known = rho_yy > 0
        scale = 1.0 / jnp.where(known, rho_yy, 1.0)
        q = tree.where(known, tree.scale(scale, scaled(q)), first(q))
    return jax.lax.fori_loop(0, m, lambda j, r: oldest_first(j, r, alphas), q)


def _times(scale: PyTree, x: PyTree) -> PyTree:
    return jax.tree.map(lambda d, x: d.astype(x.dtype) * x, scale, x)


def _vote(scale: PyTree, s: PyTree, y: PyTree) -> jax.Array:
    """1 where D y is closer in direction to s than y is, −1 where it is farther off."""
    dy = _times(scale, y)
    return jnp.sign(tree.vdot(s, dy) * tree.norm(y) - tree.vdot(s, y) * tree.norm(dy))


def _rescale(scale: PyTree, s: PyTree, y: PyTree) -> PyTree:
    """D after the pair (s, y): 1/D is the diagonal of the BFGS update of diag(φ/D), φ the fit."""
    sy = tree.vdot(s, y)
    b = jax.tree.map(lambda d: 1.0 / d, scale)
    bs = jax.tree.map(lambda b, s: b * s.astype(b.dtype), b, s)
    sbs = tree.vdot(s, bs)
    fit = tree.vdot(y, _times(scale, y)) / sy

    def leaf(b: jax.Array, bs: jax.Array, y: jax.Array) -> jax.Array:
        f, yy = fit.astype(b.dtype), jnp.square(y.astype(b.dtype)) / sy.astype(b.dtype)
        new = f * (b - jnp.square(bs) / sbs.astype(b.dtype)) + yy
        # For a parameter that moved alone the difference is zero: 1/D keeps a floor.
        return 1.0 / jnp.maximum(new, 1e-3 * f * b)

    new = jax.tree.map(leaf, b, bs, y)
    return tree.where(tree.all_finite(new), new, scale)


def _powell(s: PyTree, y: PyTree, bs: PyTree) -> PyTree:
    """y, moved towards B s until ⟨s, y⟩ ≥ 0.2 ⟨s, B s⟩."""
    sy, sbs = tree.vdot(s, y), tree.vdot(s, bs)
    gap = sbs - sy
    theta = jnp.where(sy < 0.2 * sbs, 0.8 * sbs / jnp.where(gap > 0, gap, 1.0), 1.0)
    return tree.add_scaled(tree.scale(theta, y), 1.0 - theta, bs)


def _remember(
    state: LBFGSState, s: PyTree, y: PyTree, moved: jax.Array, cautious: float
) -> tuple[PyTree, PyTree, jax.Array, jax.Array]:
    """The history with the pair (s, y), if its curvature is large enough."""
    dtype = state.rho.dtype
    if not state.rho.size:
        return state.s, state.y, state.rho, state.stored
    sy, ss, yy = (tree.vdot(a, b).astype(dtype) for a, b in ((s, y), (s, s), (y, y)))
    good = moved & (sy > cautious * jnp.sqrt(ss) * jnp.sqrt(yy)) & jnp.isfinite(1.0 / sy)
    slot = state.stored % state.rho.shape[0]

    def write(ring: jax.Array, x: jax.Array) -> jax.Array:
        return ring.at[slot].set(jnp.where(good, x.astype(ring.dtype), ring[slot]))

    rho = state.rho.at[slot].set(jnp.where(good, 1.0 / jnp.where(good, sy, 1.0), state.rho[slot]))
    stored = state.stored + good.astype(jnp.int32)
    return jax.tree.map(write, state.s, s), jax.tree.map(write, state.y, y), rho, stored
