"""Hessian-free optimization run to convergence."""

from collections.abc import Callable
from typing import Any

from jdl.core import check
from jdl.core.objective import Objective
from jdl.optim import hessian_free
from jdl.solvers.iterative import Iterative
from jdl.solvers.options import split


class HessianFree(Iterative):
    """Truncated Newton steps from matrix-vector products, for any number of parameters.

    With a `jdl.Objective` for `fun` the products are Gauss-Newton's; for a plain function they are
    the Hessian's, in a trust region.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      tol: on the norm of the gradient.
      **options: `jdl.solvers.options.SolverOptions`, and the arguments of `jdl.optim.hessian_free`:
        curvature, damping, trust_region, preconditioner …

    >>> import jax.numpy as jnp
    >>> step = HessianFree(lambda x: jnp.sum(jnp.cosh(x - 1.0))).run(jnp.zeros(2))
    >>> step.params.round(3).tolist()
    [1.0, 1.0]
    """

    searches_lines = rescales = True

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 200,
        tol: float = 1e-3,
        **options: Any,
    ):
        own, of_optimizer = split(options)
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **own)
        if not isinstance(fun, Objective):
            ok = of_optimizer.get("curvature") != "gauss_newton"
            must = "a jdl.Objective for Gauss-Newton products"
            hint = "Use jdl.Objective.from_fns(predict, loss, batch), or GaussNewton for residuals."
            check.argument(ok, "fun", must, fun, hint)
            ok = value_and_grad is False or of_optimizer.get("preconditioner") is None
            must = "None with value_and_grad, whose function cannot be differentiated further"
            check.argument(ok, "preconditioner", must, of_optimizer.get("preconditioner"))
            of_optimizer = {"curvature": "hessian", **of_optimizer}
            if not of_optimizer.keys() & {"damping", "trust_region"}:
                of_optimizer["trust_region"] = 1.0
        self.optimizer = hessian_free(**of_optimizer)
