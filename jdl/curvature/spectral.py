r"""Operators whose eigenvectors are known, so that functions of them are exact.

A = Q Λ Qᵀ,    f(A) = Q f(Λ) Qᵀ,    Tr f(A) = Σ f(λᵢ)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core.types import PyTree
from jdl.curvature.operators import Operator

Rotation = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class SpectralOperator(Operator):
    """A matrix Q Λ Qᵀ; see `spectral`.

    Attributes:
      eigenvalues: λ, [n], in the order of Q's columns.
      into: v -> Qᵀ v of JAX arrays [n].
      back: v -> Q v.
    """

    eigenvalues: np.ndarray
    into: Rotation
    back: Rotation

    def map(self, f: Callable[[np.ndarray], np.ndarray]) -> "SpectralOperator":
        """f(A)."""
        return spectral(f(self.eigenvalues), self.into, self.back, self.unravel)

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


def spectral(
    eigenvalues: np.ndarray, into: Rotation, back: Rotation, unravel: Callable[[Any], PyTree]
) -> SpectralOperator:
    """The operator Q Λ Qᵀ.

    Args:
      eigenvalues: λ, [n].
      into: v -> Qᵀ v, orthogonal, of JAX arrays [n].
      back: v -> Q v.
      unravel: [n] -> a pytree like the parameters.

    >>> double = spectral(np.float32([2, 2]), lambda v: v, lambda v: v, lambda v: v)
    >>> double.inverse(damping=2.0).product(np.float32([1, 1])).tolist(), double.trace()
    ([0.25, 0.25], 4.0)
    """
    values = np.asarray(eigenvalues)

    @jax.jit
    def product(values: jax.Array, v: jax.Array) -> jax.Array:
        return back(values * into(v))

    def of_vector(v: np.ndarray) -> np.ndarray:
        return np.asarray(product(jnp.asarray(values), jnp.asarray(v, values.dtype)))

    return SpectralOperator(of_vector, len(values), values.dtype, unravel, values, into, back)


def decompose(operator: Operator, max_size: int = 10_000) -> SpectralOperator:
    """The same matrix with its eigenvectors, by n products and a dense decomposition.

    Args:
      operator: see `operator`.
      max_size: the largest n allowed.

    >>> from jdl.curvature.operators import operator
    >>> a = operator(lambda x: x[0] * x[1], jnp.ones(2))
    >>> decompose(a).eigenvalues.round(3).tolist()
    [-1.0, 1.0]
    """
    matrix = operator.dense(max_size).astype(np.float64)
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    q = jnp.asarray(vectors, operator.dtype)
    exact = jax.lax.Precision.HIGHEST
    return spectral(
        values.astype(operator.dtype),
        lambda v: jnp.matmul(v, q, precision=exact),
        lambda v: jnp.matmul(q, v, precision=exact),
        operator.unravel,
    )
