r"""L-BFGS in a box l ≤ x ≤ u, by two-metric projection.

    A = {i : xᵢ at a bound, −gᵢ pointing out of the box}      d_A = 0,   d_F = −H_FF g_F
    x(α) = P(x + α d),   the first of α = 1, ½, ¼ … with f(x(α)) ≤ f(x) + c₁ ⟨g, x(α) − x⟩

P clips to the box. Variables in A stay fixed; H_FF is L-BFGS's inverse Hessian on the free ones,
built from the pairs' free coordinates alone, so that d and, for small α, P(x + α d) descend.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.context import UpdateContext, gather, scalar_dtype
from jdl.optim.diagnostics import Diagnostics
from jdl.optim.result import ResultCode

C1 = 1e-4  # sufficient decrease
CAUTIOUS = 1e-6  # pairs of less curvature ⟨s, y⟩ / ‖s‖ ‖y‖ are skipped


class BoxState(NamedTuple):
    """The state of `projected_lbfgs`, for n parameters raveled into one array."""

    s: jax.Array  # steps, [m, n], newest first
    y: jax.Array  # gradient differences, [m, n]
    value: jax.Array  # f after the last update
    grad: Params  # ∇f there
    diagnostics: Diagnostics  # see `jdl.optim.diagnostics`


class _Trial(NamedTuple):
    step: jax.Array
    params: Params
    value: jax.Array
    grad: Params
    tried: jax.Array
    good: jax.Array


def projected_lbfgs(
    learning_rate: float = 1.0,
    *,
    memory_size: int = 10,
    max_evaluations: int = 30,
    use_gamma: bool = True,
    shrink: float = 0.5,
    first_step: Callable[[jax.Array, Diagnostics], jax.Array] | None = None,
    stepsize: Callable[[Diagnostics], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """L-BFGS whose updates stay in a box, given to `update` as `bounds=(lower, upper)`.

    `learning_rate` is the line search's first trial step, `max_evaluations` its maximum of trials,
    `shrink` their ratio; `first_step` changes the first one, `stepsize` gives a length instead of a
    search, each by the diagnostics before. Without `use_gamma` H₀ = I.

    References:
      Bertsekas, Projected Newton methods for optimization problems with simple constraints (1982).
      Kim, Sra & Dhillon, Tackling box-constrained optimization via a new projected quasi-Newton
      approach (2010).
    """

    def init(params: Params) -> BoxState:
        flat = ravel_pytree(params)[0]
        return BoxState(
            s=jnp.zeros((memory_size, flat.size), flat.dtype),
            y=jnp.zeros((memory_size, flat.size), flat.dtype),
            value=jnp.full((), jnp.inf, scalar_dtype(params)),
            grad=jax.tree.map(jnp.zeros_like, params),
            diagnostics=diag.init(),
        )

    def update(
        updates: PyTree,
        state: BoxState,
        params: Params | None = None,
        *,
        bounds: Any = None,
        reused: Any = False,
        **extras: Any,
    ) -> tuple[PyTree, BoxState]:
        here = gather("projected_lbfgs", updates, params, **extras)
        dtype = here.value.dtype
        x, unravel = ravel_pytree(here.params)
        gradient = ravel_pytree(here.grad)[0]
        lower, upper = (ravel_pytree(b)[0] for b in bounds)
        free = ~(((x <= lower) & (gradient > 0)) | ((x >= upper) & (gradient < 0)))
        s, y = (jnp.where(free[None], ring, 0.0) for ring in (state.s, state.y))
        downhill = -jnp.where(free, gradient, 0.0)
        direction, scaled = _inverse_product(s, y, downhill, use_gamma)
        descends = (jnp.vdot(direction, downhill) > 0) & jnp.all(jnp.isfinite(direction))
        direction = jnp.where(descends, direction, downhill)
        length = jnp.linalg.norm(direction).astype(dtype)
        rate = jnp.asarray(learning_rate, dtype)
        # Without curvature −g has no scale of its own.
        first = jnp.where(scaled & descends, rate, rate / jnp.maximum(1.0, length))
        active = here.finite & (length > 0)
        if first_step is not None:
            first = first_step(first, state.diagnostics)
        trials = (max_evaluations, shrink)
        if stepsize is not None:
            first, trials = jnp.asarray(stepsize(state.diagnostics), dtype), (1, -jnp.inf)
        end = _projected_search(here, direction, (lower, upper), first, trials, active)
        s = jnp.where(end.good, ravel_pytree(end.params)[0] - x, 0.0)
        y = jnp.where(end.good, ravel_pytree(end.grad)[0] - gradient, 0.0)
        lost = active & ~end.good  # after a failure the history is dropped
        code = jnp.where(end.good, ResultCode.ACCEPTED, ResultCode.NO_DECREASE)
        new = BoxState(
            s=jnp.where(lost, 0.0, _pushed(state.s, s, end.good)),
            y=jnp.where(lost, 0.0, _pushed(state.y, y, end.good)),
            value=jnp.where(end.good, end.value, here.value),
            grad=tree.where(end.good, end.grad, here.grad),
            diagnostics=diag.advance(
                state.diagnostics,
                step_size=jnp.where(end.good, end.step, 0.0),
                termination=diag.ending(code, here.finite, length == 0, descends),
                gradients=end.tried,
                reused=reused,
            ),
        )
        return unravel(s), new

    return optax.GradientTransformationExtraArgs(init, update)


def _projected_search(
    here: UpdateContext,
    direction: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    first: jax.Array,
    trials: tuple[int, float],
    active: jax.Array,
) -> _Trial:
    """Backtracking along P(x + α d) from the step `first`; direction and bounds are raveled.

    `trials` is their maximum and their ratio; of a ratio −∞ the first one is taken as it is.
    """
    most, shrink = trials
    dtype = here.value.dtype
    x, unravel = ravel_pytree(here.params)
    gradient = ravel_pytree(here.grad)[0]

    def body(t: _Trial) -> _Trial:
        step = jnp.where(t.tried == 0, first, shrink * t.step)
        new = jnp.clip(x + step.astype(x.dtype) * direction, *bounds)
        slope = jnp.vdot(gradient, new - x).astype(dtype)
        value, grad = here.value_and_grad(unravel(new))
        good = (value <= here.value + C1 * slope + here.noise) & (slope < 0)
        good = (good | (shrink < 0)) & tree.all_finite(grad)
        return _Trial(step, unravel(new), value, grad, t.tried + 1, good)

    none, false = jnp.zeros((), jnp.int32), jnp.asarray(False)
    start = _Trial(jnp.zeros((), dtype), here.params, here.value, here.grad, none, false)
    return jax.lax.while_loop(lambda t: active & ~t.good & (t.tried < most), body, start)


def check_order(bounds: Any) -> None:
    """Refuses a lower bound above its upper one, where both are concrete and of one shape."""
    lower, upper = (jax.tree.leaves(b) for b in bounds)
    count = max(len(lower), len(upper))
    lower, upper = (b * count if len(b) == 1 else b for b in (lower, upper))
    for low, high in zip(lower, upper, strict=False):
        if isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer):
            continue
        low, high = (np.asarray(b, np.float64) for b in (low, high))
        if low.ndim and high.ndim and low.shape != high.shape:
            continue
        low, high = np.broadcast_arrays(low, high)
        wrong = ~(low <= high)
        if wrong.any():
            a, b = float(low[wrong][0]), float(high[wrong][0])
            check.argument(False, "bounds' lower", f"at most the upper, {b}", a)


def fitted(bounds: tuple[Any, Any], params: Params) -> tuple[Params, Params]:
    """(lower, upper) as pytrees of arrays like the parameters.

    >>> fitted((0.0, [1.0, jnp.inf]), [jnp.zeros(2), jnp.zeros(1)])[1]
    [Array([1., 1.], dtype=float32), Array([inf], dtype=float32)]
    """
    ok = isinstance(bounds, tuple | list) and len(bounds) == 2
    check.argument(ok, "bounds", "a pair (lower, upper)", bounds)

    def fit(side: str, bound: Any) -> Params:
        if isinstance(bound, int | float) or getattr(bound, "ndim", None) == 0:
            return jax.tree.map(lambda x: jnp.full(x.shape, bound, x.dtype), params)
        structure: Any = jax.tree.structure(params)
        given = jax.tree.structure(bound)
        must = f"a number or a pytree of the parameters' structure, {structure}"
        check.argument(given == structure, f"bounds' {side}", must, given)

        def leaf(x: jax.Array, b: Any) -> jax.Array:
            shape = jnp.shape(b)
            ok = shape in ((), x.shape)
            check.argument(ok, f"bounds' {side}", f"of a parameter's shape {x.shape}", shape)
            return jnp.broadcast_to(jnp.asarray(b).astype(x.dtype), x.shape)

        return jax.tree.map(leaf, params, bound)

    return fit("lower", bounds[0]), fit("upper", bounds[1])


def _inverse_product(
    s: jax.Array, y: jax.Array, g: jax.Array, use_gamma: bool
) -> tuple[jax.Array, jax.Array]:
    """H g by the two-loop recursion, newest pair first; and whether any pair was usable."""
    sy, ss, yy = (jnp.einsum("mn,mn->m", a, b) for a, b in ((s, y), (s, s), (y, y)))
    good = (sy > CAUTIOUS * jnp.sqrt(ss) * jnp.sqrt(yy)) & jnp.isfinite(1.0 / sy)
    rho = jnp.where(good, 1.0 / jnp.where(good, sy, 1.0), 0.0)

    def down(q: jax.Array, pair: Any) -> tuple[jax.Array, jax.Array]:
        s, y, rho = pair
        alpha = rho * jnp.vdot(s, q)
        return q - alpha * y, alpha

    def up(r: jax.Array, pair: Any) -> tuple[jax.Array, None]:
        s, y, rho, alpha = pair
        return r + (alpha - rho * jnp.vdot(y, r)) * s, None

    q, alpha = jax.lax.scan(down, g, (s, y, rho))
    newest = jnp.argmax(good)
    scale = jnp.where(good[newest], sy[newest] / jnp.where(good[newest], yy[newest], 1.0), 1.0)
    scale = scale if use_gamma else jnp.ones_like(scale)
    r, _ = jax.lax.scan(up, scale * q, (s, y, rho, alpha), reverse=True)
    return r, jnp.any(good)


def _pushed(ring: jax.Array, x: jax.Array, wanted: jax.Array) -> jax.Array:
    return jnp.where(wanted, jnp.concatenate([x[None], ring[:-1]]), ring)
