r"""SOAP: Adam in the slowly turning eigenbases of Shampoo's factors.

For a matrix with gradient G, inputs × outputs:

    L ← β L + (1 − β) G Gᵀ,        R ← β R + (1 − β) Gᵀ G,        L ≈ U Λ Uᵀ,   R ≈ V Λ′ Vᵀ

    δ = −rate · U Adam(Uᵀ G V) Vᵀ

U and V are eigenvectors of the first gradient's L and R, and then follow them by one step of power
iteration and a QR decomposition each time. Adam's moments turn with them: the mean exactly, the
squares only as their columns are sorted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.kronecker.inverses import inverse_root, one_by_one
from jdl.optim.matrices import Stack, layers_of, solved, stacks_of
from jdl.optim.result import ResultCode
from jdl.optim.transformation import ScalarOrSchedule, check_params


class Side(NamedTuple):
    """One side of a stack of matrices."""

    factor: jax.Array  # L or R, [N, S, S]
    basis: jax.Array  # U or V, eigenvectors in columns, the largest eigenvalue's first


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
    is a matrix of inputs × outputs, or a stack of them: see `jdl.optim.matrices.layers_of`, which
    also merges small axes. Vectors and sides above `max_size` are not rotated, as in AdamW. The
    first gradient only sets the bases up and takes no step. A gradient that is not finite, or whose
    squares overflow, takes none either, and is left out of all averages and counted in
    `diagnostics.left_out`.

    Memory: two copies of the parameters, and two matrices for each rotated side; float32 for
    narrower parameters.

    Args:
      learning_rate: > 0, or a schedule of the number of updates.
      b1: decay of the mean of gradients, in [0, 1).
      b2: decay of the mean of squares, in [0, 1).
      shampoo_beta: decay of L and R, in [0, 1).
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
    for name, value in {"b1": b1, "b2": b2, "shampoo_beta": shampoo_beta}.items():
        _in_range(name, value, 0.0, 1.0, open_high=True)
    _in_range("learning_rate", learning_rate, 0.0, open_low=True)
    _in_range("eps", eps, 0.0, open_low=True)
    _in_range("weight_decay", weight_decay, 0.0)
    if isinstance(precondition_every, int | float):
        check.positive_int("precondition_every", precondition_every)
    check.positive_int("max_size", max_size)
    check.one_of("factors_dtype", factors_dtype, (None, "bfloat16", "float32"))

    def sides(shape: tuple[int, int, int], dtype: Any) -> tuple[Side | None, Side | None]:
        n, *sizes = shape
        smaller = sizes.index(min(sizes))

        def side(i: int) -> Side | None:
            if not 1 < sizes[i] <= max_size or (one_sided and i != smaller):
                return None
            eye = jnp.eye(sizes[i], dtype=factors_dtype or dtype)[None]
            return Side(jnp.zeros_like(eye, shape=(n, *eye.shape[1:])), jnp.repeat(eye, n, 0))

        return side(0), side(1)

    def init(params: Params) -> SoapState:
        leaves = jax.tree.leaves(params)
        if leaves:
            check_params("soap", params)
        stacks = stacks_of(layers_of(params).values(), leaves, sides)

        def zeros(p: jax.Array) -> jax.Array:
            return jnp.zeros_like(p, dtype=tree.accumulator(p.dtype))

        return SoapState(
            gradients=jnp.zeros((), jnp.int32),
            diagnostics=diag.init(),
            mu=jax.tree.map(zeros, params),
            nu=jax.tree.map(zeros, params),
            # An array where `optax.tree.map_params` asks with no parameters.
            stacks=tuple(s for s in stacks if any(s.sides)) if leaves else jnp.zeros(()),
        )

    def update(
        updates: PyTree,
        state: SoapState,
        params: Params | None = None,
        *,
        objective: Any = None,
        **extras: Any,
    ) -> tuple[PyTree, SoapState]:
        del extras
        check.argument(
            params is not None or (isinstance(weight_decay, int | float) and not weight_decay),
            "params",
            "given to the update for the weight decay, or weight_decay=0",
            params,
        )
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        mu, nu = (jax.tree.leaves(x) for x in (state.mu, state.nu))
        grads = [g.astype(m.dtype) for g, m in zip(leaves, mu, strict=True)]
        sound = jnp.isfinite(tree.vdot(grads, grads))
        moving = sound & (state.gradients > 0)
        axis_name = getattr(objective, "axis_name", None)
        with jax.default_matmul_precision("highest"):
            rotated = _rotated(state.stacks, grads)
            mu = [_mean(m, g, b1, moving) for m, g in zip(mu, rotated, strict=True)]
            nu = [_mean(v, g * g, b2, moving) for v, g in zip(nu, rotated, strict=True)]
            steps = [m / (jnp.sqrt(v) + _like(eps, v)) for m, v in zip(mu, nu, strict=True)]
            steps = _rotated(state.stacks, steps, back=True)
            stacks = [_gathered(s, grads, shampoo_beta, sound) for s in state.stacks]
            stacks, mu, nu, lost = jax.lax.cond(
                sound & (state.gradients % precondition_every == 0),
                lambda s, m, v: _refreshed(s, m, v, state.gradients == 0, axis_name),
                lambda *x: (*x, jnp.zeros((), jnp.int32)),
                stacks, mu, nu,
            )  # fmt: skip
        rate = learning_rate
        if callable(rate):
            with jax.numpy_dtype_promotion("standard"):
                rate = rate(state.diagnostics.iterations)

        def step(u: jax.Array, p: jax.Array, like: jax.Array) -> jax.Array:
            t = jnp.maximum(state.gradients, 1).astype(u.dtype)
            one = jnp.ones((), u.dtype)
            scale = _like(rate, u) * jnp.sqrt(one - _like(b2, u) ** t) / (one - _like(b1, u) ** t)
            delta = -scale * u
            decay = _like(rate, u) * _like(weight_decay, u) * (p.astype(u.dtype) + delta)
            return jnp.where(moving, delta - decay, 0).astype(like.dtype)

        decayed = [jnp.zeros_like(u) for u in steps] if params is None else jax.tree.leaves(params)
        steps = [step(*x) for x in zip(steps, decayed, leaves, strict=True)]
        diagnostics = diag.advance(
            state.diagnostics,
            step_size=jnp.where(moving, _like(rate, jnp.float32(0)), 0),
            termination=jnp.where(sound, ResultCode.ACCEPTED, ResultCode.NOT_FINITE),
            left_out=state.diagnostics.left_out + jnp.where(sound, lost, 1),
        )
        mu, nu = (jax.tree.unflatten(structure, x) for x in (mu, nu))
        entered = state.gradients + sound.astype(jnp.int32)
        state = SoapState(entered, diagnostics, mu, nu, tuple(stacks))
        return jax.tree.unflatten(structure, steps), state

    return optax.GradientTransformationExtraArgs(init, update)


def _in_range(name: str, value: Any, *bounds: float, **opened: bool) -> None:
    if isinstance(value, int | float):  # and no schedule or array of optax.inject_hyperparams
        check.in_range(name, value, *bounds, **opened)


def _like(x: Any, like: jax.Array) -> jax.Array:
    return jnp.asarray(x).astype(like.dtype)


def _mean(mean: jax.Array, x: jax.Array, decay: Any, moving: jax.Array) -> jax.Array:
    """The running mean with one more x, or as it is."""
    decay = _like(decay, mean)
    return jnp.where(moving, decay * mean + (1 - decay) * x, mean)


def _turn(x: jax.Array, sides: tuple[Side | None, Side | None], back: bool) -> jax.Array:
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


def _gathered(stack: Stack, grads: Sequence[jax.Array], beta: Any, sound: jax.Array) -> Stack:
    """With the gradients in the factors."""
    g = stack.of(grads)
    sides = []
    for side, transposed in zip(stack.sides, (False, True), strict=True):
        if side is not None:
            square = g.mT @ g if transposed else g @ g.mT
            factor = _mean(side.factor.astype(g.dtype), square, beta, sound)
            side = side._replace(factor=factor.astype(side.factor.dtype))
        sides.append(side)
    return Stack(stack.layers, (sides[0], sides[1]))


def _refreshed(
    stacks: Sequence[Stack],
    mu: list[jax.Array],
    nu: list[jax.Array],
    first: jax.Array,
    axis_name: str | None,
) -> tuple[list[Stack], list[jax.Array], list[jax.Array], jax.Array]:
    """New bases, Adam's moments in them, and how many were not finite and are the old ones."""
    if not stacks:
        return [], mu, nu, jnp.zeros((), jnp.int32)
    every = [side for stack in stacks for side in stack.sides if side is not None]
    found = jax.lax.cond(
        first,
        lambda pairs: solved(_eigenvectors, pairs, axis_name),
        lambda pairs: solved(_power_iteration, pairs, axis_name),
        [(side.factor, side.basis) for side in every],
    )
    results, turned, mu, nu = iter(found), [], list(mu), list(nu)
    lost = jnp.sum(jnp.concatenate([~fine for *_, fine in found])).astype(jnp.int32)
    for stack in stacks:
        mean, squares, sides = _turn(stack.of(mu), stack.sides, back=True), stack.of(nu), []
        for side, axis in zip(stack.sides, (1, 2), strict=True):
            if side is not None:
                basis, order, _ = next(results)
                squares = jnp.take_along_axis(squares, jnp.expand_dims(order, 3 - axis), axis)
                side = side._replace(basis=basis)
            sides.append(side)
        turned.append(Stack(stack.layers, (sides[0], sides[1])))
        stack.put(_turn(mean, turned[-1].sides, back=False), mu)
        stack.put(squares, nu)
    return turned, mu, nu, lost


def _eigenvectors(matrix: jax.Array, basis: jax.Array) -> tuple[jax.Array, ...]:
    """Eigenvectors in columns, the order of the old ones, and whether they are finite."""
    unit, same = _unit(matrix), jnp.arange(matrix.shape[-1], dtype=jnp.int32)
    vectors = jnp.flip(one_by_one(lambda m: jnp.linalg.eigh(m)[1], unit), -1)
    return _checked(vectors, basis, jnp.broadcast_to(same, matrix.shape[:2]))


def _power_iteration(matrix: jax.Array, basis: jax.Array) -> tuple[jax.Array, ...]:
    """As `_eigenvectors`, by one step of power iteration from the old ones."""
    wide = _unit(matrix)
    size = wide.shape[-1]
    wide += (10 + size) * jnp.finfo(wide.dtype).eps * jnp.eye(size, dtype=wide.dtype)[None]
    moved = wide @ basis.astype(wide.dtype)
    order = jnp.argsort(-jnp.sum(basis.astype(wide.dtype) * moved, axis=1), axis=-1)
    moved = jnp.take_along_axis(moved, order[:, None], axis=2)
    return _checked(_orthonormal(moved), basis, order.astype(jnp.int32))


def _orthonormal(columns: jax.Array, passes: int = 8) -> jax.Array:
    """Q of the QR decomposition of each matrix of [N, S, S], by shifted Cholesky passes.

    These are products of matrices; on CPUs, LAPACK's QR took ten times as long. A pass that fails
    is made again with a larger shift.
    """
    eps, size = jnp.finfo(columns.dtype).eps, columns.shape[-1]
    eye = jnp.eye(size, dtype=columns.dtype)[None]

    def measured(q: jax.Array) -> tuple[jax.Array, ...]:
        square = q.mT @ q
        return q, square, jnp.max(jnp.abs(square - eye), axis=(1, 2), keepdims=True)

    def one_pass(carry: Any) -> Any:
        count, shift, (q, square, error) = carry
        root = inverse_root(square + shift * jnp.minimum(error, 1) * eye)
        fine = jnp.all(jnp.isfinite(root), axis=(1, 2), keepdims=True)
        q = jnp.where(fine, q @ root.mT, q)
        return count + 1, jnp.where(fine, shift, 16 * shift), measured(q)

    def going(carry: Any) -> jax.Array:
        return (carry[0] < passes) & jnp.any(carry[2][2] > eps * (size + 10))

    first = measured(columns / jnp.linalg.norm(columns, axis=1, keepdims=True))
    start = (0, jnp.full((len(columns), 1, 1), 16 * eps, columns.dtype), first)
    return jax.lax.while_loop(going, one_pass, start)[2][0]


def _unit(matrix: jax.Array) -> jax.Array:
    """Of largest entry 1, lest products of tiny or huge ones leave the type's range; or I for 0."""
    wide = matrix.astype(tree.accumulator(matrix.dtype))
    largest = jnp.max(jnp.abs(wide), axis=(1, 2), keepdims=True)
    eye = jnp.eye(wide.shape[-1], dtype=wide.dtype)[None]
    return jnp.where(largest > 0, wide / jnp.where(largest > 0, largest, 1), eye)


def _checked(vectors: jax.Array, old: jax.Array, order: jax.Array) -> tuple[jax.Array, ...]:
    """The vectors, or the old ones where they are not finite."""
    fine = jnp.all(jnp.isfinite(vectors), axis=(1, 2))
    same = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=order.dtype), order.shape)
    basis = jnp.where(fine[:, None, None], vectors.astype(old.dtype), old)
    return basis, jnp.where(fine[:, None], order, same), fine
