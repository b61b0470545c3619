"""Nonlinear conjugate gradients run to convergence."""

from collections.abc import Callable
from typing import Any, Unpack

from jdl.core import check
from jdl.core.objective import Objective
from jdl.optim import nonlinear_cg
from jdl.solvers.iterative import Iterative
from jdl.solvers.lbfgs import LINE_SEARCH_REFUSALS, check_line_search
from jdl.solvers.options import SolverOptions

METHODS = ("hager-zhang", "polak-ribiere", "hestenes-stiefel", "dai-yuan")


class NonlinearCG(Iterative):
    """Nonlinear conjugate gradients with a strong Wolfe line search.

    Args:
      fun: `fun(params, *args, **kwargs)`, or a `jdl.Objective`.
      value_and_grad: True where `fun` returns (value, gradient); a function that does; or False.
      has_aux: whether values come as `(value, aux)`.
      maxiter: updates at most.
      tol: on the norm of the gradient.
      method: the formula for β: "hager-zhang", "polak-ribiere", "hestenes-stiefel" or "dai-yuan",
        with hyphens or underscores.
      linesearch: "zoom".
      maxls: trials of a line search at most.
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
        formula = str(method).replace("_", "-")
        hint = "Fletcher and Reeves's β can stall; dai-yuan converges without that."
        refused = formula == "fletcher-reeves"
        check.argument(not refused, "method", f"one of {', '.join(METHODS)}", method, hint)
        check.one_of("method", formula, METHODS)
        check_line_search(linesearch, maxls, max_stepsize)
        self.method, self.maxls, self.max_stepsize = method, maxls, max_stepsize
        self.optimizer = nonlinear_cg(
            max_stepsize, method=formula.replace("-", "_"), max_evaluations=maxls
        )
