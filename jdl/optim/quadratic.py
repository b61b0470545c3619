r"""The exact quadratic model of an objective along a few directions, and its minimizer.

q(w) = f(θ) + Σᵢ wᵢ ⟨∇f, vᵢ⟩ + ½ Σᵢⱼ wᵢ wⱼ ⟨vᵢ, G vⱼ⟩
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.derivatives import hvp, linearize
from jdl.core.objective import Objective, fisher_loss
from jdl.core.types import Batch, Key, Outputs, Params, PyTree


class Quadratic(NamedTuple):
    """f and its second-order model along m directions v."""

    value: jax.Array  # f(θ)
    slopes: jax.Array  # ⟨∇f, vᵢ⟩, [m]
    curvature: jax.Array  # ⟨vᵢ, G vⱼ⟩ with the Gauss-Newton matrix G, [m, m]


def subset(objective: Objective, size: int) -> Objective:
    """The same function on `size` of its examples, over all devices, spread evenly.

    Fewer where the batch has fewer, or where microbatches do not divide `size`.
    """
    batch = objective.batch
    count = objective.num_examples(batch)
    if objective.axis_name is not None:
        size = -(-size // jax.lax.axis_size(objective.axis_name))
    size = min(size, count)
    slices = -(-size * objective.microbatches // count)
    size -= size % slices
    stride = count // size
    some = jax.tree.map(lambda x: x[: size * stride : stride], dict(batch))
    return dataclasses.replace(objective, batch=some, curvature_batch=None, microbatches=slices)


def quadratic(objective: Objective, params: Params, vectors: Sequence[PyTree]) -> Quadratic:
    """The exact model along a few directions on the objective's batch: one forward product each.

    With J the outputs' Jacobian and ℓ = `fisher_loss(loss)`,
    ⟨vᵢ, G vⱼ⟩ = ⟨J vᵢ, ∇²ℓ J vⱼ⟩ + ⟨vᵢ, ∇²r vⱼ⟩.
    """
    total = objective.total_weight(objective.batch)
    convex = dataclasses.replace(objective, loss=fisher_loss(objective.loss))

    def part(batch: Batch, key: Key | None) -> Any:
        def predict(p: Params) -> Outputs:
            return objective.apply(p, batch, key)[0]

        outputs, product, _ = linearize(predict, params)
        loss = lambda z: convex.mean_loss(z, batch, total)  # noqa: E731
        value, grad = jax.value_and_grad(loss)(outputs)
        tangents = [product(v) for v in vectors]
        products = [hvp(loss, outputs, t) for t in tangents]
        slopes = jnp.stack([tree.vdot(grad, t) for t in tangents])
        curvature = jnp.stack([jnp.stack([tree.vdot(t, b) for b in products]) for t in tangents])
        return (value, slopes, curvature), ()

    with jax.default_matmul_precision("highest"):
        (value, slopes, curvature), _ = objective.scan(part, objective.batch)
    if objective.regularizer is not None:
        r, grad = jax.value_and_grad(objective.regularizer)(params)
        products = [hvp(objective.regularizer, params, v) for v in vectors]
        value = value + r
        slopes = slopes + jnp.stack([tree.vdot(grad, v) for v in vectors])
        curvature = curvature + jnp.stack(
            [jnp.stack([tree.vdot(v, b) for b in products]) for v in vectors]
        )
    return Quadratic(value, slopes, curvature)


def gram(vectors: Sequence[PyTree]) -> jax.Array:
    """⟨vᵢ, vⱼ⟩ of two vectors, [2, 2]."""
    a, b = vectors
    aa, ab, bb = tree.vdot(a, a), tree.vdot(a, b), tree.vdot(b, b)
    return jnp.stack([jnp.stack([aa, ab]), jnp.stack([ab, bb])])


def solve_pair(matrix: jax.Array, slopes: jax.Array) -> jax.Array:
    """The minimizer of ⟨s, w⟩ + ½⟨w, M w⟩ over two weights; the second is 0 where M is singular.

    >>> solve_pair(jnp.diag(jnp.array([2.0, 4.0])), jnp.array([-2.0, 4.0])).tolist()
    [1.0, -1.0]
    """
    a, b, d = matrix[0, 0], matrix[0, 1], matrix[1, 1]
    determinant = a * d - b * b
    regular = (determinant > 1e-6 * a * d) & (a > 0)
    safe = jnp.where(regular, determinant, 1.0)
    both = jnp.stack([b * slopes[1] - d * slopes[0], b * slopes[0] - a * slopes[1]]) / safe
    alone = jnp.where(a > 0, -slopes[0] / jnp.where(a > 0, a, 1.0), 0.0)
    return jnp.where(regular, both, jnp.stack([alone, jnp.zeros_like(alone)]))
