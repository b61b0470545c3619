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


@dataclass(eq=False)
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
        like = jax.eval_shape(self.unravel, jax.ShapeDtypeStruct((self.size,), self.dtype))
        leaves = {path_name(path): x for path, x in jax.tree.leaves_with_path(like)}
        ends = np.cumsum([x.size for x in leaves.values()])
        parts = {
            name: np.arange(end - x.size, end)
            for (name, x), end in zip(leaves.items(), ends, strict=True)
            if any(f"{name}/".startswith(f"{path}/") for path in paths)
        }
        known = all(any(f"{n}/".startswith(f"{path}/") for n in leaves) for path in paths)
        check.argument(known and bool(paths), "paths", f"among {', '.join(leaves)}", paths)
        index = np.concatenate([parts[name] for name in sorted(parts)])

        def product(v: np.ndarray) -> np.ndarray:
            whole = np.zeros(self.size, self.dtype)
            whole[index] = v
            return self.product(whole)[index]

        chosen = {name: np.zeros(leaves[name].shape, self.dtype) for name in parts}
        return Operator(product, len(index), self.dtype, ravel_pytree(chosen)[1])

    def inverse(
        self,
        damping: float = 0.0,
        *,
        method: str = "cg",
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
    ) -> "Operator":
        """(A + λ)⁻¹, each of whose products SciPy solves for iteratively.

        Args:
          damping: λ.
          method: "cg" where A + λ is positive definite; "lsmr" for any other, at two products an
            iteration: the least-squares solution where it is singular.
          tolerance: on the residual, relative to the vector.
          max_iterations: for one product, which raises an ArgumentError where it takes more.

        >>> half = operator(lambda x: x @ x, jnp.ones(2)).inverse()
        >>> half.product(np.ones(2, np.float32)).tolist()
        [0.5, 0.5]
        """
        from scipy.sparse import linalg  # slow to import

        check.one_of("method", method, ["cg", "lsmr"])

        def shifted(v: np.ndarray) -> np.ndarray:
            return self.product(v.astype(self.dtype)) + self.dtype.type(damping) * v

        matrix = linalg.LinearOperator((self.size,) * 2, shifted, shifted, dtype=self.dtype)

        def product(v: np.ndarray) -> np.ndarray:
            if method == "cg":
                x, code = linalg.cg(matrix, v, rtol=tolerance, maxiter=max_iterations)
            else:
                options = {"atol": tolerance, "btol": tolerance, "conlim": 0.0}
                x, code, *_ = linalg.lsmr(matrix, v, maxiter=max_iterations, **options)
                code = code == 7  # SciPy's for the limit of iterations
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


def path_name(path: Any) -> str:
    """A leaf's path, such as "head/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
        product = lambda v: of_batch(objective, params, v)  # noqa: E731
    else:
        check.argument(callable(of), "of", "a Landscape, a jdl.Objective or a function", of)
        ok = kind == "hessian"
        check.argument(ok, "kind", "'hessian' for a function", kind, "Use a jdl.Objective.")
        # The parameters are an argument: XLA would take long to fold constants.
        of_function = jax.jit(functools.partial(hvp, of))
        product = lambda v: ravel_pytree(of_function(params, unravel(v)))[0]  # noqa: E731
    dtype = np.dtype(flat.dtype)
    return Operator(lambda v: np.asarray(product(jnp.asarray(v, dtype))), flat.size, dtype, unravel)
