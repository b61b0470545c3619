r"""The style network, which turns a photograph of any size into a painting in one pass.

    image → 9×9 → halve → halve → residual blocks → double → double → 9×9 → painting

The outputs h of every convolution are normalized over each image, with a scale and a shift for each
style (conditional instance normalization); for a mixture w of styles both are averaged:

    y = γ (h − μ) / √(σ² + ε) + β,      γ = Σₛ wₛ γₛ,  β = Σₛ wₛ βₛ

Edges are reflected rather than padded with zeros. Pixels are repeated before a convolution to
enlarge the image, because transposed convolutions cause checkerboard artifacts.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.models.convolution import conv_general_dilated

STRIDE = 4  # heights and widths are multiples of this

_EPSILON = 1e-5


class StyleNet(nn.Module):
    """The transformation network of Johnson et al., with instance norm, for one or several styles.

    `__call__(images, mixture, statistics=None)` returns the paintings [B, H, W, 3] in [0, 1] and
    the means and variances [B, statistics_size] of its normalizations. Given `statistics` are used
    instead of the image's own, except where they are NaN. With those of a whole picture, a part is
    painted as it would be in the whole (Chen et al. 2022, thumbnail instance normalization).

    >>> net = StyleNet(filters=(4, 8, 8), blocks=1, styles=2)
    >>> images, mixture = jnp.ones((1, 16, 12, 3)), jnp.array([[0.5, 0.5]])
    >>> key = jax.random.key(0)
    >>> found, _ = jax.eval_shape(net.init_with_output, key, images, mixture)
    >>> [x.shape for x in found], net.statistics_size
    ([(1, 16, 12, 3), (1, 96)], 96)

    References:
      Johnson, Alahi and Fei-Fei, Perceptual losses for real-time style transfer and
      super-resolution, ECCV 2016; its supplement has the network.
      Ulyanov, Vedaldi and Lempitsky, Instance normalization, 2016.
      Dumoulin, Shlens and Kudlur, A learned representation for artistic style, ICLR 2017.
      Odena, Dumoulin and Olah, Deconvolution and checkerboard artifacts, Distill 2016.
    """

    filters: Sequence[int] = (32, 64, 128)  # numbers of filters at full, half and quarter size
    blocks: int = 5  # number of residual blocks at quarter size
    styles: int = 1  # number of styles S; `mixture` is [B, S]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every normalization, in order."""
        full, half, quarter = self.filters
        return (full, half, quarter, *[quarter] * (2 * self.blocks), half, full)

    @property
    def statistics_size(self) -> int:
        """Size of the statistics: a mean and a variance for every normalized channel."""
        return 2 * sum(self.widths)

    @property
    def reach(self) -> int:
        """Largest distance in pixels at which an output depends on an input, given statistics."""
        # 9×9, 3×3, 3×3 at half size, two 3×3 in a block at quarter size; then half, full, 9×9;
        # and up to 3 for the position inside a coarse pixel.
        return 4 + 1 + 2 + 4 * 2 * self.blocks + 2 + 1 + 4 + 3

    @nn.compact
    def __call__(
        self, images: jax.Array, mixture: jax.Array, statistics: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The paintings and the statistics used; heights and widths must be multiples of 4."""
        ok = images.ndim == 4 and images.shape[3] == 3
        check.argument(ok, "images", "of shape [B, H, W, 3]", images.shape)
        ok = mixture.ndim == 2 and mixture.shape[1] == self.styles
        check.argument(ok, "mixture", f"of shape [B, {self.styles}]", mixture.shape)
        full, half, quarter = self.filters
        norms = _Norms(self.styles, mixture, statistics)
        x = norms(conv(full, 9)(2.0 * images - 1.0), relu=True)
        x = norms(conv(half, 3, 2)(x), relu=True)
        x = norms(conv(quarter, 3, 2)(x), relu=True)
        for _ in range(self.blocks):
            h = norms(conv(quarter, 3)(x), relu=True)
            x = x + norms(conv(quarter, 3)(h), relu=False)
        x = norms(conv(half, 3)(doubled(x)), relu=True)
        x = norms(conv(full, 3)(doubled(x)), relu=True)
        return nn.sigmoid(conv(3, 9)(x)), jnp.concatenate(norms.used, axis=1)


class _Norms:
    """Applies one instance norm after the other, each with its part of the statistics."""

    def __init__(self, styles: int, mixture: jax.Array, statistics: jax.Array | None):
        self._styles, self._mixture, self._given, self._at = styles, mixture, statistics, 0
        self.used: list[jax.Array] = []

    def __call__(self, x: jax.Array, *, relu: bool) -> jax.Array:
        end = self._at + 2 * x.shape[-1]
        given = None if self._given is None else self._given[:, self._at : end]
        self._at = end
        y, used = InstanceNorm(self._styles)(x, self._mixture, given)
        self.used.append(used)
        return nn.relu(y) if relu else y


class InstanceNorm(nn.Module):
    """Conditional instance normalization of [B, H, W, C]; also returns means and variances.

    >>> norm, x = InstanceNorm(1), jnp.arange(8.0).reshape(1, 4, 2, 1)
    >>> y, used = norm.apply(norm.init(jax.random.key(0), x, jnp.ones((1, 1))), x, jnp.ones((1, 1)))
    >>> used.tolist(), round(float(y.std()), 4)
    ([[3.5, 5.25]], 1.0)
    """

    styles: int  # number of scales and shifts

    @nn.compact
    def __call__(
        self, x: jax.Array, mixture: jax.Array, given: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The normalized [B, H, W, C], and [B, 2C]: means, then variances."""
        channels = x.shape[-1]
        scales = self.param("scale", nn.initializers.ones, (self.styles, channels))
        shifts = self.param("shift", nn.initializers.zeros, (self.styles, channels))
        mean = jnp.mean(x, axis=(1, 2))
        variance = jnp.mean(jnp.square(x - mean[:, None, None, :]), axis=(1, 2))
        used = jnp.concatenate([mean, variance], axis=1)
        if given is not None:
            used = jnp.where(jnp.isnan(given), used, given)
            mean, variance = used[:, :channels], used[:, channels:]
        factor = (mixture @ scales) * jax.lax.rsqrt(variance + jnp.asarray(_EPSILON, x.dtype))
        mean, factor, shift = (v[:, None, None, :] for v in (mean, factor, mixture @ shifts))
        return (x - mean) * factor + shift, used


def conv(filters: int, size: int, stride: int = 1) -> Any:
    """A convolution with reflected edges; without bias where a norm follows."""

    def apply(x: jax.Array) -> jax.Array:
        return nn.Conv(
            filters,
            (size, size),
            (stride, stride),
            padding="VALID",
            use_bias=filters == 3,  # no norm follows the last one
            conv_general_dilated=by_rows if size == 9 else conv_general_dilated,
        )(reflected(x, size // 2))

    return apply


def by_rows(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """A convolution without padding or strides, for large windows and three channels.

        (x ∗ k)[i, j] = Σᵣ Σ꜀ x[i + r, j + c] k[r, c]

    The window's rows become channels of the inputs or of the outputs, whichever are fewer, for a
    convolution along rows. The values are the same; on CPUs the time is less than half for three
    input channels, and a sixth for three output channels.

    >>> x, kernel = jnp.ones((1, 5, 5, 3)), jnp.ones((2, 3, 3, 4))
    >>> by_rows(x, kernel, (1, 1), "VALID")[0, :, 0, 0].tolist()
    [18.0, 18.0, 18.0, 18.0]
    """
    canonical = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    rows, columns, inputs, outputs = kernel.shape
    b, height, width = x.shape[0], x.shape[1] - rows + 1, x.shape[2] - columns + 1
    if inputs < outputs:
        stacked = [jax.lax.slice_in_dim(x, r, r + height, axis=1) for r in range(rows)]
        flat = kernel.transpose(1, 0, 2, 3).reshape(1, columns, rows * inputs, outputs)
        x = jnp.concatenate(stacked, axis=3)
        return conv_general_dilated(x, flat, (1, 1), "VALID", **canonical)
    flat = kernel.transpose(1, 2, 0, 3).reshape(1, columns, inputs, rows * outputs)
    y = conv_general_dilated(x, flat, (1, 1), "VALID", **canonical)
    y = y.reshape(b, x.shape[1], width, rows, outputs)
    parts = [jax.lax.slice_in_dim(y[:, :, :, r], r, r + height, axis=1) for r in range(rows)]
    return functools.reduce(jnp.add, parts)


def reflected(x: jax.Array, by: int) -> jax.Array:
    """[B, H, W, C] with `by` more rows and columns on all sides, mirrored about the edge pixels.

    As `jnp.pad(mode="reflect")`, which does not take the symbolic sizes of an exported function.

    >>> reflected(jnp.arange(3.0).reshape(1, 1, 3, 1).repeat(3, 1), 2)[0, 0, :, 0].tolist()
    [2.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0]
    """
    for axis in (1, 2):
        before = jax.lax.slice_in_dim(x, 1, by + 1, axis=axis)
        size = x.shape[axis]
        after = jax.lax.slice_in_dim(x, size - by - 1, size - 1, axis=axis)
        x = jnp.concatenate([jnp.flip(before, axis), x, jnp.flip(after, axis)], axis=axis)
    return x


def doubled(x: jax.Array) -> jax.Array:
    """[B, H, W, C] at twice the height and width, with every pixel repeated four times.

    >>> doubled(jnp.arange(2.0).reshape(1, 1, 2, 1))[0, :, :, 0].tolist()
    [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    b, h, w, c = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return wide.reshape(b, 2 * h, 2 * w, c)
