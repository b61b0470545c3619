"""Parameters as stacks of matrices, for `soap`, `shampoo` and `muon`.

A leaf of two axes or more is N blocks of D inputs and K outputs, [N, D, K]. Leaves of equal D and K
are stacked, so that a compiled step has one product for all of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.optim.kronecker import factors, inverses, moments
from jdl.optim.kronecker.blocks import Layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """The matrices of all leaves with the same D and K.

    Attributes:
      layers: which leaves, and which of their axes are blocks, inputs and outputs.
      sides: for the inputs and the outputs, what a method keeps, or None.
    """

    layers: tuple[Layer, ...] = field(metadata={"static": True})
    sides: tuple[Any, ...]

    @property
    def kept(self) -> list[Any]:
        """The sides that are not None."""
        return [s for s in self.sides if s is not None]

    def each(self, fn: Callable[[int, Any], Any]) -> "Stack":
        """With fn(0 for inputs or 1, side) for each side that is not None."""
        sides = (s if s is None else fn(i, s) for i, s in enumerate(self.sides))
        return Stack(self.layers, tuple(sides))

    def of(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The matrices [N, D, K] among all leaves."""
        return jnp.concatenate([x.matrices(leaves[x.kernel]) for x in self.layers])

    def put(self, matrices: jax.Array, leaves: list[jax.Array]) -> None:
        """The inverse of `of`: replaces these leaves in the list."""
        ends = [sum(x.shape[0] for x in self.layers[: i + 1]) for i in range(len(self.layers) - 1)]
        for layer, part in zip(self.layers, jnp.split(matrices, ends), strict=True):
            leaves[layer.kernel] = layer.leaf(part, leaves[layer.kernel].shape)


def layers_of(params: Params) -> dict[int, Layer]:
    """The leaves that are matrices, by their number.

    Inside `kronecker.told(objective, params)`, as in a `jdl.Estimator`, which axes are inputs,
    outputs or blocks is seen from the model. Elsewhere, and for leaves in no layer, the axes are
    cut where the two sides are nearest in size: a convolution's kernel before its outputs, that of
    attention between the model's axis and the heads'.

    >>> kernels = {"attention": jnp.ones((64, 4, 16)), "conv": jnp.ones((3, 3, 8, 64))}
    >>> [x.shape for x in layers_of({**kernels, "norm": jnp.ones(64)}).values()]
    [(1, 64, 64), (1, 72, 64)]
    """
    found = factors.told_layers(params)
    known: Mapping[int, Layer] = {} if found is None else found.known
    biases = {layer.bias for layer in known.values()}
    leaves = enumerate(jax.tree.leaves(params))
    wide = {i: x for i, x in leaves if x.ndim > 1 and x.size and i not in biases}
    return {i: known.get(i) or _by_shape(i, x) for i, x in wide.items()}


def _by_shape(leaf: int, x: jax.Array) -> Layer:
    splits = [(math.prod(x.shape[:cut]), math.prod(x.shape[cut:])) for cut in range(1, x.ndim)]
    best = min(reversed(splits), key=lambda sides: abs(math.log(max(sides)) - math.log(min(sides))))
    form = tuple(zip("io", best, strict=True))
    return Layer(leaf, None, "dense", form, (False,), (False, False), False, 0)


def stacks_of(
    layers: Iterable[Layer],
    leaves: Sequence[jax.Array],
    sides: Callable[[tuple[int, int, int], Any], tuple[Any, ...]],
) -> tuple[Stack, ...]:
    """The stacks of equal sides and accumulator's type, with `sides((N, D, K), type)` in each."""
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        dtype = jnp.dtype(tree.accumulator(leaves[layer.kernel].dtype))
        groups.setdefault((*layer.shape[1:], dtype), []).append(layer)
    return tuple(
        Stack(tuple(group), sides((sum(x.shape[0] for x in group), d, k), dtype))
        for (d, k, dtype), group in groups.items()
    )


def preconditioned(
    params: Params, options: Any, make: Callable[[jax.Array, jax.Array], Any]
) -> Any:
    """The stacks with sides to precondition, each `make(0, I)` of [N, S, S] in `factors_dtype`.

    These are the sides up to `max_size`; with `one_sided` only the smaller of each matrix.
    """
    leaves = jax.tree.leaves(params)
    if not leaves:
        return jnp.zeros(())  # an array, where `optax.tree.map_params` asks with no parameters

    def sides(shape: tuple[int, int, int], dtype: Any) -> tuple[Any, Any]:
        n, d, k = shape

        def side(size: int, other: int, smaller: bool) -> Any:
            fits = min(size, other) > 1 and size <= options.max_size
            if not fits or (options.one_sided and not smaller):
                return None
            eye = jnp.eye(size, dtype=options.factors_dtype or dtype)
            return make(jnp.zeros((n, size, size), eye.dtype), jnp.tile(eye, (n, 1, 1)))

        return side(d, k, d <= k), side(k, d, k < d)

    stacks = stacks_of(layers_of(params).values(), leaves, sides)
    some = (s for s in stacks if any(s.sides))
    return tuple(sorted(some, key=lambda s: all(s.sides)))  # those of one side first


def like(x: Any, other: jax.Array) -> jax.Array:
    """x in the other's type."""
    return jnp.asarray(x).astype(other.dtype)


def mean(last: jax.Array, x: jax.Array, decay: Any, moving: jax.Array | bool = True) -> jax.Array:
    """The running mean with one more x, or as it is; the sum for a decay of 1."""
    decay = like(decay, last)
    new = decay * last + jnp.where(decay < 1, 1 - decay, 1) * x
    return jnp.where(moving, new, last)


def corrected(mean: jax.Array, decay: Any, count: jax.Array) -> jax.Array:
    """The running mean of `count` values without its start at 0; a sum as it is."""
    decay = like(decay, mean)
    return mean / jnp.where(decay < 1, 1 - decay ** like(count, mean), 1)


def gathered(
    stack: Stack,
    grads: Sequence[jax.Array],
    beta: Any,
    scaled: Callable[[int, jax.Array], jax.Array] = lambda _, g: g,
    moving: jax.Array | bool = True,
) -> Stack:
    """With X Xᵀ in the running mean `factor` of each side, of X = scaled(i, G or Gᵀ)."""
    g = stack.of(grads)

    def gather(i: int, side: Any) -> Any:
        x = scaled(i, g.mT if i else g)
        new = mean(side.factor.astype(x.dtype), x @ x.mT, beta, moving)
        return side._replace(factor=new.astype(side.factor.dtype))

    return stack.each(gather)


def solved(
    solve: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    axis_name: str | None,
) -> list[tuple[jax.Array, ...]]:
    """solve(M, X) for pairs of stacks [N, S, S], one program for each S, shared by all devices."""
    groups: dict[Any, list[int]] = {}
    for i, (matrix, _) in enumerate(pairs):
        groups.setdefault((matrix.shape[-1], matrix.dtype), []).append(i)
    joined = [
        [jnp.concatenate(x) for x in zip(*(pairs[i] for i in group), strict=True)]
        for group in groups.values()
    ]
    firsts, seconds = [x[0] for x in joined], [x[1] for x in joined]
    mesh = inverses.mesh_of(firsts[0]) if firsts else None
    out: dict[int, tuple[jax.Array, ...]] = {}
    found = inverses.shared(solve, firsts, seconds, axis_name, mesh)
    for group, arrays in zip(groups.values(), found, strict=True):
        sizes = [len(pairs[i][0]) for i in group]
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes) - 1)]
        parts = zip(*(jnp.split(x, ends) for x in arrays), strict=True)
        out.update(zip(group, parts, strict=True))
    return [out[i] for i in range(len(pairs))]


def multiplication(
    params: Params | None,
    objective: Objective | None = None,
    whole_params: Params | None = None,
    **_: Any,
) -> float:
    """What one counts in `Diagnostics.factor_work`: 1 / those of a gradient of the batch.

    Of an update's arguments. Each example is taken to use a leaf in no known layer once. Without an
    objective nothing is charged.
    """
    params = params if whole_params is None else whole_params
    if objective is None or params is None:
        return 0.0
    examples = objective.num_examples(objective.batch)
    traced = objective.num_examples(objective.batch_for_curvature) / objective.microbatches
    known = moments.find_layers(objective, params).known
    uses = {i: x.rows / traced for i, x in known.items()}
    leaves = enumerate(jax.tree.leaves(params))
    each = sum(uses.get(i, float(x.ndim > 1)) * x.size for i, x in leaves)
    return 1 / max(3 * examples * each, 1.0)


def multiplications(
    stacks: Sequence[Stack], params: Params | None, **extras: Any
) -> tuple[float, float]:
    """For `factor_work`: products of each side's S × S matrix with a gradient, with another."""
    products = cubes = 0
    for stack in stacks:
        total = sum(math.prod(x.shape) for x in stack.layers)
        for n, size, _ in (side.factor.shape for side in stack.kept):
            products += total * size
            cubes += n * size**3
    unit = multiplication(params, **extras)
    return unit * products, unit * cubes
