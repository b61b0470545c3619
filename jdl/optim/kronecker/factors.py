r"""Kronecker factors of the curvature, and their damped inverse as a preconditioner.

For a layer y = Wᵀ ā, with ā its inputs and a 1 for the bias, and g the gradient at y:

    F ≈ A ⊗ G,  A = E[ā āᵀ],  G = E[g gᵀ];    (A + π√λ I)⁻¹ V (G + √λ/π I)⁻¹

with π² the ratio of the factors' mean eigenvalues; of stacked layers, heads' groups and experts a
pair for each block. Parameters outside known layers use a diagonal approximation. The state is
arrays only; layers are found at each trace (`layers.py`).
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jdl.core import tree
from jdl.core.objective import Objective
from jdl.core.types import Key, Params, PyTree
from jdl.optim.kronecker import inverses, moments
from jdl.optim.kronecker.blocks import Layer
from jdl.optim.kronecker.layers import Layers
from jdl.optim.kronecker.probes import Bases, Probe, dtype_of
from jdl.optim.masking import Part, restricted


class Options(NamedTuple):
    """How factors are gathered and stored.

    Attributes:
      curvature: see `moments.second_moments`.
      sharing: likewise.
      decay: of the running means, in [0, 1).
      eigen: whether to damp and correct in the factors' eigenbases.
      max_size: a side with more coordinates has a diagonal factor, ≥ 1.
      dtype: of factors and inverses in memory; None for the leaves', at least float32.
    """

    curvature: str = "fisher"
    sharing: str = "expand"
    decay: float = 0.95
    eigen: bool = False
    max_size: int = 2048
    dtype: str | None = None


class Pair(NamedTuple):
    """Arrays of a layer's two sides: matrices [N, S, S] or, for a side above the limit, [N, S]."""

    first: jax.Array
    last: jax.Array


class Kronecker(NamedTuple):
    """The factors and their inverses; one entry a leaf, () where a leaf has none."""

    moments: tuple[PyTree, ...]  # A and G, running means; a `Pair` for each kernel
    inverses: tuple[PyTree, ...]  # the damped inverses, or with `eigen` the eigenbases
    squares: tuple[PyTree, ...]  # with `eigen`, the curvature's diagonal in the eigenbases
    diagonals: tuple[PyTree, ...]  # curvature diagonals of the other leaves
    # For each leaf, how many estimates its running means hold, int32; those that were not finite
    # are left out. Scalars: of one array, XLA would compile a kernel for each index.
    refreshes: tuple[jax.Array, ...]
    left_out: jax.Array  # how many estimates or inverses of a leaf were left out so far, int32
    inverted: jax.Array  # for each leaf, λ of its inverses, float32

    @property
    def started(self) -> jax.Array:
        """Whether there is an estimate."""
        return jnp.any(jnp.stack(self.refreshes) > 0)


_told: contextvars.ContextVar[Any] = contextvars.ContextVar("told", default=None)


@contextlib.contextmanager
def told(objective: Objective, params: Params) -> Iterator[None]:
    """Within, `init` takes the layers from this model; without, it guesses from the leaves' shapes.

    For an `init` inside optax.chain, masked or partition, which pass parameters alone.
    """
    token = _told.set((objective, params))
    try:
        yield
    finally:
        _told.reset(token)


def told_layers(params: Params) -> Layers | None:
    """The layers of these parameters in the model of `told`, or None outside of it."""
    objective = told_objective(params)
    return None if objective is None else moments.find_layers(objective, params)


def told_objective(params: Params) -> Objective | None:
    """The objective of `told`, as a function of these parameters, or None outside of it."""
    if _told.get() is None:
        return None
    objective, whole = _told.get()
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(whole) != structure:
        objective = restricted(objective, Part(params, whole))
    return cast("Objective", objective)


def init(params: Params, options: Options, found: Layers | None = None) -> Kronecker:
    """The state before the first refresh.

    Without `found` or `told`, a leaf of two axes or more is taken for a kernel whose last axis are
    its outputs; of three axes, for the split into inputs and outputs of least memory. Where that is
    wrong, the first update sets up again (`fitting`), and a jitted step compiles once more.

    >>> state = init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, Options())
    >>> [x.shape for x in state.moments[1]]
    [(1, 4, 4), (1, 2, 2)]
    """
    leaves = jax.tree.leaves(params)
    found = told_layers(params) if found is None else found
    if found is None:
        found = Layers({i: _guess(i, x) for i, x in enumerate(leaves) if jnp.ndim(x) >= 2}, {})

    def pair(i: int, one: float) -> PyTree:
        if i not in found.known:
            return ()
        dtype = options.dtype or dtype_of(leaves[i])
        return Pair(*(one * _unit(shape, dtype) for shape in sides(found.known[i], options)))

    def squares(i: int) -> PyTree:
        if not options.eigen or i not in found.known:
            return ()
        (n, first, *_), (_, last, *_) = sides(found.known[i], options)
        return jnp.zeros((n, first, last), dtype_of(leaves[i]))

    def diagonal(i: int) -> PyTree:
        # Vectors always have one, so that a guess is right about biases too.
        x = leaves[i]
        return jnp.zeros(x.shape, dtype_of(x)) if x.ndim < 2 or i not in found.known else ()

    numbers = range(len(leaves))
    return Kronecker(
        moments=tuple(pair(i, 0.0) for i in numbers),
        inverses=tuple(pair(i, 1.0) for i in numbers),
        squares=tuple(squares(i) for i in numbers),
        diagonals=tuple(diagonal(i) for i in numbers),
        # Arrays of their own: a state whose fields share a buffer cannot be donated.
        refreshes=tuple(jnp.zeros((), jnp.int32) for _ in numbers),
        left_out=jnp.zeros(len(leaves), jnp.int32),
        inverted=jnp.ones(len(leaves), jnp.float32),
    )


def sides(layer: Layer, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a layer's factors: [N, S, S], or [N, S] of a diagonal one.

    S is D + 1 or K; from 128 on, a multiple of 8, which devices can share.
    """
    n, d, k = layer.shape

    def shape(size: int, hot: bool) -> tuple[int, ...]:
        rounded = size if size < 128 else -(-size // 8) * 8
        return (n, rounded) if hot or size > options.max_size else (n, rounded, rounded)

    return shape(d + 1, layer.one_hot[0]), shape(k, layer.one_hot[1])


def _unit(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    one = jnp.eye(shape[-1], dtype=dtype) if len(shape) == 3 else jnp.ones(shape[-1], dtype)
    return jnp.broadcast_to(one, shape)


def _guess(leaf: int, x: jax.Array) -> Layer:
    cuts = range(1, x.ndim) if x.ndim == 3 else (x.ndim - 1,)
    splits = [(1, math.prod(x.shape[:cut]), math.prod(x.shape[cut:])) for cut in cuts]
    stacks = [x.shape] if x.ndim == 3 else []
    best = min([*splits, *stacks], key=lambda s: s[0] * (s[1] ** 2 + s[2] ** 2))
    form = tuple((role, n) for role, n in zip("bio", best, strict=True) if n != 1)
    return Layer(leaf, None, "dense", form, (False,), (False, False), False, 0)


def fitting(state: Kronecker, params: Params, found: Layers, options: Options) -> Kronecker:
    """The state, or a new one where its arrays are not those of the layers found."""
    wanted = jax.eval_shape(lambda p: init(p, options, found), params)
    shapes = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)  # noqa: E731
    structure: Any = jax.tree.structure(wanted)
    return (
        state
        if structure == jax.tree.structure(state) and shapes(wanted) == shapes(state)
        else init(params, options, found)
    )


def refresh_moments(
    objective: Objective,
    params: Params,
    found: Layers,
    state: Kronecker,
    key: Key,
    options: Options,
) -> Kronecker:
    """The state with one more estimate in the running means.

    Of a leaf whose estimate is not finite, it is left out and counted. The first 1/(1 − decay)
    estimates have equal weights.
    """
    probes, bases = {}, {}
    for i in found.known:
        first, last = (jnp.zeros(x.shape, _wide(x)) for x in state.moments[i])
        squares = jax.tree.map(jnp.zeros_like, state.squares[i])
        probes[i] = Probe(first, last, jnp.zeros(first.shape[:1], first.dtype), squares)
        if options.eigen:
            bases[i] = Bases(*(x.astype(_wide(x)) for x in state.inverses[i]))
    drawn, diagonals = moments.second_moments(
        objective, params, found, probes, bases, key, options.curvature, sharing=options.sharing
    )
    new: dict[int, PyTree] = {i: (Pair(p.first, p.last), p.squares) for i, p in drawn.items()}
    new |= diagonals
    changed = {name: list(getattr(state, name)) for name in MEANS}
    left_out = [jnp.zeros((), bool)] * len(state.moments)
    for i, value in new.items():
        usable = tree.all_finite(value)
        kept = 1.0 - 1.0 / (state.refreshes[i].astype(jnp.float32) + 1.0)
        kept = jnp.minimum(kept, options.decay)

        def mean(old: jax.Array, new: jax.Array, usable: Any = usable, kept: Any = kept) -> Any:
            share = kept.astype(new.dtype)
            mixed = share * old.astype(new.dtype) + (1.0 - share) * new
            return jnp.where(usable, mixed.astype(old.dtype), old)

        fields = ("moments", "squares") if i in drawn else ("diagonals",)
        for name, x in zip(fields, value if i in drawn else (value,), strict=True):
            changed[name][i] = jax.tree.map(mean, changed[name][i], x)
        changed["refreshes"][i] = state.refreshes[i] + usable.astype(jnp.int32)
        left_out[i] = ~usable
    means: dict[str, Any] = {name: tuple(x) for name, x in changed.items()}
    count = state.left_out + jnp.stack(left_out).astype(jnp.int32)
    return state._replace(left_out=count, **means)


MEANS = ("moments", "squares", "diagonals", "refreshes")


def refresh_inverses(
    found: Layers,
    state: Kronecker,
    damping: jax.Array,
    *,
    every: int = 1,
    count: jax.Array | int = 0,
    whole: jax.Array | bool = True,
    active: jax.Array | bool = True,
    axis_name: str | None = None,
    mesh: Any = None,
) -> tuple[Kronecker, jax.Array]:
    """The state with new inverses or eigenbases of its moments, and how much work they were.

    Where that is more than `MUCH` the layers take turns, so that no step does it all: each belongs
    to one of several groups. In a group's turn its layers are inverted if the last time was about
    `every` steps ago, and never more, or λ has changed by more than a factor of 4 since.

    Args:
      found: the layers.
      state: the moments.
      damping: λ > 0.
      every: steps between inversions, ≥ 1.
      count: the step's number.
      whole: whether all layers are inverted in this step.
      active: whether any is.
      axis_name: inside `pmap` or `shard_map`, the devices' axis; they compute together.
      mesh: under `jit`, their mesh.

    Returns:
      The state, and the multiplications done, about.
    """
    eigen = any(not isinstance(s, tuple) for s in state.squares)
    costs = {i: inverses.cost(state.moments[i]) for i in found.known}
    # No more than that takes, since λ may change much before a turn; and each group has a matrix
    # for each device, if there are that many.
    most = min(len(costs), 2 * len(costs) // inverses.num_devices(axis_name, mesh))
    groups = max(1, min(every, most, sum(costs.values()) // MUCH))
    turns = dict(zip(costs, inverses.assignment(list(costs.values()), groups), strict=True))
    drift = jnp.abs(jnp.log(damping.astype(jnp.float32) / state.inverted)) > math.log(4.0)
    work = jnp.zeros((), jnp.float32)
    fields = list(state.inverses), list(state.squares)
    for turn in range(groups):
        members = [i for i in found.known if turns[i] == turn]
        if not members:
            continue
        mine = count % groups == turn
        again = count // groups % (every // groups) == 0
        changed = False if eigen else jnp.any(drift[jnp.array(members)])
        due = jnp.asarray(active & (whole | (mine & (again | changed))))
        old = [(state.inverses[i], state.squares[i]) for i in members]
        given = [state.moments[i] for i in members]
        new, usable = jax.lax.cond(
            due,
            lambda old, given, members=members: _inverted(
                [found.known[i] for i in members], given, old, damping, axis_name, mesh
            ),
            lambda old, given: (old, jnp.ones(len(old), bool)),
            old,
            given,
        )
        for i, changed in zip(members, new, strict=True):
            for field, x in zip(fields, changed, strict=True):
                field[i] = x
        at = jnp.array(members)
        lams = jnp.where(due & usable, damping.astype(jnp.float32), state.inverted[at])
        state = state._replace(
            inverted=state.inverted.at[at].set(lams),
            left_out=state.left_out.at[at].add((~usable).astype(jnp.int32)),
        )
        work = work + due.astype(jnp.float32) * float(sum(costs[i] for i in members))
    return state._replace(inverses=tuple(fields[0]), squares=tuple(fields[1])), work


MUCH = 25 * 10**8  # multiplications, 0.05 s on two cores


def _inverted(
    layers: list[Layer],
    given: list[Pair],
    old: list[tuple[Pair, PyTree]],
    damping: jax.Array,
    *devices: Any,
) -> tuple[list[tuple[Pair, PyTree]], jax.Array]:
    """New inverses, or eigenbases and the diagonals in them, and which of them are usable."""
    matrices, shifts = [], []
    for layer, pair in zip(layers, given, strict=True):
        first, last = (x.astype(_wide(x)) for x in pair)
        _, d, k = layer.shape
        size = d + (layer.bias is not None)
        a, g = _mean(first, size), _mean(last, k)
        # λ is at least a rounding error of the curvature, and each coordinate's shift one of its
        # own: with the mean's, matrices with a few large coordinates had no Cholesky factor.
        eps = float(jnp.finfo(pair.first.dtype).eps)
        lam = jnp.maximum(damping.astype(first.dtype), eps * a * g)
        pi = _balance(a, g)
        floors = (eps * math.sqrt(n) * _diagonal(x) for n, x in ((d, first), (k, last)))
        roots = (x[:, None] for x in (pi * jnp.sqrt(lam), jnp.sqrt(lam) / pi))
        matrices += [first, last]
        shifts += [jnp.maximum(r, f) for r, f in zip(roots, floors, strict=True)]
    eigen = not isinstance(old[0][1], tuple)
    results = inverses.shared(
        inverses.eigen if eigen else inverses.inverse, matrices, shifts, *devices
    )
    new, usable = [], []
    for j, (pair, squares) in enumerate(old):
        both = results[2 * j : 2 * j + 2]
        usable.append(tree.all_finite(both))
        found = Pair(*(r[0].astype(x.dtype) for r, x in zip(both, pair, strict=True)))
        if eigen:
            # In new bases the diagonal starts from that of the factors.
            outer = both[0][1][:, :, None] * both[1][1][:, None]
            squares = jnp.where(usable[-1], outer.astype(squares.dtype), squares)
        new.append((tree.where(usable[-1], found, pair), squares))
    return new, jnp.stack(usable)


def _mean(x: jax.Array, size: int) -> jax.Array:
    """The mean eigenvalue of each block, of which `size` coordinates are used."""
    return jnp.sum(_diagonal(x), axis=-1) / size


def _diagonal(x: jax.Array) -> jax.Array:
    return jnp.diagonal(x, axis1=-2, axis2=-1) if x.ndim == 3 else x


def _balance(a: jax.Array, g: jax.Array) -> jax.Array:
    """π, the root of the ratio of the mean eigenvalues of A and G."""
    known = (a > 0) & (g > 0)
    return jnp.sqrt(jnp.where(known, a, 1.0) / jnp.where(known, g, 1.0))


def apply(found: Layers, state: Kronecker, vector: PyTree, damping: jax.Array) -> PyTree:
    """(F + λ)⁻¹ v, in the types of the leaves of `vector`."""
    leaves, structure = jax.tree.flatten(vector)
    out = list(leaves)
    for i in found.unknown:
        d = state.diagonals[i]
        floor = jnp.finfo(d.dtype).eps * jnp.mean(d) + jnp.finfo(d.dtype).tiny
        out[i] = leaves[i].astype(d.dtype) / (d + jnp.maximum(damping.astype(d.dtype), floor))
    with jax.default_matmul_precision("highest"):
        for i, layer in found.known.items():
            bias = None if layer.bias is None else leaves[layer.bias]
            v, b = _applied(layer, state, i, leaves[i], bias, damping)
            out[i] = v
            if layer.bias is not None:
                out[layer.bias] = b
    out = [x.astype(leaf.dtype) for x, leaf in zip(out, leaves, strict=True)]
    return jax.tree.unflatten(structure, out)


def _applied(
    layer: Layer, state: Kronecker, i: int, kernel: jax.Array, bias: Any, damping: jax.Array
) -> tuple[jax.Array, Any]:
    """The inverse times a layer's kernel and bias."""
    first, last = (x.astype(_wide(x)) for x in state.inverses[i])
    n, d, k = layer.shape
    v = layer.matrices(kernel.astype(first.dtype))
    if bias is not None:
        v = jnp.concatenate([v, bias.astype(first.dtype).reshape(n, 1, k)], axis=1)
    # Coordinates that a side does not use are zero, as its moments are there.
    pads = [(0, 0), (0, first.shape[1] - v.shape[1]), (0, last.shape[1] - k)]
    v = jnp.pad(v, pads)
    if isinstance(state.squares[i], tuple):
        # Inverses are symmetric: a transpose would only cost a copy of them each step.
        v = times(first, v, last)
    else:
        inner = times(transposed(first), v, last)
        scaled = inner / (state.squares[i] + damping.astype(first.dtype))
        v = times(first, scaled, transposed(last))
    return layer.leaf(v[:, :d, :k], kernel.shape), (
        None if bias is None else v[:, d, :k].reshape(bias.shape)
    )


def transposed(x: jax.Array) -> jax.Array:
    """Each block's transpose; an array of two axes holds diagonal matrices."""
    return x.mT if x.ndim == 3 else x


def times(first: jax.Array, v: jax.Array, last: jax.Array) -> jax.Array:
    """P v Q of each block, with P and Q as for `transposed`."""
    v = first[:, :, None] * v if first.ndim == 2 else first @ v
    return v * last[:, None] if last.ndim == 2 else v @ last


def _wide(x: jax.Array) -> Any:
    return jnp.dtype(tree.accumulator(x.dtype))
