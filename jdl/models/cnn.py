"""The classic convolutional classifier."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.models.convolution import conv_general_dilated
from jdl.models.layers import Activation, Initializer, activation, initializer, max_pool


class Block(NamedTuple):
    """A convolution and the max pooling after it.

    Attributes:
      filters: output channels of the convolution.
      kernel_size: its height and width.
      padding: "same" (zeros), "edge" (repeated border pixels), "valid" (none), or explicit
        ((top, bottom), (left, right)).
      activation: a name of `jdl.models.layers.ACTIVATIONS` or a function.
      pool_size: height and width of the pooling window; None for no pooling.
      strides: of the pooling window; None for `pool_size`.

    >>> CNN(blocks=(Block(filters=16, kernel_size=(3, 3)),)).blocks[0].pool_size
    (2, 2)
    """

    filters: int = 32
    kernel_size: Sequence[int] = (5, 5)
    padding: str | Sequence[tuple[int, int]] = "same"
    activation: Activation = "relu"
    pool_size: Sequence[int] | None = (2, 2)
    strides: Sequence[int] | None = (2, 2)


class CNN(nn.Module):
    """Blocks of [convolution, activation, max pooling], then dense, dropout, and logits.

    The defaults on 128×128×1 images make 33.6 million parameters.

    Attributes:
      num_classes: number of logits.
      blocks: the convolutional part.
      units: width of the dense layer.
      activation: activation of the dense layer.
      dropout: share of dense units dropped in training, in [0, 1).
      kernel_init: for every layer, a name of `jdl.models.layers.INITIALIZERS` or a function.
      bias_init: for every layer.
      dtype: the type to compute in; None for the parameters' dtype.

    >>> cnn = CNN(num_classes=3, blocks=(Block(filters=4), Block(filters=8, padding="edge")))
    >>> variables = cnn.init(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
    >>> cnn.apply(variables, jnp.ones((2, 8, 8, 1))).shape
    (2, 3)

    References:
      LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition,
      Proceedings of the IEEE 86(11), 1998, section II.
    """

    num_classes: int = 10
    blocks: Sequence[Block] = (Block(), Block())
    units: int = 1024
    activation: Activation = "relu"
    dropout: float = 0.4
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, num_classes] for images [B, H, W, C]."""
        check.in_range("dropout", self.dropout, 0.0, 1.0, open_high=True)
        check.argument(image.ndim == 4, "image", "of shape [B, H, W, C]", image.shape)
        inits = {"kernel_init": initializer(self.kernel_init), "bias_init": self.bias_init}
        layer = {"dtype": self.dtype, **inits}
        x = image
        for block in self.blocks:
            x, padding = _padded(x, block)
            how = {"padding": padding, "conv_general_dilated": conv_general_dilated, **layer}
            x = nn.Conv(block.filters, tuple(block.kernel_size), **how)(x)
            x = activation(block.activation)(x)
            if block.pool_size is not None:
                x = max_pool(x, block.pool_size, block.strides or block.pool_size)
        x = x.reshape(x.shape[0], -1)
        x = activation(self.activation)(nn.Dense(self.units, **layer)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="logits", **layer)(x)


def _padded(x: jax.Array, block: Block) -> tuple[jax.Array, Any]:
    """`x`, padded for "edge", and the padding for the convolution."""
    if not isinstance(block.padding, str):
        return x, block.padding
    name = check.one_of("padding", block.padding.lower(), ("same", "edge", "valid"))
    if name != "edge":
        return x, name.upper()
    around = [((k - 1) // 2, k // 2) for k in block.kernel_size]
    return jnp.pad(x, [(0, 0), *around, (0, 0)], mode="edge"), "VALID"
