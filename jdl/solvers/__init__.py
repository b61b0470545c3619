"""Optimizers run to convergence, with the names and signatures of jaxopt 0.8.

    from jdl import solvers as jaxopt
    params, state = jaxopt.LBFGS(fun, maxiter=100, tol=1e-4).run(init_params, data)

`jdl.minimize` minimizes one function and reports how it went.

A run has converged when the norm of the gradient is at most `tol`. The defaults of the classes are
those of jaxopt where it has the class; `minimize` is stricter:

    solver              maxiter  tol
    LBFGS                   500  1e-3
    LBFGSB                  500  1e-3
    BFGS                    500  1e-3
    NonlinearCG             100  1e-3
    GradientDescent         500  1e-3
    Newton                  100  1e-3
    HessianFree             200  1e-3
    GaussNewton              30  1e-5
    LevenbergMarquardt       30  1e-3
    OptaxSolver             500  1e-3
    PolyakSGD               500  1e-3
    ProximalGradient        500  1e-3
    ProjectedGradient       500  1e-3
    minimize        the class's  1e-4
"""

from typing import Any, NoReturn

from jdl.core import check
from jdl.optim.result import ResultCode
from jdl.solvers import implicit as implicit_diff
from jdl.solvers import projection, prox
from jdl.solvers.bfgs import BFGS
from jdl.solvers.gradient_check import check_gradient
from jdl.solvers.gradient_descent import GradientDescent
from jdl.solvers.hessian_free import HessianFree
from jdl.solvers.lbfgs import LBFGS, LBFGSB
from jdl.solvers.least_squares import GaussNewton, LevenbergMarquardt
from jdl.solvers.minimize import Result, minimize
from jdl.solvers.newton import Newton
from jdl.solvers.nonlinear_cg import NonlinearCG
from jdl.solvers.optax_solver import OptaxSolver, PolyakSGD
from jdl.solvers.proximal import ProjectedGradient, ProximalGradient
from jdl.solvers.state import OptStep, SolverState
from jdl.solvers.steps import BacktrackingLineSearch

__all__ = [
    "BFGS",
    "LBFGS",
    "LBFGSB",
    "BacktrackingLineSearch",
    "GaussNewton",
    "GradientDescent",
    "HessianFree",
    "LevenbergMarquardt",
    "Newton",
    "NonlinearCG",
    "OptStep",
    "OptaxSolver",
    "PolyakSGD",
    "ProjectedGradient",
    "ProximalGradient",
    "Result",
    "ResultCode",
    "SolverState",
    "check_gradient",
    "implicit_diff",
    "minimize",
    "projection",
    "prox",
]

# What to use in the place of jaxopt's other names.
_INSTEAD = {
    "optimistix.fixed_point(fn, optimistix.FixedPointIteration(rtol, atol), y0)": (
        "AndersonAcceleration AndersonWrapper FixedPointIteration"
    ),
    "optimistix.root_find(fn, optimistix.Newton(rtol, atol), y0)": "Broyden ScipyRootFinding",
    "optimistix.root_find(fn, optimistix.Bisection(rtol, atol), y0)": "Bisection",
    "OptaxSolver(fun, optax.chain(optax.sgd(1.0), "
    "optax.scale_by_backtracking_linesearch(15, slope_rtol=0.1)))": "ArmijoSGD",
    "ProjectedGradient with the projection": "MirrorDescent",
    "LBFGSB, or scipy.optimize.minimize": "ScipyBoundedMinimize",
    "jdl.minimize, or scipy.optimize.minimize": "ScipyMinimize",
    "scipy.optimize.least_squares": "ScipyBoundedLeastSquares ScipyLeastSquares",
    "skglm": "BlockCoordinateDescent",
    "qpax.solve_qp": "BoxCDQP BoxOSQP CvxpyQP OSQP",
    "lineax.linear_solve": "EqualityConstrainedQP IterativeRefinement linear_solve",
    'linesearch="zoom" or "hager-zhang" in a solver': "HagerZhangLineSearch ZoomLineSearch",
    "sklearn.isotonic": "isotonic",
    "equinox.internal.while_loop": "loop",
    "optax.losses, whose arguments are (prediction, label)": "loss objective",
    "optax.perturbations": "perturbations",
    "optax.tree": "tree_util",
    "jdl.solvers.OptStep": "base",
}
_ELSEWHERE = {name: text for text, names in _INSTEAD.items() for name in names.split()}


class _Elsewhere:
    """A name of jaxopt's that is not here: each use says where to go."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise check.ArgumentError(f"jdl.solvers has no {self._name}: use {_ELSEWHERE[self._name]}.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self()


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return _Elsewhere(name)
    raise AttributeError(f"jdl.solvers has no {name!r}. It has {', '.join(__all__)}.")
