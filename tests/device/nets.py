"""The nets that the parts train, in Flax Linen."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Small(nn.Module):
    """A convolution, batch norm and dropout: smooth, so that rounding is not amplified by kinks."""

    features: int = 8
    hidden: int = 32
    dropout: float = 0.25

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(image)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.tanh(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    """He et al. 2016: blocks (3, 4, 6, 3) with bottlenecks are ResNet-50, (2, 2, 2, 2) without 18.

    Of images of 32² the stem is a 3 × 3 convolution without pooling, as is usual.
    """

    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    bottleneck: bool = True
    small_images: bool = False
    num_classes: int = 1000

    @nn.compact
    def __call__(self, image, train=False):
        def conv(x, features, kernel, stride=1):
            return nn.Conv(features, (kernel, kernel), stride, padding="SAME", use_bias=False)(x)

        def norm(x, **options):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, **options)(x)

        if self.small_images:
            x = nn.relu(norm(conv(image, self.width, 3)))
        else:
            x = nn.relu(norm(conv(image, self.width, 7, 2)))
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for group, count in enumerate(self.blocks):
            inner = self.width * 2**group
            outer = 4 * inner if self.bottleneck else inner
            for i in range(count):
                stride = 2 if group and not i else 1
                if self.bottleneck:
                    y = nn.relu(norm(conv(x, inner, 1)))
                    y = nn.relu(norm(conv(y, inner, 3, stride)))
                    y = conv(y, outer, 1)
                else:
                    y = nn.relu(norm(conv(x, inner, 3, stride)))
                    y = conv(y, outer, 3)
                y = norm(y, scale_init=nn.initializers.zeros)
                if x.shape != y.shape:
                    x = norm(conv(x, outer, 1, stride))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


class Transformer(nn.Module):
    """A causal language model of bytes: [B, T] -> logits [B, T, 256]."""

    width: int = 384
    layers: int = 6
    heads: int = 6

    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[1]
        x = nn.Embed(256, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (length, self.width))[None]
        mask = jnp.tril(jnp.ones((length, length), bool))
        for _ in range(self.layers):
            y = nn.Dense(3 * self.width)(nn.LayerNorm()(x))
            q, k, v = jnp.split(y.reshape(*y.shape[:2], self.heads, -1), 3, axis=-1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            shares = nn.softmax(jnp.where(mask, scores, -1e9))
            y = jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(x.shape)
            x = x + nn.Dense(self.width)(y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(256)(nn.LayerNorm()(x))


def next_byte_loss(outputs, batch):
    """The mean over a text's bytes of −log p(next byte), in nats, [B]."""
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
    return jnp.mean(losses, axis=1)


class Vgg(nn.Module):
    """VGG-16's convolutions; a block's are called conv1_1, conv1_2, …"""

    blocks: Sequence[int] = (2, 2, 3, 3, 3)
    width: int = 64

    @nn.compact
    def __call__(self, image):
        x = image
        for b, count in enumerate(self.blocks):
            for i in range(count):
                name = f"conv{b + 1}_{i + 1}"
                features = self.width * min(2**b, 8)
                he = nn.initializers.he_normal()
                x = nn.relu(nn.Conv(features, (3, 3), kernel_init=he, name=name)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return x


def size(params):
    """How many numbers there are."""
    return sum(x.size for x in jax.tree.leaves(params))
