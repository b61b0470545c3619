r"""The density of eigenvalues, by stochastic Lanczos quadrature.

    φ(t) = 1/n Σᵢ δ(t − λᵢ) ≈ 1/P Σ_p Σⱼ s₁ⱼ² δ(t − θⱼ)

for P random first vectors: m steps of Lanczos give the Gauss quadrature of each one's spectral
measure, whose mean over directions is φ.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jdl.core import check
from jdl.curvature.lanczos import Basis
from jdl.curvature.operators import Operator


class Density(NamedTuple):
    """Nodes and weights of the spectrum's quadrature.

    Attributes:
      nodes: θ, [P, m]; a run that ended early repeats its last, with weight 0.
      weights: s₁ⱼ², each row summing to 1, [P, m].
      size: n, the number of eigenvalues.
      products: how many were made.
      memory: bytes of the basis.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int
    products: int
    memory: int

    def smooth(self, grid: np.ndarray, width: float) -> np.ndarray:
        """φ on a grid, each node spread to a Gaussian of standard deviation `width`."""
        z = (grid[:, None] - self.nodes.ravel()[None]) / width
        bumps = np.exp(-0.5 * z * z) / (width * np.sqrt(2 * np.pi))
        return bumps @ self.weights.ravel() / len(self.nodes)

    def mean_of(self, f: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """Tr f(A) / n, and its standard error over the probes."""
        each = np.sum(f(self.nodes) * self.weights, axis=1)
        spread = float(np.std(each, ddof=1) / np.sqrt(len(each))) if len(each) > 1 else np.nan
        return float(np.mean(each)), spread


def spectral_density(
    operator: Operator, *, steps: int = 60, probes: int = 4, seed: int = 0
) -> Density:
    """The spectrum's density, of P = `probes` runs of m = `steps` products each.

    Args:
      operator: see `operator`.
      steps: m ≥ 1; the basis takes (m + 1) n numbers.
      probes: P ≥ 1.
      seed: for the random first vectors.

    >>> from jdl.curvature.operators import operator
    >>> import jax.numpy as jnp
    >>> curved = operator(lambda x: 0.5 * jnp.sum(jnp.arange(1.0, 51.0) * x**2), jnp.zeros(50))
    >>> mean, error = spectral_density(curved, steps=20, probes=50).mean_of(lambda t: t)
    >>> abs(mean - 25.5) < 3 * error
    True

    References:
      Ubaru, Chen & Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature (2017).
      Ghorbani, Krishnan & Xiao, An investigation into neural net optimization via Hessian
      eigenvalue density (2019).
    """
    check.positive_int("steps", steps)
    check.positive_int("probes", probes)
    steps = min(steps, operator.size)
    rng = np.random.default_rng(seed)
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    products = 0
    for p in range(probes):
        basis = Basis(operator, steps, rng.standard_normal(operator.size))
        while basis.length < steps:
            products += 1
            if not basis.grow():
                break
        theta, s = basis.ritz()
        nodes[p, : len(theta)], weights[p, : len(theta)] = theta, s[0] ** 2
        nodes[p, len(theta) :] = theta[-1]
        memory = basis.vectors.nbytes
        del basis
    return Density(nodes, weights, operator.size, products, memory)
