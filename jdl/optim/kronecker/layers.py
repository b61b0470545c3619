r"""Finds a model's layers: which parameters are kernels and biases, and of what kind.

No module has to be tagged for that. Every parameter is followed through the model's jaxpr, through
changes of type and layout (`views.py`), calls and scans, to the product that uses it
(`recognize.py`):

    y = x W  (dense, also inside a scan: recurrent)    y = x ∗ W  (convolution)    y = W[x]  (embed)

and a bias to the sum after it. A parameter used in any other way belongs to no layer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdl.core.jaxpr import CALLS, CUSTOM, Evaluator, Site, bind, equations
from jdl.core.types import Params
from jdl.optim.kronecker import blocks
from jdl.optim.kronecker.blocks import Form, Layer
from jdl.optim.kronecker.recognize import USES, Gather, Use
from jdl.optim.kronecker.views import (
    ELEMENTWISE,
    LAYOUT,
    Output,
    View,
    broadcast,
    concatenated,
    matches,
    straight_through,
    whole,
)


class Layers(NamedTuple):
    """The layers of a model."""

    known: Mapping[int, Layer]  # kernel's leaf number -> layer
    unknown: Mapping[int, str]  # number of a leaf outside all layers -> the reason
    # The unknown ones whose uses tell examples apart: a scale, a shift, a table of positions.
    separate: frozenset[int] = frozenset()
    twice: Any = None  # the program for twice as many examples, or None


class Probing(NamedTuple):
    """What a walk gathers from (`probes.py`)."""

    # y, its input, the use and the data of its kernels -> y, whose gradient gives their moments
    mark: Callable[[jax.Array, jax.Array, Use, Sequence[Any]], jax.Array]
    slice: Callable[[Any, View], Any]  # data, view of an array that a scan runs over -> its slices
    data: Mapping[int, Any]  # leaf -> its data: probes, or zeros [B, ...] for one of `separate`


def find(
    predict: Callable[[Params], Any],
    params: Params,
    examples: int | None = None,
    twice: Any = None,
) -> Layers:
    """The layers of `predict(params)`, of so many examples.

    `twice`, the program for twice as many, tells which axes are theirs; else it is the first of
    their number.

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
    found = _Found()
    options: dict[str, Any] = {"found": found, "examples": examples, "twice": twice}
    jax.eval_shape(lambda p: walk(predict, p, **options), params)
    ensembles = {n for uses in found.uses.values() for u in uses.values() for n in u.ensembles()}
    known: dict[int, Layer] = {}
    unknown: dict[int, str] = {}
    owners: dict[int, int] = {kernel: bias for bias, kernel in found.tagged_biases.items()}
    for bias, where in found.joins.items():
        owner, *others = set(where.values())
        if others or owner is None or bias in found.unrecognized:
            continue
        if len(where) == len(found.uses[owner]):
            owners.setdefault(owner, bias)
    for i in range(len(jax.tree.leaves(params))):
        uses = list(found.uses.get(i, {}).values())
        tagged = [use for use in uses if use.tagged]
        if i in found.unrecognized and not tagged:
            unknown[i] = found.unrecognized[i]
        elif uses:
            layer = _layer(i, tagged or uses, ensembles)
            if layer is None:
                unknown[i] = "used in products of several shapes"
            else:
                known[i] = layer._replace(bias=None if layer.ways[0] else owners.get(i))
        elif i not in found.joins and i not in found.tagged_biases:
            unknown[i] = "not used by the model"
    biases = {layer.bias for layer in known.values()}
    for i in {*found.joins, *found.tagged_biases} - known.keys() - biases:
        unknown[i] = found.unrecognized.get(i, "not added to exactly one known layer")
    unknown = {i: why for i, why in sorted(unknown.items()) if i not in biases}
    used = {i for i, why in unknown.items() if why != "not used by the model"}
    return Layers(known, unknown, frozenset(used) - found.mixed - found.uses.keys(), twice)


def _axes_of_examples(program: Any, twice: Any, examples: int | None) -> Any:
    """For each equation by its id, the axis of examples of each input and output, or None.

    It is the one that is twice as long in the other program, and may be of examples × positions.
    None where the programs have other equations.
    """
    one, two = ([] if p is None else list(equations(p)) for p in (program, twice))
    if [e.primitive for e in one] != [e.primitive for e in two]:
        return None

    def axis(short: Any, long: Any) -> int | None:
        shapes = (getattr(v.aval, "shape", ()) for v in (short, long))
        sizes = enumerate(zip(*shapes, strict=False))
        fits = (i for i, (n, m) in sizes if 0 < 2 * n == m and n % (examples or 1) == 0)
        return next(fits, None)

    return {
        id(a): [*map(axis, a.invars, b.invars), *map(axis, a.outvars, b.outvars)]
        for a, b in zip(one, two, strict=True)
    }


class _UseOf(NamedTuple):
    """A leaf's use at one place."""

    kind: str
    form: Form
    tagged: bool
    rows: int

    def ensembles(self) -> list[int]:
        return [n for role, n in self.form if role == "b"]

    def resolved(self, ensembles: set[int]) -> Form:
        free = {n: "b" if n in ensembles else "o" for _, n in self.form}
        return blocks.form_of(({"s": "b", "f": free[n]}.get(r, r), n) for r, n in self.form)


def _layer(leaf: int, uses: list[_UseOf], ensembles: set[int]) -> Layer | None:
    """The layer of a kernel with these uses; None where they do not fit together."""
    forms = [use.resolved(ensembles) for use in uses]
    form = forms[0]
    if any(f not in (form, blocks.exchanged(form)) for f in forms):
        return None
    ways = [f != form for f in forms]
    hot = [way for use, way in zip(uses, ways, strict=True) if use.kind == "embed"]
    return Layer(
        kernel=leaf,
        bias=None,
        kind="+".join(sorted({use.kind for use in uses})),
        form=form,
        ways=tuple(sorted(set(ways))),
        one_hot=(False in hot, True in hot),
        tagged=uses[0].tagged,
        rows=sum(use.rows for use in uses),
    )


class _Found:
    """The uses of parameters found in a jaxpr."""

    def __init__(self) -> None:
        self.uses: dict[int, dict[Any, _UseOf]] = {}
        self.joins: dict[int, dict[Any, int | None]] = {}
        self.unrecognized: dict[int, str] = {}  # leaf -> why
        self.mixed: set[int] = set()  # leaves of which some use does not tell examples apart
        self.tagged_biases: dict[int, int] = {}  # bias -> kernel

    def join(self, place: Any, bias: int, kernel: int | None, separate: bool) -> None:
        """Records that a bias is added to a kernel's outputs, or to something else (None)."""
        self.joins.setdefault(bias, {})[place] = kernel
        self.mixed |= set() if separate else {bias}

    def other(self, tag: Any, why: str, separate: bool = False) -> None:
        """Records that a parameter is used by an operation without a rule."""
        for piece in tag.pieces if isinstance(tag, View) else ():
            why = "used by mul" if tag.scaled else why
            self.unrecognized.setdefault(piece.leaf, why)
            self.mixed |= set() if separate else {piece.leaf}


def walk(
    predict: Callable[[Params], Any],
    params: Params,
    *,
    found: _Found | None = None,
    probing: Probing | None = None,
    examples: int | None = None,
    twice: Any = None,
) -> Any:
    """`predict(params)`; records uses of params in `found`, or has `probing` mark them."""
    leaves, structure = jax.tree.flatten(params)
    shapes: list[Any] = []

    def flat(*leaves: Any) -> Any:
        outputs, out = jax.tree.flatten(predict(jax.tree.unflatten(structure, leaves)))
        shapes.append(out)
        return outputs

    program = jax.make_jaxpr(flat)(*leaves)
    axes = _axes_of_examples(program, twice, examples)
    walker = _Walk(found or _Found(), probing, [x.shape for x in leaves], examples, axes)
    data = {} if probing is None else probing.data
    tagged = [_Tagged(x, (data.get(i),), View((whole(i, x.shape),))) for i, x in enumerate(leaves)]
    outputs, _ = walker.evaluator.run(program, tagged)
    return jax.tree.unflatten(shapes[-1], walker.untag(outputs, "an output of the model"))


@partial(jax.tree_util.register_dataclass, data_fields=["value", "data"], meta_fields=["tag"])
@dataclass(frozen=True)
class _Tagged:
    """An array with its tag: a parameter with its pieces' data, or the output of a layer."""

    value: Any
    data: Any
    tag: View | Output


class _Walk:
    """Evaluates a jaxpr and follows parameters through it."""

    def __init__(
        self,
        found: _Found,
        probing: Probing | None,
        shapes: list[tuple[int, ...]],
        examples: int | None,
        axes: Any,
    ):
        self.found, self.probing, self.shapes, self.examples = found, probing, shapes, examples
        self.axes = axes
        leave = partial(self.untag, why="carried by a loop, or returned by a branch")
        self.evaluator = Evaluator(self.visit, leave, self.slices)

    def untag(self, values: Sequence[Any], why: str) -> list[Any]:
        """The arrays without their tags, which are lost for this reason."""
        for value in values:
            self.found.other(_tag(value), why)
        return [value.value if isinstance(value, _Tagged) else value for value in values]

    def slices(self, values: list[Any]) -> list[Any]:
        """The arrays that a scan runs over, with the tags of their slices."""
        out = []
        for value in values:
            view = _tag(value)
            inner = blocks.scanned(view) if isinstance(view, View) else None
            if inner is None:
                out += self.untag([value], "sliced by a loop")
                continue
            data = value.data
            if self.probing is not None:
                data = self.probing.slice(data, inner)
            out.append(_Tagged(value.value, data, inner))
        return out

    def visit(self, site: Site, inputs: list[Any], state: Any) -> Any:
        """The outputs of one equation, with their tags; None to look inside."""
        tags = [_tag(x) for x in inputs]
        if site.name in (*CALLS, "cond", "scan") and any(isinstance(tag, View) for tag in tags):
            return None
        values = [x.value if isinstance(x, _Tagged) else x for x in inputs]
        if not any(tags):
            return bind(site.eqn, values), state
        data = [x.data if isinstance(x, _Tagged) else () for x in inputs]
        outputs, moved, kept = self.step(site, values, tags, data)
        return [
            _Tagged(y, d or (), t) if t else y for y, t, d in zip_longest(outputs, moved, kept)
        ], state

    def step(self, site: Site, inputs: list[Any], tags: list[Any], data: list[Any]) -> Any:
        """The outputs of an equation without a body, their tags and their data."""
        name, eqn = site.name, site.eqn
        if name in ELEMENTWISE:
            inputs, tags, data = self.broadcast(eqn.outvars[0].aval.shape, inputs, tags, data)
        views = [i for i, tag in enumerate(tags) if isinstance(tag, View)]
        if name in USES and views and not any(tags[i].scaled for i in views):
            done = self.use(site, inputs, tags, data)
            if done is not None:
                return done
        if name in ("add", "add_any") and not any(tags[i].scaled for i in views):
            return self.sum(site, inputs, tags, data)
        if name in CUSTOM and views and straight_through(eqn):
            return bind(eqn, inputs), tags, data
        if name in LAYOUT and len(tags) == 1:
            moved = self.layout(site, inputs, tags[0], data[0])
            if moved is not None:
                return moved
        if name == "concatenate" and len(views) == len(tags):
            view = concatenated([tags[i] for i in views], eqn.params["dimension"])
            if view is not None and not any(_shadows(d) for d in data):
                return bind(eqn, inputs), [view], [sum(data, ())]
        if name == "mul" and len(views) == 1 and tags[1 - views[0]] is None:
            (i,) = views
            if self.axis_of_examples(site, i, tags[i]) is None and len(tags[i].pieces) == 1:
                by = jnp.broadcast_to(inputs[1 - i], eqn.outvars[0].aval.shape)
                by = jax.lax.stop_gradient(by)
                shadow = tuple(d * by.astype(d.dtype)[None] for d in _shadows(data[i]))
                return bind(eqn, inputs), [tags[i]._replace(scaled=True)], [shadow or data[i]]
        inputs = list(inputs)
        for i, tag in enumerate(tags):
            axis = self.axis_of_examples(site, i, tag)
            self.found.other(tag, f"used by {name}", axis is not None)
            inputs[i] = self.separate(inputs[i], axis, data[i])
        return bind(eqn, inputs), [], []

    def broadcast(
        self, shape: Sequence[int], inputs: list[Any], tags: list[Any], data: list[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """The inputs of an elementwise operation, with their parameters in the output's shape."""
        inputs, tags, data = list(inputs), list(tags), list(data)
        for i, tag in enumerate(tags):
            if isinstance(tag, View):
                tags[i] = broadcast(tag, shape)
                for x in _shadows(data[i]):
                    inputs[i] = jnp.broadcast_to(inputs[i], shape)
                    data[i] = (x.reshape(-1, *(x.shape[1:] or (1,) * len(shape))),)
        return inputs, tags, data

    def layout(self, site: Site, inputs: list[Any], tag: View | Output, data: Any) -> Any:
        """The outputs of a change of layout, or None where it cannot be followed."""
        rule = LAYOUT[site.name]
        if isinstance(tag, Output):
            terms = [views for term in tag.terms if (views := rule(site.eqn, term))]
            return bind(site.eqn, inputs), [Output(t) for t in zip(*terms, strict=True)], []
        views = rule(site.eqn, tag)
        if views is None:
            return None
        kept = [tuple(data[_index(tag, p)] for p in v.pieces) for v in views]
        for shadow in _shadows(data):
            if site.name == "convert_element_type":
                kept = [(shadow,)]
            elif site.name == "broadcast_in_dim":
                at = site.eqn.params["broadcast_dimensions"]
                old = dict(zip(at, shadow.shape[1:], strict=True))
                new = [old.get(i, 1) for i in range(len(views[0].pieces[0].axes))]
                kept = [(shadow.reshape(-1, *new),)]
            else:
                wide = jnp.broadcast_to(shadow, (shadow.shape[0], *inputs[0].shape))
                kept = [(x,) for x in jax.vmap(lambda x: bind(site.eqn, [x]))(wide)]
        return bind(site.eqn, inputs), views, kept

    def use(self, site: Site, inputs: list[Any], tags: list[Any], data: list[Any]) -> Any:
        """The output of a layer's product, marked, and its tag; None where it is not a layer's."""
        use = USES[site.name](site.eqn, tags)
        if use is None:
            return None
        pieces = use.view.pieces
        placed = [blocks.places(use, p, self.shapes[p.leaf]) for p in pieces]
        found = [own for own in placed if own is not None]
        one_axis = all(sum(p.role == "i" for p in own) <= 1 for own in found)
        if len(found) < len(pieces) or (isinstance(use.site, Gather) and not one_axis):
            return None
        side = 2 if use.tagged else 0 if isinstance(tags[0], View) else 1
        x = inputs[1 if use.tagged or side == 0 else 0]
        (y,) = bind(site.eqn, inputs)
        pairs = zip(use.y_axes, y.shape, strict=True)
        free = [not own and (self.axes is not None or n == self.examples) for own, n in pairs]
        use = use._replace(examples=self.examples_of(site, -1, free))
        outputs = math.prod(y.shape[i] for i, axes in enumerate(use.y_axes) if axes)
        times = site.times * y.size // max(1, outputs)
        for piece, own in zip(pieces, found, strict=True):
            here = self.found.uses.setdefault(piece.leaf, {})
            here[site.place] = _UseOf(
                use.kind, blocks.form_of((p.role, p.full) for p in own), use.tagged, times
            )
        if self.probing is not None:
            y = self.probing.mark(y, x, use, data[side])
        if use.tagged and len(tags) == 4 and isinstance(tags[3], View):
            self.found.tagged_biases[tags[3].pieces[0].leaf] = pieces[0].leaf
        along = [i for i, axes in enumerate(use.y_axes) if use.view.axis in axes]
        out = tuple(
            blocks.output_piece(p, use, own, y.shape) for p, own in zip(pieces, found, strict=True)
        )
        if len(pieces) > 1 and not along:
            return [y], [], []
        return [y], [Output((View(out, along[0] if along else 0),))], []

    def sum(self, site: Site, inputs: list[Any], tags: list[Any], data: list[Any]) -> Any:
        """A sum and its tag; where a bias is added to a layer's outputs, it joins that layer."""
        inputs = list(inputs)
        outputs = [tag for tag in tags if isinstance(tag, Output)]
        for i, tag in enumerate(tags):
            if not isinstance(tag, View):
                continue
            terms = [t for out in outputs for t in out.terms if len(t.pieces) == len(tag.pieces)]
            axis = self.axis_of_examples(site, i, tag)
            for k, piece in enumerate(tag.pieces):
                fits = [t.pieces[k] for t in terms if t.axis == tag.axis or len(t.pieces) == 1]
                fits = [p for p in fits if matches(piece, p) and self.free(p.leaf, piece.leaf)]
                self.found.join(
                    site.place, piece.leaf, fits[0].leaf if fits else None, axis is not None
                )
            inputs[i] = self.separate(inputs[i], axis, data[i])
        both = tuple(t for out in outputs for t in out.terms)
        return bind(site.eqn, inputs), [Output(both)] if both else [], []

    def free(self, kernel: int, bias: int) -> bool:
        """Whether no other bias has joined this kernel yet."""
        others = [k for b, places in self.found.joins.items() if b != bias for k in places.values()]
        return kernel not in others

    def axis_of_examples(self, site: Site, i: int, tag: Any) -> int | None:
        """The axis along which an input, a parameter, is repeated for each example, or None."""
        if not isinstance(tag, View) or len(tag.pieces) > 1:
            return None
        pairs = zip(tag.pieces[0].shape, tag.pieces[0].axes, strict=True)
        once = [n == self.examples and all(s == 0 for _, s in axis) for n, axis in pairs]
        return self.examples_of(site, -1 if site.name in ELEMENTWISE else i, once)

    def examples_of(self, site: Site, i: int, allowed: Sequence[bool]) -> int | None:
        """The axis of examples of the i-th of an equation's inputs and outputs, if allowed."""
        axes = range(len(allowed)) if self.axes is None else [self.axes[id(site.eqn)][i]]
        return next((k for k in axes if k is not None and allowed[k]), None)

    def separate(self, x: Any, axis: int | None, data: Any) -> Any:
        """A parameter repeated for each example, plus its zeros: their gradient is each example's.

        The zeros' first axis are the examples; the others are the parameter's, or of size 1.
        """
        if axis is None or not _shadows(data):
            return x
        (zeros,) = _shadows(data)
        if zeros.shape[axis + 1] == 1:
            own = jnp.moveaxis(zeros.squeeze(axis + 1), 0, axis)
        else:
            own = jnp.moveaxis(jnp.diagonal(zeros, 0, 0, axis + 1), -1, axis)
        return x + jnp.broadcast_to(own, x.shape).astype(x.dtype)


def _index(view: View, piece: Any) -> int:
    return next(i for i, p in enumerate(view.pieces) if p.leaf == piece.leaf)


def _shadows(data: Any) -> list[jax.Array]:
    """The zeros of parameters outside layers."""
    return [x for x in data or () if isinstance(x, jax.Array)]


def _tag(x: Any) -> Any:
    return x.tag if isinstance(x, _Tagged) else None
