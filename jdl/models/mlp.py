"""The multilayer perceptron."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jdl.core import check
from jdl.models.layers import Activation, Initializer, activation, initializer


class MLP(nn.Module):
    r"""Dense layers with activations between them.

        h₀ = x,  hₗ = dropout(φ(Wₗᵀ hₗ₋₁ + bₗ)),  outputs = Wᵀ h_L + b

    Inputs [B, ...] are flattened; outputs are [B, num_outputs], without activation.

    Attributes:
      widths: units of each hidden layer.
      num_outputs: units of the last layer; for a classifier the number of classes.
      activation: φ, a name of `jdl.models.layers.ACTIVATIONS` or a function.
      dropout: share of hidden units dropped in training, in [0, 1).
      kernel_init: a name of `jdl.models.layers.INITIALIZERS` or a function; "sparse" is Martens'.
      bias_init: for the hidden layers' biases.
      dtype: the type to compute in; None for the parameters' dtype.

    >>> import jax.numpy as jnp
    >>> mlp = MLP(widths=(8,), num_outputs=3)
    >>> variables = mlp.init(jax.random.key(0), jnp.ones((2, 4, 4, 1)))
    >>> mlp.apply(variables, jnp.ones((2, 4, 4, 1))).shape
    (2, 3)

    References:
      Rumelhart, Hinton and Williams, Learning representations by back-propagating errors,
      Nature 323, 1986.
    """

    widths: Sequence[int] = (500, 500)
    num_outputs: int = 10
    activation: Activation = "relu"
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.he_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Outputs [B, num_outputs] for inputs [B, ...]."""
        check.in_range("dropout", self.dropout, 0.0, 1.0, open_high=True)
        x = x.reshape(x.shape[0], -1)
        layer = {"dtype": self.dtype, "kernel_init": initializer(self.kernel_init)}
        for width in self.widths:
            x = nn.Dense(width, bias_init=self.bias_init, **layer)(x)
            x = activation(self.activation)(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_outputs, name="outputs", **layer)(x)
