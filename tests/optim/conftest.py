"""Functions to minimize, and the bare optax loop that everything here is driven by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from jdl.optim.diagnostics import Diagnostics, read


class Run(NamedTuple):
    params: Any
    state: Any
    values: list[float]  # f before each step
    norms: list[float]  # ‖∇f‖ before each step

    @property
    def diagnostics(self) -> Diagnostics:
        found = read(self.state)
        assert found is not None
        return found


@pytest.fixture(scope="session")
def minimize() -> Callable[..., Run]:
    """Runs a transformation to ‖∇f‖ ≤ tolerance, passing value, grad and value_fn alone."""

    def run(
        optimizer: Any,
        f: Any,
        params: Any,
        *,
        steps: int = 100,
        tolerance: float = -1.0,
        **extra: Any,
    ) -> Run:
        @jax.jit
        def step(params: Any, state: Any) -> Any:
            value, grad = jax.value_and_grad(f)(params)
            with jax.numpy_dtype_promotion("standard"):  # optax itself is not strict
                updates, state = optimizer.update(
                    grad, state, params, value=value, grad=grad, value_fn=f, **extra
                )
                params = optax.apply_updates(params, updates)
            return params, state, value, optax.tree.norm(grad)

        state = optimizer.init(params)
        values, norms = [], []
        for _ in range(steps):
            new, new_state, value, norm = step(params, state)
            values.append(float(value))
            norms.append(float(norm))
            if norms[-1] <= tolerance:
                break
            params, state = new, new_state
        return Run(params, state, values, norms)

    return run


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100.0 * jnp.square(x[1::2] - jnp.square(x[::2])) + jnp.square(1.0 - x[::2]))
