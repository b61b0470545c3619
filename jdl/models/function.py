"""A plain function as a Linen module, with the parameters of the modules that it builds."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jdl.core.model import bytes_refused


class Function(nn.Module):
    """`function(*args)`, which may use Linen modules, and parameters made by `param`.

    Attributes:
      function: called with the module's arguments.

    >>> import jax.numpy as jnp
    >>> def line(x):
    ...     return nn.Dense(1)(x) + param("shift", nn.initializers.ones, (1, 1))
    >>> variables = Function(line).init(jax.random.key(0), jnp.ones((2, 3)))
    >>> sorted(variables["params"])
    ['Dense_0', 'shift']
    """

    function: Callable[..., Any]

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        """The function's return value."""
        with bytes_refused():
            return self.function(*args)


class _Parameter(nn.Module):
    init_fn: Callable[..., jax.Array]
    args: tuple[Any, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("value", self.init_fn, *self.args)


def param(name: str, init: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """A parameter of the function that calls this, inside `Function` or another Linen module.

    Args:
      name: unique within the function.
      init: `init(key, *args) -> array`, such as one of `jax.nn.initializers`.
      *args: its further arguments, such as the shape.

    >>> import jax.numpy as jnp
    >>> scaled = Function(lambda x: x * param("scale", nn.initializers.ones, (1,)))
    >>> scaled.init(jax.random.key(0), jnp.ones(3))["params"]
    {'scale': {'value': Array([1.], dtype=float32)}}
    """
    return _Parameter(init, args, name=name)()
