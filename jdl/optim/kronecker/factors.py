r"""Kronecker factors of the curvature, and their damped inverse as a preconditioner.

For a layer y = Wᵀ ā, with ā its inputs and a 1 for the bias, and g the gradient at y:

    F ≈ A ⊗ G,  A = E[ā āᵀ],  G = E[g gᵀ];    (A + π√λ I)⁻¹ V (G + √λ/π I)⁻¹

with π² the ratio of the factors' mean eigenvalues. Parameters outside known layers use a diagonal
approximation. The state is arrays only; layers are found at each trace (`layers.py`), so that
`init` needs only the parameters.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.objective import Objective
from jdl.core.types import Key, Params, PyTree
from jdl.optim.kronecker import inverses, moments
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.probes import Bases, Probe, dtype_of


class Pair(NamedTuple):
    """Arrays of a kernel's two sides: full matrices or, for a side above the limit, diagonals."""

    first: jax.Array
    last: jax.Array


class Kronecker(NamedTuple):
    """The factors and their inverses; one entry a leaf, () where a leaf has none."""

    # A and G, running means; a `Pair` for each leaf of two axes or more.
    moments: tuple[PyTree, ...]
    inverses: tuple[PyTree, ...]  # the damped inverses, or with `eigen` the eigenbases
    squares: tuple[PyTree, ...]  # with `eigen`, the curvature's diagonal in the eigenbases
    diagonals: tuple[jax.Array, ...]  # curvature diagonals of the leaves outside layers
    refreshes: jax.Array  # estimates in the running means so far, int32


def init(params: Params, *, eigen: bool = False, max_size: int = 4096) -> Kronecker:
    """The state before the first refresh, from the leaves' shapes.

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
    objective: Objective,
    params: Params,
    found: Layers,
    state: Kronecker,
    key: Key,
    curvature: str = "fisher",
    decay: float = 0.95,
) -> Kronecker:
    """The state with one more estimate in the running means; one that is not finite is left out.

    The first 1/(1 − decay) estimates have equal weights.
    """
    probes, bases = {}, {}
    for i in found.known:
        eigen = not isinstance(state.squares[i], tuple)
        first, last = jax.tree.map(jnp.zeros_like, state.moments[i])
        squares = jnp.zeros_like(state.squares[i]) if eigen else ()
        probes[i] = Probe(first, last, jnp.zeros((), first.dtype), squares)
        if eigen:
            # The basis of a diagonal side is the identity.
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
    """The state with new inverses or eigenbases of its moments, computed by all devices together.

    Args:
      found: the layers.
      state: the moments.
      damping: λ > 0.
      axis_name: inside `pmap` or `shard_map`, the devices' axis.
      mesh: under `jit`, their mesh.
    """
    names = [(i, side) for i in found.known for side in (0, 1)]
    matrices, shifts = [], []
    for i in found.known:
        first, last = state.moments[i]
        has_bias = found.known[i].bias is not None
        pi, mean = balance(first, last, first.shape[0] - (not has_bias))
        # λ is at least a rounding error of the curvature.
        floor = jnp.finfo(first.dtype).eps * mean
        root = jnp.sqrt(jnp.maximum(damping.astype(first.dtype), floor))
        matrices += [first, last]
        shifts += [pi * root, root / pi]
    eigen = any(not isinstance(s, tuple) for s in state.squares)
    solve = inverses.eigen if eigen else inverses.inverse
    results = inverses.shared(solve, matrices, shifts, axis_name, mesh)
    new_inverses, squares = list(state.inverses), list(state.squares)
    for i in found.known:
        new = Pair(*(results[names.index((i, side))][0] for side in (0, 1)))
        usable = tree.all_finite(new)
        new_inverses[i] = tree.where(usable, new, state.inverses[i])
        if eigen:
            # In new bases the diagonal starts from that of the factors.
            values = [results[names.index((i, side))][1] for side in (0, 1)]
            outer = values[0][:, None] * values[1][None]
            squares[i] = jnp.where(usable, outer, state.squares[i])
    return state._replace(inverses=tuple(new_inverses), squares=tuple(squares))


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
                # The coordinate of a missing bias is zero, as its moments are.
                v = jnp.pad(v, [(0, 1), (0, 0)])
            else:
                v = jnp.concatenate([v, leaves[layer.bias].astype(first.dtype)[None]])
            if isinstance(state.squares[i], tuple):
                # Inverses are symmetric: a transpose would only cost a copy of them each step.
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
    """P v Q, where an array of one axis is a diagonal matrix."""
    v = first[:, None] * v if first.ndim == 1 else first @ v
    return v * last[None] if last.ndim == 1 else v @ last
