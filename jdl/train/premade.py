"""Premade Estimators: small functions that choose the loss and the metrics."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jdl import losses, metrics
from jdl.core import check
from jdl.core.model import ModelLike
from jdl.core.types import Batch, Outputs
from jdl.models.autoencoder import Reconstruction, as_reconstruction
from jdl.train.estimator import Estimator


def classifier(
    model: ModelLike,
    optimizer: str | optax.GradientTransformation = "adam",
    *,
    target: str = "label",
    ignore: int | None = None,
    **options: Any,
) -> Estimator:
    """An Estimator that learns integer labels: softmax cross-entropy, accuracy.

    Args:
      model: gives logits [B, ..., K]; a `jdl.Model` or a Linen module such as `jdl.models.CNN()`.
      optimizer: any optax transformation, or a name.
      target: the entry that holds the labels.
      ignore: the class number of positions that do not count, such as −1.
      **options: as for `Estimator`.

    Example:
      >>> import jdl
      >>> net = jdl.models.MLP(widths=(32,))
      >>> data = jdl.data.digits(batch_size=64, epochs=None, shuffle=True)
      >>> estimator = jdl.classifier(net, "adam").train(data, steps=300)
      >>> estimator.evaluate(jdl.data.digits("test", batch_size=64))["accuracy"] > 0.85
      True
    """
    which: Any = {"target": target, "ignore": ignore}
    accuracy = metrics.direction("max")(functools.partial(metrics.accuracy, **which))
    options = {"metrics": {"accuracy": accuracy}} | options
    loss = functools.partial(losses.softmax_cross_entropy, **which)
    return Estimator(model, loss, optimizer, **options)


def autoencoder(
    model: ModelLike,
    optimizer: str | optax.GradientTransformation = "adam",
    *,
    loss: str = "sigmoid_cross_entropy",
    **options: Any,
) -> Estimator:
    """An Estimator that learns to reproduce its input.

    Logs the squared error, summed over an example's elements, in the papers' measure.

    Args:
      model: gives reconstructions of the shape of its input, or a
        `jdl.models.autoencoder.Reconstruction`, whose penalty joins the loss.
      optimizer: any optax transformation, or a name.
      loss: "sigmoid_cross_entropy" for pixels in [0, 1], the model giving logits, or
        "squared_error".
      **options: as for `Estimator`; `inputs` names the one entry to reproduce.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jdl import from_fns
      >>> from jdl.data import from_arrays
      >>> mean = from_fns(lambda key, x: jnp.zeros((1, 2)), lambda p, x: p + 0.0 * x)
      >>> data = from_arrays(np.array([[0.0, 1.0], [2.0, 1.0]], np.float32), batch_size=2)
      >>> estimator = autoencoder(mean, "lbfgs", loss="squared_error").train(data, steps=5)
      >>> estimator.evaluate(data)
      {'loss': 0.5, 'squared_error': 1.0}
    """
    target = options.get("inputs", "image")
    check.argument(isinstance(target, str), "inputs", "the name of one entry", target)
    functions = {
        "sigmoid_cross_entropy": (losses.sigmoid_cross_entropy, jax.nn.sigmoid),
        "squared_error": (losses.squared_error, lambda outputs: outputs),
    }
    loss_fn, link = functions[check.one_of("loss", loss, functions)]
    to_input: Callable[..., Any] = functools.partial(loss_fn, target=target)

    def penalized(outputs: Outputs, batch: Batch) -> jax.Array:
        plain = not isinstance(outputs, Reconstruction)
        return to_input(outputs, batch) if plain else to_input(outputs[0], batch) + outputs.penalty

    @metrics.direction("min")
    def squared_error(outputs: Outputs, batch: Batch) -> jax.Array:
        seen = as_reconstruction(outputs).outputs
        return metrics.sum_squared_error(link(seen), batch, target=target)

    options = {"metrics": {"squared_error": squared_error}} | options
    return Estimator(model, penalized, optimizer, **options)
