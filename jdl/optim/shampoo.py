r"""Shampoo: the gradient times inverse roots of its two covariances.

For a matrix with gradient G, inputs × outputs, and M its mean, divided by 1 − b1ᵗ:

    L ← β L + (1 − β) G Gᵀ,        R ← β R + (1 − β) Gᵀ G

    δ = −rate · c · L^(−¼) M R^(−¼)

with L / (1 − βᵗ) + ε I for L, likewise R, and a c for the norm of Adam's step (grafting).
KL-Shampoo minimises KL(N(0, E[g gᵀ]) ‖ N(0, L ⊗ R)), and has the exponent ½:

    L ← β L + (1 − β) G R⁻¹ Gᵀ / outputs,        R ← β R + (1 − β) Gᵀ L⁻¹ G / inputs
"""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim import matrices
from jdl.optim.kronecker.inverses import inverse_power
from jdl.optim.matrices import Stack, corrected, gathered, like, mean, preconditioned, solved
from jdl.optim.result import ResultCode
from jdl.optim.transformation import ScalarOrSchedule, check_numbers, check_params, rate_at


class Side(NamedTuple):
    """One side of a stack of matrices."""

    factor: jax.Array  # L or R, [N, S, S]
    root: jax.Array  # its inverse root; I before the first


class ShampooState(NamedTuple):
    """The state of `shampoo`."""

    gradients: jax.Array  # how many entered the averages, int32
    diagnostics: diag.Diagnostics
    mu: PyTree  # the mean of gradients
    nu: PyTree  # the mean of their squares, or optax.MaskedNode() where none is needed
    stacks: Any  # the matrices' factors and roots, a `Stack` for each pair of sizes


def shampoo(
    learning_rate: ScalarOrSchedule = 1e-3,
    *,
    b1: diag.Number = 0.9,
    b2: diag.Number = 0.99,
    shampoo_beta: diag.Number = 0.95,
    eps: diag.Number = 1e-8,
    factors_eps: diag.Number = 1e-12,
    weight_decay: diag.Number = 0.01,
    precondition_every: diag.Number = 10,
    grafting: str | None = "adam",
    exponent: float | None = None,
    root: str = "eigh",
    kl: bool = False,
    max_size: int = 2048,
    one_sided: bool = False,
    factors_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo after Gupta et al. (2018), with the grafting of Anil et al. (2021); KL-Shampoo.

    `update` needs gradients alone, and parameters for the weight decay. A leaf of two axes or more
    is a matrix of inputs × outputs, its axes merged as in `jdl.optim.matrices.layers_of`. Roots are
    computed at every `precondition_every`-th gradient; until the first, and for vectors, the step
    is the grafting's alone.

    A gradient that is not finite, or makes a factor or a step overflow, takes no step and enters no
    average. A root that is not finite is the last one. `diagnostics.left_out` counts both.

    Memory: two copies of the parameters, one with grafting None or "sgd", and two matrices for each
    preconditioned side; float32 for narrower parameters.

    Args:
      learning_rate: > 0, or a schedule of the number of updates.
      b1: decay of the mean of gradients, in [0, 1).
      b2: decay of the mean of squares in grafting, in [0, 1).
      shampoo_beta: decay of L and R, in [0, 1]; 1 for their sums, as in Gupta et al.
      eps: added to the root of the mean of squares, > 0.
      factors_eps: ε, > 0. Eigenvalues are also at least the largest times the precision.
      weight_decay: decoupled, ≥ 0, in units of the learning rate.
      precondition_every: gradients from one computation of the roots to the next, ≥ 1.
      grafting: whose norm each matrix's step has: "adam", "rmsprop" (without bias correction),
        "adagrad" (the sum of squares), "sgd" (the mean of gradients); None for Shampoo's own norm,
        with Adam's steps for vectors, and "sgd"'s for matrices before the first roots.
      exponent: of the inverse roots, in (0, 1]; None for Gupta et al.'s ½ over the number of
        preconditioned sides, and for KL-Shampoo's ½.
      root: "eigh"; or "newton", a coupled iteration, for which 1 / exponent is an integer.
      kl: KL-Shampoo. Until there are roots, R and L are the root of the mean square of G.
      max_size: the largest side to precondition, ≥ 1; a longer one is left as it is.
      one_sided: whether to precondition only the smaller side of each matrix.
      factors_dtype: "bfloat16" or "float32", of factors and roots in memory; None for the moments'.

    Returns:
      An optax transformation, whose updates are the whole step. Inside `optax.inject_hyperparams`,
      `exponent`, `kl`, `max_size` and `one_sided` are static.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real.

    >>> optimizer = shampoo(0.1, precondition_every=1, weight_decay=0.0)
    >>> gradient = {"w": jnp.array([[1.0, 1.0], [0.0, 1.0]])}
    >>> updates, _ = optimizer.update(gradient, optimizer.init(gradient))
    >>> [round(float(x), 3) for x in updates["w"][0]]
    [-0.11, -0.055]

    References:
      Gupta et al., Shampoo: preconditioned stochastic tensor optimization (2018), arXiv 1802.09568.
      Anil et al., Scalable second order optimization for deep learning (2021), arXiv 2002.09018;
      Lin et al. (2025), arXiv 2509.03378. The steps of github.com/facebookresearch/optimizers.
    """
    options = SimpleNamespace(**locals())
    check_numbers(vars(options))
    check.one_of("grafting", grafting, ("adam", "rmsprop", "adagrad", "sgd", None))
    check.one_of("root", root, ("eigh", "newton"))
    check.one_of("factors_dtype", factors_dtype, (None, "bfloat16", "float32"))
    p = 1 / (exponent or 0.5)
    whole = root == "eigh" or p == round(p)
    check.argument(whole, "exponent", '1 / an integer for root="newton"', exponent)
    check.argument(not kl or p == 2, "exponent", "None or 0.5 for kl=True", exponent)
    return optax.GradientTransformationExtraArgs(partial(_init, options), partial(_update, options))


def _init(options: Any, params: Params) -> ShampooState:
    leaves, structure = jax.tree.flatten(params)
    check_params("shampoo", params)
    stacks, grafting = preconditioned(params, options, Side), options.grafting
    rotated = {x.kernel for s in stacks for x in s.layers} if leaves else set()

    def zeros(p: jax.Array) -> jax.Array:
        return jnp.zeros_like(p, dtype=tree.accumulator(p.dtype))

    def squares(i: int, p: jax.Array) -> Any:
        unused = grafting == "sgd" or (grafting is None and i in rotated)
        return optax.MaskedNode() if unused else zeros(p)

    return ShampooState(
        gradients=jnp.zeros((), jnp.int32),
        diagnostics=diag.init(),
        mu=jax.tree.map(zeros, params),
        nu=jax.tree.unflatten(structure, [squares(i, p) for i, p in enumerate(leaves)]),
        stacks=stacks,
    )


def _update(
    options: Any, updates: PyTree, state: ShampooState, params: Params | None = None, **extras: Any
) -> tuple[PyTree, ShampooState]:
    decays = not isinstance(options.weight_decay, int | float) or options.weight_decay > 0
    check.argument(not decays or params is not None, "params", "given, to decay weights", params)
    leaves = jax.tree.leaves(updates)
    if not leaves:
        return updates, state
    structure: Any = jax.tree.structure(updates)
    mu, count, lost = jax.tree.leaves(state.mu), state.gradients + 1, jnp.zeros((), jnp.int32)
    grads = [g.astype(m.dtype) for g, m in zip(leaves, mu, strict=True)]
    with jax.default_matmul_precision("highest"):
        mu = [mean(m, g, options.b1) for m, g in zip(mu, grads, strict=True)]
        means = [corrected(m, options.b1, count) for m in mu]
        rows = zip(grads, means, structure.flatten_up_to(state.nu), strict=True)
        nu, steps = map(list, zip(*(_graft(options, count, *x) for x in rows), strict=True))
        beta, started = options.shampoo_beta, state.gradients >= options.precondition_every
        whitened = [partial(_whitened, options, started, s) for s in state.stacks]
        stacks = [gathered(s, grads, beta, f) for s, f in zip(state.stacks, whitened, strict=True)]
        traces = [jnp.trace(x.factor, axis1=1, axis2=2) for s in stacks for x in s.kept]
        sound = jnp.isfinite(tree.vdot(grads, grads)) & tree.all_finite(traces)
        refreshes = sound & (count % options.precondition_every == 0)
        if stacks:
            refreshed = partial(_refreshed, options, count, extras.get("objective"))
            stacks, lost = jax.lax.cond(refreshes, refreshed, lambda s: (s, lost), stacks)
        for s in stacks:
            s.put(_step(options, s.sides, s.of(means), s.of(steps), count), steps)
        sound &= jnp.isfinite(tree.vdot(steps, steps))
    rate = rate_at(options.learning_rate, state.diagnostics.iterations)
    weights = [None] * len(steps) if params is None else jax.tree.leaves(params)
    for i, (u, p) in enumerate(zip(steps, weights, strict=True)):
        u = u if p is None else u + like(options.weight_decay, u) * p.astype(u.dtype)
        steps[i] = jnp.where(sound, -like(rate, u) * u, 0).astype(leaves[i].dtype)
    products, cubes = matrices.multiplications(stacks, params, **extras)
    diagnostics = diag.advance(
        state.diagnostics,
        step_size=jnp.where(sound, rate, 0),
        termination=jnp.where(sound, ResultCode.ACCEPTED, ResultCode.NOT_FINITE),
        left_out=state.diagnostics.left_out + jnp.where(sound, lost, 1),
        factor_work=(2 + options.kl) * products + jnp.where(refreshes, 10 * cubes, 0),
    )
    mu, nu = (jax.tree.unflatten(structure, x) for x in (mu, nu))
    moved = ShampooState(count, state.diagnostics, mu, nu, tuple(stacks))
    state = tree.where(sound, moved, state)._replace(diagnostics=diagnostics)
    return jax.tree.unflatten(structure, steps), state


def _graft(
    options: Any, count: jax.Array, grad: jax.Array, mean_grad: jax.Array, squares: Any
) -> tuple[Any, jax.Array]:
    """The mean of squares, and the step of the optimizer that gives the norm."""
    if isinstance(squares, optax.MaskedNode):
        return squares, mean_grad
    b2 = 1.0 if options.grafting == "adagrad" else options.b2
    squares = mean(squares, grad * grad, b2)
    v = squares if options.grafting == "rmsprop" else corrected(squares, b2, count)
    return squares, mean_grad / (jnp.sqrt(v) + like(options.eps, v))


def _whitened(options: Any, started: jax.Array, stack: Stack, i: int, g: jax.Array) -> jax.Array:
    """G or Gᵀ, and for KL-Shampoo that times the other side's root, over √ of its size."""
    if not options.kl:
        return g
    if (other := stack.sides[1 - i]) is not None:
        size = jnp.sqrt(jnp.mean(g * g, axis=(1, 2), keepdims=True))
        first = g / jnp.sqrt(jnp.maximum(size, jnp.finfo(g.dtype).tiny))
        g = jnp.where(started, g @ other.root.astype(g.dtype), first)
    return g / jnp.sqrt(like(g.shape[2], g))


def _refreshed(
    options: Any, count: jax.Array, objective: Any, stacks: list[Stack]
) -> tuple[list[Stack], jax.Array]:
    """New roots, and how many were not finite and are the old ones."""

    def matrix(side: Side) -> jax.Array:
        wide = side.factor.astype(tree.accumulator(side.factor.dtype))
        eye = jnp.eye(wide.shape[-1], dtype=wide.dtype)[None]
        return corrected(wide, options.shampoo_beta, count) + like(options.factors_eps, wide) * eye

    axis_name, found = getattr(objective, "axis_name", None), []
    for number in (1, 2):  # of sides, by which `preconditioned` sorts
        some = [x for s in stacks if len(s.kept) == number for x in s.kept]
        exponent = options.exponent or (0.5 if options.kl else 0.5 / number)
        solve = partial(inverse_power, exponent=exponent, newton=options.root == "newton")
        found += solved(solve, [(matrix(x), x.root) for x in some], axis_name)
    roots = iter(found)
    stacks = [s.each(lambda _, side: side._replace(root=next(roots)[0])) for s in stacks]
    return stacks, jnp.sum(jnp.concatenate([lost for _, lost in found]), dtype=jnp.int32)


def _step(
    options: Any, sides: tuple[Any, ...], step: jax.Array, graft: jax.Array, count: jax.Array
) -> jax.Array:
    """The steps of matrices [N, D, K], of the norms of the grafts."""
    left, right = (None if s is None else s.root.astype(step.dtype) for s in sides)
    step = step if left is None else left @ step
    step = step if right is None else step @ right
    if options.grafting is None:
        return step
    largest = jnp.max(jnp.abs(step), axis=(1, 2), keepdims=True)  # lest squares overflow
    step /= jnp.where(largest > 0, largest, 1)
    size, wanted = (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (step, graft))
    grafted = step * (wanted / jnp.maximum(size, 1))
    return jnp.where(count < options.precondition_every, graft, grafted)
