"""Several training steps in one dispatch: a compiled loop over batches stacked beforehand.

    for i in 0 … number − 1:    state, logs[i] ← step(state, batches[i])

So the host's work of one dispatch, which may exceed the device's for steps below a millisecond, is
shared by `number` steps. That is an argument of the program, at most the length of the stack: a
dispatch that ends early, where something is due, compiles nothing and changes no bit. Stacks of
other lengths are other programs, which XLA may round differently, so a run keeps to one length.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.core.types import Batch, PyTree

MOST_STEPS, ENOUGH_SECONDS, LONG_SECONDS = 32, 5e-3, 2e-3
_OPERATIONS, _BYTES = 1e11, 5e10  # per second: a few cores'; only the order of magnitude matters


class Stack(NamedTuple):
    """Batches of one shape for one dispatch.

    Attributes:
      batches: their entries, [length, B, …]; those after the first `number` are not used.
      number: how many there are.
    """

    batches: Batch
    number: int

    @property
    def length(self) -> int:
        """The number of batches that there is room for."""
        return int(jax.tree.leaves(self.batches)[0].shape[0])

    @property
    def args(self) -> tuple[Batch, np.int32]:
        """What the function `repeated` takes."""
        return self.batches, np.int32(self.number)


def check_length(steps_per_dispatch: int | None) -> None:
    """Raises where it is no number of steps, or more than one in one of several processes."""
    if steps_per_dispatch is not None:
        check.positive_int("steps_per_dispatch", steps_per_dispatch)
        check.argument(
            steps_per_dispatch == 1 or jax.process_count() == 1,
            "steps_per_dispatch",
            "1 or None where several processes train together",
            steps_per_dispatch,
        )


def stacked(batches: Iterable[Batch], most: int, length: int) -> Stack:
    """A stack of this length of the first batches, at most `most`, that have one shape.

    >>> stack = stacked([{"x": np.ones(3)}, {"x": np.zeros(3)}, {"x": np.ones(2)}], 3, 4)
    >>> stack.batches["x"].shape, stack.number
    ((4, 3), 2)
    """
    rows: list[list[Any]] = []
    kind: Any = None
    for batch in itertools.islice(batches, most):
        leaves, structure = jax.tree.flatten(batch)
        found = structure, [(x.shape, x.dtype) for x in leaves]
        if kind is not None and found != kind:
            break
        kind = found
        rows.append(leaves)
    arrays = [np.zeros((length, *shape), dtype) for shape, dtype in kind[1]]
    for i, leaves in enumerate(rows):
        for array, leaf in zip(arrays, leaves, strict=True):
            array[i] = leaf
    return Stack(jax.tree.unflatten(kind[0], arrays), len(rows))


def one_of(batch: Batch | Stack) -> Batch:
    """A batch as it is; of a stack, the shapes and types of one of its batches."""
    if not isinstance(batch, Stack):
        return batch
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), dict(batch.batches))


def shapes_of(batch: Batch | Stack) -> PyTree:
    """(shape, dtype's name) of each array of a batch, or of one of a stack."""
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), dict(one_of(batch)))


def repeated(train: Callable[..., Any]) -> Callable[..., Any]:
    """The function `(state, batches, number) -> (state, logs[length])`, see above.

    Args:
      train: `(state, batch) -> (state, logs)`.
    """
    train = jax.jit(train, inline=True)  # traced once

    def steps(state: Any, batches: Batch, number: jax.Array) -> tuple[Any, Any]:
        stack = Stack(batches, 0)
        after, shapes = jax.eval_shape(train, state, one_of(stack))
        refuse_changed_types(state, after)
        logs = jax.tree.map(lambda x: jnp.zeros((stack.length, *x.shape), x.dtype), shapes)

        def body(i: jax.Array, carry: Any) -> Any:
            state, logs = carry
            batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), batches)
            state, new = train(state, batch)
            put = jax.lax.dynamic_update_index_in_dim
            return state, jax.tree.map(lambda x, one: put(x, one, i, 0), logs, new)

        found: tuple[Any, Any] = jax.lax.fori_loop(jnp.int32(0), number, body, (state, logs))
        return found

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
    """How many steps to dispatch at once, of the same length each up to `most` steps.

    1 for a step of 2 ms or more, else what makes 5 ms, up to 32; by XLA's count of a step's
    operations and bytes, since measured times would differ from run to run.

    Args:
      step: the step, lowered.
      most: steps between two that end a dispatch.
    """
    cost = step.cost_analysis() or {}
    if "flops" not in cost:
        return 1
    seconds = cost["flops"] / _OPERATIONS + cost.get("bytes accessed", 0.0) / _BYTES
    if seconds >= LONG_SECONDS:
        return 1
    length = min(most, MOST_STEPS, -(-ENOUGH_SECONDS // max(seconds, 1e-9)))
    return int(-(-most // -(-most // length)))
