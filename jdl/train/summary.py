"""A model's summary: its parameters, and the operations for one example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core.jaxpr import as_function, scans
from jdl.core.model import ModelLike, as_model
from jdl.core.types import PyTree


class ArrayInfo(NamedTuple):
    """One array of a model.

    Attributes:
      name: its path.
      shape: its shape.
      dtype: its type's name.
      size: its number of elements.
      kind: "params", or "state" for the model's state.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    kind: str


class Summary(NamedTuple):
    """The sizes of a model.

    Attributes:
      entries: its arrays.
      parameters: the number of parameters.
      bytes: their memory.
      forward_flops: floating-point operations for one example's outputs; None where the compiler
        gives none.
      gradient_flops: those of the outputs and the gradient.
    """

    entries: tuple[ArrayInfo, ...]
    parameters: int
    bytes: int
    forward_flops: float | None
    gradient_flops: float | None


def summarize(model: ModelLike, *inputs: Any) -> Summary:
    """The summary of a model; its parameters are not made.

    Args:
      model: a `jdl.Model` or a Flax Linen module.
      *inputs: its inputs: arrays, or `jax.ShapeDtypeStruct`s, with leading axis B.

    >>> import flax.linen as nn
    >>> found = summarize(nn.Dense(3), jnp.ones((8, 4)))
    >>> [(entry.name, entry.shape) for entry in found.entries]
    [('bias', (3,)), ('kernel', (4, 3))]
    >>> found.parameters, found.forward_flops  # 2·4·3 of the product, 3 of the bias
    (15, 27.0)
    """
    model = as_model(model)
    inputs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
    params, state = jax.eval_shape(model.init, jax.random.key(0), *inputs)

    def forward(params: PyTree, state: PyTree, *inputs: Any) -> PyTree:
        return model.apply(params, state, *inputs, key=None, train=False)[0]

    def gradient(params: PyTree, state: PyTree, cotangent: PyTree, *inputs: Any) -> Any:
        outputs, pullback = jax.vjp(lambda p: forward(p, state, *inputs), params)
        return outputs, pullback(cotangent)

    outputs = jax.eval_shape(forward, params, state, *inputs)
    batch_size = inputs[0].shape[0]
    counts = (
        flops(forward, params, state, *inputs),
        flops(gradient, params, state, outputs, *inputs),
    )
    one, both = (None if n is None else n / batch_size for n in counts)
    entries = tuple(
        ArrayInfo(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            tuple(x.shape),
            jnp.dtype(x.dtype).name,
            x.size,
            kind,
        )
        for kind, tree in (("params", params), ("state", state))
        for path, x in jax.tree.leaves_with_path(tree)
    )
    leaves = jax.tree.leaves(params)
    return Summary(
        entries,
        sum(x.size for x in leaves),
        sum(x.size * x.dtype.itemsize for x in leaves),
        one,
        both,
    )


def flops(function: Callable[..., Any], *args: Any) -> float | None:
    """The floating-point operations of `function(*args)`, by XLA's cost analysis.

    XLA counts the body of a loop once; here a scan's counts once for each iteration. A while loop
    still counts once.

    Args:
      function: pure.
      *args: arrays or `jax.ShapeDtypeStruct`s.

    >>> def power(x):
    ...     return jax.lax.scan(lambda y, _: (x @ y, None), x, length=10)[0]
    >>> flops(power, jnp.ones((4, 4))) >= 10 * 2 * 4**3
    True
    """
    return _flops(jax.make_jaxpr(function)(*args))


def _flops(program: Any) -> float | None:
    total = _counted_once(program)
    if total is None:
        return None
    for body, length in scans(program):
        all_of_it, once = _flops(body), _counted_once(body)
        if all_of_it is None or once is None:
            return None
        total += length * all_of_it - once
    return total


def _counted_once(program: Any) -> float | None:
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals]
    costs = jax.jit(as_function(program)).lower(*args).cost_analysis()
    return None if not costs else float(costs.get("flops", 0.0))
