r"""Laplace's approximation of the posterior: a normal distribution around trained parameters.

    p(θ | data) ≈ N(θ*, P⁻¹),    P = N G + δ I,    prior N(0, I / δ)
    log p(data) ≈ −N f(θ*) − ½ δ ‖θ*‖² + ½ n log δ − ½ log det P

with f the mean of N examples' negative log-likelihoods and G its curvature. Predictions linearise
the model at θ*, of which G is the Hessian: N(net(θ*, x), J P⁻¹ Jᵀ).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Batch, Params
from jdl.curvature.landscape import Landscape
from jdl.curvature.operators import path_name
from jdl.curvature.spectral import SpectralOperator


class Laplace:
    """The posterior of a trained model's parameters, of all or of a submatrix's.

    Args:
      landscape: the training data, the trained parameters, and as loss a negative log-likelihood
        without a regularizer.
      matrix: G, as operator with known eigenvectors: `kfac_operator(landscape)`; in full
        `decompose(operator(landscape, kind="gauss_newton"))`; of some layers, the others being
        fixed, `decompose(operator(landscape, kind="gauss_newton").submatrix("head"))`.
      precision: δ > 0; None for the most likely, of largest marginal likelihood. A model trained
        with weight decay w has N w.

    Attributes:
      precision: δ.
      covariance: P⁻¹.

    >>> from jdl.curvature import decompose, operator
    >>> loss = lambda outputs, batch: 0.5 * (outputs[:, 0] - batch["y"]) ** 2
    >>> make = lambda batch: Objective.from_fns(lambda w, batch: batch["x"] @ w, loss, batch)
    >>> data = [{"x": jnp.ones((3, 1)), "y": jnp.ones(3)}]
    >>> land = Landscape(make, data, jnp.ones((1, 1)))
    >>> posterior = Laplace(land, decompose(operator(land, kind="gauss_newton")), precision=1.0)
    >>> mean, covariance = posterior.predict(data[0])
    >>> mean[0].tolist(), covariance[0].tolist()
    ([1.0], [[0.25]])

    References:
      MacKay, A practical Bayesian framework for backpropagation networks (1992).
      Immer, Korzepa & Bauer, Improving predictions of Bayesian neural nets via local linearization
      (2021).
    """

    def __init__(
        self, landscape: Landscape, matrix: SpectralOperator, precision: float | None = None
    ):
        self._land = landscape
        part = jax.eval_shape(matrix.unravel, jax.ShapeDtypeStruct((matrix.size,), matrix.dtype))
        structure: Any = jax.tree.structure(landscape.params)
        self._whole = jax.tree.structure(part) == structure
        chosen = landscape.params
        if not self._whole:
            names = part if isinstance(part, dict) else {}
            leaves = jax.tree.leaves_with_path(landscape.params)
            chosen = {path_name(path): x for path, x in leaves if path_name(path) in names}
        self._mode, _ = ravel_pytree(chosen)
        must = "of the landscape's parameters, or some of them"
        check.argument(self._mode.size == matrix.size, "matrix", must, f"{matrix.size} numbers")
        self._examples = landscape.examples()[1]
        self._matrix = (matrix * self._examples).map(lambda t: np.maximum(t, 0.0))
        self._value, self._length = landscape.value(), float(jnp.vdot(self._mode, self._mode))
        if precision is None:
            precision = self._most_likely()
        self.precision = check.in_range("precision", precision, 0.0, open_low=True)
        self.covariance = self._matrix.inverse(precision)
        self._linearized = jax.jit(self._linearize)

    def log_marginal_likelihood(self, precision: float | None = None) -> float:
        """log p(data), for this prior or another."""
        delta = self.precision if precision is None else precision
        prior = self._matrix.size * np.log(delta) - delta * self._length
        return -self._examples * self._value + 0.5 * float(prior - self._matrix.logdet(delta))

    def sample(self, count: int, seed: int = 0) -> Params:
        """Random parameters, with a leading axis of `count`."""
        noise = np.random.default_rng(seed).standard_normal((count, self._matrix.size))
        root = jnp.sqrt(jnp.asarray(self.covariance.eigenvalues))
        draw = lambda z: self._params(self._mode + self._matrix.back(root * z))  # noqa: E731
        return jax.vmap(draw)(jnp.asarray(noise, root.dtype))

    def predict(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The outputs' means [B, K] and covariances [B, K, K] by the linearised model."""
        mean, covariance = self._linearized(
            self._land.objective(batch), self.covariance.eigenvalues
        )
        return np.asarray(mean), np.asarray(covariance)

    def predict_sampled(self, batch: Batch, count: int = 20, seed: int = 0) -> np.ndarray:
        """The model's own outputs at random parameters, [count, B, K]."""
        objective = self._land.objective(batch)
        outputs = lambda p: objective.apply(p, objective.batch, None)[0]  # noqa: E731
        return np.asarray(jax.lax.map(outputs, self.sample(count, seed)))

    def _most_likely(self) -> float:
        """δ = γ / ‖θ*‖², γ = Σ λ / (λ + δ): MacKay's iteration."""
        delta, values = 1.0, self._matrix.eigenvalues.astype(np.float64)
        for _ in range(200):
            last, delta = delta, float(np.sum(values / (values + delta))) / self._length
            if abs(delta - last) <= 1e-6 * delta:
                break
        return delta

    def _params(self, vector: jax.Array) -> Params:
        """All parameters, with these in their places."""
        part = self._matrix.unravel(vector)
        if self._whole:
            return part
        return jax.tree.map_with_path(lambda at, x: part.get(path_name(at), x), self._land.params)

    def _linearize(self, objective: Objective, variances: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_example(example: Batch) -> tuple[jax.Array, jax.Array]:
            one = jax.tree.map(lambda x: x[None], example)
            f = lambda v: objective.apply(self._params(v), one, None)[0][0]  # noqa: E731
            with jax.default_matmul_precision("highest"):
                outputs, pull = jax.vjp(f, self._mode)
                units = jnp.eye(outputs.size, dtype=outputs.dtype)
                rows = jax.vmap(lambda u: self._matrix.into(pull(u)[0]))(units)
                return outputs, (rows * variances[None]) @ rows.T

        return jax.lax.map(of_example, dict(objective.batch), batch_size=32)
