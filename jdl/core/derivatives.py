"""Products with Jacobians and Hessians, also of functions with a `jax.custom_vjp` inside.

Those have no forward mode: their Jacobian is the transpose of the backward rule, by reverse mode
over it. A rule that is not linear is taken as it is near 0: clipping counts as the identity.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.jaxpr import bind, equations, lacks_forward_mode, place_of
from jdl.core.types import PyTree


def linearize(fn: Callable[[PyTree], Any], x: PyTree) -> tuple[Any, Any, Any]:
    """`fn(x)`, v -> J v and u -> Jᵀ u with its Jacobian J, as by `jax.linearize`.

    Raises:
      ArgumentError: if the backward rule of a `jax.custom_vjp` cannot be differentiated.

    >>> outputs, push, pull = linearize(jnp.sin, jnp.zeros(2))
    >>> push(jnp.ones(2)).tolist(), pull(jnp.ones(2)).tolist()
    ([1.0, 1.0], [1.0, 1.0])
    """
    outputs, push = jax.linearize(fn, x)
    if not lacks_forward_mode(push):
        return outputs, push, lambda u: jax.linear_transpose(push, x)(u)[0]
    with _blaming_rules(fn, x):
        outputs, push, pull = _by_reverse_mode(fn, x)
        jax.eval_shape(lambda v: pull(push(v)), x)
    return outputs, push, pull


def _by_reverse_mode(fn: Callable[[PyTree], Any], x: PyTree) -> tuple[Any, Any, Any]:
    outputs, pull = jax.vjp(fn, x)
    # Not at 0, where the norms in some clipping rules have no derivative.
    small = lambda y: 1e-8 * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)  # noqa: E731
    _, push = jax.vjp(lambda u: pull(u)[0], jax.tree.map(small, outputs))
    return outputs, lambda v: push(v)[0], lambda u: jax.vjp(push, x)[1]((u,))[0]


def hvp(
    fn: Callable[[PyTree], Any],
    x: PyTree,
    v: PyTree,
    gradient: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """∇²fn(x) v of a scalar function, by forward over reverse mode where it can be.

    Matrix products have the highest precision: with less, conjugate gradients lose conjugacy.
    `gradient` replaces `jax.grad(fn)`.

    Raises:
      ArgumentError: if the backward rule of a `jax.custom_vjp` cannot be differentiated.

    >>> hvp(lambda x: jnp.sum(x**3), jnp.ones(2), jnp.array([1.0, 2.0])).tolist()
    [6.0, 12.0]
    """
    of = gradient or jax.grad(fn)
    product = jax.jit(lambda x, v: jax.jvp(of, (x,), (v,))[1])
    with jax.default_matmul_precision("highest"):
        with _blaming_rules(fn, x):
            if lacks_forward_mode(product.trace(x, v).jaxpr):
                return jax.vjp(of, x)[1](v)[0]
        return product(x, v)


@contextmanager
def _blaming_rules(fn: Callable[[PyTree], Any], x: PyTree) -> Iterator[None]:
    """Names the backward rules in `fn` that are to blame for an error."""
    try:
        yield
    except Exception as error:
        calls = equations(jax.make_jaxpr(fn)(x))
        calls = (e for e in calls if e.primitive.name == "custom_vjp_call" and not _reversible(e))
        names = ", ".join(sorted({place_of(e) for e in calls}))
        if not names:
            raise
        raise check.ArgumentError(
            f"Curvature products differentiate backward rules, but that of {names} has no "
            f"derivative: {check.reason(error).rstrip('.')}. Write it with operations that have "
            "one, or use an optimizer without curvature products: adam, lbfgs, cg."
        ) from error


def _reversible(call: Any) -> bool:
    """Whether reverse mode goes over the backward rule of a `custom_vjp_call`."""
    args = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in call.invars]
    try:
        jax.eval_shape(lambda x: _by_reverse_mode(lambda x: bind(call, x), x)[1](x), args)
    except Exception:
        return False
    return True
