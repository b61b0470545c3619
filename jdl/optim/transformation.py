"""The skeleton that all second-order optimizers share: a direction, then its acceptance.

    update = gather the arguments → direction(ctx, state) → accept(ctx, state, direction) → report

An optimizer is these two functions, its options and its state; arguments, learning rates,
diagnostics and steps not taken are handled here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.context import UpdateContext, gather, numbers_as_arrays
from jdl.optim.linesearch import LineSearchResult, strong_wolfe
from jdl.optim.result import ResultCode

ScalarOrSchedule: TypeAlias = float | jax.Array | Callable[[Any], Any]
# (context, direction, first trial step, diagnostics, c1, c2, max_evaluations) -> the step found,
# with the gradient there; `wolfe` is one.
Search: TypeAlias = Callable[..., LineSearchResult]
# The ranges of options that several optimizers share, and those that may be None.
RANGES = {
    "b1": "[0, 1)",
    "b2": "[0, 1)",
    "c1": "(0, 1)",
    "c2": "(0, 1)",
    "cautious": "[0, 1)",
    "damping": "[0, inf)",
    "damping_decrease": "(0, 1]",
    "damping_increase": "[1, inf)",
    "damping_minimum": "[0, inf)",
    "eps": "(0, inf)",
    "exponent": "(0, 1]",
    "factors_decay": "[0, 1)",
    "factors_eps": "(0, inf)",
    "gradient_decay": "[0, 1)",
    "growth": "[1, inf)",
    "kl_clip": "(0, inf)",
    "l2_reg": "[0, inf)",
    "learning_rate": "(0, inf)",
    "progress": "[0, inf)",
    "rcond": "[0, 1)",
    "restart_threshold": "(0, inf)",
    "shampoo_beta": "[0, 1]",
    "structural_damping": "[0, inf)",
    "tolerance": "[0, 1)",
    "trust_region": "(0, inf)",
    "warm_start": "[0, 1]",
    "weight_decay": "[0, inf)",
}
OPTIONAL = {"kl_clip", "rcond", "restart_threshold", "trust_region"}
State = TypeVar("State", bound=Any)
Proposal = TypeVar("Proposal")


class Step(NamedTuple):
    """What an update does."""

    updates: PyTree  # the step δ
    moved: jax.Array  # whether it is taken; if not, the parameters stay
    step_size: jax.Array  # the factor on the direction, for the diagnostics
    code: jax.Array  # how the search for the step ended, a `ResultCode`
    fields: Mapping[str, Any]  # the next state's fields, by name
    # Arguments of `diagnostics.advance`: evaluations, damping, reduction ratio.
    report: Mapping[str, Any]
    # Whether the direction is one of descent; −∇f has replaced one that is not.
    descends: jax.Array | bool = True
    sound: jax.Array | bool = True  # False where the curvature was not finite


def wolfe(
    ctx: UpdateContext,
    direction: PyTree,
    first: jax.Array,
    last: diag.Diagnostics | None = None,
    **limits: Any,
) -> LineSearchResult:
    """`linesearch.strong_wolfe` from the context of an update, with its noise."""
    del last
    here = (ctx.value_and_grad, ctx.params, direction, ctx.value, ctx.grad)
    options = {"noise": ctx.noise, "active": ctx.active, **limits}
    return strong_wolfe(*here, initial_step=first, **options)


def along(
    direction: PyTree,
    found: LineSearchResult,
    descends: jax.Array,
    fields: Mapping[str, Any],
    **report: Any,
) -> Step:
    """The step that a line search along `direction` found."""
    return Step(
        updates=tree.scale(found.step, direction),
        moved=found.step > 0,
        step_size=found.step,
        code=found.termination,
        fields=fields,
        report=report,
        descends=descends,
    )


def second_order(
    name: str,
    state_type: Callable[..., State],
    learning_rate: ScalarOrSchedule,
    *,
    init: Callable[[Params], Mapping[str, Any]],
    direction: Callable[[UpdateContext, State], Proposal],
    accept: Callable[[UpdateContext, State, Proposal], Step],
    prepare: Callable[[UpdateContext], UpdateContext] = lambda ctx: ctx,
    damping: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation whose updates are the whole step.

    Args:
      name: the optimizer's, for errors.
      state_type: a NamedTuple with the fields `learning_rate`, `diagnostics` and those of `init`.
      learning_rate: > 0, or a schedule of the number of updates.
      init: the state's own fields, from the parameters.
      direction: proposes a step from the context and the state, whose `learning_rate` is this
        update's.
      accept: decides on the proposal: how far to go, and the next state.
      prepare: changes the context first.
      damping: the first λ, for the diagnostics.
    """
    if isinstance(learning_rate, int | float):
        check.in_range("learning_rate", learning_rate, 0.0, open_low=True)

    def init_fn(params: Params) -> State:
        params = numbers_as_arrays(params)
        check_params(name, params)
        asked = not jax.tree.leaves(params)  # by optax.tree.map_params
        return state_type(
            learning_rate=schedule_value(learning_rate, jnp.zeros((), jnp.int32)),
            diagnostics=diag.init(damping),
            **(_marked(init, params) if asked else init(params)),
        )

    def update_fn(
        updates: PyTree,
        state: State,
        params: Params | None = None,
        *,
        reused: jax.Array | bool = False,
        **extras: Any,
    ) -> tuple[PyTree, State]:
        ctx = prepare(gather(name, updates, params, **extras))
        if callable(learning_rate):
            rate = schedule_value(learning_rate, state.diagnostics.iterations)
            state = state._replace(learning_rate=rate)
        step = accept(ctx, state, direction(ctx, state))
        descends = jnp.asarray(step.descends)
        code = diag.ending(step.code, ctx.finite & step.sound, ctx.stationary, descends)
        diagnostics = diag.advance(
            state.diagnostics,
            step_size=jnp.where(step.moved, step.step_size, 0.0),
            termination=code,
            reused=reused,
            **step.report,
        )
        nothing = jax.tree.map(jnp.zeros_like, ctx.params)
        state = state._replace(diagnostics=diagnostics, **step.fields)
        return tree.where(step.moved, step.updates, nothing), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _marked(init: Callable[[Params], Mapping[str, Any]], mark: PyTree) -> dict[str, Any]:
    """The state's own fields, `mark` for those of the parameters' shape and an array for others."""
    fields = jax.eval_shape(init, jnp.zeros((1, 2)))
    mine = {k for k, x in fields.items() if getattr(x, "shape", None) == (1, 2)}
    return {k: mark if k in mine else jnp.zeros(()) for k in fields}


def descending(
    direction: PyTree, ctx: UpdateContext, *, bounded: bool = False, norms: Any = None
) -> tuple[PyTree, jax.Array]:
    """The direction, or −∇f if it is not finite or does not descend; and whether it does.

    −∇f has no scale of its own: with `bounded` it is shortened to a length of at most 1. `norms` is
    ‖D d‖ ‖D⁻¹ ∇f‖ in units D of one's own, against which the slope is compared.
    """
    slope = tree.vdot(direction, ctx.grad)
    norms = tree.norm(direction) * tree.norm(ctx.grad) if norms is None else norms
    descends = (-slope > jnp.finfo(slope.dtype).eps * norms) & tree.all_finite(direction)
    direction = tree.where(descends, direction, tree.scale(-1.0, ctx.grad))
    if bounded:
        shortened = tree.scale(bounded_scale(direction, ctx), direction)
        direction = tree.where(descends, direction, shortened)
    return direction, descends


def bounded_scale(
    direction: PyTree, ctx: UpdateContext, length: jax.Array | float = 1.0
) -> jax.Array:
    """A factor on the direction: `length`, or less where the direction is longer than 1."""
    return length / jnp.maximum(1.0, tree.norm(direction).astype(ctx.dtype))


def accepted(moved: jax.Array) -> jax.Array:
    """The code of a search that only says whether it moved."""
    return jnp.where(moved, ResultCode.ACCEPTED, ResultCode.NO_DECREASE)


def check_params(optimizer: str, params: Params) -> None:
    """Refuses parameters that have no real-valued gradient, by name."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.asarray(leaf).dtype
        check.argument(
            jnp.issubdtype(dtype, jnp.floating),
            f"params{jax.tree_util.keystr(path)}",
            "an array of floating-point numbers",
            str(dtype),
            f"{optimizer} optimizes real parameters only; keep others out of `params`.",
        )


def rate_at(scalar_or_schedule: ScalarOrSchedule, count: Any) -> Any:
    """The value of a constant, as it is, or of a schedule at an update."""
    if not callable(scalar_or_schedule):
        return scalar_or_schedule
    # Schedules, optax's among them, mix Python floats with the integer count.
    with jax.numpy_dtype_promotion("standard"):
        return scalar_or_schedule(count)


def schedule_value(scalar_or_schedule: ScalarOrSchedule, count: Any) -> jax.Array:
    """The value of a constant or of a schedule at an update, float32."""
    return jnp.array(rate_at(scalar_or_schedule, count), jnp.float32)


def check_options(**options: Any) -> None:
    """Refuses options out of their range in `RANGES`; all others must be integers of at least 1.

    >>> check_options(tolerance=1.0)
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `tolerance` must be a number in [0.0, 1.0), got 1.0.
    """
    for name, value in options.items():
        if name not in RANGES:
            check.positive_int(name, value)
        elif value is not None or name not in OPTIONAL:
            low, high = map(float, RANGES[name][1:-1].split(","))
            opened = {"open_low": RANGES[name][0] == "(", "open_high": RANGES[name][-1] == ")"}
            check.in_range(name, value, low, high, **opened)


def check_numbers(options: Mapping[str, Any]) -> None:
    """`check_options` of the numbers; not of schedules, or `optax.inject_hyperparams`' arrays."""
    numbers = {k: x for k, x in options.items() if isinstance(x, int | float)}
    check_options(**{k: x for k, x in numbers.items() if not isinstance(x, bool)})
