"""ResNet-18, 34, 50, 101 and 152: blocks of two or three convolutions with residual connections.

Layers: conv1, relu1, pool1, then of every block, such as layer1.0, its inner activations
layer1.0/relu1 and, of three convolutions, layer1.0/relu2, and its output layer1.0; pool5, the mean
over the image; logits. Batch normalization uses the running averages. As in torchvision and timm, a
block's first 3 × 3 convolution has the stride.

References:
  He, Zhang, Ren and Sun, Deep residual learning for image recognition, CVPR 2016, section 4.1.
"""

import jax
import jax.numpy as jnp

from jdl.core.types import Params
from jdl.vision.layers import Note, conv, dense, max_pool, normalized

WIDTHS = (64, 128, 256, 512)  # inner channels; the last of three convolutions has 4 times as many
SIZE = (224, 224)


def forward(params: Params, images: jax.Array, note: Note) -> None:
    """Runs the network, with a head if its parameters have one."""
    x = conv(normalized(images), params["conv1"], stride=2, padding=((3, 3), (3, 3)))
    x = note("conv1", x)
    x = note("relu1", jax.nn.relu(x))
    x = note("pool1", max_pool(x, 3, padding=1))
    blocks = [name for name in params if name.startswith("layer")]
    for name in sorted(blocks, key=lambda name: [int(part) for part in name[5:].split(".")]):
        block, inner = params[name], x
        stride = 2 if name.endswith(".0") and name != "layer1.0" else 1
        strided = 2 if "conv3" in block else 1
        for i in range(1, strided + 2):
            pad = block[f"conv{i}"]["kernel"].shape[0] // 2
            by = stride if i == strided else 1
            inner = conv(inner, block[f"conv{i}"], stride=by, padding=((pad, pad), (pad, pad)))
            if i <= strided:
                inner = note(f"{name}/relu{i}", jax.nn.relu(inner))
        around = conv(x, block["downsample"], stride=stride) if "downsample" in block else x
        x = note(name, jax.nn.relu(inner + around))
    x = note("pool5", jnp.mean(x, axis=(1, 2)))
    if "logits" in params:
        note("logits", dense(x, params["logits"]))
