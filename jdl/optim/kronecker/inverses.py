"""Inverses and eigenvectors of stacks of factors, computed by all devices together."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def inverse(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array]:
    """(M + shift)⁻¹ of each matrix of [N, S, S], or of diagonal ones [N, S]."""
    if matrix.ndim == 2:
        return (1.0 / (matrix + shift[:, None]),)
    with jax.default_matmul_precision("highest"):
        eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]
        half = _inverse_root(matrix + shift[:, None, None] * eye)
        return (half.mT @ half,)


def _inverse_root(matrix: jax.Array, leaf: int = 256) -> jax.Array:
    """L⁻¹ of the Cholesky factor L, by recursive halves, mostly by matrix products.

    On CPUs, LAPACK's threads for large matrices were up to 20 times slower while another process
    used the cores.
    """
    n = matrix.shape[-1]
    if n <= leaf:
        root = jnp.linalg.cholesky(matrix, symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(n, dtype=matrix.dtype), matrix.shape)
        return jax.lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)
    h = n // 2
    upper = _inverse_root(matrix[:, :h, :h], leaf)
    side = matrix[:, h:, :h] @ upper.mT
    lower = _inverse_root(matrix[:, h:, h:] - side @ side.mT, leaf)
    corner = -lower @ (side @ upper)
    above = jnp.zeros((matrix.shape[0], h, n - h), matrix.dtype)
    return jnp.block([[upper, above], [corner, lower]])


def eigen(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors in columns, and eigenvalues."""
    del shift
    if matrix.ndim == 2:
        return jnp.ones_like(matrix), matrix
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors, jnp.maximum(values, 0.0)


def shared(
    solve: Any,
    matrices: Sequence[jax.Array],
    shifts: Sequence[jax.Array],
    axis_name: str | None,
    mesh: Any,
) -> list[tuple[jax.Array, ...]]:
    """solve(matrices, shifts) for each stack of matrices.

    Each device computes its part of a stack with as many blocks as devices; the others are shared
    by `assignment`.
    """

    def share(axis: str, count: int, matrices: Any, shifts: Any) -> Any:
        device = jax.lax.axis_index(axis)
        wide = [i for i, m in enumerate(matrices) if m.shape[0] >= count]
        narrow = [i for i in range(len(matrices)) if i not in wide]
        results: dict[int, Any] = {}
        for i in wide:
            blocks, each = matrices[i].shape[0], -(-matrices[i].shape[0] // count)
            # The last parts overlap, so that all have the same size.
            start = jnp.minimum(device * each, blocks - each)
            pair = (jax.lax.dynamic_slice_in_dim(x, start, each) for x in (matrices[i], shifts[i]))
            places = jnp.minimum(jnp.arange(count) * each, blocks - each)
            order = _order(places, each, blocks)
            results[i] = jax.tree.map(
                lambda x, order=order: jax.lax.all_gather(x, axis, tiled=True)[order], solve(*pair)
            )
        if narrow:
            owners = assignment([cost((matrices[i],)) for i in narrow], count)
            results |= zip(
                narrow, _split(solve, matrices, shifts, narrow, owners, axis), strict=True
            )
        return [results[i] for i in range(len(matrices))]

    if axis_name is not None:
        return list(share(axis_name, jax.lax.axis_size(axis_name), list(matrices), list(shifts)))
    if mesh is not None:
        axis = max(mesh.axis_names, key=lambda name: mesh.shape[name])
        none = jax.sharding.PartitionSpec()
        return list(
            jax.shard_map(
                lambda m, s: share(axis, mesh.shape[axis], m, s),
                mesh=mesh,
                in_specs=none,
                out_specs=none,
                check_vma=False,
            )(list(matrices), list(shifts))
        )
    return [solve(m, s) for m, s in zip(matrices, shifts, strict=True)]


def _order(places: jax.Array, each: int, blocks: int) -> jax.Array:
    """Where each block is among the gathered parts, which start at `places`."""
    rows = (places[:, None] + jnp.arange(each)[None]).reshape(-1)
    return jnp.zeros(blocks, jnp.int32).at[rows].set(jnp.arange(rows.shape[0]))


def _split(
    solve: Any, matrices: Any, shifts: Any, narrow: list[int], owners: list[int], axis: str
) -> list[Any]:
    """Each solved by its owner, and sent to all."""
    shapes = {i: jax.eval_shape(solve, matrices[i], shifts[i]) for i in narrow}

    def mine(device: int) -> Any:
        def run(matrices: Any, shifts: Any) -> Any:
            return [
                solve(matrices[i], shifts[i])
                if owner == device
                else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[i])
                for i, owner in zip(narrow, owners, strict=True)
            ]

        return run

    branches = [mine(device) for device in range(jax.lax.axis_size(axis))]
    results = jax.lax.switch(jax.lax.axis_index(axis), branches, matrices, shifts)
    return list(jax.lax.psum(results, axis))


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
