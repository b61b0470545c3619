r"""Hessian-free optimization: truncated Newton steps from curvature-vector products alone.

    minimize over δ:   q(δ) = ⟨g, δ⟩ + ½⟨δ, (B + λI) δ⟩     by conjugate gradients

B is the Gauss-Newton matrix (or the Hessian) on the objective's curvature batch, met only in
products B v. What makes the method robust is around that solve: Levenberg-Marquardt damping λ by
the reduction ratio, an early stop once CG's progress slows, backtracking over its iterates by the
true f, a warm start from the last δ, and a line search that no step escapes.

On mini-batches many CG iterations, and a long memory of the last δ, fit the batch's own noise; few
iterations, by a Kronecker preconditioner, do best. On a deep autoencoder, with batches of 500 to
1,000 and half of each for the curvature,

    hessian_free(
        preconditioner=kronecker.preconditioner(every=20), max_cg_iterations=2, warm_start=0.5,
        num_candidates=1, damping=1.0, damping_decrease=0.87, damping_increase=1.15,
        damping_minimum=1e-4,
    )

came to a quarter of the error that 8 iterations by the diagonal preconditioner left after the same
two minutes (`make bench-optim`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Batch, Params, PyTree
from jdl.optim import damping as damping_rules
from jdl.optim import diagnostics as diag
from jdl.optim import kronecker, linear_cg, linesearch
from jdl.optim.context import (
    ScalarOrSchedule,
    UpdateContext,
    check_params,
    check_scale,
    current_rate,
    descending,
    gather,
    hessian_product,
    schedule_value,
)
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.preconditioner import Preconditioner, diagonal
from jdl.optim.result import ResultCode


class HessianFreeState(NamedTuple):
    """What Hessian-free optimization carries from step to step: a gradient's memory.

    The diagonal preconditioner takes another; the Kronecker factors of a layer of m inputs and n
    outputs 2 (m² + n²) numbers. During an update CG holds six gradients more, the diagonal
    preconditioner two, and `num_candidates` iterates.

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

    `update` needs `value`, `grad` and `value_fn`, or `objective`, which Gauss-Newton products need.
    Within a chain the model's gradient is the incoming update, while reductions, line search and
    descent are judged by `grad`; a direction that does not descend gives way to −grad.

    Args:
      learning_rate: the factor on CG's solution before backtracking, > 0, or a schedule.
      curvature: "gauss_newton", "hessian", or "auto": Gauss-Newton where there is an objective.
      damping: the first λ ≥ 0, in units of the curvature of the mean loss.
      damping_increase: λ's factor when the reduction ratio is below ¼, ≥ 1; 1 with a decrease of 1
        keeps λ.
      damping_decrease: λ's factor when it is above ¾, in (0, 1].
      damping_minimum: the least λ, ≥ 0.
      trust_region: the first radius of a trust region (Steihaug), which then stands in for damping
        and warm start, > 0; the choice for true Hessians of either sign. None for damping.
      max_cg_iterations: CG iterations a step at most, ≥ 1.
      progress: CG ends when an iteration's share in q's decrease, averaged over the last tenth of
        them (at least 10), falls below this, ≥ 0.
      tolerance: CG ends when its residual is this small relative to the gradient, in [0, 1).
      warm_start: factor on the last δ to start CG from, in [0, 1]; 0 starts from zero.
      num_candidates: how many CG iterates, spaced by factors of 1.3 and ending with the last, are
        kept for backtracking, ≥ 1; each takes a gradient's memory during the step.
      preconditioner: "diagonal" for M = (diag + λ)^¾, "kronecker" for K-FAC's factors, a
        `jdl.optim.preconditioner.Preconditioner` such as `diagonal(power=1.0)`, or None.
      l2_reg: μ ≥ 0; adds ½ μ ‖θ‖² to f, in values, gradient and curvature alike.
      structural_damping: κ ≥ 0, for recurrent networks; adds κ λ Hᵀ H / B to the curvature CG
        solves with, H the Jacobian of the hidden units' activations, so that steps which would
        upset them are short. ρ is judged without it. Needs `hidden` and an objective.
      hidden: `hidden(params, batch) -> activations`, all of a batch's, any pytree.
      c1: sufficient decrease of the line search, in (0, 1).
      max_evaluations: trials of the line search at most, ≥ 1.
      seed: of the preconditioner's draws.

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
    check_scale("learning_rate", learning_rate)
    check.one_of("curvature", curvature, ["auto", "gauss_newton", "hessian"])
    if not isinstance(preconditioner, Preconditioner):
        check.one_of("preconditioner", preconditioner, ["diagonal", "kronecker", None])
    named: dict[str, Callable[[], Preconditioner]] = {
        "diagonal": diagonal,
        "kronecker": kronecker.preconditioner,
    }
    solver = named[preconditioner]() if isinstance(preconditioner, str) else preconditioner
    check.in_range("l2_reg", l2_reg, 0.0)
    check.in_range("structural_damping", structural_damping, 0.0)
    check.argument(
        (structural_damping > 0) == (hidden is not None),
        "hidden",
        "hidden(params, batch) -> activations with structural damping, and None without",
        hidden,
    )
    check.in_range("damping", damping, 0.0)
    check.in_range("damping_increase", damping_increase, 1.0)
    check.in_range("damping_decrease", damping_decrease, 0.0, 1.0, open_low=True)
    check.in_range("damping_minimum", damping_minimum, 0.0)
    check.in_range("progress", progress, 0.0)
    check.in_range("tolerance", tolerance, 0.0, 1.0, open_high=True)
    check.in_range("warm_start", warm_start, 0.0, 1.0)
    check.in_range("c1", c1, 0.0, 1.0, open_low=True, open_high=True)
    check.positive_ints(
        max_cg_iterations=max_cg_iterations,
        num_candidates=num_candidates,
        max_evaluations=max_evaluations,
    )
    if trust_region is not None:
        check.in_range("trust_region", trust_region, 0.0, open_low=True)
    first_damping = 0.0 if trust_region is not None else damping

    def init(params: Params) -> HessianFreeState:
        check_params("hessian_free", params)
        return HessianFreeState(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            damping=jnp.array(first_damping, jnp.float32),
            radius=jnp.array(trust_region or jnp.inf, jnp.float32),
            direction=jax.tree.map(jnp.zeros_like, params),
            preconditioner=() if solver is None else solver.init(params),
            diagnostics=diag.init(first_damping),
        )

    def update(
        updates: PyTree,
        state: HessianFreeState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, HessianFreeState]:
        here = gather("hessian_free", updates, params, **extras)
        objective = here.objective
        if curvature == "gauss_newton":
            here.needed_objective("Gauss-Newton products", ', or use curvature="hessian"')
        rate = current_rate(learning_rate, state)
        use_gauss_newton = False
        data_product = hessian_product(here)
        if objective is not None:
            use_gauss_newton = curvature != "hessian"
            product = objective.gnvp if use_gauss_newton else objective.hvp
            data_product = functools.partial(product, here.params)
        if l2_reg:
            here, updates = _decayed(here, updates, l2_reg)
        scale = rate.astype(here.value.dtype)
        damping_now = state.damping.astype(here.value.dtype)
        active = here.active

        def plain_product(v: PyTree) -> PyTree:
            return tree.add_scaled(data_product(v), l2_reg, v)

        def damped_product(v: PyTree) -> PyTree:
            product = tree.add_scaled(plain_product(v), damping_now, v)
            if hidden is None:
                return product
            gram = _hidden_gram(here, hidden, v)
            return tree.add_scaled(product, structural_damping * damping_now, gram)

        solve, solver_state = None, state.preconditioner
        if solver is not None:
            key = jax.random.fold_in(jax.random.key(seed), state.diagnostics.iterations)
            count = state.diagnostics.iterations
            solver_state, solve = solver.step(
                solver_state, here, plain_product, damping_now, count, key, active
            )

        solution = linear_cg.linear_cg(
            damped_product,
            tree.scale(-1.0, updates),
            tree.scale(warm_start, state.direction)
            if warm_start > 0 and trust_region is None
            else None,
            preconditioner=solve,
            max_iterations=max_cg_iterations,
            tolerance=tolerance,
            progress=progress,
            radius=None if trust_region is None else state.radius.astype(here.value.dtype),
            # An earlier iterate says nothing of how far the model holds: the radius rules alone.
            num_kept=num_candidates if trust_region is None else 1,
            active=active,
        )
        delta, model, candidate_value, tried = _best_candidate(here, solution, scale)
        direction, descends = descending(delta, here)
        # −gradient has no scale of its own: no first trial goes further than the rate.
        length = tree.norm(direction).astype(scale.dtype)
        fallback = tree.scale(1.0 / jnp.maximum(1.0, length), direction)
        direction = tree.where(descends, direction, fallback)
        found = linesearch.backtracking(
            here.value_fn,
            here.params,
            direction,
            here.value,
            tree.vdot(direction, here.grad),
            initial_step=scale,
            # Unknown for −gradient: a value that is not finite sends the search on.
            first_value=jnp.where(descends, candidate_value, jnp.inf),
            noise=here.noise,
            c1=c1,
            shrink=0.7,
            max_evaluations=max_evaluations,
            active=active,
        )
        moved = found.step > 0
        extra_curvature = damping_now * tree.vdot(delta, delta)
        if hidden is not None:
            gram = _hidden_gram(here, hidden, delta)
            extra_curvature += structural_damping * damping_now * tree.vdot(delta, gram)
        ratio = _ratio(here, updates, delta, model, extra_curvature, scale, candidate_value)
        ratio = jnp.where(descends & moved, ratio, -jnp.inf)
        next_damping, next_radius = damping_now, state.radius
        if trust_region is None:
            # Negative curvature cut the solve short, however well the stump was foretold: the model
            # has no minimum until λ makes it convex.
            concave = solution.reason == linear_cg.CURVATURE
            next_damping = damping_rules.update_damping(
                damping_now,
                jnp.where(concave, -jnp.inf, ratio),
                increase=damping_increase,
                decrease=damping_decrease,
                minimum=damping_minimum,
            )
        else:
            edge = (solution.reason == linear_cg.BOUNDARY) | (
                solution.reason == linear_cg.CURVATURE
            )
            held = state.radius.astype(scale.dtype) * found.step / scale
            radius = jnp.where(moved & (ratio < 0.25), held, state.radius.astype(scale.dtype))
            next_radius = damping_rules.trust_radius(radius, ratio, edge)
        nothing = jax.tree.map(jnp.zeros_like, here.params)
        code = diag.ending(found.termination, here.finite, here.stationary, descends)
        concave = (code == ResultCode.ACCEPTED) & (solution.reason == linear_cg.CURVATURE)
        products = solution.products.astype(jnp.float32)
        if solver is not None and objective is None:
            products += solver.products
        share = 1.0 if objective is None else objective.curvature_share()
        told = diag.advance(
            state.diagnostics,
            step_size=found.step,
            termination=jnp.where(concave, ResultCode.NEGATIVE_CURVATURE, code),
            values=found.evaluations + tried,
            gradients=share * solver.gradients if solver and objective is not None else 0.0,
            hessian_products=0.0 if use_gauss_newton else products * share,
            gauss_newton_products=products * share if use_gauss_newton else 0.0,
            linear_iterations=solution.iterations,
            damping=damping_now,
            reduction_ratio=ratio,
            reused=reused,
        )
        new = HessianFreeState(
            learning_rate=rate,
            # An update that could not even start says nothing about the model.
            damping=jnp.where(active, next_damping, damping_now).astype(jnp.float32),
            radius=jnp.where(active, next_radius.astype(jnp.float32), state.radius),
            direction=tree.where(moved & descends, delta, nothing),
            preconditioner=solver_state,
            diagnostics=told,
        )
        return tree.where(moved, tree.scale(found.step, direction), nothing), new

    return optax.GradientTransformationExtraArgs(init, update)


def _best_candidate(
    here: UpdateContext, solution: linear_cg.Solution, scale: jax.Array
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
        value = here.value_fn(tree.add_scaled(here.params, scale, iterate(tried)))
        better = (value < best_value) | ~jnp.isfinite(best_value)
        return tried + 1, jnp.where(better, tried, best), jnp.where(better, value, best_value)

    start = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.full_like(here.value, jnp.inf))
    tried, best, value = jax.lax.while_loop(going, body, start)
    return iterate(best), solution.kept_model[slot(best)], value, tried


def _ratio(
    here: UpdateContext,
    updates: PyTree,
    delta: PyTree,
    model: jax.Array,
    damped: jax.Array,
    scale: jax.Array,
    new_value: jax.Array,
) -> jax.Array:
    """ρ of θ + scale · δ against the undamped model, whose curvature is read off CG's q.

    `damped` is what damping added to ⟨δ, B δ⟩.
    """
    curvature = model - tree.vdot(updates, delta) - 0.5 * damped
    predicted = scale * tree.vdot(here.grad, delta) + scale * scale * curvature
    return damping_rules.reduction_ratio(here.value, new_value, predicted, here.noise)


def _hidden_gram(
    here: UpdateContext, hidden: Callable[[Params, Batch], PyTree], v: PyTree
) -> PyTree:
    """Hᵀ H v / B, H the Jacobian of the hidden units' activations."""

    def activations(params: Params, batch: Batch) -> PyTree:
        return hidden(here.fill(params), batch)

    objective = here.needed_objective("structural damping")
    return objective.gram_product(activations, here.params, v)


def _decayed(here: UpdateContext, updates: PyTree, l2_reg: float) -> tuple[UpdateContext, PyTree]:
    """The objective around θ, and the model's gradient, with ½ μ ‖θ‖² added."""

    def penalty(params: Params) -> jax.Array:
        return 0.5 * l2_reg * tree.vdot(params, params).astype(here.value.dtype)

    value_fn = here.value_fn
    grad = tree.add_scaled(here.grad, l2_reg, here.params)
    here = here._replace(
        value=here.value + penalty(here.params),
        grad=grad,
        value_fn=lambda params: value_fn(params) + penalty(params),
        stationary=tree.vdot(grad, grad) == 0,
    )
    return here, tree.add_scaled(updates, l2_reg, here.params)
