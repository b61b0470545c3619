r"""The weights to evaluate: an average that the optimizer's state holds, or the parameters.

    θ̄ₜ = dₜ θ̄ₜ₋₁ + (1 − dₜ) θₜ        dₜ = min(d, (1 + t) / (10 + t))

is the exponential moving average that `averaging` keeps beside any optimizer's state. The smaller
decay at first lets the average leave the initial parameters behind.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jdl.core import check
from jdl.core.types import Params, PyTree
from jdl.optim.masking import Part


class AveragingState(NamedTuple):
    """The optimizer's own state, and the average."""

    inner: Any
    average: Params
    updates: jax.Array  # int32, how many so far


def averaging(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, with an average in its state: of what `weights_of` gives without it.

    Args:
      optimizer: any optax transformation.
      decay: d, in (0, 1).

    >>> optimizer = averaging(optax.sgd(1.0), decay=0.9)
    >>> state = optimizer.init(jnp.zeros(()))
    >>> _, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
    >>> round(float(state.average), 3)  # d₁ = 2/11 of 0, and the rest of −1
    -0.818
    """
    check.in_range("ema", decay, 0.0, 1.0, open_low=True, open_high=True)
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> AveragingState:
        copy = jax.tree.map(jnp.copy, params)
        return AveragingState(wrapped.init(params), copy, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: AveragingState, params: Params | None = None, **extra: Any
    ) -> tuple[PyTree, AveragingState]:
        updates, inner = wrapped.update(updates, state.inner, params, **extra)
        count = state.updates + 1
        t = count.astype(jnp.float32)
        d = jnp.minimum(decay, (1.0 + t) / (10.0 + t))

        def averaged(old: jax.Array, new: jax.Array) -> jax.Array:
            return (d * old + (1.0 - d) * new).astype(old.dtype)

        new_params = weights_of(inner, optax.apply_updates(params, updates))
        average = jax.tree.map(averaged, state.average, new_params)
        return updates, AveragingState(inner, average, count)

    return optax.GradientTransformationExtraArgs(init, update)


def weights_of(opt_state: Any, params: Params) -> Params:
    """The weights to evaluate: `averaging`'s average, x of a schedule-free method, or `params`.

    Args:
      opt_state: any optax state, however deep one of the two is in it.
      params: the parameters that training has changed; a schedule-free method's are y.

    >>> optimizer, y = optax.contrib.schedule_free_sgd(1.0, b1=0.5), jnp.zeros(())
    >>> state = optimizer.init(y)._replace(z=jnp.ones(()))
    >>> float(weights_of(state, y))  # y = (x + z) / 2
    -1.0
    """
    kinds = (AveragingState, optax.contrib.ScheduleFreeState)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    for state in leaves:
        if isinstance(state, AveragingState):
            return state.average
    for state in leaves:  # optax.partition has one for each part
        if not isinstance(state, optax.contrib.ScheduleFreeState):
            continue
        part = Part(state.z, params)
        with jax.numpy_dtype_promotion("standard"):  # parameters may be of several types
            x = optax.contrib.schedule_free_eval_params(state, part.of(params))
        params = jax.tree.map(lambda x, y: x.astype(y.dtype), part.filled(x), params)
    return params
