"""The function that a solver minimizes, in any of jaxopt's forms, as one `Problem`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree


class Problem(NamedTuple):
    """A function to minimize, with its data in place."""

    # params -> f; ignores the extra keywords of an optimizer's update
    value: Callable[..., jax.Array]
    evaluate: Callable[[Params], tuple[jax.Array, Params, Any]]  # params -> (f, ∇f, aux)
    objective: Objective | None = None  # the `jdl.Objective`, where it is one; else None
    # params -> (f, ∇f, aux), where the gradient is the caller's own; else None
    value_and_grad_fn: Callable[[Params], tuple[jax.Array, Params, Any]] | None = None
    # (lower, upper), pytrees of the parameters' structure, or None
    bounds: tuple[Params, Params] | None = None
    # (x, s) -> argmin_y ½ ‖x − y‖² + s g(y), for f + g; else None
    prox: Callable[[Params, Any], Params] | None = None
    # params -> r, for least squares; else None
    residual_fn: Callable[[Params], PyTree] | None = None
    # (args, kwargs), the arguments of the function beyond the parameters
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


def make_problem(
    fun: Callable[..., Any] | Objective,
    value_and_grad: bool | Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Problem:
    """The `Problem` of a function in one of jaxopt's forms, or of a `jdl.Objective`.

    `fun(params, *args, **kwargs)` returns the value; with `has_aux` (value, aux); with
    `value_and_grad=True` the pair of that and the gradient.
    """
    if isinstance(fun, Objective):
        ok = not (args or kwargs or has_aux or value_and_grad)
        must = "a plain function if further arguments, has_aux or value_and_grad are given"
        check.argument(ok, "fun", must, type(fun).__name__)
        evaluated = lambda params: (*fun.value_and_grad(params)[:2], None)  # noqa: E731
        return Problem(fun.value, evaluated, fun)

    def split(out: Any) -> tuple[Any, Any]:
        return out if has_aux else (out, None)

    # optax's line searches refuse update's extra keywords unless value_fn names them.
    def value(
        params: Params,
        *,
        obj_fn: Any = None,
        objective: Any = None,
        value_and_grad_fn: Any = None,
        reused: Any = None,
        **_: Any,
    ) -> Any:
        if value_and_grad is True:
            return evaluate(params)[0]
        return split(fun(params, *args, **kwargs))[0]

    def evaluate(params: Params) -> tuple[jax.Array, Params, Any]:
        if value_and_grad is False:
            wrapped = lambda p: split(fun(p, *args, **kwargs))  # noqa: E731
            (f, aux), grad = jax.value_and_grad(wrapped, has_aux=True)(params)
        else:
            both: Callable[..., Any] = fun if value_and_grad is True else value_and_grad
            out, grad = both(params, *args, **kwargs)
            f, aux = split(out)
        return f, grad, aux

    own = None if value_and_grad is False else evaluate
    return Problem(value, evaluate, value_and_grad_fn=own, arguments=(args, kwargs))


def real_view(x: PyTree, *, conjugate: bool = False) -> PyTree:
    """Complex leaves as real ones with a leading axis of 2: real and imaginary parts.

    `conjugate` for gradients: JAX's of a real function is ∂f/∂x − i ∂f/∂y.

    >>> real_view([jnp.array([1.0 + 2.0j])])
    [Array([[1.],
           [2.]], dtype=float32)]
    """
    sign = -1.0 if conjugate else 1.0

    def leaf(x: jax.Array) -> jax.Array:
        return jnp.stack([x.real, sign * x.imag]) if jnp.iscomplexobj(x) else x

    return jax.tree.map(leaf, x)


def complex_view(
    x: PyTree, like: PyTree, *, conjugate: bool = False, lead: tuple[Any, ...] = ()
) -> PyTree:
    """The inverse of `real_view`, for leaves of the types of `like`, after `lead` axes."""
    sign = -1.0 if conjugate else 1.0

    def leaf(x: jax.Array, like: jax.Array) -> jax.Array:
        if not jnp.iscomplexobj(like):
            return x
        return jax.lax.complex(x[(*lead, 0)], sign * x[(*lead, 1)])

    return jax.tree.map(leaf, x, like)


def real_problem(problem: Problem, like: Params) -> Problem:
    """The problem as a function of `real_view(like)`."""
    if not any(jnp.iscomplexobj(x) for x in jax.tree.leaves(like)):
        return problem
    check.argument(problem.bounds is None, "bounds", "None with complex parameters", "bounds")
    must = "real, where there is a proximity operator or a projection"
    check.argument(problem.prox is None, "init_params", must, "complex")

    def evaluate(params: Params) -> tuple[jax.Array, Params, Any]:
        value, grad, aux = problem.evaluate(complex_view(params, like))
        return value, real_view(grad, conjugate=True), aux

    residual_fn = problem.residual_fn
    return problem._replace(
        value=lambda params, **_: problem.value(complex_view(params, like)),
        evaluate=evaluate,
        value_and_grad_fn=None if problem.value_and_grad_fn is None else evaluate,
        residual_fn=residual_fn and (lambda params: residual_fn(complex_view(params, like))),
    )


def check_problem(problem: Problem, params: Params, name: str) -> None:
    """Refuses parameters and values that are not real, and gradients of another shape."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    check.argument(bool(leaves), "init_params", "a pytree with at least one array", params)
    for path, leaf in leaves:
        kind = jnp.asarray(leaf).dtype
        where = f"init_params{jax.tree_util.keystr(path)}"
        hint = f"{name} optimizes real parameters only."
        if not jnp.issubdtype(kind, jnp.floating):
            hint += " Convert it with .astype(jnp.float32)."
        real = jnp.issubdtype(kind, jnp.floating)
        check.argument(real, where, "an array of floating-point numbers", str(kind), hint)
    out = jax.eval_shape(problem.value, params)
    shape: Any = getattr(out, "shape", None)
    dtype: Any = getattr(out, "dtype", None)
    got = f"{dtype}{list(shape)}" if dtype is not None and shape is not None else type(out).__name__
    hint = "Make its value floating-point."
    if isinstance(out, tuple):
        hint = "Set has_aux=True for a function that returns (value, aux)."
    elif shape != ():
        hint = "Take the sum or the mean of it."
    ok = shape == () and dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    check.argument(ok, "fun", "a function that returns a real scalar", got, hint)
    grad = shapes(jax.eval_shape(lambda p: problem.evaluate(p)[1], params))
    wanted = shapes(params)
    hint = "Its gradient must have the shapes and dtypes of the parameters."
    check.argument(grad == wanted, "value_and_grad", f"of gradient {wanted}", grad, hint)


def shapes(tree: PyTree) -> dict[str, str]:
    """Each leaf's path, dtype and shape.

    >>> shapes({"w": jnp.zeros((2, 3))})
    {"['w']": 'float32[2, 3]'}
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path) or "params": f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        for path, x in found
    }


def as_arrays(params: PyTree) -> PyTree:
    """All leaves as arrays; Python numbers, integers too, become floats as in jaxopt."""

    def leaf(x: Any) -> jax.Array:
        x = jnp.asarray(float(x)) if isinstance(x, int | float) else jnp.asarray(x)
        return jnp.asarray(x, x.dtype)  # not weakly typed, which would compile again

    return jax.tree.map(leaf, params)
