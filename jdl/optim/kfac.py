r"""K-FAC: the natural gradient by Kronecker factors, its length and momentum from an exact model.

    Δ = (F + λI)⁻¹ g  by factors,      δ = −αΔ + μδ₋,
    (α, μ) minimize  q(δ) = ⟨g, δ⟩ + ½⟨δ, (B + λI) δ⟩

Factors are averaged over steps and inverted now and then. B, the exact Gauss-Newton matrix, is met
only in the 2×2 form of q, on some rows of the batch, and λ follows the reduction ratio on those.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim import damping as damping_rules
from jdl.optim import diagnostics as diag
from jdl.optim import quadratic
from jdl.optim.context import (
    ScalarOrSchedule,
    check_params,
    check_scale,
    current_rate,
    gather,
    schedule_value,
)
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.kronecker import factors as kronecker
from jdl.optim.kronecker import inverses, moments, summary
from jdl.optim.kronecker.factors import Kronecker
from jdl.optim.kronecker.layers import Layers
from jdl.optim.result import ResultCode


class Work(NamedTuple):
    """Multiplications spent on matrices, summed over steps, float32; their ratios are shares.

    Attributes:
      gradients: of the gradients handed over.
      factors: of the backward passes and products that refresh the factors.
      inverses: of the factors' inverses or eigenvectors.
      products: of the inverses with gradients.
      model: of the exact quadratic model and the trials of steps.
    """

    gradients: jax.Array
    factors: jax.Array
    inverses: jax.Array
    products: jax.Array
    model: jax.Array


class KfacState(NamedTuple):
    """What K-FAC carries from step to step: the factors, their inverses and two gradients' memory.

    Attributes:
      learning_rate: the factor on δ, float32; change it with `optax.tree.set`.
      damping: λ for the next step, float32; likewise.
      inverted_damping: λ of the last inverses, float32.
      kronecker: factors, inverses, diagonals.
      direction: δ₋, the last step.
      work: where the multiplications went.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    damping: jax.Array
    inverted_damping: jax.Array
    kronecker: Kronecker
    direction: PyTree
    work: Work
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
    model_rows: int = 256,
    kl_clip: float | None = None,
    l2_reg: float = 0.0,
    max_size: int = 4096,
    max_backtracks: int = 4,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC after Martens and Grosse, for any model and any per-example loss.

    `update` needs `value`, `grad` and `objective`. Dense, convolutional and recurrent kernels, with
    their biases, have Kronecker factors; other parameters use a diagonal approximation.
    `jdl.optim.kronecker.describe` lists which is which. The reduction ratio compares f with q on
    `model_rows` rows:

        ρ = 1 + (change of f there − change that q foretold there) / (q foretold on the whole batch)

    A step with ρ ≤ 0 is halved, and given up after `max_backtracks` halvings.

    Memory for a kernel of D inputs and K outputs: two matrices of each of D + 1 and K, and five
    gradients.

    Args:
      learning_rate: the factor on δ, > 0, or a schedule; 1 takes the model's own length.
      damping: the first λ > 0, in units of the curvature of the mean loss.
      damping_decrease: λ's factor a step when ρ > ¾, its inverse when ρ < ¼; in (0, 1).
      damping_every: λ is changed every so many steps (to that power), and after a failed step.
      damping_minimum: the least λ, > 0.
      curvature: "fisher" for factors by one draw from the loss's output Hessian,
        "empirical_fisher" for the loss's own gradients, "gauss_newton" for factors without any
        draw, at one backward pass an output.
      eigen: whether to damp and correct in the factors' eigenbases (EKFAC); eigenvectors take about
        ten times as long as inverses.
      factors_every: steps from one refresh of the factors to the next, ≥ 1.
      inverses_every: steps from one inversion to the next at most, ≥ 1; λ moved by more than a
        factor of 4 is another reason.
      factors_decay: of the factors' running mean, in [0, 1).
      model_rows: examples for q, ≥ 1; all of them where the batch has fewer. With too few, a step
        fits them and misleads elsewhere, unseen by ρ.
      kl_clip: steps are shortened to ½⟨δ, B δ⟩, the predictions' change in nats an example, ≤ this;
        > 0, or None for no bound.
      l2_reg: η ≥ 0 of ½η‖θ‖², in gradient and model.
      max_size: a kernel's side with more coordinates than this has a diagonal factor, ≥ 1.
      max_backtracks: halvings of a step at most, ≥ 0.
      seed: of the draws.

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
    """
    check_scale("learning_rate", learning_rate)
    check.one_of("curvature", curvature, moments.CURVATURES)
    check.in_range("damping", damping, 0.0, open_low=True)
    check.in_range("damping_decrease", damping_decrease, 0.0, 1.0, open_low=True, open_high=True)
    check.in_range("damping_minimum", damping_minimum, 0.0, open_low=True)
    check.in_range("factors_decay", factors_decay, 0.0, 1.0, open_high=True)
    check.in_range("l2_reg", l2_reg, 0.0)
    check.positive_ints(
        damping_every=damping_every,
        factors_every=factors_every,
        inverses_every=inverses_every,
        model_rows=model_rows,
        max_size=max_size,
    )
    check.positive_int("max_backtracks", max_backtracks + 1)
    if kl_clip is not None:
        check.in_range("kl_clip", kl_clip, 0.0, open_low=True)

    def init(params: Params) -> KfacState:
        check_params("kfac", params)
        return KfacState(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            damping=jnp.array(damping, jnp.float32),
            inverted_damping=jnp.array(damping, jnp.float32),
            kronecker=kronecker.init(params, eigen=eigen, max_size=max_size),
            direction=jax.tree.map(jnp.zeros_like, params),
            work=Work(*(jnp.zeros((), jnp.float32) for _ in Work._fields)),
            diagnostics=diag.init(damping),
        )

    def update(
        updates: PyTree,
        state: KfacState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, KfacState]:
        here = gather("kfac", updates, params, **extras)
        objective = here.needed_objective("the layers' inputs and output gradients")
        found = moments.find_layers(objective, here.params)
        summary.log(found, objective, here.params, max_size, curvature)
        k = state.diagnostics.iterations
        rate = current_rate(learning_rate, state)
        scalar = here.value.dtype
        lam = state.damping.astype(scalar)
        active = here.active

        # Factors and their inverses, now and then.
        factors = state.kronecker
        drawn = active & ((k % factors_every == 0) | (factors.refreshes == 0))
        key = jax.random.fold_in(jax.random.key(seed), k)
        factors = jax.lax.cond(
            drawn,
            lambda factors: kronecker.refresh_moments(
                objective, here.params, found, factors, key, curvature, factors_decay
            ),
            lambda factors: factors,
            factors,
        )
        drift = jnp.abs(jnp.log(state.damping / state.inverted_damping)) > jnp.log(4.0)
        first = drawn & (factors.refreshes == 1)
        inverted = active & ((k % inverses_every == 0) | first | (drift & (not eigen)))
        mesh = inverses.mesh_of(jax.tree.leaves(here.params)[0])
        factors = jax.lax.cond(
            inverted,
            lambda factors: kronecker.refresh_inverses(
                found, factors, lam, axis_name=objective.axis_name, mesh=mesh
            ),
            lambda factors: factors,
            factors,
        )

        # The direction; its length and momentum by the exact model.
        gradient = updates
        if l2_reg:
            gradient = tree.add_scaled(updates, l2_reg, here.params)
        natural = kronecker.apply(found, factors, gradient, lam)
        some = quadratic.subset(objective, model_rows)
        vectors = (natural, state.direction)
        model = quadratic.quadratic(some, here.params, vectors)
        bent = model.curvature.astype(scalar)
        gram = _matrix(lambda i, j: tree.vdot(vectors[i], vectors[j])).astype(scalar)
        slopes = jnp.stack([tree.vdot(gradient, v) for v in vectors]).astype(scalar)
        weights = quadratic.solve_pair(bent + (lam + l2_reg) * gram, slopes)
        if kl_clip is not None:
            divergence = 0.5 * weights @ bent @ weights
            weights = weights * jnp.sqrt(kl_clip / jnp.maximum(divergence, kl_clip))
        weights = weights * rate.astype(scalar)

        def stepped(scale: jax.Array) -> PyTree:
            w = scale * weights
            return tree.add_scaled(tree.scale(w[0], natural), w[1], state.direction)

        def reduction(scale: jax.Array) -> jax.Array:
            """ρ of the step at this scale."""
            w = scale * weights
            moved = some.value(tree.add_scaled(here.params, 1.0, stepped(scale))).astype(scalar)
            curved = 0.5 * w @ bent @ w
            there = w @ model.slopes.astype(scalar) + curved
            surprise = moved - model.value.astype(scalar) - there
            foretold = w @ slopes + curved + 0.5 * l2_reg * w @ gram @ w
            return damping_rules.reduction_ratio(
                here.value, here.value + foretold + surprise, foretold, here.noise
            )

        def going(carry: Any) -> jax.Array:
            tries, _, ratio, _ = carry
            return ~(ratio > 0) & (tries <= max_backtracks) & active

        def halved(carry: Any) -> Any:
            tries, scale, _, first_ratio = carry
            scale = jnp.where(tries == 0, scale, 0.5 * scale)
            ratio = reduction(scale)
            return tries + 1, scale, ratio, jnp.where(tries == 0, ratio, first_ratio)

        unknown = jnp.asarray(-jnp.inf, scalar)
        start = (jnp.zeros((), jnp.int32), jnp.ones((), scalar), unknown, unknown)
        tries, scale, last_ratio, ratio = jax.lax.while_loop(going, halved, start)
        moved = (last_ratio > 0) & active
        step = tree.where(moved, stepped(scale), jax.tree.map(jnp.zeros_like, here.params))

        factor = damping_decrease**damping_every
        next_damping = damping_rules.update_damping(
            lam, ratio, increase=1 / factor, decrease=factor, minimum=damping_minimum
        )
        adapted = active & ((k % damping_every == damping_every - 1) | ~(ratio > 0))

        share = some.num_examples(some.batch) / objective.num_examples(objective.batch)
        code = jnp.where(moved, ResultCode.ACCEPTED, ResultCode.NO_DECREASE)
        work = _add_work(state.work, found, factors, objective, share, drawn, inverted, tries)
        told = diag.advance(
            state.diagnostics,
            step_size=jnp.where(moved, -scale * weights[0], 0.0),
            termination=diag.ending(code, here.finite, here.stationary, jnp.asarray(True)),
            values=tries.astype(jnp.float32) * share,
            gradients=drawn.astype(jnp.float32) * objective.curvature_share(),
            # Two tangents pushed forward are about one pushed forward and pulled back.
            gauss_newton_products=share,
            damping=lam,
            reduction_ratio=jnp.where(active, ratio, jnp.nan),
            reused=reused,
        )
        return step, KfacState(
            learning_rate=rate,
            damping=jnp.where(adapted, next_damping, lam).astype(jnp.float32),
            inverted_damping=jnp.where(inverted, state.damping, state.inverted_damping),
            kronecker=factors,
            direction=step,
            work=work,
            diagnostics=told,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def shares(work: Work) -> dict[str, float]:
    """Where the multiplications went, in parts of 1.

    >>> shares(Work(*map(jnp.asarray, (6.0, 1.0, 1.0, 1.0, 1.0))))["gradients"]
    0.6
    """
    total = max(sum(float(x) for x in work), 1e-30)
    return {name: round(float(x) / total, 4) for name, x in work._asdict().items()}


def _add_work(
    work: Work,
    found: Layers,
    factors: Kronecker,
    objective: Objective,
    share: float,
    drawn: jax.Array,
    inverted: jax.Array,
    tries: jax.Array,
) -> Work:
    """The work with this step's in it, from the layers' shapes."""
    forward, squares, cubes, products = 0.0, 0.0, 0.0, 0.0
    per_slice = objective.num_examples(objective.batch_for_curvature) / objective.microbatches
    for i, layer in found.known.items():
        first, last = factors.inverses[i]
        d, n = first.shape[0], last.shape[0]
        rows = layer.rows / per_slice * objective.num_examples(objective.batch)
        forward += rows * d * n
        squares += rows * sum(x.shape[0] ** x.ndim for x in (first, last))
        cubes += sum(x.shape[0] ** 3 for x in (first, last) if x.ndim == 2)
        products += d * n * sum(x.shape[0] if x.ndim == 2 else 1 for x in (first, last))
    refresh, invert, trials = (x.astype(jnp.float32) for x in (drawn, inverted, tries))
    spent = {
        "gradients": 3 * forward,
        "factors": refresh * (objective.curvature_share() * (2 * forward + squares)),
        "inverses": invert * cubes,
        "products": products,
        "model": share * forward * (5.0 + trials),
    }
    return Work(*(x + jnp.asarray(spent[name], jnp.float32) for name, x in work._asdict().items()))


def _matrix(entry: Any) -> jax.Array:
    a, b, d = entry(0, 0), entry(0, 1), entry(1, 1)
    return jnp.stack([jnp.stack([a, b]), jnp.stack([b, d])])
