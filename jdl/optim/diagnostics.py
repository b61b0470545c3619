"""Diagnostics of second-order optimizers, under the same names in all of them.

A state has its `Diagnostics` in the field `diagnostics`; `read` finds it however deep optax has
nested that state. Work is counted in evaluations of the full batch, so that optimizers can be
compared: see `COSTS`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.optim.result import ResultCode

Number = jax.Array | float | int

# Nominal costs in units of one gradient of the full batch. A gradient is a forward and a backward
# pass, the latter worth about two of the former. A Gauss-Newton product pushes a tangent forward
# and pulls a cotangent back along a linearization that a CG loop computes only once; a Hessian
# product differentiates both passes.
COSTS = {
    "values": 1 / 3,
    "gradients": 1.0,
    "hessian_products": 2.0,
    "gauss_newton_products": 4 / 3,
}


class Diagnostics(NamedTuple):
    """Scalars in every second-order optimizer's state; counts are cumulative.

    The value and gradient passed to each update count as one gradient, unless `reused=True`; a
    value computed with a gradient is free.

    Attributes:
      iterations: updates made, int32.
      evaluations: evaluations of the objective, with or without its gradient, int32.
      gradient_equivalents: Σ count × nominal cost of `COSTS`, plus `factor_work`, float32.
      step_size: the factor on the last direction; 0 where the update took no step.
      last_damping: λ of the last step, also `damping`; 0 for methods without.
      reduction_ratio: ρ, actual over predicted reduction of the last step; NaN where unknown.
      linear_iterations: iterations of the inner linear solver, int32.
      termination: how the last update ended, a `ResultCode`, int32.
      values: evaluations of the value alone.
      gradients: evaluations of the gradient.
      hessian_products: Hessian-vector products, in units of the full batch.
      gauss_newton_products: Gauss-Newton products, in units of the full batch.
      factor_work: multiplications on Kronecker factors (K-FAC's and SOAP's moments, inverses or
        bases, and products) and in Muon's Newton-Schulz steps, per those of a gradient of the full
        batch; 0 for methods without. SOAP and Muon count it where `update` is given `objective`.
      left_out: K-FAC's estimates of a parameter's curvature that were not finite and did not enter
        its factors, and inverses likewise, int32; 0 for methods without.
    """

    iterations: jax.Array
    evaluations: jax.Array
    gradient_equivalents: jax.Array
    step_size: jax.Array
    last_damping: jax.Array  # `optax.tree.get(state, "damping")` is the state's own
    reduction_ratio: jax.Array
    linear_iterations: jax.Array
    termination: jax.Array
    values: jax.Array
    gradients: jax.Array
    hessian_products: jax.Array
    gauss_newton_products: jax.Array
    factor_work: jax.Array
    left_out: jax.Array

    @property
    def damping(self) -> jax.Array:
        """λ of the last step."""
        return self.last_damping


def init(damping: Number = 0.0) -> Diagnostics:
    """The diagnostics of a state before its first update."""
    counts = ("iterations", "evaluations", "linear_iterations", "termination", "left_out")
    first = {"last_damping": damping, "reduction_ratio": jnp.nan}

    def leaf(name: str) -> jax.Array:
        # A new array each: a state whose fields share a buffer cannot be donated.
        return jnp.array(first.get(name, 0), jnp.int32 if name in counts else jnp.float32)

    return Diagnostics(*map(leaf, Diagnostics._fields))


def advance(
    last: Diagnostics,
    *,
    step_size: Number,
    termination: Number,
    linear_iterations: Number = 0,
    damping: Number = 0.0,
    reduction_ratio: Number = jnp.nan,
    reused: jax.Array | bool = False,
    left_out: Number = 0,
    **work: Number,
) -> Diagnostics:
    """The diagnostics after one more update.

    Args:
      last: the diagnostics before it.
      step_size: the factor on the direction.
      termination: a `ResultCode`.
      linear_iterations: iterations of the inner solver.
      damping: λ used.
      reduction_ratio: ρ of the step.
      reused: whether the gradient passed in cost nothing, since the last update computed it.
      left_out: estimates left out in all updates so far.
      **work: the update's own evaluations, in units of the full batch, by the names of `COSTS`
        (`gradients` besides the one passed in), and `factor_work`.

    >>> after = advance(init(), step_size=1.0, termination=1, values=3, gradients=1)
    >>> float(after.gradient_equivalents), int(after.evaluations)
    (3.0, 5)
    """
    for name in work:
        check.one_of("work", name, [*COSTS, "factor_work"])

    def number(x: Number) -> jax.Array:
        return jnp.asarray(x, jnp.float32)

    counts = {name: getattr(last, name) + number(work.get(name, 0)) for name in COSTS}
    counts["gradients"] += 1.0 - number(reused)
    factor_work = last.factor_work + number(work.get("factor_work", 0))
    total = sum((count * COSTS[name] for name, count in counts.items()), start=factor_work)
    return Diagnostics(
        iterations=last.iterations + 1,
        evaluations=(counts["values"] + counts["gradients"]).astype(jnp.int32),
        gradient_equivalents=total,
        step_size=number(step_size),
        last_damping=number(damping),
        reduction_ratio=number(reduction_ratio),
        linear_iterations=last.linear_iterations + jnp.asarray(linear_iterations, jnp.int32),
        termination=jnp.asarray(termination, jnp.int32),
        factor_work=factor_work,
        left_out=jnp.asarray(left_out, jnp.int32),
        **counts,
    )


def ending(
    code: Number, finite: jax.Array, stationary: jax.Array, descends: jax.Array
) -> jax.Array:
    """The `ResultCode` of an update whose line search ended with `code`.

    Args:
      code: how the line search ended.
      finite: whether value and gradient are.
      stationary: whether the gradient is zero.
      descends: whether the direction is one of descent; if not, −gradient replaced it.
    """
    code = jnp.asarray(code, jnp.int32)
    replaced = (code == ResultCode.ACCEPTED) & ~descends
    code = jnp.where(replaced, ResultCode.STEEPEST_DESCENT, code)
    code = jnp.where(stationary, ResultCode.STATIONARY, code)
    return jnp.where(finite, code, ResultCode.NOT_FINITE).astype(jnp.int32)


def read(opt_state: Any) -> Diagnostics | None:
    """The first `Diagnostics` in an optimizer state, or None.

    Args:
      opt_state: any optax state.

    >>> import optax
    >>> read(optax.sgd(0.1).init(jnp.zeros(2))) is None
    True
    >>> int(read((optax.EmptyState(), {"inner": (init(),)})).iterations)
    0
    """
    found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Diagnostics))
    return next((x for x in found if isinstance(x, Diagnostics)), None)
