"""A curvature matrix M, known by its products v -> M v."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.derivatives import hvp
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.curvature.landscape import METHODS, Landscape, batch_product, params_of


class Operator(NamedTuple):
    """A symmetric matrix, known by its products.

    Attributes:
      product: [n] -> [n], NumPy arrays.
      size: n.
      dtype: the vectors' type.
      unravel: [n] -> a pytree like the parameters.
    """

    product: Callable[[np.ndarray], np.ndarray]
    size: int
    dtype: Any
    unravel: Callable[[Any], PyTree]


def operator(
    of: Landscape | Objective | Callable[[Params], jax.Array],
    params: Params | None = None,
    kind: str = "hessian",
) -> Operator:
    """The curvature of `of` at `params`.

    Args:
      of: a `Landscape`, which has its own parameters; a `jdl.Objective`, for one batch; or a
        scalar function of the parameters, for the Hessian only.
      params: a pytree of floating-point arrays.
      kind: "hessian"; "gauss_newton", Jᵀ ∇²ℓ J, positive semi-definite where the loss is convex in
        the outputs; "empirical_fisher", Σ gᵢ gᵢᵀ / B of the examples' gradients.

    >>> op = operator(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
    >>> op.product(np.ones(2, np.float32)).tolist()
    [6.0, 12.0]
    """
    check.one_of("kind", kind, METHODS)
    params = params_of(of, params)
    flat, unravel = ravel_pytree(params)
    product: Callable[[Any], Any]
    if isinstance(of, Landscape):
        product = functools.partial(of.product, kind)
    elif isinstance(of, Objective):
        objective, of_batch = of, batch_product(kind)
        product = lambda v: of_batch(objective, params, unravel(v))  # noqa: E731
    else:
        check.argument(callable(of), "of", "a Landscape, a jdl.Objective or a function", of)
        ok = kind == "hessian"
        check.argument(ok, "kind", "'hessian' for a function", kind, "Use a jdl.Objective.")
        # The parameters are an argument: XLA would take long to fold constants.
        of_function = jax.jit(functools.partial(hvp, of))
        product = lambda v: ravel_pytree(of_function(params, unravel(v)))[0]  # noqa: E731
    dtype = np.dtype(flat.dtype)
    return Operator(lambda v: np.asarray(product(jnp.asarray(v, dtype))), flat.size, dtype, unravel)
