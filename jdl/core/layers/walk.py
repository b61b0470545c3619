"""A walk through a model's jaxpr that follows its parameters and marks the products they meet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import jax

from jdl.core.jaxpr import CALLS, Evaluator, Site, bind
from jdl.core.layers.probes import Marks
from jdl.core.layers.products import USES, Dense, Use
from jdl.core.layers.views import LAYOUT, Output, Piece, View
from jdl.core.types import PyTree


class Found:
    """What a walk through a jaxpr saw."""

    def __init__(self) -> None:
        self.uses: dict[int, dict[Any, tuple[str, bool, bool, int]]] = {}
        self.joins: dict[int, dict[Any, int | None]] = {}
        self.strange: dict[int, str] = {}
        self.told: dict[int, int] = {}  # bias -> kernel, by a tag

    def use(self, place: Any, use: Use, rows: int) -> None:
        """Notes that a product at this place uses a kernel for so many rows."""
        for piece in use.view.pieces:
            here = self.uses.setdefault(piece.leaf, {})
            here[place] = (use.kind, use.transposed, use.tagged, rows)

    def join(self, place: Any, bias: int, kernel: int | None) -> None:
        """Notes that a bias is added to a kernel's outputs, or to no one kernel's."""
        self.joins.setdefault(bias, {})[place] = kernel

    def other(self, tag: Any, why: str) -> None:
        """Notes that a parameter is used in a way that is no layer's."""
        for piece in tag.pieces if isinstance(tag, View) else ():
            self.strange.setdefault(piece.leaf, why)


def walk_model(
    predict: Callable[[PyTree], Any], params: PyTree, found: Found, marks: Marks | None
) -> Any:
    """`predict(params)`; `found` notes what becomes of params, `marks` go behind their products."""
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
    walk = _Walk(found, marks)
    outputs, _ = walk.evaluator.run(program, list(map(_Tagged, leaves, views)))
    return jax.tree.unflatten(shapes[-1], walk.untag(outputs, "an output of the model"))


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["tag"])
@dataclass(frozen=True)
class _Tagged:
    """An array, and what it is: a parameter, or the output of a layer."""

    value: Any
    tag: View | Output


class _Walk:
    """Evaluates a jaxpr, and follows parameters through it."""

    def __init__(self, found: Found, marks: Marks | None):
        self.found, self.marks = found, marks
        leave = partial(self.untag, why="carried or sliced by a loop, or handed on by a branch")
        self.evaluator = Evaluator(self.visit, leave)

    def untag(self, values: Sequence[Any], why: str) -> list[Any]:
        """The arrays; their tags are lost, for this reason."""
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
        """One equation with nothing inside: its outputs and their tags."""
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
        x = inputs[1 if use.tagged or isinstance(tags[0], View) else 0]
        (y,) = bind(site.eqn, inputs)
        axis = use.site.output_axis if isinstance(use.site, Dense) else use.site.y_spec[1]
        self.found.use(site.place, use, site.times * y.size // max(1, y.shape[axis]))
        if self.marks is not None:
            y = self.marks.put(y, x, use)
        if use.tagged and len(tags) == 4:
            bias, kernel = tags[3], use.view.pieces[0].leaf
            if isinstance(bias, View):
                self.found.told[bias.pieces[0].leaf] = kernel
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
