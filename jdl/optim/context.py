"""The context of an optimizer's update: the objective around the current parameters.

A caller passes `update` a whole `jdl.Objective` or bare extra arguments; the algorithms read one
`UpdateContext`. Missing or unsuitable arguments are refused here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.derivatives import hvp
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim.masking import Flat, Part, restricted


class UpdateContext(NamedTuple):
    """The objective around the current parameters; all scalars have one type, at least float32."""

    # The incoming updates, used as the gradient of the quadratic model.
    updates: PyTree
    params: Params  # θ, where the update starts
    value: jax.Array  # f(θ)
    # ∇f(θ) itself, also where earlier transformations of a chain changed the updates.
    grad: Params
    value_fn: Callable[[Params], jax.Array]  # params -> value
    value_and_grad: Callable[[Params], tuple[jax.Array, Params]]  # params -> (value, gradient)
    # Params -> residuals, for least squares; None without.
    residual_fn: Callable[[Params], PyTree] | None
    noise: jax.Array  # how much f may vary around θ by rounding alone
    finite: jax.Array  # whether value and gradient are finite
    stationary: jax.Array  # whether the gradient is zero
    objective: Objective | None  # the caller's, as a function of θ; None without
    # θ -> all parameters, where optax.masked or optax.partition pass only part of them.
    fill: Callable[[Params], Params]

    @property
    def active(self) -> jax.Array:
        """Whether a step can be computed: value and gradient are finite, the gradient not zero."""
        return self.finite & ~self.stationary

    @property
    def dtype(self) -> Any:
        """The type of scalars."""
        return self.value.dtype

    def needed_objective(self, purpose: str, hint: str = "") -> Objective:
        """The objective; raises where the caller passed none."""
        check.argument(
            self.objective is not None,
            "objective",
            f"given, for {purpose}",
            None,
            f"Pass objective=jdl.Objective.from_fns(predict, loss, batch){hint}.",
        )
        assert self.objective is not None
        return self.objective

    def curvature_share(self) -> float:
        """The examples of a curvature product, per example of the batch."""
        return 1.0 if self.objective is None else self.objective.curvature_share()


def gather(
    optimizer: str,
    updates: PyTree,
    params: Params | None,
    *,
    value: Any = None,
    grad: PyTree | None = None,
    value_fn: Callable[..., Any] | None = None,
    value_and_grad_fn: Callable[[Params], Any] | None = None,
    residual_fn: Callable[[Params], PyTree] | None = None,
    objective: Objective | None = None,
    whole_params: Params | None = None,
    **others: Any,
) -> UpdateContext:
    """The context of an update, from its arguments.

    Args:
      optimizer: the name to use in errors.
      updates: the incoming updates, of the gradient's structure.
      params: the current parameters.
      value: f(params), a scalar.
      grad: ∇f(params).
      value_fn: params -> value or (value, anything); called with the parameters alone.
      value_and_grad_fn: params -> (value, gradient, …), where the gradient is not autodiff's.
      residual_fn: params -> r with f = ½ ‖r‖²; replaces a missing `value_fn`.
      objective: a `jdl.Objective`, or None; replaces a missing `value_fn`.
      whole_params: all parameters, where `params` is the part of them that optax.masked or
        optax.partition pass on; the others then keep their values.
      **others: extra arguments of other transformations; ignored.

    Raises:
      ArgumentError: if an argument is missing or does not fit the parameters.
    """
    del others
    updates, params, grad = (numbers_as_arrays(x) for x in (updates, params, grad))
    if value_fn is None and residual_fn is not None:
        value_fn = _half_square(residual_fn)
    if value_fn is None and objective is not None:
        value_fn = objective.value
    needed = {"params": params, "value": value, "grad": grad, "value_fn": value_fn}
    missing = [name for name, given in needed.items() if given is None]
    if missing:
        raise check.ArgumentError(
            f"{optimizer}'s update needs {', '.join(f'`{name}`' for name in missing)}. Call it as "
            "update(grads, state, params, value=value, grad=grads, value_fn=value_fn); "
            "`residual_fn`, for least squares, or `objective` can replace value_fn."
        )
    assert value_fn is not None  # among `needed`
    part: Part | None = None
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(grad) != structure and whole_params is None:
        part = Flat.of_gradient(params, grad)
    elif jax.tree.structure(grad) != structure:
        part = Part(params, whole_params)
    if part is not None:
        grad, value_fn = part.of(grad), part.function(value_fn)
        residual_fn = None if residual_fn is None else part.function(residual_fn)
        objective = None if objective is None else restricted(objective, part)
        check.argument(
            value_and_grad_fn is None,
            "value_and_grad_fn",
            "left out where optax.masked, optax.partition or optax.flatten change the parameters",
            value_and_grad_fn,
        )
    _check_structure(optimizer, params, updates=updates, grad=grad)
    if value_and_grad_fn is None and objective is not None:
        value_and_grad_fn = objective.value_and_grad
    plain_value, value_and_grad = _functions(params, value_fn, value_and_grad_fn)
    value = jnp.asarray(value).astype(scalar_dtype(params))
    return UpdateContext(
        updates=updates,
        params=params,
        value=value,
        grad=grad,
        value_fn=plain_value,
        value_and_grad=value_and_grad,
        residual_fn=residual_fn,
        noise=noise_floor(value, params),
        finite=jnp.isfinite(value) & tree.all_finite(grad),
        stationary=tree.largest(grad) == 0,
        objective=objective,
        fill=(lambda p: p) if part is None else part.filled,
    )


def numbers_as_arrays(x: PyTree) -> PyTree:
    """The tree with arrays in the place of Python's floats."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, x)


def _half_square(residual_fn: Callable[[Params], PyTree]) -> Callable[[Params], jax.Array]:
    def value(params: Params) -> jax.Array:
        residuals = residual_fn(params)
        return 0.5 * tree.vdot(residuals, residuals)

    return value


def _check_structure(optimizer: str, params: Params, **given: PyTree) -> None:
    structure: Any = jax.tree.structure(params)
    for name, x in given.items():
        check.argument(
            jax.tree.structure(x) == structure,
            name,
            f"a pytree of the structure of params, {structure}",
            jax.tree.structure(x),
            f"Inside optax.masked or optax.partition, which pass {optimizer} part of the "
            "parameters, call update(..., whole_params=params).",
        )


def _functions(
    params: Params, value_fn: Callable[..., Any], value_and_grad_fn: Callable[..., Any] | None
) -> tuple[Callable[[Params], jax.Array], Callable[[Params], tuple[jax.Array, Params]]]:
    """The value, and value with gradient, as functions whose value is a scalar of one type."""
    dtype = scalar_dtype(params)

    def scalar(out: Any) -> jax.Array:
        return jnp.asarray(out[0] if isinstance(out, tuple) else out).astype(dtype)

    def value(p: Params) -> jax.Array:
        return scalar(value_fn(p))

    def value_and_grad(p: Params) -> tuple[jax.Array, Params]:
        if value_and_grad_fn is None:
            return jax.value_and_grad(value)(p)
        v, g, *_ = value_and_grad_fn(p)
        return scalar(v), g

    return value, value_and_grad


def noise_floor(value: jax.Array, params: Params) -> jax.Array:
    """How far two evaluations of f near `value` may differ by rounding alone.

    A mean over a batch loses some ten units in the last place of its arithmetic; in 16-bit
    arithmetic, where the sum itself is float32, the examples' errors average out.
    """
    coarsest = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
    units = 10.0 if coarsest < 1e-5 else 0.1
    return jnp.asarray(units * coarsest, value.dtype) * jnp.abs(value)


def scalar_dtype(params: Params) -> Any:
    """The type of an update's scalars: at least float32, and no narrower than any leaf."""
    return jnp.dtype(tree.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params))))


def hessian_product(ctx: UpdateContext) -> Callable[[PyTree], PyTree]:
    """The product with ∇²f(θ)."""
    gradient = lambda params: ctx.value_and_grad(params)[1]  # noqa: E731
    return lambda vector: hvp(ctx.value_fn, ctx.params, vector, gradient)
