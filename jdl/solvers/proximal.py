r"""Proximal and projected gradient descent run to convergence: f + g, for g with a known prox.

    x⁺ = prox(y − s ∇f(y), s)      y⁺ = x⁺ + (t − 1) / t⁺ (x⁺ − x)      t⁺ = (1 + √(1 + 4 t²)) / 2

An iteration costs one gradient, at y. The momentum restarts where it points away from the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.context import UpdateContext, gather, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.result import ResultCode
from jdl.solvers.iterative import Iterative
from jdl.solvers.options import SolverOptions
from jdl.solvers.problem import Problem
from jdl.solvers.prox import make_prox_from_projection, prox_none
from jdl.solvers.state import SolverState

Stepsize = float | Callable[[Any], Any]


class ProximalState(NamedTuple):
    """The state of proximal gradient descent."""

    x: Params  # the last proximal step, which the solver returns
    velocity: Params  # y, where the next gradient is taken
    t: jax.Array  # Nesterov's sequence, 1 after a restart
    stepsize: jax.Array  # the last s
    diagnostics: Diagnostics  # see `jdl.optim.diagnostics`


def proximal_gradient(
    stepsize: Stepsize, *, acceleration: bool, decrease_factor: float, max_evaluations: int
) -> optax.GradientTransformationExtraArgs:
    """The step from y to y⁺ as a transformation; `update` needs `prox(x, s)` too.

    References:
      Beck & Teboulle, A fast iterative shrinkage-thresholding algorithm (2009), section 4.
      O'Donoghue & Candès, Adaptive restart for accelerated gradient schemes (2015), section 3.2.
    """

    def init(params: Params) -> ProximalState:
        one = jnp.ones((), scalar_dtype(params))
        here = jax.tree.map(jnp.array, params)
        return ProximalState(here, here, one, one, diag.init())

    def update(
        updates: PyTree,
        state: ProximalState,
        params: Params | None = None,
        *,
        prox: Callable[[PyTree, Any], PyTree],
        **extras: Any,
    ) -> tuple[PyTree, ProximalState]:
        here = gather("proximal_gradient", updates, params, **extras)
        trials: Any = 1
        if callable(stepsize) or stepsize > 0:
            count = state.diagnostics.iterations
            length = stepsize(count) if callable(stepsize) else stepsize
            step = jnp.asarray(length, state.stepsize.dtype)
        else:
            # In derivatives the step counts as a constant: reverse mode cannot pass the loop.
            fixed = jax.lax.stop_gradient
            still = here._replace(
                value_fn=lambda p: fixed(here.value_fn(p)), params=fixed(here.params)
            )
            given = (fixed(updates), lambda x, s: fixed(prox(x, s)), fixed(state.stepsize))
            step, trials = fixed(_searched(still, *given, decrease_factor, max_evaluations))
        new = prox(tree.add_scaled(here.params, -step, updates), step)
        back = jax.tree.map(jnp.subtract, here.params, new)
        momentum = jax.tree.map(jnp.subtract, new, state.x)
        t, velocity = state.t, new
        if acceleration:
            t = jnp.where(tree.vdot(back, momentum) > 0, 1.0, t).astype(step.dtype)
            next_t = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t * t))
            velocity = tree.add_scaled(new, (t - 1.0) / next_t, momentum)
            t = next_t
        code = jnp.asarray(ResultCode.ACCEPTED, jnp.int32)
        reused = extras.get("reused", False)
        diagnostics = diag.advance(
            state.diagnostics, step_size=step, values=trials, termination=code, reused=reused
        )
        change = jax.tree.map(jnp.subtract, velocity, here.params)
        return change, ProximalState(new, velocity, t, step, diagnostics)

    return optax.GradientTransformationExtraArgs(init, update)


def _searched(
    here: UpdateContext,
    grad: PyTree,
    prox: Callable[[PyTree, Any], PyTree],
    last: jax.Array,
    decrease_factor: float,
    max_evaluations: int,
) -> tuple[jax.Array, jax.Array]:
    """The first step s, from the last one grown, that is short enough; and the number of trials.

    f(x⁺) then lies below f(y) + ⟨∇f(y), x⁺ − y⟩ + ‖x⁺ − y‖² / 2s.
    """

    def moved(step: jax.Array) -> tuple[PyTree, PyTree]:
        new = prox(tree.add_scaled(here.params, -step, grad), step)
        return new, jax.tree.map(jnp.subtract, new, here.params)

    def fits(step: jax.Array) -> jax.Array:
        new, move = moved(step)
        bound = tree.vdot(move, grad) + 0.5 * tree.vdot(move, move) / step
        return here.value_fn(new) <= here.value + bound + here.noise

    def body(carry: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        step, trials, _ = carry
        step = jnp.where(trials > 0, decrease_factor * step, step)
        return step, trials + 1, fits(step)

    going = lambda c: here.active & ~c[2] & (c[1] < max_evaluations)  # noqa: E731
    # Growing steps where noise hides whether they are too long would end in divergence.
    move = moved(last)[1]
    visible = 0.5 * tree.vdot(move, move) / last > 10.0 * here.noise
    longest = jnp.where(last <= 1e-6, 1.0, last / decrease_factor)
    first = jnp.where(visible, longest, last).astype(last.dtype)
    start = (first, jnp.zeros((), jnp.int32), jnp.asarray(False))
    return jax.lax.while_loop(going, body, start)[:2]


class ProximalGradient(Iterative):
    """Proximal gradient descent for f + g, accelerated by default: FISTA.

    Its methods take the prox's `hyperparams_prox` after the parameters. `state.value`,
    `state.grad` and `state.error`, the length of y − prox(y − ∇f(y), 1), are those of the point y
    where the last gradient was taken; a run has converged when x, which is returned, is as near to
    y. Arguments that are not listed are those of
    `jdl.solvers.iterative.Iterative`.

    Args:
      prox: `prox(x, hyperparams_prox, scaling) -> x`; see `jdl.solvers.prox`.
      stepsize: s > 0, or a function of the iteration's number; 0 for a line search.
      maxls: maximum trials of a line search.
      acceleration: whether to add Nesterov's momentum.
      decrease_factor: the ratio of a line search's trials, in (0, 1).
      **options: see `jdl.solvers.options.SolverOptions`.

    >>> from jdl.solvers.prox import prox_lasso
    >>> f = lambda x: 0.5 * jnp.sum(jnp.square(x - jnp.array([3.0, 0.5])))
    >>> ProximalGradient(f, prox_lasso).run(jnp.zeros(2), 1.0).params.round(3).tolist()
    [2.0, 0.0]
    """

    patience = 60  # momentum overshoots, and comes back
    symmetric = False  # the optimality condition's derivative is no Hessian
    hyperparams = "hyperparams_prox"

    def __init__(
        self,
        fun: Callable[..., Any],
        prox: Callable[..., PyTree] = prox_none,
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        stepsize: Stepsize = 0.0,
        maxiter: int = 500,
        maxls: int = 15,
        tol: float = 1e-3,
        acceleration: bool = True,
        decrease_factor: float = 0.5,
        **options: Unpack[SolverOptions],
    ):
        super().__init__(fun, value_and_grad, has_aux, maxiter, tol, **options)
        check.argument(callable(prox), "prox", "a function", prox)
        check.positive_int("maxls", maxls)
        check.in_range("decrease_factor", decrease_factor, 0.0, 1.0, open_low=True, open_high=True)
        self.prox, self.stepsize, self.maxls = prox, stepsize, maxls
        self.acceleration, self.decrease_factor = acceleration, decrease_factor
        self.optimizer = proximal_gradient(
            stepsize,
            acceleration=acceleration,
            decrease_factor=decrease_factor,
            max_evaluations=maxls,
        )

    def _problem(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        kwargs = dict(kwargs)
        given = kwargs.pop(self.hyperparams, None)
        if args and given is None:
            given, *args = args  # type: ignore[assignment]
        problem = super()._problem(fun, tuple(args), kwargs)
        return problem._replace(prox=lambda x, step: self.prox(x, given, step))

    def _before(
        self, problem: Problem, params: Params, state: SolverState
    ) -> tuple[Params, SolverState]:
        return state.internal_state.velocity, state

    def _start(self, problem: Problem, params: Params, memory: Any) -> SolverState:
        del memory  # momentum begins anew
        return super()._start(problem, params, None)

    def _converged(self, params: Params, state: SolverState) -> jax.Array:
        # Momentum may carry y past a solution that x has not reached: a step s moves the gradient
        # by up to 1/s of itself.
        inner = state.internal_state
        apart = tree.norm(jax.tree.map(jnp.subtract, inner.velocity, inner.x))
        near = apart <= self.tol * jnp.minimum(inner.stepsize, 1.0)
        return super()._converged(params, state) & near

    def _answer(self, params: Params, state: SolverState) -> Params:
        return state.internal_state.x


class ProjectedGradient(ProximalGradient):
    """Projected gradient descent for f on a set, accelerated by default.

    Its methods take the projection's `hyperparams_proj` after the parameters; see
    `ProximalGradient` for the rest.

    Args:
      projection: `projection(x, hyperparams_proj) -> x`; see `jdl.solvers.projection`.

    >>> from jdl.solvers.projection import projection_simplex
    >>> f = lambda x: 0.5 * jnp.sum(jnp.square(x - jnp.array([1.0, 0.5, -2.0])))
    >>> solver = ProjectedGradient(f, projection_simplex)
    >>> [round(float(x), 3) for x in solver.run(jnp.ones(3) / 3, 1.0).params]
    [0.75, 0.25, 0.0]
    """

    hyperparams = "hyperparams_proj"

    def __init__(
        self,
        fun: Callable[..., Any],
        projection: Callable[..., PyTree],
        value_and_grad: bool | Callable[..., Any] = False,
        has_aux: bool = False,
        stepsize: Stepsize = 0.0,
        maxiter: int = 500,
        maxls: int = 15,
        tol: float = 1e-3,
        acceleration: bool = True,
        decrease_factor: float = 0.5,
        **options: Unpack[SolverOptions],
    ):
        check.argument(callable(projection), "projection", "a function", projection)
        super().__init__(
            fun,
            make_prox_from_projection(projection),
            value_and_grad,
            has_aux,
            stepsize,
            maxiter,
            maxls,
            tol,
            acceleration,
            decrease_factor,
            **options,
        )
        self.projection = projection
