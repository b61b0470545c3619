"""Losses: `loss(outputs, batch) -> float[B]`, one value per example.

Gauss-Newton products need one that is convex in the outputs, or that has an attribute `fisher`. The
target is an entry of the batch, `label` by default: `functools.partial(squared_error,
target="image")` is an autoencoder's loss. Sums are computed in at least float32. A loss that has a
gradient but no meaningful value says why in an attribute `gradient_only`, a text.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jdl.core import check, tree
from jdl.core.types import Batch


def softmax_cross_entropy(
    outputs: Float[Array, "B ... K"],
    batch: Batch,
    target: str = "label",
    *,
    ignore: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, " B"]:
    """−log softmax(outputs)[label], in nats; of a sequence, the mean over its counted positions.

    With `batch["mask"]` set to the numbers of counted positions, the objective is the mean over all
    the batch's positions. An example without any has loss 0.

    A label outside [0, K) that is not `ignore` makes its example's loss NaN; outside of `jit` it
    raises, of examples that the mask counts.

    Args:
      outputs: logits.
      batch: `batch[target]` holds int[B, ...] class numbers in [0, K) or float[B, ..., K]
        probabilities.
      target: the entry that holds the targets.
      ignore: the class number of positions that do not count, such as −1.
      label_smoothing: α in [0, 1]: targets become (1 − α) target + α / K.
      z_loss: z ≥ 0 of a further term z (log Σ exp(outputs))², which keeps logits near 0.

    >>> softmax_cross_entropy(jnp.zeros((1, 4)), {"label": jnp.array([2])}).round(4)
    Array([1.3863], dtype=float32)
    """
    logits, labels = _at_least_float32(outputs), batch[target]
    check.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check.in_range("z_loss", z_loss, 0.0)
    counted = None
    if jnp.issubdtype(labels.dtype, jnp.integer):
        _check_classes(logits, target, labels, ignore, batch.get("mask"))
        labels = jnp.asarray(labels)
        labels = labels if labels.dtype.itemsize == 8 else labels.astype(jnp.int32)
        if ignore is not None:
            counted = labels != ignore
            logits = jnp.where(counted[..., None], logits, 0.0)  # else NaN has a gradient there
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        if label_smoothing:
            picked = (1.0 - label_smoothing) * picked + label_smoothing * jnp.mean(log_p, axis=-1)
        each = jnp.where((labels >= 0) & (labels < logits.shape[-1]), -picked, jnp.nan)
    else:
        check.values(f"batch[{target!r}]", labels, -0.01, 1.01, "probabilities, in [0, 1]")
        check.argument(ignore is None, "ignore", "None with probabilities as targets", ignore)
        _same_shape("outputs", logits, target, labels)
        smoothed = optax.smooth_labels(_at_least_float32(labels), label_smoothing)
        each = optax.softmax_cross_entropy(logits, smoothed)
    if z_loss:
        each += z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    if counted is None:
        return _per_example(each) / max(math.prod(each.shape[1:]), 1)
    counts = jnp.maximum(_per_example(counted.astype(each.dtype)), 1.0)
    return _per_example(jnp.where(counted, each, 0.0)) / counts


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
    check.values(f"batch[{target!r}]", batch[target], -0.01, 1.01, "probabilities, in [0, 1]")
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


def gaussian_nll(
    outputs: Mapping[str, Float[Array, "B ..."]], batch: Batch, target: str = "label"
) -> Float[Array, " B"]:
    """−log N(t; mean, exp(log_variance)), summed over an example's elements, in nats.

    It is not convex in the outputs, so Gauss-Newton products and Kronecker factors take the Fisher
    matrix, diag(1 / variance, ½), instead of its Hessian. They find it as the Hessian of
    `gaussian_nll.fisher`, a loss of the same value and gradient. A loss of your own that calls this
    one needs an attribute `fisher`, too: the same function with `gaussian_nll.fisher`.

    Args:
      outputs: {"mean": …, "log_variance": …}, both shaped as the targets.
      batch: `batch[target]` holds the targets.
      target: the entry that holds the targets.

    >>> outputs = {"mean": jnp.zeros((1, 2)), "log_variance": jnp.zeros((1, 2))}
    >>> gaussian_nll(outputs, {"label": jnp.array([[0.0, 1.0]])}).round(4)
    Array([2.3379], dtype=float32)
    """
    return _per_example(_gaussian(*_gaussian_args(outputs, batch, target)))


def _gaussian_fisher(outputs: Any, batch: Batch, target: str = "label") -> jax.Array:
    mean, log_variance, targets = _gaussian_args(outputs, batch, target)
    at = jax.lax.stop_gradient((mean, log_variance))
    move = mean - at[0], log_variance - at[1]  # 0, with a derivative
    value, slope = jax.jvp(lambda m, s: _gaussian(m, s, targets), at, move)
    curvature = jnp.square(move[0]) * jnp.exp(-at[1]) + 0.5 * jnp.square(move[1])
    return _per_example(value + slope + 0.5 * curvature)


cast(Any, gaussian_nll).fisher = _gaussian_fisher


def _gaussian_args(outputs: Any, batch: Batch, target: str) -> tuple[jax.Array, ...]:
    targets = _at_least_float32(batch[target])
    found = [_at_least_float32(outputs[name]) for name in ("mean", "log_variance")]
    for name, x in zip(("mean", "log_variance"), found, strict=True):
        _same_shape(f"outputs[{name!r}]", x, target, targets)
    return (*found, targets)


def _gaussian(mean: jax.Array, log_variance: jax.Array, targets: jax.Array) -> jax.Array:
    error = jnp.square(targets - mean) * jnp.exp(-log_variance)
    return 0.5 * (error + log_variance + math.log(2.0 * math.pi))


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(tree.accumulator(x.dtype))


def _per_example(x: jax.Array) -> jax.Array:
    return jnp.sum(x.reshape(x.shape[0], -1), axis=1)


def _same_shape(name: str, a: jax.Array, other: str, b: jax.Array) -> None:
    hint = "Class numbers must be of an integer type." if b.ndim == 1 < a.ndim else ""
    ok = a.shape == b.shape
    check.argument(ok, name, f"of the shape of batch[{other!r}], {b.shape}", a.shape, hint)


def _check_classes(
    logits: Array, target: str, labels: Array | np.ndarray, ignore: int | None, mask: Any
) -> None:
    ok = logits.ndim == 2 or logits.ndim > 2 <= labels.ndim
    must = "of shape [B, K], one number per class"
    hint = "A dense model must flatten its images: image.reshape(len(image), -1)."
    check.argument(ok, "outputs", must, logits.shape, hint)
    ok = labels.shape == logits.shape[:-1]
    must = f"of shape {logits.shape[:-1]}, a class number each"
    check.argument(ok, f"batch[{target!r}]", must, labels.shape)
    if check.known(labels, mask):
        found, classes = np.asarray(labels), logits.shape[-1]
        found = found if mask is None else found[np.asarray(mask) > 0]
        strays = found[((found < 0) | (found >= classes)) & (found != ignore)]
        ok = strays.size == 0
        must = f"class numbers in [0, {classes})"
        hint = "Positions without a class are left out by ignore=NUMBER."
        check.argument(ok, f"batch[{target!r}]", must, strays[:1].tolist(), hint)
