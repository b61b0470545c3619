r"""What all solvers share: the loop, when it ends, what it tells, and its derivatives.

    while running:   updates, state ← optimizer.update(…);   x ← x + updates;   judge

The loop is one `lax.while_loop` around one of the transformations of `jdl.optim`: it is compiled
once for each solver and shape, and may itself be transformed by `jit`, `vmap`, `jvp` and `grad`.
The names are those of jaxopt 0.8, so that `from jdl import solvers as jaxopt` keeps code running.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.context import noise_floor, scalar_dtype
from jdl.optim.result import ResultCode
from jdl.solvers import box, implicit, problem
from jdl.solvers.problem import Problem
from jdl.solvers.state import Manner, OptStep, SolverState


class Iterative:
    """The part that solvers have in common; the concrete classes say which optimizer they drive.

    Args:
      fun: `fun(params, *args, **kwargs)`, or a `jdl.Objective`.
      value_and_grad: True where `fun` gives (value, gradient); a function that does; or False.
      has_aux: whether values come as `(value, aux)`.
      maxiter: updates at most, ≥ 0.
      tol: a run has converged when `state.error` ≤ tol, ≥ 0.
      manner: how it runs.
      **refused: keywords of jaxopt's that mean nothing here, each refused with what to do.
    """

    searches_lines: bool = True  # by loops that have no reverse mode
    stochastic: ClassVar[bool] = False  # `update` is made for other data each time
    symmetric: ClassVar[bool] = True  # the optimality condition's derivative is a Hessian
    refusals: ClassVar[dict[str, str]] = {}
    optimizer: optax.GradientTransformationExtraArgs  # makes the updates
    # The first failure makes an optimizer forget its history, the second is that of −gradient.
    failures_allowed: int = 2
    patience: int = 15  # updates without visible progress after which a run ends

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any],
        has_aux: bool,
        maxiter: int,
        tol: float,
        manner: Manner,
        /,
        **refused: Any,
    ):
        name = type(self).__name__
        for keyword in refused:
            if keyword in self.refusals:
                raise check.ArgumentError(f"{name} takes no `{keyword}`: {self.refusals[keyword]}")
            raise TypeError(f"{name} got an unexpected keyword argument {keyword!r}")
        check.argument(
            callable(fun) or isinstance(fun, Objective), "fun", "a function or a jdl.Objective", fun
        )
        check.argument(
            isinstance(value_and_grad, bool) or callable(value_and_grad),
            "value_and_grad",
            "True, False or a function that gives value and gradient",
            value_and_grad,
            f"{name} takes maxiter and tol by name.",
        )
        check.argument(
            isinstance(maxiter, int) and not isinstance(maxiter, bool) and maxiter >= 0,
            "maxiter",
            "an integer of at least 0",
            maxiter,
        )
        check.in_range("tol", tol, 0.0)
        check.one_of("unroll", manner.unroll, ["auto", True, False])
        check.argument(
            not (manner.unroll is True and self.searches_lines),
            "unroll",
            '"auto" or False',
            manner.unroll,
            f"{name} searches lines by loops that have no reverse mode: leave implicit_diff=True.",
        )
        self.fun, self.value_and_grad, self.has_aux = fun, value_and_grad, has_aux
        self.maxiter, self.tol = maxiter, tol
        self.implicit_diff = manner.implicit_diff
        self.implicit_diff_solve = manner.implicit_diff_solve
        self.jit = jit = manner.jit
        self.unroll = manner.unroll
        self.verbose, self.callback = manner.verbose, manner.callback
        compiled: Any = jax.jit if jit else _as_it_is
        self._jit_run = compiled(self._run)
        self._jit_update = jax.jit(self._update, static_argnames="fresh") if jit else self._update
        self._jit_init = compiled(self._init)

    # ------------------------------------------------------------------ what a solver defines

    def _problem(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        return problem.make(fun, self.value_and_grad, self.has_aux, args, kwargs)

    def _at(self, optimizer_state: Any) -> tuple[jax.Array, Params] | None:
        """Value and gradient at the new parameters, where the optimizer knows them already."""
        del optimizer_state
        return None

    def _extras(self, asked: Problem, params: Params) -> dict[str, Any]:
        """What the optimizer's update is told besides value, gradient and function."""
        del params
        told = {"objective": asked.objective, "bounds": asked.bounds}
        return {name: given for name, given in told.items() if given is not None}

    def _check(self, asked: Problem, params: Params) -> None:
        """Refuses what this solver cannot minimize, beyond `problem.check_problem`."""

    def _before(
        self, asked: Problem, params: Params, state: SolverState
    ) -> tuple[Params, SolverState]:
        """What to do to the parameters ahead of an update."""
        del asked
        return params, state

    def _extra(self, params: Params, problem: Problem, aux: Any, delta: PyTree) -> tuple[Any, Any]:
        """What to keep in `state.extra` and in `state.aux`, of an evaluation's aux."""
        del params, problem, delta
        return (), aux

    def _converged(self, params: Params, state: SolverState) -> jax.Array:
        del params
        return state.error <= self.tol

    # ------------------------------------------------------------------ jaxopt's methods

    def init_state(self, init_params: Params, *args: Any, **kwargs: Any) -> SolverState:
        """The state before the first update, with f and ∇f evaluated once."""
        params = problem.as_arrays(_params_of(init_params))
        return self._jit_init(self._moving_fun(), params, args, kwargs)

    def update(self, params: Params, state: SolverState, *args: Any, **kwargs: Any) -> OptStep:
        """One iteration, whatever the status: the caller's loop decides when to end.

        Raises:
          ArgumentError: if the parameters' shapes or types are not those of the state.
        """
        params = problem.as_arrays(_params_of(params))
        have, had = problem.shapes(params), problem.shapes(state.grad)
        hint = "Shapes must not change between iterations: call init_state again."
        check.argument(have == had, "params", f"of the state's shapes {had}", have, hint)
        return self._jit_update(self._moving_fun(), params, state, args, kwargs)

    def run(self, init_params: Params, *args: Any, **kwargs: Any) -> OptStep:
        """Iterates to the end, which `state.status` tells.

        Args:
          init_params: where to start; an `OptStep` goes on with its optimizer's memory.
          *args: passed to `fun`.
          **kwargs: passed to `fun`.

        Returns:
          (params, state). The parameters have derivatives in `args` and `kwargs`; the state has
          none.
        """
        memory = None
        if isinstance(init_params, OptStep):
            memory = init_params.state.internal_state
        params = problem.as_arrays(_params_of(init_params))
        step = self._jit_run(self._moving_fun(), params, memory, args, kwargs)
        if (self.verbose or self.callback) and not isinstance(step.state.status, jax.core.Tracer):
            jax.effects_barrier()
        return step

    def run_iterator(
        self, init_params: Params, iterator: Iterator[Any], *args: Any, **kwargs: Any
    ) -> OptStep:
        """One update for each of the iterator's items, passed to `fun` as `data=`.

        Ends after `maxiter` updates, at the iterator's end, or where value or gradient are not
        finite. The error is that of single batches, and ends nothing.

        Raises:
          DataError: if the iterator is empty, or an item's shapes differ from the first one's.
        """
        params = problem.as_arrays(_params_of(init_params))
        state, first = None, None
        for i in range(self.maxiter):
            data = next(iterator, None)
            if data is None:
                break
            now = problem.shapes(data)
            if first is None or state is None:
                state, first = self.init_state(params, *args, **kwargs, data=data), now
            if now != first:
                raise check.DataError(
                    f"Item {i} of the iterator has shapes {now}, the first had {first}. "
                    "Leave out the remainder, or pad it."
                )
            params, state = self._jit_update(
                self._moving_fun(), params, state, args, {**kwargs, "data": data}, fresh=True
            )
            if int(state.status) == ResultCode.NOT_FINITE:
                return OptStep(params, state)
        if state is None:
            raise check.DataError("The iterator gives nothing to run on.")
        ended = jnp.full_like(state.status, ResultCode.MAX_ITERATIONS)
        return OptStep(params, state._replace(status=ended))

    def optimality_fun(self, params: Params, *args: Any, **kwargs: Any) -> PyTree:
        """The condition that is zero at a solution: ∇f, or x − P(x − ∇f) with bounds."""
        asked = self._asked(None, params, args, kwargs)
        return _optimality(asked, params, asked.evaluate(params)[1])

    def l2_optimality_error(self, params: Params, *args: Any, **kwargs: Any) -> jax.Array:
        """The norm of `optimality_fun`."""
        return tree.norm(self.optimality_fun(params, *args, **kwargs))

    # ------------------------------------------------------------------ inner workings

    def _moving_fun(self) -> Objective | None:
        """An objective's arrays enter the compiled program as arguments."""
        return self.fun if isinstance(self.fun, Objective) else None

    def _asked(self, fun: Any, params: Params, args: tuple[Any, ...], kwargs: Any) -> Problem:
        asked = self._problem(self.fun if fun is None else fun, args, kwargs)
        if asked.bounds is None:
            return asked
        return asked._replace(bounds=box.fitted(asked.bounds, params))

    def _init(self, fun: Objective | None, params: Params, args: Any, kwargs: Any) -> SolverState:
        asked = self._asked(fun, params, args, kwargs)
        problem.check_problem(asked, params, type(self).__name__)
        self._check(asked, params)
        if asked.bounds is not None:
            params = box.project(params, asked.bounds)
        return self._start(asked, params, None)

    def _start(self, asked: Problem, params: Params, memory: Any) -> SolverState:
        value, grad, aux = asked.evaluate(params)
        dtype = scalar_dtype(params)
        nothing = jax.tree.map(jnp.zeros_like, params)
        extra, aux = self._extra(params, asked, aux, nothing)
        error = tree.norm(_optimality(asked, params, grad)).astype(dtype)
        one, zero = (jnp.asarray(x, jnp.int32) for x in (1, 0))
        if memory is None:
            with jax.numpy_dtype_promotion("standard"):  # optax itself is not strict
                memory = self.optimizer.init(params)
        state = SolverState(
            iter_num=zero,
            value=value,
            error=error,
            grad=grad,
            aux=aux,
            stepsize=jnp.full((), jnp.nan, dtype),
            status=jnp.asarray(ResultCode.RUNNING, jnp.int32),
            num_fun_eval=one,
            num_grad_eval=one,
            stalled=zero,
            failures=zero,
            best_value=value,
            best_error=error,
            internal_state=memory,
            extra=extra,
        )
        return state._replace(status=self._judge(params, state))

    def _update(
        self,
        fun: Objective | None,
        params: Params,
        state: SolverState,
        args: Any,
        kwargs: Any,
        fresh: bool | None = None,
    ) -> OptStep:
        asked = self._asked(fun, params, args, kwargs)
        if asked.bounds is not None:
            given, params = params, box.project(params, asked.bounds)
            again = lambda: reevaluated(asked, params, state)  # noqa: E731
            state = jax.lax.cond(_differ(given, params), again, lambda: state)
        if fresh or (fresh is None and self.stochastic):
            state = reevaluated(asked, params, state)
        step = self._advance(asked, params, state)
        return self._with_aux(asked, *step)

    def _run(
        self, fun: Objective | None, params: Params, memory: Any, args: Any, kwargs: Any
    ) -> OptStep:
        asked = self._asked(fun, params, args, kwargs)
        problem.check_problem(asked, params, type(self).__name__)
        self._check(asked, params)
        if asked.bounds is not None:
            params = box.project(params, asked.bounds)

        def find(params: Params) -> tuple[Params, SolverState]:
            first = (params, self._start(asked, params, memory))
            params, state = self._loop(lambda c: self._advance(asked, *c), first)
            return tuple(self._with_aux(asked, params, state))

        if not self.implicit_diff:
            return OptStep(*find(params))
        guess = jax.lax.stop_gradient(params)
        known = None if self.jit else jax.lax.stop_gradient(find(guess))  # a loop of Python's own
        return OptStep(
            *implicit.root(
                lambda x: _optimality(asked, x, asked.evaluate(x)[1]),
                guess,
                find if known is None else lambda _: known,
                self.implicit_diff_solve or self._own_solve(),
                symmetric=self.symmetric and asked.bounds is None,
            )
        )

    def _own_solve(self) -> implicit.Solve | None:
        return None

    def _loop(self, body: Any, first: tuple[Params, SolverState]) -> tuple[Params, SolverState]:
        running = lambda c: c[1].status == ResultCode.RUNNING  # noqa: E731
        reverse = self.unroll is True or (
            self.unroll == "auto" and not self.implicit_diff and not self.searches_lines
        )
        if not self.jit:
            while bool(running(first)):
                first = body(first)
            return first
        if not reverse:
            return jax.lax.while_loop(running, lambda c: tuple(body(c)), first)

        def step(c: Any, _: None) -> tuple[Any, None]:
            return jax.lax.cond(running(c), lambda c: tuple(body(c)), lambda c: c, c), None

        return jax.lax.scan(step, first, length=self.maxiter)[0]

    def _advance(self, asked: Problem, params: Params, state: SolverState) -> OptStep:
        """One update, judged; `aux` is left as it was where the optimizer did the evaluation."""
        params, state = self._before(asked, params, state)
        extras = {"value": state.value, "grad": state.grad, "value_fn": asked.value}
        with jax.numpy_dtype_promotion("standard"):
            updates, inner = self.optimizer.update(
                state.grad,
                state.internal_state,
                params,
                reused=True,
                **extras,
                **self._extras(asked, params),
            )
            new = optax.apply_updates(params, updates)
        known = self._at(inner)
        extra, aux = state.extra, state.aux
        if known is None:
            value, grad, found = asked.evaluate(new)
            extra, aux = self._extra(new, asked, found, updates)
        else:
            value, grad = known
        told = diag.read(inner)
        evaluated = int(known is None)
        gradients = values = jnp.asarray(0, jnp.int32)
        stepsize = jnp.full_like(state.stepsize, jnp.nan)
        failed = jnp.asarray(False)
        if told is not None:
            before = diag.read(state.internal_state)
            assert before is not None
            gradients = (told.gradients - before.gradients).astype(jnp.int32)
            values = (told.values - before.values).astype(jnp.int32)
            stepsize = told.step_size.astype(stepsize.dtype)
            failed = told.termination == ResultCode.NO_DECREASE
        error = tree.norm(_optimality(asked, new, grad)).astype(state.error.dtype)
        if told is None:  # slow is not stuck, nor is one that gathers gradients or warms up
            lower = smaller = _differ((params, state.internal_state), (new, inner))
        else:
            lower = value < state.best_value - noise_floor(value, new).astype(value.dtype)
            smaller = error < 0.95 * state.best_error
        state = SolverState(
            iter_num=state.iter_num + 1,
            value=value,
            error=error,
            grad=grad,
            aux=aux,
            stepsize=stepsize,
            status=state.status,
            num_fun_eval=state.num_fun_eval + gradients + values + evaluated,
            num_grad_eval=state.num_grad_eval + gradients + evaluated,
            stalled=jnp.where(lower | smaller, 0, state.stalled + 1),
            failures=jnp.where(failed, state.failures + 1, 0),
            best_value=jnp.where(lower, value, state.best_value),
            best_error=jnp.where(smaller, error, state.best_error),
            internal_state=inner,
            extra=extra,
        )
        state = state._replace(status=self._judge(new, state))
        self._tell(new, state)
        return OptStep(new, state)

    def _judge(self, params: Params, state: SolverState) -> jax.Array:
        """The status of a run that has come here."""
        finite = jnp.isfinite(state.value) & tree.all_finite(state.grad)
        given_up = state.failures >= self.failures_allowed
        # A flat stretch before the failures shows that rounding hides what decrease there is.
        hidden = given_up & (state.stalled > state.failures)
        code = jnp.asarray(ResultCode.RUNNING, jnp.int32)
        for holds, ending in (  # later ones overrule earlier ones
            (state.iter_num >= self.maxiter, ResultCode.MAX_ITERATIONS),
            (given_up, ResultCode.LINE_SEARCH_FAILED),
            (hidden | (state.stalled >= self.patience), ResultCode.NO_PROGRESS),
            (self._converged(params, state), ResultCode.CONVERGED),
            (~finite, ResultCode.NOT_FINITE),
        ):
            code = jnp.where(holds, jnp.asarray(ending, jnp.int32), code)
        return code

    def _with_aux(self, asked: Problem, params: Params, state: SolverState) -> OptStep:
        """The step with `aux` at its own parameters, where the optimizer made the evaluations."""
        if self._at(state.internal_state) is not None and self.has_aux:
            _, aux = self._extra(params, asked, asked.evaluate(params)[2], params)
            state = state._replace(aux=aux)
        return OptStep(params, state)

    def _tell(self, params: Params, state: SolverState) -> None:
        if self.verbose:
            row = (state.iter_num, state.value, state.error, state.stepsize, state.num_fun_eval)
            jax.debug.callback(_print_row, type(self).__name__, *row)
        if self.callback is not None:
            told = lambda p, s: self.callback(p, s)  # noqa: E731
            jax.debug.callback(told, params, state)

    def message(self, state: SolverState) -> str:
        """How the run that led to `state` ended, in words."""
        words = ResultCode(int(np.asarray(state.status))).words
        error, dtype = float(np.asarray(state.error)), jnp.result_type(state.value)
        return f"{words} (error {error:.3g}, tol {self.tol:.3g}, {dtype})"


def reevaluated(asked: Problem, params: Params, state: SolverState) -> SolverState:
    """The state with value and gradient of these parameters and this problem."""
    value, grad, _ = asked.evaluate(params)
    return state._replace(
        value=value,
        grad=grad,
        num_fun_eval=state.num_fun_eval + 1,
        num_grad_eval=state.num_grad_eval + 1,
    )


def _differ(a: PyTree, b: PyTree) -> jax.Array:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.any(jnp.stack([jnp.any(x != y) for x, y in pairs]))


def _optimality(asked: Problem, params: Params, grad: Params) -> PyTree:
    if asked.bounds is None:
        return grad
    lower, upper = asked.bounds
    return jax.tree.map(
        lambda x, g, low, high: x - jnp.clip(x - g, low, high), params, grad, lower, upper
    )


def _as_it_is(function: Any) -> Any:
    return function


def _params_of(params: Any) -> Params:
    return params.params if isinstance(params, OptStep) else params


def _print_row(name: str, i: Any, value: Any, error: Any, step: Any, evaluations: Any) -> None:
    if int(i) == 1:
        print(f"{name}\n{'iteration':>9} {'value':>14} {'error':>12} {'step':>10} {'calls':>7}")
    step = "" if np.isnan(step) else f"{float(step):.3g}"
    print(f"{int(i):9d} {float(value):14.7g} {float(error):12.4g} {step:>10} {int(evaluations):7d}")
