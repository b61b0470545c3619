r"""Autoencoders: a narrow code, or a wide one with a penalty or corrupted inputs.

`Autoencoder` (dense, with tied weights if wanted), `ConvAutoencoder` and `Variational` are
networks; `penalized` adds sparsity or contraction to one, `denoising` corrupts its inputs.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.derivatives import linearize
from jdl.core.model import Model, as_model
from jdl.core.types import Key, ModelState, Params
from jdl.models.convolution import conv_general_dilated
from jdl.models.layers import Activation, activation, example_keys, max_pool

NOISES = ("masking", "gaussian", "salt_and_pepper")


class Reconstruction(NamedTuple):
    """The outputs of an autoencoder with a penalty or corrupted inputs."""

    outputs: jax.Array  # logits or real values, [B, ...]
    penalty: jax.Array  # to be added to the loss, [B]
    of_clean: jax.Array | None = None  # outputs for the uncorrupted inputs; None without corruption
    corrupted: jax.Array | None = None  # the corrupted inputs; None without corruption


def as_reconstruction(outputs: Any) -> Reconstruction:
    """`outputs`, or plain outputs with no penalty."""
    if isinstance(outputs, Reconstruction):
        return outputs
    return Reconstruction(outputs, jnp.zeros(outputs.shape[0], jnp.float32))


class Autoencoder(nn.Module):
    """Dense layers to a code, and mirrored layers back.

        code = encode(x),  outputs = decode(code), of the shape of x

    Outputs are logits or real values, depending on the loss: `sigmoid_cross_entropy` for pixels
    in [0, 1], `squared_error` otherwise.

    Attributes:
      widths: units of the encoder's layers, the code's last; the decoder mirrors them.
      activation: activation of all layers but the code and the last.
      code_activation: activation of the code.
      tied: whether the decoder's kernels are the encoder's, transposed.
      kernel_init, bias_init: initializers; `jdl.models.layers.sparse_init(15)` is Martens'.
      dtype: the type to compute in; None for the parameters' dtype.

    >>> net = Autoencoder(widths=(32, 4))
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
    >>> net.apply(variables, jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 1)
    >>> net.apply(variables, jnp.ones((2, 8, 8, 1)), method="encode").shape
    (2, 4)

    References:
      Hinton and Salakhutdinov, Reducing the dimensionality of data with neural networks,
      Science 313, 2006.
    """

    widths: Sequence[int] = (1000, 500, 250, 30)
    activation: Activation = "sigmoid"
    code_activation: Activation = "linear"
    tied: bool = False
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    dtype: Any = None

    def _dense(self, width: int, name: str) -> nn.Dense:
        inits: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        return nn.Dense(width, dtype=self.dtype, name=name, **inits)

    def _back(self, h: jax.Array, width: int, name: str, mirrored: int) -> jax.Array:
        """One layer of the decoder, which mirrors the encoder's layer `mirrored`."""
        if not self.tied:
            return self._dense(width, name)(h)
        kernel = self.variables["params"][f"encoder_{mirrored}"]["kernel"]
        bias = self.param(f"{name}_bias", self.bias_init, (width,))
        h, kernel, bias = nn.dtypes.promote_dtype(h, kernel, bias, dtype=self.dtype)
        return h @ kernel.T + bias[None]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction of `x`, [B, ...]."""
        return self.decode(self.encode(x), x.shape[1:])

    @nn.compact
    def encode(self, x: Any) -> jax.Array:
        """Codes [B, widths[-1]] of inputs [B, ...]."""
        h = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            phi = activation(self.code_activation if last else self.activation)
            h = phi(self._dense(width, f"encoder_{i}")(h))
        return h

    @nn.compact
    def decode(self, code: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Reconstructions [B, *shape] of codes [B, widths[-1]]."""
        h, depth = code, len(self.widths)
        for i, width in enumerate(reversed(self.widths[:-1])):
            h = activation(self.activation)(self._back(h, width, f"decoder_{i}", depth - 1 - i))
        outputs = self._back(h, math.prod(shape), "reconstruction", 0)
        return outputs.reshape(code.shape[0], *shape)


class ConvAutoencoder(nn.Module):
    """Convolutions and pooling to a code; upsampling and convolutions back.

    Each stage halves height and width; both must be multiples of 2^len(filters).

    Attributes:
      filters: channels of each stage of the encoder.
      code: units of the code.
      kernel_size: height and width of the convolutions.
      activation: activation of all layers but the code and the last.
      dtype: the type to compute in; None for the parameters' dtype.

    >>> net = ConvAutoencoder(filters=(4, 8), code=5)
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
    >>> net.apply(variables, jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 1)

    References:
      Masci, Meier, Cireşan and Schmidhuber, Stacked convolutional auto-encoders for hierarchical
      feature extraction, ICANN 2011.
    """

    filters: Sequence[int] = (16, 32)
    code: int = 30
    kernel_size: Sequence[int] = (3, 3)
    activation: Activation = "relu"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction of images [B, H, W, C]."""
        return self.decode(self.encode(x), x.shape[1:])

    def _conv(self, filters: int, name: str) -> nn.Conv:
        return nn.Conv(
            filters,
            tuple(self.kernel_size),
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
            name=name,
        )

    @nn.compact
    def encode(self, x: Any) -> jax.Array:
        """Codes [B, code] of images [B, H, W, C]."""
        check.argument(x.ndim == 4, "x", "of shape [B, H, W, C]", x.shape)
        by = 2 ** len(self.filters)
        whole = x.shape[1] % by == 0 and x.shape[2] % by == 0
        must = f"of a height and width that are multiples of {by}"
        check.argument(whole, "x", must, x.shape[1:3])
        phi = activation(self.activation)
        for i, filters in enumerate(self.filters):
            x = max_pool(phi(self._conv(filters, f"down_{i}")(x)), (2, 2), (2, 2))
        return nn.Dense(self.code, dtype=self.dtype, name="code")(x.reshape(x.shape[0], -1))

    @nn.compact
    def decode(self, code: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Images [B, H, W, C] of codes [B, code], with `shape` (H, W, C)."""
        height, width, channels = shape
        by, phi = 2 ** len(self.filters), activation(self.activation)
        small = (height // by, width // by, self.filters[-1])
        h = phi(nn.Dense(math.prod(small), dtype=self.dtype, name="expand")(code))
        h = h.reshape(code.shape[0], *small)
        for i, filters in enumerate([*reversed(self.filters[:-1]), channels]):
            h = self._conv(filters, f"up_{i}")(jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2))
            h = phi(h) if i < len(self.filters) - 1 else h
        return h


class Variational(nn.Module):
    r"""The variational autoencoder, with Gaussian code and standard normal prior.

        code = μ(x) + exp(½ log σ²(x)) · ε,   penalty = ½ Σ (μ² + σ² − log σ² − 1)

    With `sigmoid_cross_entropy` and β = 1, loss + penalty is the negative evidence lower bound in
    nats. In evaluation the code is μ.

    Attributes:
      widths: units of the encoder's hidden layers; the decoder mirrors them.
      code: units of the code.
      activation: activation of the hidden layers.
      beta: weight of the penalty.
      dtype: the type to compute in; None for the parameters' dtype.

    >>> net = Variational(widths=(16,), code=2)
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
    >>> net.apply(variables, jnp.ones((2, 8, 8, 1))).outputs.shape
    (2, 8, 8, 1)

    References:
      Kingma and Welling, Auto-encoding variational Bayes, ICLR 2014, appendix B; Higgins et al.,
      β-VAE, ICLR 2017.
    """

    widths: Sequence[int] = (500, 250)
    code: int = 30
    activation: Activation = "relu"
    beta: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Reconstruction:
        """Reconstruction and penalty of inputs [B, ...]."""
        mean, log_variance = self.encode(x)
        code = mean
        if train:
            noise = jax.random.normal(self.make_rng("dropout"), mean.shape, mean.dtype)
            code = mean + jnp.exp(0.5 * log_variance) * noise
        variance = jnp.exp(log_variance)
        divergence = 0.5 * jnp.sum(jnp.square(mean) + variance - log_variance - 1, axis=1)
        return Reconstruction(self.decode(code, x.shape[1:]), self.beta * divergence)

    @nn.compact
    def encode(self, x: Any) -> tuple[jax.Array, jax.Array]:
        """μ and log σ², each [B, code]."""
        h = self._hidden(x.reshape(x.shape[0], -1), self.widths, "encoder")
        mean, log_variance = (self._dense(self.code, name) for name in ("mean", "log_variance"))
        return mean(h), log_variance(h)

    @nn.compact
    def decode(self, code: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Outputs [B, *shape] of codes [B, code]; of codes from N(0, I), samples of the model."""
        h = self._hidden(code, self.widths[::-1], "decoder")
        return self._dense(math.prod(shape), "reconstruction")(h).reshape(code.shape[0], *shape)

    def _hidden(self, h: jax.Array, widths: Sequence[int], name: str) -> jax.Array:
        phi = activation(self.activation)
        for i, width in enumerate(widths):
            h = phi(self._dense(width, f"{name}_{i}")(h))
        return h

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, dtype=self.dtype, name=name)


def penalized(
    net: Any, *, sparsity: float = 0.0, contraction: float = 0.0, probes: int = 1
) -> Model:
    r"""An autoencoder with a penalty on its code: a `Model` that returns a `Reconstruction`.

        penalty = sparsity · |code|₁ + contraction · ‖∂code/∂x‖²_F

    The Jacobian's norm is estimated, without bias, by the mean of |∂code/∂x u|² over directions
    u ~ N(0, I), each a forward-mode product that costs about a forward pass. In evaluation each
    example has fixed directions.

    Args:
      net: an `Autoencoder` or another Linen module with a method `encode(x) -> [B, F]`.
      sparsity: ≥ 0.
      contraction: ≥ 0.
      probes: directions for each example, ≥ 1.

    References:
      Rifai et al., Contractive auto-encoders, ICML 2011.
    """
    check.in_range("sparsity", sparsity, 0.0)
    check.in_range("contraction", contraction, 0.0)
    check.positive_int("probes", probes)
    base = as_model(net)

    def apply(
        params: Params,
        state: ModelState,
        x: jax.Array,
        *,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Reconstruction, ModelState]:
        outputs, new_state = base.apply(params, state, x, key=key, train=train)
        outputs = as_reconstruction(outputs)

        def encode(x: jax.Array) -> jax.Array:
            return net.apply({"params": params, **state}, x, method="encode")

        penalty = outputs.penalty
        if sparsity:
            penalty = penalty + sparsity * jnp.sum(jnp.abs(encode(x)), axis=1)
        if contraction:
            _, push, _ = linearize(encode, x)
            if key is None:
                draw = partial(jax.random.normal, shape=(probes, *x.shape[1:]), dtype=x.dtype)
                directions = jax.vmap(draw, out_axes=1)(example_keys(x))
            else:
                probe_key = jax.random.fold_in(key, 1)
                directions = jax.random.normal(probe_key, (probes, *x.shape), x.dtype)
            norms = [jnp.sum(jnp.square(push(u)), axis=1) for u in directions]
            penalty = penalty + contraction / probes * sum(norms[1:], norms[0])
        return outputs._replace(penalty=penalty), new_state

    return Model(base.init, apply)


def corrupt(x: jax.Array, key: Key, noise: str, level: float) -> jax.Array:
    """Adds noise to `x`, whose values are in [0, 1] for "salt_and_pepper".

    "masking" sets a share `level` of the values to 0, "salt_and_pepper" to 0 or 1; "gaussian" adds
    N(0, level²).

    >>> corrupt(jnp.ones(10_000), jax.random.key(0), "masking", 0.25).mean().round(2)
    Array(0.75, dtype=float32)
    """
    _check_noise(noise, level)
    if noise == "gaussian":
        return x + level * jax.random.normal(key, x.shape, x.dtype)
    u = jax.random.uniform(key, x.shape, x.dtype)
    set_to = jnp.zeros_like(x) if noise == "masking" else (u < level / 2).astype(x.dtype)
    return jnp.where(u < level, set_to, x)


def _check_noise(noise: str, level: float) -> None:
    check.one_of("noise", noise, NOISES)
    check.in_range("level", level, 0.0, math.inf if noise == "gaussian" else 1.0)


def denoising(model: Model | nn.Module, noise: str = "gaussian", level: float = 0.5) -> Model:
    """An autoencoder trained to reconstruct its inputs from ones with noise, as of `corrupt`.

    The `Model` returns a `Reconstruction`, whose `of_clean` has the outputs for uncorrupted inputs:
    use it to denoise images that are noisy already. In evaluation each example has a fixed noise.

    References:
      Vincent et al., Stacked denoising autoencoders, Journal of Machine Learning Research 11, 2010.
    """
    _check_noise(noise, level)
    base = as_model(model)

    def apply(
        params: Params,
        state: ModelState,
        x: jax.Array,
        *,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Reconstruction, ModelState]:
        if key is None:
            noisy = jax.vmap(partial(corrupt, noise=noise, level=level))(x, example_keys(x))
        else:
            noisy = corrupt(x, jax.random.fold_in(key, 0), noise, level)
        outputs, new_state = base.apply(params, state, noisy, key=key, train=train)
        clean = as_reconstruction(base.apply(params, state, x, key=None, train=False)[0]).outputs
        return as_reconstruction(outputs)._replace(of_clean=clean, corrupted=noisy), new_state

    return Model(base.init, apply)
