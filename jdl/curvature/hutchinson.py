r"""The trace of a matrix from its products with random vectors.

    Hutchinson   tr A ≈ 1/m Σ ⟨zᵢ, A zᵢ⟩                              zᵢ random signs
    Hutch++      tr A ≈ tr(Qᵀ A Q) + 1/p Σ ⟨P zᵢ, A P zᵢ⟩             Q from A S, P = I − Q Qᵀ

    XTrace       tr A ≈ 1/k Σ tr(Qᵢᵀ A Qᵢ) + ⟨Pᵢ ωᵢ, A Pᵢ ωᵢ⟩           Qᵢ from A Ω without A ωᵢ

Hutch++ computes the part of the largest eigenvalues, which cause most of the variance, exactly.
XTrace does so with every vector but one, which then tests the rest, and takes the mean of all such
choices: half of the products go into Q, and all into the test.
"""

from typing import NamedTuple

import numpy as np

from jdl.core import check
from jdl.curvature.operators import Operator


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
      value: the estimate.
      error: its standard error.
      products: how many were made.
    """

    value: float
    error: float
    products: int


def trace(
    operator: Operator, *, method: str = "hutch++", products: int = 30, seed: int = 0
) -> Trace:
    """The trace.

    Args:
      operator: see `operator`.
      method: "xtrace" or "hutch++", for spectra with few large eigenvalues, or "hutchinson".
      products: how many to make: at least 2, for "hutch++" 6, a third of them for Q, for "xtrace"
        4, an even number.
      seed: for the random vectors.

    >>> from jdl.curvature.operators import operator
    >>> import jax.numpy as jnp
    >>> curved = operator(lambda x: 0.5 * jnp.sum(jnp.arange(1.0, 51.0) * x**2), jnp.zeros(50))
    >>> round(trace(curved, method="hutchinson").value)  # exact for a diagonal matrix
    1275

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix (1990).
      Meyer et al., Hutch++: optimal stochastic trace estimation (2021), algorithm 1.
      Epperly, Tropp & Webber, XTrace: making the most of every sample in stochastic trace
      estimation (2024).
    """
    least = {"xtrace": 4, "hutch++": 6, "hutchinson": 2}
    check.one_of("method", method, least)
    ok = isinstance(products, int) and products >= least[method]
    check.argument(ok, "products", f"at least {least[method]}", products)
    rng = np.random.default_rng(seed)
    if method == "xtrace":
        return _xtrace(operator, min(products // 2, operator.size), rng)
    n, dtype = operator.size, operator.dtype

    def signs() -> np.ndarray:
        return (2.0 * rng.integers(0, 2, n) - 1.0).astype(dtype)

    q = np.zeros((0, n), dtype)
    if method == "hutch++":
        rank = min(products // 3, n)
        q = np.linalg.qr(np.stack([operator.product(signs()) for _ in range(rank)]).T)[0].T
    exact = sum(float(np.vdot(row, operator.product(row))) for row in q)
    rests = []
    for _ in range(products - 2 * len(q)):
        z = signs()
        z -= (q @ z) @ q
        rests.append(float(np.vdot(z, operator.product(z))))
    error = np.std(rests, ddof=1) / np.sqrt(len(rests))
    return Trace(exact + float(np.mean(rests)), float(error), products)


def _xtrace(operator: Operator, k: int, rng: np.random.Generator) -> Trace:
    """XTrace of k vectors ω, the columns of Ω, uniform on a sphere."""
    n = operator.size
    omega = rng.standard_normal((n, k))

    def times(columns: np.ndarray) -> np.ndarray:
        rows = [operator.product(v.astype(operator.dtype)) for v in columns.T]
        return np.stack(rows).T.astype(np.float64)

    y = times(omega)
    q, r = np.linalg.qr(y)
    # Column i of S: the direction of range Q that is orthogonal to all of A Ω but A ωᵢ.
    least = 1e-15 * (float(np.abs(np.diag(r)).max()) or 1.0)
    r += np.diag(np.where(np.abs(np.diag(r)) < least, least, 0.0))
    s = np.linalg.inv(r).T
    s /= np.linalg.norm(s, axis=0)
    z = times(q)
    w, h = q.T @ omega, q.T @ z
    w -= s * np.sum(s * w, axis=0)
    rest, of_rest = omega - q @ w, y - z @ w  # Pᵢ ωᵢ, A Pᵢ ωᵢ
    # Of the vectors' random lengths none is left: Pᵢ ωᵢ is uniform on a sphere of n − k + 1.
    quotients = np.sum(rest * of_rest, axis=0) / np.sum(rest * rest, axis=0)
    each = np.trace(h) - np.sum(s * (h @ s), axis=0) + (n - k + 1) * quotients
    return Trace(float(np.mean(each)), float(np.std(each, ddof=1) / np.sqrt(k)), 2 * k)
