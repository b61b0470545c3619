"""How a solver runs, whatever it minimizes: keywords that all solvers take."""

from collections.abc import Callable, Container
from typing import Any, TypedDict

from jdl.core.types import Params
from jdl.solvers.implicit import Solve
from jdl.solvers.state import SolverState


class SolverOptions(TypedDict, total=False):
    """Keywords of every solver's constructor.

    Attributes:
      implicit_diff: True (the default, except for `OptaxSolver`): `run` differentiates the solution
        by the implicit function theorem, at the cost of one linear system. False: the iterations
        are differentiated; see `unroll`.
      implicit_diff_solve: `solve(matvec, b)` for that linear system. None (the default): LU of the
        dense Hessian for Newton and the least-squares solvers, conjugate gradients for the others.
      jit: True (the default): compile. False: run updates one by one in Python, to debug `fun`.
      unroll: True: a loop of exactly `maxiter` updates, which reverse mode can differentiate too;
        the lengths of searched steps count as constants. Not for Newton, HessianFree and boxes.
        "auto" (the default): True where `implicit_diff` is False and unrolling is possible.
      verbose: True: print a row of a table after each update. Default False.
      callback: called as `callback(params, state)` after each update, with NumPy arrays. Default
        None.

    >>> sorted(SolverOptions.__annotations__)[:3]
    ['callback', 'implicit_diff', 'implicit_diff_solve']
    """

    implicit_diff: bool
    implicit_diff_solve: Solve | None
    jit: bool
    unroll: str | bool
    verbose: bool | int
    callback: Callable[[Params, SolverState], None] | None


def split(
    options: dict[str, Any], names: Container[str] = SolverOptions.__annotations__
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a solver, those called `names`, and the others.

    >>> split({"jit": False, "damping": 1.0})
    ({'jit': False}, {'damping': 1.0})
    """
    own = {k: v for k, v in options.items() if k in names}
    return own, {k: v for k, v in options.items() if k not in own}
