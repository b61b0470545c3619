r"""K-FAC's approximation of the Gauss-Newton matrix as an operator with known eigenvectors.

    A ⊗ G = (Q_A ⊗ Q_G) (Λ_A ⊗ Λ_G) (Q_A ⊗ Q_G)ᵀ

for each layer, of the optimizer's moments (`jdl.optim.kronecker`) averaged over a data set. EKFAC
replaces Λ_A ⊗ Λ_G by the curvature in these eigenvectors, the best of all diagonals there.
Parameters outside known layers have a diagonal.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Key, Params, PyTree
from jdl.curvature.landscape import Landscape, landscape_of
from jdl.curvature.spectral import SpectralOperator
from jdl.optim.kronecker import inverses, moments
from jdl.optim.kronecker.factors import times, transposed
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.probes import SHARING, Bases, Probe, dtype_of


def kfac_operator(
    of: Landscape | Objective,
    params: Params | None = None,
    *,
    eigen: bool = False,
    curvature: str = "gauss_newton",
    sharing: str = "expand",
    max_size: int = 2048,
    seed: int = 0,
) -> SpectralOperator:
    """K-FAC's or EKFAC's matrix, without damping or a regularizer's part.

    Args:
      of: a `Landscape`, which has its own parameters, or a `jdl.Objective`.
      params: a pytree of floating-point arrays.
      eigen: whether to correct the eigenvalues (EKFAC), in a second pass over the data.
      curvature: "gauss_newton", exact factors at a backward pass per output; "fisher", sampled
        ones at one; or "empirical_fisher": see `jdl.optim.kfac`.
      sharing: "expand" or "reduce", likewise.
      max_size: a layer's side with more coordinates than this has a diagonal factor, ≥ 1.
      seed: for the random samples.

    >>> from jdl.losses import squared_error
    >>> batch = {"x": jnp.diag(jnp.array([1.0, 2.0])), "label": jnp.ones((2, 1))}
    >>> objective = Objective.from_fns(lambda p, b: b["x"] @ p["w"], squared_error, batch)
    >>> matrix = kfac_operator(objective, {"w": jnp.zeros((2, 1))})
    >>> matrix.eigenvalues.tolist(), matrix.trace()
    ([0.5, 2.0], 2.5)

    References: as for `jdl.optim.kfac`.
    """
    check.one_of("curvature", curvature, moments.CURVATURES)
    check.one_of("sharing", sharing, SHARING)
    check.positive_int("max_size", max_size)
    land, key = landscape_of(of, params), jax.random.key(seed)
    options = curvature, sharing, max_size
    factors, diagonals = land.mean(lambda o: _moments(o, land.params, key, None, *options))
    bases, squares = _bases(factors)
    if eigen:
        squares, diagonals = land.mean(lambda o: _moments(o, land.params, key, bases, *options))
    layers = moments.find_layers(next(land.objectives()), land.params)
    q = rotation(land.params, layers, bases, squares, diagonals)
    return SpectralOperator(np.maximum(q.coordinates, 0.0), q.into, q.back, land.unravel)


class Rotation(NamedTuple):
    """A matrix Q between flat parameters and coordinates, the latter layer by layer."""

    coordinates: jax.Array  # the values it was made with
    into: Callable[[jax.Array], jax.Array]  # Qᵀ
    back: Callable[[jax.Array], jax.Array]  # Q


def rotation(
    params: Params, layers: Layers, sides: Mapping[int, Any], values: PyTree, others: PyTree
) -> Rotation:
    """V -> P V Rᵀ of each layer's [N, D, K] with these sides P and R, the identity elsewhere.

    `values` are coordinates of each layer, and `others` of each leaf outside of layers. Sides may
    have coordinates besides the layer's own: those of its parameters are taken.
    """
    flat, unravel = ravel_pytree((values, others))
    unravel_params = ravel_pytree(params)[1]

    @jax.default_matmul_precision("highest")
    def into(v: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(unravel_params(v))
        inner = {}
        for i, layer in layers.known.items():
            x, (n, _, k) = layer.matrices(leaves[i]), layer.shape
            if layer.bias is not None:
                x = jnp.concatenate([x, leaves[layer.bias].reshape(n, 1, k)], axis=1)
            room = [(0, most - m) for most, m in zip(values[i].shape, x.shape, strict=True)]
            inner[i] = times(transposed(sides[i][0]), jnp.pad(x, room), sides[i][1])
        return ravel_pytree((inner, {i: leaves[i] for i in layers.unknown}))[0]

    @jax.default_matmul_precision("highest")
    def back(c: jax.Array) -> jax.Array:
        inner, rest = unravel(c)
        leaves, structure = jax.tree.flatten(params)
        for i, layer in layers.known.items():
            x, (_, d, k) = times(sides[i][0], inner[i], transposed(sides[i][1])), layer.shape
            leaves[i] = layer.leaf(x[:, :d, :k], leaves[i].shape)
            if layer.bias is not None:
                leaves[layer.bias] = x[:, d, :k].reshape(leaves[layer.bias].shape)
        for i in layers.unknown:
            leaves[i] = rest[i]
        return ravel_pytree(jax.tree.unflatten(structure, leaves))[0]

    return Rotation(flat, into, back)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _moments(
    objective: Objective,
    params: Params,
    key: Key,
    bases: Mapping[int, Bases] | None,
    curvature: str,
    sharing: str,
    max_size: int,
) -> tuple[dict[int, Any], dict[int, jax.Array]]:
    """Each layer's A and G, or given bases its second moments in them; the others' diagonals."""
    found, leaves = moments.find_layers(objective, params), jax.tree.leaves(params)
    probes = {}
    for i, layer in found.known.items():
        (n, d, k), zeros = layer.shape, functools.partial(jnp.zeros, dtype=dtype_of(leaves[i]))
        d += layer.bias is not None
        first, last = (
            zeros((n, size) if hot or size > max_size else (n, size, size))
            for size, hot in zip((d, k), layer.one_hot, strict=True)
        )
        probes[i] = Probe(first, last, zeros(n), () if bases is None else zeros((n, d, k)))
    drawn, diagonals = moments.second_moments(
        objective, params, found, probes, bases or {}, key, curvature, sharing=sharing
    )
    pick = (lambda p: (p.first, p.last)) if bases is None else (lambda p: p.squares)
    return {i: pick(p) for i, p in drawn.items()}, diagonals


@jax.jit
def _bases(factors: dict[int, Any]) -> tuple[dict[int, Bases], dict[int, jax.Array]]:
    """The factors' eigenvectors, and the products of their eigenvalues, [N, D, K]."""
    bases, squares = {}, {}
    for i, pair in factors.items():
        (first, a), (last, g) = (inverses.eigen(x, x) for x in pair)
        bases[i], squares[i] = Bases(first, last), a[:, :, None] * g[:, None]
    return bases, squares
