r"""What Kronecker-factored methods ask of an objective: second moments, and a small exact model.

Like everything that meets a batch, both are sums over its slices and over devices, which the
objective takes care of.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core import check, fisher, layers, tree
from jdl.core.layers import Bases, Layers, Probe
from jdl.core.objective import Objective, require_of_outputs
from jdl.core.types import Batch, Key, Outputs, Params, PyTree

CURVATURES = ("fisher", "empirical", "exact")


class Quadratic(NamedTuple):
    """f and its second-order model along m directions v.

    Attributes:
      value: f(θ).
      slopes: ⟨∇f, vᵢ⟩, [m].
      curvature: ⟨vᵢ, G vⱼ⟩ with the Gauss-Newton matrix G, [m, m].
    """

    value: jax.Array
    slopes: jax.Array
    curvature: jax.Array


def rows(objective: Objective, size: int) -> Objective:
    """The same function on `size` of its examples, over all devices, spread evenly.

    Fewer where the batch has not as many, or where microbatches do not divide them.
    """
    batch = objective.batch
    count = objective._size(batch)
    if objective.axis_name is not None:
        size = -(-size // jax.lax.axis_size(objective.axis_name))
    size = min(size, count)
    slices = -(-size * objective.microbatches // count)
    size -= size % slices
    stride = count // size
    some = jax.tree.map(lambda x: x[: size * stride : stride], dict(batch))
    return dataclasses.replace(objective, batch=some, curvature_batch=None, microbatches=slices)


def examples(objective: Objective, curvature: bool = False) -> int:
    """How many examples the objective's batch, or its curvature batch, has on this device."""
    return objective._size(objective._curvature_batch() if curvature else objective.batch)


def find_layers(objective: Objective, params: Params) -> Layers:
    """The layers of the objective's model; nothing is computed."""
    batch = _slice_of(objective)
    return layers.find(lambda p: objective._apply(p, batch, objective.key)[0], params)


def find_route(objective: Objective, params: Params) -> str:
    """How draws from the loss's output Hessian are made: see `jdl.core.fisher`."""
    batch = _slice_of(objective)
    outputs = jax.eval_shape(lambda p: objective._apply(p, batch, objective.key)[0], params)
    require_of_outputs(objective.loss)
    return fisher.route(objective.loss, outputs, batch)


def second_moments(
    objective: Objective,
    params: Params,
    found: Layers,
    probes: Mapping[int, Probe],
    bases: Mapping[int, Bases],
    key: Key,
    curvature: str = "fisher",
    max_rows: int = 1 << 14,
) -> tuple[dict[int, Probe], dict[int, jax.Array]]:
    r"""The known layers' second moments and the other leaves' curvature diagonals.

        A = Σ ā āᵀ / rows,     G = Σᵢ Σ g gᵀ / Σᵢ mᵢ,     diag = (Σᵢ ∂ᵢ)² / Σᵢ mᵢ

    on the objective's curvature batch, with output gradients pulled back from draws whose second
    moment is the loss's Hessian. Rows are examples, and with them positions of a convolution, steps
    of a scan and reuses of a kernel, all taken for independent.

    Args:
      objective: the model, the loss and the batch.
      params: where.
      found: from `find_layers`.
      probes: zeros, one for each known kernel.
      bases: where probes have `squares`, likewise divided by Σᵢ mᵢ.
      key: of the draws.
      curvature: "fisher" draws by `find_route`, "empirical" takes the loss's own gradients,
        "exact" takes every column of the Hessian's root: one backward pass an output.
      max_rows: bounds a convolution's patches.

    References:
      Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature
      (2015), section 3.
      Grosse & Martens, A Kronecker-factored approximate Fisher matrix for convolution layers
      (2016), section 3.
      Martens, Ba & Johnson, Kronecker-factored curvature approximations for recurrent neural
      networks (2018), section 3.4.
    """
    check.one_of("curvature", curvature, CURVATURES)
    batch = objective._curvature_batch()
    total = objective._weight(batch)
    kind = "gradient" if curvature == "empirical" else find_route(objective, params)
    # Squared once they are summed over devices, gradients of all examples' draws are the same
    # however those are shared out. Slices of a batch share keys, and are squared one by one.
    whole = objective.microbatches == 1 and curvature != "exact"
    device = 0 if objective.axis_name is None else jax.lax.axis_index(objective.axis_name)

    def part(batch: Batch, own_key: Key | None) -> Any:
        weights = batch.get("mask")
        size = objective._size(batch)

        def f(params: Params, probes: PyTree) -> Outputs:
            def predict(p: Params) -> Outputs:
                return objective._apply(p, batch, own_key)[0]

            return layers.probed(predict, params, found, probes, bases, weights, max_rows)

        outputs, pull = jax.vjp(f, params, dict(probes))

        def pulled(u: Outputs) -> tuple[dict[int, Probe], dict[int, jax.Array]]:
            if weights is not None:
                root = jnp.sqrt(weights.astype(jnp.float32))
                u = jax.tree.map(
                    lambda x: jnp.where(
                        _lead(weights, x) > 0, x * _lead(root, x).astype(x.dtype), 0.0
                    ),
                    u,
                )
            grads, moments = pull(u)
            leaves = [x.astype(layers.dtype_of(x)) for x in jax.tree.leaves(grads)]
            slopes = {i: leaves[i] for i in found.unknown}
            return moments, slopes if whole else jax.tree.map(jnp.square, slopes)

        if curvature != "exact":
            # Each example has its own key, whichever device it is on. Slices of a batch share them.
            numbers = device * size + jnp.arange(size)
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
            return pulled(fisher.draw(kind, objective.loss, outputs, batch, keys)), ()

        count, column = fisher.columns(kind, objective.loss, outputs, batch)
        signs = jax.random.rademacher(key, (count, size), jnp.float32)

        def body(sums: PyTree, k: jax.Array) -> tuple[PyTree, tuple[()]]:
            u = jax.tree.map(lambda x: x * _lead(signs[k], x).astype(x.dtype), column(k))
            return jax.tree.map(jnp.add, sums, pulled(u)), ()

        zero = jnp.zeros((), jnp.int32)
        shapes = jax.eval_shape(lambda k: pulled(column(k)), zero)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, jnp.arange(count))

    (moments, squares), _ = objective._scan(part, batch)
    if whole:
        squares = jax.tree.map(jnp.square, squares)

    def mean(x: PyTree, by: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: x / jnp.maximum(by, 1e-30).astype(x.dtype), x)

    def normalized(i: int, probe: Probe) -> Probe:
        inputs, outputs = ("last", "first") if found.known[i].transposed else ("first", "last")
        new = {
            inputs: mean(getattr(probe, inputs), probe.rows),
            outputs: mean(getattr(probe, outputs), total),
            "squares": mean(probe.squares, total),
        }
        return probe._replace(**new)

    return {i: normalized(i, p) for i, p in moments.items()}, mean(squares, total)


def quadratic(objective: Objective, params: Params, vectors: Sequence[PyTree]) -> Quadratic:
    """The exact model along a few directions on the objective's batch: one forward product each.

    With J the outputs' Jacobian, ⟨vᵢ, G vⱼ⟩ = ⟨J vᵢ, ∇²ℓ J vⱼ⟩ + ⟨vᵢ, ∇²r vⱼ⟩.
    """
    total = objective._weight(objective.batch)

    def part(batch: Batch, key: Key | None) -> Any:
        def predict(p: Params) -> Outputs:
            return objective._apply(p, batch, key)[0]

        outputs, product = jax.linearize(predict, params)
        loss = lambda z: objective._mean_part(z, batch, total)  # noqa: E731
        value, grad = jax.value_and_grad(loss)(outputs)
        tangents = [product(v) for v in vectors]
        bent = [jax.jvp(jax.grad(loss), (outputs,), (t,))[1] for t in tangents]
        slopes = jnp.stack([tree.vdot(grad, t) for t in tangents])
        curvature = jnp.stack([jnp.stack([tree.vdot(t, b) for b in bent]) for t in tangents])
        return (value, slopes, curvature), ()

    with jax.default_matmul_precision("highest"):
        (value, slopes, curvature), _ = objective._scan(part, objective.batch)
    if objective.regularizer is not None:
        r, grad = jax.value_and_grad(objective.regularizer)(params)
        bent = [jax.jvp(jax.grad(objective.regularizer), (params,), (v,))[1] for v in vectors]
        value = value + r
        slopes = slopes + jnp.stack([tree.vdot(grad, v) for v in vectors])
        curvature = curvature + jnp.stack(
            [jnp.stack([tree.vdot(v, b) for b in bent]) for v in vectors]
        )
    return Quadratic(value, slopes, curvature)


def _slice_of(objective: Objective) -> Batch:
    """The first of the batch's slices, for what is only traced."""
    batch = objective._curvature_batch()
    size = objective._size(batch) // objective.microbatches
    return jax.tree.map(lambda x: x[:size], dict(batch))


def _lead(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(-1, *[1] * (like.ndim - 1))
