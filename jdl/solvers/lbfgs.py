"""L-BFGS run to convergence, with or without bounds."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdl.core import check
from jdl.core.objective import Objective
from jdl.optim import lbfgs
from jdl.solvers import box
from jdl.solvers.iterative import Stepping
from jdl.solvers.problem import Problem
from jdl.solvers.state import OptStep


class LBFGS(Stepping):
    r"""Limited-memory BFGS with a strong Wolfe line search; with bounds, by projection.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      tol: on the norm of the gradient, or of x − P(x − ∇f) with bounds.
      bounds: (lower, upper): numbers, or pytrees of arrays like the parameters; ±inf for none.
      history_size: how many pairs of steps and gradient differences to keep; 0 for steepest
        descent.
      use_gamma: True for H₀ = γ I, γ = ⟨s, y⟩ / ⟨y, y⟩; False for H₀ = I; None for a diagonal H₀
        where it fits better than γ I, or γ I for steps of given length or within bounds.
      **options: see `jdl.solvers.steps.Steps` and `jdl.solvers.options.SolverOptions`; with bounds
        each line search is one of backtracking along the projection.

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

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        maxiter: int = 500,
        tol: float = 1e-3,
        *,
        bounds: tuple[Any, Any] | None = None,
        history_size: int = 10,
        use_gamma: bool | None = None,
        **options: Any,
    ):
        if _is_pair(bounds):
            box.check_order(bounds)
        self.bounds = bounds
        self.searches_lines = self._boxed()  # in a loop of its own
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        steps = self.steps
        if self._boxed() or history_size:
            check.positive_int("history_size", history_size)
        self.history_size, self.use_gamma = history_size, use_gamma
        common: dict[str, Any] = {"memory_size": history_size, "max_evaluations": steps.maxls}
        if self._boxed():
            self.optimizer = box.projected_lbfgs(
                steps.first,
                use_gamma=use_gamma is not False,
                shrink=steps.decrease_factor or 0.5,
                first_step=steps.start if steps.asked else None,
                stepsize=steps.length if steps.given else None,
                **common,
            )
            return
        scaling = {None: "scalar" if steps.given or self.unrolled else "auto", True: "scalar"}
        self.optimizer = lbfgs(
            steps.first,
            scaling=scaling.get(use_gamma, "none"),
            cautious=0.0 if steps.given else 1e-6,
            search=steps.search(self.unrolled),
            **common,
        )

    def _boxed(self) -> bool:
        return self.bounds is not None

    def _problem(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        return super()._problem(fun, args, kwargs)._replace(bounds=self.bounds)


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

    def _problem(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        if "bounds" in kwargs:
            args = (kwargs["bounds"], *args)
            kwargs = {name: x for name, x in kwargs.items() if name != "bounds"}
        ok = bool(args) and (args[0] is None or _is_pair(args[0]))
        must = "a pair (lower, upper) or None, right after the parameters"
        check.argument(ok, "bounds", must, args[0] if args else "nothing")
        bounds = (-jnp.inf, jnp.inf) if args[0] is None else args[0]
        return super()._problem(fun, args[1:], kwargs)._replace(bounds=bounds)

    def run(self, init_params: Any, bounds: Any, *args: Any, **kwargs: Any) -> OptStep:
        """Iterates to the end, within `bounds`; see `Iterative.run`."""
        if _is_pair(bounds):
            box.check_order(bounds)
        return super().run(init_params, bounds, *args, **kwargs)


def _is_pair(bounds: Any) -> bool:
    return isinstance(bounds, tuple | list) and len(bounds) == 2
