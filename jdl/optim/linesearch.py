r"""Line searches: how far to go along a direction d from θ.

With φ(α) = f(θ + α d), a step α satisfies the strong Wolfe conditions if

    φ(α) ≤ φ(0) + c₁ α φ'(0) + ε    and    |φ'(α)| ≤ c₂ |φ'(0)|

ε is the rounding noise of f. Near a minimum in float32 the decrease that c₁ requires is below that
noise, while slopes still have the right sign; with ε = 0 a search would zoom in on noise until its
evaluations are used up. Where two values differ by less than ε, only slopes decide.

Both searches are one `while_loop` with a single evaluation in its body: the model is compiled
once, and the loop ends after `max_evaluations` for any f. A trial whose value or slope is not
finite counts as too far.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.types import Params
from jdl.optim.diagnostics import Number
from jdl.optim.result import ResultCode


class Point(NamedTuple):
    """A trial on the line."""

    step: jax.Array  # α
    value: jax.Array  # φ(α)
    slope: jax.Array  # φ'(α)


class LineSearchResult(NamedTuple):
    """What a line search found."""

    step: jax.Array  # α; 0 if no trial decreased f enough
    value: jax.Array  # φ(α)
    slope: jax.Array  # φ'(α); NaN from `backtracking`, which uses values only
    grad: Params | None  # ∇f(θ + α d); None from `backtracking`
    evaluations: jax.Array  # how many points were tried, int32
    termination: jax.Array  # a `ResultCode` code, int32


class _State(NamedTuple):
    trial: jax.Array
    low: Point  # the best point so far; its slope points towards `high`
    high: Point  # the other end of the bracket; step inf while there is none
    width: jax.Array  # the bracket's, before the last trial
    grad: Params  # at `low`
    evaluations: jax.Array
    termination: jax.Array  # 0 while running


def strong_wolfe(
    value_and_grad: Callable[[Params], tuple[jax.Array, Params]],
    params: Params,
    direction: Params,
    value: jax.Array,
    grad: Params,
    *,
    initial_step: Number = 1.0,
    noise: Number = 0.0,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_evaluations: int = 20,
    max_step: Number = jnp.inf,
    active: jax.Array | bool = True,
    unrolled: bool = False,
) -> LineSearchResult:
    """A step that satisfies the strong Wolfe conditions, by bracketing and zooming.

    The first trials go outwards until a bracket is found, then the bracket shrinks; each new trial
    is the minimizer of the cubic through its ends' values and slopes (of the parabola through
    their slopes where the values differ by noise alone), kept off the ends, and the midpoint where
    two trials failed to shrink the bracket by a third.

    Args:
      value_and_grad: params -> (f, ∇f).
      params: θ.
      direction: d; no step is taken unless ⟨∇f(θ), d⟩ < 0.
      value: f(θ).
      grad: ∇f(θ).
      initial_step: the first trial, > 0.
      noise: ε, the rounding noise of f, ≥ 0.
      c1: sufficient decrease, 0 < c₁ < c₂.
      c2: curvature, c₁ < c₂ < 1; the smaller, the closer to the line's minimum.
      max_evaluations: maximum trials, ≥ 1; after them the best point so far is taken.
      max_step: the longest step, > 0.
      active: False to do nothing, and take step 0.
      unrolled: True for a loop of `max_evaluations` trials that reverse mode can differentiate.

    Returns:
      The step, with value and gradient there.

    >>> quadratic = jax.value_and_grad(lambda x: jnp.sum(jnp.square(x)))
    >>> x = jnp.array([3.0])
    >>> found = strong_wolfe(quadratic, x, -x, *quadratic(x), initial_step=0.1, c2=0.1)
    >>> round(float(found.step), 3), bool(jnp.abs(found.grad[0]) < 1e-3)
    (1.0, True)

    References:
      Nocedal & Wright, Numerical Optimization (2006), algorithms 3.5 and 3.6.
      Hager & Zhang, A new conjugate gradient method (2005), section 4: values against noise.
      Moré & Thuente, Line search algorithms with guaranteed sufficient decrease (1994), section 4.
    """
    dtype = value.dtype
    slope0 = tree.vdot(grad, direction).astype(dtype)
    noise = jnp.asarray(noise, dtype)
    start = Point(jnp.zeros((), dtype), value, slope0)
    nowhere = Point(*(jnp.full((), jnp.inf, dtype) for _ in range(3)))
    resolution = _resolution(params, direction, dtype)
    possible = jnp.asarray(active) & jnp.isfinite(value) & jnp.isfinite(slope0) & (slope0 < 0)
    initial = _State(
        trial=jnp.minimum(jnp.asarray(initial_step), max_step).astype(dtype),
        low=start,
        high=nowhere,
        width=nowhere.step,
        grad=grad,
        evaluations=jnp.zeros((), jnp.int32),
        termination=jnp.where(possible, 0, ResultCode.NO_DECREASE).astype(jnp.int32),
    )

    def body(s: _State) -> _State:
        f, g = value_and_grad(tree.add_scaled(params, s.trial, direction))
        f = f.astype(dtype)
        new = Point(s.trial, f, tree.vdot(g, direction).astype(dtype))
        finite = jnp.isfinite(new.value) & jnp.isfinite(new.slope)
        new = Point(new.step, *(jnp.where(finite, x, jnp.inf) for x in new[1:]))

        too_high = new.value > value + c1 * new.step * slope0 + noise
        too_high |= new.value > s.low.value + noise
        accepted = ~too_high & (jnp.abs(new.slope) <= -c2 * slope0)
        # Past a minimum as seen from `low`: the slope at the new point leads back to it.
        past = new.slope * (s.high.step - s.low.step) >= 0
        bracketed = jnp.isfinite(s.high.step)
        high = tree.where(too_high, new, tree.where(past, s.low, s.high))
        low = tree.where(too_high, s.low, new)

        inside = _smooth(_between, low, high, s.width, noise)
        outside = _smooth(_beyond, s.low, new, noise)
        outside = jnp.minimum(outside, max_step).astype(dtype)
        trial = jnp.where(jnp.isfinite(high.step), inside, outside)
        width = jnp.abs(high.step - low.step)
        tiny = 4 * jnp.finfo(dtype).eps * jnp.maximum(low.step, high.step)
        tiny = jnp.maximum(tiny, resolution)
        evaluations = s.evaluations + 1
        stuck = (evaluations >= max_evaluations) | (trial == new.step)
        stuck |= jnp.isfinite(width) & (width <= tiny)
        best = jnp.where(low.step > 0, ResultCode.DECREASE_ONLY, ResultCode.NO_DECREASE)
        termination = jnp.where(accepted, ResultCode.ACCEPTED, jnp.where(stuck, best, 0))
        return _State(
            trial=trial,
            low=low,
            high=high,
            width=jnp.where(bracketed, jnp.abs(s.high.step - s.low.step), jnp.inf),
            grad=tree.where(too_high, s.grad, g),
            evaluations=evaluations,
            termination=termination.astype(jnp.int32),
        )

    searching = lambda s: s.termination == 0  # noqa: E731
    if unrolled:
        step = lambda s, _: (jax.lax.cond(searching(s), body, lambda s: s, s), None)  # noqa: E731
        end = jax.lax.scan(step, initial, length=max_evaluations)[0]
    else:
        end = jax.lax.while_loop(searching, body, initial)
    return LineSearchResult(*end.low, end.grad, end.evaluations, end.termination)


def backtracking(
    value_fn: Callable[[Params], jax.Array],
    params: Params,
    direction: Params,
    value: jax.Array,
    slope: jax.Array,
    *,
    initial_step: Number = 1.0,
    first_value: jax.Array | None = None,
    noise: Number = 0.0,
    c1: float = 1e-4,
    shrink: float = 0.5,
    max_evaluations: int = 30,
    active: jax.Array | bool = True,
) -> LineSearchResult:
    """The first of the steps α₀, α₀ r, α₀ r², … with φ(α) ≤ φ(0) + c₁ α φ'(0) + ε (Armijo).

    Args:
      value_fn: params -> f.
      params: θ.
      direction: d; no step is taken unless `slope` < 0.
      value: f(θ).
      slope: φ'(0) = ⟨∇f(θ), d⟩.
      initial_step: α₀ > 0.
      first_value: φ(α₀) if already evaluated; if not finite, α₀ is not accepted.
      noise: ε ≥ 0.
      c1: sufficient decrease, 0 < c₁ < 1.
      shrink: r, 0 < r < 1.
      max_evaluations: maximum trials, ≥ 1.
      active: False to do nothing, and take step 0.

    >>> f = lambda x: jnp.sum(jnp.square(x))
    >>> x = jnp.array([3.0])
    >>> float(backtracking(f, x, -10.0 * x, f(x), jnp.asarray(-180.0)).step)
    0.125

    References:
      Nocedal & Wright, Numerical Optimization (2006), algorithm 3.1.
    """
    dtype = value.dtype
    slope = slope.astype(dtype)
    noise = jnp.asarray(noise, dtype)
    known = int(first_value is not None)
    possible = jnp.asarray(active) & jnp.isfinite(value) & jnp.isfinite(slope) & (slope < 0)

    def enough(step: jax.Array, at: jax.Array) -> jax.Array:
        # A decrease below the noise cannot be seen; a rise above it is refused.
        return (at <= value + c1 * step * slope + noise) & jnp.isfinite(at)

    first = jnp.asarray(initial_step).astype(dtype)
    before = jnp.full((), jnp.nan, dtype) if first_value is None else first_value.astype(dtype)

    class Carry(NamedTuple):
        tried: jax.Array
        step: jax.Array
        value: jax.Array

    def going(c: Carry) -> jax.Array:
        return possible & ~enough(c.step, c.value) & (c.tried < max_evaluations + known)

    def body(c: Carry) -> Carry:
        step = jnp.where(c.tried == 0, first, shrink * c.step)
        at = value_fn(tree.add_scaled(params, step, direction)).astype(dtype)
        return Carry(c.tried + 1, step, at)

    end = jax.lax.while_loop(going, body, Carry(jnp.asarray(known, jnp.int32), first, before))
    found = possible & enough(end.step, end.value)
    code = jnp.where(found, ResultCode.ACCEPTED, ResultCode.NO_DECREASE)
    return LineSearchResult(
        step=jnp.where(found, end.step, 0.0),
        value=jnp.where(found, end.value, value),
        slope=jnp.full((), jnp.nan, dtype),
        grad=None,
        evaluations=end.tried - known,
        termination=code.astype(jnp.int32),
    )


def _resolution(params: Params, direction: Params, dtype: Any) -> jax.Array:
    """The longest step that moves no parameter by more than a rounding error."""
    spacing = jax.tree.map(lambda x: jnp.finfo(x.dtype).eps * jnp.abs(x), params)

    def shortest(spacing: jax.Array, d: jax.Array) -> jax.Array:
        steps = jnp.where(d == 0, jnp.inf, spacing / jnp.where(d == 0, 1.0, jnp.abs(d)))
        return jnp.min(steps, initial=jnp.inf)

    found = [shortest(*pair) for pair in tree.packed(dtype, spacing, direction)]
    return jax.lax.cummin(jnp.stack(found))[-1]  # for XLA no chain of operations: see `tree`


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _smooth(formula: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """`formula(*args)`, all scalars, with derivatives of 0 where they are not finite.

    Without this a formula that does not apply, at an end that is infinite, would spoil the
    derivative of the one that does.
    """
    return formula(*args)


@_smooth.defjvp
def _smooth_jvp(formula: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    slopes = jax.grad(lambda args: formula(*args))(primals)
    slopes = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), slopes)
    return formula(*primals), tree.vdot(slopes, tangents).astype(primals[-1].dtype)


def _minimizer(a: Point, b: Point, noise: jax.Array) -> jax.Array:
    """Where the cubic through two points' values and slopes has its minimum; NaN if nowhere."""
    h = b.step - a.step
    secant = a.step - a.slope * h / (b.slope - a.slope)
    d1 = a.slope + b.slope - 3 * (b.value - a.value) / h
    largest = jnp.maximum(jnp.abs(d1), jnp.maximum(jnp.abs(a.slope), jnp.abs(b.slope)))
    unit = jnp.maximum(largest, jnp.finfo(d1.dtype).tiny)  # squares of slopes may overflow
    square = jnp.square(d1 / unit) - (a.slope / unit) * (b.slope / unit)
    d2 = jnp.sign(h) * unit * jnp.sqrt(jnp.maximum(square, 0.0))
    cubic = b.step - h * (b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)
    cubic = jnp.where(square >= 0, cubic, jnp.nan)
    # The cubic amplifies errors in values; where they are a tenth of the difference, use slopes.
    return jnp.where(jnp.abs(b.value - a.value) > 10 * noise, cubic, secant)


def _between(low: Point, high: Point, last_width: jax.Array, noise: jax.Array) -> jax.Array:
    """The next trial inside the bracket."""
    h = high.step - low.step
    at = (_minimizer(low, high, noise) - low.step) / h
    at = jnp.clip(jnp.where(jnp.isfinite(at), at, 0.5), 0.1, 0.9)
    at = jnp.where(jnp.abs(h) > 0.66 * last_width, 0.5, at)
    # An infinite value gives no information: shrink tenfold instead of by half.
    at = jnp.where(jnp.isfinite(high.value), at, 0.1)
    return low.step + at * h


def _beyond(last: Point, new: Point, noise: jax.Array) -> jax.Array:
    """The next trial outside, when f still falls at the newest point."""
    h = new.step - last.step
    at = _minimizer(last, new, noise)
    # No minimum ahead (the slope grows steeper): as far as allowed.
    at = jnp.where(jnp.isfinite(at) & (at > new.step), at, jnp.inf)
    return jnp.clip(at, new.step + 0.1 * h, new.step + 4.0 * h)
