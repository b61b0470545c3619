r"""The layers of a model, found in its jaxpr, and the curvature statistics they gather.

Kronecker-factored methods need each layer's inputs a and output gradients g. No module has to be
tagged for that: every parameter is followed through the traced model, through changes of type and
layout, calls, scans, to the product that uses it:

    y = x W  (dense, also inside a scan: recurrent)        y = x ∗ W  (convolution)

and a bias to the sum after it. A second trace puts an identity behind each such y whose derivative
sends no gradient of its own but second moments: differentiated with respect to a `Probe` of zeros,
it gives Σ ā āᵀ and Σ g gᵀ over rows (examples, positions, steps). Sums over reuses, scans, slices
of the batch and devices are then those of any other gradient.

A function that hides its product (a custom derivative, a kernel of its own) says what it computed
with `tag_dense` or `tag_conv`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jdl.core.layers.probes import Marks, dtype_of
from jdl.core.layers.tags import tag_conv, tag_dense
from jdl.core.layers.types import Bases, Layer, Layers, Probe
from jdl.core.layers.walk import Found, walk_model
from jdl.core.types import PyTree

__all__ = [
    "Bases",
    "Layer",
    "Layers",
    "Probe",
    "dtype_of",
    "find",
    "probed",
    "tag_conv",
    "tag_dense",
]


def find(predict: Callable[[PyTree], Any], params: PyTree) -> Layers:
    """The layers of `predict(params)`.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(())}
    >>> def predict(p):
    ...     return jnp.tanh(jnp.ones((5, 3)) @ p["w"] + p["b"][None]) * p["scale"]
    >>> found = find(predict, params)
    >>> [(layer.kind, layer.kernel, layer.bias) for layer in found.known.values()]
    [('dense', 2, 0)]
    >>> dict(found.unknown)
    {1: 'used by mul'}
    """
    leaves = jax.tree.leaves(params)
    found = Found()
    jax.eval_shape(lambda p: walk_model(predict, p, found, None), params)
    known: dict[int, Layer] = {}
    unknown: dict[int, str] = {}
    owners: dict[int, int] = {kernel: bias for bias, kernel in found.told.items()}
    for bias, places in found.joins.items():
        owner, *others = set(places.values())
        if not others and owner is not None and bias not in found.strange:
            owners.setdefault(owner, bias)
    for i, leaf in enumerate(leaves):
        uses = list(found.uses.get(i, {}).values())
        tagged = [use for use in uses if use[2]]
        uses = tagged or uses
        ways = {use[:2] for use in uses}
        if uses and leaf.ndim < 2:
            unknown[i] = "a kernel of one axis"
        elif i in found.strange and not tagged:
            unknown[i] = found.strange[i]
        elif len(ways) > 1:
            unknown[i] = "used both as W and as Wᵀ, or in layers of several kinds"
        elif uses:
            ((kind, transposed),) = ways
            joined = None if transposed else owners.get(i)
            rows = sum(use[3] for use in uses)
            known[i] = Layer(i, joined, kind, transposed, bool(tagged), rows)
        elif i not in found.joins and i not in found.told:
            unknown[i] = "not used by the model"
    biases = {layer.bias for layer in known.values()}
    for i in {*found.joins, *found.told} - known.keys() - biases:
        unknown[i] = found.strange.get(i, "added to no one known layer")
    unknown = {i: why for i, why in sorted(unknown.items()) if i not in biases}
    return Layers(known, unknown)


def probed(
    predict: Callable[[PyTree], Any],
    params: PyTree,
    layers: Layers,
    probes: Mapping[int, Probe],
    bases: Mapping[int, Bases],
    weights: jax.Array | None = None,
    max_rows: int = 1 << 14,
) -> Any:
    """`predict(params)`, whose gradient with respect to `probes` is their layers' second moments.

    Args:
      predict: params -> outputs.
      params: where.
      layers: what `find` found.
      probes: one for each kernel, of zeros.
      bases: where probes have `squares`.
      weights: float[B], the mask, for arrays whose first axis is of that size.
      max_rows: patches of a convolution beyond this many are thinned out, evenly.
    """
    marks = Marks(layers, probes, bases, weights, max_rows)
    return walk_model(predict, params, Found(), marks)
