"""The recurrent net: a cell scanned over a sequence."""

from typing import Any

import flax.linen as nn
import jax

from jdl.core import check

CELLS = {"vanilla": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


class RNN(nn.Module):
    """Stacked recurrent layers, and one dense layer on the last step's state.

        cₜ, hₜ = cell(cₜ₋₁, xₜ),  outputs = Wᵀ h_T + b

    Inputs are sequences [B, T, F]; further axes are flattened into F, so that an image [B, H, W, C]
    is a sequence of its rows.

    Attributes:
      num_outputs: units of the last layer, the number of classes for a classifier.
      hidden: units of each recurrent layer.
      layers: how many recurrent layers.
      cell: "vanilla" (tanh), "gru" or "lstm".
      dtype: type of the computation; None for the parameters' own.

    >>> import jax.numpy as jnp
    >>> net = RNN(num_outputs=3, hidden=8, cell="gru")
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 5, 4)))
    >>> net.apply(variables, jnp.ones((2, 5, 4))).shape
    (2, 3)

    References:
      Elman, Finding structure in time, Cognitive Science 14, 1990 (vanilla); Hochreiter and
      Schmidhuber, Long short-term memory, Neural Computation 9, 1997; Cho et al., Learning phrase
      representations using RNN encoder-decoder, EMNLP 2014 (GRU).
    """

    num_outputs: int = 10
    hidden: int = 128
    layers: int = 1
    cell: str = "lstm"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs [B, num_outputs] for sequences [B, T, ...]."""
        check.argument(x.ndim >= 3, "x", "of shape [B, T, F]", x.shape)
        cell = CELLS[check.one_of("cell", self.cell, CELLS)]
        h: Any = x.reshape(*x.shape[:2], -1)
        for i in range(self.layers):
            h = nn.RNN(cell(self.hidden, dtype=self.dtype), name=f"layer_{i}")(h)
        return nn.Dense(self.num_outputs, dtype=self.dtype, name="outputs")(h[:, -1])
