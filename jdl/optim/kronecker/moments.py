r"""The curvature's second moments on a batch: for layers' factors and other leaves' diagonals.

Both are sums over the batch's slices and over devices, which `Objective.scan` takes care of.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.objective import Objective, require_of_outputs
from jdl.core.types import Batch, Key, Outputs, Params, PyTree
from jdl.optim.kronecker import layers, output_hessian
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.probes import Bases, Probe, dtype_of, probed

CURVATURES = ("fisher", "empirical_fisher", "gauss_newton")


def find_layers(objective: Objective, params: Params) -> Layers:
    """The layers of the objective's model, by tracing it."""
    batch = _slice_of(objective)
    return layers.find(lambda p: objective.apply(p, batch, objective.key)[0], params)


def find_route(objective: Objective, params: Params) -> str:
    """The route for the loss's output Hessian: see `output_hessian`."""
    batch = _slice_of(objective)
    outputs = jax.eval_shape(lambda p: objective.apply(p, batch, objective.key)[0], params)
    require_of_outputs(objective.loss)
    return output_hessian.route(objective.loss, outputs, batch)


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

    on the objective's curvature batch, with output gradients pulled back from random vectors whose
    second moment is the loss's Hessian. Rows are examples, positions of a convolution, steps of a
    scan and reuses of a kernel, all treated as independent.

    Args:
      objective: the model, the loss and the batch.
      params: the current parameters.
      found: from `find_layers`.
      probes: zeros, one for each known kernel.
      bases: where probes have `squares`, likewise divided by Σᵢ mᵢ.
      key: for the random vectors.
      curvature: "fisher" draws by `find_route`, "empirical_fisher" takes the loss's own gradients,
        "gauss_newton" takes every column of the Hessian's root: one backward pass per output.
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
    batch = objective.batch_for_curvature
    total = objective.total_weight(batch)
    kind = "gradient" if curvature == "empirical_fisher" else find_route(objective, params)
    # Gradients squared after the sum over devices do not depend on how devices share the examples.
    # Slices of a batch share keys, and are squared one by one.
    whole = objective.microbatches == 1 and curvature != "gauss_newton"
    device = 0 if objective.axis_name is None else jax.lax.axis_index(objective.axis_name)

    def part(batch: Batch, own_key: Key | None) -> Any:
        weights = batch.get("mask")
        size = objective.num_examples(batch)

        def f(params: Params, probes: PyTree) -> Outputs:
            def predict(p: Params) -> Outputs:
                return objective.apply(p, batch, own_key)[0]

            return probed(predict, params, found, probes, bases, weights, max_rows)

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
            leaves = [x.astype(dtype_of(x)) for x in jax.tree.leaves(grads)]
            slopes = {i: leaves[i] for i in found.unknown}
            return moments, slopes if whole else jax.tree.map(jnp.square, slopes)

        if curvature != "gauss_newton":
            # Each example has its own key, whichever device it is on; slices of a batch share them.
            numbers = device * size + jnp.arange(size)
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
            return pulled(output_hessian.draw(kind, objective.loss, outputs, batch, keys)), ()

        count, column = output_hessian.columns(kind, objective.loss, outputs, batch)
        signs = jax.random.rademacher(key, (count, size), jnp.float32)

        def body(sums: PyTree, k: jax.Array) -> tuple[PyTree, tuple[()]]:
            u = jax.tree.map(lambda x: x * _lead(signs[k], x).astype(x.dtype), column(k))
            return jax.tree.map(jnp.add, sums, pulled(u)), ()

        zero = jnp.zeros((), jnp.int32)
        shapes = jax.eval_shape(lambda k: pulled(column(k)), zero)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, jnp.arange(count))

    (moments, squares), _ = objective.scan(part, batch)
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


def _slice_of(objective: Objective) -> Batch:
    """The first of the batch's slices, for tracing."""
    batch = objective.batch_for_curvature
    size = objective.num_examples(batch) // objective.microbatches
    return jax.tree.map(lambda x: x[:size], dict(batch))


def _lead(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(-1, *[1] * (like.ndim - 1))
