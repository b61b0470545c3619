r"""Derivatives of a solution with respect to all other arrays in its equations.

The solution x*(θ) of F(x, θ) = 0 has, by the implicit function theorem,

    ∂x*/∂θ = −(∂F/∂x)⁻¹ ∂F/∂θ

at the cost of one linear system, however many iterations found x*. Forward and reverse mode work,
also for arrays that the function closes over.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdl.core import tree
from jdl.core.types import Params, PyTree
from jdl.optim.linear_cg import linear_cg

Product = Callable[[PyTree], PyTree]
Solve = Callable[[Product, PyTree], PyTree]


def root(
    optimality: Callable[[Params], PyTree],
    guess: Params,
    find: Callable[[Params], tuple[Params, Any]],
    solve: Solve | None,
    *,
    symmetric: bool,
) -> tuple[Params, Any]:
    """`find(guess)`, a root and auxiliary values, with the derivatives of a root of `optimality`.

    Auxiliary values get no derivatives. `solve(product, b)` is for the linear system, None for
    conjugate gradients; ∂F/∂x is symmetric, as a Hessian is, or `solve` must not rely on it.

    >>> find = lambda x: (jnp.sqrt(2.0) * jnp.ones_like(x), None)
    >>> f = lambda a: root(lambda x: x * x - a, 1.0 * a, find, None, symmetric=True)[0]
    >>> round(float(jax.grad(f)(jnp.asarray(2.0))), 4)
    0.3536

    References:
      Blondel et al., Efficient and modular implicit differentiation (2022), section 2.
    """
    own: Solve = conjugate_gradients if symmetric else normal_conjugate_gradients

    def tangent_solve(product: Product, b: PyTree) -> PyTree:
        # As one array: JAX cannot transpose a solve where a leaf of b is a known zero.
        flat, unravel = _raveled(b)
        ravel = lambda x: _raveled(x)[0]  # noqa: E731

        def chosen(flat_product: Product, flat: jax.Array) -> jax.Array:
            of_trees = lambda v: unravel(flat_product(ravel(v)))  # noqa: E731
            return ravel((own if solve is None else solve)(of_trees, unravel(flat)))

        flat_product = lambda v: ravel(product(unravel(v)))  # noqa: E731
        kind: Any = {"symmetric": True} if symmetric else {"transpose_solve": chosen}
        return unravel(jax.lax.custom_linear_solve(flat_product, flat, chosen, **kind))

    # custom_root needs a tangent for each output of `find`; integers have none.
    shapes = jax.eval_shape(find, guess)[1]

    def as_floats(_: Any, guess: Params) -> tuple[Params, Any]:
        params, rest = find(guess)
        return params, jax.tree.map(_to_floats, rest)

    params, rest = jax.lax.custom_root(optimality, guess, as_floats, tangent_solve, has_aux=True)
    return params, jax.tree.map(_from_floats, shapes, rest)


def custom_root(
    optimality_fun: Callable[..., PyTree],
    has_aux: bool = False,
    solve: Solve | None = None,
    reference_signature: Any = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for solvers `solver(init, *args, **kwargs)` of optimality_fun(sol, *args) = 0.

    Derivatives with respect to `args` and `kwargs`, forward and reverse, are those of the root;
    `init` has none. Arguments go to both functions as they were given.

    Args:
      optimality_fun: what is zero at the solution.
      has_aux: whether the solver returns `(sol, aux)`.
      solve: `solve(product, b)` for the linear system; None for conjugate gradients.
      reference_signature: accepted, and not needed.

    >>> sqrt = custom_root(lambda x, a: x * x - a)(lambda init, a: jnp.sqrt(a))
    >>> float(jax.grad(lambda a: sqrt(None, a))(4.0))
    0.25
    """
    del reference_signature

    def decorated(solver_fun: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(solver_fun)
        def solver(init: Any, *args: Any, **kwargs: Any) -> Any:
            fixed = jax.lax.stop_gradient
            found = solver_fun(fixed(init), *fixed(args), **fixed(kwargs))
            sol, aux = fixed(found if has_aux else (found, None))
            optimality = lambda x: optimality_fun(x, *args, **kwargs)  # noqa: E731
            sol, aux = root(optimality, sol, lambda _: (sol, aux), solve, symmetric=False)
            return (sol, aux) if has_aux else sol

        return solver

    return decorated


def custom_fixed_point(
    fixed_point_fun: Callable[..., PyTree],
    has_aux: bool = False,
    solve: Solve | None = None,
    reference_signature: Any = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`custom_root` for solvers of fixed_point_fun(sol, *args) = sol.

    Args:
      fixed_point_fun: what gives the solution back.
      has_aux: see `custom_root`.
      solve: likewise.
      reference_signature: likewise.

    >>> halving = custom_fixed_point(lambda x, a: 0.5 * (x + a))(lambda init, a: 1.0 * a)
    >>> float(jax.grad(lambda a: halving(None, a))(4.0))
    1.0
    """

    def moved(x: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        return tree.add_scaled(fixed_point_fun(x, *args, **kwargs), -1.0, x)

    return custom_root(moved, has_aux, solve, reference_signature)


def conjugate_gradients(product: Product, b: PyTree) -> PyTree:
    """Solves A x = b, A symmetric positive definite, to the precision of the dtype."""
    dtype = tree.accumulator(*(x.dtype for x in jax.tree.leaves(b)))
    limit = max(50, min(10 * tree.size(b), 2000))
    with jax.default_matmul_precision("highest"):
        eps = float(jnp.finfo(dtype).eps)
        return linear_cg(product, b, max_iterations=limit, tolerance=4 * eps).x


def normal_conjugate_gradients(product: Product, b: PyTree) -> PyTree:
    """Solves A x = b by conjugate gradients on Aᵀ A x = Aᵀ b, for any invertible A."""
    transposed = jax.linear_transpose(product, b)
    return conjugate_gradients(lambda v: transposed(product(v))[0], transposed(b)[0])


def dense(product: Product, b: PyTree) -> PyTree:
    """Solves A x = b with A as an array of n² numbers, by LU factorization."""
    flat, unravel = ravel_pytree(b)
    column = lambda v: ravel_pytree(product(unravel(v)))[0]  # noqa: E731
    with jax.default_matmul_precision("highest"):
        matrix = jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))
        return unravel(jnp.linalg.solve(matrix, flat))


def _raveled(x: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """All leaves as one array of their common dtype, and the inverse."""
    dtype = tree.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(x)))
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), x))
    back = lambda v: jax.tree.map(lambda a, b: a.astype(b.dtype), unravel(v), x)  # noqa: E731
    return flat, back


def _to_floats(x: Any) -> jax.Array:
    """Any array as floats, without loss: integers as two halves of 16 bits."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype.itemsize > 4:
        return x.astype(jnp.float64)  # 64-bit integers exist only where float64 does
    x = x.astype(jnp.uint32)
    return jnp.stack([x >> 16, x & 0xFFFF]).astype(jnp.float32)


def _from_floats(like: Any, x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(like.dtype, jnp.inexact):
        return x
    if x.dtype == jnp.float64:
        return x.astype(like.dtype)
    halves = x.astype(jnp.uint32)
    bits = (halves[0] << 16) | halves[1]
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(jnp.empty((), like.dtype))
        return jax.random.wrap_key_data(bits, impl=impl)
    return bits.astype(like.dtype)
