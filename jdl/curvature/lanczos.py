r"""Lanczos's method: an orthonormal basis V of the Krylov space, in which A is nearly diagonal.

    A V = V T + r e_mᵀ,    T = S Θ Sᵀ,    ‖A V sᵢ − θᵢ V sᵢ‖ = ‖r‖ |s_mi|

Each new vector is orthogonalized against all before it, a second time where the first removed most
of it; otherwise converged eigenvalues would reappear as spurious copies. A full basis is restarted
thickly: the best Ritz vectors stay. The basis lies in main memory; products may come from a device.

A Krylov space holds one eigenvector of each eigenvalue, whatever its multiplicity. So converged
pairs are tested: the wanted Ritz vectors stay, a random vector orthogonal to them replaces r, and
log n further products, more while another value still rises, must bring nothing new to the wanted
end. A repeated eigenvalue that is close to the k-th may be missed.
"""

from typing import Any, NamedTuple

import numpy as np

from jdl.core import check
from jdl.core.types import PyTree
from jdl.curvature.operators import Operator

CHUNK = 2**16
WHICH = ("largest", "smallest", "magnitude")


class Eigenpairs(NamedTuple):
    """Eigenvalues and -vectors, the wanted end first.

    Attributes:
      values: θ, [k].
      vectors: of unit length, [k, n].
      residuals: ‖A v − θ v‖ as Lanczos estimates it, [k].
      products: how many were made.
      converged: whether all residuals are within the tolerance.
      memory: bytes of the basis.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    products: int
    converged: bool
    memory: int

    def vector(self, i: int, operator: Operator) -> PyTree:
        """The i-th eigenvector as a pytree like the parameters."""
        return operator.unravel(self.vectors[i])


class Basis:
    """The Krylov basis and A's projection on it, grown by one product at a time."""

    def __init__(self, operator: Operator, most: int, start: np.ndarray):
        self.operator = operator
        self.vectors = np.empty((most + 1, operator.size), operator.dtype)
        self.projected = np.zeros((most, most))
        self.vectors[0] = start / np.linalg.norm(start)
        self.length = 0  # products made with the basis
        self.beta = 0.0  # ‖r‖
        # A V − V T = Σ uᵢ cᵢᵀ: the rows c; the last belongs to r, the others to earlier residuals.
        self.left = np.zeros((1, 0))

    def grow(self) -> bool:
        """One more product; False if the space has become invariant under A."""
        j = self.length
        w = self.operator.product(self.vectors[j])
        finite = bool(np.all(np.isfinite(w)))
        check.argument(finite, "operator", "one with finite products", "NaN or infinity")
        w = np.array(w, self.operator.dtype)
        scale = float(np.linalg.norm(w))
        coefficients = self._orthogonalize(w, j + 1)
        if np.linalg.norm(w) < 0.7 * scale:
            coefficients += self._orthogonalize(w, j + 1)
        self.projected[: j + 1, j] = self.projected[j, : j + 1] = coefficients
        self.beta = float(np.linalg.norm(w))
        self.length = j + 1
        self.left = np.pad(self.left, ((0, 0), (0, 1)))
        self.left[-1] = 0.0
        self.left[-1, j] = self.beta
        tiny = 10 * float(np.finfo(self.operator.dtype).eps) * max(scale, self._size())
        if self.beta <= tiny:
            self.beta = self.left[-1, j] = 0.0
            return False
        self.vectors[j + 1] = w / self.beta
        return True

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Θ, ascending, and S."""
        return np.linalg.eigh(self.projected[: self.length, : self.length])

    def residuals(self, s: np.ndarray) -> np.ndarray:
        """‖A V sᵢ − θᵢ V sᵢ‖ of Ritz vectors, the columns of S."""
        return np.linalg.norm(self.left @ s, axis=0)

    def refresh(self, rng: np.random.Generator) -> None:
        """Replaces r by a random vector orthogonal to the basis."""
        w: Any = rng.standard_normal(self.operator.size).astype(self.operator.dtype)
        for _ in range(2):
            self._orthogonalize(w, self.length)
        self.vectors[self.length] = w / np.linalg.norm(w)
        if np.any(self.left[-1]):
            self.left = np.pad(self.left, ((0, 1), (0, 0)))

    def restart(self, kept: np.ndarray, values: np.ndarray, s: np.ndarray) -> None:
        """Keeps the Ritz vectors of these numbers, and the last residual."""
        p, j = len(kept), self.length
        mix = s[:, kept].T.astype(self.operator.dtype)
        for at in range(0, self.operator.size, CHUNK):  # in place, but for a chunk of columns
            columns = slice(at, at + CHUNK)
            self.vectors[:p, columns] = mix @ self.vectors[:j, columns]
        self.vectors[p] = self.vectors[j]
        self.projected[:] = 0.0
        self.projected[range(p), range(p)] = values[kept]
        self.length = p
        self.left = self.left @ s[:, kept]

    def _orthogonalize(self, w: np.ndarray, rows: int) -> np.ndarray:
        h = self.vectors[:rows] @ w
        w -= h @ self.vectors[:rows]
        return h.astype(np.float64)

    def _size(self) -> float:
        return float(np.max(np.abs(self.projected[: self.length, : self.length]), initial=0.0))


def top_eigenpairs(
    operator: Operator,
    k: int = 10,
    *,
    which: str = "largest",
    tolerance: float = 1e-3,
    max_products: int = 1000,
    memory: int = 2**31,
    seed: int = 0,
) -> Eigenpairs:
    """The k eigenpairs at one end of the spectrum.

    A repeated eigenvalue is found with its multiplicity unless it is close to the k-th.

    Args:
      operator: see `operator`.
      k: how many, 1 ≤ k ≤ n.
      which: "largest", "smallest" (by sign too), or "magnitude".
      tolerance: on a residual relative to its eigenvalue, as in ARPACK, > 0; the eigenvalue's own
        error is about its square.
      max_products: maximum number of products.
      memory: bytes the basis may take; a basis of fewer vectors restarts more often. It always
        takes at least 2 k + 2 vectors of n numbers.
      seed: for the random first vector.

    Raises:
      ArgumentError: if a product is not finite.

    >>> from jdl.curvature.operators import operator
    >>> import jax.numpy as jnp
    >>> curved = operator(lambda x: 0.5 * jnp.sum(jnp.arange(1.0, 51.0) * x**2), jnp.zeros(50))
    >>> top_eigenpairs(curved, 2).values.round(2).tolist()
    [50.0, 49.0]

    References:
      Wu & Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems (2000).
      Lehoucq, Sorensen & Yang, ARPACK users' guide (1998), section 4.6: the test of convergence.
    """
    n = operator.size
    check.argument(isinstance(k, int) and 1 <= k <= n, "k", f"between 1 and the size {n}", k)
    check.one_of("which", which, WHICH)
    check.in_range("tolerance", tolerance, 0.0, open_low=True)
    check.positive_int("max_products", max_products)
    affordable = memory // (n * np.dtype(operator.dtype).itemsize) - 1
    most = int(min(n, max(2 * k + 2, min(affordable, max_products))))
    rng = np.random.default_rng(seed)
    basis = Basis(operator, most, rng.standard_normal(n))
    search = _Search(k, which, tolerance)
    products = 0
    while True:
        growing = basis.grow()
        products += 1
        enough = basis.length >= k or not growing
        if (enough and search.ended(basis, growing)) or products >= max_products:
            break
        if enough:
            search.prepare(basis, growing, rng)
    values, s = basis.ritz()
    wanted = s[:, _order(values, which)[:k]]
    return Eigenpairs(
        values[_order(values, which)[:k]],
        wanted.T.astype(operator.dtype) @ basis.vectors[: basis.length],
        basis.residuals(wanted),
        products,
        search.converged,
        basis.vectors.nbytes,
    )


class _Search:
    """Decides when the k wanted pairs are found, and prepares the basis for the next product."""

    def __init__(self, k: int, which: str, tolerance: float):
        self.k, self.which, self.tolerance = k, which, tolerance
        self.converged = False
        self._tested, self._tests_left = np.empty(0), 0  # the values under test, products to go
        self._next = np.full(1, np.inf)  # the key of the best value that is not wanted

    def ended(self, basis: Basis, growing: bool) -> bool:
        """Updates the Ritz pairs after a product; returns whether the search is over."""
        self._values, self._s = basis.ritz()
        self._ranked = _order(self._values, self.which)
        order = self._ranked[: self.k]
        wanted = self._values[order]
        floor = np.finfo(basis.operator.dtype).eps ** (2 / 3) * np.max(np.abs(self._values))
        allowed = self.tolerance * np.maximum(np.abs(wanted), floor)
        last = np.abs(basis.left[-1] @ self._s[:, order])
        self.converged = bool(np.all(last <= allowed)) and len(order) == self.k
        others = len(self._tested) != len(wanted)
        self._new = others or bool(np.any(np.abs(wanted - self._tested) > allowed))
        self._tests_left = self._tests_left - 1 if growing else 0
        # The best unwanted value, if it rises as in its last step, may become a wanted one.
        before = self._next
        self._next = _key(self._values, self.which)[self._ranked[self.k : self.k + 1]]
        rising = growing and bool(np.any(2 * self._next - before < _key(wanted[-1:], self.which)))
        if self.converged and not self._new and self._tests_left <= 0 and not rising:
            return True
        return basis.length >= basis.operator.size and (self.converged or not growing)

    def prepare(self, basis: Basis, growing: bool, rng: np.random.Generator) -> None:
        """Makes the basis ready for the next product."""
        most = len(basis.vectors) - 1
        if self.converged and self._new:
            order = self._ranked[: self.k]
            self._tested = self._values[order]
            self._tests_left = max(1, int(np.log(basis.operator.size)))
            basis.restart(order, self._values, self._s)
            basis.refresh(rng)
        elif not growing:  # an invariant space smaller than wanted
            basis.refresh(rng)
        elif basis.length == most:
            kept = min(self.k + (most - self.k) // 2, most - 1)
            basis.restart(self._ranked[:kept], self._values, self._s)


def _order(values: np.ndarray, which: str) -> np.ndarray:
    return np.argsort(_key(values, which), kind="stable")


def _key(values: np.ndarray, which: str) -> np.ndarray:
    return {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
