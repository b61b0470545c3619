"""Losses: `loss(outputs, batch) -> float[B]`, one value per example, convex in the outputs.

Gauss-Newton products need the convexity. The target is an entry of the batch, `label` by default:
`functools.partial(squared_error, target="image")` is an autoencoder's loss. Sums are computed in at
least float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jdl.core import check, tree
from jdl.core.types import Batch


def softmax_cross_entropy(
    outputs: Float[Array, "B K"], batch: Batch, target: str = "label"
) -> Float[Array, " B"]:
    """−log softmax(outputs)[label], in nats.

    Args:
      outputs: logits.
      batch: `batch[target]` holds int[B] class numbers in [0, K) or float[B, K] probabilities.
      target: the entry that holds the targets.

    >>> softmax_cross_entropy(jnp.zeros((1, 4)), {"label": jnp.array([2])}).round(4)
    Array([1.3863], dtype=float32)
    """
    logits, labels = _at_least_float32(outputs), batch[target]
    if jnp.issubdtype(labels.dtype, jnp.integer):
        _check_classes(logits, target, labels)
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    _same_shape("outputs", logits, target, labels)
    return optax.softmax_cross_entropy(logits, _at_least_float32(labels))


def sigmoid_cross_entropy(
    outputs: Float[Array, "B ..."], batch: Batch, target: str = "label"
) -> Float[Array, " B"]:
    """−Σ [t log σ(o) + (1 − t) log(1 − σ(o))] over an example's elements, in nats.

    Args:
      outputs: logits.
      batch: `batch[target]` holds probabilities in [0, 1], shaped as `outputs`.
      target: the entry that holds the targets.

    >>> sigmoid_cross_entropy(jnp.zeros((1, 2)), {"label": jnp.array([[0.0, 1.0]])}).round(4)
    Array([1.3863], dtype=float32)
    """
    logits, targets = _at_least_float32(outputs), _at_least_float32(batch[target])
    _same_shape("outputs", logits, target, targets)
    # Rather than optax's log-sigmoids, one softplus: −t·o + log(1 + exp(o)).
    return _per_example(jax.nn.softplus(logits) - targets * logits)


def squared_error(
    outputs: Float[Array, "B ..."], batch: Batch, target: str = "label"
) -> Float[Array, " B"]:
    """½ Σ (o − t)² over an example's elements: half, so that its Hessian is the identity.

    Args:
      outputs: predictions.
      batch: `batch[target]` holds the targets, shaped as `outputs`.
      target: the entry that holds the targets.

    >>> squared_error(jnp.ones((1, 2)), {"label": jnp.array([[0.0, 3.0]])}).tolist()
    [2.5]
    """
    predictions, targets = _at_least_float32(outputs), _at_least_float32(batch[target])
    _same_shape("outputs", predictions, target, targets)
    return _per_example(0.5 * jnp.square(predictions - targets))


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(tree.accumulator(x.dtype))


def _per_example(x: jax.Array) -> jax.Array:
    return jnp.sum(x.reshape(x.shape[0], -1), axis=1)


def _same_shape(name: str, a: jax.Array, other: str, b: jax.Array) -> None:
    hint = "Class numbers must be of an integer type." if b.ndim == 1 < a.ndim else ""
    check.argument(
        a.shape == b.shape, name, f"of the shape of batch[{other!r}], {b.shape}", a.shape, hint
    )


def _check_classes(logits: Array, target: str, labels: Array | np.ndarray) -> None:
    check.argument(
        logits.ndim == 2,
        "outputs",
        "of shape [B, K], one number per class",
        logits.shape,
        "A dense model must flatten its images: image.reshape(len(image), -1).",
    )
    check.argument(
        labels.shape == logits.shape[:1],
        f"batch[{target!r}]",
        f"of shape {logits.shape[:1]}, one class number per example",
        labels.shape,
    )
