"""Exact Hessian and Jacobian of small models, in chunks that bound the memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.derivatives import hvp, linearize
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.curvature.landscape import Landscape, params_of


def hessian(
    of: Landscape | Objective | Callable[[Params], jax.Array],
    params: Params | None = None,
    *,
    chunk_size: int = 64,
    max_parameters: int = 10_000,
) -> np.ndarray:
    """∇²f, [n, n], its rows and columns in `ravel_pytree`'s order.

    Takes n² numbers and the activations of `chunk_size` products.

    Args:
      of: a `Landscape`, which has its own parameters, a `jdl.Objective`, or a scalar function.
      params: a pytree of floating-point arrays.
      chunk_size: columns computed at once, ≥ 1.
      max_parameters: the largest n allowed: 10,000 take 400 MB in float32.

    >>> hessian(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0])).tolist()
    [[4.0, 2.0], [2.0, 0.0]]
    """
    check.positive_int("chunk_size", chunk_size)
    params = params_of(of, params)
    _check_size(ravel_pytree(params)[0].size, max_parameters)
    found: Any
    if isinstance(of, Landscape):
        found = of.mean(lambda objective: _of_objective(objective, params, chunk_size))
    elif isinstance(of, Objective):
        found = _of_objective(of, params, chunk_size)
    else:  # compiled anew each time: what the function closes over may change
        found = jax.jit(lambda p: _columns(functools.partial(hvp, of, p), p, chunk_size))(params)
    matrix = np.asarray(found)
    return 0.5 * (matrix + matrix.T)


@functools.partial(jax.jit, static_argnames="chunk_size")
def _of_objective(objective: Objective, params: Params, chunk_size: int) -> jax.Array:
    return _columns(lambda v: objective.hvp(params, v), params, chunk_size)


def _columns(product: Callable[[Params], PyTree], params: Params, chunk_size: int) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    return _on_unit_vectors(lambda v: ravel_pytree(product(unravel(v)))[0], flat, chunk_size)


def _on_unit_vectors(
    linear: Callable[[jax.Array], jax.Array], like: jax.Array, chunk_size: int
) -> jax.Array:
    """A linear function of all unit vectors shaped as `like`, `chunk_size` at once."""
    one = lambda i: linear(jnp.zeros_like(like).at[i].set(1.0))  # noqa: E731
    return jax.lax.map(one, jnp.arange(like.size), batch_size=min(chunk_size, like.size))


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
      max_parameters: the largest n allowed.

    >>> jacobian(lambda x: jnp.stack([x[0] * x[1], x[1]]), jnp.array([2.0, 3.0])).tolist()
    [[3.0, 2.0], [0.0, 1.0]]
    """
    check.positive_int("chunk_size", chunk_size)
    flat, unravel = ravel_pytree(params)
    _check_size(flat.size, max_parameters)
    flat_fn = lambda x: ravel_pytree(fn(unravel(x)))[0]  # noqa: E731

    @jax.jit
    def rows(flat: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            out, pull = jax.vjp(flat_fn, flat)
            return _on_unit_vectors(lambda v: pull(v)[0], out, chunk_size)

    @jax.jit
    def columns(flat: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return _on_unit_vectors(linearize(flat_fn, flat)[1], flat, chunk_size)

    outputs = jax.eval_shape(flat_fn, flat).size
    return np.asarray(rows(flat)) if outputs <= flat.size else np.asarray(columns(flat)).T


def _check_size(size: int, most: int) -> None:
    hint = "Use top_eigenpairs or spectral_density, which need products only."
    check.argument(size <= most, "params", f"at most {most} numbers", size, hint)
