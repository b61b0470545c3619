"""Nonlinear conjugate gradients run to convergence."""

from collections.abc import Callable
from typing import Any

from jdl.core.objective import Objective
from jdl.optim import nonlinear_cg
from jdl.solvers.iterative import Stepping


class NonlinearCG(Stepping):
    """Nonlinear conjugate gradients with a strong Wolfe line search.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      method: the formula for β: "hager-zhang", "polak-ribiere", "fletcher-reeves",
        "hestenes-stiefel" or "dai-yuan", with hyphens or underscores.
      **options: see `jdl.solvers.steps.Steps` and `jdl.solvers.options.SolverOptions`.

    >>> import jax.numpy as jnp
    >>> solver = NonlinearCG(lambda x: jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0])))
    >>> solver.run(jnp.zeros(2)).params.round(3).tolist()
    [1.0, 1.0]

    References:
      Hager & Zhang, A survey of nonlinear conjugate gradient methods (2006). See
      `jdl.optim.nonlinear_cg`.
    """

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 100,
        tol: float = 1e-3,
        *,
        method: str = "hager-zhang",
        **options: Any,
    ):
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        self.method = method
        self.optimizer = nonlinear_cg(
            self.steps.first,
            method=method,
            max_evaluations=self.steps.maxls,
            search=self.steps.search(self.unrolled),
        )
