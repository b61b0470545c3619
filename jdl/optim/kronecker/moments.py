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

    def predict(params: Params, batch: Batch) -> Outputs:
        return objective.apply(params, batch, objective.key)[0]

    double = lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)  # noqa: E731
    try:
        twice = jax.make_jaxpr(predict)(params, jax.tree.map(double, batch))
    except Exception:  # whatever a model written for one size of batch raises
        twice = None
    examples = objective.num_examples(batch)
    return layers.find(lambda p: predict(p, batch), params, examples=examples, twice=twice)


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
    zeros: Mapping[int, Probe],
    bases: Mapping[int, Bases],
    key: Key,
    curvature: str = "fisher",
    *,
    sharing: str = "expand",
    max_rows: int = 1 << 14,
) -> tuple[dict[int, Probe], dict[int, jax.Array]]:
    r"""The known layers' second moments and the other leaves' curvature diagonals.

        A = Σ ā āᵀ / rows,     G = Σᵢ Σ g gᵀ / Σᵢ mᵢ,     diag = Σᵢ (∂ᵢ)² / Σᵢ mᵢ

    on the objective's curvature batch, with output gradients pulled back from random vectors whose
    second moment is the loss's Hessian. Rows are examples, positions of a convolution or sequence,
    steps of a scan and reuses of a kernel, all treated as independent. Where a kernel is used both
    ways, its factors are those of the sum with the same partial traces. The diagonal of a leaf
    outside `Layers.separate` is estimated by (Σᵢ ∂ᵢ)² / Σᵢ mᵢ.

    Args:
      objective: the model, the loss and the batch.
      params: the current parameters.
      found: from `find_layers`.
      zeros: a probe of zeros for each known kernel.
      bases: where probes have `squares`, likewise divided by Σᵢ mᵢ.
      key: for the random vectors.
      curvature: "fisher" draws by `find_route`, "empirical_fisher" takes the loss's own gradients,
        "gauss_newton" takes every column of the Hessian's root: one backward pass per output.
      sharing: "expand" or "reduce", see `probes.probed`.
      max_rows: bounds a convolution's patches.

    References:
      Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature
      (2015), section 3.
      Grosse & Martens, A Kronecker-factored approximate Fisher matrix for convolution layers
      (2016), section 3.
      Martens, Ba & Johnson, Kronecker-factored curvature approximations for recurrent neural
      networks (2018), section 3.4.
      Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network
      architectures (2023): expand and reduce.
    """
    check.one_of("curvature", curvature, CURVATURES)
    batch = objective.batch_for_curvature
    total = objective.total_weight(batch)
    kind = "gradient" if curvature == "empirical_fisher" else find_route(objective, params)
    # Gradients squared after the sum over devices do not depend on how devices share the examples.
    # Slices of a batch share keys, and are squared one by one.
    whole = objective.microbatches == 1 and curvature != "gauss_newton"
    device = 0 if objective.axis_name is None else jax.lax.axis_index(objective.axis_name)
    leaves = jax.tree.leaves(params)
    probes: dict[int, Any] = {
        i: tuple(zeros[i] for _ in layer.ways) for i, layer in found.known.items()
    }
    summed = [i for i in found.unknown if i not in found.separate]

    def part(batch: Batch, own_key: Key | None) -> Any:
        weights = batch.get("mask")
        size = objective.num_examples(batch)

        def f(params: Params, probes: PyTree) -> Outputs:
            def predict(p: Params) -> Outputs:
                return objective.apply(p, batch, own_key)[0]

            options: dict[str, Any] = {"examples": size, "max_rows": max_rows, "sharing": sharing}
            return probed(predict, params, found, probes, bases, weights, **options)

        each = {i: (size, *leaves[i].shape) for i in found.separate}
        singles = {i: jnp.zeros(shape, dtype_of(leaves[i])) for i, shape in each.items()}
        outputs, pull = jax.vjp(f, params, probes | singles)

        def pulled(u: Outputs) -> tuple[dict[int, Any], dict[int, jax.Array]]:
            if weights is not None:
                root = jnp.sqrt(weights.astype(jnp.float32))
                u = jax.tree.map(
                    lambda x: jnp.where(
                        _lead(weights, x) > 0, x * _lead(root, x).astype(x.dtype), 0.0
                    ),
                    u,
                )
            grads, moments = pull(u)
            slopes = [x.astype(dtype_of(x)) for x in jax.tree.leaves(grads)]
            moments |= {i: jnp.sum(jnp.square(moments[i]), axis=0) for i in found.separate}
            sums = {i: slopes[i] for i in summed}
            return moments, sums if whole else jax.tree.map(jnp.square, sums)

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
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, nothing, jnp.arange(count))

    (moments, squares), _ = objective.scan(part, batch)
    if whole:
        squares = jax.tree.map(jnp.square, squares)
    squares |= {i: moments[i] for i in found.separate}

    def mean(x: PyTree, by: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: x / jnp.maximum(_lead(by, x), 1e-30).astype(x.dtype), x)

    def normalized(probe: Probe, exchanged: bool) -> Probe:
        inputs, outputs = ("last", "first") if exchanged else ("first", "last")
        new = {
            inputs: mean(getattr(probe, inputs), probe.rows),
            outputs: mean(getattr(probe, outputs), total),
            "squares": mean(probe.squares, total),
        }
        return probe._replace(**new)

    factors = {
        i: _sum([normalized(p, w) for p, w in zip(moments[i], layer.ways, strict=True)])
        for i, layer in found.known.items()
    }
    return factors, mean(squares, total)


def _sum(probes: list[Probe]) -> Probe:
    """The factors A, G whose partial traces are those of Σ Aᵢ ⊗ Gᵢ; of one, itself."""
    if len(probes) == 1:
        return probes[0]

    def trace(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.diagonal(x, axis1=-2, axis2=-1) if x.ndim == 3 else x, axis=-1)

    traces = [(trace(p.first), trace(p.last)) for p in probes]
    root = jnp.sqrt(jnp.sum(jnp.stack([a * g for a, g in traces]), axis=0))
    safe = jnp.where(root > 0, root, 1.0)

    def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
        return x * _lead(by / safe, x)

    parts = [
        p._replace(first=scaled(p.first, g), last=scaled(p.last, a))
        for p, (a, g) in zip(probes, traces, strict=True)
    ]
    return jax.tree.map(lambda *x: sum(x), *parts)


def _slice_of(objective: Objective) -> Batch:
    """The first of the batch's slices, for tracing."""
    batch = objective.batch_for_curvature
    size = objective.num_examples(batch) // objective.microbatches
    return jax.tree.map(lambda x: x[:size], dict(batch))


def _lead(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with axes of size 1 after its own, for an array of more axes; a scalar stays one."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)) if x.ndim else x
