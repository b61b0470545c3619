"""Schedules of the learning rate that end with a number of steps, or with a trial's budget.

The factor on the rate is a scalar in the optimizer's state. `over_steps` counts the steps itself.
A trial of `jdl.compare`, whose budget may be of another kind, sets it by the share of the budget
that is spent, constant over each hundredth of it, or over each step if there are fewer:

    factor = f((⌊n · share⌋ + ½) / n),   n = 100 or the number of steps
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl.core import check, tree

DECAY = 0.2  # of the budget, at the end of "wsd"
SCHEDULES = {  # of the share of the time, and NumPy or jax.numpy
    "constant": lambda t, xp: 1.0,
    "linear": lambda t, xp: 1.0 - t,
    "cosine": lambda t, xp: 0.5 * (1.0 + xp.cos(xp.pi * t)),
    "wsd": lambda t, xp: xp.minimum(1.0, (1.0 - t) / DECAY),
}
PIECES = 100
# Their line searches choose the length of the step whatever the rate, so the step itself is scaled.
BY_STEP = ("lbfgs", "bfgs", "ssbroyden", "cg")


def checked(schedule: str, warmup: float, decay_to: float = 0.0) -> None:
    """Raises unless there is such a schedule, with a warm-up of at most half of the budget."""
    check.in_range("decay_to", decay_to, 0.0, 1.0)
    check.one_of("schedule", schedule, SCHEDULES)
    check.in_range("warmup", warmup, 0.0, 0.5)


def factor(schedule: str, warmup: float, share: Any, decay_to: float = 0.0, xp: Any = np) -> Any:
    """The factor on the learning rate.

    Linear from 0 over the share `warmup` of the budget; then "constant"; "linear" or "cosine" to
    `decay_to` at the end; or "wsd", constant until the last fifth of the budget and then linear.

    Args:
      schedule: one of `SCHEDULES`.
      warmup: in [0, 0.5].
      share: of the budget that is spent, in [0, 1].
      decay_to: the factor at the end, in [0, 1].
      xp: `numpy`, or `jax.numpy` for a `share` inside `jit`.

    >>> [round(float(factor("cosine", 0.1, x)), 3) for x in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]

    References:
      Loshchilov & Hutter, SGDR (2017), section 3: the cosine.
      Hu et al., MiniCPM (2024), section 4: warm-up, stable, decay.
    """
    start = 0.0 if schedule == "wsd" else warmup
    falling = SCHEDULES[schedule]((share - start) / (1.0 - start), xp)
    after = 1.0 if schedule == "constant" else decay_to + (1.0 - decay_to) * falling
    return xp.where(share < warmup, share / warmup, after) if warmup else after


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


class OverStepsState(NamedTuple):
    """The state of `over_steps`.

    Attributes:
      steps_done: int32.
      scheduled: of `scheduled`.
    """

    steps_done: jax.Array
    scheduled: ScheduledState


def over_steps(
    optimizer: optax.GradientTransformation,
    schedule: str,
    steps: int,
    *,
    warmup: int = 0,
    decay_to: float = 0.0,
    by_rate: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with a schedule of its learning rate, which stays in the state as given.

    Step t = 0, 1, … has the factor at t + ½, as one step in the middle of its time.

    Args:
      optimizer: any.
      schedule: one of `SCHEDULES`.
      steps: its length; the factor stays as it is at the end.
      warmup: steps over which the rate rises from 0, at most half of them.
      decay_to: the factor on the rate at the end.
      by_rate: as for `scheduled`; false for `BY_STEP`.

    >>> falling = over_steps(optax.sgd(1.0), "linear", 2, by_rate=False)
    >>> state = falling.init(jnp.zeros(1))
    >>> for _ in range(2):
    ...     updates, state = falling.update(jnp.ones(1), state)
    ...     print(updates)
    [-0.75]
    [-0.25]
    """
    check.positive_int("steps", steps)
    checked(schedule, warmup / steps, decay_to)
    inner = scheduled(optimizer, by_rate=by_rate)

    def init(params: Any) -> OverStepsState:
        return OverStepsState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        grads: Any, state: OverStepsState, params: Any = None, **extra: Any
    ) -> tuple[Any, OverStepsState]:
        share = jnp.minimum((state.steps_done.astype(jnp.float32) + 0.5) / steps, 1.0)
        by = jnp.asarray(factor(schedule, warmup / steps, share, decay_to, jnp), jnp.float32)
        now = state.scheduled._replace(schedule_factor=by)
        updates, after = inner.update(grads, now, params, **extra)
        return updates, OverStepsState(state.steps_done + 1, after)

    return optax.GradientTransformationExtraArgs(init, update)
