r"""Hessian-free optimization: truncated Newton steps from curvature-vector products alone.

    minimize over δ:   q(δ) = ⟨g, δ⟩ + ½⟨δ, (B + λI) δ⟩     by conjugate gradients

B is the Gauss-Newton matrix (or the Hessian) on the objective's curvature batch, used only in
products B v. Around that solve are Levenberg-Marquardt damping λ by the reduction ratio, an early
stop once CG's progress slows (`linear_cg`), a choice among its iterates by f itself, a warm start
from the last δ, and a line search for every step.

On mini-batches many CG iterations, and much of the last δ, fit the batch's noise; few iterations
with a Kronecker preconditioner do best. On a deep autoencoder, with batches of 500 to 1,000 and
half of each for the curvature,

    hessian_free(
        preconditioner=kronecker.preconditioner(every=20), max_cg_iterations=2, warm_start=0.5,
        num_candidates=1, damping=1.0, damping_decrease=0.87, damping_increase=1.15,
        damping_minimum=1e-4,
    )

reached a quarter of the error of 8 iterations with the diagonal preconditioner in the same two
minutes (`make bench-optim`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Batch, Params, PyTree
from jdl.optim import kronecker, linear_cg, linesearch
from jdl.optim.context import UpdateContext, hessian_product
from jdl.optim.damping import reduction_ratio, trust_radius, update_damping
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.preconditioner import Preconditioner, diagonal
from jdl.optim.result import ResultCode
from jdl.optim.transformation import (
    ScalarOrSchedule,
    Step,
    along,
    check_options,
    descending,
    second_order,
)

PRECONDITIONERS: dict[str, Callable[[], Preconditioner]] = {
    "diagonal": diagonal,
    "kronecker": kronecker.preconditioner,
}


class HessianFreeState(NamedTuple):
    """Hessian-free optimization's state, of one gradient's size without a preconditioner.

    The diagonal preconditioner adds one more; the Kronecker factors of a layer of m inputs and n
    outputs add 2 (m² + n²) numbers. During an update CG takes the memory of six further gradients,
    the diagonal preconditioner of two, and the kept iterates of `num_candidates`.

    Attributes:
      learning_rate: the factor on CG's solution, float32; change it with `optax.tree.set`.
      damping: λ for the next step, float32; likewise.
      radius: Δ of the trust region, where one is used, float32.
      direction: the last δ, which the next CG starts from.
      preconditioner: its state; () without.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    damping: jax.Array
    radius: jax.Array
    direction: PyTree
    preconditioner: PyTree
    diagnostics: Diagnostics


def hessian_free(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    curvature: str = "auto",
    damping: float = 0.3,
    damping_increase: float = 1.5,
    damping_decrease: float = 2 / 3,
    damping_minimum: float = 1e-10,
    trust_region: float | None = None,
    max_cg_iterations: int = 250,
    progress: float = 5e-4,
    tolerance: float = 1e-3,
    warm_start: float = 0.95,
    num_candidates: int = 8,
    preconditioner: str | Preconditioner | None = None,
    l2_reg: float = 0.0,
    structural_damping: float = 0.0,
    hidden: Callable[[Params, Batch], PyTree] | None = None,
    c1: float = 1e-2,
    max_evaluations: int = 40,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimization after Martens.

    `update` needs `value`, `grad` and `value_fn` or `objective`; Gauss-Newton needs `objective`.
    Within a chain the incoming update is the gradient of the quadratic model, while reduction ratio
    and line search use `grad`; −grad replaces a direction that does not descend.

    Args:
      learning_rate: the factor on CG's solution before backtracking, > 0, or a schedule.
      curvature: "gauss_newton", "hessian", or "auto": Gauss-Newton where there is an objective.
      damping: the first λ ≥ 0, in units of the curvature of the mean loss.
      damping_increase: λ's factor when the reduction ratio is below ¼, ≥ 1; 1 with a decrease of 1
        keeps λ.
      damping_decrease: λ's factor when it is above ¾, in (0, 1].
      damping_minimum: the least λ, ≥ 0.
      trust_region: the first radius of a trust region (Steihaug) in place of damping and warm
        start, > 0; for Hessians that may be indefinite. None for damping.
      max_cg_iterations: maximum CG iterations per step, ≥ 1.
      progress: CG ends when an iteration's relative decrease of q, averaged over the last tenth of
        them (at least 10), falls below this, ≥ 0.
      tolerance: CG ends when its residual is this small relative to the gradient, in [0, 1).
      warm_start: factor on the last δ to start CG from, in [0, 1]; 0 starts from zero.
      num_candidates: how many CG iterates, spaced by factors of 1.3 and ending with the last, to
        choose from by f, ≥ 1; each needs a gradient's memory during the step.
      preconditioner: "diagonal" for M = (diag + λ)^¾, "kronecker" for K-FAC's factors, a
        `jdl.optim.preconditioner.Preconditioner` such as `diagonal(power=1.0)`, or None.
      l2_reg: μ ≥ 0; adds ½ μ ‖θ‖² to f, in values, gradient and curvature alike.
      structural_damping: κ ≥ 0, for recurrent networks; adds κ λ Hᵀ H / B to the curvature in CG,
        H the Jacobian of the hidden units' activations, which shortens steps that change them
        much. ρ is computed without it. Needs `hidden` and an objective.
      hidden: `hidden(params, batch) -> activations`, all of a batch's, any pytree.
      c1: sufficient decrease of the line search, in (0, 1).
      max_evaluations: maximum trials of the line search, ≥ 1.
      seed: for the preconditioner's random samples.

    Returns:
      An optax transformation, whose updates are the whole step.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real, at
        `update` for missing extras.

    >>> def f(x):
    ...     return jnp.sum(jnp.array([1.0, 10.0]) * jnp.square(x - 1.0))
    >>> optimizer, x = hessian_free(damping=1e-3), jnp.zeros(2)
    >>> state = optimizer.init(x)
    >>> for _ in range(3):
    ...     value, grad = jax.value_and_grad(f)(x)
    ...     updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
    ...     x = optax.apply_updates(x, updates)
    >>> [round(float(xi), 3) for xi in x]
    [1.0, 1.0]

    References:
      Martens, Deep learning via Hessian-free optimization (2010), section 4.
      Martens & Sutskever, Training deep and recurrent networks with Hessian-free optimization
      (2012), sections 20.5 to 20.11.
      Steihaug, The conjugate gradient method and trust regions (1983).
    """
    check.one_of("curvature", curvature, ["auto", "gauss_newton", "hessian"])
    if not isinstance(preconditioner, Preconditioner):
        check.one_of("preconditioner", preconditioner, [*PRECONDITIONERS, None])
        solver = None if preconditioner is None else PRECONDITIONERS[str(preconditioner)]()
    else:
        solver = preconditioner
    check_options(
        damping=damping,
        damping_increase=damping_increase,
        damping_decrease=damping_decrease,
        damping_minimum=damping_minimum,
        trust_region=trust_region,
        max_cg_iterations=max_cg_iterations,
        progress=progress,
        tolerance=tolerance,
        warm_start=warm_start,
        num_candidates=num_candidates,
        l2_reg=l2_reg,
        structural_damping=structural_damping,
        c1=c1,
        max_evaluations=max_evaluations,
    )
    check.argument(
        (structural_damping > 0) == (hidden is not None),
        "hidden",
        "hidden(params, batch) -> activations with structural damping, and None without",
        hidden,
    )
    first_damping = 0.0 if trust_region is not None else damping

    def init(params: Params) -> dict[str, Any]:
        return {
            "damping": jnp.array(first_damping, jnp.float32),
            "radius": jnp.array(trust_region or jnp.inf, jnp.float32),
            "direction": jax.tree.map(jnp.zeros_like, params),
            "preconditioner": () if solver is None else solver.init(params),
        }

    def prepare(ctx: UpdateContext) -> UpdateContext:
        if curvature == "gauss_newton":
            ctx.needed_objective("Gauss-Newton products", ', or use curvature="hessian"')
        return _regularized(ctx, l2_reg) if l2_reg else ctx

    def direction(ctx: UpdateContext, state: HessianFreeState) -> _Proposal:
        lam = state.damping.astype(ctx.dtype)
        data_product = hessian_product(ctx)
        if ctx.objective is not None:
            of = ctx.objective.hvp if curvature == "hessian" else ctx.objective.gnvp
            data_product = functools.partial(of, ctx.params)

        def product(v: PyTree) -> PyTree:
            return tree.add_scaled(data_product(v), l2_reg, v)

        def damped_product(v: PyTree) -> PyTree:
            damped = tree.add_scaled(product(v), lam, v)
            if hidden is None:
                return damped
            gram = _hidden_gram(ctx, hidden, v)
            return tree.add_scaled(damped, structural_damping * lam, gram)

        solve, solver_state = None, state.preconditioner
        if solver is not None:
            count = state.diagnostics.iterations
            key = jax.random.fold_in(jax.random.key(seed), count)
            solver_state, solve = solver.step(
                solver_state, ctx, product, lam, count, key, ctx.active
            )
        radius, warm, num_kept = None, warm_start, num_candidates
        if trust_region is not None:
            # The radius already bounds the step, so only the last iterate is a candidate.
            radius, warm, num_kept = state.radius.astype(ctx.dtype), 0.0, 1
        solution = linear_cg.linear_cg(
            damped_product,
            tree.scale(-1.0, ctx.updates),
            tree.scale(warm, state.direction) if warm > 0 else None,
            preconditioner=solve,
            max_iterations=max_cg_iterations,
            tolerance=tolerance,
            progress=progress,
            radius=radius,
            num_kept=num_kept,
            active=ctx.active,
        )
        scale = state.learning_rate.astype(ctx.dtype)
        return _Proposal(solution, solver_state, *_best_candidate(ctx, solution, scale))

    def accept(ctx: UpdateContext, state: HessianFreeState, proposal: _Proposal) -> Step:
        delta, solution = proposal.delta, proposal.solution
        lam, scale = (x.astype(ctx.dtype) for x in (state.damping, state.learning_rate))
        direction, descends = descending(delta, ctx, bounded=True)
        found = linesearch.backtracking(
            ctx.value_fn,
            ctx.params,
            direction,
            ctx.value,
            tree.vdot(direction, ctx.grad),
            initial_step=scale,
            # Not evaluated for −gradient: infinity makes the search evaluate it.
            first_value=jnp.where(descends, proposal.value, jnp.inf),
            noise=ctx.noise,
            c1=c1,
            shrink=0.7,
            max_evaluations=max_evaluations,
            active=ctx.active,
        )
        moved = found.step > 0
        damped = lam * tree.vdot(delta, delta)  # what damping added to ⟨δ, B δ⟩
        if hidden is not None:
            gram = _hidden_gram(ctx, hidden, delta)
            damped += structural_damping * lam * tree.vdot(delta, gram)
        ratio = _ratio(ctx, proposal, damped, scale)
        ratio = jnp.where(descends & moved, ratio, -jnp.inf)
        nothing = jax.tree.map(jnp.zeros_like, ctx.params)
        fields = {
            **steered(ctx, state, solution.reason, found.step, ratio),
            "direction": tree.where(moved & descends, delta, nothing),
            "preconditioner": proposal.preconditioner,
        }
        work = _work(ctx, solution.products, solver, curvature == "hessian")
        step = along(
            direction,
            found,
            descends,
            fields,
            values=found.evaluations + proposal.tried,
            linear_iterations=solution.iterations,
            damping=lam,
            reduction_ratio=ratio,
            **work,
        )
        concave = (step.code == ResultCode.ACCEPTED) & descends
        concave &= solution.reason == linear_cg.CURVATURE
        return step._replace(code=jnp.where(concave, ResultCode.NEGATIVE_CURVATURE, step.code))

    def steered(
        ctx: UpdateContext,
        state: HessianFreeState,
        reason: jax.Array,
        step: jax.Array,
        ratio: jax.Array,
    ) -> dict[str, jax.Array]:
        """λ and Δ for the next step; unchanged where no step could be computed."""
        next_damping, next_radius = state.damping.astype(ctx.dtype), state.radius
        if trust_region is None:
            # Where negative curvature ended CG, the model has no minimum until λ makes it convex,
            # however good the prediction.
            next_damping = update_damping(
                next_damping,
                jnp.where(reason == linear_cg.CURVATURE, -jnp.inf, ratio),
                increase=damping_increase,
                decrease=damping_decrease,
                minimum=damping_minimum,
            )
        else:
            edge = (reason == linear_cg.BOUNDARY) | (reason == linear_cg.CURVATURE)
            radius = state.radius.astype(ctx.dtype)
            taken = radius * step / state.learning_rate.astype(ctx.dtype)
            radius = jnp.where((step > 0) & (ratio < 0.25), taken, radius)
            next_radius = trust_radius(radius, ratio, edge)
        return {
            "damping": jnp.where(ctx.active, next_damping.astype(jnp.float32), state.damping),
            "radius": jnp.where(ctx.active, next_radius.astype(jnp.float32), state.radius),
        }

    return second_order(
        "hessian_free",
        HessianFreeState,
        learning_rate,
        init=init,
        direction=direction,
        accept=accept,
        prepare=prepare,
        damping=first_damping,
    )


class _Proposal(NamedTuple):
    solution: linear_cg.Solution
    preconditioner: PyTree  # its next state
    delta: PyTree  # δ: the kept CG iterate to use
    model: jax.Array  # q(δ)
    value: jax.Array  # f(θ + learning_rate · δ)
    tried: jax.Array  # evaluations of f spent on the choice


def _best_candidate(
    ctx: UpdateContext, solution: linear_cg.Solution, scale: jax.Array
) -> tuple[PyTree, jax.Array, jax.Array, jax.Array]:
    """The kept CG iterate to use: back from the last as long as f falls.

    Returns:
      The iterate, its q, f at θ + scale · iterate, and the evaluations spent.
    """
    size = solution.kept_model.shape[0]
    available = jnp.minimum(solution.kept_count, size)

    def slot(back: jax.Array) -> jax.Array:
        return (solution.kept_count - 1 - back) % size

    def iterate(back: jax.Array) -> PyTree:
        return jax.tree.map(lambda ring: ring[slot(back)], solution.kept)

    def going(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tried, best, _ = carry
        return (tried < available) & (best >= tried - 1)

    def body(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        tried, best, best_value = carry
        value = ctx.value_fn(tree.add_scaled(ctx.params, scale, iterate(tried)))
        better = (value < best_value) | ~jnp.isfinite(best_value)
        return tried + 1, jnp.where(better, tried, best), jnp.where(better, value, best_value)

    start = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.full_like(ctx.value, jnp.inf))
    tried, best, value = jax.lax.while_loop(going, body, start)
    return iterate(best), solution.kept_model[slot(best)], value, tried


def _ratio(
    ctx: UpdateContext, proposal: _Proposal, damped: jax.Array, scale: jax.Array
) -> jax.Array:
    """ρ of θ + scale · δ by the undamped model, whose curvature is computed from CG's q."""
    delta = proposal.delta
    curvature = proposal.model - tree.vdot(ctx.updates, delta) - 0.5 * damped
    predicted = scale * tree.vdot(ctx.grad, delta) + scale * scale * curvature
    return reduction_ratio(ctx.value, proposal.value, predicted, ctx.noise)


def _work(
    ctx: UpdateContext, products: jax.Array, solver: Preconditioner | None, use_hessian: bool
) -> dict[str, Any]:
    """The curvature products and gradients of an update, in units of the full batch."""
    share = ctx.curvature_share()
    products = products.astype(jnp.float32)
    if ctx.objective is None:
        own = 0.0 if solver is None else solver.products
        return {"hessian_products": products + own}
    kind = "hessian_products" if use_hessian else "gauss_newton_products"
    return {kind: products * share, "gradients": share * solver.gradients if solver else 0.0}


def _hidden_gram(
    ctx: UpdateContext, hidden: Callable[[Params, Batch], PyTree], v: PyTree
) -> PyTree:
    """Hᵀ H v / B, H the Jacobian of the hidden units' activations."""

    def activations(params: Params, batch: Batch) -> PyTree:
        return hidden(ctx.fill(params), batch)

    objective = ctx.needed_objective("structural damping")
    return objective.gram_product(activations, ctx.params, v)


def _regularized(ctx: UpdateContext, l2_reg: float) -> UpdateContext:
    """The context with ½ μ ‖θ‖² added to f, its gradient and the incoming updates.

    `value_and_grad` stays without it: curvature products add it themselves.
    """

    def penalty(params: Params) -> jax.Array:
        return 0.5 * l2_reg * tree.vdot(params, params).astype(ctx.dtype)

    grad = tree.add_scaled(ctx.grad, l2_reg, ctx.params)
    return ctx._replace(
        updates=tree.add_scaled(ctx.updates, l2_reg, ctx.params),
        value=ctx.value + penalty(ctx.params),
        grad=grad,
        value_fn=lambda params: ctx.value_fn(params) + penalty(params),
        stationary=tree.vdot(grad, grad) == 0,
    )
