r"""Kronecker factors of the curvature, and their damped inverse as a preconditioner.

For a layer y = Wᵀ ā, with ā its inputs and a 1 for the bias, and g the gradient at y:

    F ≈ A ⊗ G,  A = E[ā āᵀ],  G = E[g gᵀ];    (A + π√λ I)⁻¹ V (G + √λ/π I)⁻¹

with π² the ratio of the factors' mean eigenvalues. What is no layer's kernel or bias has the
curvature's diagonal. State is arrays alone; which leaf is which layer is found anew at each trace
(`jdl.core.layers`), so that `init` needs the parameters only.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, moments, tree
from jdl.core.layers import Bases, Layers, Probe, dtype_of
from jdl.core.objective import Objective
from jdl.core.types import Key, Params, PyTree
from jdl.optim.local import Local
from jdl.optim.part import PartialObjective
from jdl.optim.preconditioner import Inverse, Preconditioner


class Pair(NamedTuple):
    """Arrays of a kernel's two sides: full or, for a side beyond the limit, diagonal."""

    first: jax.Array
    last: jax.Array


class Kronecker(NamedTuple):
    """Second moments and what is made of them; one entry a leaf, () where there is none.

    Attributes:
      moments: A and G, running means; a `Pair` for each leaf of two axes or more.
      inverses: the damped inverses, or with `eigen` the eigenbases.
      squares: with `eigen`, the curvature's diagonal in the eigenbases.
      diagonals: of the leaves that belong to no layer.
      refreshes: means taken of the moments so far, int32.
    """

    moments: tuple[PyTree, ...]
    inverses: tuple[PyTree, ...]
    squares: tuple[PyTree, ...]
    diagonals: tuple[jax.Array, ...]
    refreshes: jax.Array


def init(params: Params, *, eigen: bool = False, max_size: int = 4096) -> Kronecker:
    """Zeros of the shapes that the leaves' own shapes ask for.

    A leaf (d₁, …, K) of two axes or more has sides of D+1 = d₁⋯ + 1 and of K.

    >>> state = init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})
    >>> [x.shape for x in state.moments[1]]
    [(4, 4), (2, 2)]
    """

    def side(size: int, dtype: Any, one: float = 0.0) -> jax.Array:
        if size > max_size:
            return jnp.full(size, one, dtype)
        return one * jnp.eye(size, dtype=dtype)

    def pair(leaf: Any, one: float) -> PyTree:
        if jnp.ndim(leaf) < 2:
            return ()
        d, k, dtype = math.prod(leaf.shape[:-1]), leaf.shape[-1], dtype_of(leaf)
        return Pair(side(d + 1, dtype, one), side(k, dtype, one))

    def squares(leaf: Any) -> PyTree:
        if jnp.ndim(leaf) < 2 or not eigen:
            return ()
        return jnp.zeros((math.prod(leaf.shape[:-1]) + 1, leaf.shape[-1]), dtype_of(leaf))

    leaves = jax.tree.leaves(params)
    return Kronecker(
        moments=tuple(pair(x, 0.0) for x in leaves),
        inverses=tuple(pair(x, 1.0) for x in leaves),
        squares=tuple(squares(x) for x in leaves),
        diagonals=tuple(jnp.zeros(jnp.shape(x), dtype_of(x)) for x in leaves),
        refreshes=jnp.zeros((), jnp.int32),
    )


def refresh_moments(
    objective: Any,
    params: Params,
    found: Layers,
    state: Kronecker,
    key: Key,
    curvature: str = "fisher",
    decay: float = 0.95,
) -> Kronecker:
    """The moments with one more estimate in their running mean; a non-finite one is left out.

    The mean is Σ's own until 1/(1 − decay) of them are in.
    """
    probes, bases = {}, {}
    for i in found.known:
        eigen = not isinstance(state.squares[i], tuple)
        first, last = jax.tree.map(jnp.zeros_like, state.moments[i])
        squares = jnp.zeros_like(state.squares[i]) if eigen else ()
        probes[i] = Probe(first, last, jnp.zeros((), first.dtype), squares)
        if eigen:
            # A side that is diagonal has the identity for its basis.
            bases[i] = Bases(*(q if q.ndim == 2 else () for q in state.inverses[i]))
    drawn, diagonals = moments.second_moments(
        objective, params, found, probes, bases, key, curvature
    )
    count = state.refreshes.astype(jnp.float32) + 1.0
    kept = jnp.minimum(1.0 - 1.0 / count, decay)
    usable = tree.all_finite((drawn, diagonals))

    def mean(old: PyTree, new: PyTree) -> PyTree:
        mixed = tree.add_scaled(tree.scale(kept, old), 1.0 - kept, new)
        return tree.where(usable, mixed, old)

    new_moments, new_squares = list(state.moments), list(state.squares)
    new_diagonals = list(state.diagonals)
    for i, probe in drawn.items():
        new_moments[i] = mean(state.moments[i], Pair(probe.first, probe.last))
        new_squares[i] = mean(state.squares[i], probe.squares)
    for i, diagonal in diagonals.items():
        new_diagonals[i] = mean(state.diagonals[i], diagonal)
    return state._replace(
        moments=tuple(new_moments),
        squares=tuple(new_squares),
        diagonals=tuple(new_diagonals),
        refreshes=state.refreshes + usable.astype(jnp.int32),
    )


def refresh_inverses(
    found: Layers,
    state: Kronecker,
    damping: jax.Array,
    *,
    axis_name: str | None = None,
    mesh: Any = None,
) -> Kronecker:
    """The inverses, or eigenbases, of the present moments, shared out among the devices.

    Args:
      found: the layers.
      state: the moments.
      damping: λ > 0.
      axis_name: inside `pmap` or `shard_map`, the axis of the devices that share the work.
      mesh: under `jit`, their mesh.
    """
    names = [(i, side) for i in found.known for side in (0, 1)]
    matrices, shifts = [], []
    for i in found.known:
        first, last = state.moments[i]
        has_bias = found.known[i].bias is not None
        pi, mean = balance(first, last, first.shape[0] - (not has_bias))
        # However small λ is, no more than rounding lets through.
        floor = jnp.finfo(first.dtype).eps * mean
        root = jnp.sqrt(jnp.maximum(damping.astype(first.dtype), floor))
        matrices += [first, last]
        shifts += [pi * root, root / pi]
    eigen = any(not isinstance(s, tuple) for s in state.squares)
    solve = _eigen if eigen else _inverse
    results = _shared(solve, matrices, shifts, axis_name, mesh)
    inverses, squares = list(state.inverses), list(state.squares)
    for i in found.known:
        new = Pair(*(results[names.index((i, side))][0] for side in (0, 1)))
        usable = tree.all_finite(new)
        inverses[i] = tree.where(usable, new, state.inverses[i])
        if eigen:
            # In new bases the diagonal starts from what the factors themselves foretell.
            values = [results[names.index((i, side))][1] for side in (0, 1)]
            outer = values[0][:, None] * values[1][None]
            squares[i] = jnp.where(usable, outer, state.squares[i])
    return state._replace(inverses=tuple(inverses), squares=tuple(squares))


def balance(first: jax.Array, last: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """π, the root of the ratio of the mean eigenvalues of A and G, and their product.

    `size` counts the coordinates of the first side.
    """

    def mean(x: jax.Array, n: int) -> jax.Array:
        return jnp.sum(jnp.diagonal(x) if x.ndim == 2 else x) / n

    a, g = mean(first, size), mean(last, last.shape[0])
    known = (a > 0) & (g > 0)
    return jnp.sqrt(jnp.where(known, a, 1.0) / jnp.where(known, g, 1.0)), a * g


def apply(found: Layers, state: Kronecker, vector: PyTree, damping: jax.Array) -> PyTree:
    """(F + λ)⁻¹ v, in the types of the leaves of `vector`."""
    leaves, structure = jax.tree.flatten(vector)
    out = list(leaves)
    for i in found.unknown:
        d = state.diagonals[i]
        floor = jnp.finfo(d.dtype).eps * jnp.mean(d) + jnp.finfo(d.dtype).tiny
        out[i] = leaves[i].astype(d.dtype) / (d + jnp.maximum(damping.astype(d.dtype), floor))
    with jax.default_matmul_precision("highest"):
        for i, layer in found.known.items():
            first, last = state.inverses[i]
            v = leaves[i].astype(first.dtype).reshape(-1, leaves[i].shape[-1])
            if layer.bias is None:
                # The bias's coordinate is set apart: its moments are zero.
                v = jnp.pad(v, [(0, 1), (0, 0)])
            else:
                v = jnp.concatenate([v, leaves[layer.bias].astype(first.dtype)[None]])
            if isinstance(state.squares[i], tuple):
                # Inverses are symmetric; a needless transpose would cost a copy of them each step.
                v = _times(first, v, last)
            else:
                inner = _times(first.T, v, last)
                scaled = inner / (state.squares[i] + damping.astype(first.dtype))
                v = _times(first, scaled, last.T)
            out[i] = v[:-1].reshape(leaves[i].shape)
            if layer.bias is not None:
                out[layer.bias] = v[-1]
    out = [x.astype(leaf.dtype) for x, leaf in zip(out, leaves, strict=True)]
    return jax.tree.unflatten(structure, out)


def _times(first: jax.Array, v: jax.Array, last: jax.Array) -> jax.Array:
    """P v Q; one that is diagonal is of one axis."""
    v = first[:, None] * v if first.ndim == 1 else first @ v
    return v * last[None] if last.ndim == 1 else v @ last


def _inverse(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array]:
    """(M + shift)⁻¹."""
    if matrix.ndim == 1:
        return (1.0 / (matrix + shift),)
    with jax.default_matmul_precision("highest"):
        half = _inverse_root(matrix + shift * jnp.eye(matrix.shape[0], dtype=matrix.dtype))
        return (half.T @ half,)


def _inverse_root(matrix: jax.Array, leaf: int = 256) -> jax.Array:
    """L⁻¹ of Cholesky's L, by halves: nearly all of it is products.

    LAPACK's own threads, which large matrices wake on CPUs, were up to 20 times slower wherever
    another process wanted the cores too.
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


def _eigen(matrix: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors in columns, and eigenvalues."""
    del shift
    if matrix.ndim == 1:
        return jnp.ones_like(matrix), matrix
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors, jnp.maximum(values, 0.0)


def _shared(
    solve: Any,
    matrices: Sequence[jax.Array],
    shifts: Sequence[jax.Array],
    axis_name: str | None,
    mesh: Any,
) -> list[tuple[jax.Array, ...]]:
    """solve(matrix, shift) for each, every device doing its share of the work."""

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
    """Which of `count` devices inverts which matrix: the largest first, each to the least loaded.

    >>> assignment([2, 10, 9, 3], 2)
    [1, 0, 1, 1]
    """
    load = [0] * count
    chosen = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        chosen[i] = min(range(count), key=load.__getitem__)
        load[chosen[i]] += sizes[i] ** 3
    return chosen


def preconditioner(
    curvature: str = "fisher", decay: float = 0.9, max_size: int = 4096, every: int = 1
) -> Preconditioner:
    """The factors for conjugate gradients: `hessian_free(preconditioner="kronecker")`.

    The factors are refreshed, at one gradient of the curvature batch, and inverted with that step's
    own λ; older inverses still precondition, only less well.

    Args:
      curvature: as for `kfac`.
      decay: of the factors' running mean, in [0, 1).
      max_size: a side with more coordinates has a diagonal factor, ≥ 1.
      every: steps from one refresh to the next, ≥ 1.
    """
    check.one_of("curvature", curvature, moments.CURVATURES)
    check.in_range("decay", decay, 0.0, 1.0, open_high=True)
    check.positive_int("max_size", max_size)
    check.positive_int("every", every)

    def step(
        state: Kronecker,
        here: Local,
        product: Any,
        damping: jax.Array,
        count: jax.Array,
        key: Key,
        active: jax.Array,
    ) -> tuple[Kronecker, Inverse]:
        del product
        check.argument(
            here.objective is not None,
            "objective",
            "given, for layers' inputs and output gradients come through it",
            here.objective,
            "Pass objective=jdl.Objective.from_fns(predict, loss, batch).",
        )
        objective = plain(here.objective)
        found = moments.find_layers(objective, here.params)

        def refreshed(state: Kronecker) -> Kronecker:
            state = refresh_moments(objective, here.params, found, state, key, curvature, decay)
            mesh = mesh_of(jax.tree.leaves(here.params)[0])
            return refresh_inverses(found, state, damping, axis_name=objective.axis_name, mesh=mesh)

        due = active & ((count % every == 0) | (state.refreshes == 0))
        state = jax.lax.cond(due, refreshed, lambda state: state, state)
        return state, lambda vector: apply(found, state, vector, damping)

    return Preconditioner(
        lambda params: init(params, max_size=max_size), step, gradients=1.0 / every
    )


def mesh_of(x: Any) -> Any:
    """The mesh of several devices that an array lies on, under `jit`, or None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or mesh.size == 1:
        return None
    manual = any(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
    return None if manual else mesh


def plain(objective: Any) -> Objective:
    """An `Objective` of part of the parameters, whose model is that part's function."""
    if not isinstance(objective, PartialObjective):
        return objective
    whole, part = objective.objective, objective.part

    def apply(params: Params, *args: Any, **options: Any) -> Any:
        return whole.model.apply(part.filled(params), *args, **options)

    r = whole.regularizer
    return dataclasses.replace(
        whole,
        model=whole.model._replace(apply=apply),
        regularizer=None if r is None else lambda params: r(part.filled(params)),
    )
