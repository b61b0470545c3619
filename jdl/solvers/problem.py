"""What a solver is given, in whichever of jaxopt's forms, as one `Problem`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree


class Problem(NamedTuple):
    """A function to minimize, with its data in place.

    Attributes:
      value: params -> f; ignores the keywords that optax's line searches pass on.
      evaluate: params -> (f, ∇f, aux).
      objective: what stands for the function in an optimizer's update where autodiff of `value`
        is not what is wanted: a `jdl.Objective`, or a gradient of the caller's own; else None.
      bounds: (lower, upper), pytrees of the parameters' structure, or None.
      residual_fn: params -> r, for least squares; else None.
      arguments: (args, kwargs), which the function is given beyond the parameters.
    """

    value: Callable[..., jax.Array]
    evaluate: Callable[[Params], tuple[jax.Array, Params, Any]]
    objective: Any = None
    bounds: tuple[Params, Params] | None = None
    residual_fn: Callable[[Params], PyTree] | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


class OwnGradient:
    """A function whose gradient the caller gives, as second-order updates want to see it."""

    def __init__(self, value: Callable[..., jax.Array], evaluate: Callable[..., Any]):
        self.value, self.value_and_grad = value, evaluate

    def grad(self, params: Params) -> Params:
        """∇f."""
        return self.value_and_grad(params)[1]

    def hvp(self, params: Params, vector: PyTree) -> PyTree:
        """∇²f v, by differentiating the caller's gradient."""
        with jax.default_matmul_precision("highest"):
            return jax.jvp(self.grad, (params,), (vector,))[1]

    def curvature_share(self) -> float:
        """There is one batch for all."""
        return 1.0


def ignoring_keywords(value: Callable[[Params], Any]) -> Callable[..., Any]:
    """`value`, deaf to what an update is told: optax's line searches pass on what it names."""

    def deaf(
        params: Params,
        *,
        obj_fn: Any = None,
        objective: Any = None,
        reused: Any = None,
        **_: Any,
    ) -> Any:
        del obj_fn, objective, reused
        return value(params)

    return deaf


def make(
    fun: Any,
    value_and_grad: bool | Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Problem:
    """The `Problem` of a function in one of jaxopt's forms, or of a `jdl.Objective`.

    Args:
      fun: `fun(params, *args, **kwargs) -> value`; with `has_aux` `(value, aux)`; with
        `value_and_grad=True` the pair of that and the gradient. Or a `jdl.Objective`.
      value_and_grad: whether `fun` gives the gradient too, or the function that does.
      has_aux: whether values come as `(value, aux)`.
      args: further positional arguments.
      kwargs: further keyword arguments.
    """
    if isinstance(fun, Objective):
        check.argument(
            not (args or kwargs or has_aux or value_and_grad),
            "fun",
            "a plain function for further arguments, has_aux or value_and_grad to be used",
            type(fun).__name__,
        )
        objective = fun
        return Problem(
            objective.value,
            lambda params: (*objective.value_and_grad(params)[:2], None),
            objective,
        )

    def split(out: Any) -> tuple[Any, Any]:
        value, aux = out if has_aux else (out, None)
        return value, aux

    if value_and_grad is False:

        @ignoring_keywords
        def value(params: Params) -> Any:
            return split(fun(params, *args, **kwargs))[0]

        def evaluate(params: Params) -> tuple[jax.Array, Params, Any]:
            wrapped = lambda p: split(fun(p, *args, **kwargs))  # noqa: E731
            (f, aux), grad = jax.value_and_grad(wrapped, has_aux=True)(params)
            return f, grad, aux

        return Problem(value, evaluate, arguments=(args, kwargs))

    both: Callable[..., Any] = fun if value_and_grad is True else value_and_grad

    def own_evaluate(params: Params) -> tuple[jax.Array, Params, Any]:
        out, grad = both(params, *args, **kwargs)
        return (split(out)[0], grad, split(out)[1])

    @ignoring_keywords
    def own_value(params: Params) -> Any:
        if value_and_grad is True:
            return own_evaluate(params)[0]
        return split(fun(params, *args, **kwargs))[0]

    own = OwnGradient(own_value, own_evaluate)
    return Problem(own_value, own_evaluate, own, arguments=(args, kwargs))


def check_problem(problem: Problem, params: Params, name: str) -> None:
    """Refuses parameters that are not real, values that are not real scalars, alien gradients."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    check.argument(bool(leaves), "init_params", "a pytree with at least one array", params)
    for path, leaf in leaves:
        kind = jnp.asarray(leaf).dtype
        where = f"init_params{jax.tree_util.keystr(path)}"
        hint = f"{name} moves real parameters only."
        if jnp.issubdtype(kind, jnp.complexfloating):
            hint += " Give real and imaginary parts as two arrays."
        elif not jnp.issubdtype(kind, jnp.floating):
            hint += " Make it one with .astype(jnp.float32)."
        real = jnp.issubdtype(kind, jnp.floating)
        check.argument(real, where, "an array of floating-point numbers", str(kind), hint)
    out = jax.eval_shape(problem.value, params)
    shape: Any = getattr(out, "shape", None)
    dtype: Any = getattr(out, "dtype", None)
    ok = shape == () and dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    got = f"{dtype}{list(shape)}" if dtype is not None and shape is not None else type(out).__name__
    hint = "Set has_aux=True for a function that returns (value, aux)."
    if isinstance(out, tuple):
        check.argument(ok, "fun", "a function that returns a real scalar", f"a {got}", hint)
    if shape != ():
        hint = "Take the sum or the mean of it."
    elif not ok:
        hint = "Make its value floating-point."
    check.argument(ok, "fun", "a function that returns a real scalar", got, hint)
    grad = jax.eval_shape(lambda p: problem.evaluate(p)[1], params)
    told, wanted = shapes(grad), shapes(params)
    hint = "It must give the gradient for the parameters, one number for each of theirs."
    check.argument(told == wanted, "value_and_grad's gradient", f"of shapes {wanted}", told, hint)


def shapes(of: PyTree) -> Any:
    """The pytree with each array's type and shape in its place, as words."""
    found = jax.tree_util.tree_leaves_with_path(of)
    return {
        jax.tree_util.keystr(path) or "params": f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        for path, x in found
    }


def as_arrays(params: PyTree) -> PyTree:
    """Python numbers as arrays, integers among them as floats: what jaxopt's users hand over."""

    def leaf(x: Any) -> Any:
        x = jnp.asarray(float(x)) if isinstance(x, int | float) else jnp.asarray(x)
        return jnp.asarray(x, x.dtype)  # of a firm type: a weak one would compile anew

    return jax.tree.map(leaf, params)
