"""Batches on their way to the device, and the place reached in the data."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jdl.core import check
from jdl.core.types import Batch
from jdl.train.parallel import Placement

Data = Iterable[Batch] | Callable[[], Iterable[Batch]]
Put = Callable[[Batch], dict[str, Any]]


class Feed:
    """The batches of a data set on their way to the device, and the place reached in it.

    Args:
      data: the batches, as the host makes them.
      put: brings one to the device.
      position: where to begin, as an iterator's state.

    Attributes:
      position: where in the data the next `take` reads, as the iterator's own state; None for
        iterables that keep none.
      wait_seconds: how long `take` and `prefetch` have waited for the data.
    """

    def __init__(self, data: Iterable[Batch], put: Put, position: Any = None):
        self._iterator: Iterator[Batch] = iter(data)
        self._put = put
        self._ahead: tuple[Batch, Any] | None = None
        self.wait_seconds = 0.0
        if position is not None and hasattr(self._iterator, "set_state"):
            self._iterator.set_state(position)
        self.position = self._state()

    def _state(self) -> Any:
        return self._iterator.get_state() if hasattr(self._iterator, "get_state") else None

    def prefetch(self) -> Batch | None:
        """Makes sure that the next batch is on its way, and shows it; None at the end."""
        if self._ahead is None:
            start = time.perf_counter()
            batch = next(self._iterator, None)
            if batch is None:
                return None
            check.argument(
                hasattr(batch, "items"), "data", "an iterable of dicts of arrays", type(batch)
            )
            self._ahead = (self._put(batch), self._state())
            self.wait_seconds += time.perf_counter() - start
        return self._ahead[0]

    def take(self) -> Batch | None:
        """The next batch, on the device; None at the end."""
        batch = self.prefetch()
        if self._ahead is not None:
            self.position = self._ahead[1]
            self._ahead = None
        return batch


def record_names(data: Any, position: Any) -> list[str]:
    """The names of the records in the batch at that position; none for data that has no names."""
    source, order, plan = (getattr(data, name, None) for name in ("source", "order", "plan"))
    if source is None or order is None or plan is None or position is None:
        return []
    span = plan.span(position["epoch"], position["record"], 0)
    return [source.name(record) for record in order.records(*span)]


def opened(data: Data) -> Any:
    """The batches; of each, this process's rows, where several processes train together."""
    batches = data() if callable(data) else data
    if jax.process_count() > 1 and hasattr(batches, "shard"):
        batches = batches.shard(jax.process_index(), jax.process_count())
    return batches


def repeated(batches: Any) -> Any:
    """The batches again and again, where they are of a data set that can be passed over again."""
    return batches.repeat() if hasattr(batches, "repeat") else batches


def once(data: Data, placement: Placement) -> Iterator[Batch]:
    """The batches of one pass, on the devices."""
    batches = opened(data)
    if hasattr(batches, "once"):
        batches = batches.once()
    feed = Feed(batches, dict if placement.is_host else placement.put_batch)
    while (batch := feed.take()) is not None:
        yield batch


def batches_per_epoch(data: Data, argument: str = "epochs", wanted: str = "left out") -> int:
    """How many batches the data tells that an epoch has; an error is about that argument."""
    number = getattr(data, "batches_per_epoch", None)
    check.argument(
        number is not None,
        argument,
        f"{wanted} for data that does not tell its batches_per_epoch",
        type(data).__name__,
        "Give a number of steps.",
    )
    return int(number)  # type: ignore[arg-type]
