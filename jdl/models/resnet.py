"""The residual network."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jdl.core import check
from jdl.models.convolution import conv_general_dilated

Norm = Callable[..., nn.Module]


def batch_norm(train: bool, **options: Any) -> nn.Module:
    """Normalization over the batch in training, by running averages else.

    Args:
      train: which of the two.
      **options: of Linen's `BatchNorm`.

    >>> batch_norm(train=False).use_running_average
    True

    References:
      Ioffe and Szegedy, Batch normalization, ICML 2015.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, **options)


class ResNetBlock(nn.Module):
    """Convolutions and a shortcut around them, which is projected where shapes differ.

        y = relu(x + f(x)),  f: 3×3, 3×3; as a bottleneck 1×1, 3×3, 1×1 with four times the width

    The scale of the last norm begins at 0, so that the block begins as its shortcut.

    Attributes: as for `ResNet`.

    >>> import jax.numpy as jnp
    >>> block, x = ResNetBlock(8, stride=2), jnp.ones((2, 6, 6, 4))
    >>> block.apply(block.init(jax.random.key(0), x), x).shape
    (2, 3, 3, 8)

    References:
      He, Zhang, Ren and Sun, Deep residual learning for image recognition, CVPR 2016; Goyal et al.,
      Accurate, large minibatch SGD, 2017, section 5.1 (the scale of 0).
    """

    width: int
    stride: int = 1
    bottleneck: bool = False
    norm: Norm = batch_norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, **mask: jax.Array) -> jax.Array:
        """[B, H / stride, W / stride, width or 4 width] for [B, H, W, C]."""
        outputs = 4 * self.width if self.bottleneck else self.width
        plain = [(3, self.width), (3, outputs)]
        layers = [(1, self.width), (3, self.width), (1, outputs)] if self.bottleneck else plain
        y, strides = x, [1, self.stride, 1] if self.bottleneck else [self.stride, 1]
        for i, ((size, width), stride) in enumerate(zip(layers, strides, strict=True), 1):
            last = {"scale_init": nn.initializers.zeros} if i == len(layers) else {}
            y = self.norm(train, **last)(_conv(y, width, size, stride), **mask)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = self.norm(train)(_conv(x, outputs, 1, self.stride), **mask)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Groups of residual blocks, each at half the size of the last, and a linear classifier.

    Its batch statistics are those of all examples of a batch. Of padded batches give it the mask:
    `inputs=("image", "mask")`.

    Attributes:
      num_classes: K.
      depths: the number of blocks of each group; (2, 2, 2, 2) for ResNet-18, (3, 4, 6, 3) with
        bottlenecks for ResNet-50.
      widths: of each group.
      bottleneck: whether blocks are bottlenecks.
      stem: window and stride of the first convolution; (3, 1) for small images.
      pool: whether it is followed by 3×3 max pooling of stride 2.
      norm: `norm(train, **options)` makes each normalization; `options` are those of Linen's norms.

    >>> import jax.numpy as jnp
    >>> net = ResNet(num_classes=3, depths=(1,), widths=(4,), stem=(3, 1), pool=False)
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
    >>> sorted(variables), net.apply(variables, jnp.ones((2, 8, 8, 1))).shape
    (['batch_stats', 'params'], (2, 3))

    References:
      He, Zhang, Ren and Sun, Deep residual learning for image recognition, CVPR 2016.
    """

    num_classes: int = 1000
    depths: Sequence[int] = (2, 2, 2, 2)
    widths: Sequence[int] = (64, 128, 256, 512)
    bottleneck: bool = False
    stem: tuple[int, int] = (7, 2)
    pool: bool = True
    norm: Norm = batch_norm

    @nn.compact
    def __call__(
        self, image: jax.Array, mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Logits [B, K] for images [B, H, W, C]; `mask`, float[B], is 0 for padding."""
        check.argument(image.ndim == 4, "image", "of shape [B, H, W, C]", image.shape)
        same = len(self.depths) == len(self.widths)
        check.argument(same, "depths", f"as many as widths, {len(self.widths)}", self.depths)
        known = {} if mask is None else {"mask": (mask > 0).reshape(-1, 1, 1, 1)}
        x = nn.relu(self.norm(train)(_conv(image, self.widths[0], *self.stem), **known))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.pool else x
        for group, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for i in range(depth):
                stride = 2 if group and not i else 1
                x = ResNetBlock(width, stride, self.bottleneck, self.norm)(x, train, **known)
        return nn.Dense(self.num_classes, name="logits")(x.mean(axis=(1, 2)))


def _conv(x: jax.Array, width: int, size: int, stride: int) -> jax.Array:
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        conv_general_dilated=conv_general_dilated,
    )(x)
