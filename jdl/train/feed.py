"""Batches on their way to the device, and the place reached in the data."""

import base64
import itertools
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jdl.core import check
from jdl.core.objective import batch_size
from jdl.core.types import Batch
from jdl.train.parallel import Placement
from jdl.train.signals import Stopped

Data = Iterable[Batch] | Callable[[], Iterable[Batch]]

PROTOCOL = ("epochs", "repeat", "once", "shard")  # of `jdl.data.Dataset`, no other library's
EMPTY = "it is empty, or was used up, as a generator is by one pass"
_ENDLESS = 2**62  # grain's length of a data set without an end is larger


class Feed:
    """The batches of a data set on their way to the device, and the place reached in it.

    Args:
      data: the batches, as the host makes them.
      placement: where they go.
      position: where to begin, as `position` told.

    Attributes:
      position: where in the data the next `take` reads, as JSON can hold it: the iterator's own
        state; None for iterables that keep none.
      wait_seconds: how long `take` and `prefetch` have waited for the data.
      ended: whether the data has come to its end.
    """

    def __init__(self, data: Iterable[Batch], placement: Placement, position: Any = None):
        self._iterator: Iterator[Batch] = iter(data)
        self._own = is_dataset(data) and hasattr(
            data, "plan"
        )  # its positions are plain as they are
        self._placement = placement
        self._ahead: tuple[Batch, Any] | None = None
        self.wait_seconds = 0.0
        self.ended = False
        if position is not None and self.resumable:
            _go_to(self._iterator, position)
        self.position = self._state()

    @property
    def resumable(self) -> bool:
        """Whether the data can go on from a position."""
        return hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")

    @property
    def begins_again(self) -> bool:
        """Whether it cannot, and that matters: one batch for ever has no positions."""
        return not self.resumable and not isinstance(self._iterator, itertools.repeat)

    def _state(self) -> Any:
        if not self.resumable:
            return None
        state = self._iterator.get_state()  # type: ignore[attr-defined]
        return state if self._own else _plain(state)

    def prefetch(self) -> Batch | None:
        """Makes sure that the next batch is on its way, and shows it; None at the end."""
        if self._ahead is None:
            start = time.perf_counter()
            try:
                batch = next(self._iterator, None)
                if batch is None:
                    self.ended = True
                    return None
                arrays, _ = entries(batch, self._placement.inputs)
                self._ahead = (self._placement.put_step_batch(arrays), self._state())
            except (KeyboardInterrupt, Stopped):
                if self.resumable:  # the batch being made is not lost
                    _go_to(self._iterator, self.position)
                raise
            self.wait_seconds += time.perf_counter() - start
        return self._ahead[0]

    def take(self) -> Batch | None:
        """The next batch, on the device; None at the end."""
        batch = self.prefetch()
        if self._ahead is not None:
            self.position = self._ahead[1]
            self._ahead = None
        return batch


# ---------------------------------------------------------------------- batches


def entries(
    batch: Any, inputs: str | tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A batch's entries of numbers, and those of text or objects, which stay on the host.

    Args:
      batch: name -> array with leading axis B, or a list of B rows.
      inputs: the entries that the model is given.

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
        raise check.DataError("A batch of the data has no rows.")
    return arrays, texts


def _array(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray | jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of several lengths
        raise check.DataError(f"The batch's entry {name!r} makes no array: {error}") from error


# ---------------------------------------------------------------------- positions


def _plain(state: Any) -> Any:
    """An iterator's state as JSON can hold it, exactly; what JSON has stays as it is."""
    if state is None or isinstance(state, str):
        return state
    if isinstance(state, bool | int | float | np.number | np.bool_):
        return state.item() if isinstance(state, np.generic) else state
    if isinstance(state, bytes):
        return {_KIND: "bytes", "of": base64.b64encode(state).decode("ascii")}
    if isinstance(state, list):
        return [_plain(x) for x in state]
    if type(state) is tuple:
        return {_KIND: "tuple", "of": [_plain(x) for x in state]}
    if isinstance(state, np.ndarray) and state.dtype.kind in "biuf":
        of = [state.dtype.str, list(state.shape), _plain(state.tobytes())]
        return {_KIND: "array", "of": of}
    if isinstance(state, Mapping):
        if _KIND not in state and all(isinstance(key, str) for key in state):
            return {key: _plain(x) for key, x in state.items()}
        return {_KIND: "dict", "of": [[_plain(key), _plain(x)] for key, x in state.items()]}
    raise check.DataError(
        f"The data's position holds a {type(state).__name__}, which a checkpoint cannot keep: its "
        "iterator's get_state is to give numbers, text, bytes, arrays, lists and dicts of them."
    )


def _state_of(plain: Any) -> Any:
    """The state that `_plain` was given."""
    if isinstance(plain, list):
        return [_state_of(x) for x in plain]
    if not isinstance(plain, Mapping):
        return plain
    if _KIND not in plain:
        return {key: _state_of(x) for key, x in plain.items()}
    kind, of = plain[_KIND], plain["of"]
    if kind == "bytes":
        return base64.b64decode(of)
    if kind == "tuple":
        return tuple(_state_of(x) for x in of)
    if kind == "dict":
        return {_state_of(key): _state_of(x) for key, x in of}
    dtype, shape, data = of
    return np.frombuffer(_state_of(data), dtype).reshape(shape).copy()


_KIND = "__kind__"


def _go_to(iterator: Any, position: Any) -> None:
    try:
        iterator.set_state(_state_of(position))
    except check.UserError:
        raise
    except Exception as error:  # whatever another library's iterator makes of another's position
        raise check.DataError(
            "The saved position belongs to other data than this "
            f"{type(iterator).__name__}: {check.reason(error)}"
        ) from error


def record_names(data: Any, position: Any) -> list[str]:
    """The names of the records in the batch at that position; none for data that has no names."""
    source, order, plan = (getattr(data, name, None) for name in ("source", "order", "plan"))
    if source is None or order is None or plan is None or position is None:
        return []
    span = plan.span(position["epoch"], position["record"], 0)
    return [source.name(record) for record in order.records(*span)]


# ---------------------------------------------------------------------- data sets


def is_dataset(data: Any) -> bool:
    """Whether it keeps to `jdl.data.Dataset`, so that it can be repeated, shared and ended."""
    return all(hasattr(data, name) for name in PROTOCOL)


def opened(data: Data) -> Any:
    """The batches; of each, this process's rows, where several processes train together."""
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
            not _made_of_whole(batches),
            "data",
            "made of data sets of which this process has its part",
            type(batches).__name__,
            "Call shard(jax.process_index(), jax.process_count()) on each before grain combines "
            "them.",
        )
    return batches


def _made_of_whole(batches: Any) -> bool:
    """Whether grain has made it of data sets of ours that all processes would read whole."""
    parents = getattr(batches, "parents", ())
    return any(
        p.plan.parts == 1 if is_dataset(p) and hasattr(p, "plan") else _made_of_whole(p)
        for p in parents
    )


def repeated(batches: Any) -> Any:
    """The batches again and again, where they are of a data set that can be passed over again."""
    return batches.repeat() if is_dataset(batches) else batches


def ending(batches: Any) -> Any:
    """The batches, refused where they are known to have no end."""
    check.argument(
        not _endless(batches),
        "steps",
        "given for data without an end (epochs=None)",
        None,
        "Or give max_steps, epochs or seconds.",
    )
    return batches


def one_pass(batches: Any) -> Any:
    """The batches of one pass, refused where they are known to have no end of their own."""
    if is_dataset(batches):
        return batches.once()
    check.argument(
        not _endless(batches), "data", "batches that have an end", type(batches).__name__
    )
    return batches


def _endless(batches: Any) -> bool:
    """Whether they are known to have no end; of a generator nobody knows."""
    if is_dataset(batches):
        return batches.epochs is None
    length = operator.length_hint(batches, -1)
    if isinstance(batches, itertools.repeat):
        return length < 0
    return isinstance(batches, itertools.cycle) or length >= _ENDLESS


def once(data: Data, placement: Placement) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """The batches of one pass, on the devices, each with its entries of text."""
    put = dict if placement.is_host else placement.put_batch
    for batch in one_pass(opened(data)):
        arrays, texts = entries(batch, placement.inputs)
        yield put(arrays), texts


def steps_per_epoch(data: Data, argument: str = "epochs", wanted: str = "left out") -> int:
    """How many batches the data tells that an epoch has; an error is about that argument."""
    number = getattr(data, "steps_per_epoch", None)
    check.argument(
        number is not None,
        argument,
        f"{wanted} for data that does not tell its steps_per_epoch",
        type(data).__name__,
        "Give a number of steps.",
    )
    return int(number)  # type: ignore[arg-type]
