"""Transformers: a causal language model and a vision transformer, of the same blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jdl.core import check
from jdl.core.types import Key, Params
from jdl.models.layers import draw, embedded


class TransformerBlock(nn.Module):
    """Self-attention and a dense layer for each position, both on normalized inputs.

        y = x + attention(norm(x)),  z = y + W₂ᵀ gelu(W₁ᵀ norm(y) + b₁) + b₂

    Attributes:
      heads: the number of attention heads; divides the width D.
      causal: whether a position attends only to itself and earlier ones.

    >>> block, x = TransformerBlock(heads=2), jnp.ones((3, 5, 8))
    >>> block.apply(block.init(jax.random.key(0), x), x).shape
    (3, 5, 8)

    References:
      Vaswani et al., Attention is all you need, NeurIPS 2017; Radford et al., Language models are
      unsupervised multitask learners, 2019 (normalization first, GELU).
    """

    heads: int = 4
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] for [B, T, D]."""
        width = x.shape[-1]
        ok = width % check.positive_int("heads", self.heads) == 0
        check.argument(ok, "heads", f"a divisor of the width {width}", self.heads)
        mask = nn.make_causal_mask(jnp.ones(x.shape[1])[None]) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(h)


class LanguageModel(nn.Module):
    """A causal transformer: at each position the logits of the next symbol, given those so far.

    Positions are learned, so that texts are at most as long as the model's first input.
    `jdl.models.rnn.next_step_loss` is its loss on texts.

    Attributes:
      vocabulary: the number of symbols K.
      width: D.
      depth: the number of blocks.
      heads: of each block.

    >>> net, tokens = LanguageModel(vocabulary=7, width=8, depth=1), jnp.zeros((2, 5), jnp.int32)
    >>> net.apply(net.init(jax.random.key(0), tokens), tokens).shape
    (2, 5, 7)

    References:
      Radford et al., Language models are unsupervised multitask learners, 2019.
    """

    vocabulary: int = 256
    width: int = 128
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, T, K] for tokens int[B, T]."""
        ok = tokens.ndim == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)
        check.argument(ok, "tokens", "int[B, T]", (tokens.dtype, tokens.shape))
        x = _with_positions(self, embedded(nn.Embed(self.vocabulary, self.width), "tokens", tokens))
        for _ in range(self.depth):
            x = TransformerBlock(self.heads, causal=True)(x)
        return nn.Dense(self.vocabulary, name="logits")(nn.LayerNorm()(x))


def generate(
    net: LanguageModel,
    params: Params,
    prompt: ArrayLike,
    steps: int,
    key: Key,
    temperature: float = 1.0,
) -> jax.Array:
    """Continuations of texts, each symbol sampled given those before: int[B, steps].

    The net sees the last T symbols, T being the number of its positions; each step costs a forward
    pass over T.

    Args:
      net: the model.
      params: its parameters.
      prompt: the beginnings of the texts, int[B, N], N ≥ 1.
      steps: how many symbols to sample.
      key: a random key.
      temperature: divides the logits; 0 for the most likely symbol each time.

    >>> net, prompt = LanguageModel(3, width=8, depth=1), jnp.zeros((2, 4), jnp.int32)
    >>> params = net.init(jax.random.key(0), prompt)["params"]
    >>> generate(net, params, prompt, 9, jax.random.key(1)).shape
    (2, 9)
    """
    check.positive_int("steps", steps)
    check.in_range("temperature", temperature, 0.0)
    check.values("prompt", prompt, 0, net.vocabulary - 1, f"numbers in [0, {net.vocabulary})")
    prompt, window = jnp.asarray(prompt, jnp.int32), params["positions"].shape[1]
    ok = prompt.ndim == 2 and prompt.shape[1] > 0
    check.argument(ok, "prompt", "of shape [B, N], N ≥ 1", prompt.shape)
    prompt = prompt[:, -window:]
    number = prompt.shape[1]  # of known symbols; the causal mask hides what is right of them

    def step(state: Any, key: Key) -> tuple[Any, jax.Array]:
        tokens, number = state
        logits: Any = net.apply({"params": params}, tokens)
        token = draw(logits[:, number - 1], key, temperature)
        tokens = jnp.where(number == window, jnp.roll(tokens, -1, axis=1), tokens)
        at = jnp.minimum(number, window - 1)
        return (tokens.at[:, at].set(token), at + 1), token

    start = jnp.pad(prompt, ((0, 0), (0, window - number))), jnp.asarray(number)
    return jax.lax.scan(step, start, jax.random.split(key, steps))[1].T


class ViT(nn.Module):
    """The vision transformer: an image's patches as a sequence, and a linear classifier.

    Attributes:
      num_classes: K.
      patch: side of the square patches in pixels; an image is filled up with zeros to whole ones.
      width: D.
      depth: the number of blocks.
      heads: of each block.
      class_token: whether to classify by a token of its own rather than by the mean of the patches.

    >>> net = ViT(num_classes=3, patch=4, width=8, depth=1, heads=2)
    >>> image = jnp.ones((2, 8, 8, 1))
    >>> net.apply(net.init(jax.random.key(0), image), image).shape
    (2, 3)

    References:
      Dosovitskiy et al., An image is worth 16×16 words, ICLR 2021.
    """

    num_classes: int = 1000
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    class_token: bool = True

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Logits [B, K] for images [B, H, W, C]."""
        check.argument(image.ndim == 4, "image", "of shape [B, H, W, C]", image.shape)
        size = (check.positive_int("patch", self.patch),) * 2
        x = nn.Conv(self.width, size, size, name="patches")(image)
        x = x.reshape(len(x), -1, self.width)
        if self.class_token:
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x = _with_positions(self, x)
        for _ in range(self.depth):
            x = TransformerBlock(self.heads)(x)
        x = nn.LayerNorm()(x)
        return nn.Dense(self.num_classes, name="logits")(x[:, 0] if self.class_token else x.mean(1))


def _with_positions(module: nn.Module, x: jax.Array) -> jax.Array:
    return x + module.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
