r"""Shampoo: the gradient times inverse roots of its two covariances.

For a matrix with gradient G, inputs × outputs, and M its mean, divided by 1 − b1ᵗ:

    L ← β L + (1 − β) G Gᵀ,        R ← β R + (1 − β) Gᵀ G

    δ = −rate · c · L^(−¼) M R^(−¼)

where L and R stand for L / (1 − βᵗ) + ε I, and c gives the step the norm of Adam's (grafting).
KL-Shampoo minimises KL(N(0, E[g gᵀ]) ‖ N(0, L ⊗ R)), with the exponent ½:

    L ← β L + (1 − β) G R⁻¹ Gᵀ / outputs,        R ← β R + (1 − β) Gᵀ L⁻¹ G / inputs
"""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.kronecker.inverses import inverse_power
from jdl.optim.matrices import Stack, gathered, like, mean, preconditioned, solved
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
    is a matrix of inputs × outputs, its axes merged as in `jdl.optim.matrices.layers_of`. A side
    above `max_size` is left as it is. Roots are computed at every `precondition_every`-th gradient;
    until the first, and for vectors, the step is the grafting's alone.

    A gradient that is not finite, or that makes a factor or a step overflow, takes no step and
    enters no average. It is counted in `diagnostics.left_out`, and so is a root that is not finite,
    in whose place the last one stays.

    Memory: two copies of the parameters, one without grafting or with "sgd", and two matrices for
    each preconditioned side; float32 for narrower parameters.

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
        "adagrad" (the sum of squares), "sgd" (the mean of gradients); or None for Shampoo's own
        norm. Vectors then have Adam's steps, and matrices "sgd"'s before the first roots.
      exponent: of both inverse roots, in (0, 1]; None for ½ over the number of preconditioned
        sides, as in Gupta et al., and ½ for KL-Shampoo, which has no other.
      root: "eigh"; or "newton", a coupled Newton iteration, for which 1 / exponent is an integer.
      kl: KL-Shampoo. Until there are roots, R and L are the root of the mean square of G.
      max_size: the largest side to precondition, ≥ 1.
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
      Gupta, Koren, Singer, Shampoo: preconditioned stochastic tensor optimization (2018).
      Anil et al., Scalable second order optimization for deep learning (2021), arXiv 2002.09018.
      Shi et al., A distributed data-parallel PyTorch implementation of the distributed Shampoo
      optimizer (2023), arXiv 2309.06497. Lin et al., Understanding and improving Shampoo and SOAP
      via Kullback-Leibler minimization (2025), arXiv 2509.03378.
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
    stacks = preconditioned(params, options, Side)
    squares = _squared(options, stacks, len(leaves)) if leaves else []

    def zeros(p: jax.Array) -> jax.Array:
        return jnp.zeros_like(p, dtype=tree.accumulator(p.dtype))

    nu = [zeros(p) if i in squares else optax.MaskedNode() for i, p in enumerate(leaves)]
    return ShampooState(
        gradients=jnp.zeros((), jnp.int32),
        diagnostics=diag.init(),
        mu=jax.tree.map(zeros, params),
        nu=jax.tree.unflatten(structure, nu),
        stacks=stacks,
    )


def _squared(options: Any, stacks: Sequence[Stack], count: int) -> list[int]:
    """The leaves whose mean of squares is needed."""
    matrices = {layer.kernel for stack in stacks for layer in stack.layers}
    if options.grafting is None:
        return [i for i in range(count) if i not in matrices]
    return [] if options.grafting == "sgd" else list(range(count))


def _update(
    options: Any,
    updates: PyTree,
    state: ShampooState,
    params: Params | None = None,
    *,
    objective: Any = None,
    **extras: Any,
) -> tuple[PyTree, ShampooState]:
    del extras
    decays = not isinstance(options.weight_decay, int | float) or options.weight_decay > 0
    check.argument(not decays or params is not None, "params", "given, to decay weights", params)
    leaves, structure = jax.tree.flatten(updates)
    if not leaves:
        return updates, state
    mu, count = jax.tree.leaves(state.mu), state.gradients + 1
    grads = [g.astype(m.dtype) for g, m in zip(leaves, mu, strict=True)]
    lost = jnp.zeros((), jnp.int32)
    with jax.default_matmul_precision("highest"):
        mu = [mean(m, g, options.b1) for m, g in zip(mu, grads, strict=True)]
        means = [m / (1 - like(options.b1, m) ** like(count, m)) for m in mu]
        nu, steps = _grafts(options, state, grads, means)
        stacks = [_gathered(options, state, s, grads) for s in state.stacks]
        traces = [jnp.trace(x.factor, axis1=1, axis2=2) for x in _sides(stacks)]
        sound = jnp.isfinite(tree.vdot(grads, grads)) & tree.all_finite(traces)
        if stacks:
            stacks, lost = jax.lax.cond(
                sound & (count % options.precondition_every == 0),
                lambda s: _refreshed(options, s, count, objective),
                lambda s: (s, lost),
                stacks,
            )
        for stack in stacks:
            stack.put(_step(options, stack, means, steps, count), steps)
        sound &= jnp.isfinite(tree.vdot(steps, steps))
    rate = rate_at(options.learning_rate, state.diagnostics.iterations)
    weights = [None] * len(steps) if params is None else jax.tree.leaves(params)
    for i, (u, p) in enumerate(zip(steps, weights, strict=True)):
        u = u if p is None else u + like(options.weight_decay, u) * p.astype(u.dtype)
        steps[i] = jnp.where(sound, -like(rate, u) * u, 0).astype(leaves[i].dtype)
    mu, nu = (
        jax.tree.unflatten(jax.tree.structure(x), y) for x, y in ((state.mu, mu), (state.nu, nu))
    )
    diagnostics = diag.advance(
        state.diagnostics,
        step_size=jnp.where(sound, rate, 0),
        termination=jnp.where(sound, ResultCode.ACCEPTED, ResultCode.NOT_FINITE),
        left_out=state.diagnostics.left_out + jnp.where(sound, lost, 1),
    )
    new = tree.where(sound, (count, mu, nu, tuple(stacks)), (state.gradients, *state[2:]))
    state = ShampooState(new[0], diagnostics, *new[1:])
    return jax.tree.unflatten(structure, steps), state


def _grafts(
    options: Any, state: ShampooState, grads: list[jax.Array], means: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The means of squares, and the steps of the optimizer that gives the norms."""
    b2 = 1.0 if options.grafting == "adagrad" else options.b2
    nu, steps = jax.tree.leaves(state.nu), list(means)
    for k, i in enumerate(_squared(options, state.stacks, len(grads))):
        nu[k] = v = mean(nu[k], grads[i] * grads[i], b2)
        if options.grafting in ("adam", None):
            v = v / (1 - like(b2, v) ** like(state.gradients + 1, v))
        steps[i] = means[i] / (jnp.sqrt(v) + like(options.eps, v))
    return nu, steps


def _gathered(options: Any, state: ShampooState, stack: Stack, grads: Sequence[jax.Array]) -> Stack:
    """With the gradients in the factors."""

    def scaled(i: int, g: jax.Array) -> jax.Array:
        other = stack.sides[1 - i]
        if not options.kl:
            return g
        if other is not None:
            size = jnp.sqrt(jnp.mean(g * g, axis=(1, 2), keepdims=True))
            first = g / jnp.sqrt(jnp.maximum(size, jnp.finfo(g.dtype).tiny))
            started = state.gradients >= options.precondition_every
            g = jnp.where(started, g @ other.root.astype(g.dtype), first)
        return g / jnp.sqrt(like(g.shape[2], g))

    return gathered(stack, grads, options.shampoo_beta, True, scaled)


def _sides(stacks: Sequence[Stack]) -> list[Side]:
    return [side for stack in stacks for side in stack.sides if side is not None]


def _refreshed(
    options: Any, stacks: list[Stack], count: jax.Array, objective: Any
) -> tuple[list[Stack], jax.Array]:
    """New roots, and how many were not finite and are the old ones."""

    def matrix(side: Side) -> jax.Array:
        wide = side.factor.astype(tree.accumulator(side.factor.dtype))
        beta, eye = like(options.shampoo_beta, wide), jnp.eye(wide.shape[-1], dtype=wide.dtype)
        weights = jnp.where(beta < 1, 1 - beta ** like(count, wide), 1)
        return wide / weights + like(options.factors_eps, wide) * eye[None]

    axis_name = getattr(objective, "axis_name", None)
    out, lost = list(stacks), [jnp.zeros(1, jnp.int32)]
    for number in (1, 2):  # of sides, hence the exponent
        some = [i for i, stack in enumerate(stacks) if len(_sides([stack])) == number]
        if not some:
            continue
        exponent = options.exponent or (0.5 if options.kl else 0.5 / number)
        solve = partial(inverse_power, exponent=exponent, newton=options.root == "newton")
        pairs = [(matrix(side), side.root) for side in _sides([stacks[i] for i in some])]
        found = solved(solve, pairs, axis_name)
        roots = iter([x for x, _ in found])
        lost += [x for _, x in found]
        for i in some:
            out[i] = stacks[i].each(lambda _, side: side._replace(root=next(roots)))  # noqa: B023
    return out, jnp.sum(jnp.concatenate(lost), dtype=jnp.int32)


def _step(
    options: Any, stack: Stack, means: list[jax.Array], grafts: list[jax.Array], count: jax.Array
) -> jax.Array:
    """The matrices' steps, of the norms of the grafts."""
    step, graft = stack.of(means), stack.of(grafts)
    left, right = (None if s is None else s.root.astype(step.dtype) for s in stack.sides)
    step = step if left is None else left @ step
    step = step if right is None else step @ right
    if options.grafting is None:
        return step
    largest = jnp.max(jnp.abs(step), axis=(1, 2), keepdims=True)
    step /= jnp.where(largest > 0, largest, 1)  # whose square cannot overflow
    size, wanted = (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (step, graft))
    grafted = step * (wanted / jnp.maximum(size, 1))
    return jnp.where(count < options.precondition_every, graft, grafted)
