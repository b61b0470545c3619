"""The deep autoencoder: compression through a narrow code."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jdl.models.layers import Activation, activation


class Autoencoder(nn.Module):
    """Dense layers down to a code, and their mirror image back.

        code = encode(x),  outputs = decode(code), of the shape of x

    Outputs are logits or real values, as the loss takes them: `sigmoid_cross_entropy` for pixels
    in [0, 1], `squared_error` otherwise.

    Attributes:
      widths: units of the encoder's layers, the code's last; the decoder mirrors them.
      activation: of all layers but the code and the last.
      code_activation: of the code.
      kernel_init, bias_init: initializers; `jdl.models.layers.sparse_init(15)` is Martens'.
      dtype: type of the computation; None for the parameters' own.

    >>> import jax.numpy as jnp
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
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    dtype: Any = None

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(
            width,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name=name,
        )

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction of `x`, [B, ...]."""
        code = self.encode(x)
        return self.decode(code, x.shape[1:])

    @nn.compact
    def encode(self, x: jax.Array) -> jax.Array:
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
        h = code
        for i, width in enumerate(reversed(self.widths[:-1])):
            h = activation(self.activation)(self._dense(width, f"decoder_{i}")(h))
        outputs = self._dense(int(np.prod(shape)), "reconstruction")(h)
        return outputs.reshape(code.shape[0], *shape)
