r"""What all solvers share: the loop, the stopping rules, the reports, and derivatives.

    while running:   updates, state ← optimizer.update(…);   x ← x + updates;   check the rules

The loop is one `lax.while_loop` around one of the transformations of `jdl.optim`: it is compiled
once for each solver and shape, and may itself be transformed by `jit`, `vmap`, `jvp` and `grad`.
The names are those of jaxopt 0.8, so that `from jdl import solvers as jaxopt` keeps code running.
"""

import inspect
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
from jdl.solvers import box, implicit
from jdl.solvers.options import SolverOptions, split
from jdl.solvers.problem import (
    Problem,
    as_arrays,
    check_problem,
    complex_view,
    make_problem,
    real_problem,
    real_view,
    shapes,
)
from jdl.solvers.state import OptStep, SolverState
from jdl.solvers.steps import Steps

STEPS = Steps.__dataclass_fields__


class Iterative:
    """The base of all solvers; each concrete class builds the optimizer that it drives.

    The keywords implicit_diff, implicit_diff_solve, jit, unroll, verbose and callback are those of
    `jdl.solvers.options.SolverOptions`.

    Args:
      fun: `fun(params, *args, **kwargs)`, or a `jdl.Objective`.
      value_and_grad: True where `fun` returns (value, gradient); a function that does; or False.
      has_aux: whether values come as `(value, aux)`.
      maxiter: maximum number of updates, ≥ 0.
      tol: a run has converged when `state.error` ≤ tol, ≥ 0.
      **unknown: other keywords, which are an error.
    """

    searches_lines: bool = False  # in loops that reverse mode cannot differentiate
    stepping: ClassVar[bool] = False  # takes the options of `Steps`
    stochastic: ClassVar[bool] = False  # `update` gets other data each time
    symmetric: ClassVar[bool] = True  # the optimality condition's derivative is a Hessian
    # Functions of extreme gradients are minimized times a power of two.
    rescales: bool = False
    evaluates: bool = False  # the optimizer's state has value and grad at the new point
    default_solve: implicit.Solve | None = None  # None: conjugate gradients
    optimizer: optax.GradientTransformationExtraArgs
    implicit_diff: bool = True
    # After the first failure an optimizer drops its history; the second is that of −gradient.
    failures_allowed: int = 2
    patience: int = 15  # updates without progress after which a run ends

    def __init__(
        self,
        fun: Callable[..., Any] | Objective,
        value_and_grad: bool | Callable[..., Any],
        has_aux: bool,
        maxiter: int,
        tol: float,
        *,
        implicit_diff: bool = True,
        implicit_diff_solve: implicit.Solve | None = None,
        jit: bool = True,
        unroll: str | bool = "auto",
        verbose: bool | int = False,
        callback: Callable[[Params, SolverState], None] | None = None,
        **unknown: Any,
    ):
        name = type(self).__name__
        for keyword in unknown:
            raise TypeError(f"{name} got an unexpected keyword argument {keyword!r}")
        ok = callable(fun) or isinstance(fun, Objective)
        check.argument(ok, "fun", "a function or a jdl.Objective", fun)
        ok = isinstance(value_and_grad, bool) or callable(value_and_grad)
        must = "True, False or a function that returns value and gradient"
        hint = f"{name} takes maxiter and tol by name."
        check.argument(ok, "value_and_grad", must, value_and_grad, hint)
        whole = isinstance(maxiter, int) and not isinstance(maxiter, bool) and maxiter >= 0
        check.argument(whole, "maxiter", "an integer of at least 0", maxiter)
        check.in_range("tol", tol, 0.0)
        check.one_of("unroll", unroll, ["auto", True, False])
        ok = not (unroll is True and self.searches_lines)
        must = '"auto" or False'
        hint = (
            f"{name} has inner loops, which reverse mode cannot differentiate: "
            "leave implicit_diff=True."
        )
        check.argument(ok, "unroll", must, unroll, hint)
        self.fun, self.value_and_grad, self.has_aux = fun, value_and_grad, has_aux
        self.maxiter, self.tol = maxiter, tol
        self.implicit_diff, self.implicit_diff_solve = implicit_diff, implicit_diff_solve
        self.jit, self.unroll = jit, unroll
        self.verbose, self.callback = verbose, callback
        compiled: Any = jax.jit if jit else lambda function, **_: function
        self._jit_run = compiled(self._run)
        self._jit_update = compiled(self._update, static_argnames="fresh")
        self._jit_init = compiled(self._init)

    def __init_subclass__(cls) -> None:
        """Lists `SolverOptions` in the signature of a constructor with `**options`."""
        super().__init_subclass__()
        own = inspect.signature(cls.__init__).parameters
        if "options" in own:
            shared = inspect.signature(Iterative.__init__).parameters
            _, *first, last = own.values()
            if cls.stepping:
                lengths = inspect.signature(Steps).parameters.values()
                first += [p.replace(kind=p.KEYWORD_ONLY) for p in lengths]
            more = [
                shared[name].replace(default=getattr(cls, name, shared[name].default))
                for name in SolverOptions.__annotations__
            ]
            setattr(cls, "__signature__", inspect.Signature([*first, *more, last]))  # noqa: B010

    @property
    def unrolled(self) -> bool:
        """Whether a run is a loop of fixed length, which reverse mode can differentiate."""
        auto = not self.implicit_diff and not self.searches_lines
        return auto if self.unroll == "auto" else bool(self.unroll)

    # ------------------------------------------------------------------ what a solver defines

    def _problem(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        return make_problem(fun, self.value_and_grad, self.has_aux, args, kwargs)

    def _extras(self, problem: Problem, params: Params) -> dict[str, Any]:
        """Arguments of the optimizer's update besides value, gradient and function."""
        names = ("objective", "value_and_grad_fn", "bounds", "prox")
        return {name: x for name in names if (x := getattr(problem, name)) is not None}

    def _check(self, problem: Problem, params: Params) -> None:
        """Refuses what this solver cannot minimize, beyond `check_problem`."""

    def _before(
        self, problem: Problem, params: Params, state: SolverState
    ) -> tuple[Params, SolverState]:
        """What to do to the parameters ahead of an update."""
        return params, state

    def _answer(self, params: Params, state: SolverState) -> Params:
        """What to return after an update that led to `params`."""
        return params

    def _extra(self, aux: Any, delta: PyTree) -> tuple[Any, Any]:
        """`state.extra` and `state.aux`, from an evaluation's aux and the last step."""
        return (), aux

    def _converged(self, params: Params, state: SolverState) -> jax.Array:
        return state.error <= self.tol

    # ------------------------------------------------------------------ jaxopt's methods

    def init_state(self, init_params: Params, *args: Any, **kwargs: Any) -> SolverState:
        """The state before the first update, with f and ∇f evaluated once."""
        params = as_arrays(_params_of(init_params))
        return self._jit_init(self._traced_fun(), params, args, kwargs)

    def update(self, params: Params, state: SolverState, *args: Any, **kwargs: Any) -> OptStep:
        """One iteration, whatever the status: the caller's loop decides when to stop.

        Raises:
          ArgumentError: the parameters' shapes or types are not those of the state.
        """
        params = as_arrays(_params_of(params))
        have, had = shapes(params), shapes(state.grad)
        hint = "Shapes must not change between iterations: call init_state again."
        check.argument(have == had, "params", f"of the state's shapes {had}", have, hint)
        return self._jit_update(self._traced_fun(), params, state, args, kwargs)

    def run(self, init_params: Params, *args: Any, **kwargs: Any) -> OptStep:
        """Iterates until a stopping rule is met; `state.status` says which.

        Args:
          init_params: where to start; an `OptStep` continues with its optimizer's state.
          *args: passed to `fun`.
          **kwargs: passed to `fun`.

        Returns:
          (params, state). The parameters can be differentiated with respect to `args` and
          `kwargs`, the state cannot.
        """
        memory = init_params.state.internal_state if isinstance(init_params, OptStep) else None
        params = as_arrays(_params_of(init_params))
        step = self._jit_run(self._traced_fun(), params, memory, args, kwargs)
        if (self.verbose or self.callback) and not isinstance(step.state.status, jax.core.Tracer):
            jax.effects_barrier()
        return step

    def run_iterator(
        self, init_params: Params, iterator: Iterator[Any], *args: Any, **kwargs: Any
    ) -> OptStep:
        """One update for each of the iterator's items, passed to `fun` as `data=`.

        Ends after `maxiter` updates, at the iterator's end, or when value or gradient are not
        finite. The error is that of a single batch and does not stop the run.

        Raises:
          DataError: the iterator is empty, or an item's shapes differ from the first one's.
        """
        params = as_arrays(_params_of(init_params))
        state, first = None, None
        for i in range(self.maxiter):
            data = next(iterator, None)
            if data is None:
                break
            now = shapes(data)
            if first is None or state is None:
                state, first = self.init_state(params, *args, **kwargs, data=data), now
            if now != first:
                raise check.DataError(
                    f"Item {i} of the iterator has shapes {now}, the first had {first}. "
                    "Drop the remainder, or pad it."
                )
            params, state = self._jit_update(
                self._traced_fun(), params, state, args, {**kwargs, "data": data}, fresh=True
            )
            if int(state.status) == ResultCode.NOT_FINITE:
                return OptStep(params, state)
        if state is None:
            raise check.DataError("The iterator is empty: there is nothing to run on.")
        ended = jnp.full_like(state.status, ResultCode.MAX_ITERATIONS)
        return OptStep(params, state._replace(status=ended))

    def optimality_fun(self, params: Params, *args: Any, **kwargs: Any) -> PyTree:
        """The condition that is zero at a solution: ∇f, or x − P(x − ∇f) with bounds."""
        like, problem = params, self._at(None, params, args, kwargs)
        params = real_view(params)
        found = _optimality(problem, params, problem.evaluate(params)[1])
        return complex_view(found, like, conjugate=True)

    def l2_optimality_error(self, params: Params, *args: Any, **kwargs: Any) -> jax.Array:
        """The norm of `optimality_fun`."""
        return tree.norm(real_view(self.optimality_fun(params, *args, **kwargs)))

    def _traced_fun(self) -> Objective | None:
        """An objective's arrays enter the compiled program as arguments."""
        return self.fun if isinstance(self.fun, Objective) else None

    def _at(self, fun: Any, params: Params, args: tuple[Any, ...], kwargs: Any) -> Problem:
        """The problem in the real view of `params`, with bounds in their structure."""
        problem = self._problem(self.fun if fun is None else fun, args, kwargs)
        problem = real_problem(problem, params)
        if problem.bounds is None:
            return problem
        return problem._replace(bounds=box.fitted(problem.bounds, params))

    def _checked(
        self, fun: Objective | None, params: Params, args: Any, kwargs: Any
    ) -> tuple[Problem, Params]:
        """The problem, checked, and the real view of the parameters, within its bounds."""
        problem, params = self._at(fun, params, args, kwargs), real_view(params)
        if self.jit:  # in Python each call of the function counts
            check_problem(problem, params, type(self).__name__)
            self._check(problem, params)
        if problem.bounds is not None:
            params = jax.tree.map(jnp.clip, params, *problem.bounds)
        return problem, params

    def _init(self, fun: Objective | None, params: Params, args: Any, kwargs: Any) -> SolverState:
        like, state = params, self._start(*self._checked(fun, params, args, kwargs), None)
        return state._replace(grad=complex_view(state.grad, like, conjugate=True))

    def _start(self, problem: Problem, params: Params, memory: Any) -> SolverState:
        value, grad, aux = problem.evaluate(params)
        dtype = scalar_dtype(params)
        extra, aux = self._extra(aux, jax.tree.map(jnp.zeros_like, params))
        error = _error(problem, params, grad).astype(dtype)
        one, zero = jnp.asarray(1), jnp.asarray(0)
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
            status=zero,
            num_fun_eval=one,
            num_grad_eval=one,
            stalled=zero,
            failures=zero,
            best_value=value,
            best_error=error,
            internal_state=memory,
            scale=_scale_of(grad) if self._scales(problem) else jnp.ones((), dtype),
            extra=extra,
        )
        return state._replace(status=self._status(params, state))

    def _scales(self, problem: Problem) -> bool:
        return self.rescales and problem.objective is None

    def _update(
        self,
        fun: Objective | None,
        params: Params,
        state: SolverState,
        args: Any,
        kwargs: Any,
        fresh: bool | None = None,
    ) -> OptStep:
        like, problem = params, self._at(fun, params, args, kwargs)
        params, state = (
            real_view(params),
            state._replace(grad=real_view(state.grad, conjugate=True)),
        )
        if problem.bounds is not None:
            given, params = params, jax.tree.map(jnp.clip, params, *problem.bounds)
            again = lambda: reevaluated(problem, params, state)  # noqa: E731
            state = jax.lax.cond(_differ(given, params), again, lambda: state)
        if fresh or (fresh is None and self.stochastic):
            state = reevaluated(problem, params, state)
        return _seen(*self._with_aux(problem, *self._advance(problem, params, state)), like)

    def _run(
        self, fun: Objective | None, params: Params, memory: Any, args: Any, kwargs: Any
    ) -> OptStep:
        like = params
        problem, params = self._checked(fun, params, args, kwargs)

        def find(params: Params) -> tuple[Params, SolverState]:
            first = (params, self._start(problem, params, memory))
            params, state = self._loop(lambda c: self._advance(problem, *c), first)
            return tuple(self._with_aux(problem, params, state))

        if not self.implicit_diff:
            return _seen(*find(params), like)
        guess, known = jax.lax.stop_gradient(params), None
        if not self.jit:  # a Python loop
            known = find(guess)
            leaves = jax.tree.leaves((known, args, kwargs))
            if not any(isinstance(x, jax.core.Tracer) for x in leaves):
                return _seen(*known, like)
            known = jax.lax.stop_gradient(known)
        found = implicit.root(
            lambda x: _optimality(problem, x, problem.evaluate(x)[1]),
            guess,
            find if known is None else lambda _: known,
            self.implicit_diff_solve or self.default_solve,
            symmetric=self.symmetric and problem.bounds is None,
        )
        return _seen(*found, like)

    def _loop(self, body: Any, first: tuple[Params, SolverState]) -> tuple[Params, SolverState]:
        running = lambda c: c[1].status == ResultCode.RUNNING  # noqa: E731
        if not self.jit:
            while bool(running(first)):
                first = body(first)
            return first
        if not self.unrolled:
            return jax.lax.while_loop(running, lambda c: tuple(body(c)), first)

        def step(c: Any, _: None) -> tuple[Any, None]:
            return jax.lax.cond(running(c), lambda c: tuple(body(c)), lambda c: c, c), None

        return jax.lax.scan(step, first, length=self.maxiter)[0]

    def _advance(self, problem: Problem, params: Params, state: SolverState) -> OptStep:
        """One update and its status; `aux` is stale where the optimizer did the evaluation."""
        params, state = self._before(problem, params, state)
        value, grad, there = state.value, state.grad, problem
        if self._scales(problem):
            there, value, grad = _scaled(problem, state.scale, value, grad)
        with jax.numpy_dtype_promotion("standard"):
            updates, inner = self.optimizer.update(
                grad,
                state.internal_state,
                params,
                reused=True,
                value=value,
                grad=grad,
                value_fn=there.value,
                **self._extras(there, params),
            )
            new = optax.apply_updates(params, updates)
        extra, aux = state.extra, state.aux
        if self.evaluates:
            value = (inner.value / state.scale.astype(inner.value.dtype)).astype(state.value.dtype)
            grad = tree.scale(1.0 / state.scale, inner.grad)
        else:
            value, grad, aux = problem.evaluate(new)
            extra, aux = self._extra(aux, updates)
        error = _error(problem, new, grad).astype(state.error.dtype)
        state = _accounted(state, inner, int(not self.evaluates))
        lower, smaller = _improvements(state, (params, inner), new, value, error)
        state = state._replace(
            iter_num=state.iter_num + 1,
            value=value,
            error=error,
            grad=grad,
            aux=aux,
            stalled=jnp.where(lower | smaller, 0, state.stalled + 1),
            best_value=jnp.where(lower, value, state.best_value),
            best_error=jnp.where(smaller, error, state.best_error),
            internal_state=inner,
            extra=extra,
        )
        state = state._replace(status=self._status(new, state))
        self._report(new, state)
        return OptStep(self._answer(new, state), state)

    def _status(self, params: Params, state: SolverState) -> jax.Array:
        """The stopping rules: the status of a run in this state."""
        finite = jnp.isfinite(state.value) & tree.all_finite(state.grad)
        failed = state.failures >= self.failures_allowed
        # No progress before the failures either: rounding hides what decrease there is.
        hidden = failed & (state.stalled > state.failures)
        code = jnp.asarray(ResultCode.RUNNING, jnp.int32)
        for holds, ending in (  # later rules take precedence
            (state.iter_num >= self.maxiter, ResultCode.MAX_ITERATIONS),
            (failed, ResultCode.LINE_SEARCH_FAILED),
            (hidden | (state.stalled >= self.patience), ResultCode.NO_PROGRESS),
            (self._converged(params, state), ResultCode.CONVERGED),
            (~finite, ResultCode.NOT_FINITE),
        ):
            code = jnp.where(holds, jnp.asarray(ending, jnp.int32), code)
        return code

    def _with_aux(self, problem: Problem, params: Params, state: SolverState) -> OptStep:
        """The step with `aux` at its own parameters, where the optimizer did the evaluation."""
        if self.evaluates and self.has_aux:
            state = state._replace(aux=problem.evaluate(params)[2])
        return OptStep(params, state)

    def _report(self, params: Params, state: SolverState) -> None:
        if self.verbose:
            row = (state.iter_num, state.value, state.error, state.stepsize, state.num_fun_eval)
            jax.debug.callback(_print_row, type(self).__name__, *row)
        if self.callback is not None:
            report = lambda p, s: self.callback(p, s)  # noqa: E731
            jax.debug.callback(report, params, state)

    def message(self, state: SolverState) -> str:
        """How the run that led to `state` ended, in words."""
        words = ResultCode(int(np.asarray(state.status))).words
        error, dtype = float(np.asarray(state.error)), jnp.result_type(state.value)
        return f"{words} (error {error:.3g}, tol {self.tol:.3g}, {dtype})"


def _scale_of(grad: Params) -> jax.Array:
    """1, or the power of two that brings a gradient near 1 whose square over- or underflows."""
    most = tree.largest(grad)
    limits = jnp.finfo(most.dtype)
    extreme = (most > 1e-4 * limits.max**0.5) | (most < 1e4 * limits.tiny**0.5)
    extreme &= (most > 0) & jnp.isfinite(most)
    power = jnp.clip(jnp.round(jnp.log2(jnp.where(extreme, most, 1.0))), limits.minexp, 120)
    return jnp.exp2(-power)


def _scaled(
    problem: Problem, scale: jax.Array, value: jax.Array, grad: Params
) -> tuple[Problem, jax.Array, Params]:
    """The problem times `scale`, with value and gradient."""
    own = problem.value_and_grad_fn

    def times(out: Any) -> Any:
        return scale.astype(out.dtype) * out

    def value_and_grad(params: Params) -> Any:
        assert own is not None
        f, g, aux = own(params)
        return times(f), tree.scale(scale, g), aux

    there = problem._replace(
        value=lambda params, **_: times(problem.value(params)),
        value_and_grad_fn=None if own is None else value_and_grad,
    )
    return there, times(value), tree.scale(scale, grad)


def reevaluated(problem: Problem, params: Params, state: SolverState) -> SolverState:
    """The state with value and gradient of these parameters and this problem."""
    value, grad, _ = problem.evaluate(params)
    calls = {"num_fun_eval": state.num_fun_eval + 1, "num_grad_eval": state.num_grad_eval + 1}
    return state._replace(value=value, grad=grad, **calls)


def _accounted(state: SolverState, inner: Any, evaluated: int) -> SolverState:
    """Step size, failures and evaluations after an update that led to the optimizer state `inner`.

    `evaluated` is 1 where the solver evaluated value and gradient at the new parameters itself.
    """
    after, before = diag.read(inner), diag.read(state.internal_state)
    count = state.num_fun_eval.dtype
    gradients = values = jnp.asarray(0, count)
    stepsize = jnp.full_like(state.stepsize, jnp.nan)
    failed = jnp.asarray(False)
    if after is not None and before is not None:
        gradients = (after.gradients - before.gradients).astype(count)
        values = (after.values - before.values).astype(count)
        stepsize = after.step_size.astype(stepsize.dtype)
        failed = after.termination == ResultCode.NO_DECREASE
    return state._replace(
        stepsize=stepsize,
        failures=jnp.where(failed, state.failures + 1, 0),
        num_fun_eval=state.num_fun_eval + gradients + values + evaluated,
        num_grad_eval=state.num_grad_eval + gradients + evaluated,
    )


def _improvements(
    state: SolverState, updated: tuple[Params, Any], new: Params, value: jax.Array, error: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether value and error improved by more than noise.

    For a first-order optimizer, whether anything changed: it may be slow, accumulate gradients or
    warm up. `updated` is the parameters before the update and the optimizer state after it.
    """
    params, inner = updated
    if diag.read(inner) is None:
        changed = _differ((params, state.internal_state), (new, inner))
        return changed, changed
    lower = value < state.best_value - noise_floor(value, new).astype(value.dtype)
    return lower, error < 0.95 * state.best_error


def _differ(a: PyTree, b: PyTree) -> jax.Array:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.any(jnp.stack([jnp.any(x != y) for x, y in pairs]))


def _optimality(problem: Problem, params: Params, grad: Params) -> PyTree:
    if problem.prox is not None:
        moved = problem.prox(jax.tree.map(jnp.subtract, params, grad), 1.0)
        return jax.tree.map(jnp.subtract, params, moved)
    if problem.bounds is None:
        return grad
    inside = lambda x, g, low, high: x - jnp.clip(x - g, low, high)  # noqa: E731
    return jax.tree.map(inside, params, grad, *problem.bounds)


def _seen(params: Params, state: SolverState, like: Params) -> OptStep:
    """The step as the caller sees it: with complex leaves where `like` has them."""
    grad = complex_view(state.grad, like, conjugate=True)
    return OptStep(complex_view(params, like), state._replace(grad=grad))


def _error(problem: Problem, params: Params, grad: Params) -> jax.Array:
    """`state.error`; a constant in derivatives, as a norm has none at 0."""
    return tree.scaled_norm(jax.lax.stop_gradient(_optimality(problem, params, grad)))


def _params_of(params: Any) -> Params:
    return params.params if isinstance(params, OptStep) else params


def _print_row(name: str, i: Any, value: Any, error: Any, step: Any, evaluations: Any) -> None:
    if int(i) == 1:
        print(f"{name}\n{'iteration':>9} {'value':>14} {'error':>12} {'step':>10} {'calls':>7}")
    step = "" if np.isnan(step) else f"{float(step):.3g}"
    print(f"{int(i):9d} {float(value):14.7g} {float(error):12.4g} {step:>10} {int(evaluations):7d}")


class Stepping(Iterative):
    """Solvers whose optimizers search along a direction.

    The keywords stepsize, linesearch, linesearch_init, stop_if_linesearch_fails, condition, maxls,
    decrease_factor, increase_factor, max_stepsize and min_stepsize are those of
    `jdl.solvers.steps.Steps`.
    """

    stepping = True
    evaluates = True

    def __init__(self, *args: Any, **options: Any):
        steps, others = split(options, STEPS)
        self.steps = Steps(**steps)
        vars(self).update(vars(self.steps))
        super().__init__(*args, **others)
        self.rescales = not self.steps.given
        self.failures_allowed = 1 if self.steps.stop_if_linesearch_fails else 2
