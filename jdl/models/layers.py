"""Parts shared by several architectures: activations, initializers, max pooling, random shifts."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdl.core import check
from jdl.core.types import Key

Activation: TypeAlias = str | Callable[[jax.Array], jax.Array]
Initializer: TypeAlias = str | Callable[..., jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "elu": nn.elu,
    "selu": nn.selu,
    "softsign": nn.soft_sign,
    "softplus": nn.softplus,
    "linear": lambda x: x,
}


def activation(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name; a function is returned as it is.

    >>> activation("leaky_relu")(jnp.array([-1.0, 2.0])).round(2).tolist()
    [-0.009999999776482582, 2.0]
    """
    if callable(name):
        return name
    return ACTIVATIONS[check.one_of("activation", name, ACTIVATIONS)]


def one_hot(name: str, x: Any, count: int, dtype: Any = jnp.float32) -> jax.Array:
    """One-hot rows of numbers in [0, count); others raise, or inside `jit` have rows of NaN."""
    x = _numbers(name, x, count)
    inside = (x < count)[..., None]
    return jnp.where(inside, jax.nn.one_hot(x, count, dtype=dtype), jnp.asarray(jnp.nan, dtype))


def example_keys(x: jax.Array) -> Key:
    """A random key for each example, key[B], a hash of the example's values alone.

    What a model draws with them in evaluation depends neither on the size nor on the order of
    batches. Equal examples, to 1/256 of a unit, have equal keys.

    Args:
      x: [B, ...].

    >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> jax.random.uniform(example_keys(x)[0]) == jax.random.uniform(example_keys(x[2:])[0])
    Array(True, dtype=bool)

    References:
      Carter and Wegman, Universal classes of hash functions, Journal of Computer and System
      Sciences 18, 1979.
    """
    whole = jnp.round(x.reshape(x.shape[0], -1).astype(jnp.float32) * 256).astype(jnp.int32)
    factors = jax.random.bits(jax.random.key(0), whole.shape[1:])
    sums = jnp.sum(whole.astype(jnp.uint32) * factors[None], axis=1, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), sums)


def embedded(table: nn.Embed, name: str, x: Any) -> jax.Array:
    """Rows of a table for numbers in its range; others raise, or inside `jit` are NaN."""
    return table(_numbers(name, x, table.num_embeddings))


def _numbers(name: str, x: Any, count: int) -> jax.Array:
    """Numbers, those outside [0, count) as `count`: a negative index would count from the end."""
    must = f"numbers in [0, {count})"
    check.argument(x is not None, name, must, x)
    check.values(name, x, 0, count - 1, must)
    x = jnp.asarray(x)
    check.argument(jnp.issubdtype(x.dtype, jnp.integer), name, "of an integer type", x.dtype)
    x = x.astype(jnp.int32)
    return jnp.where((x < 0) | (x > count), count, x)


def draw(logits: jax.Array, key: Key, temperature: float) -> jax.Array:
    """Numbers from softmax(logits / temperature), int32[...]; at 0 the most likely ones.

    >>> draw(jnp.array([[1.0, 3.0, 2.0]]), jax.random.key(0), 0.0).tolist()
    [1]
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def max_pool(
    x: Float[Array, "B H W C"], pool_size: Sequence[int], strides: Sequence[int]
) -> Float[Array, "B h w C"]:
    """The maximum over each window; windows that do not fit in the image are dropped.

    Windows that tile the image are reduced by comparing their elements. The values are the same,
    and on CPUs XLA computes the gradient about twice as fast as that of a reduce-window.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    (h, w), window = x.shape[1:3], tuple(pool_size)
    ok = window[0] <= h and window[1] <= w
    check.argument(ok, "pool_size", f"at most the image's {h}×{w}", window)
    if window != tuple(strides) or h % window[0] or w % window[1]:
        return nn.max_pool(x, window, tuple(strides))
    tiles = x.reshape(x.shape[0], h // window[0], window[0], w // window[1], window[1], x.shape[3])
    rows = functools.reduce(_larger, (tiles[:, :, i] for i in range(window[0])))
    return functools.reduce(_larger, (rows[:, :, :, i] for i in range(window[1])))


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """The elementwise maximum, a NaN if one is; its gradient goes to one of the two.

    That of `jnp.max` goes to what equals the maximum: to nothing, where XLA computes the input
    twice and rounds it differently.
    """
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


class RandomShift(nn.Module):
    """A net whose images are shifted at random by whole pixels in training: data augmentation.

        outputs = net(image shifted by (i, j)),  i and j uniform in {−by, …, by}

    Zeros enter at the border; in evaluation images are not shifted. The shifts are drawn with the
    "dropout" key, so that a step's line search and curvature products use the same ones.

    Attributes:
      net: takes images [B, H, W, C] and `train`, such as a `CNN`.
      by: the largest shift in pixels, ≥ 1.

    >>> from jdl.models import CNN
    >>> net, image = RandomShift(CNN(units=8), by=2), jnp.ones((1, 8, 8, 1))
    >>> variables = net.init(jax.random.key(0), image)
    >>> net.apply(variables, image, train=True, rngs={"dropout": jax.random.key(1)}).shape
    (1, 10)

    References:
      Simard, Steinkraus and Platt, Best practices for convolutional neural networks, ICDAR 2003,
      section 2.
    """

    net: nn.Module
    by: int = 2

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """The outputs of `net` for images [B, H, W, C]."""
        check.positive_int("by", self.by)
        check.argument(image.ndim == 4, "image", "of shape [B, H, W, C]", image.shape)
        if train:
            key, window = self.make_rng("dropout"), image.shape[1:]
            corners = jax.random.randint(key, (len(image), 2), 0, 2 * self.by + 1)
            around = jnp.pad(image, [(0, 0), (self.by, self.by), (self.by, self.by), (0, 0)])
            cut = jax.vmap(lambda x, ij: jax.lax.dynamic_slice(x, (*ij, 0), window))
            image = cut(around, corners)
        return self.net(image, train=train)


def sparse_init(incoming: int = 15, scale: float = 1.0) -> Callable[..., jax.Array]:
    """An initializer that gives each unit `incoming` weights from N(0, scale²), the others zero.

    No unit saturates, however wide the layer below; all weights are nonzero where it is narrower.

    >>> kernel = sparse_init(3)(jax.random.key(0), (10, 4))
    >>> (kernel != 0).sum(axis=0).tolist()
    [3, 3, 3, 3]

    References:
      Martens, Deep learning via Hessian-free optimization, ICML 2010, section 5.
    """
    check.positive_int("incoming", incoming)

    def init(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        *below, units = shape
        fan_in = math.prod(below)
        order_key, weight_key = jax.random.split(key)
        order = jax.random.uniform(order_key, (fan_in, units))
        rank = jnp.argsort(jnp.argsort(order, axis=0), axis=0)
        weights = jax.random.normal(weight_key, (fan_in, units), dtype)
        return jnp.where(rank < incoming, jnp.asarray(scale, dtype) * weights, 0).reshape(shape)

    return init


INITIALIZERS: dict[str, Callable[..., jax.Array]] = {
    "he": nn.initializers.he_normal(),
    "glorot": nn.initializers.glorot_uniform(),
    "lecun": nn.initializers.lecun_normal(),
    "orthogonal": nn.initializers.orthogonal(),
    "sparse": sparse_init(15),
    "normal": nn.initializers.normal(0.01),
}


def initializer(name: Initializer) -> Callable[..., jax.Array]:
    """The initializer of that name; a function is returned as it is.

    >>> initializer("orthogonal")(jax.random.key(0), (3, 3)).shape
    (3, 3)
    """
    if callable(name):
        return name
    return INITIALIZERS[check.one_of("kernel_init", name, INITIALIZERS)]
