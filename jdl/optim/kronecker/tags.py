"""Declares a layer whose product does not appear in its jaxpr."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir


def tag_dense(y: jax.Array, x: jax.Array, kernel: jax.Array, bias: Any = None) -> jax.Array:
    """`y`, declared to be x @ kernel (+ bias), over the last axis of x.

    For functions whose product is hidden: a custom derivative, a custom kernel.

    >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> tag_dense(x @ kernel, x, kernel).shape
    (2, 4)
    """
    operands = (y, x, kernel) if bias is None else (y, x, kernel, bias)
    return _tag_p.bind(*operands, conv=None)


def tag_conv(
    y: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    bias: Any = None,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """`y`, declared to be the convolution of x [B, ..., C] with kernel [..., C, K].

    Args:
      y: [B, ..., K].
      x: the inputs.
      kernel: of as many spatial axes as x.
      bias: [K], or None.
      strides: one per spatial axis.
      padding: (low, high), one per spatial axis.
    """
    operands = (y, x, kernel) if bias is None else (y, x, kernel, bias)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _tag_p.bind(*operands, conv=(tuple(int(s) for s in strides), pads))


_tag_p = jex.Primitive("layer_tag")
_tag_p.def_impl(lambda y, *_, conv: y)
_tag_p.def_abstract_eval(lambda y, *_, conv: y)
mlir.register_lowering(_tag_p, mlir.lower_fun(lambda y, *_, conv: y, multiple_results=False))


def _tag_jvp(primals: Any, tangents: Any, *, conv: Any) -> Any:
    y = _tag_p.bind(*primals, conv=conv)
    t = tangents[0]
    return y, jnp.zeros_like(y) if isinstance(t, ad.Zero) else t


def _tag_batch(args: Any, axes: Any, *, conv: Any) -> Any:
    # Under vmap the declaration is dropped: the batched product is a different one.
    return args[0], axes[0]


ad.primitive_jvps[_tag_p] = _tag_jvp
batching.primitive_batchers[_tag_p] = _tag_batch
