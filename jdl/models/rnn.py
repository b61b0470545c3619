"""The recurrent net: cells scanned over sequences of equal or different lengths."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jdl.core import check
from jdl.core.types import Batch, Key, Params
from jdl.losses import softmax_cross_entropy
from jdl.models.layers import draw, one_hot, sparse_init

CELLS = {"vanilla": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}

Carry = Any  # one state for each layer


class RNN(nn.Module):
    """Stacked recurrent layers, and a dense layer on the last step's state or on every step's.

        cₜ, hₜ = cell(cₜ₋₁, xₜ),  outputs = Wᵀ h_T + b

    Inputs are sequences [B, T, F]; further axes are flattened into F, so that an image [B, H, W, C]
    is a sequence of its rows. With `vocabulary` they are numbers int[B, T]. The loss decides on the
    use: `softmax_cross_entropy` to classify, `squared_error` to regress, and `next_step_loss` with
    `every_step=True` for a model that can `generate`.

    Ragged sequences are padded to one T and come with `lengths` int[B], each in [1, T]; the padding
    changes neither states nor the last step's outputs (see `jdl.models.sequences.pad`).

    Attributes:
      num_outputs: units of the last layer; for a classifier the number of classes.
      hidden: units of each recurrent layer, in each direction.
      layers: the number of recurrent layers.
      cell: "vanilla" (tanh), "gru" or "lstm".
      bidirectional: whether each layer reads in both directions; the two states are concatenated.
      every_step: whether to return outputs [B, T, num_outputs] of every step, or [B, num_outputs]
        of the last step (of each direction).
      vocabulary: the number of symbols, for sequences of numbers; None for real inputs.
      kernel_init: for the kernels on inputs.
      recurrent_init: for the kernels on states; `echo_init()` for vanilla cells on problems with
        long-term dependencies.
      dtype: the type to compute in; None for the parameters' dtype.

    >>> net = RNN(num_outputs=3, hidden=8, cell="gru")
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 5, 4)))
    >>> net.apply(variables, jnp.ones((2, 5, 4)), jnp.array([5, 3])).shape
    (2, 3)

    References:
      Elman, Finding structure in time, Cognitive Science 14, 1990 (vanilla); Hochreiter and
      Schmidhuber, Long short-term memory, Neural Computation 9, 1997; Cho et al., Learning phrase
      representations using RNN encoder-decoder, EMNLP 2014 (GRU); Schuster and Paliwal,
      Bidirectional recurrent neural networks, IEEE Transactions on Signal Processing 45, 1997.
    """

    num_outputs: int = 10
    hidden: int = 128
    layers: int = 1
    cell: str = "lstm"
    bidirectional: bool = False
    every_step: bool = False
    vocabulary: int | None = None
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    recurrent_init: Callable[..., jax.Array] = nn.initializers.orthogonal()
    dtype: Any = None

    def __call__(self, x: ArrayLike, lengths: ArrayLike | None = None) -> jax.Array:
        """Outputs for sequences [B, T, ...]."""
        return self._read(x, lengths, None, self.every_step)[0]

    def stream(
        self, x: ArrayLike, carry: Carry = None, lengths: ArrayLike | None = None
    ) -> tuple[jax.Array, Carry]:
        """Outputs [B, T, num_outputs] for the next piece of each sequence, and the new carry.

        Args:
          x: the piece, [B, T, ...].
          carry: that of the last piece; None at the beginning.
          lengths: of the pieces, each in [1, T].

        >>> net = RNN(num_outputs=3, hidden=8)
        >>> x = jnp.arange(20.0).reshape(1, 5, 4) / 10
        >>> variables = net.init(jax.random.key(0), x)
        >>> _, carry = net.apply(variables, x[:, :3], method="stream")
        >>> pieces, _ = net.apply(variables, x[:, 3:], carry, method="stream")
        >>> bool(jnp.allclose(pieces[:, -1], net.apply(variables, x), atol=1e-6))
        True
        """
        ok = not self.bidirectional
        check.argument(ok, "bidirectional", "False for streaming, where the end is unknown", True)
        return self._read(x, lengths, carry, True)

    def states(self, x: ArrayLike, lengths: ArrayLike | None = None) -> jax.Array:
        """The last layer's states at every step, [B, T, hidden]; 2·hidden if bidirectional.

        These are the states of structural damping (`jdl.optim.hessian_free`).
        """
        return self._run(x, lengths, None)[0]

    @nn.compact
    def _read(
        self, x: ArrayLike, lengths: ArrayLike | None, carry: Carry, every_step: bool
    ) -> tuple[jax.Array, Carry]:
        h, last, carries = self._run(x, lengths, carry)
        outputs = nn.Dense(self.num_outputs, dtype=self.dtype, name="outputs")
        found = outputs(h if every_step else last)
        if lengths is not None:  # NaN for lengths that `checked_lengths` could not know
            right = jnp.asarray(_right(jnp.asarray(lengths), h.shape[1]))
            found = jnp.where(right.reshape(-1, *[1] * (found.ndim - 1)), found, jnp.nan)
        return found, carries

    @nn.compact
    def _run(
        self, x: ArrayLike, lengths: ArrayLike | None, carry: Carry
    ) -> tuple[jax.Array, jax.Array, Carry]:
        """The last layer's states at every step and at the last, and the carries of all layers."""
        h, lengths = self._inputs(x, lengths)
        cell = CELLS[check.one_of("cell", self.cell, CELLS)]
        check.positive_int("layers", self.layers)
        ok = carry is None or len(carry) == self.layers
        check.argument(ok, "carry", "one returned by `stream`", carry)
        carries = []
        for i in range(self.layers):
            ways = []
            for reverse in (False, True) if self.bidirectional else (False,):
                inner = cell(
                    self.hidden,
                    dtype=self.dtype,
                    kernel_init=self.kernel_init,
                    recurrent_kernel_init=self.recurrent_init,
                    name=f"layer_{i}" + ("_reversed" if reverse else ""),
                )
                start = None if carry is None else carry[i]
                layer = nn.RNN(inner, return_carry=True, reverse=reverse, keep_order=True)
                ways.append(layer(h, initial_carry=start, seq_lengths=lengths))
            carries.append(ways[0][0])
            h = jnp.concatenate([states for _, states in ways], axis=-1)
        # A GRU's carry is its state; an LSTM's is (memory, state).
        last = [c[1] if isinstance(c, tuple) else c for c, _ in ways]
        return h, jnp.concatenate(last, axis=-1), tuple(carries)

    def _inputs(self, x: Any, lengths: Any) -> tuple[jax.Array, jax.Array | None]:
        """Inputs of the first layer [B, T, F], zeros in the padding; and the lengths."""
        at = np if check.known(x, lengths) else jnp  # with NumPy, numbers stay known
        x = at.asarray(x)
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        if self.vocabulary is not None:
            must = "int[B, T], as `vocabulary` is given"
            check.argument(x.ndim == 2 and whole, "x", must, (x.dtype, x.shape))
        else:
            check.argument(x.ndim >= 3, "x", "of shape [B, T, F]", x.shape)
        check.argument(x.shape[1] > 0, "x", "of at least one step", x.shape)
        if lengths is not None:
            lengths = checked_lengths(lengths, x.shape[:2])
            # What is in the padding, as −1 or NaN, has no part in the gradient either.
            there = at.arange(x.shape[1])[None, :] < lengths[:, None]
            x = at.where(there.reshape(*there.shape, *[1] * (x.ndim - 2)), x, 0)
            lengths = jnp.asarray(lengths)
        if self.vocabulary is not None:
            return one_hot("x", x, self.vocabulary, self.dtype or jnp.float32), lengths
        return jnp.asarray(x).reshape(*x.shape[:2], -1), lengths


def checked_lengths(lengths: Any, shape: tuple[int, ...]) -> Any:
    """The lengths as int32[B]; those known before compilation are checked to lie in [1, T]."""
    check.values("lengths", lengths, 1, shape[1], f"from 1 to {shape[1]}")
    lengths = (np if check.known(lengths) else jnp).asarray(lengths, jnp.int32)
    check.argument(lengths.shape == shape[:1], "lengths", f"of shape {shape[:1]}", lengths.shape)
    return lengths


def _right(lengths: Any, steps: int) -> Any:
    return (lengths >= 1) & (lengths <= steps)


def echo_init(incoming: int = 15, radius: float = 1.1) -> Callable[..., jax.Array]:
    """An initializer of recurrent weights: sparse, and scaled to a spectral radius.

    Each unit gets `incoming` weights from N(0, 1); all are then scaled so that the largest
    |eigenvalue| is `radius`. Slightly above 1, a vanilla net's states neither vanish nor saturate.

    >>> kernel = echo_init(5, 1.1)(jax.random.key(0), (30, 30))
    >>> round(float(spectral_radius(kernel)), 2)
    1.1

    References:
      Martens and Sutskever, Learning recurrent neural networks with Hessian-free optimization, ICML
      2011; Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in
      deep learning, ICML 2013, section 5.
    """
    check.in_range("radius", radius, 0.0, open_low=True)
    sparse = sparse_init(incoming)

    def init(key: Key, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        check.argument(len(shape) == 2 and shape[0] == shape[1], "shape", "square", shape)
        kernel = sparse(key, shape, dtype)
        return kernel * (radius / spectral_radius(kernel)).astype(dtype)

    return init


def spectral_radius(matrix: jax.Array, squarings: int = 12) -> jax.Array:
    """The largest |eigenvalue|, by Gelfand's formula ‖Aⁿ‖^(1/n) with n = 2^squarings.

    It uses matrix products only, so that it runs on any device; 12 squarings give three digits.

    >>> round(float(spectral_radius(jnp.array([[0.0, 2.0], [-2.0, 0.0]]))), 3)
    2.0
    """

    def square(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
        power, log_norm = carry  # Aⁿ = power · exp(log_norm), ‖power‖ = 1
        power = jnp.matmul(power, power, precision="highest")
        norm = jnp.maximum(jnp.linalg.norm(power), jnp.finfo(power.dtype).tiny)
        return (power / norm, 2 * log_norm + jnp.log(norm)), None

    norm = jnp.maximum(jnp.linalg.norm(matrix), jnp.finfo(matrix.dtype).tiny)
    (_, log_norm), _ = jax.lax.scan(square, (matrix / norm, jnp.log(norm)), None, length=squarings)
    return jnp.exp(log_norm / 2**squarings)


def next_step_loss(outputs: jax.Array, batch: Batch, *, ignore: int | None = None) -> jax.Array:
    """−log p(xₜ₊₁ | x₁ … xₜ), the mean over a sequence's steps, in nats, float[B].

    Numbers that no output stands for, and lengths outside [1, T], are an error, or NaN under `jit`.

    Args:
      outputs: logits [B, T, K] of a net with `every_step=True`.
      batch: int[B, T] in `batch["tokens"]`, or else in `batch["image"]`; optionally int[B] in
        `batch["lengths"]`.
      ignore: the number of steps that do not count, such as −1.

    >>> next_step_loss(jnp.zeros((1, 3, 4)), {"tokens": jnp.array([[0, 1, 3]])}).round(4)
    Array([1.3863], dtype=float32)
    """
    tokens, lengths = batch.get("tokens", batch.get("image")), batch.get("lengths")
    at: Any = np if check.known(tokens, lengths) else jnp  # with NumPy, numbers stay known
    labels, steps = at.asarray(tokens)[:, 1:], jnp.shape(tokens)[1] - 1
    check.argument(steps >= 1, "batch", "sequences of at least two steps", jnp.shape(tokens))
    if lengths is not None:
        lengths = checked_lengths(lengths, jnp.shape(tokens))
        ignore = int(jnp.iinfo(jnp.int32).min) if ignore is None else ignore
        there = at.arange(steps)[None, :] < lengths[:, None] - 1
        labels = at.where(there, labels.astype(jnp.int32), ignore)
    shifted = {**batch, "tokens": labels}
    losses = softmax_cross_entropy(outputs[:, :-1], shifted, "tokens", ignore=ignore)
    return losses if lengths is None else jnp.where(_right(lengths, steps + 1), losses, jnp.nan)


def generate(
    net: RNN, params: Params, prompt: ArrayLike, steps: int, key: Key, temperature: float = 1.0
) -> jax.Array:
    """Continuations of sequences, each number sampled given those before: int[B, steps].

    Args:
      net: with `vocabulary`; its outputs are logits of the next number.
      params: its parameters.
      prompt: the beginnings of the sequences, int[B, T], T ≥ 1.
      steps: how many numbers to sample.
      key: a random key.
      temperature: divides the logits; 0 for the most likely number each time.

    >>> net = RNN(num_outputs=3, vocabulary=3, hidden=4, every_step=True)
    >>> prompt = jnp.zeros((2, 1), jnp.int32)
    >>> params = net.init(jax.random.key(0), prompt)["params"]
    >>> generate(net, params, prompt, 5, jax.random.key(1)).shape
    (2, 5)
    """
    check.positive_int("steps", steps)
    check.in_range("temperature", temperature, 0.0)
    ok = net.vocabulary is not None and net.num_outputs == net.vocabulary
    must = "one with as many outputs as its vocabulary"
    check.argument(ok, "net", must, (net.num_outputs, net.vocabulary))

    def step(state: tuple[jax.Array, Carry], key: Key) -> tuple[tuple[jax.Array, Carry], jax.Array]:
        logits, carry = state
        token = draw(logits, key, temperature)
        outputs, carry = net.apply({"params": params}, token[:, None], carry, method="stream")
        return (outputs[:, -1], carry), token

    outputs, carry = net.apply({"params": params}, prompt, method="stream")
    _, tokens = jax.lax.scan(step, (outputs[:, -1], carry), jax.random.split(key, steps))
    return tokens.T
