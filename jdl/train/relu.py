"""Which ReLU units of a model are dead: found in its traced program, whatever it was written in."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jdl.core.model import Model

_CALLS = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "checkpoint"}


def dead_shares(model: Model, params: Any, state: Any, *inputs: Any) -> list[jax.Array]:
    """The share of units, by ReLU, that are 0 for every example.

    Args:
      model: its `apply` is traced in evaluation mode.
      params: its parameters.
      state: its state.
      *inputs: what it is given, leading axis B.

    >>> from jdl.core.model import from_fns
    >>> model = from_fns(lambda key, x: (), lambda _, x: jax.nn.relu(x))
    >>> [float(s) for s in dead_shares(model, (), {}, jnp.array([[1.0, -1.0], [2.0, 0.0]]))]
    [0.5]
    """

    def forward(params: Any, state: Any, *inputs: Any) -> Any:
        return model.apply(params, state, *inputs, key=None, train=False)[0]

    closed = jax.make_jaxpr(forward)(params, state, *inputs)
    found: list[jax.Array] = []
    _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves((params, state, *inputs)), found)
    alive = [jnp.any(x > 0, axis=tuple(range(x.ndim - 1))) for x in found]
    return [1.0 - jnp.mean(x.astype(jnp.float32)) for x in alive]


def _evaluate(jaxpr: Any, consts: Any, arguments: Any, found: list[jax.Array]) -> list[Any]:
    """Runs a program equation by equation, keeping what its ReLUs give."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, jex.Literal) else values[x]

    for equation in jaxpr.eqns:
        taken = [read(x) for x in equation.invars]
        body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in _CALLS and body is not None:
            inner, own = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
            given = _evaluate(inner, own, taken, found)
        else:
            out = _bind(equation, taken)
            given = list(out) if equation.primitive.multiple_results else [out]
            if equation.primitive.name == "max" and any(map(_is_zero, equation.invars)):
                found.append(given[0])
        values |= dict(zip(equation.outvars, given, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _bind(equation: Any, taken: list[Any]) -> Any:
    """What the equation gives for these operands."""
    options = equation.primitive.get_bind_params(equation.params)
    if isinstance(options, tuple):  # in older releases of JAX, with the functions it calls
        functions, options = options
        return equation.primitive.bind(*functions, *taken, **options)
    return equation.primitive.bind(*taken, **options)


def _is_zero(x: Any) -> bool:
    return isinstance(x, jex.Literal) and bool(jnp.ndim(x.val) == 0 and x.val == 0)
