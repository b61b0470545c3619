"""Preconditioners of Hessian-free optimization's conjugate gradients.

A preconditioner updates its state each step and returns an approximate inverse of the damped
curvature: `step(...) -> (state, inverse)`, `inverse(vector) ≈ (B + λI)⁻¹ vector`, symmetric and
positive definite. The better the approximation, the faster CG converges.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.types import Key, Params, PyTree
from jdl.optim.context import UpdateContext

Inverse = Callable[[PyTree], PyTree]


class Preconditioner(NamedTuple):
    """An argument of `hessian_free(preconditioner=...)`.

    Attributes:
      init: params -> state, a pytree of arrays.
      step: `step(state, ctx, product, damping, count, key, active) -> (state, inverse)` with
        `ctx` the update's context, `product` v -> B v, λ, the number of updates so far, a random
        key, and whether value and gradient can be used.
      gradients: a step's cost in gradients of the curvature batch.
      products: its cost in curvature products, where there is no objective.
    """

    init: Callable[[Params], PyTree]
    step: Callable[..., tuple[PyTree, Inverse]]
    gradients: float = 0.0
    products: float = 0.0


def diagonal(power: float = 0.75, decay: float = 0.95) -> Preconditioner:
    """M = (diag + λ)^power.

    The diagonal is the empirical Fisher's where there is an objective, else the Hessian's by
    Hutchinson's estimate. One random sample per step enters a running mean.

    Args:
      power: in (0, 1].
      decay: decay of the running mean, in [0, 1).

    References:
      Martens, Deep learning via Hessian-free optimization (2010), section 4.7.
      Chapelle & Erhan, Improved preconditioner for Hessian free optimization (2011).
    """
    check.in_range("power", power, 0.0, 1.0, open_low=True)
    check.in_range("decay", decay, 0.0, 1.0, open_high=True)

    def init(params: Params) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params)

    def step(
        state: PyTree,
        ctx: UpdateContext,
        product: Callable[[PyTree], PyTree],
        damping: jax.Array,
        count: jax.Array,
        key: Key,
        active: jax.Array,
    ) -> tuple[PyTree, Inverse]:
        drawn = _draw(ctx, product, key)
        kept = jnp.asarray(decay, jnp.float32)
        mixed = tree.add_scaled(tree.scale(kept, state), 1.0 - kept, drawn)
        state = tree.where(active & tree.all_finite(drawn), mixed, state)
        mean = tree.scale(1.0 / (1.0 - kept ** (count + 1).astype(jnp.float32)), state)
        # λ may be zero: a floor far below the mean keeps M positive.
        total = sum(jnp.sum(d.astype(jnp.float32)) for d in jax.tree.leaves(mean))
        floor = damping.astype(jnp.float32) + 1e-6 * total / tree.size(mean) + 1e-30

        def inverse(d: jax.Array) -> jax.Array:
            return (jnp.maximum(d, 0.0) + floor.astype(d.dtype)) ** -power

        inverses = jax.tree.map(inverse, mean)
        return state, lambda r: jax.tree.map(jnp.multiply, inverses, r)

    return Preconditioner(init, step, gradients=1.0, products=1.0)


def _draw(ctx: UpdateContext, product: Callable[[PyTree], PyTree], key: Key) -> PyTree:
    """One random draw of the curvature's diagonal."""
    if ctx.objective is not None:
        return ctx.objective.empirical_fisher_diagonal(ctx.params, key)
    leaves, structure = jax.tree.flatten(ctx.params)
    keys = jax.random.split(key, len(leaves))
    signs = jax.tree.unflatten(
        structure,
        [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
    )
    return jax.tree.map(lambda s, p: jnp.abs(s * p), signs, product(signs))
