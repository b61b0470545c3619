"""Kronecker factors as the preconditioner of Hessian-free optimization's conjugate gradients."""

from typing import Any

import jax

from jdl.core import check
from jdl.core.types import Key
from jdl.optim.context import UpdateContext
from jdl.optim.kronecker import factors
from jdl.optim.kronecker.factors import Kronecker, Options
from jdl.optim.kronecker.inverses import mesh_of
from jdl.optim.kronecker.moments import CURVATURES, find_layers
from jdl.optim.kronecker.probes import SHARING
from jdl.optim.preconditioner import Inverse, Preconditioner


def preconditioner(
    curvature: str = "fisher",
    decay: float = 0.9,
    max_size: int = 2048,
    every: int = 1,
    sharing: str = "expand",
) -> Preconditioner:
    """Kronecker factors for conjugate gradients: `hessian_free(preconditioner="kronecker")`.

    A refresh takes one gradient of the curvature batch and the inverses for that step's λ; between
    refreshes the older inverses are used.

    Args:
      curvature: as for `kfac`.
      decay: decay of the factors' running mean, in [0, 1).
      max_size: a side with more coordinates has a diagonal factor, ≥ 1.
      every: steps from one refresh to the next, ≥ 1.
      sharing: as for `kfac`.
    """
    check.one_of("curvature", curvature, CURVATURES)
    check.in_range("decay", decay, 0.0, 1.0, open_high=True)
    check.positive_int("max_size", max_size)
    check.positive_int("every", every)
    check.one_of("sharing", sharing, SHARING)
    options = Options(curvature, sharing, decay, max_size=max_size)

    def step(
        state: Kronecker,
        ctx: UpdateContext,
        product: Any,
        damping: jax.Array,
        count: jax.Array,
        key: Key,
        active: jax.Array,
    ) -> tuple[Kronecker, Inverse]:
        del product
        objective = ctx.needed_objective("the layers' inputs and output gradients")
        found = find_layers(objective, ctx.params)

        state = factors.fitting(state, ctx.params, found, options)

        def refreshed(state: Kronecker) -> Kronecker:
            state = factors.refresh_moments(objective, ctx.params, found, state, key, options)
            mesh = mesh_of(jax.tree.leaves(ctx.params)[0])
            return factors.refresh_inverses(
                found, state, damping, axis_name=objective.axis_name, mesh=mesh
            )[0]

        due = active & ((count % every == 0) | ~state.started)
        state = jax.lax.cond(due, refreshed, lambda state: state, state)
        return state, lambda vector: factors.apply(found, state, vector, damping)

    return Preconditioner(lambda params: factors.init(params, options), step, 1.0 / every)
