r"""Operators with known eigenvectors: A = Q Λ Qᵀ, so that f(A) = Q f(Λ) Qᵀ is exact."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core.types import PyTree
from jdl.curvature.operators import Operator


class SpectralOperator(Operator):
    """A symmetric matrix Q Λ Qᵀ, as `kfac_operator` and `decompose` give it.

    Args:
      eigenvalues: λ, [n], in the order of Q's columns; also an attribute, as `into` and `back`.
      into: v -> Qᵀ v of JAX arrays [n].
      back: v -> Q v.
      unravel: [n] -> a pytree like the parameters.

    >>> double = SpectralOperator(np.float32([2, 2]), lambda v: v, lambda v: v, lambda v: v)
    >>> double.inverse(damping=2.0).product(np.float32([1, 1])).tolist(), double.trace()
    ([0.25, 0.25], 4.0)
    """

    def __init__(
        self,
        eigenvalues: np.ndarray,
        into: Callable[[jax.Array], jax.Array],
        back: Callable[[jax.Array], jax.Array],
        unravel: Callable[[Any], PyTree],
    ):
        self.eigenvalues, self.into, self.back = np.asarray(eigenvalues), into, back
        compiled = jax.jit(lambda values, v: back(values * into(v)))

        def product(v: np.ndarray) -> np.ndarray:
            return np.asarray(compiled(self.eigenvalues, jnp.asarray(v, self.dtype)))

        super().__init__(product, self.eigenvalues.size, self.eigenvalues.dtype, unravel)

    def map(self, f: Callable[[np.ndarray], np.ndarray]) -> "SpectralOperator":
        """f(A)."""
        return SpectralOperator(f(self.eigenvalues), self.into, self.back, self.unravel)

    def __mul__(self, factor: int | float) -> "SpectralOperator":
        return self.map(lambda t: t * factor)

    def inverse(self, damping: float = 0.0) -> "SpectralOperator":  # type: ignore[override]
        """(A + λ)⁻¹, exactly."""
        return self.map(lambda t: 1.0 / (t + damping))

    def logdet(self, damping: float = 0.0) -> float:
        """log det (A + λ)."""
        return float(np.sum(np.log(self.eigenvalues.astype(np.float64) + damping)))

    def trace(self) -> float:
        """Tr A."""
        return float(np.sum(self.eigenvalues, dtype=np.float64))


def decompose(operator: Operator, max_size: int = 10_000) -> SpectralOperator:
    """The same matrix with its eigenvectors, by n products and a dense decomposition.

    Args:
      operator: see `operator`.
      max_size: the largest n allowed.

    >>> from jdl.curvature.operators import operator
    >>> decompose(operator(lambda x: x[0] * x[1], jnp.ones(2))).eigenvalues.round(3).tolist()
    [-1.0, 1.0]
    """
    values, vectors = np.linalg.eigh(operator.dense(max_size).astype(np.float64))
    q = jnp.asarray(vectors, operator.dtype)
    exact = jax.default_matmul_precision("highest")
    into, back = exact(lambda v: v @ q), exact(lambda v: q @ v)
    return SpectralOperator(values.astype(operator.dtype), into, back, operator.unravel)
