r"""The largest curvature along training, of the loss and as the optimizer sees it.

Gradient descent at rate η leaves a minimum of curvature λ > 2/η; a step −η M g does where an
eigenvalue of M H is larger. With M = L Lᵀ those are the eigenvalues of the symmetric Lᵀ H L.

    Adam      M⁻¹ = (1 − β₁ᵗ) (√(ν / (1 − β₂ᵗ)) + ε)      stable up to (2 + 2β₁) / ((1 − β₁) η)
    RMSprop   M⁻¹ = √(ν + ε)                              2/η
    K-FAC     M⁻¹ = (A + π√λ I) ⊗ (G + √λ/π I), or EKFAC's
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.curvature.kronecker import Rotation, layers_of, rotation
from jdl.curvature.lanczos import Basis
from jdl.curvature.landscape import Landscape, landscape_of
from jdl.curvature.operators import Operator, operator
from jdl.optim.kfac import KfacState
from jdl.optim.kronecker import inverses
from jdl.optim.kronecker.layers import Layers

STATES = (optax.ScaleByAdamState, optax.ScaleByRmsState, KfacState)


class SharpnessTracker:
    """λmax of the Hessian and of `preconditioned`, each sought from the last eigenvector.

    Where that still holds, it takes one product. Another eigenvector may overtake it unnoticed for
    a few measurements.

    Args:
      tolerance: on the residual relative to the eigenvalue, whose error is about its square.
      max_products: for one eigenvalue.
      **options: b1, b2 and eps of `preconditioned`.

    >>> data, loss = {"x": jnp.eye(2)}, lambda out, batch: 0.5 * out**2
    >>> objective = Objective.from_fns(lambda w, batch: batch["x"] @ w, loss, data)
    >>> track, params, adam = SharpnessTracker(tolerance=1e-3), jnp.ones(2), optax.adam(0.1)
    >>> _, state = adam.update(params, adam.init(params))
    >>> {name: round(value, 3) for name, value in track(objective, params, state).items()}
    {'sharpness': 0.5, 'preconditioned_sharpness': 5.0}

    References:
      Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability
      (2021); Adaptive gradient methods at the edge of stability (2022).
    """

    def __init__(self, *, tolerance: float = 0.2, max_products: int = 30, **options: float):
        self._tolerance, self._most, self._options = tolerance, max_products, options
        self._last: dict[str, np.ndarray] = {}
        self._layers: Layers | None = None

    def __call__(
        self, of: Landscape | Objective, params: Params | None = None, opt_state: Any = None
    ) -> dict[str, float]:
        """Both values; the second where the optimizer's preconditioner is known."""
        land, state = landscape_of(of, params), _known(opt_state)
        found = {"sharpness": self._top("sharpness", operator(land))}
        if isinstance(state, KfacState) and self._layers is None:
            self._layers = layers_of(land)
        if state is not None:
            matrix = preconditioned(land, state, layers=self._layers, **self._options)
            found["preconditioned_sharpness"] = self._top("preconditioned_sharpness", matrix)
        return found

    def _top(self, name: str, matrix: Operator) -> float:
        start = self._last.get(name)
        if start is None:
            start = np.random.default_rng(0).standard_normal(matrix.size)
        basis, rest, growing = Basis(matrix, min(self._most, matrix.size), start), np.inf, True
        values = np.zeros(1)
        while (
            growing
            and rest > self._tolerance * abs(values[-1])
            and basis.length + 1 < len(basis.vectors)
        ):
            growing = basis.grow()
            values, s = basis.ritz()
            rest = abs(basis.beta * s[-1, -1])  # of A x = θ x + r, with x the Ritz vector
        vector = s[:, -1] @ basis.vectors[: basis.length]
        if growing:  # the next start is A x, at no product more
            along = basis.beta * s[-1, -1] / (abs(values[-1]) or 1.0)
            vector += along * basis.vectors[basis.length]
        self._last[name] = vector
        return float(values[-1])


def preconditioned(
    of: Landscape | Objective,
    opt_state: Any,
    params: Params | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    layers: Layers | None = None,
) -> Operator:
    """Lᵀ H L, with L Lᵀ the optimizer's preconditioner.

    Args:
      of: a `Landscape`, which has its own parameters, or a `jdl.Objective`.
      opt_state: of Adam or its kin, RMSprop, or K-FAC; wrapped or not.
      params: a pytree of floating-point arrays.
      b1: Adam's, as b2.
      b2: likewise.
      eps: Adam's or RMSprop's.
      layers: K-FAC's, if they are known already.

    >>> data, loss = {"x": jnp.eye(2)}, lambda out, batch: 0.5 * out**2
    >>> objective = Objective.from_fns(lambda w, batch: batch["x"] @ w, loss, data)
    >>> state = optax.ScaleByRmsState(nu=jnp.array([1.0, 4.0]))
    >>> preconditioned(objective, state, jnp.ones(2)).dense().round(3).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    land, state = landscape_of(of, params), _known(opt_state)
    must = "one with the state of Adam, RMSprop or K-FAC"
    check.argument(state is not None, "opt_state", must, type(opt_state).__name__)
    if isinstance(state, KfacState):
        root = _kronecker_root(state, land, layers or layers_of(land))
    else:
        root = Rotation(_diagonal_root(state, b1, b2, eps), lambda v: v, lambda v: v)
    scale = np.asarray(root.coordinates)

    def product(c: np.ndarray) -> np.ndarray:
        image = land.product("hessian", root.back(jnp.asarray(scale * c)))
        return scale * np.asarray(root.into(jnp.asarray(image)))

    unravel = lambda c: land.unravel(root.back(jnp.asarray(scale * c)))  # noqa: E731
    return Operator(product, scale.size, land.flat.dtype, unravel)


def _known(opt_state: Any) -> Any:
    """The first part of a state whose preconditioner is known, or None."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, STATES))
    return next((x for x in parts if isinstance(x, STATES)), None)


@jax.jit
def _diagonal_root(state: Any, b1: Any, b2: Any, eps: Any) -> jax.Array:
    nu = ravel_pytree(state.nu)[0]
    if isinstance(state, optax.ScaleByRmsState):
        return (nu + eps) ** -0.25
    count = jnp.maximum(state.count, 1).astype(nu.dtype)
    return ((1.0 - b1**count) * (jnp.sqrt(nu / (1.0 - b2**count)) + eps)) ** -0.5


@jax.jit
def _root(x: jax.Array) -> jax.Array:
    """L with L Lᵀ = x of each block."""
    return jnp.sqrt(x) if x.ndim == 2 else x @ inverses.inverse_root(x).mT


def _kronecker_root(state: KfacState, land: Landscape, layers: Layers) -> Rotation:
    """Of each layer's M = P_A ⊗ P_G: Cholesky factors; or eigenvectors, and roots of values."""
    sides, scales, held, damping = {}, {}, state.kronecker, float(state.damping)
    for i in layers.known:
        pair = [x.astype(tree.accumulator(x.dtype)) for x in held.inverses[i]]
        if isinstance(held.squares[i], tuple):
            pair = [_root(x) for x in pair]
            scales[i] = jnp.ones((*pair[0].shape[:2], pair[1].shape[1]), pair[0].dtype)
        else:
            scales[i] = (held.squares[i] + damping) ** -0.5
        sides[i] = pair
    others = {i: (held.diagonals[i] + damping) ** -0.5 for i in layers.unknown}
    return rotation(land, layers, sides, scales, others)
