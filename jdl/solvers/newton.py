"""Newton's method, run to convergence."""

from collections.abc import Callable
from typing import Any

from jdl.core.types import Params
from jdl.optim import newton
from jdl.solvers import implicit
from jdl.solvers.iterative import Iterative
from jdl.solvers.state import Manner, SolverState


class Newton(Iterative):
    """Newton's method with the dense Hessian, damped where a step fails.

    Args:
      fun: see `Iterative`, as for all arguments not named here.
      value_and_grad: True, a function, or False.
      has_aux: whether values come with something else.
      maxiter: updates at most.
      tol: on the norm of the gradient.
      implicit_diff: whether `run` has the solution's derivatives.
      implicit_diff_solve: for their linear system; None for the dense Hessian's LU factors.
      jit: whether to compile.
      unroll: "auto" or False.
      verbose: whether to print.
      callback: called after each update.
      **options: of `jdl.optim.newton`: damping, saddle_free, trust_region, max_parameters …

    >>> import jax.numpy as jnp
    >>> step = Newton(lambda x: jnp.sum(jnp.cosh(x - 1.0))).run(jnp.zeros(2))
    >>> step.params.round(3).tolist(), int(step.state.iter_num) < 8
    ([1.0, 1.0], True)
    """

    def __init__(
        self,
        fun: Any,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 100,
        tol: float = 1e-3,
        *,
        implicit_diff: bool = True,
        implicit_diff_solve: Any = None,
        jit: bool = True,
        unroll: str | bool = "auto",
        verbose: bool | int = False,
        callback: Callable[[Params, SolverState], None] | None = None,
        **options: Any,
    ):
        manner = Manner(implicit_diff, implicit_diff_solve, jit, unroll, verbose, callback)
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, manner)
        self.optimizer = newton(**options)

    def _own_solve(self) -> implicit.Solve:
        return implicit.dense
