"""BFGS and the self-scaled Broyden method run to convergence."""

from collections.abc import Callable
from typing import Any

from jdl.core.objective import Objective
from jdl.optim.bfgs import bfgs
from jdl.solvers.iterative import Stepping


class BFGS(Stepping):
    """BFGS with a strong Wolfe line search, for up to some thousands of parameters.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      tol: on the norm of the gradient.
      update: "bfgs", or "ssbroyden"; see `jdl.optim.bfgs`.
      max_parameters: the largest number of parameters allowed.
      **options: see `jdl.solvers.steps.Steps` and `jdl.solvers.options.SolverOptions`.

    >>> import jax.numpy as jnp
    >>> solver = BFGS(lambda x: jnp.sum(jnp.square(x - 1.0) * jnp.array([1.0, 10.0])))
    >>> solver.run(jnp.zeros(2)).params.round(3).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 500,
        tol: float = 1e-3,
        *,
        update: str = "bfgs",
        max_parameters: int = 10_000,
        **options: Any,
    ):
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        self.optimizer = bfgs(
            self.steps.first,
            update=update,
            max_parameters=max_parameters,
            scaled=not self.steps.given,
            max_evaluations=self.steps.maxls,
            search=self.steps.search(self.unrolled),
        )
