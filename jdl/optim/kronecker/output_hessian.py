r"""Random vectors whose second moment is a loss's Hessian with respect to the outputs.

    E[uᵢ uᵢᵀ] = ∇²ℓᵢ,     so     E[(Jᵢᵀ uᵢ)(Jᵢᵀ uᵢ)ᵀ] = Jᵢᵀ ∇²ℓᵢ Jᵢ

Pulled back through the model, they give the Gauss-Newton matrix's second moments, which for
negative log-likelihoods of an exponential family are the Fisher matrix's. A loss with an attribute
`fisher` is replaced by it: see `jdl.losses.gaussian_nll`. The Hessian's factor is found by one of
these routes, for any per-example loss and for each head (each array of the outputs) on its own:

- "softmax":  ∇²ℓ = a (diag p − p pᵀ) over the last axis, p = softmax(outputs)
- "softmax with z-loss":  ∇²ℓ = a (diag p − p pᵀ) + b p pᵀ
- "diagonal": outputs are independent, as in a sigmoid's cross-entropy or squared errors
- "dense":    few outputs per example; the whole Hessian is computed and factored
- "gradient": otherwise; u is the loss's own gradient (empirical Fisher) with a random sign

Which of them holds, and whether heads are coupled, is tested on random outputs and targets when a
step is traced. Coupled heads share one route, "dense" or "gradient".
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import tree
from jdl.core.derivatives import hvp
from jdl.core.objective import fisher_loss
from jdl.core.types import Batch, Key, Loss, Outputs
from jdl.optim.kronecker.inverses import one_by_one

NOT_CONVEX = "; not convex: its positive part"  # ends the route of such a loss
MOST_DENSE = 64  # outputs per example up to which the whole Hessian is computed

_ROWS = 2  # examples of the test
_NO_RANK = 1e-5  # b / a below which it is rounding

_Example = Callable[[], tuple[Outputs, Batch, Outputs]]


class _Head(NamedTuple):
    kind: str
    z: jax.Array  # the outputs, in at least float32
    loss: Callable[[jax.Array], jax.Array]  # the sum over examples, other heads' outputs fixed

    @property
    def noise(self) -> tuple[int, ...]:
        """The shape of the v whose image S v is drawn."""
        return () if self.kind == "gradient" else self.z.shape[1:]


def route(loss: Loss, outputs: Outputs, batch: Batch) -> str:
    """The route for this loss; of several heads "name: route, name: route" unless they are coupled.

    Args:
      loss: `loss(outputs, batch) -> float[B]`.
      outputs: arrays or their shapes.
      batch: likewise; values are not used.

    >>> from jdl.losses import softmax_cross_entropy, squared_error
    >>> outputs = {"box": jnp.zeros((8, 4)), "class": jnp.zeros((8, 100))}
    >>> def loss(outputs, batch):
    ...     boxes = squared_error(outputs["box"], batch, target="box")
    ...     return boxes + 2.0 * softmax_cross_entropy(outputs["class"], batch)
    >>> route(loss, outputs, {"label": jnp.zeros(8, jnp.int32), "box": jnp.zeros((8, 4))})
    'box: diagonal, class: softmax'
    """
    leaves = jax.tree.leaves(outputs)
    kind = _fallback(leaves)
    try:
        with jax.ensure_compile_time_eval():
            examples = _examples(outputs, batch)
            if kinds := _tried(loss, leaves, examples):
                kind = kinds[0] if len(kinds) == 1 else _named(outputs, kinds)
            if ("dense" in kind or "diagonal" in kind) and not _convex(kind, loss, examples):
                kind += NOT_CONVEX
    except (jax.errors.JAXTypeError, TypeError, ValueError, NotImplementedError):
        pass  # The loss closes over traced values, or depends on the batch's size.
    return kind


def draw(kind: str, loss: Loss, outputs: Outputs, batch: Batch, keys: Key) -> Outputs:
    """One random u per example, of the structure of `outputs`, by the route `kind`.

    Args:
      kind: from `route`, or "gradient".
      loss: `loss(outputs, batch) -> float[B]`.
      outputs: where the Hessian is taken.
      batch: the examples.
      keys: one per example, so that u does not depend on how devices share the examples.
    """
    heads, joined = _heads(kind, loss, outputs, batch)

    def root(i: int, head: _Head) -> jax.Array:
        def row(key: Key) -> jax.Array:
            return jax.random.rademacher(jax.random.fold_in(key, i), head.noise, head.z.dtype)

        return _root(head, jax.vmap(row)(keys))

    return _cast(joined([root(i, head) for i, head in enumerate(heads)]), outputs)


def columns(kind: str, loss: Loss, outputs: Outputs, batch: Batch) -> tuple[int, Callable]:
    """K and column(k), the columns of the Hessian's root: Σₖ uₖ uₖᵀ = ∇²ℓ, not random."""
    heads, joined = _heads(kind, loss, outputs, batch)
    sizes = [math.prod(head.noise) for head in heads]
    starts = np.cumsum([0, *sizes[:-1]])

    def column(k: jax.Array) -> Outputs:
        def root(head: _Head, size: int, start: int) -> jax.Array:
            v = jnp.arange(size, dtype=k.dtype) == k - start
            v = v.reshape(1, *head.noise).astype(head.z.dtype)
            return _root(head, jnp.broadcast_to(v, (len(head.z), *head.noise)))

        each = zip(heads, sizes, starts.tolist(), strict=True)
        return _cast(joined([root(*one) for one in each]), outputs)

    return sum(sizes), column


def _named(outputs: Outputs, kinds: list[str]) -> str:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(outputs)]
    names = [jax.tree_util.keystr(p, simple=True, separator="/").replace(",", "-") for p in paths]
    return ", ".join(f"{name}: {kind}" for name, kind in zip(names, kinds, strict=True))


def _fallback(leaves: list[Any]) -> str:
    size = sum(math.prod(z.shape[1:]) for z in leaves)
    return "dense" if size <= MOST_DENSE else "gradient"


def _heads(
    kind: str, loss: Loss, outputs: Outputs, batch: Batch
) -> tuple[list[_Head], Callable[[list[jax.Array]], Outputs]]:
    """The heads that have a route each, and how arrays of their shapes make up the outputs."""
    loss = fisher_loss(loss)
    leaves, structure = jax.tree.flatten(outputs)
    kinds = [part.rpartition(": ")[2] for part in kind.removesuffix(NOT_CONVEX).split(", ")]
    parts = [z.astype(tree.accumulator(z.dtype)) for z in leaves]
    coupled = len(kinds) < len(leaves)
    if coupled:  # one head, of all elements in a row
        wide = tree.accumulator(*(z.dtype for z in leaves))
        parts = [jnp.concatenate([z.reshape(len(z), -1).astype(wide) for z in parts], axis=1)]

    def joined(parts: list[jax.Array]) -> Outputs:
        if coupled:
            ends = np.cumsum([math.prod(z.shape[1:]) for z in leaves])[:-1]
            split = jnp.split(parts[0], ends, axis=1)
            parts = [x.reshape(z.shape) for x, z in zip(split, leaves, strict=True)]
        return jax.tree.unflatten(structure, parts)

    def total(i: int, z: jax.Array) -> jax.Array:
        return jnp.sum(loss(joined([*parts[:i], z, *parts[i + 1 :]]), batch))

    of = functools.partial
    heads = [_Head(k, z, of(total, i)) for i, (k, z) in enumerate(zip(kinds, parts, strict=True))]
    return heads, joined


def _product(head: _Head, v: jax.Array) -> jax.Array:
    """∇²ℓᵢ vᵢ for each example."""
    return hvp(head.loss, head.z, v)


def _root(head: _Head, v: jax.Array) -> jax.Array:
    """S v with S Sᵀ = ∇²ℓ."""
    if head.kind == "gradient":
        return jax.grad(head.loss)(head.z) * v.reshape(-1, *[1] * (head.z.ndim - 1))
    if head.kind == "diagonal":
        return jnp.sqrt(jnp.maximum(_product(head, jnp.ones_like(head.z)), 0.0)) * v
    if head.kind == "dense":  # S is symmetric
        values, vectors = one_by_one(lambda h: tuple(jnp.linalg.eigh(h)), _dense(head))
        inner = jnp.einsum("bij,bi->bj", vectors, v.reshape(len(v), -1))
        u = jnp.einsum("bij,bj->bi", vectors, jnp.sqrt(jnp.maximum(values, 0.0)) * inner)
        return u.reshape(v.shape)
    p, a, b = _softmax(head.z, _product(head, _ramp(head.z)))
    a, b = (jnp.sqrt(jnp.maximum(x, 0.0)) for x in (a, b))
    inner = jnp.sum(jnp.sqrt(p) * v, axis=-1, keepdims=True)
    u = a * (jnp.sqrt(p) * v - p * inner)
    return u if head.kind == "softmax" else u + b * p * inner


def _ramp(z: jax.Array) -> jax.Array:
    """All different and positive, so that neither variance nor mean under a softmax is 0."""
    return jnp.broadcast_to(jnp.linspace(1.0, 3.0, z.shape[-1], dtype=z.dtype), z.shape)


def _softmax(z: jax.Array, hv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p, a and b of ∇²ℓ = a (diag p − p pᵀ) + b p pᵀ for each row of outputs, hv = ∇²ℓ ramp."""
    p, v = jax.nn.softmax(z, axis=-1), _ramp(z)
    mean = jnp.sum(p * v, axis=-1, keepdims=True)
    variance = jnp.sum(p * jnp.square(v - mean), axis=-1, keepdims=True)
    a = jnp.sum((v - mean) * hv, axis=-1, keepdims=True)
    b = jnp.sum(hv, axis=-1, keepdims=True) / mean
    return p, a / jnp.maximum(variance, jnp.finfo(z.dtype).tiny), b


def _dense(head: _Head) -> jax.Array:
    """Each example's Hessian, [B, N, N]."""
    z = head.z
    size = math.prod(z.shape[1:])

    def row(unit: jax.Array) -> jax.Array:
        v = jnp.broadcast_to(unit.reshape(1, *z.shape[1:]), z.shape)
        return _product(head, v).reshape(len(z), size)

    hessian = jax.lax.map(row, jnp.eye(size, dtype=z.dtype)).transpose(1, 0, 2)
    return 0.5 * (hessian + hessian.transpose(0, 2, 1))


def _examples(outputs: Outputs, batch: Batch) -> list[_Example]:
    """What makes random outputs, targets, and vectors to multiply by: one at a time, for memory."""

    def example(integers: int, share: float) -> tuple[Outputs, Batch, Outputs]:
        random = np.random.default_rng(0)
        z, v, w = (jax.tree.map(lambda z: _random(random, z), outputs) for _ in range(3))
        v = jax.tree.map(lambda v, w: v * (w < share), v, w)
        return z, jax.tree.map(lambda x: _random(random, x, integers), dict(batch)), v

    # Integers may be labels of few classes, or lengths of sequences, of which short ones have the
    # Hessian 0. A sparse vector shows errors in single coordinates that a dense one averages over.
    tries = ((9, np.inf), (3, -0.25), (2, np.inf), (2, -0.25))
    return [functools.partial(example, *each) for each in tries]


def _tried(loss: Loss, leaves: list[Any], examples: list[_Example]) -> list[str] | None:
    """Each head's route, by products with random vectors; None if heads are coupled."""

    def products(z: Outputs, targets: Batch, *vs: Outputs) -> list[list[jax.Array]]:
        total = lambda z: jnp.sum(fisher_loss(loss)(z, targets))  # noqa: E731
        return [jax.tree.leaves(hvp(total, z, v)) for v in vs]

    @functools.partial(jax.jit, static_argnums=0)
    def verdict(kind: str, z: Outputs, targets: Batch, v: Outputs) -> jax.Array:
        """For each head: finite, not all 0, and whether routes like `kind` are right."""
        probe = jax.tree.map(_ramp if kind == "softmax" else jnp.ones_like, z)
        found = zip(*map(jax.tree.leaves, (z, v)), *products(z, targets, v, probe), strict=True)
        rows = []
        for z, v, hv, of_probe in found:
            right = [_close(hv, guess) for guess in _guesses(kind, z, v, of_probe)]
            rows.append(jnp.stack([jnp.all(jnp.isfinite(hv)), jnp.any(hv != 0), *right]))
        return jnp.stack(rows)

    @jax.jit
    def uncoupled(z: Outputs, targets: Batch, v: Outputs) -> jax.Array:
        heads, _ = _heads(", ".join(["dense"] * len(leaves)), loss, z, targets)
        own = [_product(head, v) for head, v in zip(heads, jax.tree.leaves(v), strict=True)]
        return jnp.stack([*map(_close, own, *products(z, targets, v))])

    kinds: dict[int, str] = {}
    for routes in (("softmax", "softmax with z-loss"), ("diagonal",)):
        if len(kinds) < len(leaves):
            found = np.stack([verdict(routes[0], *each()) for each in examples])
            valid = np.flatnonzero(found[..., 0].all(axis=1))  # others' integers are no targets
            if not len(valid):
                return None
            examples, found = [examples[i] for i in valid], found[valid]
            right = found[..., 2:].all(axis=0) & found[..., 1:2].any(axis=0)
            for i, j in np.argwhere(right).tolist():
                kinds.setdefault(i, routes[j])
    if len(kinds) < len(leaves) > 1 and not all(np.all(uncoupled(*each())) for each in examples):
        return None
    return [kinds.get(i) or _fallback([z]) for i, z in enumerate(leaves)]


def _convex(kind: str, loss: Loss, examples: list[_Example]) -> bool:
    """Whether no diagonal or eigenvalue is negative."""

    @jax.jit
    def negative(z: Outputs, targets: Batch) -> list[jax.Array]:
        values = [
            jnp.linalg.eigvalsh(_dense(head))
            if head.kind == "dense"
            else _product(head, jnp.ones_like(head.z))
            for head in _heads(kind, loss, z, targets)[0]
            if head.kind in ("dense", "diagonal")
        ]
        return [jnp.min(x) < -1e-4 * jnp.max(jnp.abs(x)) for x in values]

    return not any(any(negative(*each()[:2])) for each in examples)


def _guesses(kind: str, z: jax.Array, v: jax.Array, of_probe: jax.Array) -> list[jax.Array]:
    """∇²ℓ v by the routes like `kind`, from the product with their probe."""
    if kind == "diagonal":
        return [of_probe * v]
    if v.ndim == 1 or v.shape[-1] == 1:
        return [jnp.full_like(v, jnp.nan)] * 2
    p, a, b = _softmax(z, of_probe)
    mean = jnp.sum(p * v, axis=-1, keepdims=True)
    plain = a * (p * v - p * mean)
    small = jnp.max(jnp.abs(b)) <= _NO_RANK * jnp.max(jnp.abs(a))
    return [jnp.where(small, plain, jnp.nan), plain + b * p * mean]


def _close(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.all(jnp.abs(a - b) <= 1e-3 * jnp.abs(b) + 1e-4 * jnp.max(jnp.abs(a), initial=0.0))


def _random(random: np.random.Generator, x: Any, integers: int | None = None) -> Any:
    """A few random rows of the type of `x`: normal or, as targets, positive."""
    shape = (_ROWS, *x.shape[1:])
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        below = integers or 2
        each = below - 1 - np.arange(math.prod(shape)) % below  # the largest first
        return random.permutation(each).reshape(shape).astype(x.dtype)
    draw = random.standard_normal if integers is None else random.random
    values = draw(shape, np.float32)
    values = values if integers is None else 0.1 + 0.8 * values
    return values.astype(np.float32 if x.dtype.itemsize < 4 else x.dtype)


def _cast(u: Outputs, outputs: Outputs) -> Outputs:
    return jax.tree.map(lambda u, z: u.astype(z.dtype), u, outputs)
