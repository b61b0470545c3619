r"""Second moments of a layer's inputs and output gradients, gathered during a backward pass.

A layer's output y passes through an identity whose derivative also gives, as the "gradient" of a
`Probe` of zeros, the sums Σ ā āᵀ and Σ g gᵀ over rows (examples, positions, steps), for inputs a
and the gradient g at y. Sums over reuses of a kernel, slices of the batch and devices are then
those of any other gradient, and a scan over stacked layers stacks them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.types import Params, PyTree
from jdl.optim.kronecker import blocks
from jdl.optim.kronecker.blocks import Layer, Place
from jdl.optim.kronecker.layers import Layers, Probing, walk
from jdl.optim.kronecker.recognize import Gather, Use, gathered
from jdl.optim.kronecker.views import Piece, View

SHARING = ("expand", "reduce")


class Probe(NamedTuple):
    """The second moments of N kernels of D inputs and K outputs, summed over rows.

    A side of n coordinates has `size ≥ n` in its arrays, the others being zero.
    """

    # Of the inputs, [N, D+1, D+1], coordinate D being the bias's 1 (zero where no bias joins); or
    # [N, D+1], the diagonal alone.
    first: jax.Array
    last: jax.Array  # likewise of the outputs, [N, K, K] or [N, K]
    rows: jax.Array  # [N], the number of rows, weighted by the mask
    squares: PyTree = ()  # second moments of the gradient in the eigenbases, [N, D+1, K]; ()


class Bases(NamedTuple):
    """Orthogonal bases for `Probe.squares`; of a diagonal side, which has none, as its array."""

    first: jax.Array
    last: jax.Array


# For each leaf: a kernel's probe for each of its ways, or for a leaf of `Layers.separate` zeros
# [B, ...], whose gradient is the leaf's for each example.
Probes: TypeAlias = Mapping[int, Any]


class _Data(NamedTuple):
    """What a kernel's views carry along: one probe a way, in the shapes of its blocks' axes."""

    probes: tuple[Probe, ...]
    bases: Any


def probed(
    predict: Callable[[Params], Any],
    params: Params,
    layers: Layers,
    probes: Probes,
    bases: Mapping[int, Bases],
    weights: jax.Array | None = None,
    *,
    examples: int | None = None,
    max_rows: int = 1 << 14,
    sharing: str = "expand",
) -> Any:
    """`predict(params)`, whose gradient with respect to `probes` is their layers' second moments.

    Args:
      predict: params -> outputs.
      params: the current parameters.
      layers: from `layers.find`.
      probes: of zeros.
      bases: for the probes that have `squares`.
      weights: float[B], the mask.
      examples: B; needed for `Layers.separate` and `sharing="reduce"`.
      max_rows: of more patches of a convolution than this, evenly spaced ones are used.
      sharing: "expand" takes each position of an example as a row; "reduce" takes the mean of its
        inputs and the sum of its gradients as one.
    """
    shapes = [x.shape for x in jax.tree.leaves(params)]

    def unfolded(leaf: int, x: Any) -> Any:
        axes = layers.known[leaf].sizes("b")
        return jax.tree.map(lambda a: a.reshape(*axes, *a.shape[1:]), x)

    def data(leaf: int) -> Any:
        if leaf in layers.known:
            return _Data(unfolded(leaf, tuple(probes[leaf])), unfolded(leaf, bases.get(leaf)))
        return probes[leaf]

    def mark(y: jax.Array, x: jax.Array, use: Use, data: Sequence[Any]) -> jax.Array:
        parts = _parts(use, data, layers, shapes)
        if not parts:
            return y
        options: dict[str, Any] = {"examples": examples, "max_rows": max_rows, "sharing": sharing}

        @jax.custom_vjp
        def identity(y: Any, x: Any, probes: Any, bases: Any, weights: Any) -> Any:
            return y

        def forward(y: Any, x: Any, probes: Any, bases: Any, weights: Any) -> Any:
            return y, (x, probes, bases, weights)

        def backward(kept: Any, g: Any) -> Any:
            x, probes, bases, weights = kept
            moments = _moments(use, parts, x, g, probes, bases, weights, **options)
            return g, None, moments, None, None

        identity.defvjp(forward, backward)
        mine, theirs = [p.data.probes for p in parts], [p.data.bases for p in parts]
        return identity(y, jax.lax.stop_gradient(x), mine, theirs, weights)

    known = {i: data(i) for i in probes}
    return walk(
        predict,
        params,
        twice=layers.twice,
        probing=Probing(mark, _slices(layers), known),
        examples=examples,
    )


class _Part(NamedTuple):
    """A piece of the kernel of a use, with its layer."""

    data: _Data
    layer: Layer
    piece: Piece
    found: list[Place]
    way: int  # which of the layer's ways this use is
    start: int  # where it starts along the axis of the pieces


def _parts(use: Use, data: Sequence[Any], layers: Layers, shapes: Sequence[Any]) -> list[_Part]:
    parts, start = [], 0
    for piece, own in zip(use.view.pieces, data, strict=True):
        layer = layers.known.get(piece.leaf)
        if layer is not None and isinstance(own, _Data) and layer.tagged <= use.tagged:
            found = blocks.places(use, piece, shapes[piece.leaf])
            fits = None if found is None else blocks.resolved(found, layer.form)
            if fits is not None:
                way = layer.ways.index(fits[1])
                parts.append(_Part(own, layer, piece, fits[0], way, start))
        start += piece.shape[use.view.axis] if len(use.view.pieces) > 1 else 0
    return parts


def _moments(
    use: Use,
    parts: Sequence[_Part],
    x: Any,
    g: Any,
    probes: Sequence[tuple[Probe, ...]],
    bases: Sequence[Any],
    weights: Any,
    *,
    examples: int | None,
    max_rows: int,
    sharing: str,
) -> list[tuple[Probe, ...]]:
    """The moments that a use adds to the probes of its kernels, for each of their ways."""
    hot, n = isinstance(use.site, Gather), len(use.blocks)
    reduce = sharing == "reduce" and not hot
    x, g = gathered(use.site, x, g, max(max_rows, g.size) if reduce else max_rows)
    axis = use.row_of_examples()
    if axis is not None and examples is not None and g.shape[n + axis] != examples:
        # Examples × positions, the examples being the more significant.
        x, g = (
            t.reshape(*t.shape[: n + axis], examples, -1, *t.shape[n + axis + 1 :]) for t in (x, g)
        )
    lead = g.shape[n : g.ndim - len(use.outputs)]
    reduce = reduce and axis is not None
    each = jnp.ones(lead[axis] if reduce else math.prod(lead))
    if weights is not None and axis is not None:
        spread = weights.reshape([-1 if i == axis else 1 for i in range(len(lead))])
        each = weights if reduce else jnp.broadcast_to(spread, lead).reshape(-1)
    rows = slice(n, n + len(lead))

    def moments(part: _Part, mine: tuple[Probe, ...], bases: Any) -> tuple[Probe, ...]:
        # A block of an ensemble with the same inputs is among the outputs.
        lifted = [p for p in part.found if p.role == "b" and p.source[0] in use.outputs]
        own = [p for p in part.found if p.role == "b" and p.source[0] >= 0]
        index = tuple(
            p.start if p.source[0] == -2 else slice(None)
            for p in part.found
            if p.role == "b" and p.source[0] != -1
        )
        nothing = jax.tree.map(jnp.zeros_like, mine)
        mine, bases = jax.tree.map(lambda x: x[index], (mine, bases))

        def spread(t: jax.Array) -> jax.Array:
            for p in lifted:
                t = jnp.repeat(jnp.expand_dims(t, own.index(p)), p.full, axis=own.index(p))
            return t

        def columns(t: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            """[blocks..., rows, columns], in the order of the leaf."""
            t = _cut(t, part, use, axes, rows.stop)
            t, _ = blocks.arranged(t, rows.stop, axes, part.piece, part.found)
            heads = [p.full for p in lifted] if axes == use.outputs else []
            t = t.reshape(*t.shape[: rows.stop + len(heads)], -1)
            t, count = blocks.arranged(t, 0, use.blocks, part.piece, part.found)
            if reduce:
                others = tuple(count + i for i in range(len(lead)) if i != axis)
                t = jnp.mean(t, axis=others) if axes == use.inputs else jnp.sum(t, axis=others)
            t = t.reshape(*t.shape[:count], -1, *heads, t.shape[-1])
            return jnp.moveaxis(t, count + 1, own.index(lifted[0])) if heads else spread(t)

        dtype = mine[0].rows.dtype
        weights = each.astype(dtype)
        b = columns(g.astype(dtype), use.outputs)
        if hot:
            start = sum(p.start for p in part.found if p.role == "i")
            a: Any = _Index(*_within(columns(x[..., None], ())[..., 0], weights, use.site, start))
        else:
            a = columns(x.astype(dtype), use.inputs)
            a = a * jnp.sqrt(weights).reshape((1,) * (a.ndim - 2) + (-1, 1))
        with jax.default_matmul_precision("highest"):
            new = _probe(a, b, weights, part, mine[part.way], bases)
        ones = jnp.ones([part.piece.shape[k] for k in use.blocks], dtype)
        ones = spread(blocks.arranged(ones, 0, use.blocks, part.piece, part.found)[0])
        new = new._replace(rows=ones * jnp.sum(weights))
        new = jax.tree.map(lambda z, x: z.at[index].set(x), nothing[part.way], new)
        return tuple(new if i == part.way else z for i, z in enumerate(nothing))

    return [moments(*args) for args in zip(parts, probes, bases, strict=True)]


class _Index(NamedTuple):
    """Inputs that are unit vectors: their indices [blocks..., R], and weights likewise."""

    at: jax.Array
    weights: jax.Array


def _within(index: jax.Array, weights: jax.Array, site: Any, start: int) -> Any:
    """The indices in a leaf, with weight zero for those that give no gradient."""
    inside = (index >= 0) & (index < site.size)
    weights = jnp.where(inside | site.clip, weights, 0.0)
    return jnp.clip(index, 0, site.size - 1) + start, weights


def _cut(t: jax.Array, part: _Part, use: Use, axes: tuple[int, ...], at: int) -> jax.Array:
    """The part of an array [blocks..., rows..., axes...] that belongs to one of several pieces."""
    along = use.view.axis
    if len(use.view.pieces) == 1 or along not in (*use.blocks, *axes):
        return t
    i = use.blocks.index(along) if along in use.blocks else at + axes.index(along)
    return jax.lax.slice_in_dim(t, part.start, part.start + part.piece.shape[along], axis=i)


def _probe(a: Any, g: jax.Array, weights: jax.Array, part: _Part, like: Probe, bases: Any) -> Probe:
    """The moments of inputs [blocks..., R, D], times their weights' roots, and gradients."""
    exchanged, biased = part.layer.ways[part.way], part.layer.bias is not None
    count = like.rows.ndim
    sides = [like.last, like.first] if exchanged else [like.first, like.last]
    d = part.layer.shape[1]
    if not isinstance(a, _Index):
        if biased:
            one = jnp.broadcast_to(jnp.sqrt(weights)[:, None], (*a.shape[:-1], 1))
            a = jnp.concatenate([a, one], axis=-1)
        a = _padded(a, sides[0])
    g = _padded(g, sides[1])
    moments = [_moment(t, side, count) for t, side in zip((a, g), sides, strict=True)]
    if isinstance(a, _Index) and biased:
        moments[0] = moments[0].at[..., d].add(jnp.sum(weights))
    squares: Any = ()
    if bases is not None:
        own = (bases.last, bases.first) if exchanged else (bases.first, bases.last)
        y = jnp.square(_in_basis(g, own[1], count))
        if isinstance(a, _Index):
            table = jnp.zeros((*like.squares.shape[:count], sides[0].shape[-1], y.shape[-1]))
            each = jnp.broadcast_to(a.weights, a.at.shape)[..., None]
            squares = _added(table, a.at, each * y)
            if biased:
                each = weights.reshape((1,) * (y.ndim - 2) + (-1, 1))
                squares = squares.at[..., d, :].add(jnp.sum(each * y, axis=-2))
        else:
            squares = jnp.square(_in_basis(a, own[0], count)).mT @ y
        squares = squares.mT if exchanged else squares
    first, last = reversed(moments) if exchanged else moments
    return Probe(first, last, like.rows, squares)


def _padded(t: jax.Array, like: jax.Array) -> jax.Array:
    width = like.shape[-1] - t.shape[-1]
    return jnp.pad(t, [(0, 0)] * (t.ndim - 1) + [(0, width)]) if width else t


def _moment(t: Any, like: jax.Array, count: int) -> jax.Array:
    """Σ t tᵀ over rows, or its diagonal, after `count` axes of blocks."""
    if isinstance(t, _Index):
        return _added(jnp.zeros(like.shape, like.dtype), t.at, t.weights)
    return t.mT @ t if like.ndim == count + 2 else jnp.sum(t * t, axis=-2)


def _added(table: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """A table [blocks..., S, ...] with values [blocks..., R, ...] added at indices."""
    n = index.ndim - 1
    flat = lambda t: t.reshape(-1, *t.shape[n:])  # noqa: E731
    values = values.reshape((1,) * (index.ndim + table.ndim - n - 1 - values.ndim) + values.shape)
    values = jnp.broadcast_to(values, index.shape + table.shape[n + 1 :]).astype(table.dtype)
    out = jax.vmap(lambda t, i, v: t.at[i].add(v))(flat(table), flat(index), flat(values))
    return out.reshape(table.shape)


def _in_basis(t: jax.Array, basis: jax.Array, count: int) -> jax.Array:
    return t @ basis if basis.ndim == count + 2 else t


def _slices(layers: Layers) -> Callable[[Any, View], Any]:
    """How a scan over stacked kernels slices their data: along the stack's axis of blocks."""

    def one(data: Any, piece: Piece) -> Any:
        if not isinstance(data, _Data):
            return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), data)  # zeros [B, ...]
        form = layers.known[piece.leaf].form
        size, stride = piece.stacked[-1]
        strides, rest = [], 1
        for role, n in reversed(form):
            strides += [(rest, n)] if role == "b" else []
            rest *= n
        left = [s for s in reversed(strides) if s[0] not in [t for _, t in piece.stacked[:-1]]]
        at = [s for s, _ in left].index(stride)
        start = piece.offset // stride % left[at][1]

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.slice_in_dim(jnp.moveaxis(x, at, 0), start, start + size)

        return jax.tree.map(cut, data)

    return lambda data, view: tuple(one(d, p) for d, p in zip(data, view.pieces, strict=True))


def dtype_of(leaf: Any) -> Any:
    """The type of a leaf's second moments."""
    return jnp.dtype(tree.accumulator(leaf.dtype))
