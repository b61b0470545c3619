r"""K-FAC: natural gradients by Kronecker factors; step length and momentum by an exact quadratic.

    Δ = (F + λI)⁻¹ ḡ  by factors,      δ = −αΔ + μδ₋,
    (α, μ) minimize  q(δ) = ⟨g, δ⟩ + ½⟨δ, (B + λI) δ⟩

Factors and the gradients in ḡ are averaged over steps, and factors inverted every few. B, the exact
Gauss-Newton matrix, is used only in the 2×2 form of q, on some examples of the batch; λ follows the
reduction ratio on those.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim import quadratic
from jdl.optim.context import UpdateContext
from jdl.optim.damping import reduction_ratio, update_damping
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.kronecker import factors as kronecker
from jdl.optim.kronecker import inverses, moments, summary
from jdl.optim.kronecker.factors import Kronecker
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.probes import SHARING
from jdl.optim.transformation import (
    ScalarOrSchedule,
    Step,
    accepted,
    check_options,
    second_order,
)


class KfacState(NamedTuple):
    """K-FAC's state: the factors, their inverses and two gradients' memory.

    Attributes:
      learning_rate: the factor on δ, float32; change it with `optax.tree.set`.
      damping: λ for the next step, float32; likewise.
      kronecker: factors, inverses, diagonals.
      direction: δ₋, the last step.
      gradient: ḡ, or () without a mean.
      longest: the length of the longest of the last steps, decaying by 5 % a step.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    damping: jax.Array
    kronecker: Kronecker
    direction: PyTree
    gradient: PyTree
    longest: jax.Array
    diagnostics: Diagnostics


def kfac(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: float = 0.1,
    damping_decrease: float = 0.7,
    damping_every: int = 5,
    damping_minimum: float = 1e-4,
    curvature: str = "fisher",
    eigen: bool = False,
    factors_every: int = 5,
    inverses_every: int = 20,
    factors_decay: float = 0.95,
    gradient_decay: float = 0.8,
    model_examples: int = 256,
    kl_clip: float | None = None,
    l2_reg: float = 0.0,
    sharing: str = "expand",
    factors_dtype: str | None = None,
    max_size: int = 2048,
    max_backtracks: int = 4,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC after Martens and Grosse, for any model and any per-example loss.

    `update` needs `value`, `grad` and `objective`. Kernels of dense, convolutional and recurrent
    layers, attention, experts and embeddings, with their biases and in any layout, have Kronecker
    factors, one pair for each of stacked ones; other parameters use a diagonal approximation.
    `jdl.optim.kronecker.describe` lists which is which and the memory; `kfac_for` tells `init` the
    layers, and `jdl.Estimator` does so by itself. The reduction ratio compares f with q on
    `model_examples` examples:

        ρ = 1 + (change of f there − change predicted there) / (change predicted on the whole batch)

    It is evaluated in the steps that change λ, in all steps while its last value was below ½, and
    where a step is longer than all of the last ones. A step with ρ ≤ 0 is halved; after
    `max_backtracks` halvings none is taken.

    With small batches the weights keep moving about the minimum: average them (`Estimator(ema=)`),
    or let `learning_rate` fall.

    Memory for a kernel of D inputs and K outputs: two matrices of each of D + 1 and K, and six
    gradients.

    Args:
      learning_rate: the factor on δ, > 0, or a schedule; 1 steps to the minimum of q.
      damping: the first λ > 0, in units of the curvature of the mean loss.
      damping_decrease: λ's factor per step when ρ > ¾, its inverse when ρ < ¼; in (0, 1).
      damping_every: λ is changed every so many steps (to that power), and after a failed step.
      damping_minimum: the least λ, > 0.
      curvature: "fisher" for factors sampled from the loss's output Hessian,
        "empirical_fisher" for the loss's own gradients, "gauss_newton" for factors without
        sampling, at one backward pass per output.
      eigen: whether to damp and correct in the factors' eigenbases (EKFAC); eigenvectors take about
        ten times as long as inverses.
      factors_every: steps from one refresh of the factors to the next, ≥ 1.
      inverses_every: steps from one inversion to the next at most, ≥ 1; they are also inverted when
        λ has changed by more than a factor of 4.
      factors_decay: decay of the factors' running mean, in [0, 1).
      gradient_decay: decay of ḡ, the gradients' running mean, in [0, 1). A batch's own gradient
        (0) is mostly noise in flat directions, which (F + λI)⁻¹ amplifies; where each batch is all
        data there is no noise, and 0 converges in fewer steps.
      model_examples: examples for q, ≥ 1; all of them where the batch has fewer. Where outputs are
        [B, T, K], a sequence counts as min(T, 16) of them. With too few, a step fits those alone,
        which ρ does not show.
      kl_clip: bound on ½⟨δ, B δ⟩, the predictions' change in nats per example, to which longer
        steps are shortened; > 0, or None for no bound.
      l2_reg: η ≥ 0 of ½η‖θ‖², in gradient and model.
      sharing: of a kernel that is used at several positions of an example: "expand" takes each for
        an example of its own, "reduce" the mean of their inputs and the sum of their gradients.
      factors_dtype: "bfloat16" or "float32", of factors and inverses in memory; None for the
        parameters' type, at least float32.
      max_size: a kernel's side with more coordinates than this has a diagonal factor, ≥ 1.
      max_backtracks: maximum halvings of a step, ≥ 0.
      seed: for the random samples.

    Returns:
      An optax transformation, whose updates are the whole step.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real, at
        `update` for missing extras.

    >>> from jdl.core.objective import Objective
    >>> from jdl.losses import squared_error
    >>> batch = {"x": jnp.diag(jnp.array([1.0, 10.0])), "label": jnp.ones((2, 1))}
    >>> objective = Objective.from_fns(lambda p, b: b["x"] @ p["w"], squared_error, batch)
    >>> optimizer, params = kfac(damping=1e-3), {"w": jnp.zeros((2, 1))}
    >>> @jax.jit
    ... def step(params, state):
    ...     value, grad, _ = objective.value_and_grad(params)
    ...     updates, state = optimizer.update(
    ...         grad, state, params, value=value, grad=grad, objective=objective)
    ...     return optax.apply_updates(params, updates), state
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...     params, state = step(params, state)
    >>> [round(float(wi), 2) for wi in params["w"][:, 0]]  # 1 / x
    [1.0, 0.1]

    References:
      Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature
      (2015): factors section 3, damping 6, step and momentum 6.4 and 7.
      Grosse & Martens, A Kronecker-factored approximate Fisher matrix for convolution layers
      (2016).
      Martens, Ba & Johnson, Kronecker-factored curvature approximations for recurrent neural
      networks (2018).
      Ba, Grosse & Martens, Distributed second-order optimization using Kronecker-factored
      approximations (2017), section 5: the KL clip.
      George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis
      (2018).
      Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network
      architectures (2023): sharing.
    """
    check.one_of("curvature", curvature, moments.CURVATURES)
    check.in_range("damping", damping, 0.0, open_low=True)
    check.in_range("damping_decrease", damping_decrease, 0.0, 1.0, open_low=True, open_high=True)
    check.in_range("damping_minimum", damping_minimum, 0.0, open_low=True)
    check_options(
        factors_every=factors_every,
        inverses_every=inverses_every,
        factors_decay=factors_decay,
        gradient_decay=gradient_decay,
        damping_every=damping_every,
        model_examples=model_examples,
        kl_clip=kl_clip,
        l2_reg=l2_reg,
        max_size=max_size,
    )
    check.positive_int("max_backtracks", max_backtracks + 1)
    check.one_of("sharing", sharing, SHARING)
    if factors_dtype is not None:
        check.one_of("factors_dtype", factors_dtype, ("float32", "bfloat16"))
    options = kronecker.Options(curvature, sharing, factors_decay, eigen, max_size, factors_dtype)

    def init(params: Params) -> dict[str, Any]:
        return {
            "damping": jnp.array(damping, jnp.float32),
            "kronecker": kronecker.init(params, options),
            "direction": jax.tree.map(jnp.zeros_like, params),
            "gradient": jax.tree.map(jnp.zeros_like, params) if gradient_decay else (),
            "longest": jnp.zeros((), jnp.float32),
        }

    def direction(ctx: UpdateContext, state: KfacState) -> _Proposal:
        objective = ctx.needed_objective("the layers' inputs and output gradients")
        found = moments.find_layers(objective, ctx.params)
        summary.log(found, objective, ctx.params, options)
        factors, refreshed, work = refresh(ctx, state, objective, found)
        lam = state.damping.astype(ctx.dtype)
        gradient = ctx.updates
        if l2_reg:
            gradient = tree.add_scaled(ctx.updates, l2_reg, ctx.params)
        mean = gradient
        if gradient_decay:
            count = state.diagnostics.iterations.astype(ctx.dtype)
            kept = jnp.minimum(gradient_decay, count / (count + 1.0))
            mixed = tree.add_scaled(tree.scale(kept, state.gradient), 1.0 - kept, gradient)
            mean = tree.where(ctx.active, mixed, state.gradient)
        natural = kronecker.apply(found, factors, mean, lam)
        subset = quadratic.subset(objective, _examples(objective, ctx.params, model_examples))
        vectors = (natural, state.direction)
        model = quadratic.quadratic(subset, ctx.params, vectors)
        matrix = model.curvature.astype(ctx.dtype)
        gram = quadratic.gram(vectors).astype(ctx.dtype)
        slopes = jnp.stack([tree.vdot(gradient, v) for v in vectors]).astype(ctx.dtype)
        weights = quadratic.solve_pair(matrix + (lam + l2_reg) * gram, slopes)
        if kl_clip is not None:
            divergence = 0.5 * weights @ matrix @ weights
            weights = weights * jnp.sqrt(kl_clip / jnp.maximum(divergence, kl_clip))
        return _Proposal(
            factors=factors,
            refreshed=refreshed,
            factor_work=_factor_work(found, factors, objective, refreshed, work),
            subset=subset,
            model=model._replace(curvature=matrix),
            gram=gram,
            slopes=slopes,
            natural=natural,
            gradient=mean if gradient_decay else (),
            weights=weights * state.learning_rate.astype(ctx.dtype),
        )

    def refresh(
        ctx: UpdateContext, state: KfacState, objective: Objective, found: Layers
    ) -> tuple[Kronecker, jax.Array, jax.Array]:
        """The factors, whether they were refreshed in this update, and the inversions' work."""
        k = state.diagnostics.iterations
        factors = kronecker.fitting(state.kronecker, ctx.params, found, options)
        refreshed = ctx.active & ((k % factors_every == 0) | ~factors.started)
        key = jax.random.fold_in(jax.random.key(seed), k)
        factors = jax.lax.cond(
            refreshed,
            lambda factors: kronecker.refresh_moments(
                objective, ctx.params, found, factors, key, options
            ),
            lambda factors: factors,
            factors,
        )
        factors, work = kronecker.refresh_inverses(
            found,
            factors,
            state.damping.astype(ctx.dtype),
            every=inverses_every,
            count=k,
            whole=refreshed & jnp.any(jnp.stack(factors.refreshes) == 1),
            active=ctx.active,
            axis_name=objective.axis_name,
            mesh=inverses.mesh_of(jax.tree.leaves(ctx.params)[0]),
        )
        return factors, refreshed, work

    def accept(ctx: UpdateContext, state: KfacState, proposal: _Proposal) -> Step:
        objective = ctx.needed_objective("the layers' inputs and output gradients")
        lam, k = state.damping.astype(ctx.dtype), state.diagnostics.iterations

        def step_of(scale: jax.Array) -> PyTree:
            w = scale * proposal.weights
            return tree.add_scaled(tree.scale(w[0], proposal.natural), w[1], state.direction)

        # ρ is needed where λ changes, to see whether a poor model is still poor, and before a step
        # to where the model may not hold: one step 4 times as long as the others has undone 80.
        last = state.diagnostics.reduction_ratio.astype(ctx.dtype)
        length = jnp.sqrt(proposal.weights @ proposal.gram @ proposal.weights)
        measured = (k % damping_every == damping_every - 1) | ~(last > 0.5)
        measured |= length > state.longest.astype(ctx.dtype)

        def ratio_of(scale: jax.Array) -> jax.Array:
            return _reduction_ratio(ctx, proposal, scale, step_of(scale), l2_reg)

        known = jnp.where(measured, -jnp.inf, last)
        tries, scale, last_ratio, ratio = _halved(ctx, ratio_of, known, max_backtracks)
        moved = (last_ratio > 0) & ctx.active & jnp.isfinite(proposal.weights @ proposal.slopes)
        step = tree.where(moved, step_of(scale), jax.tree.map(jnp.zeros_like, ctx.params))
        factor = damping_decrease**damping_every
        next_damping = update_damping(
            lam, ratio, increase=1 / factor, decrease=factor, minimum=damping_minimum
        )
        adapted = ctx.active & ((k % damping_every == damping_every - 1) | ~(ratio > 0))
        subset = proposal.subset
        share = subset.num_examples(subset.batch) / objective.num_examples(objective.batch)
        return Step(
            updates=step,
            moved=moved,
            step_size=-scale * proposal.weights[0],
            code=accepted(moved),
            fields={
                "damping": jnp.where(adapted, next_damping, lam).astype(jnp.float32),
                "kronecker": proposal.factors,
                "direction": step,
                "gradient": proposal.gradient,
                "longest": jnp.maximum(
                    0.95 * state.longest, jnp.where(moved, scale * length, 0).astype(jnp.float32)
                ),
            },
            report={
                "values": tries.astype(jnp.float32) * share,
                "gradients": proposal.refreshed.astype(jnp.float32) * ctx.curvature_share(),
                # Two tangents pushed forward cost about one pushed forward and pulled back.
                "gauss_newton_products": share,
                "factor_work": proposal.factor_work,
                "left_out": jnp.sum(proposal.factors.left_out),
                "damping": lam,
                "reduction_ratio": jnp.where(ctx.active, ratio, jnp.nan),
            },
        )

    return second_order(
        "kfac",
        KfacState,
        learning_rate,
        init=init,
        direction=direction,
        accept=accept,
        damping=damping,
    )


def kfac_for(
    objective: Objective, params: Params, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """`kfac(**options)` whose `init` knows the layers of this model, and allocates what they need.

    `kfac().init` sees shapes alone. Where they mislead it (embeddings, stacked layers, transposed
    kernels), its first update sets the factors up again: a jitted step compiles twice, and a
    `jax.lax.scan` over steps, whose state must keep its shapes, needs `kfac_for`.

    Args:
      objective: the model, the loss and a batch.
      params: of the model; their shapes are enough.
      **options: of `kfac`.

    Raises:
      ArgumentError: as `kfac`.

    >>> from jdl.losses import squared_error
    >>> batch = {"x": jnp.array([0, 4, 4]), "label": jnp.ones((3, 2))}
    >>> table = {"w": jnp.zeros((5, 2))}  # an embedding: its factor of inputs is diagonal
    >>> objective = Objective.from_fns(lambda p, b: p["w"][b["x"]], squared_error, batch)
    >>> state = kfac_for(objective, table, damping=1.0).init(table)
    >>> [x.shape for x in state.kronecker.moments[0]]
    [(1, 6), (1, 2, 2)]

    References:
      Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature
      (2015).
    """
    optimizer = kfac(**options)

    def init(given: Params) -> Any:
        with kronecker.told(objective, params):
            return optimizer.init(given)

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


class _Proposal(NamedTuple):
    factors: Kronecker
    refreshed: jax.Array
    factor_work: jax.Array
    subset: Objective  # of the examples of the exact model
    model: quadratic.Quadratic  # f there, along `natural` and the last step
    gram: jax.Array  # inner products of the two
    slopes: jax.Array  # derivatives of f on the whole batch along the two
    natural: PyTree  # (F + λI)⁻¹ ḡ
    gradient: PyTree  # ḡ, for the state
    weights: jax.Array  # the step's components: −α and μ


def _examples(objective: Objective, params: Params, size: int) -> int:
    """How many examples to take so that they, or the positions of their sequences, are `size`."""
    batch = objective.batch
    outputs = jax.eval_shape(lambda p: objective.apply(p, batch, objective.key)[0], params)
    positions = max(x.shape[1] if x.ndim == 3 else 1 for x in jax.tree.leaves(outputs))
    return -(-size // max(1, min(16, positions)))


def _reduction_ratio(
    ctx: UpdateContext, proposal: _Proposal, scale: jax.Array, step: PyTree, l2_reg: float
) -> jax.Array:
    """ρ of a step: 1 plus the model's error on some examples over its prediction for the batch."""
    w = scale * proposal.weights
    model = proposal.model
    value = proposal.subset.value(tree.add_scaled(ctx.params, 1.0, step)).astype(ctx.dtype)
    curvature = 0.5 * w @ model.curvature @ w
    predicted_there = w @ model.slopes.astype(ctx.dtype) + curvature
    model_error = value - model.value.astype(ctx.dtype) - predicted_there
    predicted = w @ proposal.slopes + curvature + 0.5 * l2_reg * w @ proposal.gram @ w
    return reduction_ratio(ctx.value, ctx.value + predicted + model_error, predicted, ctx.noise)


def _halved(
    ctx: UpdateContext,
    ratio_of: Callable[[jax.Array], jax.Array],
    known: jax.Array,
    max_backtracks: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Halves a step until ρ > 0: the tries, the scale, its ρ, and ρ of the whole step.

    None is tried where ρ > 0 is known.
    """

    def going(carry: Any) -> jax.Array:
        tries, _, ratio, _ = carry
        return ~(ratio > 0) & (tries <= max_backtracks) & ctx.active

    def halved(carry: Any) -> Any:
        tries, scale, _, first_ratio = carry
        scale = jnp.where(tries == 0, scale, 0.5 * scale)
        ratio = ratio_of(scale)
        return tries + 1, scale, ratio, jnp.where(tries == 0, ratio, first_ratio)

    start = (jnp.zeros((), jnp.int32), jnp.ones((), ctx.dtype), known, known)
    tries, scale, ratio, first_ratio = jax.lax.while_loop(going, halved, start)
    return tries, scale, ratio, first_ratio


def _factor_work(
    found: Layers,
    factors: Kronecker,
    objective: Objective,
    refreshed: jax.Array,
    inversions: jax.Array,
) -> jax.Array:
    """An update's multiplications on factors, per those of a gradient of the batch's layers."""
    forward, squares, products = 0.0, 0.0, 0.0
    curvature_batch = objective.num_examples(objective.batch_for_curvature)
    per_slice = curvature_batch / objective.microbatches
    for i, layer in found.known.items():
        first, last = factors.inverses[i]
        n, d, k = first.shape[0], first.shape[1], last.shape[1]
        rows = layer.rows / per_slice * objective.num_examples(objective.batch)
        forward += rows * d * k
        squares += rows * sum(math.prod(x.shape[1:]) for x in (first, last))
        products += n * d * k * sum(x.shape[1] if x.ndim == 3 else 1 for x in (first, last))
    gradient = max(3 * forward, 1.0)
    return (
        refreshed.astype(jnp.float32) * (objective.curvature_share() * squares / gradient)
        + inversions / gradient
        + products / gradient
    )
