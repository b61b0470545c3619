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

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.curvature.kronecker import layers_of, rotation
from jdl.curvature.lanczos import top_eigenpairs
from jdl.curvature.landscape import Landscape, landscape_of
from jdl.curvature.operators import Operator, operator
from jdl.optim.kfac import KfacState
from jdl.optim.kronecker.layers import Layers

STATES = (optax.ScaleByAdamState, optax.ScaleByRmsState, KfacState)


class SharpnessTracker:
    """λmax of the Hessian and of the preconditioned Hessian, each from the last eigenvector.

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
      (2021).
      Cohen et al., Adaptive gradient methods at the edge of stability (2022).
    """

    def __init__(self, *, tolerance: float = 0.1, max_products: int = 30, **options: float):
        self._tolerance, self._most, self._options = tolerance, max_products, options
        self._last: dict[str, np.ndarray] = {}
        self._layers: Layers | None = None

    def __call__(
        self, of: Landscape | Objective, params: Params | None = None, opt_state: Any = None
    ) -> dict[str, float]:
        """Both values; the second where `preconditioned` knows the optimizer's state."""
        land, state = landscape_of(of, params), known(opt_state)
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
        options: Any = {"tolerance": self._tolerance, "max_products": self._most}
        found = top_eigenpairs(matrix, 1, start=start, **options)
        self._last[name] = found.vectors[0]
        return float(found.values[0])


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
    land, state = landscape_of(of, params), known(opt_state)
    must = "one with the state of Adam, RMSprop or K-FAC"
    check.argument(state is not None, "opt_state", must, type(opt_state).__name__)
    if isinstance(state, KfacState):
        root = _kronecker_root(state, land, layers or layers_of(land))
        scale, into, back = np.asarray(root.coordinates), root.into, root.back
    else:
        nu, into, back = ravel_pytree(state.nu)[0], (lambda v: v), (lambda v: v)
        if isinstance(state, optax.ScaleByAdamState):
            shares = [1.0 - b ** jnp.maximum(state.count, 1) for b in (b1, b2)]
            scale = np.asarray(shares[0] * (jnp.sqrt(nu / shares[1]) + eps)) ** -0.5
        else:
            scale = np.asarray(jnp.sqrt(nu + eps)) ** -0.5

    def product(c: np.ndarray) -> np.ndarray:
        return scale * np.asarray(into(land.product("hessian", back(jnp.asarray(scale * c)))))

    return Operator(product, scale.size, land.flat.dtype, lambda c: land.unravel(back(scale * c)))


def known(opt_state: Any) -> Any:
    """The first part of a state whose preconditioner is known, or None."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, STATES))
    return next((x for x in parts if isinstance(x, STATES)), None)


def _kronecker_root(state: KfacState, land: Landscape, layers: Layers) -> Any:
    """Of each layer's M = P_A ⊗ P_G: Cholesky factors; or eigenvectors, and roots of values."""
    sides, scales, held = {}, {}, state.kronecker
    for i in layers.known:
        pair = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in held.inverses[i]]
        if isinstance(held.squares[i], tuple):
            pair = [jnp.sqrt(x) if x.ndim == 2 else jnp.linalg.cholesky(x) for x in pair]
            scales[i] = jnp.ones((*pair[0].shape[:2], pair[1].shape[1]), pair[0].dtype)
        else:
            scales[i] = (held.squares[i] + state.damping) ** -0.5
        sides[i] = pair
    others = {i: (held.diagonals[i] + state.damping) ** -0.5 for i in layers.unknown}
    return rotation(land, layers, sides, scales, others)
