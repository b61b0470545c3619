"""Metrics: `metric(outputs, batch) -> float[B]`, one value per example.

Training and evaluation average them over examples exactly; a smaller last batch counts less.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdl.core import check
from jdl.core.types import Batch

_M = TypeVar("_M", bound=Callable[..., Any])


def direction(best: str | Mapping[str, str]) -> Callable[[_M], _M]:
    """Declares, as a decorator, whether a metric's largest or smallest value is best.

    A run records it for `jdl runs`, which shows the best value; of a metric without a direction it
    shows the last. The loss is best at its smallest.

    Args:
      best: "max" or "min"; for a function that returns several metrics, a dict of them by name.

    >>> @direction("max")
    ... def margin(outputs, batch):
    ...     return outputs[:, 0] - outputs[:, 1]
    >>> margin.direction
    'max'
    """
    for value in [best] if isinstance(best, str) else best.values():
        check.one_of("best", value, ("max", "min"))

    def declared(metric: _M) -> _M:
        cast(Any, metric).direction = best
        return metric

    return declared


@direction("max")
def accuracy(
    outputs: Float[Array, "B ... K"],
    batch: Batch,
    target: str = "label",
    *,
    ignore: int | None = None,
) -> Float[Array, " B"]:
    """1 where the largest output is the labelled class, else 0; of a sequence, the mean.

    It is NaN for an example with a label outside the K classes, and for one whose positions are all
    ignored: give that one `batch["mask"]` 0.

    Args:
      outputs: one number per class.
      batch: `batch[target]` holds int[B, ...] class numbers or float[B, ..., K] probabilities.
      target: the entry that holds the labels.
      ignore: the class number of positions that do not count, such as −1.

    >>> accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), {"label": jnp.array([1, 1])}).tolist()
    [1.0, 0.0]
    """
    classes = _classes(outputs, batch[target])
    return _share(jnp.argmax(outputs, axis=-1) == classes, outputs, classes, ignore)


def top_k_accuracy(k: int) -> Callable[..., Float[Array, " B"]]:
    """As `accuracy`, for the labelled class among the `k` largest outputs.

    >>> outputs = jnp.array([[0.1, 0.3, 0.6]])
    >>> top_k_accuracy(2)(outputs, {"label": jnp.array([1])}).tolist()
    [1.0]
    """
    check.positive_int("k", k)

    @direction("max")
    def metric(
        outputs: jax.Array, batch: Batch, target: str = "label", *, ignore: int | None = None
    ) -> jax.Array:
        largest = jax.lax.top_k(outputs, min(k, outputs.shape[-1]))[1]
        classes = _classes(outputs, batch[target])
        hit = jnp.any(largest == classes[..., None].astype(largest.dtype), axis=-1)
        return _share(hit, outputs, classes, ignore)

    return metric


@direction("min")
def sum_squared_error(
    outputs: Float[Array, "B ..."], batch: Batch, target: str = "label"
) -> Float[Array, " B"]:
    """Σ (o − t)² over an example's elements.

    Args:
      outputs: predictions.
      batch: `batch[target]` holds the targets, shaped as `outputs`.
      target: the entry that holds the targets.

    >>> sum_squared_error(jnp.ones((1, 2)), {"label": jnp.array([[0.0, 3.0]])}).tolist()
    [5.0]
    """
    targets = batch[target]
    must = f"of the shape of batch[{target!r}], {targets.shape}"
    check.argument(outputs.shape == targets.shape, "outputs", must, outputs.shape)
    difference = outputs.astype(jnp.float32) - targets.astype(jnp.float32)
    return jnp.sum(jnp.square(difference).reshape(difference.shape[0], -1), axis=1)


def confusion_matrix(
    outputs: Float[Array, "B ... K"], batch: Batch, target: str = "label"
) -> Float[Array, "K K"]:
    """How many of the batch's labels of each class (rows) were predicted as each (columns).

    It is a sum over examples, for `Estimator.evaluate(data, sums=…)`, not a metric. It applies
    `batch["mask"]` and leaves out labels outside the K classes.

    Args:
      outputs: one number per class.
      batch: `batch[target]` holds int[B, ...] class numbers or float[B, ..., K] probabilities.
      target: the entry that holds the labels.

    >>> outputs = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    >>> confusion_matrix(outputs, {"label": jnp.array([1, 1, 0])}).tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    labels, classes = _classes(outputs, batch[target]), outputs.shape[-1]
    weights = batch.get("mask", jnp.ones(labels.shape[0])).astype(jnp.float32)
    # A negative index would count from the end; one beyond it is dropped.
    rows = jnp.where(labels < 0, classes, labels.astype(jnp.int32))
    weights = jnp.broadcast_to(weights.reshape(-1, *[1] * (labels.ndim - 1)), labels.shape)
    counts = jnp.zeros((classes, classes), jnp.float32)
    return counts.at[rows, jnp.argmax(outputs, axis=-1)].add(weights, mode="drop")


def _classes(outputs: Any, labels: Any) -> Any:
    """Class numbers [B, ...]; of probabilities, shaped as outputs, the largest's."""
    found = jnp.argmax(labels, axis=-1) if labels.shape == outputs.shape else labels
    must = f"class numbers of shape {outputs.shape[:-1]}, or shaped as the outputs"
    check.argument(found.shape == outputs.shape[:-1], "labels", must, labels.shape)
    whole = jnp.issubdtype(found.dtype, jnp.integer) and found.dtype.itemsize < 4
    return found.astype(jnp.int32) if whole else found


def _share(hits: jax.Array, outputs: jax.Array, classes: Any, ignore: int | None) -> jax.Array:
    """The mean of `hits` over each example's counted positions."""
    hit = jnp.where(
        (classes >= 0) & (classes < outputs.shape[-1]), hits.astype(jnp.float32), jnp.nan
    )
    counted = jnp.ones_like(hits) if ignore is None else classes != ignore
    return jnp.mean(hit.reshape(len(hit), -1), axis=1, where=counted.reshape(len(hit), -1))


class ClassScores(NamedTuple):
    """Scores of each class, float64[K]; NaN where the denominator is 0.

    Attributes:
      examples: how many are of the class.
      precision: correct / predicted as the class.
      recall: correct / of the class.
      f1: the harmonic mean of the two.
    """

    examples: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Precision, recall and F1 of each class, from a confusion matrix [K, K].

    >>> class_scores(np.array([[3, 1], [0, 4]])).recall.tolist()
    [0.75, 1.0]
    """
    confusion = np.asarray(confusion, np.float64)
    right, of, taken = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ClassScores(of, right / taken, right / of, 2 * right / (of + taken))
