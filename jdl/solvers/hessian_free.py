"""Hessian-free optimization, run to convergence."""

from collections.abc import Callable
from typing import Any

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.optim import hessian_free
from jdl.solvers.iterative import Iterative
from jdl.solvers.state import Manner, SolverState


class HessianFree(Iterative):
    """Truncated Newton steps from products alone, for any number of parameters.

    With a `jdl.Objective` for `fun` the products are Gauss-Newton's; for a plain function they are
    the Hessian's, in a trust region.

    Args:
      fun: see `Iterative`, as for all arguments not named here.
      value_and_grad: True, a function, or False.
      has_aux: whether values come with something else.
      maxiter: updates at most.
      tol: on the norm of the gradient.
      implicit_diff: whether `run` has the solution's derivatives.
      implicit_diff_solve: for their linear system; None for conjugate gradients.
      jit: whether to compile.
      unroll: "auto" or False.
      verbose: whether to print.
      callback: called after each update.
      **options: of `jdl.optim.hessian_free`: curvature, damping, trust_region, preconditioner …

    >>> import jax.numpy as jnp
    >>> step = HessianFree(lambda x: jnp.sum(jnp.cosh(x - 1.0))).run(jnp.zeros(2))
    >>> step.params.round(3).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        fun: Any,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 200,
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
        if not isinstance(fun, Objective):
            check.argument(
                options.get("curvature") != "gauss_newton",
                "fun",
                "a jdl.Objective for Gauss-Newton products",
                fun,
                "Use jdl.Objective.from_fns(predict, loss, batch), or GaussNewton for residuals.",
            )
            check.argument(
                value_and_grad is False or options.get("preconditioner") is None,
                "preconditioner",
                "None with value_and_grad, whose function it cannot look into",
                options.get("preconditioner"),
            )
            options = {"curvature": "hessian", **options}
            if not options.keys() & {"damping", "trust_region"}:
                options["trust_region"] = 1.0
        self.optimizer = hessian_free(**options)
