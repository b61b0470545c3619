r"""An exponential moving average of the parameters, kept beside any optimizer's state.

    θ̄ₜ = dₜ θ̄ₜ₋₁ + (1 − dₜ) θₜ        dₜ = min(d, (1 + t) / (10 + t))

The smaller decay at first lets the average leave the initial parameters behind.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check
from jdl.core.types import Params, PyTree


class AveragingState(NamedTuple):
    """The optimizer's own state, and the average."""

    inner: Any
    average: Params
    updates: jax.Array  # int32, how many so far


def averaging(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, with an average of the parameters in its state.

    Args:
      optimizer: any optax transformation.
      decay: d, in (0, 1).

    >>> optimizer = averaging(optax.sgd(1.0), decay=0.9)
    >>> state = optimizer.init(jnp.zeros(()))
    >>> _, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
    >>> round(float(average(state)), 3)  # d₁ = 2/11 of 0, and the rest of −1
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

        new_params = optax.apply_updates(params, updates)
        return updates, AveragingState(
            inner, jax.tree.map(averaged, state.average, new_params), count
        )

    return optax.GradientTransformationExtraArgs(init, update)


def average(opt_state: Any) -> Params:
    """The average in the state of an optimizer made by `averaging`."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, AveragingState))
    return next(x.average for x in found if isinstance(x, AveragingState))
