"""A curvature matrix M, known by its products v -> M v."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdl.core import check
from jdl.core.derivatives import hvp
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.curvature.landscape import METHODS, Landscape, batch_product, params_of


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix A, known by its products.

    `a + b` and `2.0 * a` are operators too, and so are `a.submatrix(…)` and `a.inverse(…)`.

    Attributes:
      product: [n] -> [n], NumPy arrays.
      size: n.
      dtype: the vectors' type.
      unravel: [n] -> a pytree like the parameters.

    >>> a = operator(lambda x: x @ x, jnp.ones(2))
    >>> (a + 3.0 * a).product(np.ones(2, np.float32)).tolist()
    [8.0, 8.0]
    """

    product: Callable[[np.ndarray], np.ndarray]
    size: int
    dtype: Any
    unravel: Callable[[Any], PyTree]

    __array_ufunc__ = None  # lest NumPy's scalars take it for an array

    def __add__(self, other: "Operator") -> "Operator":
        check.argument(self.size == other.size, "other", f"of size {self.size}", other.size)
        return self._of(lambda v: self.product(v) + other.product(v))

    def __mul__(self, factor: int | float) -> "Operator":
        return self._of(lambda v: self.dtype.type(factor) * self.product(v))

    def __rmul__(self, factor: int | float) -> "Operator":
        return self * factor

    def submatrix(self, *paths: str) -> "Operator":
        """The rows and columns of some parameters; `unravel` then gives a dict, path -> array.

        Args:
          *paths: of arrays, such as "head/kernel", or of branches, such as "head".

        >>> f = lambda p: p["b"] @ p["b"] + p["w"] @ p["b"]
        >>> a = operator(f, {"w": jnp.ones(1), "b": jnp.ones(1)})
        >>> a.submatrix("b").product(np.ones(1, np.float32)).tolist()
        [2.0]
        """
        wanted = tuple(check.one_of("paths", path, self._paths()) for path in paths)
        check.argument(bool(wanted), "paths", "at least one", paths)
        shapes, parts, at = {}, {}, 0
        for name, x in self._leaves():
            if name in wanted or name.startswith(tuple(f"{path}/" for path in wanted)):
                shapes[name] = np.zeros(x.shape, x.dtype)
                parts[name] = np.arange(at, at + x.size)
            at += x.size
        index = np.concatenate([parts[name] for name in sorted(parts)])

        def product(v: np.ndarray) -> np.ndarray:
            whole = np.zeros(self.size, self.dtype)
            whole[index] = v
            return self.product(whole)[index]

        return Operator(product, len(index), self.dtype, ravel_pytree(shapes)[1])

    def inverse(
        self,
        damping: float = 0.0,
        *,
        method: str = "cg",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
    ) -> "Operator":
        """(A + λ)⁻¹, each of whose products is solved for iteratively, by SciPy.

        Args:
          damping: λ.
          method: "cg", conjugate gradients, where A + λ is positive definite; "lsmr" for any other,
            with two products an iteration: the least-squares solution where it is singular.
          tolerance: on the residual, relative to the vector.
          max_iterations: for one product.

        Raises:
          ArgumentError: by a product that takes more iterations.

        >>> half = operator(lambda x: x @ x, jnp.ones(2)).inverse()
        >>> half.product(np.ones(2, np.float32)).tolist()
        [0.5, 0.5]
        """
        from scipy.sparse import linalg  # slow to import

        check.one_of("method", method, ["cg", "lsmr"])

        def shifted(v: np.ndarray) -> np.ndarray:
            v = v.reshape(-1).astype(self.dtype)
            return self.product(v) + self.dtype.type(damping) * v

        shape = (self.size, self.size)
        matrix = linalg.LinearOperator(shape, shifted, shifted, dtype=self.dtype)
        to = {"maxiter": max_iterations, "atol": 0.0 if method == "cg" else tolerance}

        def product(v: np.ndarray) -> np.ndarray:
            if method == "cg":
                x, code = linalg.cg(matrix, v, rtol=tolerance, **to)
            else:
                x, code, *_ = linalg.lsmr(matrix, v, btol=tolerance, conlim=0.0, **to)
                code = code == 7  # the limit of iterations
            hint = "Add damping, or use method='lsmr' where the matrix has negative eigenvalues."
            must = f"enough for a residual of {tolerance:g}"
            check.argument(not code, "max_iterations", must, max_iterations, hint)
            return np.asarray(x, self.dtype)

        return self._of(product)

    def dense(self, max_size: int = 10_000) -> np.ndarray:
        """The matrix, [n, n], by n products; `hessian` is faster."""
        check.argument(self.size <= max_size, "max_size", f"at least {self.size}", max_size)
        return np.stack([self.product(e) for e in np.eye(self.size, dtype=self.dtype)])

    def _of(self, product: Callable[[np.ndarray], np.ndarray]) -> "Operator":
        return Operator(product, self.size, self.dtype, self.unravel)

    def _leaves(self) -> list[tuple[str, Any]]:
        tree = jax.eval_shape(self.unravel, jax.ShapeDtypeStruct((self.size,), self.dtype))
        return [
            (jax.tree_util.keystr(path, simple=True, separator="/"), x)
            for path, x in jax.tree.leaves_with_path(tree)
        ]

    def _paths(self) -> list[str]:
        """Those of all arrays and branches."""
        parts = [name.split("/") for name, _ in self._leaves()]
        return sorted({"/".join(p[: i + 1]) for p in parts for i in range(len(p))})


def operator(
    of: Landscape | Objective | Callable[[Params], jax.Array],
    params: Params | None = None,
    kind: str = "hessian",
) -> Operator:
    """The curvature of `of` at `params`.

    Args:
      of: a `Landscape`, which has its own parameters; a `jdl.Objective`, for one batch; or a
        scalar function of the parameters, for the Hessian only.
      params: a pytree of floating-point arrays.
      kind: "hessian"; "gauss_newton", Jᵀ ∇²ℓ J, positive semi-definite where the loss is convex in
        the outputs; "empirical_fisher", Σ gᵢ gᵢᵀ / B of the examples' gradients.

    >>> op = operator(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
    >>> op.product(np.ones(2, np.float32)).tolist()
    [6.0, 12.0]
    """
    check.one_of("kind", kind, METHODS)
    params = params_of(of, params)
    flat, unravel = ravel_pytree(params)
    product: Callable[[Any], Any]
    if isinstance(of, Landscape):
        product = functools.partial(of.product, kind)
    elif isinstance(of, Objective):
        objective, of_batch = of, batch_product(kind)
        product = lambda v: of_batch(objective, params, unravel(v))  # noqa: E731
    else:
        check.argument(callable(of), "of", "a Landscape, a jdl.Objective or a function", of)
        ok = kind == "hessian"
        check.argument(ok, "kind", "'hessian' for a function", kind, "Use a jdl.Objective.")
        # The parameters are an argument: XLA would take long to fold constants.
        of_function = jax.jit(functools.partial(hvp, of))
        product = lambda v: ravel_pytree(of_function(params, unravel(v)))[0]  # noqa: E731
    dtype = np.dtype(flat.dtype)
    return Operator(lambda v: np.asarray(product(jnp.asarray(v, dtype))), flat.size, dtype, unravel)
