"""Nonlinear conjugate gradients run to convergence."""

from collections.abc import Callable
from typing import Any, Unpack

from jdl.core import check
from jdl.core.objective import Objective
from jdl.optim import nonlinear_cg
from jdl.solvers.iterative import Iterative
from jdl.solvers.lbfgs import LINE_SEARCH_REFUSALS, check_line_search
from jdl.solvers.options import SolverOptions


class NonlinearCG(Iterative):
    """Nonlinear conjugate gradients with a strong Wolfe line search.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      method: the formula for β: "hager-zhang", "polak-ribiere", "hestenes-stiefel" or "dai-yuan",
        with hyphens or underscores.
      linesearch: "zoom".
      maxls: maximum trials of a line search.
      max_stepsize: the length of the very first trial.
      **options: see `jdl.solvers.options.SolverOptions`.

    >>> import jax.numpy as jnp
    >>> solver = NonlinearCG(lambda x: jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0])))
    >>> solver.run(jnp.zeros(2)).params.round(3).tolist()
    [1.0, 1.0]

    References:
      Hager & Zhang, A survey of nonlinear conjugate gradient methods (2006). See
      `jdl.optim.nonlinear_cg`.
    """

    evaluates = True
    refusals = LINE_SEARCH_REFUSALS

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 100,
        tol: float = 1e-3,
        *,
        method: str = "hager-zhang",
        linesearch: str = "zoom",
        maxls: int = 30,
        max_stepsize: float = 1.0,
        **options: Unpack[SolverOptions],
    ):
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        hint = "Fletcher and Reeves's β can stall; dai-yuan converges without that."
        refused = method in ("fletcher-reeves", "fletcher_reeves")
        check.argument(not refused, "method", "another formula for β", method, hint)
        check_line_search(linesearch, maxls, max_stepsize)
        self.method, self.maxls, self.max_stepsize = method, maxls, max_stepsize
        self.optimizer = nonlinear_cg(max_stepsize, method=method, max_evaluations=maxls)
