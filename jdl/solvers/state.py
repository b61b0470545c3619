"""Where a run is, what it gives, and how it goes about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jdl.core.types import Params
from jdl.optim.result import ResultCode
from jdl.solvers import implicit


class SolverState(NamedTuple):
    """Where a run is; all but `aux`, `grad` and `internal_state` are scalars.

    Attributes:
      iter_num: updates made.
      value: f at the current parameters.
      error: the norm of the optimality condition there, which `tol` bounds: ‖∇f‖ without bounds.
      grad: ∇f there.
      aux: what `fun` gives besides its value, there; None without `has_aux`.
      stepsize: the length of the last step in units of its direction; NaN where unknown.
      status: a `ResultCode`.
      num_fun_eval: evaluations of f so far, with or without the gradient.
      num_grad_eval: evaluations of ∇f so far.
      stalled: updates since `best_value` or `best_error` last improved visibly.
      failures: updates in a row whose line search found no decrease.
      best_value: f when it last fell by more than its rounding noise.
      best_error: the error when it last fell by a twentieth.
      internal_state: the optimizer's own state.
      extra: what a solver of a special kind adds; () for the others.

    >>> import jax.numpy as jnp
    >>> from jdl.solvers import LBFGS
    >>> state = LBFGS(lambda x: jnp.sum(jnp.square(x - 1.0))).run(jnp.zeros(2)).state
    >>> float(state.value), ResultCode(int(state.status)).name
    (0.0, 'CONVERGED')
    """

    iter_num: jax.Array
    value: jax.Array
    error: jax.Array
    grad: Params
    aux: Any
    stepsize: jax.Array
    status: jax.Array
    num_fun_eval: jax.Array
    num_grad_eval: jax.Array
    stalled: jax.Array
    failures: jax.Array
    best_value: jax.Array
    best_error: jax.Array
    internal_state: Any
    extra: Any = ()

    @property
    def failed_linesearch(self) -> jax.Array:
        """Whether the run ended because the line search found no decrease."""
        return self.status == ResultCode.LINE_SEARCH_FAILED

    @property
    def gradient(self) -> Params:
        """Jaxopt's second name for `grad`."""
        return self.grad

    @property
    def residual(self) -> Any:
        """r(x) of a least-squares solver."""
        return self.extra.residual

    @property
    def delta(self) -> Any:
        """The last step of a least-squares solver."""
        return self.extra.delta

    @property
    def damping_factor(self) -> jax.Array:
        """λ for the next step, of solvers that damp."""
        return self.internal_state.damping


class OptStep(NamedTuple):
    """What `run` and `update` give.

    Attributes:
      params: the parameters.
      state: a `SolverState`, which tells how they were come by.

    >>> params, state = OptStep("parameters", "state")
    """

    params: Any
    state: Any


class Manner(NamedTuple):
    """How a solver runs, whatever it minimizes.

    Attributes:
      implicit_diff: whether `run` has the derivatives of the solution, at the cost of one linear
        system. Otherwise its iterations are differentiated, forward mode only where the optimizer
        searches lines.
      implicit_diff_solve: `solve(matvec, b)` for that system; None for one that fits the solver.
      jit: whether to compile; False runs updates one by one in Python, to debug `fun`.
      unroll: True for a loop of exactly `maxiter` updates that reverse mode can differentiate;
        "auto" does so where that is asked for (`implicit_diff=False`) and possible.
      verbose: whether to print a row of a table after each update.
      callback: called as `callback(params, state)` after each update, with NumPy arrays.
    """

    implicit_diff: bool
    implicit_diff_solve: implicit.Solve | None
    jit: bool
    unroll: str | bool
    verbose: bool | int
    callback: Callable[[Params, SolverState], None] | None
