r"""SOAP: Adam in the slowly turning eigenbases of Shampoo's factors.

For a matrix with gradient G, inputs × outputs:

    L ← β L + (1 − β) G Gᵀ,        R ← β R + (1 − β) Gᵀ G,        L ≈ U Λ Uᵀ,   R ≈ V Λ′ Vᵀ

    δ = −rate · U Adam(Uᵀ G V) Vᵀ

U and V are eigenvectors of the first gradient's L and R, and then follow them by one step of power
iteration and a QR decomposition at each refresh. Adam's mean turns with them; its squares stay.
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
from jdl.optim.kronecker.inverses import first_basis, next_basis
from jdl.optim.matrices import Stack, gathered, like, mean, multiplications, preconditioned, solved
from jdl.optim.result import ResultCode
from jdl.optim.transformation import ScalarOrSchedule, check_numbers, check_params, rate_at


class Side(NamedTuple):
    """One side of a stack of matrices."""

    factor: jax.Array  # L or R, [N, S, S]
    basis: jax.Array  # U or V, eigenvectors in columns


class SoapState(NamedTuple):
    """The state of `soap`."""

    gradients: jax.Array  # how many entered the averages, int32
    diagnostics: diag.Diagnostics
    mu: PyTree  # Adam's mean of gradients; a matrix's is UᵀMV
    nu: PyTree  # Adam's mean of squares, in the same coordinates
    stacks: Any  # the matrices' factors and bases, a `Stack` for each pair of sizes


def soap(
    learning_rate: ScalarOrSchedule = 3e-3,
    *,
    b1: diag.Number = 0.95,
    b2: diag.Number = 0.95,
    shampoo_beta: diag.Number = 0.95,
    eps: diag.Number = 1e-8,
    weight_decay: diag.Number = 0.01,
    precondition_every: diag.Number = 10,
    max_size: int = 2048,
    one_sided: bool = False,
    factors_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP after Vyas et al. (2024): AdamW in the eigenbases of Shampoo's factors.

    `update` needs gradients alone, and parameters for the weight decay. A leaf of two axes or more
    is a matrix of inputs × outputs, its axes merged as in `jdl.optim.matrices.layers_of`. Vectors
    and sides above `max_size` are not rotated, as in AdamW. The first gradient only sets the bases
    up. One that is not finite, or whose squares overflow, takes no step either, enters no average
    and is counted in `diagnostics.left_out`.

    Memory: two copies of the parameters, and two matrices for each rotated side; float32 for
    narrower parameters.

    Args:
      learning_rate: > 0, or a schedule of the number of updates.
      b1: decay of the mean of gradients, in [0, 1).
      b2: decay of the mean of squares, in [0, 1).
      shampoo_beta: decay of L and R, in [0, 1]; 1 for their sums.
      eps: added to the root of the mean of squares, > 0.
      weight_decay: decoupled, ≥ 0, in units of the learning rate.
      precondition_every: steps from one refresh of the bases to the next, ≥ 1.
      max_size: the largest side to rotate, ≥ 1.
      one_sided: whether to rotate only the smaller side of each matrix.
      factors_dtype: "bfloat16" or "float32", of factors and bases in memory; None for the moments'.

    Returns:
      An optax transformation, whose updates are the whole step. Inside `optax.inject_hyperparams`,
      `max_size`, `one_sided` and `factors_dtype` are static.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real.

    >>> optimizer, params = soap(0.1), {"w": jnp.ones((2, 2))}
    >>> state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update({"w": jnp.eye(2)}, state, params)
    >>> [round(float(x), 3) for x in updates["w"][0]]
    [-0.101, -0.001]

    References:
      Vyas et al., SOAP: improving and stabilizing Shampoo using Adam (2024), arXiv 2409.11321.
    """
    options = SimpleNamespace(**locals())
    check_numbers(vars(options))
    check.one_of("factors_dtype", factors_dtype, (None, "bfloat16", "float32"))
    return optax.GradientTransformationExtraArgs(partial(_init, options), partial(_update, options))


def _init(options: Any, params: Params) -> SoapState:
    check_params("soap", params)

    def zeros(p: jax.Array) -> jax.Array:
        return jnp.zeros_like(p, dtype=tree.accumulator(p.dtype))

    return SoapState(
        gradients=jnp.zeros((), jnp.int32),
        diagnostics=diag.init(),
        mu=jax.tree.map(zeros, params),
        nu=jax.tree.map(zeros, params),
        stacks=preconditioned(params, options, Side),
    )


def _update(
    options: Any,
    updates: PyTree,
    state: SoapState,
    params: Params | None = None,
    *,
    objective: Any = None,
    **extras: Any,
) -> tuple[PyTree, SoapState]:
    decays = not isinstance(options.weight_decay, int | float) or options.weight_decay > 0
    check.argument(not decays or params is not None, "params", "given, to decay weights", params)
    leaves, structure = jax.tree.flatten(updates)
    if not leaves:
        return updates, state
    mu, nu = jax.tree.leaves(state.mu), jax.tree.leaves(state.nu)
    grads = [g.astype(m.dtype) for g, m in zip(leaves, mu, strict=True)]
    sound = jnp.isfinite(tree.vdot(grads, grads))
    moving = sound & (state.gradients > 0)
    lost = jnp.zeros((), jnp.int32)
    with jax.default_matmul_precision("highest"):
        rotated = _rotated(state.stacks, grads)
        mu = [mean(m, g, options.b1, moving) for m, g in zip(mu, rotated, strict=True)]
        nu = [mean(v, g * g, options.b2, moving) for v, g in zip(nu, rotated, strict=True)]
        steps = [m / (jnp.sqrt(v) + like(options.eps, v)) for m, v in zip(mu, nu, strict=True)]
        steps = _rotated(state.stacks, steps, back=True)
        beta = options.shampoo_beta
        stacks = [gathered(s, grads, beta, moving=sound) for s in state.stacks]
        refreshes = sound & (state.gradients % options.precondition_every == 0)
        if stacks:
            stacks, mu, lost = jax.lax.cond(
                refreshes,
                lambda s, m: _refreshed(s, m, state.gradients == 0, objective),
                lambda s, m: (s, m, lost),
                stacks,
                mu,
            )
    steps, rate = _scaled(options, state, steps, params, moving)
    products, cubes = multiplications(stacks, params, objective=objective, **extras)
    state = SoapState(
        gradients=state.gradients + sound.astype(jnp.int32),
        diagnostics=diag.advance(
            state.diagnostics,
            step_size=jnp.where(moving, rate, 0),
            termination=jnp.where(sound, ResultCode.ACCEPTED, ResultCode.NOT_FINITE),
            left_out=state.diagnostics.left_out + jnp.where(sound, lost, 1),
            # A step turns the gradient there and back and multiplies it with itself. A refresh
            # turns the mean twice, multiplies factor and basis, and orthonormalizes in two passes
            # of three products.
            factor_work=3 * products + jnp.where(refreshes, 2 * products + 7 * cubes, 0),
        ),
        mu=jax.tree.unflatten(structure, mu),
        nu=jax.tree.unflatten(structure, nu),
        stacks=tuple(stacks),
    )
    steps = [x.astype(leaf.dtype) for x, leaf in zip(steps, leaves, strict=True)]
    return jax.tree.unflatten(structure, steps), state


def _scaled(
    options: Any, state: SoapState, steps: list[jax.Array], params: Any, moving: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """−rate times the steps, with Adam's corrections for a start at 0 and the decay; the rate."""
    rate = rate_at(options.learning_rate, state.diagnostics.iterations)

    def scaled(u: jax.Array, p: jax.Array | None) -> jax.Array:
        t = jnp.maximum(state.gradients, 1).astype(u.dtype)
        corrections = jnp.sqrt(1 - like(options.b2, u) ** t) / (1 - like(options.b1, u) ** t)
        step = -like(rate, u) * corrections * u
        if p is not None:
            decay = like(rate, u) * like(options.weight_decay, u)
            step -= decay * (p.astype(u.dtype) + step)
        return jnp.where(moving, step, 0)

    leaves = [None] * len(steps) if params is None else jax.tree.leaves(params)
    return [scaled(*x) for x in zip(steps, leaves, strict=True)], jnp.asarray(rate, jnp.float32)


def _turn(x: jax.Array, sides: tuple[Any, ...], back: bool) -> jax.Array:
    """Uᵀ X V, or U X Vᵀ, of each matrix of [N, D, K]."""
    left, right = (None if s is None else s.basis.astype(x.dtype) for s in sides)
    if left is not None:
        x = (left if back else left.mT) @ x
    return x if right is None else x @ (right.mT if back else right)


def _rotated(
    stacks: Sequence[Stack], leaves: Sequence[jax.Array], back: bool = False
) -> list[jax.Array]:
    out = list(leaves)
    for stack in stacks:
        stack.put(_turn(stack.of(leaves), stack.sides, back), out)
    return out


def _refreshed(
    stacks: Sequence[Stack], mu: list[jax.Array], first: jax.Array, objective: Any
) -> tuple[list[Stack], list[jax.Array], jax.Array]:
    """New bases, the mean in them, and how many were not finite and are the old ones."""
    axis_name = getattr(objective, "axis_name", None)
    found = jax.lax.cond(
        first,
        lambda pairs: solved(first_basis, pairs, axis_name),
        lambda pairs: solved(next_basis, pairs, axis_name),
        [(side.factor, side.basis) for stack in stacks for side in stack.kept],
    )
    results = iter(found)
    turned = [s.each(lambda _, side: side._replace(basis=next(results)[0])) for s in stacks]
    mu = _rotated(turned, _rotated(stacks, mu, back=True))
    return turned, mu, jnp.sum(jnp.concatenate([lost for _, lost in found]), dtype=jnp.int32)
