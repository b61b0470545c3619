"""The curvature's diagonal for optax's Sophia, from whatever its update is given."""

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
    r"""An unbiased random estimate ĥ, for `optax.contrib.sophia(hessian_diagonal_fn=…)`.

    Of an `objective` it is Gauss-Newton-Bartlett's, without the regularizer:

        ĥ = s ⊙ s / Σᵢ mᵢ,      s = Σᵢ √mᵢ Jᵢᵀ uᵢ,      E[uᵢ uᵢᵀ] = ∇²ℓᵢ

    The paper has the loss's gradient at a label drawn from the outputs for uᵢ; these are random
    signs of the root of ∇²ℓᵢ, of the same second moment. Of a bare `obj_fn` or `value_fn`, and of a
    loss that is computed in the model or couples more than 64 outputs in another way than a
    softmax's, it is Hutchinson's ĥ = r ⊙ ∇²f r, with random signs r. The log says which.

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

    def update(
        updates: PyTree, state: jax.Array, params: Params | None = None, **extras: Any
    ) -> tuple[PyTree, jax.Array]:
        value_fn = extras.get("value_fn") or extras.get("obj_fn")
        given = {"value": 0.0, "grad": updates, **extras, "value_fn": value_fn}
        ctx = gather("sophia", updates, params, **given)
        found = _drawn(ctx, jax.random.fold_in(jax.random.key(seed), state))
        return jax.tree.map(lambda h, p: h.astype(p.dtype), found, params), state + 1

    # The state is the number of draws.
    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def _drawn(ctx: UpdateContext, key: jax.Array) -> PyTree:
    objective, product, route = ctx.objective, hessian_product(ctx), "gradient"
    if objective is not None:
        product = functools.partial(objective.hvp, ctx.params)
        if getattr(objective.loss, "of_outputs", True):
            route = moments.find_route(objective, ctx.params)
    if objective is None or route == "gradient" or ": gradient" in route:
        _logger.info("sophia: Hutchinson")
        signs = optax.tree.random_like(key, ctx.params, jax.random.rademacher)
        return jax.tree.map(jnp.multiply, signs, product(signs))
    _logger.info("sophia: Gauss-Newton-Bartlett, %s", route)
    leaves, structure = jax.tree.flatten(ctx.params)
    alone = Layers({}, dict.fromkeys(range(len(leaves)), "its diagonal is asked for"))
    _, squares = moments.second_moments(objective, ctx.params, alone, {}, {}, key)
    return jax.tree.unflatten(structure, [squares[i] for i in range(len(leaves))])
