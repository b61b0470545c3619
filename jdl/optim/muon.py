"""Muon, optax's own, on the parameters that the field gives it; Adam on the others."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params, PyTree
from jdl.optim import diagnostics as diag
from jdl.optim.kronecker import factors
from jdl.optim.kronecker.blocks import Layer
from jdl.optim.matrices import layers_of, multiplication
from jdl.optim.result import ResultCode
from jdl.optim.transformation import ScalarOrSchedule, check_params, rate_at


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Axes:
    """For each leaf, the axes of its inputs and outputs, or None for Adam's."""

    numbers: tuple[MuonDimensionNumbers | None, ...]


class MuonState(NamedTuple):
    """The state of `muon`."""

    axes: Any
    learning_rate: jax.Array
    diagnostics: diag.Diagnostics
    inner: Any  # of optax.contrib.muon


def muon(
    learning_rate: ScalarOrSchedule = 2e-2,
    *,
    adam_learning_rate: float = 3e-3,
    beta: diag.Number = 0.95,
    nesterov: bool = True,
    weight_decay: diag.Number = 0.0,
    eps: diag.Number = 1e-8,
    adam_names: Sequence[str] = ("embed", "head", "logit", "position"),
) -> optax.GradientTransformationExtraArgs:
    r"""Muon (Jordan et al. 2024) for hidden matrices, AdamW for all other parameters.

    The steps are `optax.contrib.muon`'s, which by itself takes every leaf of two axes and none of
    more. Here kernels of attention and convolutions are matrices of inputs × outputs too, and
    embeddings, tables of positions, the head, norms and biases are Adam's. Inside
    `kronecker.told(objective, params)`, as in a `jdl.Estimator`, `init` sees from the model which
    is which; the head is a layer in which the outputs are affine. Elsewhere Adam has the vectors
    and the leaves with one of `adam_names` in their path: name an unnamed head there.

    A gradient that is not finite takes no step, enters no average and is counted in
    `diagnostics.left_out`.

    Args:
      learning_rate: of Muon, > 0, or a schedule of the number of updates.
      adam_learning_rate: of Adam, > 0, for the learning rate given, or for the highest of a
        schedule's first 100,000; it changes in proportion to Muon's.
      beta: decay of the momentum, in [0, 1).
      nesterov: whether to look ahead, for both.
      weight_decay: decoupled, ≥ 0, in units of each rate.
      eps: added to the norm of a momentum, and to Adam's root, > 0.
      adam_names: parts of the names of parameters for Adam, in lower case.

    Returns:
      An optax transformation, whose updates are the whole step.

    Raises:
      ArgumentError: for arguments out of range, at `init` for parameters that are not real.

    >>> params = {"embedding": jnp.ones((5, 4)), "kernel": jnp.ones((4, 2, 2)), "b": jnp.ones(4)}
    >>> muon(0.02).init(params).axes.numbers
    (None, None, MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2)))

    References:
      Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024).
    """
    options = SimpleNamespace(**locals())
    for name, value in vars(options).items():
        if isinstance(value, int | float) and name != "nesterov":
            high = 1.0 if name == "beta" else math.inf
            check.in_range(name, value, 0.0, high, open_low=name != "weight_decay", open_high=True)
    return optax.GradientTransformationExtraArgs(partial(_init, options), partial(_update, options))


def _init(options: Any, params: Params) -> MuonState:
    check_params("muon", params)
    axes = _Axes(tuple(_numbers(options, params)))
    return MuonState(
        # An array where `optax.tree.map_params` asks with no parameters.
        axes=axes if axes.numbers else jnp.zeros(()),
        learning_rate=_rate(options, jnp.zeros((), jnp.int32), params),
        diagnostics=diag.init(),
        inner=_inner(options, axes, 1.0, params).init(params),
    )


def _update(
    options: Any, updates: PyTree, state: MuonState, params: Params | None = None, **extras: Any
) -> tuple[PyTree, MuonState]:
    if not jax.tree.leaves(updates):
        return updates, state
    rate = state.learning_rate
    if not isinstance(options.learning_rate, int | float):
        rate = _rate(options, state.diagnostics.iterations, updates)
    sound = jnp.isfinite(tree.vdot(updates, updates))
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        steps, inner = _inner(options, state.axes, rate, updates).update(
            updates, state.inner, params
        )
    nothing = jax.tree.map(jnp.zeros_like, updates)
    steps = jax.tree.map(lambda x, like: x.astype(like.dtype), steps, updates)
    work = _multiplications(state.axes.numbers, jax.tree.leaves(updates))
    diagnostics = diag.advance(
        state.diagnostics,
        step_size=jnp.where(sound, rate, 0),
        termination=jnp.where(sound, ResultCode.ACCEPTED, ResultCode.NOT_FINITE),
        left_out=state.diagnostics.left_out + jnp.where(sound, 0, 1),
        factor_work=work * multiplication(params, **extras),
    )
    inner = tree.where(sound, inner, state.inner)
    return tree.where(sound, steps, nothing), MuonState(state.axes, rate, diagnostics, inner)


def _multiplications(numbers: Sequence[Any], leaves: Sequence[jax.Array]) -> int:
    """Those of Newton-Schulz's five steps: X Xᵀ = A, A A, and both with X."""
    total = 0
    for axes, leaf in zip(numbers, leaves, strict=True):
        if axes is not None:
            short, long = sorted(math.prod(leaf.shape[i] for i in own) for own in axes)
            total += 5 * (leaf.size // (short * long)) * (2 * short**2 * long + short**3)
    return total


def _rate(options: Any, count: jax.Array, like: PyTree) -> jax.Array:
    rate = rate_at(options.learning_rate, count)
    return jnp.asarray(rate, tree.accumulator(*(x.dtype for x in jax.tree.leaves(like))))


def _inner(options: Any, axes: Any, rate: Any, like: PyTree) -> optax.GradientTransformation:
    """Optax's, at these rates."""
    highest = options.learning_rate
    if callable(highest):
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            highest = float(jnp.max(jax.vmap(highest)(jnp.arange(100_000))))

    structure: Any = jax.tree.structure(like)
    return optax.contrib.muon(
        rate,
        beta=options.beta,
        eps=options.eps,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        adam_weight_decay=options.weight_decay,
        adam_learning_rate=rate * (options.adam_learning_rate / highest),
        muon_weight_dimension_numbers=jax.tree.unflatten(structure, axes.numbers),
    )


def _numbers(options: Any, params: Params) -> list[MuonDimensionNumbers | None]:
    layers, objective = layers_of(params), factors.told_objective(params)
    known = {i for i, x in layers.items() if x.rows > 0 and "embed" not in x.kind}
    heads = _heads(objective, params, known) if objective is not None else set()
    out: list[MuonDimensionNumbers | None] = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        layer, name = layers.get(i), jax.tree_util.keystr(path).lower()
        if objective is None:
            hidden = not any(part in name for part in options.adam_names)
        else:
            hidden = i in known - heads
        out.append(_axes(layer, leaf.shape) if hidden and layer is not None else None)
    return out


def _axes(layer: Layer, shape: Sequence[int]) -> MuonDimensionNumbers | None:
    """Which axes of a leaf are inputs and outputs; None where one is split between them."""
    axes: dict[str, list[int]] = {"b": [], "i": [], "o": []}
    end = 0
    for role, size in layer.form:
        start = end
        while end < len(shape) and math.prod(shape[start:end]) < size:
            end += 1
        if math.prod(shape[start:end]) != size:
            return None
        axes[role] += range(start, end)
    sides = tuple(axes["i"]), tuple(axes["o"])
    return MuonDimensionNumbers(*sides) if all(sides) else None


def _heads(objective: Objective, params: Params, layers: Iterable[int]) -> set[int]:
    """The layers in which the model's outputs are affine, those used last."""

    def outputs(params: Params) -> PyTree:
        return objective.apply(params, objective.batch, objective.key)[0]

    program = jax.make_jaxpr(outputs)(params).jaxpr
    last = {id(v): at for at, equation in enumerate(program.eqns) for v in equation.invars}
    heads: set[int] = set()
    for number in sorted(layers, key=lambda i: -last.get(id(program.invars[i]), -1)):
        if not _affine(outputs, params, number):
            break
        heads.add(number)
    return heads


def _affine(outputs: Callable[[Params], PyTree], params: Params, number: int) -> bool:
    """Whether the slope in this leaf does not depend on it."""
    leaves, structure = jax.tree.flatten(params)

    def slope(leaf: jax.Array) -> PyTree:
        def of(leaf: jax.Array) -> PyTree:
            some = [*leaves[:number], leaf, *leaves[number + 1 :]]
            return outputs(jax.tree.unflatten(structure, some))

        return jax.jvp(of, (leaf,), (jnp.ones_like(leaf),))[1]

    try:  # `out_axes=None` is for what is the same for all leaves
        jax.eval_shape(jax.vmap(slope, out_axes=None), leaves[number][None])
    except ValueError:
        return False
    return True
