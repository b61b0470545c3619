"""Layers of the published networks, and how layers are addressed by name."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jdl.core import check
from jdl.core.types import Params
from jdl.models.convolution import conv_general_dilated

Note = Callable[[str, jax.Array], jax.Array]
Forward = Callable[[Params, jax.Array, Note], Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


class _Finished(Exception):
    """All requested layers have been computed."""


def addressable(forward: Forward) -> Callable[..., dict[str, jax.Array]]:
    """Makes a network's layers addressable by name.

    Args:
      forward: `forward(params, images, note)`, which passes every layer's activations through
        `note(name, activations)` and continues with the result.

    Returns:
      `apply(params, images, layers, edits={})`, which computes up to the last of the layers and
      returns {layer: activations}; `edits` are added to the activations of the layers they name.

    >>> apply = addressable(lambda p, x, note: note("fourfold", 2 * note("double", 2 * x)))
    >>> apply(None, jnp.ones(1), ["fourfold"], {"double": jnp.ones(1)})["fourfold"].tolist()
    [6.0]
    """

    def apply(
        params: Params,
        images: jax.Array,
        layers: Sequence[str],
        edits: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        edits, missing, found = edits or {}, set(layers), {}

        def note(name: str, x: jax.Array) -> jax.Array:
            ok = 0 not in x.shape
            must = f"large enough for layer {name!r}, whose activations are empty"
            hint = "Use larger images or an earlier layer."
            check.argument(ok, "images", must, tuple(images.shape), hint)
            if name in edits:
                x = x + edits[name]
            if name in missing:
                found[name] = x
                missing.discard(name)
                if not missing:
                    raise _Finished
            return x

        with contextlib.suppress(_Finished):
            forward(params, images, note)
        return found

    return apply


def names_of(forward: Forward, params: Params, size: tuple[int, int]) -> tuple[str, ...]:
    """The layers of a network in the order of computation, by abstract evaluation at this size."""
    names: list[str] = []

    def note(name: str, x: jax.Array) -> jax.Array:
        names.append(name)
        return x

    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    jax.eval_shape(lambda p, x: (forward(p, x, note), None)[1], params, images)
    return tuple(names)


def normalized(images: jax.Array) -> jax.Array:
    """RGB in [0, 1] with ImageNet's mean subtracted, divided by its standard deviation."""
    mean = jnp.asarray(IMAGENET_MEAN, images.dtype).reshape(1, 1, 1, 3)
    return (images - mean) / jnp.asarray(IMAGENET_STD, images.dtype).reshape(1, 1, 1, 3)


def conv(x: jax.Array, layer: Params, *, stride: int = 1, padding: Any = "SAME") -> jax.Array:
    """A convolution of [N, H, W, C] with {"kernel": [h, w, C, D]} and perhaps "bias": [D]."""
    out = conv_general_dilated(
        x, layer["kernel"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + layer["bias"].reshape(1, 1, 1, -1) if "bias" in layer else out


def dense(x: jax.Array, layer: Params) -> jax.Array:
    """A dense layer of [N, F] with {"kernel": [F, D], "bias": [D]}."""
    return x @ layer["kernel"] + layer["bias"].reshape(1, -1)


def max_pool(x: jax.Array, window: int, *, ceil: bool = False, padding: int = 0) -> jax.Array:
    """The maximum over windows of stride 2, of [N, H, W, C] with `padding` pixels of −∞ around it.

    With `ceil` windows that extend beyond the lower or right edge are included.

    >>> max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1), 3)[0, :, :, 0].tolist()
    [[12.0, 14.0], [22.0, 24.0]]
    """
    for axis in (1, 2):
        size = x.shape[axis] + 2 * padding
        count = -(-(size - window) // 2) + 1 if ceil else (size - window) // 2 + 1
        count = max(count, 0)
        after = max(2 * (count - 1) + window - size, 0) if count else 0
        if padding or after:
            around = [(0, 0, 0)] * 4
            around[axis] = (padding, padding + after, 0)
            x = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), around)
        parts = [
            lax.slice_in_dim(x, i, min(i + 2 * count - 1, x.shape[axis]), 2, axis)
            if count
            else lax.slice_in_dim(x, 0, 0, axis=axis)
            for i in range(window)
        ]
        x = functools.reduce(jnp.maximum, parts)
    return x


def average_to(x: jax.Array, size: int) -> jax.Array:
    """Means over a size × size grid of boxes that cover [N, H, W, C] and may overlap by one pixel.

    >>> average_to(jnp.arange(3.0).reshape(1, 1, 3, 1), 2)[0, :, :, 0].tolist()
    [[0.5, 1.5], [0.5, 1.5]]
    """
    for axis in (1, 2):
        n = x.shape[axis]
        spans = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        boxes = [lax.slice_in_dim(x, start, end, axis=axis) for start, end in spans]
        x = jnp.concatenate([jnp.mean(box, axis, keepdims=True) for box in boxes], axis)
    return x
