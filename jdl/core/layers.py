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

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from jdl.core import tree
from jdl.core.types import PyTree


class Layer(NamedTuple):
    """A kernel whose uses are all known.

    Attributes:
      kernel: the leaf's number, of shape (inputs..., outputs).
      bias: the number of the leaf that is added to its outputs, of shape (outputs,); or None.
      kind: "dense" or "conv".
      transposed: whether it is used as x Wᵀ.
      tagged: whether `tag_dense` or `tag_conv` told so.
      rows: how often it is used for the traced batch: examples × positions × steps × reuses.
    """

    kernel: int
    bias: int | None
    kind: str
    transposed: bool
    tagged: bool
    rows: int


class Layers(NamedTuple):
    """What a model does with its parameters.

    Attributes:
      known: kernel's leaf number -> layer.
      unknown: number of any other leaf that joins no layer -> why.
    """

    known: Mapping[int, Layer]
    unknown: Mapping[int, str]

    @property
    def biases(self) -> set[int]:
        """The leaves that belong to a layer as its bias."""
        return {layer.bias for layer in self.known.values() if layer.bias is not None}


class Probe(NamedTuple):
    """The second moments of a kernel of D inputs and K outputs, summed over rows.

    Attributes:
      first: of the side of its leading axes, [D+1, D+1], the last coordinate being the bias's 1
        (zero where no bias joins); or [D+1], the diagonal alone.
      last: of the side of its last axis, [K, K] or [K].
      rows: the number of rows, weighed by the mask.
      squares: of the gradients in the eigenbases, [D+1, K]; () where not asked for.
    """

    first: jax.Array
    last: jax.Array
    rows: jax.Array
    squares: PyTree = ()


class Bases(NamedTuple):
    """Orthogonal bases for `Probe.squares`; () stands for the identity."""

    first: PyTree
    last: PyTree


# ------------------------------------------------------------------------------ tags


def tag_dense(y: jax.Array, x: jax.Array, kernel: jax.Array, bias: Any = None) -> jax.Array:
    """`y`, with the remark that it is x @ kernel (+ bias), over the last axis of x.

    For functions whose product cannot be seen in their jaxpr.

    >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> tag_dense(x @ kernel, x, kernel).shape
    (2, 4)
    """
    operands = (y, x, kernel) if bias is None else (y, x, kernel, bias)
    return _tag_p.bind(*operands, conv=None)


def tag_conv(
    y: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    bias: Any = None,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """`y`, with the remark that it is the convolution of x [B, ..., C] with kernel [..., C, K].

    Args:
      y: [B, ..., K].
      x: the inputs.
      kernel: of as many spatial axes as x.
      bias: [K], or None.
      strides: one a spatial axis.
      padding: (low, high), one a spatial axis.
    """
    operands = (y, x, kernel) if bias is None else (y, x, kernel, bias)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _tag_p.bind(*operands, conv=(tuple(int(s) for s in strides), pads))


_tag_p = jex.Primitive("layer_tag")
_tag_p.def_impl(lambda y, *_, conv: y)
_tag_p.def_abstract_eval(lambda y, *_, conv: y)
mlir.register_lowering(_tag_p, mlir.lower_fun(lambda y, *_, conv: y, multiple_results=False))


def _tag_jvp(primals: Any, tangents: Any, *, conv: Any) -> Any:
    y = _tag_p.bind(*primals, conv=conv)
    t = tangents[0]
    return y, jnp.zeros_like(y) if isinstance(t, ad.Zero) else t


def _tag_batch(args: Any, axes: Any, *, conv: Any) -> Any:
    # Under vmap the remark is dropped: the batched product is another one.
    return args[0], axes[0]


ad.primitive_jvps[_tag_p] = _tag_jvp
batching.primitive_batchers[_tag_p] = _tag_batch


# ------------------------------------------------------------------------------ what is followed


class _Piece(NamedTuple):
    leaf: int
    start: int  # the first column in the array
    offset: int  # the first column in the leaf
    size: int


class _View(NamedTuple):
    """An array that is a parameter in another layout, or several side by side along columns."""

    axes: tuple[int | None, ...]  # the leaf's axis that each axis is; None for one that was added
    pieces: tuple[_Piece, ...]


class _Output(NamedTuple):
    """An array that is a sum of products of known kernels, maybe plus other things."""

    pieces: tuple[_Piece, ...]
    axis: int


class _Dense(NamedTuple):
    """Where rows are in a dense product: inputs are x's last axes after `permutation`."""

    permutation: tuple[int, ...]
    num_inputs: int
    output_axis: int


class _Conv(NamedTuple):
    """Where patches are in a convolution, whose axes are ordered by x_spec and y_spec."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    x_spec: tuple[int, ...]  # batch, channels, space...
    y_spec: tuple[int, ...]


class _Use(NamedTuple):
    view: _View
    kind: str
    transposed: bool
    tagged: bool
    site: _Dense | _Conv


class _Found:
    """What a walk through a jaxpr saw."""

    def __init__(self) -> None:
        self.uses: dict[int, dict[Any, tuple[str, bool, bool, int]]] = {}
        self.joins: dict[int, dict[Any, int | None]] = {}
        self.strange: dict[int, str] = {}
        self.told: dict[int, int] = {}  # bias -> kernel, by a tag

    def use(self, place: Any, use: _Use, rows: int) -> None:
        for piece in use.view.pieces:
            here = self.uses.setdefault(piece.leaf, {})
            here[place] = (use.kind, use.transposed, use.tagged, rows)

    def join(self, place: Any, bias: int, kernel: int | None) -> None:
        self.joins.setdefault(bias, {})[place] = kernel

    def other(self, tag: Any, why: str) -> None:
        for piece in tag.pieces if isinstance(tag, _View) else ():
            self.strange.setdefault(piece.leaf, why)


def find(predict: Callable[[PyTree], Any], params: PyTree) -> Layers:
    """The layers of `predict(params)`.

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
    jax.eval_shape(lambda p: _walk_model(predict, p, found, None), params)
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
    marks = _Marks(layers, probes, bases, weights, max_rows)
    return _walk_model(predict, params, _Found(), marks)


# ------------------------------------------------------------------------------ the walk


def _walk_model(
    predict: Callable[[PyTree], Any], params: PyTree, found: _Found, marks: "_Marks | None"
) -> Any:
    leaves, structure = jax.tree.flatten(params)
    shapes: list[Any] = []

    def flat(*leaves: Any) -> Any:
        outputs, out = jax.tree.flatten(predict(jax.tree.unflatten(structure, leaves)))
        shapes.append(out)
        return outputs

    jaxpr = jax.make_jaxpr(flat)(*leaves)
    tags = [
        _View(tuple(range(x.ndim)), (_Piece(i, 0, 0, x.shape[-1] if x.ndim else 1),))
        for i, x in enumerate(leaves)
    ]
    outputs, tags = _Walk(found, marks).run(jaxpr.jaxpr, jaxpr.consts, leaves, tags, ())
    for tag in tags:
        found.other(tag, "an output of the model")
    return jax.tree.unflatten(shapes[-1], outputs)


class _Walk:
    """Evaluates a jaxpr, and follows parameters through it."""

    def __init__(self, found: _Found, marks: "_Marks | None"):
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
        if any(isinstance(tag, _View) for tag in tags):
            if name in _INNER:
                return self.inner(eqn, inputs, tags, place)
            if name in _USES:
                use = _USES[name](eqn, tags)
                if use is not None:
                    return self.use(eqn, inputs, tags, use, place)
        outputs = _evaluate(eqn, inputs)
        if not any(tags):
            return outputs, [None] * len(outputs)
        if name in ("add", "add_any"):
            return outputs, [self.sum(tags, place)]
        if name in _LAYOUT and tags[0] is not None and all(type(t) is type(tags[0]) for t in tags):
            moved = _LAYOUT[name](eqn, tags)
            if moved is not None:
                return outputs, moved
        for tag in tags:
            self.found.other(tag, f"used by {name}")
        return outputs, [None] * len(outputs)

    def use(self, eqn: Any, inputs: list[Any], tags: list[Any], use: _Use, place: Any) -> Any:
        x = inputs[1 if use.tagged or isinstance(tags[0], _View) else 0]
        (y,) = _evaluate(eqn, inputs)
        axis = use.site.output_axis if isinstance(use.site, _Dense) else use.site.y_spec[1]
        self.found.use(place, use, self.times * y.size // max(1, y.shape[axis]))
        if self.marks is not None:
            y = self.marks.put(y, x, use)
        if use.tagged and len(tags) == 4:
            bias, kernel = tags[3], use.view.pieces[0].leaf
            if isinstance(bias, _View):
                self.found.told[bias.pieces[0].leaf] = kernel
        whole = not use.transposed
        return [y], [_Output(use.view.pieces if whole else (), axis)]

    def sum(self, tags: list[Any], place: Any) -> Any:
        """The tag of a sum; where a bias is added to a layer's outputs, it joins that layer."""
        a, b = tags
        if isinstance(a, _View) and isinstance(b, _Output):
            a, b = b, a
        if isinstance(a, _Output) and isinstance(b, _View):
            added = tuple(None if i != a.axis else 0 for i in range(len(b.axes)))
            for bias in b.pieces:
                rest = [p for p in a.pieces if p[1:] == bias[1:]]
                free = [p.leaf for p in rest if self.free(p.leaf, bias.leaf)]
                kernel = free[0] if free and b.axes == added else None
                self.found.join(place, bias.leaf, kernel)
            return a
        if isinstance(a, _Output) and isinstance(b, _Output):
            return _Output(a.pieces + b.pieces, a.axis) if a.axis == b.axis else None
        for tag in tags:
            self.found.other(tag, "used by add")
        return a if isinstance(a, _Output) else b if isinstance(b, _Output) else None

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


# ------------------------------------------------------------------------------ layout


def _same(eqn: Any, tags: list[Any]) -> list[Any]:
    return [tags[0]]


def _transpose(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    order = eqn.params["permutation"]
    if isinstance(tag, _Output):
        return [tag._replace(axis=order.index(tag.axis))]
    return [tag._replace(axes=tuple(tag.axes[i] for i in order))]


def _reshape(eqn: Any, tags: list[Any]) -> list[Any] | None:
    """Only axes of size 1 may come and go."""
    (tag,) = tags
    old, new = list(eqn.invars[0].aval.shape), eqn.outvars[0].aval.shape
    if not isinstance(tag, _View):
        return None
    axes: list[int | None] = []
    i = 0
    for size in new:
        while i < len(old) and old[i] != size and old[i] == 1:
            i += 1
        if i < len(old) and old[i] == size:
            axes.append(tag.axes[i])
            i += 1
        elif size == 1:
            axes.append(None)
        else:
            return None
    return [tag._replace(axes=tuple(axes))] if all(n == 1 for n in old[i:]) else None


def _broadcast(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if not isinstance(tag, _View):
        return None
    axes: list[int | None] = [None] * len(new)
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        axes[j] = tag.axes[i] if old[i] == new[j] else None
    return [tag._replace(axes=tuple(axes))]


def _cut(tag: _View, start: int, stop: int) -> _View:
    pieces = []
    for p in tag.pieces:
        low, high = max(p.start, start), min(p.start + p.size, stop)
        if low < high:
            pieces.append(_Piece(p.leaf, low - start, p.offset + low - p.start, high - low))
    return tag._replace(pieces=tuple(pieces))


def _last_axis(tag: _View) -> int:
    return max((a for a in tag.axes if a is not None), default=-1)


def _slice(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    shape = eqn.invars[0].aval.shape
    starts, stops, strides = (eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    if not isinstance(tag, _View) or (strides is not None and any(s != 1 for s in strides)):
        return None
    for axis, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if (start, stop) != (0, shape[axis]):
            if tag.axes[axis] is None or tag.axes[axis] != _last_axis(tag):
                return None
            tag = _cut(tag, start, stop)
    return [tag]


def _split(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    if not isinstance(tag, _View) or tag.axes[axis] != _last_axis(tag):
        return None
    ends = [sum(int(n) for n in sizes[:i]) for i in range(len(sizes) + 1)]
    return [_cut(tag, a, b) for a, b in itertools.pairwise(ends)]


def _concatenate(eqn: Any, tags: list[Any]) -> list[Any] | None:
    axis = eqn.params["dimension"]
    first = tags[0]
    if not isinstance(first, _View) or any(t.axes != first.axes for t in tags):
        return None
    if first.axes[axis] != _last_axis(first):
        return None
    pieces, start = [], 0
    for tag, v in zip(tags, eqn.invars, strict=True):
        pieces += [p._replace(start=p.start + start) for p in tag.pieces]
        start += v.aval.shape[axis]
    return [first._replace(pieces=tuple(pieces))]


def _squeeze(eqn: Any, tags: list[Any]) -> list[Any] | None:
    (tag,) = tags
    if not isinstance(tag, _View):
        return None
    gone = eqn.params["dimensions"]
    return [tag._replace(axes=tuple(a for i, a in enumerate(tag.axes) if i not in gone))]


_LAYOUT: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "reduce_precision": _same,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
}


# ------------------------------------------------------------------------------ products


def _dense_use(eqn: Any, tags: list[Any]) -> _Use | None:
    (contract, batch) = eqn.params["dimension_numbers"]
    side = 0 if isinstance(tags[0], _View) else 1
    view, x = tags[side], eqn.invars[1 - side].aval
    if isinstance(tags[1 - side], _View) or any(len(b) for b in batch):
        return None
    mine, theirs = contract[side], contract[1 - side]
    axes = [view.axes[i] for i in mine]
    n = len(view.axes)
    if set(view.axes) != set(range(n)):
        return None
    if set(axes) == set(range(n - 1)) and n >= 2:
        transposed = False
    elif axes == [1] and n == 2 and len(view.pieces) == 1 and _whole(view, eqn.invars[side], 1):
        transposed = True
    else:
        return None
    order = [theirs[axes.index(a)] for a in range(n) if a in axes]
    free = [i for i in range(x.ndim) if i not in theirs]
    output_axis = len(free) if side == 1 else 0
    site = _Dense((*free, *order), math.prod(x.shape[i] for i in order), output_axis)
    return _Use(view, "dense", transposed, False, site)


def _whole(view: _View, v: Any, axis: int) -> bool:
    """Whether a view of one piece has all columns of its array, from the leaf's first on."""
    size = v.aval.shape[view.axes.index(axis)]
    return view.pieces[0].offset == 0 and view.pieces[0].size == size


def _conv_use(eqn: Any, tags: list[Any]) -> _Use | None:
    view, kernel, params = tags[1], eqn.invars[1].aval, eqn.params
    if not isinstance(view, _View) or isinstance(tags[0], _View):
        return None
    numbers = params["dimension_numbers"]
    plain = (
        params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and all(p >= 0 for pair in params["padding"] for p in pair)
    )
    out, channels, *space = numbers.rhs_spec
    axes = [view.axes[i] for i in (*space, channels, out)]
    if not plain or axes != list(range(kernel.ndim)):
        return None
    site = _Conv(
        window=tuple(kernel.shape[i] for i in space),
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        dilation=tuple(params["rhs_dilation"]),
        x_spec=tuple(numbers.lhs_spec),
        y_spec=tuple(numbers.out_spec),
    )
    return _Use(view, "conv", False, False, site)


def _canonical(
    view: _View, kernel: Any, tagged: bool, padding: Any, strides: Any = None
) -> _Use | None:
    n = kernel.ndim
    if view.axes != tuple(range(n)):
        return None
    spec = (0, n - 1, *range(1, n - 1))
    ones = (1,) * (n - 2)
    site = _Conv(kernel.shape[:-2], strides or ones, tuple(padding), ones, spec, spec)
    return _Use(view, "conv", False, tagged, site)


def _canonical_conv_use(eqn: Any, tags: list[Any]) -> _Use | None:
    """The convolution of `jdl.models.convolution`: NHWC, HWIO, stride 1."""
    if not isinstance(tags[1], _View) or isinstance(tags[0], _View):
        return None
    return _canonical(tags[1], eqn.invars[1].aval, False, eqn.params["padding"])


def _tag_use(eqn: Any, tags: list[Any]) -> _Use | None:
    view, conv = tags[2], eqn.params["conv"]
    x, kernel = eqn.invars[1].aval, eqn.invars[2].aval
    if not isinstance(view, _View) or view.axes != tuple(range(kernel.ndim)):
        return None
    if conv is not None:
        strides, padding = conv
        return _canonical(view, kernel, True, padding, strides)
    y = eqn.invars[0].aval
    return _Use(view, "dense", False, True, _Dense(tuple(range(x.ndim)), x.shape[-1], y.ndim - 1))


_USES: dict[str, Callable[[Any, list[Any]], _Use | None]] = {
    "dot_general": _dense_use,
    "conv_general_dilated": _conv_use,
    "canonical_conv": _canonical_conv_use,
    "layer_tag": _tag_use,
}


# ------------------------------------------------------------------------------ second moments


class _Marks(NamedTuple):
    """What a walk needs to put marks behind products."""

    layers: Layers
    probes: Mapping[int, Probe]
    bases: Mapping[int, Bases]
    weights: jax.Array | None
    max_rows: int

    def put(self, y: jax.Array, x: jax.Array, use: _Use) -> jax.Array:
        """`y`, whose gradient also fills the probes of the kernels behind it."""
        pieces = [p for p in use.view.pieces if p.leaf in self.layers.known]
        known = [self.layers.known[p.leaf] for p in pieces]
        if not pieces or (any(layer.tagged for layer in known) and not use.tagged):
            return y
        probes = [self.probes[p.leaf] for p in pieces]
        bases = [self.bases.get(p.leaf) for p in pieces]
        weights = self.weights
        if weights is not None and (not x.ndim or x.shape[0] != weights.shape[0]):
            weights = None
        max_rows = self.max_rows

        @jax.custom_vjp
        def identity(y: Any, x: Any, probes: Any, bases: Any, weights: Any) -> Any:
            return y

        def forward(y: Any, x: Any, probes: Any, bases: Any, weights: Any) -> Any:
            return y, (x, probes, bases, weights)

        def backward(kept: Any, g: Any) -> Any:
            x, probes, bases, weights = kept
            a, g_rows, w = _rows(use.site, x, g, weights, max_rows)
            moments = [
                _moments(a, g_rows, w, piece, layer, probe, basis)
                for piece, layer, probe, basis in zip(pieces, known, probes, bases, strict=True)
            ]
            return g, None, moments, None, None

        identity.defvjp(forward, backward)
        return identity(y, jax.lax.stop_gradient(x), probes, bases, weights)


def _rows(site: Any, x: Any, g: Any, weights: Any, max_rows: int) -> tuple[Any, Any, Any]:
    """Inputs [R, D], output gradients [R', K] and weights [R] of a product's rows."""
    if isinstance(site, _Dense):
        x = x.transpose(site.permutation)
        lead = x.shape[: g.ndim - 1]
        a = x.reshape(-1, site.num_inputs)
        g = jnp.moveaxis(g, site.output_axis, -1)
        g = g.reshape(-1, g.shape[-1])
    else:
        g = g.transpose((site.y_spec[0], *site.y_spec[2:], site.y_spec[1]))
        x = x.transpose((site.x_spec[0], *site.x_spec[2:], site.x_spec[1]))
        space = g.shape[1:-1]
        thin = math.ceil((math.prod(g.shape[:-1]) / max_rows) ** (1 / len(space)))
        strides = tuple(max(1, min(thin, n)) for n in space)
        x = patches(x, site, space, strides)
        places = tuple(slice(s // 2, None, s) for s in strides)
        share = math.prod(x.shape[1:-1]) / math.prod(space)
        g = g[(slice(None), *places)] * jnp.asarray(share**-0.5, g.dtype)
        lead = x.shape[:-1]
        a = x.reshape(-1, x.shape[-1])
        g = g.reshape(-1, g.shape[-1])
    if weights is None:
        return a, g, None
    shape = (weights.shape[0],) + (1,) * (len(lead) - 1)
    return a, g, jnp.broadcast_to(weights.reshape(shape), lead).reshape(-1)


def patches(x: jax.Array, site: Any, space: Sequence[int], thin: Sequence[int]) -> jax.Array:
    """The patches [B, ..., window · C] behind a convolution's outputs, every `thin`-th of them."""
    x = jnp.pad(x, [(0, 0), *site.padding, (0, 0)])
    parts = []
    for corner in _corners(site.window):
        places = tuple(
            slice(c * d + t // 2 * s, c * d + (n - 1) * s + 1, s * t)
            for c, d, s, n, t in zip(corner, site.dilation, site.strides, space, thin, strict=True)
        )
        parts.append(x[(slice(None), *places)])
    return jnp.concatenate(parts, axis=-1)


def _corners(window: Sequence[int]) -> list[tuple[int, ...]]:
    if not window:
        return [()]
    return [(i, *rest) for i in range(window[0]) for rest in _corners(window[1:])]


def _moments(
    a: Any, g: Any, weights: Any, piece: _Piece, layer: Layer, probe: Probe, bases: Any
) -> Probe:
    """The second moments that one use adds to a kernel's probe."""
    dtype = probe.rows.dtype
    a, g = a.astype(dtype), g.astype(dtype)[:, piece.start : piece.start + piece.size]
    rows = jnp.asarray(float(a.shape[0]), dtype) if weights is None else jnp.sum(weights)
    if weights is not None:
        a = a * jnp.sqrt(weights.astype(dtype))[:, None]
    with jax.default_matmul_precision("highest"):
        if layer.transposed:
            return Probe(
                _bordered(g, None, probe.first),
                _moment(a, probe.last.ndim),
                rows.astype(dtype),
                _squares(g, a, None, probe, bases, piece),
            )
        one = None
        if layer.bias is not None:
            one = jnp.ones(a.shape[0], dtype) if weights is None else jnp.sqrt(weights)
        last = _moment(g, probe.last.ndim)
        spread = [(piece.offset, probe.last.shape[0] - piece.offset - piece.size)] * last.ndim
        return Probe(
            _bordered(a, one, probe.first),
            jnp.pad(last, spread),
            rows.astype(dtype),
            _squares(a, g, one, probe, bases, piece),
        )


def _moment(x: jax.Array, ndim: int) -> jax.Array:
    return x.T @ x if ndim == 2 else jnp.sum(x * x, axis=0)


def _bordered(x: jax.Array, one: jax.Array | None, like: jax.Array) -> jax.Array:
    """The moment of [x, one], or of [x, 0]."""
    moment = _moment(x, like.ndim)
    if one is None:
        return jnp.pad(moment, [(0, 1)] * like.ndim)
    corner = jnp.sum(one * one)[None]
    if like.ndim == 1:
        return jnp.concatenate([moment, corner])
    side = one @ x
    return jnp.block([[moment, side[:, None]], [side[None], corner[:, None]]])


def _squares(first: Any, last: Any, one: Any, probe: Probe, bases: Any, piece: _Piece) -> Any:
    """Σ (Q_firstᵀ x)² ((Q_lastᵀ y)²)ᵀ over rows: the curvature's diagonal in the eigenbases."""
    if bases is None:
        return ()
    border = jnp.zeros(first.shape[0], first.dtype) if one is None else one
    first = jnp.concatenate([first, border[:, None]], axis=1)
    width = probe.last.shape[0] - piece.offset - piece.size
    last = jnp.pad(last, [(0, 0), (piece.offset, width)])
    x = first if isinstance(bases.first, tuple) else first @ bases.first
    y = last if isinstance(bases.last, tuple) else last @ bases.last
    # One weight of each row is in `first`; a gradient of a masked row is zero by itself.
    return jnp.square(x).T @ jnp.square(y)


def dtype_of(leaf: Any) -> Any:
    """The type of a leaf's second moments."""
    return jnp.dtype(tree.accumulator(leaf.dtype))
