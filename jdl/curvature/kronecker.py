r"""K-FAC's approximation of the Gauss-Newton matrix as an operator with known eigenvectors.

    A ⊗ G = (Q_A ⊗ Q_G) (Λ_A ⊗ Λ_G) (Q_A ⊗ Q_G)ᵀ

for each layer, of the same moments as the optimizer's (`jdl.optim.kronecker`), here averaged over a
data set. EKFAC replaces Λ_A ⊗ Λ_G by the gradients' second moments in these eigenvectors, which are
the best of all diagonals there. Parameters outside known layers have a diagonal.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Key, Params
from jdl.curvature.landscape import Landscape, landscape_of
from jdl.curvature.spectral import SpectralOperator, spectral
from jdl.optim.kronecker import inverses, moments
from jdl.optim.kronecker.blocks import Layer
from jdl.optim.kronecker.factors import times, transposed
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

    References:
      Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature
      (2015).
      George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis
      (2018).
    """
    check.one_of("curvature", curvature, moments.CURVATURES)
    check.one_of("sharing", sharing, SHARING)
    check.positive_int("max_size", max_size)
    land = landscape_of(of, params)
    found = moments.find_layers(next(land.objectives()), land.params)
    key = jax.random.key(seed)
    options = curvature, sharing, max_size
    factors, diagonals = land.mean(lambda o: _moments(o, land.params, key, None, *options))
    bases, squares = _bases(factors)
    if eigen:
        squares, diagonals = land.mean(lambda o: _moments(o, land.params, key, bases, *options))

    def rotated(v: jax.Array, inverse: bool) -> jax.Array:
        leaves, structure = jax.tree.flatten(land.unravel(v))
        for i, layer in found.known.items():
            first, last = (transposed(q) if inverse else q for q in bases[i])
            _set(leaves, layer, times(first, _matrices(leaves, layer), transposed(last)))
        return ravel_pytree(jax.tree.unflatten(structure, leaves))[0]

    with jax.default_matmul_precision("highest"):
        leaves, structure = jax.tree.flatten(land.params)
        for i, layer in found.known.items():
            _set(leaves, layer, squares[i])
        for i, x in diagonals.items():
            leaves[i] = x
        values = ravel_pytree(jax.tree.unflatten(structure, leaves))[0]
    precise = jax.default_matmul_precision("highest")
    return spectral(
        np.maximum(values, 0.0),
        precise(functools.partial(rotated, inverse=True)),
        precise(functools.partial(rotated, inverse=False)),
        land.unravel,
    )


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
    found = moments.find_layers(objective, params)
    leaves = jax.tree.leaves(params)

    def zeros(i: int, layer: Layer) -> Probe:
        n, d, k = _shape(layer)

        def side(size: int, hot: bool) -> jax.Array:
            shape = (n, size) if hot or size > max_size else (n, size, size)
            return jnp.zeros(shape, dtype_of(leaves[i]))

        first, last = (side(*each) for each in zip((d, k), layer.one_hot, strict=True))
        squares = () if bases is None else jnp.zeros((n, d, k), first.dtype)
        return Probe(first, last, jnp.zeros(n, first.dtype), squares)

    probes = {i: zeros(i, layer) for i, layer in found.known.items()}
    given = {} if bases is None else bases
    drawn, diagonals = moments.second_moments(
        objective, params, found, probes, given, key, curvature, sharing=sharing
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


def _shape(layer: Layer) -> tuple[int, int, int]:
    """N, D with the bias, and K."""
    n, d, k = layer.shape
    return n, d + (layer.bias is not None), k


def _matrices(leaves: list[Any], layer: Layer) -> jax.Array:
    """A layer's kernel, and its bias as the last row, [N, D, K]."""
    v = layer.matrices(leaves[layer.kernel])
    if layer.bias is None:
        return v
    n, _, k = layer.shape
    return jnp.concatenate([v, leaves[layer.bias].reshape(n, 1, k)], axis=1)


def _set(leaves: list[Any], layer: Layer, v: jax.Array) -> None:
    """The inverse of `_matrices`."""
    shape = leaves[layer.kernel].shape
    leaves[layer.kernel] = layer.leaf(v[:, : layer.shape[1]], shape)
    if layer.bias is not None:
        leaves[layer.bias] = v[:, -1].reshape(leaves[layer.bias].shape)
