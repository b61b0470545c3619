"""Follows parameters through changes of layout and type.

A rule in `LAYOUT`, by the primitive's name, takes an equation and the tags of its inputs and
returns the tags of its outputs, or None where they cannot be followed.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Columns of an array that are columns of a leaf."""

    leaf: int
    start: int  # the first column in the array
    offset: int  # the first column in the leaf
    size: int


class View(NamedTuple):
    """A tag: the array is a parameter in another layout, or several side by side by columns."""

    axes: tuple[int | None, ...]  # each axis's own axis of the leaf; None for an added one
    pieces: tuple[Piece, ...]


class Output(NamedTuple):
    """A tag: the array is a sum of products of known kernels, and possibly of other terms."""

    pieces: tuple[Piece, ...]
    axis: int


def _same(eqn: Any, tags: list[Any]) -> list[Any]:
    return [tags[0]]


def _transpose(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    order = eqn.params["permutation"]
    if isinstance(tag, Output):
        return [tag._replace(axis=order.index(tag.axis))]
    return [tag._replace(axes=tuple(tag.axes[i] for i in order))]


def _reshape(eqn: Any, tags: list[Any]) -> list[Any] | None:
    """Axes of size 1 may be added or removed, no others."""
    (tag,) = tags
    old, new = list(eqn.invars[0].aval.shape), eqn.outvars[0].aval.shape
    if not isinstance(tag, View):
        return None
    axes: list[int | None] = []
    i = 0
    for size in new:
        while i < len(old) and old[i] != size and old[i] == 1:
            i += 1
        if i < len(old) and old[i] == size:
            axes.append(tag.axes[i])
            i += 1
        elif size == 1:
            axes.append(None)
        else:
            return None
    return [tag._replace(axes=tuple(axes))] if all(n == 1 for n in old[i:]) else None


def _broadcast(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if not isinstance(tag, View):
        return None
    axes: list[int | None] = [None] * len(new)
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        axes[j] = tag.axes[i] if old[i] == new[j] else None
    return [tag._replace(axes=tuple(axes))]


def _cut(tag: View, start: int, stop: int) -> View:
    pieces = []
    for p in tag.pieces:
        low, high = max(p.start, start), min(p.start + p.size, stop)
        if low < high:
            pieces.append(Piece(p.leaf, low - start, p.offset + low - p.start, high - low))
    return tag._replace(pieces=tuple(pieces))


def _last_axis(tag: View) -> int:
    return max((a for a in tag.axes if a is not None), default=-1)


def _slice(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    shape = eqn.invars[0].aval.shape
    starts, stops, strides = (eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    if not isinstance(tag, View) or (strides is not None and any(s != 1 for s in strides)):
        return None
    for axis, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if (start, stop) != (0, shape[axis]):
            if tag.axes[axis] is None or tag.axes[axis] != _last_axis(tag):
                return None
            tag = _cut(tag, start, stop)
    return [tag]


def _split(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    if not isinstance(tag, View) or tag.axes[axis] != _last_axis(tag):
        return None
    ends = [sum(int(n) for n in sizes[:i]) for i in range(len(sizes) + 1)]
    return [_cut(tag, a, b) for a, b in itertools.pairwise(ends)]


def _concatenate(eqn: Any, tags: list[Any]) -> list[Any] | None:
    axis = eqn.params["dimension"]
    first = tags[0]
    if not isinstance(first, View) or any(t.axes != first.axes for t in tags):
        return None
    if first.axes[axis] != _last_axis(first):
        return None
    pieces, start = [], 0
    for tag, v in zip(tags, eqn.invars, strict=True):
        pieces += [p._replace(start=p.start + start) for p in tag.pieces]
        start += v.aval.shape[axis]
    return [first._replace(pieces=tuple(pieces))]


def _squeeze(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    if not isinstance(tag, View):
        return None
    gone = eqn.params["dimensions"]
    return [tag._replace(axes=tuple(a for i, a in enumerate(tag.axes) if i not in gone))]


LAYOUT: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "reduce_precision": _same,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
}
