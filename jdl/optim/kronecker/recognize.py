"""Recognizes layers: the products by which a parameter is a layer's kernel.

A rule in `USES`, by the primitive's name, takes an equation and the tags of its inputs and returns
how the kernel is used, or None where the product is not a layer. A new kind of layer is a new rule
here, and its rows in `probes.py`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jdl.optim.kronecker.layout import View


class Dense(NamedTuple):
    """The axes of a dense product: its inputs are x's last axes after `permutation`."""

    permutation: tuple[int, ...]
    num_inputs: int
    output_axis: int


class Conv(NamedTuple):
    """The patches of a convolution, whose axes are ordered by x_spec and y_spec."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    x_spec: tuple[int, ...]  # batch, channels, space...
    y_spec: tuple[int, ...]


class Use(NamedTuple):
    """A product with a kernel."""

    view: View
    kind: str
    transposed: bool
    tagged: bool
    site: Dense | Conv


def _dense_use(eqn: Any, tags: list[Any]) -> Use | None:
    (contract, batch) = eqn.params["dimension_numbers"]
    side = 0 if isinstance(tags[0], View) else 1
    view, x = tags[side], eqn.invars[1 - side].aval
    if isinstance(tags[1 - side], View) or any(len(b) for b in batch):
        return None
    mine, theirs = contract[side], contract[1 - side]
    axes = [view.axes[i] for i in mine]
    n = len(view.axes)
    if set(view.axes) != set(range(n)):
        return None
    if set(axes) == set(range(n - 1)) and n >= 2:
        transposed = False
    elif axes == [1] and n == 2 and len(view.pieces) == 1 and _whole(view, eqn.invars[side], 1):
        transposed = True
    else:
        return None
    order = [theirs[axes.index(a)] for a in range(n) if a in axes]
    free = [i for i in range(x.ndim) if i not in theirs]
    output_axis = len(free) if side == 1 else 0
    site = Dense((*free, *order), math.prod(x.shape[i] for i in order), output_axis)
    return Use(view, "dense", transposed, False, site)


def _whole(view: View, v: Any, axis: int) -> bool:
    """Whether a view of one piece covers all columns of its array, from the leaf's first."""
    size = v.aval.shape[view.axes.index(axis)]
    return view.pieces[0].offset == 0 and view.pieces[0].size == size


def _conv_use(eqn: Any, tags: list[Any]) -> Use | None:
    view, kernel, params = tags[1], eqn.invars[1].aval, eqn.params
    if not isinstance(view, View) or isinstance(tags[0], View):
        return None
    numbers = params["dimension_numbers"]
    plain = (
        params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and all(p >= 0 for pair in params["padding"] for p in pair)
    )
    out, channels, *space = numbers.rhs_spec
    axes = [view.axes[i] for i in (*space, channels, out)]
    if not plain or axes != list(range(kernel.ndim)):
        return None
    site = Conv(
        window=tuple(kernel.shape[i] for i in space),
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        dilation=tuple(params["rhs_dilation"]),
        x_spec=tuple(numbers.lhs_spec),
        y_spec=tuple(numbers.out_spec),
    )
    return Use(view, "conv", False, False, site)


def _canonical(
    view: View, kernel: Any, tagged: bool, padding: Any, strides: Any = None
) -> Use | None:
    n = kernel.ndim
    if view.axes != tuple(range(n)):
        return None
    spec = (0, n - 1, *range(1, n - 1))
    ones = (1,) * (n - 2)
    site = Conv(kernel.shape[:-2], strides or ones, tuple(padding), ones, spec, spec)
    return Use(view, "conv", False, tagged, site)


def _canonical_conv_use(eqn: Any, tags: list[Any]) -> Use | None:
    """The convolution of `jdl.models.convolution`: NHWC, HWIO, stride 1."""
    if not isinstance(tags[1], View) or isinstance(tags[0], View):
        return None
    return _canonical(tags[1], eqn.invars[1].aval, False, eqn.params["padding"])


def _tag_use(eqn: Any, tags: list[Any]) -> Use | None:
    view, conv = tags[2], eqn.params["conv"]
    x, kernel = eqn.invars[1].aval, eqn.invars[2].aval
    if not isinstance(view, View) or view.axes != tuple(range(kernel.ndim)):
        return None
    if conv is not None:
        strides, padding = conv
        return _canonical(view, kernel, True, padding, strides)
    y = eqn.invars[0].aval
    return Use(view, "dense", False, True, Dense(tuple(range(x.ndim)), x.shape[-1], y.ndim - 1))


USES: dict[str, Callable[[Any, list[Any]], Use | None]] = {
    "dot_general": _dense_use,
    "conv_general_dilated": _conv_use,
    "canonical_conv": _canonical_conv_use,
    "layer_tag": _tag_use,
}
