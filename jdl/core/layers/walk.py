"""A walk through a model's jaxpr that follows its parameters and marks the products they meet."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

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

    jaxpr = jax.make_jaxpr(flat)(*leaves)
    tags = [
        View(tuple(range(x.ndim)), (Piece(i, 0, 0, x.shape[-1] if x.ndim else 1),))
        for i, x in enumerate(leaves)
    ]
    outputs, tags = _Walk(found, marks).run(jaxpr.jaxpr, jaxpr.consts, leaves, tags, ())
    for tag in tags:
        found.other(tag, "an output of the model")
    return jax.tree.unflatten(shapes[-1], outputs)


class _Walk:
    """Evaluates a jaxpr, and follows parameters through it."""

    def __init__(self, found: Found, marks: Marks | None):
        self.found, self.marks = found, marks
        self.times = 1  # how often the scans around the present place run it

    def run(
        self, jaxpr: Any, consts: Any, args: Sequence[Any], tags: Sequence[Any], place: Any
    ) -> tuple[list[Any], list[Any]]:
        """The values and the tags of the jaxpr's outputs, at this place of the model."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known: dict[Any, Any] = {v: t for v, t in zip(jaxpr.invars, tags, strict=True) if t}
        values |= dict(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, jex.Literal) else values[v]

        def tag_of(v: Any) -> Any:
            return None if isinstance(v, jex.Literal) else known.get(v)

        for i, eqn in enumerate(jaxpr.eqns):
            inputs = [read(v) for v in eqn.invars]
            marks = [tag_of(v) for v in eqn.invars]
            with eqn.ctx.manager:
                outputs, out_tags = self.step(eqn, inputs, marks, (*place, i))
            values |= dict(zip(eqn.outvars, outputs, strict=True))
            known |= {v: t for v, t in zip(eqn.outvars, out_tags, strict=True) if t}
        return [read(v) for v in jaxpr.outvars], [tag_of(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, inputs: list[Any], tags: list[Any], place: Any) -> Any:
        """One equation."""
        name = eqn.primitive.name
        if any(isinstance(tag, View) for tag in tags):
            if name in _INNER:
                return self.inner(eqn, inputs, tags, place)
            if name in USES:
                use = USES[name](eqn, tags)
                if use is not None:
                    return self.use(eqn, inputs, tags, use, place)
        outputs = _evaluate(eqn, inputs)
        if not any(tags):
            return outputs, [None] * len(outputs)
        if name in ("add", "add_any"):
            return outputs, [self.sum(tags, place)]
        if name in LAYOUT and tags[0] is not None and all(type(t) is type(tags[0]) for t in tags):
            moved = LAYOUT[name](eqn, tags)
            if moved is not None:
                return outputs, moved
        for tag in tags:
            self.found.other(tag, f"used by {name}")
        return outputs, [None] * len(outputs)

    def use(self, eqn: Any, inputs: list[Any], tags: list[Any], use: Use, place: Any) -> Any:
        x = inputs[1 if use.tagged or isinstance(tags[0], View) else 0]
        (y,) = _evaluate(eqn, inputs)
        axis = use.site.output_axis if isinstance(use.site, Dense) else use.site.y_spec[1]
        self.found.use(place, use, self.times * y.size // max(1, y.shape[axis]))
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

    def inner(self, eqn: Any, inputs: list[Any], tags: list[Any], place: Any) -> Any:
        """A call, a scan or a branch: the walk goes on inside."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.scan(eqn, inputs, tags, place)
        if name == "cond":
            index, *operands = inputs
            branches = [
                lambda *args, j=j, branch=branch: self.run(
                    branch.jaxpr, branch.consts, args, tags[1:], (*place, j)
                )[0]
                for j, branch in enumerate(params["branches"])
            ]
            outputs = jax.lax.switch(index, branches, *operands)
            return outputs, [None] * len(outputs)
        body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        consts = getattr(body, "consts", ())
        body = getattr(body, "jaxpr", body)
        if name not in ("remat", "remat2", "checkpoint"):
            return self.run(body, consts, inputs, tags, place)
        kept = {k: params[k] for k in ("prevent_cse", "policy") if k in params}
        run = jax.checkpoint(lambda *args: self.run(body, consts, args, tags, place)[0], **kept)
        outputs = run(*inputs)
        return outputs, [None] * len(outputs)

    def scan(self, eqn: Any, inputs: list[Any], tags: list[Any], place: Any) -> Any:
        params = eqn.params
        body, n, m = (
            params["jaxpr"],
            params["num_consts"],
            params["num_consts"] + params["num_carry"],
        )
        consts, carry, xs = inputs[:n], inputs[n:m], inputs[m:]
        # A carry that the body hands on untouched is a constant too.
        inside = list(tags[:n])
        for i, tag in enumerate(tags[n:m]):
            fixed = body.jaxpr.outvars[i] is body.jaxpr.invars[n + i]
            inside.append(tag if fixed else None)
            if not fixed:
                self.found.other(tag, "changed by a scan")
        for tag in tags[m:]:
            self.found.other(tag, "sliced by a scan")
        inside += [None] * len(xs)

        def step(carry: Any, x: Any) -> Any:
            outputs, _ = self.run(body.jaxpr, body.consts, [*consts, *carry, *x], inside, place)
            return outputs[: m - n], outputs[m - n :]

        options = {k: params[k] for k in ("length", "reverse", "unroll")}
        self.times *= params["length"]
        carry, ys = jax.lax.scan(step, carry, xs, **options)
        self.times //= params["length"]
        return [*carry, *ys], [None] * (len(carry) + len(ys))


_INNER = {
    *("pjit", "jit", "closed_call", "core_call", "custom_jvp_call"),
    *("remat", "remat2", "checkpoint", "scan", "cond"),
}


def _evaluate(eqn: Any, inputs: list[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    # Up to JAX 0.9 functions come apart from the other parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]
