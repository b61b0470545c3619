r"""K-FAC: the natural gradient by Kronecker factors, its length and momentum from an exact model.

    Δ = (F + λI)⁻¹ g  by factors,      δ = −αΔ + μδ₋,
    (α, μ) minimize  q(δ) = ⟨g, δ⟩ + ½⟨δ, (B + λI) δ⟩

Factors are averaged over steps and inverted now and then. B, the exact Gauss-Newton matrix, is met
only in the 2×2 form of q, on some rows of the batch, and λ follows the reduction ratio on those.
"""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, moments, tree
from jdl.core.layers import Layers
from jdl.core.types import Params, PyTree
from jdl.optim import damping as damping_rules
from jdl.optim import diagnostics as diag
from jdl.optim import kronecker
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.kronecker import Kronecker
from jdl.optim.local import (
    ScalarOrSchedule,
    check_params,
    check_scale,
    current_rate,
    local,
    schedule_value,
)
from jdl.optim.result import ResultCode

_logger = logging.getLogger(__name__)
_logged: set[str] = set()


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
      average: the parameters' running mean; () without averaging.
      work: where the multiplications went.
      diagnostics: see `jdl.optim.diagnostics`.
    """

    learning_rate: jax.Array
    damping: jax.Array
    inverted_damping: jax.Array
    kronecker: Kronecker
    direction: PyTree
    average: PyTree
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
    weight_decay: float = 0.0,
    averaging: float | None = None,
    max_size: int = 4096,
    max_backtracks: int = 4,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC after Martens and Grosse, for any model and any per-example loss.

    `update` needs `value`, `grad` and `objective`. Dense, convolutional and recurrent kernels, with
    their biases, have Kronecker factors; all other parameters have the curvature's diagonal.
    `describe` tells which is which. The reduction ratio compares f with q on `model_rows` rows:

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
      curvature: "fisher" for factors by one draw from the loss's output Hessian, "empirical" for
        the loss's own gradients, "exact" for the Gauss-Newton factors without any draw, at one
        backward pass an output.
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
      weight_decay: η ≥ 0 of ½η‖θ‖², in gradient and model.
      averaging: decay in (0, 1) of the parameters' running mean, to be read with
        `optax.tree.get(state, "average")`; None for no mean.
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
    check.in_range("weight_decay", weight_decay, 0.0)
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
    if averaging is not None:
        check.in_range("averaging", averaging, 0.0, 1.0, open_low=True, open_high=True)

    def init(params: Params) -> KfacState:
        check_params("kfac", params)
        return KfacState(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            damping=jnp.array(damping, jnp.float32),
            inverted_damping=jnp.array(damping, jnp.float32),
            kronecker=kronecker.init(params, eigen=eigen, max_size=max_size),
            direction=jax.tree.map(jnp.zeros_like, params),
            average=() if averaging is None else jax.tree.map(jnp.copy, params),
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
        here = local("kfac", updates, params, **extras)
        check.argument(
            here.objective is not None,
            "objective",
            "given, for layers' inputs and output gradients come through it",
            None,
            "Pass objective=jdl.Objective.from_fns(predict, loss, batch).",
        )
        objective = kronecker.plain(here.objective)
        found = moments.find_layers(objective, here.params)
        _log(found, objective, here.params, max_size, curvature)
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
        mesh = kronecker.mesh_of(jax.tree.leaves(here.params)[0])
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
        if weight_decay:
            gradient = tree.add_scaled(updates, weight_decay, here.params)
        natural = kronecker.apply(found, factors, gradient, lam)
        some = moments.rows(objective, model_rows)
        vectors = (natural, state.direction)
        model = moments.quadratic(some, here.params, vectors)
        bent = model.curvature.astype(scalar)
        gram = _matrix(lambda i, j: tree.vdot(vectors[i], vectors[j])).astype(scalar)
        slopes = jnp.stack([tree.vdot(gradient, v) for v in vectors]).astype(scalar)
        weights = solve_pair(bent + (lam + weight_decay) * gram, slopes)
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
            foretold = w @ slopes + curved + 0.5 * weight_decay * w @ gram @ w
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
        next_damping = damping_rules.levenberg_marquardt(
            lam, ratio, increase=1 / factor, decrease=factor, minimum=damping_minimum
        )
        adapted = active & ((k % damping_every == damping_every - 1) | ~(ratio > 0))
        average = state.average
        if averaging is not None:
            kept = jnp.minimum(1.0 - 1.0 / (k.astype(jnp.float32) + 1.0), averaging)
            ahead = tree.add_scaled(here.params, 1.0, step)
            mixed = tree.add_scaled(tree.scale(kept, average), 1.0 - kept, ahead)
            average = tree.where(active, mixed, average)

        share = moments.examples(some) / moments.examples(objective)
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
            average=average,
            work=work,
            diagnostics=told,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def describe(
    objective: Any, params: Params, *, max_size: int = 4096, curvature: str = "fisher"
) -> str:
    """Which parameters have factors, which a diagonal and why, and how curvature is sampled.

    >>> from jdl.core.objective import Objective
    >>> from jdl.losses import squared_error
    >>> batch = {"x": jnp.ones((4, 3)), "label": jnp.ones((4, 2))}
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(2)}
    >>> def predict(p, b):
    ...     return (b["x"] @ p["w"] + p["b"][None]) * p["scale"][None]
    >>> print(describe(Objective.from_fns(predict, squared_error, batch), params))
    factored: ['w'] with ['b'] (dense, 4×4 and 2×2)
    diagonal: ['scale'] (used by mul)
    curvature: fisher, by draws from the loss's output Hessian (diagonal)
    """
    found = moments.find_layers(objective, params)
    return "\n".join(_account(found, objective, params, max_size, curvature))


def _account(
    found: Layers, objective: Any, params: Params, max_size: int, curvature: str
) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in paths]

    def side(size: int) -> str:
        return f"{size}×{size}" if size <= max_size else f"diagonal {size}"

    lines = []
    for i, layer in found.known.items():
        leaf = paths[i][1]
        sides = side(leaf.size // leaf.shape[-1] + 1), side(leaf.shape[-1])
        joined = "" if layer.bias is None else f" with {names[layer.bias]}"
        lines.append(f"factored: {names[i]}{joined} ({layer.kind}, {sides[0]} and {sides[1]})")
    lines += [f"diagonal: {names[i]} ({why})" for i, why in found.unknown.items()]
    how = "the loss's own gradients"
    if curvature != "empirical":
        route = moments.find_route(objective, params)
        way = "draws from" if curvature == "fisher" else "every column of"
        how = f"{way} the loss's output Hessian ({route})"
        if route == "gradient":
            how = "the loss's own gradients, as its output Hessian is neither known nor small"
    return [*lines, f"curvature: {curvature}, by {how}"]


def _log(found: Layers, objective: Any, params: Params, max_size: int, curvature: str) -> None:
    """The account, once for each that differs."""
    if _logger.isEnabledFor(logging.INFO):
        account = "\n".join(_account(found, objective, params, max_size, curvature))
        if account not in _logged:
            _logged.add(account)
            _logger.info("kfac:\n%s", account)


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
    objective: Any,
    share: float,
    drawn: jax.Array,
    inverted: jax.Array,
    tries: jax.Array,
) -> Work:
    """The work with this step's in it, from the layers' shapes."""
    forward, squares, cubes, products = 0.0, 0.0, 0.0, 0.0
    per_slice = moments.examples(objective, curvature=True) / objective.microbatches
    for i, layer in found.known.items():
        first, last = factors.inverses[i]
        d, n = first.shape[0], last.shape[0]
        rows = layer.rows / per_slice * moments.examples(objective)
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


def solve_pair(matrix: jax.Array, slopes: jax.Array) -> jax.Array:
    """The minimizer of ⟨s, w⟩ + ½⟨w, M w⟩ over two weights; the second is 0 where M is singular.

    >>> solve_pair(jnp.diag(jnp.array([2.0, 4.0])), jnp.array([-2.0, 4.0])).tolist()
    [1.0, -1.0]
    """
    a, b, d = matrix[0, 0], matrix[0, 1], matrix[1, 1]
    determinant = a * d - b * b
    regular = (determinant > 1e-6 * a * d) & (a > 0)
    safe = jnp.where(regular, determinant, 1.0)
    both = jnp.stack([b * slopes[1] - d * slopes[0], b * slopes[0] - a * slopes[1]]) / safe
    alone = jnp.where(a > 0, -slopes[0] / jnp.where(a > 0, a, 1.0), 0.0)
    return jnp.where(regular, both, jnp.stack([alone, jnp.zeros_like(alone)]))
