r"""Second moments of a layer's inputs and output gradients, gathered during a backward pass.

A layer's output y passes through an identity whose derivative also gives, as the "gradient" of a
`Probe` of zeros, the sums Σ ā āᵀ and Σ g gᵀ over rows (examples, positions, steps), for inputs a
and the gradient g at y. Sums over reuses of a kernel, scans, slices of the batch and devices are
then those of any other gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.types import Params, PyTree
from jdl.optim.kronecker.layers import Layer, Layers, walk
from jdl.optim.kronecker.layout import Piece
from jdl.optim.kronecker.recognize import Dense, Use


class Probe(NamedTuple):
    """The second moments of a kernel of D inputs and K outputs, summed over rows."""

    # Of the side of its leading axes, [D+1, D+1], the last coordinate being the bias's 1 (zero
    # where no bias joins); or [D+1], the diagonal alone.
    first: jax.Array
    last: jax.Array  # likewise of its last axis, [K, K] or [K]
    rows: jax.Array  # the number of rows, weighted by the mask
    squares: PyTree = ()  # second moments of the gradient in the eigenbases, [D+1, K]; ()


class Bases(NamedTuple):
    """Orthogonal bases for `Probe.squares`; () is the identity."""

    first: PyTree
    last: PyTree


def probed(
    predict: Callable[[Params], Any],
    params: Params,
    layers: Layers,
    probes: Mapping[int, Probe],
    bases: Mapping[int, Bases],
    weights: jax.Array | None = None,
    max_rows: int = 1 << 14,
) -> Any:
    """`predict(params)`, whose gradient with respect to `probes` is their layers' second moments.

    Args:
      predict: params -> outputs.
      params: the current parameters.
      layers: from `layers.find`.
      probes: one for each kernel, of zeros.
      bases: for the probes that have `squares`.
      weights: float[B], the mask, for arrays whose first axis is of that size.
      max_rows: of more patches of a convolution than this, evenly spaced ones are used.
    """

    def mark(y: jax.Array, x: jax.Array, use: Use) -> jax.Array:
        pieces = [p for p in use.view.pieces if p.leaf in layers.known]
        known = [layers.known[p.leaf] for p in pieces]
        if not pieces or (any(layer.tagged for layer in known) and not use.tagged):
            return y
        mine = [probes[p.leaf] for p in pieces]
        theirs = [bases.get(p.leaf) for p in pieces]
        rows = weights
        if rows is not None and (not x.ndim or x.shape[0] != rows.shape[0]):
            rows = None

        @jax.custom_vjp
        def identity(y: Any, x: Any, probes: Any, bases: Any, weights: Any) -> Any:
            return y

        def forward(y: Any, x: Any, probes: Any, bases: Any, weights: Any) -> Any:
            return y, (x, probes, bases, weights)

        def backward(kept: Any, g: Any) -> Any:
            x, probes, bases, weights = kept
            a, g_rows, w = _rows(use.site, x, g, weights, max_rows)
            moments = [
                _moments(a, g_rows, w, piece, layer, probe, basis)
                for piece, layer, probe, basis in zip(pieces, known, probes, bases, strict=True)
            ]
            return g, None, moments, None, None

        identity.defvjp(forward, backward)
        return identity(y, jax.lax.stop_gradient(x), mine, theirs, rows)

    return walk(predict, params, mark=mark)


def _rows(site: Any, x: Any, g: Any, weights: Any, max_rows: int) -> tuple[Any, Any, Any]:
    """Inputs [R, D], output gradients [R', K] and weights [R] of a product's rows."""
    if isinstance(site, Dense):
        x = x.transpose(site.permutation)
        lead = x.shape[: g.ndim - 1]
        a = x.reshape(-1, site.num_inputs)
        g = jnp.moveaxis(g, site.output_axis, -1)
        g = g.reshape(-1, g.shape[-1])
    else:
        g = g.transpose((site.y_spec[0], *site.y_spec[2:], site.y_spec[1]))
        x = x.transpose((site.x_spec[0], *site.x_spec[2:], site.x_spec[1]))
        space = g.shape[1:-1]
        thin = math.ceil((math.prod(g.shape[:-1]) / max_rows) ** (1 / len(space)))
        strides = tuple(max(1, min(thin, n)) for n in space)
        x = patches(x, site, space, strides)
        places = tuple(slice(s // 2, None, s) for s in strides)
        share = math.prod(x.shape[1:-1]) / math.prod(space)
        g = g[(slice(None), *places)] * jnp.asarray(share**-0.5, g.dtype)
        lead = x.shape[:-1]
        a = x.reshape(-1, x.shape[-1])
        g = g.reshape(-1, g.shape[-1])
    if weights is None:
        return a, g, None
    shape = (weights.shape[0],) + (1,) * (len(lead) - 1)
    return a, g, jnp.broadcast_to(weights.reshape(shape), lead).reshape(-1)


def patches(x: jax.Array, site: Any, space: Sequence[int], thin: Sequence[int]) -> jax.Array:
    """The patches [B, ..., window · C] behind a convolution's outputs, every `thin`-th of them."""
    x = jnp.pad(x, [(0, 0), *site.padding, (0, 0)])
    parts = []
    for corner in _corners(site.window):
        places = tuple(
            slice(c * d + t // 2 * s, c * d + (n - 1) * s + 1, s * t)
            for c, d, s, n, t in zip(corner, site.dilation, site.strides, space, thin, strict=True)
        )
        parts.append(x[(slice(None), *places)])
    return jnp.concatenate(parts, axis=-1)


def _corners(window: Sequence[int]) -> list[tuple[int, ...]]:
    if not window:
        return [()]
    return [(i, *rest) for i in range(window[0]) for rest in _corners(window[1:])]


def _moments(
    a: Any, g: Any, weights: Any, piece: Piece, layer: Layer, probe: Probe, bases: Any
) -> Probe:
    """The second moments that a use adds to its kernel's probe."""
    dtype = probe.rows.dtype
    a, g = a.astype(dtype), g.astype(dtype)
    if not layer.transposed:  # the piece of a transposed kernel covers all of its columns
        g = g[:, piece.start : piece.start + piece.size]
    rows = jnp.asarray(float(a.shape[0]), dtype) if weights is None else jnp.sum(weights)
    if weights is not None:
        a = a * jnp.sqrt(weights.astype(dtype))[:, None]
    with jax.default_matmul_precision("highest"):
        if layer.transposed:
            return Probe(
                _bordered(g, None, probe.first),
                _moment(a, probe.last.ndim),
                rows.astype(dtype),
                _squares(g, a, None, probe, bases, piece),
            )
        one = None
        if layer.bias is not None:
            one = jnp.ones(a.shape[0], dtype) if weights is None else jnp.sqrt(weights)
        last = _moment(g, probe.last.ndim)
        spread = [(piece.offset, probe.last.shape[0] - piece.offset - piece.size)] * last.ndim
        return Probe(
            _bordered(a, one, probe.first),
            jnp.pad(last, spread),
            rows.astype(dtype),
            _squares(a, g, one, probe, bases, piece),
        )


def _moment(x: jax.Array, ndim: int) -> jax.Array:
    return x.T @ x if ndim == 2 else jnp.sum(x * x, axis=0)


def _bordered(x: jax.Array, one: jax.Array | None, like: jax.Array) -> jax.Array:
    """The moment of [x, one], or of [x, 0]."""
    moment = _moment(x, like.ndim)
    if one is None:
        return jnp.pad(moment, [(0, 1)] * like.ndim)
    corner = jnp.sum(one * one)[None]
    if like.ndim == 1:
        return jnp.concatenate([moment, corner])
    side = one @ x
    return jnp.block([[moment, side[:, None]], [side[None], corner[:, None]]])


def _squares(first: Any, last: Any, one: Any, probe: Probe, bases: Any, piece: Piece) -> Any:
    """Σ (Q_firstᵀ x)² ((Q_lastᵀ y)²)ᵀ over rows: the curvature's diagonal in the eigenbases."""
    if bases is None:
        return ()
    border = jnp.zeros(first.shape[0], first.dtype) if one is None else one
    first = jnp.concatenate([first, border[:, None]], axis=1)
    width = probe.last.shape[0] - piece.offset - piece.size
    last = jnp.pad(last, [(0, 0), (piece.offset, width)])
    x = first if isinstance(bases.first, tuple) else first @ bases.first
    y = last if isinstance(bases.last, tuple) else last @ bases.last
    # `first` includes each row's weight; gradients of masked rows are zero already.
    return jnp.square(x).T @ jnp.square(y)


def dtype_of(leaf: Any) -> Any:
    """The type of a leaf's second moments."""
    return jnp.dtype(tree.accumulator(leaf.dtype))
