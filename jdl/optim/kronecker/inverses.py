"""Inverses and eigenvectors of the factors, computed by all devices together."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def inverse(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array]:
    """(M + shift)⁻¹."""
    if matrix.ndim == 1:
        return (1.0 / (matrix + shift),)
    with jax.default_matmul_precision("highest"):
        half = _inverse_root(matrix + shift * jnp.eye(matrix.shape[0], dtype=matrix.dtype))
        return (half.T @ half,)


def _inverse_root(matrix: jax.Array, leaf: int = 256) -> jax.Array:
    """L⁻¹ of the Cholesky factor L, by recursive halves, mostly by matrix products.

    On CPUs, LAPACK's threads for large matrices were up to 20 times slower while another process
    used the cores.
    """
    n = matrix.shape[0]
    if n <= leaf:
        root = jnp.linalg.cholesky(matrix, symmetrize_input=False)
        eye = jnp.eye(n, dtype=matrix.dtype)
        return jax.lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)
    h = n // 2
    upper = _inverse_root(matrix[:h, :h], leaf)
    side = matrix[h:, :h] @ upper.T
    lower = _inverse_root(matrix[h:, h:] - side @ side.T, leaf)
    corner = -lower @ (side @ upper)
    return jnp.block([[upper, jnp.zeros((h, n - h), matrix.dtype)], [corner, lower]])


def eigen(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors in columns, and eigenvalues."""
    del shift
    if matrix.ndim == 1:
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
    """solve(matrix, shift) for each, by the device that `assignment` chooses."""

    def share(axis: str, count: int, matrices: Any, shifts: Any) -> Any:
        shares = assignment([m.shape[0] if m.ndim == 2 else 0 for m in matrices], count)

        def mine(device: int) -> Any:
            def run(matrices: Any, shifts: Any) -> Any:
                shapes = [
                    jax.eval_shape(solve, *pair) for pair in zip(matrices, shifts, strict=True)
                ]
                return [
                    solve(m, s)
                    if shares[i] == device
                    else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[i])
                    for i, (m, s) in enumerate(zip(matrices, shifts, strict=True))
                ]

            return run

        branches = [mine(device) for device in range(count)]
        results = jax.lax.switch(jax.lax.axis_index(axis), branches, matrices, shifts)
        return jax.lax.psum(results, axis)

    if axis_name is not None:
        return share(axis_name, jax.lax.axis_size(axis_name), list(matrices), list(shifts))
    if mesh is not None:
        axis = max(mesh.axis_names, key=lambda name: mesh.shape[name])
        none = jax.sharding.PartitionSpec()
        return jax.shard_map(
            lambda m, s: share(axis, mesh.shape[axis], m, s),
            mesh=mesh,
            in_specs=none,
            out_specs=none,
            check_vma=False,
        )(list(matrices), list(shifts))
    return [solve(m, s) for m, s in zip(matrices, shifts, strict=True)]


def assignment(sizes: Sequence[int], count: int) -> list[int]:
    """The device for each matrix, the largest first, each to the device with the least work.

    >>> assignment([2, 10, 9, 3], 2)
    [1, 0, 1, 1]
    """
    load = [0] * count
    chosen = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        chosen[i] = min(range(count), key=load.__getitem__)
        load[chosen[i]] += sizes[i] ** 3
    return chosen


def mesh_of(x: Any) -> Any:
    """Under `jit`, the mesh of several devices that hold an array, or None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or mesh.size == 1:
        return None
    manual = any(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
    return None if manual else mesh
