"""The learning-rate range test: losses at rates that grow step by step."""

import math
from typing import NamedTuple

import jax
import numpy as np
import optax

from jdl.core import check
from jdl.train.estimator import Estimator
from jdl.train.feed import Data
from jdl.train.run import learning_rate_of


class RangeTest(NamedTuple):
    """Losses at growing learning rates.

    Attributes:
      rates: learning rates tried, ascending.
      losses: the loss at each.
      suggestion: a tenth of the rate at which the loss was lowest.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float


def learning_rate_range_test(
    estimator: Estimator, data: Data, *, low: float = 1e-6, high: float = 1.0, steps: int = 100
) -> RangeTest:
    """Trains a copy at rates growing geometrically from `low` to `high` until the loss blows up.

    The Estimator itself stays as it is.

    Args:
      estimator: one whose optimizer keeps `learning_rate` in its state: any made by name, or
        wrapped in `optax.inject_hyperparams`.
      data: what it is to be trained on.
      low: the first rate, > 0.
      high: the last, > low.
      steps: how many rates.

    >>> import jdl
    >>> line = jdl.from_fns(lambda key, x: jax.numpy.zeros((2, 1)), lambda w, x: x @ w)
    >>> data = jdl.data.from_arrays(np.eye(2, dtype="f"), np.ones((2, 1), "f"), batch_size=2)
    >>> estimator = jdl.Estimator(line, jdl.losses.squared_error, "sgd")
    >>> found = learning_rate_range_test(estimator, data, low=1e-3, high=10.0, steps=20)
    >>> 0.01 < found.suggestion < 1.0
    True

    References:
      Smith, Cyclical learning rates for training neural networks (2017), section 3.3.
    """
    check.in_range("low", low, 0.0, open_low=True)
    check.argument(high > low, "high", f"above low={low}", high)
    check.positive_int("steps", steps)
    estimator.initialize(data)
    step, state, batches = estimator.scratch(data)
    rate = learning_rate_of(state)
    check.argument(
        rate is not None,
        "estimator",
        "one whose optimizer has learning_rate in its state",
        type(state.opt_state).__name__,
        "Take the optimizer by name with a number, or wrap it in optax.inject_hyperparams.",
    )
    rates: list[float] = []
    losses: list[float] = []
    for wanted in np.geomspace(low, high, steps):
        opt_state = optax.tree.set(
            state.opt_state,
            learning_rate=jax.device_put(np.asarray(wanted, rate.dtype), rate.sharding),
        )
        batch = next(batches, None)
        if batch is None:
            raise check.DataError(
                f"The data ends after {len(rates)} batches; the test takes {steps}. Give data that "
                "repeats, or fewer steps."
            )
        state, logs = step(state._replace(opt_state=opt_state), batch)
        loss = float(logs["loss"])
        if not math.isfinite(loss) or (losses and loss > 4.0 * min(losses)):
            break
        rates.append(float(wanted))
        losses.append(loss)
    if not losses:
        raise check.TrainingError(f"The loss is not finite at learning rate {low} already.")
    return RangeTest(rates, losses, rates[int(np.argmin(losses))] / 10)
