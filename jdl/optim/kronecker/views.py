"""Follows parameters through changes of layout: the index arithmetic of NumPy's strided views.

An axis is a tuple of factors (size, stride), the most significant first: an element's place in the
flat parameter is `offset` plus each factor's index times its stride. A stride of 0 repeats.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from jdl.core.jaxpr import bind

Factor: TypeAlias = tuple[int, int]
Axis: TypeAlias = tuple[Factor, ...]


class Piece(NamedTuple):
    """A view of one leaf, or of the flat outputs of the kernel with this number."""

    leaf: int
    offset: int
    axes: tuple[Axis, ...]
    stacked: tuple[Factor, ...] = ()  # axes that the scans around have sliced, outermost first

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(size_of(axis) for axis in self.axes)


class View(NamedTuple):
    """A tag: the array is a parameter in another layout, or several side by side along an axis."""

    pieces: tuple[Piece, ...]
    axis: int = 0
    scaled: bool = False  # whether it is multiplied by something, elementwise


class Output(NamedTuple):
    """A tag: the array is a sum of products of known kernels, and possibly of other terms."""

    terms: tuple[View, ...]


def whole(leaf: int, shape: Sequence[int]) -> Piece:
    """All of a leaf.

    >>> whole(0, (3, 2)).axes
    (((3, 2),), ((2, 1),))
    """
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Piece(leaf, 0, tuple(((n, s),) for n, s in zip(shape, strides, strict=True)))


def size_of(axis: Axis) -> int:
    """The number of elements along an axis."""
    return math.prod(size for size, _ in axis)


def merged(axis: Axis) -> Axis:
    """The axis in as few factors as possible, none of size 1."""
    out: list[Factor] = []
    for size, stride in axis:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            size, stride = out.pop()[0] * size, stride
        out.append((size, stride))
    return tuple(out)


def matches(a: Piece, b: Piece) -> bool:
    """Whether two views have their elements at the same places."""
    one, other = ((p.offset, p.stacked, tuple(map(merged, p.axes))) for p in (a, b))
    return one == other


def reshape(piece: Piece, shape: Sequence[int]) -> Piece | None:
    """The view in another shape; None where a factor would be cut unevenly.

    >>> reshape(whole(0, (6, 2)), (3, 4)).axes
    (((3, 4),), ((2, 2), (2, 1)))
    """
    rest = [f for axis in piece.axes for f in axis if f[0] != 1][::-1]
    axes = []
    for n in shape:
        axis: list[Factor] = []
        while n != 1:
            size, stride = rest.pop() if rest else (0, 0)
            if size == 0 or n == 0 or (n % size and size % n):
                return None
            if size > n:
                rest.append((size // n, stride))
                size, stride = n, stride * (size // n)
            axis.append((size, stride))
            n //= size
        axes.append(tuple(axis))
    return piece._replace(axes=tuple(axes))


def broadcast(view: View, shape: Sequence[int]) -> View:
    """The view repeated along its axes of size 1, or as a whole where it is a scalar."""
    pieces = []
    for piece in view.pieces:
        axes = piece.axes or ((),) * len(shape)
        wide = zip(axes, _shape_of(piece, view, view.axis, shape), strict=True)
        repeated = (a if size_of(a) == n else ((n, 0),) for a, n in wide)
        pieces.append(piece._replace(axes=tuple(repeated)))
    return view._replace(pieces=tuple(pieces))


def sliced(piece: Piece, axis: int, start: int, stop: int, step: int = 1) -> Piece | None:
    """Every `step`-th element of an axis from `start` to before `stop`."""
    factors = merged(piece.axes[axis])
    if len(factors) > 1:
        return None
    _, stride = factors[0] if factors else (1, 0)
    axes = list(piece.axes)
    axes[axis] = ((-(-(stop - start) // step), stride * step),)
    return piece._replace(offset=piece.offset + start * stride, axes=tuple(axes))


def reversed_(piece: Piece, axis: int) -> Piece:
    """An axis from its end."""
    offset = piece.offset + sum((size - 1) * stride for size, stride in piece.axes[axis])
    axes = list(piece.axes)
    axes[axis] = tuple((size, -stride) for size, stride in piece.axes[axis])
    return piece._replace(offset=offset, axes=tuple(axes))


def split(view: View, axis: int, sizes: Sequence[int]) -> list[View] | None:
    """The view cut along an axis into parts of these sizes."""
    views, start = [], 0
    for size in sizes:
        stop = start + size
        if len(view.pieces) > 1 and axis == view.axis:
            parts, begin = [], 0
            for piece in view.pieces:
                n = piece.shape[axis]
                low, high = max(start, begin), min(stop, begin + n)
                if low < high:
                    parts.append(sliced(piece, axis, low - begin, high - begin))
                begin += n
        else:
            parts = [sliced(piece, axis, start, stop) for piece in view.pieces]
        known = tuple(p for p in parts if p is not None)
        if not parts or len(known) < len(parts):
            return None
        views.append(view._replace(pieces=known))
        start = stop
    return views


def _each(view: View, change: Callable[[Piece], Piece | None], axis: int) -> list[View] | None:
    """The view with each piece changed, side by side along `axis`."""
    changed = [change(piece) for piece in view.pieces]
    pieces = tuple(p for p in changed if p is not None)
    return None if len(pieces) < len(changed) else [view._replace(pieces=pieces, axis=axis)]


def _shape_of(piece: Piece, view: View, axis: int, shape: Sequence[int]) -> tuple[int, ...]:
    """A piece's part of the shape that all of the view's have together, along `axis`."""
    if len(view.pieces) == 1:
        return tuple(shape)
    return (*shape[:axis], piece.shape[view.axis], *shape[axis + 1 :])


def _same(eqn: Any, view: View) -> list[View]:
    return [view]


def _transpose(eqn: Any, view: View) -> list[View] | None:
    order = eqn.params["permutation"]
    change = lambda p: p._replace(axes=tuple(p.axes[i] for i in order))  # noqa: E731
    return _each(view, change, order.index(view.axis) if order else 0)


def _reshape(eqn: Any, view: View) -> list[View] | None:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    before, axis = math.prod(old[: view.axis]), 0
    if len(view.pieces) > 1:
        fits = [
            j for j, n in enumerate(new) if math.prod(new[:j]) == before and n == old[view.axis]
        ]
        if not fits:
            return None
        axis = fits[0]
    return _each(view, lambda p: reshape(p, _shape_of(p, view, axis, new)), axis)


def _broadcast(eqn: Any, view: View) -> list[View] | None:
    places = [int(i) for i in eqn.params["broadcast_dimensions"]]
    new = eqn.outvars[0].aval.shape
    axis = places[view.axis] if places else 0

    def change(piece: Piece) -> Piece:
        shape = _shape_of(piece, view, axis, new)
        axes: list[Axis] = [((n, 0),) for n in shape]
        for i, j in enumerate(places):
            if piece.shape[i] == shape[j]:
                axes[j] = piece.axes[i]
        return piece._replace(axes=tuple(axes))

    return _each(view, change, axis)


def _slice(eqn: Any, view: View) -> list[View] | None:
    shape = eqn.invars[0].aval.shape
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(shape)
    for axis, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
        if (start, stop, step) == (0, shape[axis], 1):
            continue
        if step == 1:
            parts = split(view, axis, (start, stop - start) if start else (stop,))
        else:
            few = lambda p, a=axis, s=(start, stop, step): sliced(p, a, *s)  # noqa: E731
            parts = None if len(view.pieces) > 1 else _each(view, few, view.axis)
        if parts is None:
            return None
        view = parts[-1]
    return [view]


def _split(eqn: Any, view: View) -> list[View] | None:
    return split(view, eqn.params["axis"], [int(n) for n in eqn.params["sizes"]])


def _reverse(eqn: Any, view: View) -> list[View] | None:
    for axis in eqn.params["dimensions"]:
        if len(view.pieces) > 1 and axis == view.axis:
            return None
        view = view._replace(pieces=tuple(reversed_(p, axis) for p in view.pieces))
    return [view]


def concatenated(views: Sequence[View], axis: int) -> View | None:
    """Views side by side along an axis."""
    if any(view.scaled or (len(view.pieces) > 1 and view.axis != axis) for view in views):
        return None
    return View(tuple(piece for view in views for piece in view.pieces), axis)


def straight_through(eqn: Any) -> bool:
    """Whether a function hands its cotangent on as it is: a rounding, say.

    Its input's view then is its output's.
    """
    if len(eqn.invars) != 1 or [v.aval for v in eqn.invars] != [v.aval for v in eqn.outvars]:
        return False
    x = jax.ShapeDtypeStruct(eqn.invars[0].aval.shape, eqn.invars[0].aval.dtype)

    def pulled(x: jax.Array, g: jax.Array) -> jax.Array:
        (out,) = jax.vjp(lambda x: bind(eqn, [x])[0], x)[1](g)
        return out

    program = jax.make_jaxpr(pulled)(x, x).jaxpr
    return program.outvars[0] is program.invars[1]


# Primitives whose inputs may have axes of size 1, or be scalars, for others' axes.
ELEMENTWISE = ("add", "add_any", "sub", "mul", "div", "max", "min", "pow")

# The primitives that only change a layout or type: equation, view -> the views of its outputs, or
# None where it cannot be followed.
LAYOUT: dict[str, Callable[[Any, View], list[View] | None]] = {
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "reduce_precision": _same,
    "sharding_constraint": _same,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "rev": _reverse,
}
