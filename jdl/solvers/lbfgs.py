"""L-BFGS run to convergence, with or without bounds."""

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

from jdl.core import check
from jdl.core.objective import Objective
from jdl.optim import lbfgs
from jdl.solvers import box
from jdl.solvers.iterative import Iterative
from jdl.solvers.options import SolverOptions
from jdl.solvers.problem import Problem
from jdl.solvers.state import OptStep

# Keywords of jaxopt's own line searches.
LINE_SEARCH_REFUSALS = {
    "linesearch_init": "each search starts from max_stepsize, or from the last steps. "
    "Leave it out.",
    "increase_factor": "its line search interpolates. Leave it out.",
    "decrease_factor": "its line search interpolates. Leave it out.",
    "min_stepsize": "its line search ends where a step would move no parameter. Leave it out.",
    "condition": "its line search ensures the strong Wolfe conditions. Leave it out.",
}


def check_line_search(linesearch: str, maxls: int, max_stepsize: float) -> None:
    """Checks the options of the line search; jaxopt's other searches are refused by name."""
    check.one_of("linesearch", linesearch, ["zoom", "backtracking", "hager-zhang", "hager_zhang"])
    hint = "It separates noise from decrease as Hager and Zhang's search does."
    ok = linesearch == "zoom"
    check.argument(ok, "linesearch", "'zoom', the only one here", linesearch, hint)
    check.positive_int("maxls", maxls)
    check.in_range("max_stepsize", max_stepsize, 0.0, open_low=True)


class LBFGS(Iterative):
    r"""Limited-memory BFGS with a strong Wolfe line search; with bounds, by projection.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      tol: on the norm of the gradient, or of x − P(x − ∇f) with bounds.
      bounds: (lower, upper): numbers, or pytrees of arrays like the parameters; ±inf for none.
      linesearch: "zoom".
      stop_if_linesearch_fails: whether the first failed line search ends the run; if not, one along
        −gradient is tried.
      maxls: maximum trials of a line search.
      max_stepsize: a line search's first trial.
      history_size: how many pairs of steps and gradient differences to keep.
      **options: see `jdl.solvers.options.SolverOptions`.

    >>> import jax.numpy as jnp
    >>> f = lambda x, center: jnp.sum(jnp.square(x - center) * jnp.array([1.0, 10.0]))
    >>> solver = LBFGS(f, tol=1e-4)
    >>> params, state = solver.run(jnp.zeros(2), jnp.array([1.0, 2.0]))
    >>> params.round(3).tolist(), solver.message(state)[:9]
    ([1.0, 2.0], 'converged')
    >>> boxed = LBFGS(f, bounds=(0.0, 1.5)).run(jnp.zeros(2), jnp.array([1.0, 2.0]))
    >>> [round(float(x), 3) for x in boxed.params]
    [1.0, 1.5]

    References:
      Nocedal & Wright, Numerical Optimization (2006), algorithm 7.5. See `jdl.optim.lbfgs`.
    """

    evaluates = True
    refusals = LINE_SEARCH_REFUSALS | {
        "use_gamma": "its first inverse Hessian is always scaled. Leave it out.",
        "stepsize": "it always uses a line search. For steps of fixed length use "
        "OptaxSolver(fun, optax.lbfgs(learning_rate, linesearch=None)).",
    }
    redundant: ClassVar[dict[str, Any]] = {"stepsize": 0.0}

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 500,
        tol: float = 1e-3,
        *,
        bounds: tuple[Any, Any] | None = None,
        linesearch: str = "zoom",
        stop_if_linesearch_fails: bool = False,
        maxls: int = 30,
        max_stepsize: float = 1.0,
        history_size: int = 10,
        **options: Unpack[SolverOptions],
    ):
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        check_line_search(linesearch, maxls, max_stepsize)
        check.positive_int("history_size", history_size)
        if _is_pair(bounds):
            box.check_order(bounds)
        self.failures_allowed = 1 if stop_if_linesearch_fails else 2
        self.bounds, self.history_size, self.maxls = bounds, history_size, maxls
        self.max_stepsize = max_stepsize
        make = box.projected_lbfgs if self._boxed() else lbfgs
        self.optimizer = make(max_stepsize, memory_size=history_size, max_evaluations=maxls)

    def _boxed(self) -> bool:
        return self.bounds is not None

    def _bounds(self, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        return self.bounds, args

    def _problem(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        bounds, args = self._bounds(args)
        return super()._problem(fun, args, kwargs)._replace(bounds=bounds)


class LBFGSB(LBFGS):
    """`LBFGS` with bounds given at each call, as in jaxopt: `run(init_params, bounds, *args)`.

    Its arguments are those of `LBFGS`, without `bounds`. The solution can be differentiated with
    respect to the bounds too.

    >>> import jax.numpy as jnp
    >>> f = lambda x: jnp.sum(jnp.square(x - 2.0))
    >>> LBFGSB(f).run(jnp.zeros(2), (0.0, jnp.array([1.0, jnp.inf]))).params.tolist()
    [1.0, 2.0]
    """

    def _boxed(self) -> bool:
        return True

    def _bounds(self, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        ok = bool(args) and _is_pair(args[0])
        must = "a pair (lower, upper), right after the parameters"
        check.argument(ok, "bounds", must, args[0] if args else None, "Without bounds use LBFGS.")
        return args[0], args[1:]

    def run(self, init_params: Any, bounds: Any, *args: Any, **kwargs: Any) -> OptStep:
        """Iterates to the end, within `bounds`; see `Iterative.run`."""
        if _is_pair(bounds):
            box.check_order(bounds)
        return super().run(init_params, bounds, *args, **kwargs)


def _is_pair(bounds: Any) -> bool:
    return isinstance(bounds, tuple | list) and len(bounds) == 2
