"""Any optax transformation, run to convergence or over an iterator of batches."""

from collections.abc import Callable
from typing import Any

import optax

from jdl.core import check
from jdl.core.types import Params
from jdl.solvers.iterative import Iterative, reevaluated
from jdl.solvers.problem import Problem
from jdl.solvers.state import Manner, SolverState


class OptaxSolver(Iterative):
    """Drives an optax transformation, one of `jdl.optim` among them.

    Args:
      fun: see `Iterative`, as for all arguments not named here.
      opt: the transformation.
      value_and_grad: True, a function, or False.
      pre_update: `params, state = pre_update(params, state, *args, **kwargs)` before each update:
        a projection, say. Value and gradient are then evaluated after it.
      maxiter: updates at most.
      tol: on the norm of the gradient.
      has_aux: whether values come with something else.
      implicit_diff: whether `run` has the solution's derivatives; False differentiates its
        iterations.
      implicit_diff_solve: for their linear system; None for conjugate gradients.
      jit: whether to compile.
      unroll: see `jdl.solvers.state.Manner`; not for a transformation that searches lines.
      verbose: whether to print.
      callback: called after each update.

    >>> import jax.numpy as jnp
    >>> solver = OptaxSolver(lambda x, c: jnp.sum(jnp.square(x - c)), optax.sgd(0.2))
    >>> solver.run(jnp.zeros(2), jnp.array([1.0, 2.0])).params.round(2).tolist()
    [1.0, 2.0]
    """

    stochastic = True
    searches_lines = False  # where it does, JAX itself refuses reverse mode

    def __init__(
        self,
        fun: Any,
        opt: optax.GradientTransformation,
        value_and_grad: bool | Callable[..., Any] = False,
        pre_update: Callable[..., tuple[Params, Any]] | None = None,
        maxiter: int = 500,
        tol: float = 1e-3,
        *,
        implicit_diff: bool = False,
        implicit_diff_solve: Any = None,
        has_aux: bool = False,
        jit: bool = True,
        unroll: str | bool = "auto",
        verbose: bool | int = False,
        callback: Callable[[Params, SolverState], None] | None = None,
    ):
        ok = hasattr(opt, "init") and hasattr(opt, "update")
        check.argument(ok, "opt", "an optax transformation", opt)
        self.opt, self.pre_update = opt, pre_update
        self.optimizer = optax.with_extra_args_support(opt)  # told more than it may want to know
        manner = Manner(implicit_diff, implicit_diff_solve, jit, unroll, verbose, callback)
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, manner)

    def _before(
        self, asked: Problem, params: Params, state: SolverState
    ) -> tuple[Params, SolverState]:
        if self.pre_update is None:
            return params, state
        args, kwargs = asked.arguments
        params, state = self.pre_update(params, state, *args, **kwargs)
        return params, reevaluated(asked, params, state)
