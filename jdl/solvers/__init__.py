"""Optimizers run to convergence, with the names and signatures of jaxopt 0.8.

    from jdl import solvers as jaxopt
    params, state = jaxopt.LBFGS(fun, maxiter=100, tol=1e-4).run(init_params, data)

`jdl.minimize` minimizes one function and reports how it went.

A run has converged when the norm of the gradient is at most `tol`. The defaults of the classes are
those of jaxopt where it has the class; `minimize` is stricter:

    solver              maxiter  tol
    LBFGS                   500  1e-3
    LBFGSB                  500  1e-3
    NonlinearCG             100  1e-3
    GradientDescent         500  1e-3
    Newton                  100  1e-3
    HessianFree             200  1e-3
    GaussNewton              30  1e-5
    LevenbergMarquardt       30  1e-3
    OptaxSolver             500  1e-3
    minimize        the class's  1e-4
"""

from typing import Any

from jdl.optim.result import ResultCode
from jdl.solvers.gradient_check import check_gradient
from jdl.solvers.gradient_descent import GradientDescent
from jdl.solvers.hessian_free import HessianFree
from jdl.solvers.lbfgs import LBFGS, LBFGSB
from jdl.solvers.least_squares import GaussNewton, LevenbergMarquardt
from jdl.solvers.minimize import Result, minimize
from jdl.solvers.newton import Newton
from jdl.solvers.nonlinear_cg import NonlinearCG
from jdl.solvers.optax_solver import OptaxSolver
from jdl.solvers.state import OptStep, SolverState

__all__ = [
    "LBFGS",
    "LBFGSB",
    "GaussNewton",
    "GradientDescent",
    "HessianFree",
    "LevenbergMarquardt",
    "Newton",
    "NonlinearCG",
    "OptStep",
    "OptaxSolver",
    "Result",
    "ResultCode",
    "SolverState",
    "check_gradient",
    "minimize",
]

_PROJECTION = "Use LBFGS(bounds=...) for a box, OptaxSolver(pre_update=...) for other projections"
_ALTERNATIVES = {
    "ProjectedGradient": _PROJECTION,
    "ScipyBoundedMinimize": _PROJECTION,
    "MirrorDescent": _PROJECTION,
    "ProximalGradient": "There is no proximal method here; keep jaxopt for it, or smooth the term",
    "BFGS": "Use LBFGS, or Newton for few parameters",
    "ScipyMinimize": "Use jdl.minimize, or scipy.optimize itself",
    "ArmijoSGD": "Use OptaxSolver with one of optax's line searches",
    "PolyakSGD": "Use OptaxSolver with optax.polyak_sgd",
}


def __getattr__(name: str) -> Any:
    hint = f" {_ALTERNATIVES[name]}." if name in _ALTERNATIVES else ""
    raise AttributeError(f"jdl.solvers has no {name!r}.{hint} It has {', '.join(__all__)}.")
