"""Several training steps in one dispatch: a compiled loop over batches stacked beforehand.

    for i in 0 … number − 1:    state, logs[i] ← step(state, batches[i])

So the host's work of one dispatch, which may exceed the device's for steps below a millisecond, is
shared by `number` steps. That is an argument of the program, at most the length of the stack: a
dispatch that ends early, where something is due, compiles nothing and changes no bit. Stacks of
other lengths are other programs, which XLA may round differently, so a run keeps to one length.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.core.types import Batch, PyTree

MOST_STEPS, ENOUGH_SECONDS, LONG_SECONDS = 32, 2e-2, 2e-3
_OPERATIONS, _BYTES = 1e11, 5e10  # per second: a few cores'; only the order of magnitude matters


class Stack(NamedTuple):
    """Batches of one shape for one dispatch: entries [length, B, …], of which `number` are used."""

    batches: Batch
    number: np.int32


def stacked(batches: list[Batch], length: int, put: Callable[[Batch], Batch]) -> Stack:
    """A stack of this length of the first batches that have one shape, `put` on the device."""
    flat = [jax.tree.flatten(batch) for batch in batches]
    kinds = [(structure, [(x.shape, x.dtype) for x in leaves]) for leaves, structure in flat]
    number = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
    structure, leaves = kinds[0]
    arrays = [np.zeros((length, *shape), dtype) for shape, dtype in leaves]
    for i in range(number):
        for array, leaf in zip(arrays, flat[i][0], strict=True):
            array[i] = leaf
    return Stack(put(jax.tree.unflatten(structure, arrays)), np.int32(number))


def one_of(batch: Batch | Stack) -> Batch:
    """A batch as it is; of a stack, the first of its batches."""
    return jax.tree.map(lambda x: x[0], batch.batches) if isinstance(batch, Stack) else batch


def shapes_of(batch: Batch | Stack) -> PyTree:
    """(shape, dtype's name) of each array of a batch, or of one of a stack."""
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), dict(one_of(batch)))


def repeated(train: Callable[..., Any]) -> Callable[..., Any]:
    """The function `(state, batches, number) -> (state, logs[length])` of a step, see above."""
    train = jax.jit(train, inline=True)  # traced once

    def steps(state: Any, batches: Batch, number: jax.Array) -> Any:
        length = jax.tree.leaves(batches)[0].shape[0]
        after, shapes = jax.eval_shape(train, state, jax.tree.map(lambda x: x[0], batches))
        refuse_changed_types(state, after)
        logs = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)

        def body(i: jax.Array, carry: Any) -> Any:
            state, logs = carry
            batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), batches)
            state, new = train(state, batch)
            put = jax.lax.dynamic_update_index_in_dim
            return state, jax.tree.map(lambda x, one: put(x, one, i, 0), logs, new)

        return jax.lax.fori_loop(jnp.int32(0), number, body, (state, logs))

    return steps


def refuse_changed_types(before: Any, after: Any) -> None:
    """Raises where the step changes types: the next one would recompile or fail."""

    def types(tree: Any) -> dict[str, str]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(p): f"{x.dtype}{list(x.shape)}" for p, x in leaves}

    old, new = types(before), types(after)
    changed = [f"{p}: {old.get(p)} -> {new.get(p)}" for p in old | new if old.get(p) != new.get(p)]
    if changed:
        raise check.TrainingError(
            f"The step changes the types of its state, first {changed[0]}. "
            "Change the optimizer or the model so that they stay the same."
        )


def chosen_length(step: Any, most: int) -> int:
    """How many steps to dispatch at once, by XLA's count: measured times would differ by run.

    1 if one is expected to take 2 ms or more, else 20 ms of them, up to 32.

    Args:
      step: the step, lowered.
      most: steps between two that end a dispatch; what is chosen cuts them evenly.
    """
    cost = step.cost_analysis() or {}
    seconds = cost.get("flops", np.inf) / _OPERATIONS + cost.get("bytes accessed", 0.0) / _BYTES
    if seconds >= LONG_SECONDS:
        return 1
    length = min(most, MOST_STEPS, math.ceil(ENOUGH_SECONDS / max(seconds, 1e-9)))
    return math.ceil(most / math.ceil(most / length))
