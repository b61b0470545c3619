"""Nonlinear conjugate gradients, run to convergence."""

from collections.abc import Callable
from typing import Any

import jax

from jdl.core import check
from jdl.core.types import Params
from jdl.optim import nonlinear_cg
from jdl.solvers.iterative import Iterative
from jdl.solvers.lbfgs import LINE_SEARCH_REFUSALS, check_line_search
from jdl.solvers.state import Manner, SolverState


class NonlinearCG(Iterative):
    """Nonlinear conjugate gradients with a strong Wolfe line search.

    Args:
      fun: see `Iterative`, as for all arguments not named here.
      value_and_grad: True, a function, or False.
      has_aux: whether values come with something else.
      maxiter: updates at most.
      tol: on the norm of the gradient.
      method: the formula for β: "polak-ribiere", "hestenes-stiefel", "dai-yuan", "hager-zhang";
        underscores too.
      linesearch: "zoom".
      maxls: trials of a line search at most.
      max_stepsize: the length of the very first trial.
      implicit_diff: whether `run` has the solution's derivatives.
      implicit_diff_solve: for their linear system; None for conjugate gradients.
      jit: whether to compile.
      unroll: "auto" or False.
      verbose: whether to print.
      callback: called after each update.
      **refused: jaxopt's keywords without a meaning here are refused in words.

    >>> import jax.numpy as jnp
    >>> solver = NonlinearCG(lambda x: jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0])))
    >>> solver.run(jnp.zeros(2)).params.round(3).tolist()
    [1.0, 1.0]

    References:
      Hager & Zhang, A survey of nonlinear conjugate gradient methods (2006). See
      `jdl.optim.nonlinear_cg`.
    """

    refusals = LINE_SEARCH_REFUSALS

    def __init__(
        self,
        fun: Any,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 100,
        tol: float = 1e-3,
        *,
        method: str = "hager-zhang",
        linesearch: str = "zoom",
        maxls: int = 30,
        max_stepsize: float = 1.0,
        implicit_diff: bool = True,
        implicit_diff_solve: Any = None,
        jit: bool = True,
        unroll: str | bool = "auto",
        verbose: bool | int = False,
        callback: Callable[[Params, SolverState], None] | None = None,
        **refused: Any,
    ):
        manner = Manner(implicit_diff, implicit_diff_solve, jit, unroll, verbose, callback)
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, manner, **refused)
        check.argument(
            method not in ("fletcher-reeves", "fletcher_reeves"),
            "method",
            "polak-ribiere, hestenes-stiefel, dai-yuan or hager-zhang",
            method,
            "Fletcher and Reeves's β can jam; dai-yuan has its convergence without.",
        )
        check_line_search(linesearch)
        check.positive_int("maxls", maxls)
        check.in_range("max_stepsize", max_stepsize, 0.0, open_low=True)
        self.method, self.maxls, self.max_stepsize = method, maxls, max_stepsize
        self.optimizer = nonlinear_cg(max_stepsize, method=method, max_evaluations=maxls)

    def _at(self, optimizer_state: Any) -> tuple[jax.Array, Params]:
        return optimizer_state.value, optimizer_state.grad
