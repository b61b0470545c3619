"""Any optax transformation, run to convergence or over an iterator of batches."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.solvers.iterative import Iterative, reevaluated
from jdl.solvers.options import SolverOptions
from jdl.solvers.problem import Problem
from jdl.solvers.state import SolverState


class OptaxSolver(Iterative):
    """Runs an optax transformation; those of `jdl.optim` are such.

    Arguments that are not listed are those of `jdl.solvers.iterative.Iterative`.

    Args:
      opt: the transformation.
      pre_update: `params, state = pre_update(params, state, *args, **kwargs)` before each update,
        for a projection. Value and gradient are then evaluated after it.
      **options: see `jdl.solvers.options.SolverOptions`; `implicit_diff` is False by default here.

    >>> import jax.numpy as jnp
    >>> solver = OptaxSolver(lambda x, c: jnp.sum(jnp.square(x - c)), optax.sgd(0.2))
    >>> solver.run(jnp.zeros(2), jnp.array([1.0, 2.0])).params.round(2).tolist()
    [1.0, 2.0]
    """

    stochastic = True
    implicit_diff = False
    searches_lines = False  # if `opt` does, JAX itself refuses reverse mode

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        opt: optax.GradientTransformation,
        value_and_grad: bool | Callable[..., Any] = False,
        pre_update: Callable[..., tuple[Params, Any]] | None = None,
        maxiter: int = 500,
        tol: float = 1e-3,
        *,
        has_aux: bool = False,
        **options: Unpack[SolverOptions],
    ):
        ok = hasattr(opt, "init") and hasattr(opt, "update")
        check.argument(ok, "opt", "an optax transformation", opt)
        self.opt, self.pre_update = opt, pre_update
        self.optimizer = optax.with_extra_args_support(opt)
        options = {"implicit_diff": self.implicit_diff, **options}
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)

    def _before(
        self, problem: Problem, params: Params, state: SolverState
    ) -> tuple[Params, SolverState]:
        if self.pre_update is None:
            return params, state
        args, kwargs = problem.arguments
        params, state = self.pre_update(params, state, *args, **kwargs)
        return params, reevaluated(problem, params, state)


class PolyakSGD(OptaxSolver):
    """Gradient descent with Polyak's step sizes, by `optax.polyak_sgd`.

        s = min((f − fun_min) / (‖∇f‖² + delta), max_stepsize)

    Arguments that are not listed are those of `OptaxSolver`.

    Args:
      fun_min: the least value of f.
      variant: "SPS_max", or "SPS+", which takes no step where f < fun_min.
      max_stepsize: the longest step, > 0; of "SPS_max".
      delta: see above, ≥ 0.
      momentum: of heavy-ball momentum, in [0, 1).

    References:
      Loizou et al., Stochastic Polyak step-size for SGD (2021).

    >>> import jax.numpy as jnp
    >>> solver = PolyakSGD(lambda x: jnp.sum(jnp.square(x - 1.0)))
    >>> solver.run(jnp.zeros(2)).params.round(2).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        fun_min: float = 0.0,
        variant: str = "SPS_max",
        max_stepsize: float = 1.0,
        delta: float = 0.0,
        momentum: float = 0.0,
        pre_update: Callable[..., tuple[Params, Any]] | None = None,
        maxiter: int = 500,
        tol: float = 1e-3,
        **options: Unpack[SolverOptions],
    ):
        check.one_of("variant", variant, ["SPS_max", "SPS+"])
        kind = {"SPS_max": "sps", "SPS+": "sps+"}[variant]
        step = optax.polyak_sgd(max_stepsize, f_min=fun_min, eps=delta, variant=kind)
        opt = optax.chain(step, optax.trace(momentum)) if momentum else step
        more: Any = {"has_aux": has_aux, **options}
        super().__init__(fun, opt, value_and_grad, pre_update, maxiter, tol, **more)
