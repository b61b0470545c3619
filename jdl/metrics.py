"""Metrics: `metric(outputs, batch) -> float[B]`, one value an example.

The trainer averages them over examples, exactly, whatever the remainder of the last batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdl.core import check
from jdl.core.types import Batch


def accuracy(
    outputs: Float[Array, "B K"], batch: Batch, target: str = "label"
) -> Float[Array, " B"]:
    """1 where the largest output is the labelled class, else 0.

    >>> accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), {"label": jnp.array([1, 1])}).tolist()
    [1.0, 0.0]
    """
    labels = batch[target]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jnp.argmax(labels, axis=-1)
    return (jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32)


def top_k_accuracy(k: int) -> Callable[..., Float[Array, " B"]]:
    """1 where the labelled class is among the `k` largest outputs, else 0.

    >>> outputs = jnp.array([[0.1, 0.3, 0.6]])
    >>> top_k_accuracy(2)(outputs, {"label": jnp.array([1])}).tolist()
    [1.0]
    """
    check.positive_int("k", k)

    def metric(outputs: jax.Array, batch: Batch, target: str = "label") -> jax.Array:
        largest = jax.lax.top_k(outputs, min(k, outputs.shape[-1]))[1]
        hit = largest == batch[target][:, None].astype(largest.dtype)
        return jnp.any(hit, axis=-1).astype(jnp.float32)

    return metric


def squared_error(
    outputs: Float[Array, "B ..."], batch: Batch, target: str = "label"
) -> Float[Array, " B"]:
    """Σ (o − t)² over an example's elements.

    >>> squared_error(jnp.ones((1, 2)), {"label": jnp.array([[0.0, 3.0]])}).tolist()
    [5.0]
    """
    difference = outputs.astype(jnp.float32) - batch[target].astype(jnp.float32)
    return jnp.sum(jnp.square(difference).reshape(difference.shape[0], -1), axis=1)
