"""SqueezeNet: fire modules, which reduce the channels and expand them by 1 × 1 and 3 × 3 windows.

Layers: conv1, relu1, pool1, then of every fire module fire2/squeeze and fire2 (both after their
ReLU), pool3, pool5, …, conv10, relu10, logits.

Version 1.1 pools after conv1, fire3 and fire5, version 1.0 after conv1, fire4 and fire8. Caffe's
weights, and those converted from them, need BGR in [0, 255] with a mean subtracted. Torchvision's
are normalized as its other networks; there the first convolution has no padding, and pooling
includes windows that extend beyond the edge.

References:
  Iandola et al., SqueezeNet: AlexNet-level accuracy with 50x fewer parameters, arXiv:1602.07360,
  section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdl.core.types import Params
from jdl.vision.layers import Forward, Note, conv, max_pool, normalized

FIRES = range(2, 10)
SQUEEZE = {2: 16, 3: 16, 4: 32, 5: 32, 6: 48, 7: 48, 8: 64, 9: 64}  # channels; expanded 4 + 4 fold
POOL_AFTER = {"1.1": (3, 5), "1.0": (4, 8)}
FIRST = {"1.1": (3, 64), "1.0": (7, 96)}  # conv1's window and channels
SIZE = (227, 227)

_BGR_MEAN = (104.0, 117.0, 123.0)


def caffe(images: jax.Array) -> jax.Array:
    """RGB in [0, 1] as BGR in [0, 255] with the mean subtracted, as Caffe's networks need it."""
    mean = jnp.asarray(_BGR_MEAN, images.dtype).reshape(1, 1, 1, 3)
    return images[..., ::-1] * 255.0 - mean


def _forward(
    prepare: Callable[[jax.Array], jax.Array], padding: str, ceil: bool, pool_after: tuple[int, ...]
) -> Forward:
    def forward(params: Params, images: jax.Array, note: Note) -> None:
        x = note("conv1", conv(prepare(images), params["conv1"], stride=2, padding=padding))
        x = note("relu1", jax.nn.relu(x))
        x = note("pool1", max_pool(x, 3, ceil=ceil))
        for i in FIRES:
            squeezed = jax.nn.relu(conv(x, params[f"fire{i}/squeeze1x1"]))
            squeezed = note(f"fire{i}/squeeze", squeezed)
            sides = [conv(squeezed, params[f"fire{i}/expand{n}x{n}"]) for n in (1, 3)]
            x = note(f"fire{i}", jax.nn.relu(jnp.concatenate(sides, axis=3)))
            if i in pool_after:
                x = note(f"pool{i}", max_pool(x, 3, ceil=ceil))
        x = note("conv10", conv(x, params["conv10"]))
        x = note("relu10", jax.nn.relu(x))
        note("logits", jnp.mean(x, axis=(1, 2)))

    return forward


FORWARD = {
    "caffe": _forward(caffe, "SAME", False, POOL_AFTER["1.1"]),
    "1.1": _forward(normalized, "VALID", True, POOL_AFTER["1.1"]),
    "1.0": _forward(normalized, "VALID", True, POOL_AFTER["1.0"]),
}
