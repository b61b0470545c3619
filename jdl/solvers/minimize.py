"""`jdl.minimize`: one problem minimized, with a report."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.optim import registry
from jdl.optim.result import ResultCode
from jdl.solvers.bfgs import BFGS
from jdl.solvers.gradient_check import check_problem_gradient
from jdl.solvers.gradient_descent import GradientDescent
from jdl.solvers.hessian_free import HessianFree
from jdl.solvers.iterative import Iterative
from jdl.solvers.lbfgs import LBFGS
from jdl.solvers.least_squares import GaussNewton, LevenbergMarquardt
from jdl.solvers.newton import Newton
from jdl.solvers.nonlinear_cg import NonlinearCG
from jdl.solvers.optax_solver import OptaxSolver
from jdl.solvers.problem import as_arrays, shapes
from jdl.solvers.state import SolverState

# The registry's names of optimizers that have a solver class; others run in `OptaxSolver`.
METHODS: dict[str, Callable[..., Iterative]] = {
    "lbfgs": LBFGS,
    "bfgs": BFGS,
    "ssbroyden": functools.partial(BFGS, update="ssbroyden"),
    "cg": NonlinearCG,
    "newton": Newton,
    "hf": HessianFree,
    "gradient_descent": GradientDescent,
    "gauss_newton": GaussNewton,
    "lm": LevenbergMarquardt,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of `minimize`.

    Attributes:
      params: the last parameters.
      value: f there.
      error: ‖∇f‖ there, or with bounds ‖x − P(x − ∇f)‖.
      status: how it ended, a `ResultCode`.
      message: the same in words, with figures.
      iterations: updates made.
      evaluations: evaluations of f, with or without its gradient.
      gradients: those with it.
      seconds: spent on iterations.
      compile_seconds: spent on compilation before them.
      method: the method's name.
      aux: what `fun` returns besides its value, with `has_aux`.
      state: the solver's last state.
    """

    params: Params
    value: float
    error: float
    status: ResultCode
    message: str
    iterations: int
    evaluations: int
    gradients: int
    seconds: float
    compile_seconds: float
    method: str
    aux: Any = dataclasses.field(repr=False)
    state: SolverState = dataclasses.field(repr=False)

    @property
    def success(self) -> bool:
        """Whether it converged."""
        return self.status == ResultCode.CONVERGED

    def __str__(self) -> str:
        arrays = [f"{name} {shape}" for name, shape in shapes(self.params).items()]
        more = f" and {len(arrays) - 4} more" if len(arrays) > 4 else ""
        rows = {
            "status": self.message,
            "value": f"{self.value:.8g}",
            "iterations": f"{self.iterations}",
            "evaluations": f"{self.evaluations}, {self.gradients} of them with the gradient",
            "seconds": f"{self.seconds:.3g}, and {self.compile_seconds:.3g} to compile",
            "params": f"{tree.size(self.params)} numbers: {', '.join(arrays[:4])}{more}",
        }
        body = "\n".join(f"  {name:<12}{text}" for name, text in rows.items())
        return f"minimize by {self.method}\n{body}"

    __repr__ = __str__


def minimize(
    fun: Callable[..., Any] | Objective,
    params: Params,
    *args: Any,
    method: str | optax.GradientTransformation = "lbfgs",
    tol: float = 1e-4,
    maxiter: int | None = None,
    check_gradient: bool = False,
    **options: Any,
) -> Result:
    """Minimizes `fun(params, *args)`.

    Args:
      fun: `fun(params, *args)`, a real scalar function; a `jdl.Objective`; or for least squares
        the function of the residuals.
      params: where to start, a pytree of floating-point arrays.
      *args: passed to `fun`.
      method: "lbfgs", "bfgs", "ssbroyden", "nonlinear_cg", "newton", "hessian_free",
        "gradient_descent", for residuals "gauss_newton" and "levenberg_marquardt"; any other name
        of `jdl.optim.by_name`, or an optax transformation.
      tol: on the norm of the gradient, ≥ 0.
      maxiter: maximum number of updates; None for the method's own default.
      check_gradient: whether to compare the gradient with differences of values first.
      **options: of the method's class in `jdl.solvers`: value_and_grad, has_aux, bounds, verbose,
        callback …

    Raises:
      ArgumentError: for arguments that cannot be minimized or do not exist, or a gradient that
        `check_gradient` finds wrong.

    >>> import jax.numpy as jnp
    >>> result = minimize(lambda x: jnp.sum(jnp.square(x - 1.0)), jnp.zeros(3))
    >>> result.success, result.params.tolist(), result.status.name
    (True, [1.0, 1.0, 1.0], 'CONVERGED')
    """
    leaves = jax.tree.leaves((params, args))
    ok = not any(isinstance(x, jax.core.Tracer) for x in leaves)
    must = "concrete arrays"
    hint = "Inside jit, vmap or grad use a solver: jdl.solvers.LBFGS(fun).run(params)."
    check.argument(ok, "params", must, "a traced value", hint)
    if maxiter is not None:
        options["maxiter"] = maxiter
    name, solver = _solver(fun, method, tol=tol, **options)
    params = as_arrays(params)
    if check_gradient:
        check_problem_gradient(solver._at(None, params, args, {}), params)
    begun = time.perf_counter()
    run: Callable[[], Any] = functools.partial(solver.run, params, *args)
    if solver.jit:
        given: tuple[Any, ...] = (solver._traced_fun(), params, None, args, {})
        run = functools.partial(solver._jit_run.lower(*given).compile(), *given)
    compiled = time.perf_counter()
    found, state = jax.block_until_ready(run())
    if solver.verbose or solver.callback:
        jax.effects_barrier()
    ended = time.perf_counter()
    return Result(
        params=found,
        value=float(state.value),
        error=float(state.error),
        status=ResultCode(int(np.asarray(state.status))),
        message=solver.message(state),
        iterations=int(state.iter_num),
        evaluations=int(state.num_fun_eval),
        gradients=int(state.num_grad_eval),
        seconds=ended - compiled,
        compile_seconds=compiled - begun,
        method=name,
        aux=state.aux,
        state=state,
    )


def _solver(
    fun: Any, method: str | optax.GradientTransformation, **options: Any
) -> tuple[str, Iterative]:
    """The method's name, and the solver."""
    if not isinstance(method, str):
        return "optax", OptaxSolver(fun, method, **options)
    short = registry.short_name(method, "method", METHODS)
    name = registry.LONG_NAMES.get(short, short)
    if short in METHODS:
        return name, METHODS[short](fun, **options)
    return name, OptaxSolver(fun, registry.by_name(short), **options)
