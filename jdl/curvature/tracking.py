r"""The largest curvature along training, of the loss and as the optimizer sees it.

Gradient descent at rate η leaves a minimum of curvature λ > 2/η; a step −η M g does where an
eigenvalue of M H is larger. With M = L Lᵀ those are the eigenvalues of the symmetric Lᵀ H L.

    Adam      M⁻¹ = (1 − β₁ᵗ) (√(ν / (1 − β₂ᵗ)) + ε)      stable up to (2 + 2β₁) / ((1 − β₁) η)
    RMSprop   M⁻¹ = √(ν + ε)                              2/η
    K-FAC     M⁻¹ = (A + π√λ I) ⊗ (G + √λ/π I), or EKFAC's
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.derivatives import linearize
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.curvature.kronecker import Rotation, rotation
from jdl.curvature.landscape import Landscape, landscape_of, params_of
from jdl.curvature.operators import Operator
from jdl.optim.kfac import KfacState
from jdl.optim.kronecker import inverses
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.moments import find_layers

STATES = (optax.ScaleByAdamState, optax.ScaleByRmsState, KfacState)


class SharpnessTracker:
    """λmax of the Hessian and of `preconditioned`, each sought from the last eigenvector.

    Where that still holds, it takes one product. Another eigenvector may overtake it unnoticed for
    a few measurements. For an `Objective` both are one compiled function. Where a product is not
    finite, so is the value.

    Args:
      tolerance: on the residual relative to the eigenvalue, whose error is about its square.
      max_products: for one eigenvalue.
      **options: b1, b2 and eps of `preconditioned`.

    >>> data, loss = {"x": jnp.eye(2)}, lambda out, batch: 0.5 * out**2
    >>> objective = Objective.from_fns(lambda w, batch: batch["x"] @ w, loss, data)
    >>> track, params, adam = SharpnessTracker(tolerance=1e-3), jnp.ones(2), optax.adam(0.1)
    >>> with jax.numpy_dtype_promotion("standard"):
    ...     _, state = adam.update(params, adam.init(params))
    >>> {name: round(value, 3) for name, value in track(objective, params, state).items()}
    {'sharpness': 0.5, 'preconditioned_sharpness': 5.0}

    References:
      Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability
      (2021); Adaptive gradient methods at the edge of stability (2022).
    """

    def __init__(self, *, tolerance: float = 0.2, max_products: int = 30, **options: float):
        self._tolerance, self._most, self._options = tolerance, max_products, options
        self._last: dict[str, Any] = {}

    def __call__(
        self, of: Landscape | Objective, params: Params | None = None, opt_state: Any = None
    ) -> dict[str, float]:
        """Both values; the second where the optimizer's preconditioner is known."""
        state, params = _known(opt_state), params_of(of, params)
        rest = state, self._last, (self._tolerance, self._most), self._options
        if isinstance(of, Objective):
            found = _of_objective(of, params, *rest)
        else:
            flat = lambda v: of.product("hessian", ravel_pytree(v)[0])  # noqa: E731
            push = lambda v: of.unravel(jnp.asarray(flat(v)))  # noqa: E731
            found = _tops(push, next(of.objectives()), params, *rest)
        values = {name: float(theta) for name, (theta, _) in found.items()}
        self._last = {name: found[name][1] for name, value in values.items() if np.isfinite(value)}
        return values


def preconditioned(
    of: Landscape | Objective,
    opt_state: Any,
    params: Params | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Operator:
    """Lᵀ H L, with L Lᵀ the optimizer's preconditioner.

    Args:
      of: a `Landscape`, which has its own parameters, or a `jdl.Objective`.
      opt_state: of Adam or its kin, RMSprop, or K-FAC; wrapped or not.
      params: a pytree of floating-point arrays.
      b1: Adam's, as b2.
      b2: likewise.
      eps: Adam's or RMSprop's.

    >>> data, loss = {"x": jnp.eye(2)}, lambda out, batch: 0.5 * out**2
    >>> objective = Objective.from_fns(lambda w, batch: batch["x"] @ w, loss, data)
    >>> state = optax.ScaleByRmsState(nu=jnp.array([1.0, 4.0]))
    >>> preconditioned(objective, state, jnp.ones(2)).dense().round(3).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    land, state = landscape_of(of, params), _known(opt_state)
    must = "one with the state of Adam, RMSprop or K-FAC"
    check.argument(state is not None, "opt_state", must, type(opt_state).__name__)
    root = _root_of(state, next(land.objectives()), land.params, b1=b1, b2=b2, eps=eps)
    flat, of_flat = ravel_pytree(root.coordinates)
    scale = np.asarray(flat)
    back = lambda c: root.back(of_flat(jnp.asarray(scale * c)))  # noqa: E731

    def product(c: np.ndarray) -> np.ndarray:
        image = land.product("hessian", ravel_pytree(back(c))[0])
        return scale * np.asarray(ravel_pytree(root.into(land.unravel(jnp.asarray(image))))[0])

    return Operator(product, scale.size, land.flat.dtype, back)


def _known(opt_state: Any) -> Any:
    """The first part of a state whose preconditioner is known, or None."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, STATES))
    return next((x for x in parts if isinstance(x, STATES)), None)


@jax.jit
def _of_objective(objective: Objective, params: Params, *rest: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        push = functools.partial(objective.hvp, params)
        if objective.microbatches == 1:  # else what is kept between products may be too large
            batch = objective.batch_for_curvature
            push = linearize(replace(objective, batch=batch, curvature_batch=None).grad, params)[1]
        return _tops(push, objective, params, *rest)


def _tops(
    push: Any, of: Objective, params: Params, state: Any, last: Any, limits: Any, options: Any
) -> dict[str, tuple[jax.Array, PyTree]]:
    """`_top` of both matrices, from `push`: v -> H v."""
    of_params = functools.partial(jax.tree.map, lambda p, v: v.astype(p.dtype), params)
    wide = functools.partial(jax.tree.map, lambda x: x.astype(tree.accumulator(x.dtype)))
    hessian = lambda v: wide(push(of_params(v)))  # noqa: E731
    found = {"sharpness": _top(hessian, last.get("sharpness"), wide(params), *limits)}
    if state is not None:
        root, name = _root_of(state, of, params, **options), "preconditioned_sharpness"
        scale = wide(root.coordinates)
        scaled = functools.partial(jax.tree.map, jnp.multiply, scale)
        matrix = lambda v: scaled(root.into(hessian(root.back(scaled(v)))))  # noqa: E731
        found[name] = _top(matrix, last.get(name), scale, *limits)
    return found


def _top(
    product: Any, start: PyTree | None, like: PyTree, tolerance: Any, most: Any
) -> tuple[jax.Array, PyTree]:
    """λmax by LOBPCG (Knyazev 2001), and its vector after a step of the power method.

    The next x is the best in the span of x, the residual r = A x − θ x and the last change p, made
    orthonormal; of these only A r is computed anew. It is over where r is all rounding.
    """
    dot, add = tree.vdot, tree.add_scaled

    def mixed(c: Any, *trees: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y, z: c[0] * x + c[1] * y + c[2] * z, *trees)

    def residual(x: PyTree, ax: PyTree) -> tuple[Any, ...]:
        theta = dot(x, ax)
        r = add(ax, -theta, x)
        return theta, r, tree.norm(r)

    def going(carry: Any) -> jax.Array:
        return (carry[0] < most) & (carry[-1] > tolerance * jnp.abs(carry[-3]))

    def step(carry: Any) -> Any:
        count, x, ax, p, ap, along, theta, r, _ = carry
        lost = jnp.array([dot(r, x), dot(r, p)])
        r = add(add(r, -lost[0], x), -lost[1], p)
        rest = tree.norm(r)
        more = 3 * rest**2 > lost @ lost
        r = tree.scale(1 / rest, r)
        ar = product(r)
        a, b = dot(r, ar), dot(p, ar)
        # x·A p = 0, as p was in the span that x is the best of.
        small = jnp.array([[theta, rest, 0], [rest, a, b], [0, b, along]])
        # At first p = 0, an eigenvector that must not be the top one.
        below = jnp.where(count > 1, 0.0, 2 * jnp.linalg.norm(small))
        s = jnp.linalg.eigh(small.at[2, 2].add(-below))[1][:, -1]
        s = jnp.where(more, s, jnp.eye(3, dtype=s.dtype)[0])
        t = s.at[0].set(0.0)
        t = t - (t @ s) * s
        t = t / jnp.linalg.norm(t)
        x, p, ax, ap = (mixed(c, *of) for of in ((x, r, p), (ax, ar, ap)) for c in (s, t))
        theta, r, rest = residual(x, ax)
        return count + 1, x, ax, p, ap, t @ small @ t, theta, r, jnp.where(more, rest, 0.0)

    x = optax.tree.random_like(jax.random.key(0), like) if start is None else start
    x = tree.scale(1 / tree.norm(x), x)
    ax, p = product(x), jax.tree.map(jnp.zeros_like, x)
    theta, r, rest = residual(x, ax)
    carry = 1, x, ax, p, p, jnp.zeros_like(rest), theta, r, rest
    if isinstance(rest, jax.core.Tracer):
        carry = jax.lax.while_loop(going, step, carry)
    else:  # on the host, for products that pass over a data set
        while going(carry):
            carry = step(carry)
    _, x, *_, theta, r, _ = carry
    return theta, add(x, 1 / jnp.where(theta == 0, 1.0, jnp.abs(theta)), r)


def _root_of(state: Any, objective: Objective, params: Params, **options: Any) -> Rotation:
    """L of `preconditioned`, a scale of coordinates and a rotation to trees like the parameters."""
    if not isinstance(state, KfacState):
        return Rotation(_diagonal_root(state, **options), lambda v: v, lambda v: v)
    root = _kronecker_root(state, params, find_layers(objective, params))
    unravel = ravel_pytree(params)[1]
    into = lambda v: root.into(ravel_pytree(v)[0])  # noqa: E731
    return Rotation(root.coordinates, into, lambda c: unravel(root.back(c)))


@jax.jit
def _diagonal_root(state: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8) -> PyTree:
    def root(nu: jax.Array) -> jax.Array:
        if isinstance(state, optax.ScaleByRmsState):
            return jax.lax.rsqrt(jnp.sqrt(nu + eps))
        count = jnp.maximum(state.count, 1).astype(nu.dtype)
        return jax.lax.rsqrt((1.0 - b1**count) * (jnp.sqrt(nu / (1.0 - b2**count)) + eps))

    return jax.tree.map(root, state.nu)


@jax.jit
def _root(x: jax.Array) -> jax.Array:
    """L with L Lᵀ = x of each block."""
    return jnp.sqrt(x) if x.ndim == 2 else x @ inverses.inverse_root(x).mT


@jax.numpy_dtype_promotion("standard")  # float32 is the damping's
def _kronecker_root(state: KfacState, params: Params, layers: Layers) -> Rotation:
    """Of each layer's M = P_A ⊗ P_G: Cholesky factors; or eigenvectors, and roots of values."""
    sides, scales, held, damping = {}, {}, state.kronecker, state.damping
    for i in layers.known:
        pair = [x.astype(tree.accumulator(x.dtype)) for x in held.inverses[i]]
        if isinstance(held.squares[i], tuple):
            pair = [_root(x) for x in pair]
            scales[i] = jnp.ones((*pair[0].shape[:2], pair[1].shape[1]), pair[0].dtype)
        else:
            scales[i] = (held.squares[i] + damping) ** -0.5
        sides[i] = pair
    others = {i: (held.diagonals[i] + damping) ** -0.5 for i in layers.unknown}
    return rotation(params, layers, sides, scales, others)
