"""ResNet-50: bottleneck blocks with residual connections.

Layers: conv1, relu1, pool1, then of every block, layer1.0 to layer4.2, its two inner activations
layer1.0/relu1, layer1.0/relu2 and its output layer1.0; pool5, the mean over the image; logits.
Batch normalization uses the running averages. As in torchvision and timm, the 3 × 3 convolution of
a block has the stride.

References:
  He, Zhang, Ren and Sun, Deep residual learning for image recognition, CVPR 2016, section 4.1.
"""

import jax
import jax.numpy as jnp

from jdl.core.types import Params
from jdl.vision.layers import Note, conv, dense, max_pool, normalized

BLOCKS = (3, 4, 6, 3)  # in each of the four groups
WIDTHS = (64, 128, 256, 512)  # inner channels; outputs have four times as many
SIZE = (224, 224)


def forward(params: Params, images: jax.Array, note: Note) -> None:
    """Runs the network, with a head if its parameters have one."""
    x = conv(normalized(images), params["conv1"], stride=2, padding=((3, 3), (3, 3)))
    x = note("conv1", x)
    x = note("relu1", jax.nn.relu(x))
    x = note("pool1", max_pool(x, 3, padding=1))
    for group, count in enumerate(BLOCKS, 1):
        for i in range(count):
            name = f"layer{group}.{i}"
            block, stride = params[name], 2 if group > 1 and i == 0 else 1
            inner = note(f"{name}/relu1", jax.nn.relu(conv(x, block["conv1"])))
            inner = conv(inner, block["conv2"], stride=stride, padding=((1, 1), (1, 1)))
            inner = note(f"{name}/relu2", jax.nn.relu(inner))
            added = conv(inner, block["conv3"])
            around = conv(x, block["downsample"], stride=stride) if "downsample" in block else x
            x = note(name, jax.nn.relu(added + around))
    x = note("pool5", jnp.mean(x, axis=(1, 2)))
    if "logits" in params:
        note("logits", dense(x, params["logits"]))
