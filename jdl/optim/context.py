"""The objective of one update, as seen from the current parameters.

Whatever a caller hands to `update`, a full `jdl.Objective` or three bare extras, the algorithms see
one `UpdateContext`; what is missing or of the wrong kind is refused here, once, by name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim.masking import Part, restricted

ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]


class UpdateContext(NamedTuple):
    """The objective around the current parameters; all scalars have one type, at least float32.

    Attributes:
      params: θ, where the update starts.
      value: f(θ).
      grad: ∇f(θ), raw, whatever a chain did to the updates.
      value_fn: params -> value.
      value_and_grad: params -> (value, gradient).
      noise: how much f may vary around θ for rounding alone.
      finite: whether value and gradient are.
      stationary: whether the gradient is zero.
      objective: the one handed over, as a function of θ; None without.
      fill: θ -> all parameters, where optax.masked or optax.partition let through a part.
    """

    params: Params
    value: jax.Array
    grad: Params
    value_fn: Callable[[Params], jax.Array]
    value_and_grad: Callable[[Params], tuple[jax.Array, Params]]
    noise: jax.Array
    finite: jax.Array
    stationary: jax.Array
    objective: Objective | None
    fill: Callable[[Params], Params]

    @property
    def active(self) -> jax.Array:
        """Whether there is a step to look for."""
        return self.finite & ~self.stationary

    def needed_objective(self, purpose: str, hint: str = "") -> Objective:
        """The objective; raises where the caller gave none."""
        check.argument(
            self.objective is not None,
            "objective",
            f"given, for {purpose}",
            None,
            f"Pass objective=jdl.Objective.from_fns(predict, loss, batch){hint}.",
        )
        assert self.objective is not None
        return self.objective


def gather(
    optimizer: str,
    updates: PyTree,
    params: Params | None,
    *,
    value: Any = None,
    grad: PyTree | None = None,
    value_fn: Callable[..., Any] | None = None,
    value_and_grad_fn: Callable[[Params], Any] | None = None,
    objective: Objective | None = None,
    whole_params: Params | None = None,
    **others: Any,
) -> UpdateContext:
    """Gathers an update's extra arguments.

    Args:
      optimizer: the name to use in errors.
      updates: the incoming updates, of the gradient's structure.
      params: the current parameters.
      value: f(params), a scalar.
      grad: ∇f(params).
      value_fn: params -> value or (value, anything); called with the parameters alone.
      value_and_grad_fn: params -> (value, gradient, …), where the gradient is not autodiff's.
      objective: a `jdl.Objective`, or None; stands in for a missing `value_fn`.
      whole_params: all parameters, where `params` is the part of them that optax.masked or
        optax.partition let through; the others then stay where they are.
      **others: extra arguments of other transformations; left alone.

    Raises:
      ArgumentError: if an argument is missing or does not fit the parameters.
    """
    del others
    if value_fn is None and objective is not None:
        value_fn = objective.value
    needed = {"params": params, "value": value, "grad": grad, "value_fn": value_fn}
    missing = [name for name, given in needed.items() if given is None]
    if missing:
        raise check.ArgumentError(
            f"{optimizer}'s update needs {', '.join(f'`{name}`' for name in missing)}. Call it as "
            "update(grads, state, params, value=value, grad=grads, value_fn=value_fn)."
        )
    structure: Any = jax.tree.structure(params)
    assert value_fn is not None  # among `needed`
    part = None
    if jax.tree.structure(grad) != structure and whole_params is not None:
        part = Part(params, whole_params)
        grad, value_fn = part.of(grad), part.function(value_fn)
        objective = None if objective is None else restricted(objective, part)
        check.argument(
            value_and_grad_fn is None,
            "value_and_grad_fn",
            "left out where optax.masked or optax.partition pass part of the parameters",
            value_and_grad_fn,
        )
    for name, given in (("updates", updates), ("grad", grad)):
        check.argument(
            jax.tree.structure(given) == structure,
            name,
            f"a pytree of the structure of params, {structure}",
            jax.tree.structure(given),
            f"Inside optax.masked or optax.partition, which hand {optimizer} part of the "
            "parameters, call update(..., whole_params=params) to say where the others are.",
        )
    dtype = scalar_dtype(params)

    def scalar(out: Any) -> jax.Array:
        out = out[0] if isinstance(out, tuple) else out
        return jnp.asarray(out).astype(dtype)

    fn, both = value_fn, value_and_grad_fn
    if both is None and objective is not None:
        both = objective.value_and_grad

    def plain_value(p: Params) -> jax.Array:
        return scalar(fn(p))

    def value_and_grad(p: Params) -> tuple[jax.Array, Params]:
        if both is None:
            return jax.value_and_grad(plain_value)(p)
        v, g, *_ = both(p)
        return scalar(v), g

    value = scalar(value)
    return UpdateContext(
        params=params,
        value=value,
        grad=grad,
        value_fn=plain_value,
        value_and_grad=value_and_grad,
        noise=noise_floor(value, params),
        finite=jnp.isfinite(value) & tree.all_finite(grad),
        stationary=tree.vdot(grad, grad) == 0,
        objective=objective,
        fill=(lambda p: p) if part is None else part.filled,
    )


def noise_floor(value: jax.Array, params: Params) -> jax.Array:
    """How far two evaluations of f near `value` may differ by rounding alone.

    A mean over a batch loses some ten units in the last place of the arithmetic it is made in; in
    16-bit arithmetic, where the sum itself is float32, the examples' errors average out.
    """
    coarsest = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
    units = 10.0 if coarsest < 1e-5 else 0.1
    return jnp.asarray(units * coarsest, value.dtype) * jnp.abs(value)


def descending(direction: PyTree, here: UpdateContext) -> tuple[PyTree, jax.Array]:
    """The direction, or −∇f if it is not finite or does not descend; and whether it does."""
    slope = tree.vdot(direction, here.grad)
    norms = tree.norm(direction) * tree.norm(here.grad)
    descends = (-slope > jnp.finfo(slope.dtype).eps * norms) & tree.all_finite(direction)
    return tree.where(descends, direction, tree.scale(-1.0, here.grad)), descends


def scalar_dtype(params: Params) -> Any:
    """The type of an update's scalars: at least float32, and no narrower than any leaf."""
    return jnp.dtype(tree.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params))))


def check_params(optimizer: str, params: Params) -> None:
    """Refuses parameters that have no real-valued gradient, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    check.argument(bool(leaves), "params", "a pytree with at least one array", params)
    for path, leaf in leaves:
        dtype = jnp.asarray(leaf).dtype
        check.argument(
            jnp.issubdtype(dtype, jnp.floating),
            f"params{jax.tree_util.keystr(path)}",
            "an array of floating-point numbers",
            str(dtype),
            f"{optimizer} moves real parameters only; keep others out of `params`.",
        )


def schedule_value(scalar_or_schedule: ScalarOrSchedule, count: Any) -> jax.Array:
    """What a constant or a schedule is worth at an update, float32."""
    if not callable(scalar_or_schedule):
        return jnp.array(scalar_or_schedule, jnp.float32)
    # Schedules, optax's among them, mix Python floats with the integer count.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.array(scalar_or_schedule(count), jnp.float32)


def current_rate(learning_rate: ScalarOrSchedule, state: Any) -> jax.Array:
    """The learning rate of the update at hand: the schedule's, or without one the state's."""
    if callable(learning_rate):
        return schedule_value(learning_rate, state.diagnostics.iterations)
    rate: jax.Array = state.learning_rate
    return rate


def check_scale(name: str, value: Any) -> None:
    """Refuses a scale that is a number but not a positive one; schedules and arrays pass."""
    if isinstance(value, int | float):
        check.in_range(name, value, 0.0, open_low=True)


def hessian_product(here: UpdateContext) -> Callable[[PyTree], PyTree]:
    """V -> ∇²f(θ) v, forward over reverse, at the highest matmul precision.

    On accelerators whose default multiplies in fewer bits, CG would lose conjugacy.
    """

    def product(vector: PyTree) -> PyTree:
        gradient = lambda params: here.value_and_grad(params)[1]  # noqa: E731
        with jax.default_matmul_precision("highest"):
            return jax.jvp(gradient, (here.params,), (vector,))[1]

    return product
