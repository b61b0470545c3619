"""Newton's method run to convergence."""

from collections.abc import Callable
from typing import Any

from jdl.core.objective import Objective
from jdl.optim import newton
from jdl.solvers import implicit
from jdl.solvers.iterative import Iterative
from jdl.solvers.options import split


class Newton(Iterative):
    """Newton's method with the dense Hessian, damped where a step fails.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      tol: on the norm of the gradient.
      **options: `jdl.solvers.options.SolverOptions`, and the arguments of `jdl.optim.newton`:
        damping, saddle_free, trust_region, max_parameters …

    >>> import jax.numpy as jnp
    >>> step = Newton(lambda x: jnp.sum(jnp.cosh(x - 1.0))).run(jnp.zeros(2))
    >>> step.params.round(3).tolist(), int(step.state.iter_num) < 8
    ([1.0, 1.0], True)
    """

    searches_lines = rescales = True

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 100,
        tol: float = 1e-3,
        **options: Any,
    ):
        own, of_optimizer = split(options)
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **own)
        self.default_solve = implicit.dense
        self.optimizer = newton(**of_optimizer)
