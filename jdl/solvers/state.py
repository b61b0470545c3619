"""The state of a run, and what a solver returns."""

from typing import Any, NamedTuple

import jax

from jdl.core.types import Params
from jdl.optim.result import ResultCode


class SolverState(NamedTuple):
    """The state of a run; all fields but `aux`, `grad`, `internal_state` and `extra` are scalars.

    Attributes:
      iter_num: updates made.
      value: f at the current parameters.
      error: the norm of the optimality condition there, which `tol` bounds: ‖∇f‖ without bounds.
      grad: ∇f there.
      aux: what `fun` returns besides its value, there; None without `has_aux`.
      stepsize: the length of the last step in units of its direction; NaN where unknown.
      status: a `ResultCode`.
      num_fun_eval: evaluations of f so far, with or without the gradient.
      num_grad_eval: evaluations of ∇f so far.
      stalled: updates since `best_value` or `best_error` last improved.
      failures: consecutive updates whose line search found no decrease.
      best_value: f when it last decreased by more than its rounding noise.
      best_error: the error when it last decreased by 5 %.
      internal_state: the optimizer's own state.
      extra: additional fields of least-squares solvers; () for the others.

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
        """λ for the next step, for solvers with damping."""
        return self.internal_state.damping


class OptStep(NamedTuple):
    """What `run` and `update` return.

    Attributes:
      params: the parameters.
      state: a `SolverState`.

    >>> params, state = OptStep("parameters", "state")
    """

    params: Any
    state: Any
