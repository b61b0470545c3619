"""Schedules of the learning rate that end with a trial's budget, of whatever kind it is.

The factor on the rate is a scalar in the optimizer's state. The trial sets it by the share of the
budget that is spent, constant over each hundredth of the budget, or over each step if there are
fewer of them:

    factor = f((⌊n · share⌋ + ½) / n),   n = 100 or the number of steps
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree

DECAY = 0.2  # of the budget, at the end of "wsd"
SCHEDULES = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "wsd": lambda t: min(1.0, (1.0 - t) / DECAY),
}
PIECES = 100
# Their line searches choose the length of the step whatever the rate, so the step itself is scaled.
BY_STEP = ("lbfgs", "bfgs", "ssbroyden", "cg")


def checked(schedule: str, warmup: float) -> None:
    """Raises unless there is such a schedule, with a warm-up of at most half of the budget."""
    check.one_of("schedule", schedule, SCHEDULES)
    check.in_range("warmup", warmup, 0.0, 0.5)


def factor(schedule: str, warmup: float, share: float) -> float:
    """The factor on the learning rate.

    Linear from 0 over the share `warmup` of the budget; then "constant"; "linear" or "cosine" to 0
    at the end; or "wsd", constant until the last fifth of the budget and linear to 0.

    Args:
      schedule: one of `SCHEDULES`.
      warmup: in [0, 0.5].
      share: of the budget that is spent, in [0, 1].

    >>> [round(factor("cosine", 0.1, x), 3) for x in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]

    References:
      Loshchilov & Hutter, SGDR (2017), section 3: the cosine.
      Hu et al., MiniCPM (2024), section 4: warm-up, stable, decay.
    """
    if share < warmup:
        return share / warmup
    start = 0.0 if schedule == "wsd" else warmup
    return float(SCHEDULES[schedule]((share - start) / (1.0 - start)))


class ScheduledState(NamedTuple):
    """The state of `scheduled`.

    Attributes:
      schedule_factor: float32, to be set with `optax.tree.set`.
      inner: the optimizer's.
    """

    schedule_factor: jax.Array
    inner: Any


def scheduled(
    optimizer: optax.GradientTransformation, *, by_rate: bool
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with a factor on its steps in its state, 1 at first.

    Args:
      optimizer: any.
      by_rate: whether to scale the `learning_rate` in its state, so that a model's ratio ρ and an
        averaging of its own know of it; else its updates are scaled.

    >>> half = scheduled(optax.sgd(1.0), by_rate=False)
    >>> state = optax.tree.set(half.init(jnp.zeros(1)), schedule_factor=jnp.array(0.5))
    >>> half.update(jnp.ones(1), state)[0].tolist()
    [-0.5]
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> ScheduledState:
        return ScheduledState(jnp.ones((), jnp.float32), inner.init(params))

    def update(
        grads: Any, state: ScheduledState, params: Any = None, **extra: Any
    ) -> tuple[Any, ScheduledState]:
        by = state.schedule_factor
        if not by_rate:
            updates, after = inner.update(grads, state.inner, params, **extra)
            return tree.scale(by, updates), ScheduledState(by, after)
        rate = optax.tree.get(state.inner, "learning_rate")
        before = optax.tree.set(state.inner, learning_rate=rate * by.astype(rate.dtype))
        updates, after = inner.update(grads, before, params, **extra)
        return updates, ScheduledState(by, optax.tree.set(after, learning_rate=rate))

    return optax.GradientTransformationExtraArgs(init, update)
