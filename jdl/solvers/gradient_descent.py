r"""Gradient descent with a line search, accelerated after Nesterov, run to convergence.

    x⁺ = y − s ∇f(y)      y⁺ = x⁺ + (t − 1) / t⁺ (x⁺ − x)      t⁺ = (1 + √(1 + 4 t²)) / 2

The solver's parameters are y, where the gradient is known, so that an iteration costs one gradient
and `state.error` is that of the parameters themselves. The momentum restarts where it points
uphill.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim import linesearch
from jdl.optim.context import UpdateContext, gather, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.solvers.iterative import Iterative
from jdl.solvers.options import SolverOptions

Stepsize = float | Callable[[Any], Any]


class GradientDescentState(NamedTuple):
    """The state of gradient descent."""

    x: PyTree  # the last step without its momentum; () where there is none
    iteration: jax.Array  # updates made
    t: jax.Array  # Nesterov's sequence, 1 after a restart
    stepsize: jax.Array  # the last step whose decrease was above the rounding noise
    diagnostics: Diagnostics | tuple[()]  # see `jdl.optim.diagnostics`; () for given step sizes


def gradient_descent(
    stepsize: Stepsize = 0.0,
    *,
    acceleration: bool = True,
    decrease_factor: float = 0.5,
    max_evaluations: int = 15,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent as a transformation; see `GradientDescent` for the arguments.

    References:
      Beck & Teboulle, A fast iterative shrinkage-thresholding algorithm (2009), section 4.
      O'Donoghue & Candès, Adaptive restart for accelerated gradient schemes (2015), section 3.2.
    """
    searches = not callable(stepsize) and stepsize <= 0

    def init(params: Params) -> GradientDescentState:
        dtype = scalar_dtype(params)
        return GradientDescentState(
            x=jax.tree.map(jnp.array, params) if acceleration else (),
            iteration=jnp.zeros((), jnp.int32),
            t=jnp.ones((), dtype),
            stepsize=jnp.full((), decrease_factor, dtype),
            diagnostics=diag.init() if searches else (),
        )

    def update(
        updates: PyTree,
        state: GradientDescentState,
        params: Params | None = None,
        *,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, GradientDescentState]:
        here = gather("gradient_descent", updates, params, **extras)
        down = tree.scale(-1.0, updates)
        diagnostics: Any = state.diagnostics
        if searches:
            step, next_step, found = _searched(
                here, updates, state.stepsize, decrease_factor, max_evaluations
            )
            code = diag.ending(found.termination, here.finite, here.stationary, jnp.asarray(True))
            known = {"step_size": step, "values": found.evaluations, "reused": reused}
            diagnostics = diag.advance(diagnostics, termination=code, **known)
        else:
            length = stepsize(state.iteration) if callable(stepsize) else stepsize
            step, next_step = jnp.asarray(length).astype(here.value.dtype), state.stepsize
        move = tree.scale(step, down)
        t, new_x = state.t, state.x
        if acceleration:
            new_x = jax.tree.map(jnp.add, here.params, move)
            momentum = jax.tree.map(jnp.subtract, new_x, state.x)
            t = jnp.where(tree.vdot(here.grad, momentum) > 0, 1.0, state.t)
            next_t = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t * t))
            move = tree.add_scaled(move, (t - 1.0) / next_t, momentum)
            t = next_t
        return move, GradientDescentState(
            new_x, state.iteration + 1, t.astype(here.value.dtype), next_step, diagnostics
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _searched(
    here: UpdateContext,
    updates: PyTree,
    last: jax.Array,
    decrease_factor: float,
    max_evaluations: int,
) -> tuple[jax.Array, jax.Array, linesearch.LineSearchResult]:
    """The step along −updates, what the next search starts from, and the search itself."""
    dtype = here.value.dtype
    down = tree.scale(-1.0, updates)
    # Growing steps where noise hides whether they descend would end in divergence.
    predicted = 0.5 * last * tree.vdot(updates, here.grad).astype(dtype)
    visible = predicted > 10.0 * here.noise
    # In derivatives the step counts as a constant: reverse mode cannot pass the search's loop.
    fixed = jax.lax.stop_gradient
    found = linesearch.backtracking(
        lambda params: fixed(here.value_fn(params)),
        fixed(here.params),
        fixed(down),
        fixed(here.value),
        fixed(tree.vdot(down, here.grad)),
        initial_step=fixed(jnp.where(visible, 1.0 / decrease_factor, 1.0) * last),
        noise=fixed(here.noise),
        c1=0.5,  # f lies below the parabola of curvature 1/s: FISTA's condition
        shrink=decrease_factor,
        max_evaluations=max_evaluations,
        active=here.active,
    )
    step = found.step.astype(dtype)
    next_step = jnp.where(step > 0, jnp.where(visible, step, last), 1e-3 * last)
    return step, next_step, found


class GradientDescent(Iterative):
    """Gradient descent, accelerated by default.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      stepsize: the length of a step in units of the gradient, > 0, or a function of the
        iteration's number; 0 for a line search.
      maxls: maximum trials of a line search.
      acceleration: whether to add Nesterov's momentum.
      decrease_factor: the ratio of a line search's trials, in (0, 1).
      **options: see `jdl.solvers.options.SolverOptions`.

    >>> solver = GradientDescent(lambda x: jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0])))
    >>> solver.run(jnp.zeros(2)).params.round(3).tolist()
    [1.0, 1.0]
    """

    patience = 60  # momentum overshoots, and comes back

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        stepsize: Stepsize = 0.0,
        maxiter: int = 500,
        maxls: int = 15,
        tol: float = 1e-3,
        acceleration: bool = True,
        decrease_factor: float = 0.5,
        **options: Unpack[SolverOptions],
    ):
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        check.positive_int("maxls", maxls)
        check.in_range("decrease_factor", decrease_factor, 0.0, 1.0, open_low=True, open_high=True)
        self.rescales = not callable(stepsize) and stepsize <= 0
        self.stepsize, self.maxls, self.acceleration = stepsize, maxls, acceleration
        self.decrease_factor = decrease_factor
        self.optimizer = gradient_descent(
            stepsize,
            acceleration=acceleration,
            decrease_factor=decrease_factor,
            max_evaluations=maxls,
        )
