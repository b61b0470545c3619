r"""Random vectors whose second moment is a loss's Hessian with respect to the outputs.

    E[uᵢ uᵢᵀ] = ∇²ℓᵢ,     so     E[(Jᵢᵀ uᵢ)(Jᵢᵀ uᵢ)ᵀ] = Jᵢᵀ ∇²ℓᵢ Jᵢ

Pulled back through the model, they give the Gauss-Newton matrix's second moments, which for
negative log-likelihoods of an exponential family are the Fisher matrix's. The Hessian's factor is
found by one of four routes, for any per-example loss:

- "softmax":  ∇²ℓ = c (diag p − p pᵀ) over the last axis, p = softmax(outputs)
- "diagonal": outputs are independent, as in a sigmoid's cross-entropy or squared errors
- "dense":    few outputs per example; the whole Hessian is computed and factored
- "gradient": otherwise; u is the loss's own gradient (empirical Fisher) with a random sign

Whether one of the first two holds is tested on random outputs and targets when a step is traced.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import tree
from jdl.core.types import Batch, Key, Loss, Outputs

ROUTES = ("softmax", "diagonal", "dense", "gradient")
MOST_DENSE = 64  # outputs per example up to which the whole Hessian is computed

_ROWS = 3  # examples of the test


def route(loss: Loss, outputs: Outputs, batch: Batch) -> str:
    """The route for this loss, one of `ROUTES`.

    Args:
      loss: `loss(outputs, batch) -> float[B]`.
      outputs: arrays or their shapes.
      batch: likewise; values are not used.

    >>> import optax
    >>> shape = jax.ShapeDtypeStruct((8, 5), jnp.float32)
    >>> def loss(outputs, batch):
    ...     return optax.sigmoid_binary_cross_entropy(outputs, batch["y"]).sum(axis=1)
    >>> route(loss, shape, {"y": shape})
    'diagonal'
    """
    leaves = jax.tree.leaves(outputs)
    for name in ("softmax", "diagonal"):
        if name == "softmax" and (len(leaves) != 1 or leaves[0].ndim < 2):
            continue
        try:
            with jax.ensure_compile_time_eval():
                found = _tried(name, loss, outputs, batch)
        except (jax.errors.JAXTypeError, TypeError, ValueError, NotImplementedError):
            # The loss closes over traced values, or depends on the batch's size.
            found = False
        if found:
            return name
    size = sum(math.prod(x.shape[1:]) for x in leaves)
    return "dense" if size <= MOST_DENSE else "gradient"


def draw(kind: str, loss: Loss, outputs: Outputs, batch: Batch, keys: Key) -> Outputs:
    """One random u per example, of the structure of `outputs`, by the route `kind`.

    Args:
      kind: one of `ROUTES`.
      loss: `loss(outputs, batch) -> float[B]`.
      outputs: where the Hessian is taken.
      batch: the examples.
      keys: one per example, so that u does not depend on how devices share the examples.
    """
    leaves, structure = jax.tree.flatten(outputs)
    if kind == "gradient":
        signs = jax.vmap(lambda key: jax.random.rademacher(key, (), jnp.float32))(keys)
        grads = _grad(loss, outputs, batch)
        return _cast(jax.tree.map(lambda g: g * _rows(signs, g), grads), outputs)

    def row(key: Key) -> list[jax.Array]:
        return [
            jax.random.rademacher(jax.random.fold_in(key, i), z.shape[1:], _wide(z))
            for i, z in enumerate(leaves)
        ]

    noise = jax.tree.unflatten(structure, jax.vmap(row)(keys))
    root = _dense_root if kind == "dense" else functools.partial(_root, kind)
    return _cast(root(loss, outputs, batch, noise), outputs)


def columns(kind: str, loss: Loss, outputs: Outputs, batch: Batch) -> tuple[int, Callable]:
    """K and column(k), the columns of the Hessian's root: Σₖ uₖ uₖᵀ = ∇²ℓ, not random."""
    leaves, structure = jax.tree.flatten(outputs)
    sizes = [math.prod(z.shape[1:]) for z in leaves]
    if kind == "gradient":
        return 1, lambda k: _cast(_grad(loss, outputs, batch), outputs)

    def unit(k: jax.Array) -> Outputs:
        flat = jax.nn.one_hot(k, sum(sizes), dtype=_wide(leaves[0]))
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        return jax.tree.unflatten(
            structure,
            [
                jnp.broadcast_to(p.reshape(1, *z.shape[1:]), z.shape).astype(_wide(z))
                for p, z in zip(parts, leaves, strict=True)
            ],
        )

    def column(k: jax.Array) -> Outputs:
        if kind == "dense":
            return _cast(_dense_root(loss, outputs, batch, unit(k)), outputs)
        return _cast(_root(kind, loss, outputs, batch, unit(k)), outputs)

    return sum(sizes), column


def _root(kind: str, loss: Loss, outputs: Outputs, batch: Batch, v: Outputs) -> Outputs:
    """S v with S Sᵀ = ∇²ℓ."""
    if kind == "diagonal":
        ones = jax.tree.map(jnp.ones_like, outputs)
        diagonal = _product(loss, outputs, batch, ones)
        return jax.tree.map(
            lambda d, n: jnp.sqrt(jnp.maximum(d, 0.0)).astype(n.dtype) * n, diagonal, v
        )
    (z,), structure = jax.tree.flatten(outputs)
    (v,) = jax.tree.leaves(v)
    root = jnp.sqrt(jax.nn.softmax(z.astype(v.dtype), axis=-1))
    scale = jnp.sqrt(jnp.maximum(_softmax_scale(loss, outputs, batch), 0.0))
    u = root * v - root * root * jnp.sum(root * v, axis=-1, keepdims=True)
    return jax.tree.unflatten(structure, [scale * u])


def _softmax_scale(loss: Loss, outputs: Outputs, batch: Batch) -> jax.Array:
    """The scale c of ∇²ℓ = c (diag p − p pᵀ), for each row of outputs."""
    ((z,), structure) = jax.tree.flatten(outputs)
    wide = z.astype(_wide(z))
    # All entries differ, so that its variance under p is positive.
    v = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, z.shape[-1], dtype=wide.dtype), z.shape)
    hv = _product(loss, outputs, batch, jax.tree.unflatten(structure, [v.astype(z.dtype)]))
    p = jax.nn.softmax(wide, axis=-1)
    mean = jnp.sum(p * v, axis=-1, keepdims=True)
    variance = jnp.sum(p * jnp.square(v - mean), axis=-1, keepdims=True)
    (hv,) = jax.tree.leaves(hv)
    found = jnp.sum(v * hv.astype(wide.dtype), axis=-1, keepdims=True)
    return found / jnp.maximum(variance, jnp.finfo(wide.dtype).tiny)


def _dense_root(loss: Loss, outputs: Outputs, batch: Batch, v: Outputs) -> Outputs:
    """S v of the symmetric root S of each example's Hessian."""
    leaves, structure = jax.tree.flatten(outputs)
    count, size = leaves[0].shape[0], [math.prod(z.shape[1:]) for z in leaves]

    def flat(parts: Any) -> jax.Array:
        return jnp.concatenate([z.reshape(count, -1) for z in jax.tree.leaves(parts)], axis=1)

    def structured(x: jax.Array) -> Outputs:
        parts = jnp.split(x, np.cumsum(size)[:-1], axis=1)
        return jax.tree.unflatten(
            structure, [p.reshape(z.shape) for p, z in zip(parts, leaves, strict=True)]
        )

    def row(unit: jax.Array) -> jax.Array:
        v = structured(jnp.broadcast_to(unit[None], (count, sum(size))))
        v = jax.tree.map(lambda v, z: v.astype(z.dtype), v, outputs)
        return flat(_product(loss, outputs, batch, v))

    dtype = _wide(leaves[0])
    hessian = jax.lax.map(row, jnp.eye(sum(size), dtype=dtype)).astype(dtype).transpose(1, 0, 2)
    values, vectors = jnp.linalg.eigh(0.5 * (hessian + hessian.transpose(0, 2, 1)))
    inner = jnp.einsum("bij,bi->bj", vectors, flat(v))
    u = jnp.einsum("bij,bj->bi", vectors, jnp.sqrt(jnp.maximum(values, 0.0)) * inner)
    return structured(u)


def _grad(loss: Loss, outputs: Outputs, batch: Batch) -> Outputs:
    return jax.grad(lambda z: jnp.sum(loss(z, batch)))(outputs)


def _product(loss: Loss, outputs: Outputs, batch: Batch, v: Outputs) -> Outputs:
    """∇²ℓᵢ vᵢ for each example."""
    return jax.jvp(lambda z: _grad(loss, z, batch), (outputs,), (v,))[1]


def _tried(name: str, loss: Loss, outputs: Outputs, batch: Batch) -> bool:
    """Whether S Sᵀ v = ∇²ℓ v on random outputs, targets and vectors."""
    random = np.random.default_rng(0)
    outputs = jax.tree.map(lambda z: _random(random, z, normal=True), outputs)
    batch = {k: jax.tree.map(lambda x: _random(random, x), v) for k, v in batch.items()}

    @jax.jit
    def both(outputs: Outputs, v: Outputs) -> tuple[Outputs, Outputs]:
        truth = _product(loss, outputs, batch, v)
        if name == "diagonal":
            ones = jax.tree.map(jnp.ones_like, outputs)
            return truth, jax.tree.map(jnp.multiply, _product(loss, outputs, batch, ones), v)
        (z,), structure = jax.tree.flatten(outputs)
        (w,) = jax.tree.leaves(v)
        p = jax.nn.softmax(z, axis=-1)
        guess = p * w - p * jnp.sum(p * w, axis=-1, keepdims=True)
        return truth, jax.tree.unflatten(structure, [_softmax_scale(loss, outputs, batch) * guess])

    def sparse(z: jax.Array) -> jax.Array:
        # A dense vector may average over errors in single coordinates.
        return jnp.asarray(random.normal(size=z.shape) * (random.random(z.shape) < 0.4), z.dtype)

    for _ in range(2):
        found = both(outputs, jax.tree.map(sparse, outputs))
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            close = np.allclose(a, b, rtol=1e-3, atol=1e-4 * np.max(np.abs(a), initial=0.0))
            if not (np.all(np.isfinite(a)) and close):
                return False
    return True


def _random(random: np.random.Generator, x: Any, normal: bool = False) -> Any:
    """Random values of the type of `x`, for the test's examples."""
    shape = (_ROWS, *x.shape[1:])
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.asarray(random.integers(0, 2, shape), x.dtype)
    values = random.normal(size=shape) if normal else random.uniform(0.1, 0.9, shape)
    return jnp.asarray(values, jnp.float32 if x.dtype.itemsize < 4 else x.dtype)


def _rows(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(-1, *[1] * (like.ndim - 1)).astype(like.dtype)


def _wide(z: Any) -> Any:
    return tree.accumulator(z.dtype)


def _cast(u: Outputs, outputs: Outputs) -> Outputs:
    return jax.tree.map(lambda u, z: u.astype(z.dtype), u, outputs)
