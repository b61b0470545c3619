"""The loop that tests of optimizers with an objective run."""

import functools

import jax
import optax


@functools.lru_cache(maxsize=16)
def stepping(optimizer):
    """One update, compiled once for each optimizer and all objectives of one program."""

    @jax.jit
    def step(params, state, objective):
        value, grad, _ = objective.value_and_grad(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, objective=objective
        )
        return optax.apply_updates(params, updates), state, value

    return step


def run(optimizer, objective, params, steps):
    """(parameters, state, the loss before each step) after so many steps."""
    step, state, values = stepping(optimizer), optimizer.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, objective)
        values.append(float(value))
    return params, state, values
