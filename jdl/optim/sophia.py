r"""The curvature's diagonal for optax's Sophia, from whatever its update is given.

Gauss-Newton-Bartlett (Liu et al. 2023), of an objective whose loss has outputs to draw from:

    ĥ = s ⊙ s / Σᵢ mᵢ,      s = Σᵢ √mᵢ Jᵢᵀ uᵢ,      E[uᵢ uᵢᵀ] = ∇²ℓᵢ

with random signs of the output Hessian's root for uᵢ (`output_hessian`), where the paper has the
gradient at a label drawn from the outputs, which has the same second moment. Hutchinson's, of any
other objective or function, with random signs r:

    ĥ = r ⊙ ∇²f r
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdl.core.types import Params, PyTree
from jdl.optim.context import UpdateContext, gather, hessian_product
from jdl.optim.kronecker import moments
from jdl.optim.kronecker.layers import Layers

_logger = logging.getLogger(__name__)


def curvature_diagonal(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """An unbiased random estimate ĥ, for `optax.contrib.sophia(hessian_diagonal_fn=…)`.

    An `objective` gives Gauss-Newton-Bartlett's, without the regularizer, unless its loss is
    computed in the model or couples more than 64 outputs in another way than a softmax's; then,
    and for a bare `obj_fn` or `value_fn`, it is Hutchinson's. The log says which.

    Args:
      seed: of the draws; each update has its own.

    Raises:
      ArgumentError: at `update`, without any of the three.

    >>> estimate = curvature_diagonal()
    >>> state = estimate.init(jnp.zeros(2))
    >>> f = lambda x: x[0] ** 2 + 3 * x[1] ** 2
    >>> [x.tolist() for x in estimate.update(jnp.zeros(2), state, jnp.ones(2), obj_fn=f)]
    [[2.0, 6.0], 1]

    References:
      Liu et al., Sophia: a scalable stochastic second-order optimizer for language model
      pre-training (2023), section 2.3.
    """

    def init(params: Params) -> jax.Array:
        del params
        return jnp.zeros((), jnp.int32)  # how many draws so far

    def update(
        updates: PyTree, state: jax.Array, params: Params | None = None, **extras: Any
    ) -> tuple[PyTree, jax.Array]:
        value_fn = extras.get("value_fn") or extras.get("obj_fn")
        given = {"value": 0.0, "grad": updates, **extras, "value_fn": value_fn}
        ctx = gather("sophia", updates, params, **given)
        key, route = jax.random.fold_in(jax.random.key(seed), state), _route(ctx)
        _logger.info("sophia: %s", f"Gauss-Newton-Bartlett, {route}" if route else "Hutchinson")
        found = _bartlett(ctx, key) if route else _hutchinson(ctx, key)
        return jax.tree.map(lambda h, p: h.astype(p.dtype), found, params), state + 1

    return optax.GradientTransformationExtraArgs(init, update)


def _route(ctx: UpdateContext) -> str:
    """The way to draw u, or nothing."""
    if ctx.objective is None or not getattr(ctx.objective.loss, "of_outputs", True):
        return ""
    route = moments.find_route(ctx.objective, ctx.params)
    return "" if route == "gradient" or ": gradient" in route else route


def _bartlett(ctx: UpdateContext, key: jax.Array) -> PyTree:
    objective = ctx.needed_objective("Gauss-Newton-Bartlett's estimate")
    leaves, structure = jax.tree.flatten(ctx.params)
    alone = Layers({}, dict.fromkeys(range(len(leaves)), "its diagonal is asked for"))
    _, squares = moments.second_moments(objective, ctx.params, alone, {}, {}, key)
    return jax.tree.unflatten(structure, [squares[i] for i in range(len(leaves))])


def _hutchinson(ctx: UpdateContext, key: jax.Array) -> PyTree:
    product = hessian_product(ctx)
    if ctx.objective is not None:
        product = functools.partial(ctx.objective.hvp, ctx.params)
    signs = optax.tree.random_like(key, ctx.params, jax.random.rademacher)
    return jax.tree.map(jnp.multiply, signs, product(signs))
