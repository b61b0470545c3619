"""Inverses and eigenvectors of stacks of factors, computed by all devices together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jdl.core import tree


@jax.jit
def inverse(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array]:
    """(M + diag(shift))⁻¹ of each matrix of [N, S, S], or of diagonal ones [N, S]."""
    if matrix.ndim == 2:
        return (1.0 / (matrix + shift),)
    with jax.default_matmul_precision("highest"):
        eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]
        half = inverse_root(matrix + shift[:, :, None] * eye)
        return (half.mT @ half,)


def inverse_root(matrix: jax.Array, leaf: int = 136) -> jax.Array:
    """L⁻¹ of the Cholesky factor L, by recursive halves, mostly by matrix products."""
    n = matrix.shape[-1]
    if n <= leaf:
        return jax.lax.platform_dependent(matrix, cpu=_eliminated, default=_triangular_inverse)
    h = n // 2
    upper = inverse_root(matrix[:, :h, :h], leaf)
    side = matrix[:, h:, :h] @ upper.mT
    lower = inverse_root(matrix[:, h:, h:] - side @ side.mT, leaf)
    corner = -lower @ (side @ upper)
    above = jnp.zeros((matrix.shape[0], h, n - h), matrix.dtype)
    return jnp.block([[upper, above], [corner, lower]])


def _triangular_inverse(matrix: jax.Array) -> jax.Array:
    root = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    return jax.lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)


def _eliminated(matrix: jax.Array) -> jax.Array:
    """`_triangular_inverse` by elimination in [M | I].

    On CPUs, LAPACK's threads were up to 100 times slower while another process used the cores.
    """
    n = matrix.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(n, dtype=matrix.dtype), matrix.shape)
    row = jnp.arange(n)[:, None]

    def body(k: jax.Array, rest: jax.Array) -> jax.Array:
        pivot = jax.lax.dynamic_slice_in_dim(rest, k, 1, axis=1)
        column = jax.lax.dynamic_slice_in_dim(rest, k, 1, axis=2)
        root = jnp.sqrt(jax.lax.dynamic_slice_in_dim(pivot, k, 1, axis=2))
        pivot = pivot / root
        return jnp.where(row < k, rest, jnp.where(row == k, pivot, rest - column / root * pivot))

    return jax.lax.fori_loop(0, n, body, jnp.concatenate([matrix, eye], axis=-1))[:, :, n:]


def one_by_one(fn: Callable[[jax.Array], Any], stack: jax.Array) -> Any:
    """fn of a stack of matrices [N, S, S]; on CPUs, of one matrix after the other.

    There LAPACK's calls on several matrices wait for threads of the pool that they run in: two at
    once can wait for ever (jaxlib 0.10).
    """
    return jax.lax.platform_dependent(
        stack, cpu=lambda stack: jax.lax.map(fn, stack), default=lambda stack: fn(stack)
    )


def eigen(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors in columns, and eigenvalues."""
    del shift
    if matrix.ndim == 2:
        return jnp.ones_like(matrix), matrix
    values, vectors = one_by_one(lambda m: tuple(jnp.linalg.eigh(m)), matrix)
    return vectors, jnp.maximum(values, 0.0)


def first_basis(matrix: jax.Array, basis: jax.Array) -> tuple[jax.Array, ...]:
    """Eigenvectors in columns; the old ones, and a 1, where they are not finite."""
    vectors = one_by_one(lambda m: jnp.linalg.eigh(m)[1], _unit(matrix))
    return _checked(jnp.flip(vectors, -1), basis)


def next_basis(matrix: jax.Array, basis: jax.Array) -> tuple[jax.Array, ...]:
    """As `first_basis`, by one step of power iteration from the old ones.

    QR takes them by falling eigenvalue; each then returns to its column, where its square is.
    """
    wide = _unit(matrix)
    size, basis_there = wide.shape[-1], basis.astype(wide.dtype)
    wide += (10 + size) * jnp.finfo(wide.dtype).eps * jnp.eye(size, dtype=wide.dtype)[None]
    moved = wide @ basis_there
    order = jnp.argsort(-jnp.sum(basis_there * moved, axis=1), axis=-1)[:, None]
    vectors = _orthonormal(jnp.take_along_axis(moved, order, axis=2))
    return _checked(jnp.take_along_axis(vectors, jnp.argsort(order, axis=2), axis=2), basis)


def inverse_power(
    matrix: jax.Array, old: jax.Array, exponent: float, newton: bool = False
) -> tuple[jax.Array, ...]:
    """M^−exponent of symmetric matrices [N, S, S]; the old ones, and a 1, where not finite.

    Eigenvalues are at least the largest times the precision of the old ones' type.
    """
    unit, eps = _unit(matrix), jnp.finfo(old.dtype).eps
    if newton:
        power = _newton(unit, round(1 / exponent), 4 * float(eps))
    else:
        vectors, values = eigen(unit, unit)
        values = jnp.maximum(values, float(eps) * values[:, -1:])
        power = (vectors * values[:, None] ** -exponent) @ vectors.mT
    largest = jnp.max(jnp.abs(matrix.astype(unit.dtype)), axis=(1, 2), keepdims=True)
    return _checked(power * largest**-exponent, old)


def _newton(matrix: jax.Array, p: int, shift: float, steps: int = 100) -> jax.Array:
    """(M + shift ‖M‖ I)^(−1/p) by a coupled Newton iteration: X → that, and XᵖM → I."""
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]
    size = jnp.linalg.norm(matrix, axis=(1, 2), keepdims=True)
    scale = (1 + p) / (2 * (1 + shift) * size)

    def one_step(carry: Any) -> Any:
        count, _, root, rest, error = carry
        factor = ((1 + p) * eye - rest) / p
        moved = root @ factor, jnp.linalg.matrix_power(factor, p) @ rest
        distance = jnp.linalg.norm(moved[1] - eye, axis=(1, 2), keepdims=True)
        better = distance < jnp.where(error > 0.1, 1.2, 0.5) * error
        found = tree.where(better, (*moved, distance), (root, rest, error))
        return count + 1, jnp.any(better), *found

    rest = scale * (matrix + shift * size * eye)
    error = jnp.full_like(scale, jnp.inf)
    start = (0, jnp.array(True), scale ** (1 / p) * eye, rest, error)
    found: tuple[Any, ...] = jax.lax.while_loop(lambda c: c[1] & (c[0] < steps), one_step, start)
    return jnp.asarray(found[2])


def _checked(new: jax.Array, old: jax.Array) -> tuple[jax.Array, ...]:
    fine = jnp.all(jnp.isfinite(new), axis=(1, 2))
    return jnp.where(fine[:, None, None], new.astype(old.dtype), old), (~fine).astype(jnp.int32)


def _unit(matrix: jax.Array) -> jax.Array:
    """Of largest entry 1, lest products of tiny or huge ones leave the type's range; or I for 0."""
    wide = matrix.astype(tree.accumulator(matrix.dtype))
    largest = jnp.max(jnp.abs(wide), axis=(1, 2), keepdims=True)
    eye = jnp.eye(wide.shape[-1], dtype=wide.dtype)[None]
    return jnp.where(largest > 0, wide / jnp.where(largest > 0, largest, 1), eye)


def _orthonormal(columns: jax.Array, passes: int = 8) -> jax.Array:
    """Q of the QR decomposition of each matrix of [N, S, S], by shifted Cholesky passes.

    These are products of matrices; LAPACK's QR on CPUs took ten times as long. A pass that fails is
    made again with a larger shift.
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


def shared(
    solve: Any,
    matrices: Sequence[jax.Array],
    shifts: Sequence[jax.Array],
    axis_name: str | None,
    mesh: Any,
) -> list[tuple[jax.Array, ...]]:
    """solve(matrices, shifts) for each stack of matrices.

    Each device computes its part of a stack with as many blocks as devices; the others are shared
    by `assignment`. Diagonal ones are left to the compiler.
    """
    if axis_name is None and mesh is None:
        return [solve(m, s) for m, s in zip(matrices, shifts, strict=True)]
    axis = axis_name or max(mesh.axis_names, key=lambda name: mesh.shape[name])
    count = num_devices(axis_name, mesh)
    pairs = dict(enumerate(zip(matrices, shifts, strict=True)))
    results = {i: solve(*pair) for i, pair in pairs.items() if pair[0].ndim == 2}
    wide = {i: p for i, p in pairs.items() if i not in results and len(p[0]) >= count}
    narrow = {i: p for i, p in pairs.items() if i not in results and i not in wide}
    owners = assignment([cost(p[:1]) for p in narrow.values()], count)

    def share(wide: Any, narrow: Any) -> Any:
        own = {i: solve(*pair) for i, pair in wide.items()}
        everyones = jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), own)
        return everyones | _split(solve, narrow, owners, axis)

    def filled(x: jax.Array) -> jax.Array:
        """With its last block repeated, so that all devices have as many."""
        return jnp.pad(x, [(0, -len(x) % count)] + [(0, 0)] * (x.ndim - 1), mode="edge")

    def by_rows(x: jax.Array) -> jax.Array:
        # As "fsdp" holds factors; else the compiler would gather them before the condition, for
        # each step.
        fits = x.ndim == 3 and x.shape[1] % count == 0
        spec = PartitionSpec(None, axis) if fits else PartitionSpec()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def mine(x: jax.Array) -> jax.Array:
        each = len(x) // count
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * each, each)

    if mesh is None:
        results |= share(jax.tree.map(lambda x: mine(filled(x)), wide), narrow)
    else:
        wide, narrow = jax.tree.map(by_rows, (wide, narrow))
        specs = (PartitionSpec(axis), PartitionSpec())
        shared = jax.shard_map(
            share, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        results |= shared(jax.tree.map(filled, wide), narrow)
    return [tuple(x[: len(m)] for x in results[i]) for i, m in enumerate(matrices)]


def num_devices(axis_name: str | None, mesh: Any) -> int:
    """How many devices share the work."""
    if axis_name is not None:
        return int(jax.lax.axis_size(axis_name))
    return 1 if mesh is None else int(max(mesh.shape.values()))


def _split(solve: Any, pairs: Any, owners: list[int], axis: str) -> Any:
    """Each solved by its owner, and sent to all."""
    if not pairs:
        return {}

    def mine(device: int) -> Any:
        def run(pairs: Any) -> Any:
            return {
                i: solve(*pair)
                if owner == device
                else jax.tree.map(jnp.zeros_like, jax.eval_shape(solve, *pair))
                for (i, pair), owner in zip(pairs.items(), owners, strict=True)
            }

        return run

    branches = [mine(device) for device in range(jax.lax.axis_size(axis))]
    return jax.lax.psum(jax.lax.switch(jax.lax.axis_index(axis), branches, pairs), axis)


def cost(stacks: Sequence[jax.Array]) -> int:
    """The multiplications of the inverses of stacks of matrices, about."""
    return sum(x.shape[0] * x.shape[1] ** 3 if x.ndim == 3 else x.size for x in stacks)


def assignment(costs: Sequence[int], count: int) -> list[int]:
    """The device for each matrix, the costliest first, each to the device with the least work.

    >>> assignment([2, 10, 9, 3], 2)
    [0, 0, 1, 1]
    """
    load = [0] * count
    chosen = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[i] = min(range(count), key=load.__getitem__)
        load[chosen[i]] += costs[i]
    return chosen


def mesh_of(x: Any) -> Any:
    """Under `jit`, the mesh of several devices that hold an array, or None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or mesh.size == 1:
        return None
    manual = any(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
    return None if manual else mesh
