"""The state of a run, and what a solver returns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.types import Params
from jdl.optim.result import ResultCode
from jdl.solvers.problem import complex_view


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
      scale: what the optimizer sees f times; 1 but where the first gradient's square would over- or
        underflow.
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
    scale: jax.Array
    extra: Any = ()

    @property
    def failed_linesearch(self) -> jax.Array:
        """Whether the run ended because the line search found no decrease."""
        return self.status == ResultCode.LINE_SEARCH_FAILED

    @property
    def num_linesearch_iter(self) -> jax.Array:
        """Trials of line searches so far."""
        return self.num_fun_eval - 1

    @property
    def gamma(self) -> jax.Array:
        """⟨s, y⟩ / ⟨y, y⟩ of the last pair of L-BFGS; 1 without one."""
        memory = self.internal_state
        if not tree.size(memory.y):
            return jnp.ones(())
        if not hasattr(memory, "stored"):  # within bounds, newest first and raveled
            sy, yy = jnp.vdot(memory.s[0], memory.y[0]), jnp.vdot(memory.y[0], memory.y[0])
            return jnp.where(yy > 0, sy / jnp.where(yy > 0, yy, 1.0), 1.0)
        slot = (memory.stored - 1) % memory.rho.shape[0]
        last = jax.tree.map(lambda ring: ring[slot], memory.y)
        product = memory.rho[slot] * tree.vdot(last, last)
        return jnp.where(product > 0, 1.0 / jnp.where(product > 0, product, 1.0), 1.0)

    @property
    def theta(self) -> jax.Array:
        """1 / γ."""
        return 1.0 / self.gamma

    def __getattr__(self, name: str) -> Any:
        """jaxopt's other fields, where the solver has them."""
        for source in (self, self.extra, self.internal_state):
            field = NAMES.get(name, name)
            if field in getattr(source, "_fields", ()):
                found = getattr(source, field)
                rings = name.endswith("y_history") or name == "s_history"
                boxed = not hasattr(source, "stored")  # within bounds: raveled
                if not rings or boxed:
                    return found
                return complex_view(found, self.grad, lead=(slice(None),))
        raise AttributeError(f"The state of this solver has no field {name!r}")


# jaxopt's fields under other names here.
NAMES = {
    "gradient": "grad",
    "s_history": "s",
    "y_history": "y",
    "rho_history": "rho",
    "damping_factor": "damping",
    "descent_direction": "direction",
}


class OptStep(NamedTuple):
    """What `run` and `update` return.

    Attributes:
      params: the parameters.
      state: a `SolverState`.

    >>> params, state = OptStep("parameters", "state")
    """

    params: Any
    state: Any
