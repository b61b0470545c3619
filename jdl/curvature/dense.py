"""Exact Hessian and Jacobian of small models, in chunks that bound the memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.curvature.landscape import Landscape, params_of


def hessian(
    of: Landscape | Objective | Callable[[Params], Any],
    params: Params | None = None,
    *,
    chunk_size: int = 64,
    max_parameters: int = 10_000,
) -> np.ndarray:
    """∇²f, [n, n], its rows and columns in `ravel_pytree`'s order.

    Takes n² numbers and the activations of `chunk_size` products.

    Args:
      of: a `Landscape`, which brings its parameters, a `jdl.Objective`, or a scalar function.
      params: a pytree of floating-point arrays.
      chunk_size: columns computed at once, ≥ 1.
      max_parameters: n at most: 10,000 take 400 MB in float32.

    >>> hessian(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0])).tolist()
    [[4.0, 2.0], [2.0, 0.0]]
    """
    check.positive_int("chunk_size", chunk_size)
    params = params_of(of, params)
    flat, _ = ravel_pytree(params)
    _check_size(flat.size, max_parameters)
    size = min(chunk_size, flat.size)
    if isinstance(of, Landscape):
        found: Any = of._mean(lambda objective: _of_objective(objective, params, size))
    elif isinstance(of, Objective):
        found = _of_objective(of, params, size)
    else:
        found = _of_function(of, params, size)
    matrix = np.asarray(found)
    return 0.5 * (matrix + matrix.T)


# The parameters are an argument of both: constants would be folded, at length.
@functools.partial(jax.jit, static_argnames="size")
def _of_objective(objective: Objective, params: Params, size: int) -> jax.Array:
    return _columns(lambda v: objective.hvp(params, v), params, size)


def _of_function(fun: Callable[[Params], Any], params: Params, size: int) -> jax.Array:
    @jax.jit  # anew each time: what `fun` closes over may change
    def of_function(params: Params) -> jax.Array:
        def product(v: PyTree) -> PyTree:
            with jax.default_matmul_precision("highest"):
                return jax.jvp(jax.grad(fun), (params,), (v,))[1]

        return _columns(product, params, size)

    return of_function(params)


def _columns(product: Callable[[Params], PyTree], params: Params, size: int) -> jax.Array:
    """The products with all unit vectors, `size` at once."""
    flat, unravel = ravel_pytree(params)

    def column(i: jax.Array) -> jax.Array:
        return ravel_pytree(product(unravel(jnp.zeros_like(flat).at[i].set(1.0))))[0]

    return jax.lax.map(column, jnp.arange(flat.size), batch_size=size)


def jacobian(
    fn: Callable[[Params], PyTree],
    params: Params,
    *,
    chunk_size: int = 64,
    max_parameters: int = 1_000_000,
) -> np.ndarray:
    """∂fn/∂θ, [m, n], by rows or by columns, whichever are fewer.

    Args:
      fn: params -> a pytree of m numbers, a model's outputs on a batch, say.
      params: a pytree of n numbers.
      chunk_size: rows or columns computed at once, ≥ 1.
      max_parameters: n at most.

    >>> jacobian(lambda x: jnp.stack([x[0] * x[1], x[1]]), jnp.array([2.0, 3.0])).tolist()
    [[3.0, 2.0], [0.0, 1.0]]
    """
    check.positive_int("chunk_size", chunk_size)
    flat, unravel = ravel_pytree(params)
    _check_size(flat.size, max_parameters)

    @jax.jit
    def rows(flat: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            out, pull = jax.vjp(lambda x: ravel_pytree(fn(unravel(x)))[0], flat)
            one = lambda i: pull(jnp.zeros_like(out).at[i].set(1.0))[0]  # noqa: E731
            return jax.lax.map(one, jnp.arange(out.size), batch_size=min(chunk_size, out.size))

    @jax.jit
    def columns(flat: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            _, push = jax.linearize(lambda x: ravel_pytree(fn(unravel(x)))[0], flat)
            one = lambda i: push(jnp.zeros_like(flat).at[i].set(1.0))  # noqa: E731
            return jax.lax.map(one, jnp.arange(flat.size), batch_size=min(chunk_size, flat.size))

    outputs = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(jax.eval_shape(fn, params)))
    return np.asarray(rows(flat)) if outputs <= flat.size else np.asarray(columns(flat)).T


def _check_size(size: int, most: int) -> None:
    hint = "Use top_eigenpairs or spectral_density, which need products only."
    check.argument(size <= most, "params", f"at most {most} numbers", size, hint)
