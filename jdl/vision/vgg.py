"""VGG-16 and VGG-19: blocks of 3 × 3 convolutions, halved by max pooling, and three dense layers.

Layers are named as in the paper's text and the style-transfer literature: conv1_1, relu1_1, …,
pool5; with a head also fc6, relu6, fc7, relu7, logits.

References:
  Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, ICLR
  2015, section 2.1.
"""

import jax

from jdl.core.types import Params
from jdl.vision.layers import Note, average_to, conv, dense, max_pool, normalized

CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # in each block
WIDTHS = (64, 128, 256, 512, 512)
SIZE = (224, 224)


def conv_names(name: str) -> list[str]:
    """The convolutions, in order.

    >>> len(conv_names("vgg16")), conv_names("vgg19")[-1]
    (13, 'conv5_4')
    """
    return [f"conv{b}_{i}" for b, n in enumerate(CONVOLUTIONS[name], 1) for i in range(1, n + 1)]


def forward(params: Params, images: jax.Array, note: Note) -> None:
    """Runs the network, with the convolutions and the head that its parameters have."""
    x = normalized(images)
    for block in range(1, 6):
        i = 1
        while f"conv{block}_{i}" in params:
            x = note(f"conv{block}_{i}", conv(x, params[f"conv{block}_{i}"]))
            x = note(f"relu{block}_{i}", jax.nn.relu(x))
            i += 1
        x = note(f"pool{block}", max_pool(x, 2))
    if "fc6" not in params:
        return
    x = average_to(x, 7).reshape(x.shape[0], -1)
    for i in (6, 7):
        x = note(f"fc{i}", dense(x, params[f"fc{i}"]))
        x = note(f"relu{i}", jax.nn.relu(x))
    note("logits", dense(x, params["logits"]))
