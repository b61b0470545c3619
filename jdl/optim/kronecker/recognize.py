"""Recognizes layers: the products by which a parameter is a layer's kernel.

A rule in `USES`, by the primitive's name, takes an equation and the tags of its inputs and returns
how the kernel is used, or None where the product is not a layer. What counts is what the product
does with each axis of the kernel: it contracts an input's, leaves an output's free, and shares a
block's with the other factor, so that each index has its own kernel. A new kind of layer is a new
rule here, and its arrays in `gathered`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.optim.kronecker.views import View, reshape


class Dense(NamedTuple):
    """The orders that bring x's axes to blocks, rows, inputs, and y's to blocks, rows, outputs."""

    x: tuple[int, ...]
    y: tuple[int, ...]


class Conv(NamedTuple):
    """The patches of a convolution."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]  # of a transposed convolution
    dilation: tuple[int, ...]
    groups: int
    x: tuple[int, ...]  # the order of axes that brings x's to batch, space..., channels
    y: tuple[int, ...]


class Gather(NamedTuple):
    """Rows taken from a table: the orders of the indices' axes (blocks, rows) and of y's."""

    x: tuple[int, ...]
    y: tuple[int, ...]
    column: int  # of the index, whose last axis may have zeros for the table's other axes
    size: int  # of the table
    clip: bool  # whether indices beyond it are the last one's; else they give no gradient


class Use(NamedTuple):
    """A product with a kernel, whose axes have these meanings, in `gathered`'s order."""

    kind: str
    view: View
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    y_axes: tuple[tuple[int, ...], ...]  # for each axis of y the kernel's axes; () is a row's
    site: Dense | Conv | Gather
    tagged: bool = False
    examples: int | None = None  # y's axis of examples, or of examples × positions

    def row_of_examples(self) -> int | None:
        """The place of the axis of examples among the rows' in `gathered`."""
        rows = [i for i in self.site.y if not self.y_axes[i]]
        return None if self.examples is None else rows.index(self.examples)


def _dense_use(eqn: Any, tags: list[Any]) -> Use | None:
    contract, batch = eqn.params["dimension_numbers"]
    side = 0 if isinstance(tags[0], View) else 1
    if isinstance(tags[1 - side], View):
        return None
    kernel, x = eqn.invars[side].aval, eqn.invars[1 - side].aval
    inputs, blocks = tuple(contract[side]), tuple(batch[side])
    theirs, their_blocks = tuple(contract[1 - side]), tuple(batch[1 - side])
    outputs = tuple(i for i in range(kernel.ndim) if i not in (*inputs, *blocks))
    rows = tuple(i for i in range(x.ndim) if i not in (*theirs, *their_blocks))
    k, b, r, o = tags[side], len(blocks), len(rows), len(outputs)
    if side == 1:
        y = tuple(range(b + r + o))
        free = ((),) * r + tuple((i,) for i in outputs)
    else:
        y = (*range(b), *range(b + o, b + o + r), *range(b, b + o))
        free = tuple((i,) for i in outputs) + ((),) * r
    y_axes = (*((i,) for i in blocks), *free)
    site = Dense((*their_blocks, *rows, *theirs), y)
    return Use("dense", k, blocks, inputs, outputs, y_axes, site)


def _conv_use(eqn: Any, tags: list[Any]) -> Use | None:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if not isinstance(tags[1], View) or isinstance(tags[0], View):
        return None
    if params["batch_group_count"] != 1:
        return None
    kernel = eqn.invars[1].aval.shape
    site = Conv(
        window=tuple(kernel[i] for i in numbers.rhs_spec[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        x_dilation=tuple(params["lhs_dilation"]),
        dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
        x=(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]),
        y=(numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]),
    )
    return _conv(tags[1], kernel, numbers.rhs_spec, site)


def _conv(view: View, kernel: Sequence[int], spec: Sequence[int], site: Conv) -> Use | None:
    """A convolution's use; the kernel's axis of outputs is taken as two, of groups and outputs."""
    out, channels, *space = spec
    if len(view.pieces) > 1 and (view.axis == out and site.groups > 1):
        return None

    def axis(i: int) -> int:
        return i + (i >= out)

    pieces = []
    for piece in view.pieces:
        shape = piece.shape
        grouped = (site.groups, shape[out] // site.groups)
        regrouped = reshape(piece, (*shape[:out], *grouped, *shape[out + 1 :]))
        if regrouped is None:
            return None
        pieces.append(regrouped)
    y_axes: list[tuple[int, ...]] = [()] * len(kernel)
    y_axes[site.y[-1]] = (out, out + 1)
    view = view._replace(pieces=tuple(pieces), axis=axis(view.axis))
    inputs = (*map(axis, space), axis(channels))
    return Use("conv", view, (out,), inputs, (out + 1,), tuple(y_axes), site)


def _plain_conv(view: View, kernel: Sequence[int], padding: Any, strides: Any = None) -> Use | None:
    """The use of a kernel [..., C, K] by a convolution of x [B, ..., C]."""
    n = len(kernel)
    order, ones = tuple(range(n)), (1,) * (n - 2)
    window, strides = tuple(kernel[:-2]), tuple(strides or ones)
    site = Conv(window, strides, tuple(padding), ones, ones, 1, order, order)
    return _conv(view, kernel, (n - 1, n - 2, *range(n - 2)), site)


def _canonical_conv_use(eqn: Any, tags: list[Any]) -> Use | None:
    """The convolution of `jdl.models.convolution`: NHWC, HWIO, stride 1."""
    if not isinstance(tags[1], View) or isinstance(tags[0], View):
        return None
    return _plain_conv(tags[1], eqn.invars[1].aval.shape, eqn.params["padding"])


def _tag_use(eqn: Any, tags: list[Any]) -> Use | None:
    view, conv = tags[2], eqn.params["conv"]
    if not isinstance(view, View):
        return None
    y, x, kernel = (v.aval for v in eqn.invars[:3])
    if conv is not None:
        strides, padding = conv
        use = _plain_conv(view, kernel.shape, padding, strides)
        return use and use._replace(tagged=True)
    y_axes = ((),) * (y.ndim - 1) + ((1,),)
    site = Dense(tuple(range(x.ndim)), tuple(range(y.ndim)))
    return Use("dense", view, (), (0,), (1,), y_axes, site, True)


_CLIPPED = (jax.lax.GatherScatterMode.CLIP, jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _gather_use(eqn: Any, tags: list[Any]) -> Use | None:
    """Rows of a table, chosen along one of its axes."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, indices = (v.aval for v in eqn.invars)
    y = eqn.outvars[0].aval
    blocks = tuple(numbers.operand_batching_dims)
    their_blocks = tuple(numbers.start_indices_batching_dims)
    indexed, clip = tuple(numbers.start_index_map), eqn.params["mode"] in _CLIPPED
    chosen = tuple(i for i in indexed if sizes[i] != table.shape[i] or len(indexed) == 1)
    outputs = tuple(i for i in range(table.ndim) if i not in (*chosen, *blocks))
    whole = all(sizes[i] == table.shape[i] for i in outputs)
    # Clipped, an index of a whole axis is 0: a slice of one row, say, for each example.
    if len(chosen) != 1 or sizes[chosen[0]] != 1 or not whole or not (clip or indexed == chosen):
        return None
    if not isinstance(tags[0], View):
        return None
    free = [i for i in range(y.ndim) if i not in numbers.offset_dims]
    rows = tuple(i for i in range(indices.ndim - 1) if i not in their_blocks)
    gone = (*numbers.collapsed_slice_dims, *blocks)
    kept = zip(numbers.offset_dims, (i for i in range(table.ndim) if i not in gone), strict=True)
    place = {j: i for i, j in kept}
    y_axes: list[tuple[int, ...]] = [()] * y.ndim
    for j in outputs:
        y_axes[place[j]] = (j,)
    for i, j in zip(their_blocks, blocks, strict=True):
        y_axes[free[i]] = (j,)
    unit = [place[j] for j in chosen if j in place]
    order = (*(free[i] for i in (*their_blocks, *rows)), *unit, *(place[j] for j in outputs))
    size = table.shape[chosen[0]]
    site = Gather((*their_blocks, *rows), order, indexed.index(chosen[0]), size, clip)
    return Use("embed", tags[0], blocks, chosen, outputs, tuple(y_axes), site)


USES: dict[str, Callable[[Any, list[Any]], Use | None]] = {
    "dot_general": _dense_use,
    "conv_general_dilated": _conv_use,
    "canonical_conv": _canonical_conv_use,
    "layer_tag": _tag_use,
    "gather": _gather_use,
}


def gathered(site: Any, x: jax.Array, g: jax.Array, max_rows: int) -> tuple[jax.Array, jax.Array]:
    """Inputs [blocks..., rows..., inputs...] and output gradients [blocks..., rows..., outputs...].

    Of a `Gather` the first are the indices [blocks..., rows...]. Of more rows of a convolution than
    `max_rows`, evenly spaced ones are returned.
    """
    x = x[..., site.column] if isinstance(site, Gather) else x
    x, g = x.transpose(site.x), g.transpose(site.y)
    if not isinstance(site, Conv):
        return x, g
    space = g.shape[1:-1]
    thin = math.ceil((math.prod(g.shape[:-1]) / max_rows) ** (1 / len(space)))
    steps = tuple(max(1, min(thin, n)) for n in space)
    a = _patches(x, site, space, steps)
    places = tuple(slice(s // 2, None, s) for s in steps)
    share = math.prod(a.shape[1 : 1 + len(space)]) / math.prod(space)
    g = g[(slice(None), *places)] * jnp.asarray(share**-0.5, g.dtype)
    a = a.reshape(*a.shape[: 1 + len(space)], *site.window, site.groups, -1)
    g = g.reshape(*g.shape[:-1], site.groups, -1)
    return jnp.moveaxis(a, -2, 0), jnp.moveaxis(g, -2, 0)


def _patches(x: jax.Array, site: Conv, space: Sequence[int], thin: Sequence[int]) -> jax.Array:
    """The patches [B, ..., window · C] behind a convolution's outputs, every `thin`-th of them."""
    inside = [(*pads, d - 1) for pads, d in zip(site.padding, site.x_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inside, (0, 0, 0)])
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
