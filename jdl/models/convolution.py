r"""Convolutions whose derivatives are fast inside loops on CPUs.

XLA's CPU compiler has a fast routine only for convolutions with axes in one canonical order, and
transposes others into that order only outside of loops. JAX's derivatives of a convolution are not
in that order; in a line search, a conjugate-gradient loop or a scan over microbatches they are 10
to 50 times slower than outside (jax-ml/jax issue 12868). Here the derivatives are canonical
convolutions of transposed arrays, as XLA itself makes them outside of loops:

    y = x ∗ k,      ∂x = y ∗ flip(kᵀ),      ∂k = (xᵀ ∗ yᵀ)ᵀ

Each is a convolution again, so derivatives of every order are closed under this rule.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_CANONICAL = ("NHWC", "HWIO", "NHWC")

Padding = tuple[tuple[int, int], tuple[int, int]]


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv(conv_general_dilated=…)`.

    Plain two-dimensional convolutions on CPUs have other derivative rules; the values are the same.

    >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
    >>> conv_general_dilated(
    ...     x, kernel, (1, 1), "VALID", dimension_numbers=_CANONICAL
    ... )[0, :, :, 0].tolist()
    [[18.0, 18.0], [18.0, 18.0]]
    """
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, options.get("dimension_numbers"))
    plain = (
        x.ndim == 4
        and jax.default_backend() == "cpu"
        and numbers == lax.conv_dimension_numbers(x.shape, kernel.shape, _CANONICAL)
        and options.get("feature_group_count", 1) == 1
        and options.get("batch_group_count", 1) == 1
        and options.get("preferred_element_type") is None
        and _ones(strides)
        and _ones(options.get("lhs_dilation"))
        and _ones(options.get("rhs_dilation"))
    )
    if not plain:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    window = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, (1, 1), padding)
    pads: Padding = tuple((int(low), int(high)) for low, high in padding)  # type: ignore[assignment]
    if any(not 0 <= p < n for pair, n in zip(pads, window, strict=True) for p in pair):
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return _conv_p.bind(x, kernel, padding=pads)


def _ones(value: Any) -> bool:
    each = value if isinstance(value, tuple | list) else [value]
    return value is None or all(n == 1 for n in each)


def _reference(x: jax.Array, kernel: jax.Array, *, padding: Padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_CANONICAL)


def _to_x(y: jax.Array, x: Any, kernel: jax.Array, *, padding: Padding) -> jax.Array:
    """The adjoint in x: the gradient of ⟨y, x ∗ k⟩ with respect to x."""
    flipped = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    around = [(n - 1 - p[0], n - 1 - p[1]) for n, p in zip(kernel.shape[:2], padding, strict=True)]
    return _conv_p.bind(y, flipped, padding=tuple(around))


def _to_kernel(y: jax.Array, x: jax.Array, kernel: Any, *, padding: Padding) -> jax.Array:
    """The adjoint in k: a convolution with examples as channels and y as the window."""
    product = _conv_p.bind(x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), padding=padding)
    return product.transpose(1, 2, 0, 3)


def _abstract(x: Any, kernel: Any, *, padding: Padding) -> jax.core.ShapedArray:
    arrays = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel))
    out = jax.eval_shape(functools.partial(_reference, padding=padding), *arrays)
    return jax.core.ShapedArray(out.shape, x.dtype)


def _batch(args: Any, axes: Any, *, padding: Padding) -> tuple[jax.Array, int]:
    mapped = jax.vmap(lambda x, k: _reference(x, k, padding=padding), in_axes=tuple(axes))
    return mapped(*args), 0


_conv_p = Primitive("canonical_conv")
_conv_p.def_impl(jax.jit(_reference, static_argnames="padding"))
_conv_p.def_abstract_eval(_abstract)
ad.defbilinear(_conv_p, _to_x, _to_kernel)
batching.primitive_batchers[_conv_p] = _batch
mlir.register_lowering(_conv_p, mlir.lower_fun(_reference, multiple_results=False))
