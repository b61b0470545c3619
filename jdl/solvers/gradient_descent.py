r"""Gradient descent with a line search, accelerated after Nesterov, run to convergence.

    x⁺ = y − s ∇f(y)      y⁺ = x⁺ + (t − 1) / t⁺ (x⁺ − x)      t⁺ = (1 + √(1 + 4 t²)) / 2

The parameters the solver shows are y, where the gradient is known; so an iteration costs one
gradient, and `state.error` is that of the parameters themselves. The momentum starts afresh
where it points uphill.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim import linesearch
from jdl.optim.context import gather, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.solvers.iterative import Iterative
from jdl.solvers.state import Manner, SolverState

Stepsize = float | Callable[[Any], Any]


class GradientDescentState(NamedTuple):
    """What gradient descent carries from step to step.

    Attributes:
      x: the last step without its momentum; () where there is none.
      iteration: updates made.
      t: Nesterov's sequence, 1 at a fresh start.
      stepsize: the last step whose decrease stood out of the rounding noise.
      diagnostics: see `jdl.optim.diagnostics`; () for steps of given length.
    """

    x: PyTree
    iteration: jax.Array
    t: jax.Array
    stepsize: jax.Array
    diagnostics: Diagnostics | tuple[()]


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
        dtype = here.value.dtype
        down = tree.scale(-1.0, updates)
        told: Any = state.diagnostics
        if searches:
            # Growing steps where noise hides whether they descend would end in divergence.
            promised = 0.5 * state.stepsize * tree.vdot(updates, here.grad).astype(dtype)
            visible = promised > 10.0 * here.noise
            found = linesearch.backtracking(
                here.value_fn,
                here.params,
                down,
                here.value,
                tree.vdot(down, here.grad),
                initial_step=jnp.where(visible, 1.0 / decrease_factor, 1.0) * state.stepsize,
                noise=here.noise,
                c1=0.5,  # f lies below the parabola of curvature 1/s: FISTA's condition
                shrink=decrease_factor,
                max_evaluations=max_evaluations,
                active=here.active,
            )
            step = found.step.astype(dtype)
            trusted = jnp.where(visible, step, state.stepsize)
            next_step = jnp.where(step > 0, trusted, 1e-3 * state.stepsize)
            code = diag.ending(found.termination, here.finite, here.stationary, jnp.asarray(True))
            told = diag.advance(
                told, step_size=step, termination=code, values=found.evaluations, reused=reused
            )
        else:
            length = stepsize(state.iteration) if callable(stepsize) else stepsize
            step = jnp.asarray(length).astype(dtype)
            next_step = state.stepsize
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
            new_x, state.iteration + 1, t.astype(dtype), next_step, told
        )

    return optax.GradientTransformationExtraArgs(init, update)


class GradientDescent(Iterative):
    """Gradient descent, accelerated by default.

    Args:
      fun: see `Iterative`, as for all arguments not named here.
      value_and_grad: True, a function, or False.
      has_aux: whether values come with something else.
      stepsize: the length of a step in units of the gradient, > 0, or a function of the
        iteration's number; 0 for a line search.
      maxiter: updates at most.
      maxls: trials of a line search at most.
      tol: on the norm of the gradient.
      acceleration: whether to add Nesterov's momentum.
      decrease_factor: the ratio of a line search's trials, in (0, 1).
      implicit_diff: whether `run` has the solution's derivatives.
      implicit_diff_solve: for their linear system; None for conjugate gradients.
      jit: whether to compile.
      unroll: see `jdl.solvers.state.Manner`; possible with a given step size.
      verbose: whether to print.
      callback: called after each update.

    >>> solver = GradientDescent(lambda x: jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0])))
    >>> solver.run(jnp.zeros(2)).params.round(3).tolist()
    [1.0, 1.0]
    """

    patience = 60  # momentum overshoots, and comes back

    def __init__(
        self,
        fun: Any,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        stepsize: Stepsize = 0.0,
        maxiter: int = 500,
        maxls: int = 15,
        tol: float = 1e-3,
        acceleration: bool = True,
        decrease_factor: float = 0.5,
        *,
        implicit_diff: bool = True,
        implicit_diff_solve: Any = None,
        jit: bool = True,
        unroll: str | bool = "auto",
        verbose: bool | int = False,
        callback: Callable[[Params, SolverState], None] | None = None,
    ):
        self.searches_lines = not callable(stepsize) and stepsize <= 0
        manner = Manner(implicit_diff, implicit_diff_solve, jit, unroll, verbose, callback)
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, manner)
        check.positive_int("maxls", maxls)
        check.in_range("decrease_factor", decrease_factor, 0.0, 1.0, open_low=True, open_high=True)
        self.stepsize, self.maxls, self.acceleration = stepsize, maxls, acceleration
        self.decrease_factor = decrease_factor
        self.optimizer = gradient_descent(
            stepsize,
            acceleration=acceleration,
            decrease_factor=decrease_factor,
            max_evaluations=maxls,
        )
