"""Transfers batches to the device, and tracks the position in the data."""

import itertools
import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jdl.core import check
from jdl.core.objective import batch_size
from jdl.core.types import Batch
from jdl.train import positions
from jdl.train.dispatch import Stack, stacked
from jdl.train.parallel import Placement
from jdl.train.signals import Stopped

Data = Iterable[Batch] | Callable[[], Iterable[Batch]]

PROTOCOL = ("epochs", "repeat", "once", "shard")  # methods that only `jdl.data.Dataset` has
EMPTY = "it is empty, or was used up, as a generator is by one pass"
_ENDLESS = 2**62  # grain's length of a data set without an end is larger


class Feed:
    """Transfers the batches of a data set to the device, and tracks the position in it.

    Args:
      data: the batches, as the host makes them.
      placement: where they go.
      position: where to begin: the `position` of an earlier feed.

    Attributes:
      position: where in the data the next `take` reads: the iterator's own state, as JSON can hold
        it; None for iterables that keep none.
      wait_seconds: how long `take` and `prefetch` have waited for the data.
      ended: whether the data has ended.
      checked: whether the training has checked its first batch.
    """

    def __init__(self, data: Iterable[Batch], placement: Placement, position: Any = None):
        self._iterator: Iterator[Batch] = iter(data)
        self._is_jdl = is_dataset(data) and hasattr(data, "plan")  # its states are JSON already
        self._placement = placement
        self._ahead: deque[tuple[Batch, Any]] = deque()  # batches read, and positions after them
        self._placed: tuple[int, int, Batch | Stack] | None = None  # of `most` and `length`
        self.wait_seconds = 0.0
        self.ended = self.checked = False
        if position is not None and self.resumable:
            positions.restore(self._iterator, position)
        self.position = self._state()

    @property
    def resumable(self) -> bool:
        """Whether the data can continue from a position."""
        return hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")

    @property
    def begins_again(self) -> bool:
        """Whether a restart rereads the data from its start; a repeated batch needs no position."""
        return not self.resumable and not isinstance(self._iterator, itertools.repeat)

    def _state(self) -> Any:
        if not self.resumable:
            return None
        state = self._iterator.get_state()  # type: ignore[attr-defined]
        return state if self._is_jdl else positions.to_json(state)

    def prefetch(self, most: int = 1, length: int = 1) -> Any:
        """Starts to transfer the next batch, or a stack of several; None at the end.

        Args:
          most: how many batches at most; fewer where the data ends or their shape changes.
          length: of the `Stack` that holds them; 1 for a batch as it is.
        """
        if self._placed is None or self._placed[:2] != (most, length):
            start = time.perf_counter()
            self._read(most)
            if not self._ahead:
                self.ended = True
                return None
            put, batches = self._placement.put_step_batch, [batch for batch, _ in self._ahead]
            found = stacked(batches[:most], length, put) if length > 1 else put(batches[0])
            self._placed = most, length, found
            self.wait_seconds += time.perf_counter() - start
        return self._placed[2]

    def _read(self, number: int) -> None:
        try:
            while len(self._ahead) < number:
                if self._ahead and not self._is_jdl:  # the iterator may reuse the arrays
                    last, position = self._ahead.pop()
                    self._ahead.append((jax.tree.map(np.array, last), position))
                batch = next(self._iterator, None)
                if batch is None:
                    break
                arrays, _ = entries(batch, self._placement.inputs)
                self._ahead.append((arrays, self._state()))
        except (KeyboardInterrupt, Stopped):
            if self.resumable:  # the batch being made is not lost
                last = self._ahead[-1][1] if self._ahead else self.position
                positions.restore(self._iterator, last)
            raise

    def advance(self) -> list[Any]:
        """Moves behind what `prefetch` returned last; returns the position before each batch."""
        assert self._placed is not None
        batch, before = self._placed[2], []
        for _ in range(batch.number if isinstance(batch, Stack) else 1):
            before.append(self.position)
            self.position = self._ahead.popleft()[1]
        self._placed = None
        return before

    def take(self) -> Batch | None:
        """The next batch, on the device; None at the end."""
        batch = self.prefetch()
        if batch is not None:
            self.advance()
        return batch


# ---------------------------------------------------------------------- batches


def entries(
    batch: Any, inputs: str | tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A batch's numeric entries, and those of text or objects, which stay on the host.

    Args:
      batch: name -> array with leading axis B, or a list of B examples.
      inputs: the entries that the model takes.

    >>> arrays, texts = entries({"image": np.ones((2, 3)), "label": [0, 1], "name": ["a", "b"]})
    >>> sorted(arrays), sorted(texts)
    (['image', 'label'], ['name'])
    """
    check.argument(
        hasattr(batch, "items"),
        "data",
        "an iterable of dicts of arrays",
        f"an iterable of {type(batch).__name__}",
        'A batch is such as {"image": x, "label": y}.',
    )
    arrays: dict[str, Any] = {}
    texts: dict[str, np.ndarray] = {}
    for name, value in batch.items():
        found = value
        if not isinstance(value, np.ndarray | jax.Array):
            is_rows = lambda x: isinstance(x, list)  # noqa: E731
            found = jax.tree.map(partial(_array, name), value, is_leaf=is_rows)
        is_text = isinstance(found, np.ndarray) and found.dtype.kind in "OUSMm"
        (texts if is_text else arrays)[name] = found
    for name in (inputs,) if isinstance(inputs, str) else inputs:
        check.argument(name not in texts, "inputs", "entries of numbers", name)
    if not batch_size(arrays | texts, inputs):
        raise check.DataError("A batch of the data has no examples.")
    return arrays, texts


def _array(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray | jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:  # examples of several lengths
        raise check.DataError(f"The batch's entry {name!r} makes no array: {error}") from error


# ---------------------------------------------------------------------- data sets


def is_dataset(data: Any) -> bool:
    """Whether it has the methods of `jdl.data.Dataset` to repeat, shard and end it."""
    return all(hasattr(data, name) for name in PROTOCOL)


def opened(data: Data) -> Any:
    """The batches; this process's shard of them where several processes train together."""
    batches: Any = data() if callable(data) else data
    check.argument(
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__"),
        "data",
        "an iterable of dicts of arrays",
        type(batches).__name__,
    )
    check.argument(
        not isinstance(batches, Mapping),
        "data",
        "an iterable of dicts of arrays",
        type(batches).__name__,
        "Of a single batch make a list: [batch].",
    )
    if jax.process_count() > 1:
        if is_dataset(batches):
            return batches.shard(jax.process_index(), jax.process_count())
        check.argument(
            not _has_unsharded_parent(batches),
            "data",
            "made of data sets that are sharded by process",
            type(batches).__name__,
            "Call shard(jax.process_index(), jax.process_count()) on each before grain combines "
            "them.",
        )
    return batches


def _has_unsharded_parent(batches: Any) -> bool:
    """Whether it is a grain data set made from a data set of `jdl.data` without `shard`."""
    parents = getattr(batches, "parents", ())
    return any(
        p.plan.parts == 1 if is_dataset(p) and hasattr(p, "plan") else _has_unsharded_parent(p)
        for p in parents
    )


def for_training(data: Data, *, repeat: bool) -> Any:
    """The batches to train on.

    Args:
      data: as for `Estimator.train`.
      repeat: whether a data set is repeated without end; otherwise it must have an end.
    """
    batches = opened(data)
    if repeat:
        return batches.repeat() if is_dataset(batches) else batches
    refuse_endless(batches)
    return batches


def refuse_endless(batches: Any) -> None:
    """Raises where the batches are known to have no end."""
    check.argument(
        not _endless(batches),
        "steps",
        "given for data without an end (epochs=None)",
        None,
        "Or give max_steps, epochs or seconds.",
    )


def one_pass(batches: Any) -> Any:
    """The batches of one pass; raises where they are known to have no end."""
    if is_dataset(batches):
        return batches.once()
    check.argument(
        not _endless(batches), "data", "batches that have an end", type(batches).__name__
    )
    return batches


def _endless(batches: Any) -> bool:
    """Whether they are known to have no end; a generator's is not known."""
    if is_dataset(batches):
        return batches.epochs is None
    length = operator.length_hint(batches, -1)
    if isinstance(batches, itertools.repeat):
        return length < 0
    return isinstance(batches, itertools.cycle) or length >= _ENDLESS


def once(data: Data, placement: Placement) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """The batches of one pass, on the devices, each with its entries of text."""
    for batch in one_pass(opened(data)):
        arrays, texts = entries(batch, placement.inputs)
        yield placement.put_step_batch(arrays), texts


def steps_per_epoch(data: Data, argument: str = "epochs", wanted: str = "left out") -> int:
    """The data's own `steps_per_epoch`.

    Args:
      data: as for `Estimator.train`.
      argument: what the error is about where the data has none.
      wanted: what that argument must be then.
    """
    number = getattr(data, "steps_per_epoch", None)
    check.argument(
        number is not None,
        argument,
        f"{wanted} for data without steps_per_epoch",
        type(data).__name__,
        "Give a number of steps.",
    )
    return int(number)  # type: ignore[arg-type]
