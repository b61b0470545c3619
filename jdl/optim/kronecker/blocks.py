"""The normal form of a layer: a kernel as N blocks of D inputs and K outputs, [N, D, K].

`places` says where the axes of a kernel's view lie in its leaf; `arranged` brings arrays whose axes
are those of the view to the leaf's order.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jdl.optim.kronecker.recognize import Use
from jdl.optim.kronecker.views import Piece, View, merged

# The leaf's axes as (role, size), the most significant first. Roles: "i" inputs, "o" outputs,
# "b" blocks; before layers are compared also "s", blocks of a scan, and "f" (see `places`).
Form: TypeAlias = tuple[tuple[str, int], ...]


class Place(NamedTuple):
    """Where a factor of a view's axis lies in its leaf."""

    role: str
    full: int  # the size of the leaf's axis, of which the view has `size` elements from `start`
    start: int
    size: int
    flipped: bool
    # The view's axis and its factor; (-1, i) for the i-th scan's, (-2, stride) for a fixed index.
    source: tuple[int, int]


class Layer(NamedTuple):
    """A kernel all of whose uses are recognized."""

    kernel: int  # the leaf's number
    # The number of the leaf that is added to its outputs, of their shape; or None.
    bias: int | None
    kind: str  # "dense", "conv", "embed" or several of them, joined by +
    form: Form
    ways: tuple[bool, ...]  # for each kind of use: whether inputs and outputs are exchanged in it
    one_hot: tuple[bool, bool]  # whether the inputs' and outputs' sides hold indices
    tagged: bool  # whether it was declared by `tag_dense` or `tag_conv`
    rows: int  # how often it is used for the traced batch: examples × positions × steps × reuses

    def sizes(self, role: str) -> tuple[int, ...]:
        """The sizes of the axes of a role."""
        return tuple(n for r, n in self.form if r == role)

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, D and K."""
        n, d, k = (math.prod(self.sizes(role)) for role in "bio")
        return n, d, k

    def matrices(self, leaf: jax.Array) -> jax.Array:
        """The kernel's leaf as [N, D, K]."""
        order = [i for role in "bio" for i, (r, _) in enumerate(self.form) if r == role]
        return leaf.reshape([n for _, n in self.form]).transpose(order).reshape(self.shape)

    def leaf(self, matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The inverse of `matrices`."""
        order = [i for role in "bio" for i, (r, _) in enumerate(self.form) if r == role]
        x = matrices.reshape([self.form[i][1] for i in order])
        return x.transpose([order.index(i) for i in range(len(order))]).reshape(shape)


def places(use: Use, piece: Piece, shape: Sequence[int]) -> tuple[Place, ...] | None:
    """The places of a use's axes in a leaf of this shape, the most significant first.

    None where an element of the leaf is repeated. Of a leaf of
    three axes or more, a first axis that is free in a product, before the inputs and other outputs,
    has the role "f": of an ensemble with the same inputs it is a block's, of heads an output's.
    An axis of the leaf of which the view has one index is a block's, as if a scan had sliced it.
    """
    roles = dict.fromkeys(use.blocks, "b") | dict.fromkeys(use.inputs, "i")
    found = []
    for k, axis in enumerate(piece.axes):
        found += [
            (abs(s), n, s < 0, roles.get(k, "o"), (k, j))
            for j, (n, s) in enumerate(axis)
            if (n, s) != (1, 0)
        ]
    found += [(abs(s), n, s < 0, "s", (-1, j)) for j, (n, s) in enumerate(piece.stacked)]
    found.sort(key=lambda x: (-x[0], x[1] == 1))
    found.append((1, 1, False, "s", (-2, 1)))
    rest = piece.offset - sum(s * (n - 1) for s, n, flipped, *_ in found if flipped)
    out, above = [], math.prod(shape)
    for stride, size, flipped, role, source in found:
        if stride == 0 or above % stride:
            return None
        start, rest = divmod(rest, stride)
        if start + size > above // stride:
            return None
        for outer in (math.prod(shape[i:]) for i in range(1, len(shape))):
            index, inner = divmod(start * stride, outer)
            if stride < outer < above and not outer % stride and inner + size * stride <= outer:
                out.append(Place("s", above // outer, index, 1, False, (-2, outer)))
                above, start = outer, inner // stride
        if above > stride or source[0] == -1:
            out.append(Place(role, above // stride, start, size, flipped, source))
        above = stride
    return _ensembles(out, shape)


def _ensembles(found: list[Place], shape: Sequence[int]) -> tuple[Place, ...]:
    """The places with the role "f" where it holds."""
    own = [p for p in found if p.role in "io"]
    axes = [n for n in shape if n != 1]
    for p in found:
        if p.role in "sb" and p.full in axes:
            axes.remove(p.full)
    several = len(axes) >= 3 and any(p.role == "o" for p in own[1:])
    if not several or (own[0].role, own[0].full) != ("o", axes[0]):
        return tuple(found)
    return tuple(p._replace(role="f") if p is own[0] else p for p in found)


def form_of(axes: Iterable[tuple[str, int]]) -> Form:
    """The form of a leaf with these axes, (role, size): neighbours of one role are one axis."""
    out: list[tuple[str, int]] = []
    for role, n in axes:
        if out and role in "io" and out[-1][0] == role:
            n *= out.pop()[1]
        out.append((role, n))
    return tuple(out)


def exchanged(form: Form) -> Form:
    """The form with inputs and outputs exchanged."""
    return tuple(({"i": "o", "o": "i"}.get(r, r), n) for r, n in form)


def resolved(found: Sequence[Place], form: Form) -> tuple[list[Place], bool] | None:
    """The places with the roles of a layer's form, and whether the use exchanges its sides."""
    for free in "bo":
        roles = [{"f": free, "s": "b"}.get(p.role, p.role) for p in found]
        mine = form_of(zip(roles, (p.full for p in found), strict=True))
        if mine in (form, exchanged(form)):
            own = [p._replace(role=r) for p, r in zip(found, roles, strict=True)]
            return own, mine != form
    return None


def output_piece(piece: Piece, use: Use, found: Sequence[Place], y: Sequence[int]) -> Piece:
    """The view of an output y in the flat outputs [blocks..., outputs...] of its kernel's leaf."""
    order = [p for role in ("sb", "fo") for p in found if p.role in role]
    strides, step = {}, 1
    for p in reversed(order):
        strides[p.source] = step
        step *= p.full
    signs = {p.source: -1 if p.flipped else 1 for p in order}
    offset = sum((p.start + (p.size - 1) * p.flipped) * strides[p.source] for p in order)
    axes = []
    for size, kernel_axes in zip(y, use.y_axes, strict=True):
        factors = [
            (n, signs.get((k, j), 1) * strides.get((k, j), 0))
            for k in kernel_axes
            for j, (n, _) in enumerate(piece.axes[k])
        ]
        axes.append(tuple(factors) if kernel_axes else ((size, 0),))
    stacked = tuple((n, strides[-1, j]) for j, (n, _) in enumerate(piece.stacked))
    return Piece(piece.leaf, offset, tuple(axes), stacked)


def arranged(
    x: jax.Array, at: int, axes: Sequence[int], piece: Piece, found: Sequence[Place]
) -> tuple[jax.Array, int]:
    """x, whose axes from `at` are these of the view, with the leaf's there; and their number."""
    sources = [(k, j) for k in axes for j in range(len(piece.axes[k]))]
    sizes = [piece.axes[k][j][0] for k, j in sources]
    before, after = x.shape[:at], x.shape[at + len(axes) :]
    mine = [p for p in found if p.source in sources]
    order = [at + sources.index(p.source) for p in mine]
    ends = at + len(sources)
    x = x.reshape(*before, *sizes, *after)
    units = [i for i in range(at, ends) if i not in order]
    x = x.transpose(*range(at), *order, *units, *range(ends, x.ndim))
    x = x.reshape(*before, *(p.size for p in mine), *after)
    flips = [at + i for i, p in enumerate(mine) if p.flipped]
    if flips:
        x = jnp.flip(x, flips)
    if any(p.size != p.full for p in mine):
        pads = [(p.start, p.full - p.start - p.size) for p in mine]
        x = jnp.pad(x, [(0, 0)] * at + pads + [(0, 0)] * len(after))
    return x, len(mine)


def scanned(view: View) -> View | None:
    """The view of one slice of an array that a scan runs over; None where it cannot be followed."""
    pieces = []
    for piece in view.pieces:
        factors = merged(piece.axes[0]) or ((1, math.prod(piece.shape)),)
        if len(factors) > 1 or factors[0][1] <= 0 or (len(view.pieces) > 1 and view.axis == 0):
            return None
        pieces.append(piece._replace(axes=piece.axes[1:], stacked=(*piece.stacked, factors[0])))
    return view._replace(pieces=tuple(pieces), axis=max(0, view.axis - 1))
