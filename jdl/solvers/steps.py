"""How far to go along a direction, in jaxopt's words, for LBFGS, LBFGSB, NonlinearCG and BFGS."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import check, tree
from jdl.core.types import PyTree
from jdl.optim.context import UpdateContext
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.linesearch import LineSearchResult
from jdl.optim.result import ResultCode
from jdl.optim.transformation import Search, wolfe

CONDITIONS = ["strong-wolfe", "wolfe", "armijo", "goldstein"]
WOLFE = ["zoom", "hager-zhang", "hager_zhang"]


@dataclasses.dataclass(frozen=True)
class BacktrackingLineSearch:
    """The first of the steps α₀, α₀ r, α₀ r² … that satisfies `condition`; else the last trial.

    For a solver's `linesearch`, whose own function counts: value_and_grad, has_aux, tol, verbose,
    jit and unroll are accepted, as by jaxopt's class, and have no effect.

    Args:
      fun: not used.
      maxiter: maximum number of trials.
      condition: "strong-wolfe", "wolfe", "armijo" or "goldstein".
      c1: sufficient decrease.
      c2: curvature.
      decrease_factor: r, in (0, 1).
      max_stepsize: the longest step.

    >>> from jdl.solvers import LBFGS
    >>> search = BacktrackingLineSearch(condition="armijo", decrease_factor=0.5)
    >>> f = lambda x: jnp.sum(jnp.square(x - 1.0))
    >>> LBFGS(f, linesearch=search).run(jnp.zeros(2)).params.tolist()
    [1.0, 1.0]
    """

    fun: Any = None
    value_and_grad: Any = False
    has_aux: bool = False
    maxiter: int = 30
    tol: float = 0.0
    condition: str = "strong-wolfe"
    c1: float = 1e-4
    c2: float = 0.9
    decrease_factor: float = 0.8
    max_stepsize: float = 1.0
    verbose: Any = False
    jit: Any = "auto"
    unroll: Any = "auto"

    def __post_init__(self) -> None:
        check.one_of("condition", self.condition, CONDITIONS)

    def find(self, ctx: UpdateContext, direction: PyTree, first: jax.Array) -> LineSearchResult:
        """The search from the step `first`."""
        by_value = self.condition in ("armijo", "goldstein")
        before = tree.vdot(ctx.grad, direction).astype(ctx.dtype)

        def fits(at: LineSearchResult) -> jax.Array:
            after = tree.vdot(at.grad, direction).astype(ctx.dtype)
            good = at.value <= ctx.value + self.c1 * at.step * before + ctx.noise
            if self.condition == "strong-wolfe":
                good &= jnp.abs(after) <= -self.c2 * before
            elif self.condition == "wolfe":
                good &= after >= self.c2 * before
            elif self.condition == "goldstein":
                good &= at.value >= ctx.value + (1 - self.c1) * at.step * before - ctx.noise
            return good

        def going(at: LineSearchResult) -> jax.Array:
            return ctx.active & ~fits(at) & (at.evaluations < self.maxiter)

        def body(at: LineSearchResult) -> LineSearchResult:
            step = jnp.where(at.evaluations == 0, at.step, self.decrease_factor * at.step)
            new = tree.add_scaled(ctx.params, step, direction)
            value, grad = (ctx.value_fn(new), ctx.grad) if by_value else ctx.value_and_grad(new)
            tried = at.evaluations + 1
            return at._replace(step=step, value=value, grad=grad, evaluations=tried)

        unknown, none = jnp.full((), jnp.inf, ctx.dtype), jnp.zeros((), jnp.int32)
        first = jnp.minimum(first, self.max_stepsize).astype(ctx.dtype)
        start = LineSearchResult(first, unknown, unknown, ctx.grad, none, none)
        end = jax.lax.while_loop(going, body, start)
        if by_value:
            new = tree.add_scaled(ctx.params, end.step, direction)
            end = end._replace(grad=ctx.value_and_grad(new)[1])
        lower = ctx.active & (end.value <= ctx.value + ctx.noise)
        code = jnp.where(fits(end), ResultCode.ACCEPTED, ResultCode.DECREASE_ONLY)
        code = jnp.where(lower, code, ResultCode.NO_DECREASE).astype(jnp.int32)
        moved = ctx.active & jnp.isfinite(end.value)
        return end._replace(step=jnp.where(moved, end.step, 0.0), termination=code)


@dataclasses.dataclass(frozen=True)
class Steps:
    """How long the steps of LBFGS, LBFGSB, NonlinearCG and BFGS are.

    Attributes:
      stepsize: the length in units of the direction, > 0, or a function of the iteration's number;
        0, the default, for a line search.
      linesearch: "zoom", the default, or "hager-zhang": strong Wolfe conditions, with a care for
        rounding noise; "backtracking", or a `BacktrackingLineSearch`.
      linesearch_init: where a search begins: "max", "current", the last step, or "increase", the
        last one times `increase_factor`. None, the default, for the method's own choice; for
        backtracking that is "increase".
      stop_if_linesearch_fails: whether the first failed search ends the run; if not, one along
        −gradient is tried. Default False.
      condition: what backtracking looks for. Default "strong-wolfe".
      maxls: maximum trials of a search. Default 30.
      decrease_factor: the ratio of backtracking's trials. Default 0.8; ½ within bounds.
      increase_factor: see `linesearch_init`. Default 1.5.
      max_stepsize: the longest step, and the first trial; None, the default, for a first trial of 1
        that may grow.
      min_stepsize: a last step of at most this is followed by `max_stepsize`. Default 1e-6.

    >>> Steps(linesearch="backtracking").asked
    True
    """

    stepsize: float | Callable[[Any], Any] = 0.0
    linesearch: Any = "zoom"
    linesearch_init: str | None = None
    stop_if_linesearch_fails: bool = False
    condition: str | None = None
    maxls: int = 30
    decrease_factor: float | None = None
    increase_factor: float = 1.5
    max_stepsize: float | None = None
    min_stepsize: float = 1e-6

    def __post_init__(self) -> None:
        if not isinstance(self.linesearch, BacktrackingLineSearch):
            check.one_of("linesearch", self.linesearch, [*WOLFE, "backtracking"])
        if self.linesearch_init is not None:
            check.one_of("linesearch_init", self.linesearch_init, ["max", "current", "increase"])
        if self.condition is not None:
            check.one_of("condition", self.condition, CONDITIONS)
        check.positive_int("maxls", self.maxls)
        for name in ("max_stepsize", "increase_factor", "decrease_factor"):
            if getattr(self, name) is not None:
                check.in_range(name, getattr(self, name), 0.0, open_low=True)

    @property
    def given(self) -> bool:
        """Whether there are steps of given length, not a search."""
        return callable(self.stepsize) or self.stepsize > 0

    @property
    def first(self) -> float:
        """A first trial step."""
        return self.max_stepsize or 1.0

    @property
    def asked(self) -> bool:
        """Whether any option asks for more than the method's own search."""
        names = ("linesearch", "linesearch_init", "condition", "decrease_factor", "max_stepsize")
        return self.given or any(getattr(self, n) != getattr(Steps, n) for n in names)

    def search(self, unrolled: bool) -> Search:
        """The search; `unrolled` where derivatives are to pass through it."""
        if self.linesearch == "zoom" and not self.given:
            return functools.partial(self._found, unrolled=True) if unrolled else self._found
        return constant(self._found) if unrolled and not self.given else self._found

    def start(self, own: jax.Array, last: Diagnostics) -> jax.Array:
        """A search's first trial; `own` is the method's, `last` the diagnostics before."""
        way = self.linesearch_init or ("own" if self.linesearch in WOLFE else "increase")
        longest = jnp.full_like(own, self.first)
        step = jnp.where(last.iterations == 0, longest, last.step_size.astype(own.dtype))
        grown = jnp.where(step <= self.min_stepsize, longest, self.increase_factor * step)
        current = jnp.where(step > 0, step, longest)
        return {"own": own, "max": longest, "current": current, "increase": grown}[way]

    def length(self, last: Diagnostics) -> Any:
        """The given length of the next step."""
        return self.stepsize(last.iterations) if callable(self.stepsize) else self.stepsize

    def _found(
        self, ctx: UpdateContext, direction: PyTree, own: jax.Array, last: Any, **limits: Any
    ) -> LineSearchResult:
        if self.given:
            step = jnp.where(ctx.active, self.length(last), 0.0).astype(ctx.dtype)
            value, grad = ctx.value_and_grad(tree.add_scaled(ctx.params, step, direction))
            one = jnp.ones((), jnp.int32)
            return LineSearchResult(step, value, jnp.full_like(value, jnp.nan), grad, one, one)
        first = self.start(own, last)
        if self.linesearch in WOLFE:
            bounded = self.max_stepsize is not None and self.linesearch == "zoom"
            longest = self.first if bounded else jnp.inf
            return wolfe(ctx, direction, first, max_step=longest, **limits)
        search = self.linesearch
        if search == "backtracking":
            search = BacktrackingLineSearch(
                maxiter=self.maxls,
                condition=self.condition or "strong-wolfe",
                decrease_factor=self.decrease_factor or 0.8,
                max_stepsize=self.first,
            )
        return search.find(ctx, direction, first)


def constant(search: Search) -> Search:
    """`search` with steps that count as constants in derivatives, which do not pass its loop."""

    def still(ctx: UpdateContext, direction: PyTree, *rest: Any, **limits: Any) -> LineSearchResult:
        fixed = jax.lax.stop_gradient
        there = ctx._replace(
            value_fn=lambda p: fixed(ctx.value_fn(p)),
            value_and_grad=lambda p: fixed(ctx.value_and_grad(p)),
            **{name: fixed(getattr(ctx, name)) for name in ("params", "value", "grad", "noise")},
        )
        found = search(there, fixed(direction), *fixed(rest), **limits)
        step = fixed(found.step)
        value, grad = ctx.value_and_grad(tree.add_scaled(ctx.params, step, direction))
        return found._replace(step=step, value=value, grad=grad)

    return still
