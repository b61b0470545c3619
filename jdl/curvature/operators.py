"""A curvature matrix as something that multiplies vectors: v -> H v, G v or F v."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.curvature.landscape import KINDS, Landscape, _product, params_of


class Operator(NamedTuple):
    """A symmetric matrix of which only products are known.

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
    of: Landscape | Objective | Callable[[Params], Any],
    params: Params | None = None,
    kind: str = "hessian",
) -> Operator:
    """The curvature of `of` at `params`.

    Args:
      of: a `Landscape`, which brings its own parameters; a `jdl.Objective`, one batch's; or a
        scalar function of the parameters, for the Hessian only.
      params: a pytree of floating-point arrays.
      kind: "hessian"; "gauss_newton", Jᵀ ∇²ℓ J, positive where the loss is convex in the outputs;
        "empirical_fisher", Σ gᵢ gᵢᵀ / B of the examples' gradients.

    >>> op = operator(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
    >>> op.product(np.ones(2, np.float32)).tolist()
    [6.0, 12.0]
    """
    check.one_of("kind", kind, KINDS)
    params = params_of(of, params)
    if isinstance(of, Landscape):
        land = of
        return Operator(lambda v: land.product(kind, v), land.size, land.flat.dtype, land.unravel)
    flat, unravel = ravel_pytree(params)
    if isinstance(of, Objective):
        objective, one = of, _product(kind)
        of_objective = lambda v: one(objective, params, unravel(jnp.asarray(v, flat.dtype)))  # noqa: E731
        return Operator(
            lambda v: np.asarray(of_objective(v)), flat.size, np.dtype(flat.dtype), unravel
        )
    check.argument(callable(of), "of", "a Landscape, a jdl.Objective or a function", of)
    check.argument(
        kind == "hessian", "kind", "'hessian' for a plain function", kind, "Use a jdl.Objective."
    )
    fun = of

    @jax.jit  # the parameters are an argument: constants would be folded, at length
    def hvp(flat: jax.Array, v: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jax.jvp(jax.grad(lambda x: fun(unravel(x))), (flat,), (v,))[1]

    return Operator(
        lambda v: np.asarray(hvp(flat, jnp.asarray(v, flat.dtype))),
        flat.size,
        np.dtype(flat.dtype),
        unravel,
    )
