r"""Finds a model's layers: which parameters are kernels and biases, and of what kind.

No module has to be tagged for that. Every parameter is followed through the model's jaxpr, through
changes of type and layout (`layout.py`), calls and scans, to the product that uses it
(`recognize.py`):

    y = x W  (dense, also inside a scan: recurrent)        y = x ∗ W  (convolution)

and a bias to the sum after it. A parameter used in any other way belongs to no layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import jax

from jdl.core.jaxpr import CALLS, Evaluator, Site, bind
from jdl.core.types import Params
from jdl.optim.kronecker.layout import LAYOUT, Output, Piece, View
from jdl.optim.kronecker.recognize import USES, Dense, Use

# Given a product's output y, its input x and how it uses a kernel: y, marked.
Mark: TypeAlias = Callable[[jax.Array, jax.Array, Use], jax.Array]


class Layer(NamedTuple):
    """A kernel all of whose uses are recognized."""

    kernel: int  # the leaf's number, of shape (inputs..., outputs)
    # The number of the leaf that is added to its outputs, of shape (outputs,); or None.
    bias: int | None
    kind: str  # "dense" or "conv"
    transposed: bool  # whether it is used as x Wᵀ
    tagged: bool  # whether it was declared by `tag_dense` or `tag_conv`
    rows: int  # how often it is used for the traced batch: examples × positions × steps × reuses


class Layers(NamedTuple):
    """The layers of a model."""

    known: Mapping[int, Layer]  # kernel's leaf number -> layer
    unknown: Mapping[int, str]  # number of a leaf outside all layers -> the reason


def find(predict: Callable[[Params], Any], params: Params) -> Layers:
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
    found = _Found()
    jax.eval_shape(lambda p: walk(predict, p, found=found), params)
    known: dict[int, Layer] = {}
    unknown: dict[int, str] = {}
    owners: dict[int, int] = {kernel: bias for bias, kernel in found.tagged_biases.items()}
    for bias, places in found.joins.items():
        owner, *others = set(places.values())
        if not others and owner is not None and bias not in found.unrecognized:
            owners.setdefault(owner, bias)
    for i, leaf in enumerate(leaves):
        uses = list(found.uses.get(i, {}).values())
        tagged = [use for use in uses if use[2]]
        uses = tagged or uses
        ways = {use[:2] for use in uses}
        if uses and leaf.ndim < 2:
            unknown[i] = "a kernel of one axis"
        elif i in found.unrecognized and not tagged:
            unknown[i] = found.unrecognized[i]
        elif len(ways) > 1:
            unknown[i] = "used both as W and as Wᵀ, or in layers of several kinds"
        elif uses:
            ((kind, transposed),) = ways
            joined = None if transposed else owners.get(i)
            rows = sum(use[3] for use in uses)
            known[i] = Layer(i, joined, kind, transposed, bool(tagged), rows)
        elif i not in found.joins and i not in found.tagged_biases:
            unknown[i] = "not used by the model"
    biases = {layer.bias for layer in known.values()}
    for i in {*found.joins, *found.tagged_biases} - known.keys() - biases:
        unknown[i] = found.unrecognized.get(i, "not added to exactly one known layer")
    unknown = {i: why for i, why in sorted(unknown.items()) if i not in biases}
    return Layers(known, unknown)


class _Found:
    """The uses of parameters found in a jaxpr."""

    def __init__(self) -> None:
        self.uses: dict[int, dict[Any, tuple[str, bool, bool, int]]] = {}
        self.joins: dict[int, dict[Any, int | None]] = {}
        self.unrecognized: dict[int, str] = {}  # leaf -> why
        self.tagged_biases: dict[int, int] = {}  # bias -> kernel

    def use(self, place: Any, use: Use, rows: int) -> None:
        """Records that a product at this place uses a kernel for so many rows."""
        for piece in use.view.pieces:
            here = self.uses.setdefault(piece.leaf, {})
            here[place] = (use.kind, use.transposed, use.tagged, rows)

    def join(self, place: Any, bias: int, kernel: int | None) -> None:
        """Records that a bias is added to a kernel's outputs, or to something else (None)."""
        self.joins.setdefault(bias, {})[place] = kernel

    def other(self, tag: Any, why: str) -> None:
        """Records that a parameter is used by an operation without a rule."""
        for piece in tag.pieces if isinstance(tag, View) else ():
            self.unrecognized.setdefault(piece.leaf, why)


def walk(
    predict: Callable[[Params], Any],
    params: Params,
    *,
    found: _Found | None = None,
    mark: Mark | None = None,
) -> Any:
    """`predict(params)`; records uses of params in `found`, applies `mark` to their products."""
    leaves, structure = jax.tree.flatten(params)
    shapes: list[Any] = []

    def flat(*leaves: Any) -> Any:
        outputs, out = jax.tree.flatten(predict(jax.tree.unflatten(structure, leaves)))
        shapes.append(out)
        return outputs

    program = jax.make_jaxpr(flat)(*leaves)
    views = [
        View(tuple(range(x.ndim)), (Piece(i, 0, 0, x.shape[-1] if x.ndim else 1),))
        for i, x in enumerate(leaves)
    ]
    walker = _Walk(found or _Found(), mark)
    outputs, _ = walker.evaluator.run(program, list(map(_Tagged, leaves, views)))
    return jax.tree.unflatten(shapes[-1], walker.untag(outputs, "an output of the model"))


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["tag"])
@dataclass(frozen=True)
class _Tagged:
    """An array with its tag: a parameter, or the output of a layer."""

    value: Any
    tag: View | Output


class _Walk:
    """Evaluates a jaxpr and follows parameters through it."""

    def __init__(self, found: _Found, mark: Mark | None):
        self.found, self.mark = found, mark
        leave = partial(self.untag, why="carried or sliced by a loop, or returned by a branch")
        self.evaluator = Evaluator(self.visit, leave)

    def untag(self, values: Sequence[Any], why: str) -> list[Any]:
        """The arrays without their tags, which are lost for this reason."""
        for value in values:
            self.found.other(_tag(value), why)
        return jax.tree.leaves(list(values))

    def visit(self, site: Site, inputs: list[Any], state: Any) -> Any:
        """The outputs of one equation, with their tags; None to look inside."""
        tags = [_tag(x) for x in inputs]
        if site.name in (*CALLS, "cond", "scan") and any(isinstance(tag, View) for tag in tags):
            return None
        values = jax.tree.leaves(inputs)
        if not any(tags):
            return bind(site.eqn, values), state
        outputs, moved = self.step(site, values, tags)
        return [_Tagged(y, t) if t else y for y, t in zip_longest(outputs, moved)], state

    def step(self, site: Site, inputs: list[Any], tags: list[Any]) -> Any:
        """The outputs of an equation without a body, and their tags."""
        name, eqn = site.name, site.eqn
        if name in USES and any(isinstance(tag, View) for tag in tags):
            use = USES[name](eqn, tags)
            if use is not None:
                return self.use(site, inputs, tags, use)
        outputs = bind(eqn, inputs)
        if name in ("add", "add_any"):
            return outputs, [self.sum(tags, site.place)]
        if name in LAYOUT and tags[0] is not None and all(type(t) is type(tags[0]) for t in tags):
            moved = LAYOUT[name](eqn, tags)
            if moved is not None:
                return outputs, moved
        for tag in tags:
            self.found.other(tag, f"used by {name}")
        return outputs, []

    def use(self, site: Site, inputs: list[Any], tags: list[Any], use: Use) -> Any:
        """The output of a layer's product, marked, and its tag."""
        x = inputs[1 if use.tagged or isinstance(tags[0], View) else 0]
        (y,) = bind(site.eqn, inputs)
        axis = use.site.output_axis if isinstance(use.site, Dense) else use.site.y_spec[1]
        self.found.use(site.place, use, site.times * y.size // max(1, y.shape[axis]))
        if self.mark is not None:
            y = self.mark(y, x, use)
        if use.tagged and len(tags) == 4:
            bias, kernel = tags[3], use.view.pieces[0].leaf
            if isinstance(bias, View):
                self.found.tagged_biases[bias.pieces[0].leaf] = kernel
        whole = not use.transposed
        return [y], [Output(use.view.pieces if whole else (), axis)]

    def sum(self, tags: list[Any], place: Any) -> Any:
        """The tag of a sum; where a bias is added to a layer's outputs, it joins that layer."""
        a, b = tags
        if isinstance(a, View) and isinstance(b, Output):
            a, b = b, a
        if isinstance(a, Output) and isinstance(b, View):
            added = tuple(None if i != a.axis else 0 for i in range(len(b.axes)))
            for bias in b.pieces:
                rest = [p for p in a.pieces if p[1:] == bias[1:]]
                free = [p.leaf for p in rest if self.free(p.leaf, bias.leaf)]
                kernel = free[0] if free and b.axes == added else None
                self.found.join(place, bias.leaf, kernel)
            return a
        if isinstance(a, Output) and isinstance(b, Output):
            return Output(a.pieces + b.pieces, a.axis) if a.axis == b.axis else None
        for tag in tags:
            self.found.other(tag, "used by add")
        return a if isinstance(a, Output) else b if isinstance(b, Output) else None

    def free(self, kernel: int, bias: int) -> bool:
        """Whether no other bias has joined this kernel yet."""
        others = [k for b, places in self.found.joins.items() if b != bias for k in places.values()]
        return kernel not in others


def _tag(x: Any) -> Any:
    return x.tag if isinstance(x, _Tagged) else None
