"""Data sets of batches in a planned order, resumable at any batch.

A position is two numbers: the epoch, and how many of its records have been used. Batches never
cross the end of an epoch; the remainder is dropped, or padded and masked, so that shapes never
change. The records in a batch depend on the position alone, not on the number of threads, worker
processes or hosts that read, nor on unreadable records.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from jdl.core import check
from jdl.data.loading import InOrder, Loaded, Workers, made
from jdl.data.order import First, Order
from jdl.data.plan import Plan, Span

logger = logging.getLogger("jdl.data")

_VERSION = 2
_SAME = {  # what a position must have in common with its data, and what differs if it has not
    **dict.fromkeys(("version", "num_records", "shuffle", "seed"), ""),
    "data": " (of the archives and the images chosen from them by `split`)",
    "order": " (of the weights or the window)",
}


@runtime_checkable
class Dataset(Protocol):
    """The data set that a trainer needs; its iterators have `get_state` and `set_state`.

    >>> from jdl.data import from_arrays
    >>> data: Dataset = from_arrays(np.eye(5), batch_size=2, epochs=3)
    >>> data.steps_per_epoch, data.epochs
    (3, 3)
    """

    @property
    def batch_size(self) -> int:
        """Examples in every batch."""

    @property
    def num_records(self) -> int:
        """Records in an epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""

    @property
    def epochs(self) -> int | None:
        """The number of epochs; None for no end."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, or None if there is no such table."""

    @property
    def skipped(self) -> int:
        """The number of records found unreadable so far, each counted once."""

    @property
    def element_spec(self) -> dict[str, Any]:
        """What a batch is made of: name -> jax.ShapeDtypeStruct."""

    def repeat(self) -> "Dataset":
        """The same data without end."""

    def once(self) -> "Dataset":
        """One pass over all records in their own order."""

    def shard(self, part: int, parts: int) -> "Dataset":
        """One part of the same batches, for one of several processes."""

    def __iter__(self) -> Any: ...


def _refused(name: str) -> Any:
    def method(self: Any, *args: Any, **options: Any) -> Any:
        """Refused."""
        raise check.ArgumentError(
            f"`{name}` would lose the epochs, processes and position of these batches. Use "
            "`map(function)`, from batch to batch, or load them with other arguments."
        )

    return method


class Batches(grain.IterDataset):
    """A data set of batches, each a dict of arrays with leading axis B; a `grain.IterDataset`.

    Subclasses define how to `load` a span; order and position are handled here. Of grain's methods
    only `map` keeps the position; those that change which batches there are, or draw by a counter
    of their own, are refused: filter, batch, seed, random_map, map_with_index, prefetch,
    mp_prefetch.

    Attributes:
      plan: which places each batch holds.
      order: which record is at which place.
      classes: the names of the classes; None if there is no such table.
      fingerprint: of the data, so that a position in other data is refused.
      max_skipped: the share of an epoch's records that may be skipped; one always may unless it
        is 0.
    """

    num_threads = 0  # threads that load ahead; 0: batches are made when asked for
    num_workers = 0  # processes that load ahead instead
    ahead = 0  # batches made before they are asked for
    _maps: tuple[Callable[[Any], Any], ...] = ()

    filter, batch, seed = _refused("filter"), _refused("batch"), _refused("seed")
    random_map, map_with_index = _refused("random_map"), _refused("map_with_index")
    prefetch, mp_prefetch = _refused("prefetch"), _refused("mp_prefetch")

    def __init__(
        self,
        plan: Plan,
        order: Order,
        *,
        classes: tuple[str, ...] | None,
        fingerprint: str,
        max_skipped: float = 0.0,
    ):
        super().__init__()
        self.plan, self.order, self.classes = plan, order, classes
        self.fingerprint, self.max_skipped = fingerprint, max_skipped
        self._bad: dict[str, str] = {}

    def repeat(self) -> "Batches":
        """The same data without end; the remainder is dropped if an epoch fills a batch."""
        plan = self.plan
        drop = plan.drop_remainder or plan.num_records >= plan.batch_size
        return self._with(replace(plan, epochs=None, drop_remainder=drop), self.order)

    def once(self) -> "Batches":
        """One pass over all records in their own order, the last batch padded and masked."""
        return self._with(replace(self.plan, epochs=1, drop_remainder=False), self.order.plain())

    def first(self, batches: int) -> "Batches":
        """The first of the batches alone, in the same order in every epoch: to overfit.

        Args:
          batches: how many, at most an epoch's.

        >>> from jdl.data import from_arrays
        >>> few = from_arrays(np.arange(9), batch_size=2, epochs=2, shuffle=True, seed=1).first(2)
        >>> [batch["image"].tolist() for batch in few]
        [[2, 0], [8, 1], [2, 0], [8, 1]]
        """
        most = self.plan.num_records // self.plan.batch_size
        must = f"a whole number from 1 to {most}, the full batches of an epoch"
        check.argument(1 <= batches <= most, "batches", must, batches)
        records = batches * self.plan.batch_size
        return self._with(replace(self.plan, num_records=records), First(self.order, records))

    def shard(self, part: int, parts: int) -> "Batches":
        """Examples [part, part + 1) · B / parts of the same batches, for one of several processes.

        With `shard(jax.process_index(), jax.process_count())` every process has the same number of
        batches of B / parts examples, and every record comes once. The position is that of whole
        batches, valid for any number of processes.
        """
        return self._with(self.plan.sharded(part, parts), self.order)

    def map(self, transform: Any) -> "Batches":
        """The same data set with a function applied to each batch when it is asked for.

        Args:
          transform: `transform(batch) -> batch`, from dict to dict of arrays. It gets only this
            process's examples, must keep their number and `"mask"`, and must not be random: a
            resumed run would draw differently.

        >>> from jdl.data import from_arrays
        >>> data = from_arrays(np.arange(3), batch_size=2, epochs=1)
        >>> doubled = data.map(lambda batch: batch | {"image": 2 * batch["image"]})
        >>> [batch["image"].tolist() for batch in doubled], doubled.steps_per_epoch
        ([[0, 2], [4, 0]], 2)
        """
        function = getattr(transform, "map", transform)  # grain's transformations have a method
        check.argument(callable(function), "transform", "a function of a batch", transform)
        other = self._with(self.plan, self.order)
        other._maps = (*self._maps, function)
        return other

    def mapped(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A loaded batch with all functions of `map` applied."""
        for function in self._maps:
            batch = function(batch)
        return batch

    def _with(self, plan: Plan, order: Order) -> "Batches":
        other = copy.copy(self)
        other.plan, other.order = plan, order
        return other

    @property
    def batch_size(self) -> int:
        """Examples in every batch, over all processes."""
        return self.plan.batch_size

    @property
    def num_records(self) -> int:
        """Records in an epoch."""
        return self.plan.num_records

    @property
    def epochs(self) -> int | None:
        """The number of epochs; None for no end."""
        return self.plan.epochs

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.plan.steps_per_epoch

    @property
    def skipped(self) -> int:
        """The number of records found unreadable so far, each counted once."""
        return len(self._bad)

    @property
    def skipped_records(self) -> dict[str, str]:
        """Archive and member of each, and why it is unreadable."""
        return dict(sorted(self._bad.items()))

    @property
    def element_spec(self) -> dict[str, Any]:
        """What a batch is made of: name -> jax.ShapeDtypeStruct."""
        import jax

        spec = self.loaded_spec
        if not self._maps:
            return spec
        changed = self.mapped({name: np.zeros(s.shape, s.dtype) for name, s in spec.items()})
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), changed)

    @property
    def loaded_spec(self) -> dict[str, Any]:
        """The same for a loaded batch, before `map`."""
        raise NotImplementedError

    @property
    def _element_spec(self) -> dict[str, Any]:  # grain's name for it
        return self.element_spec

    def load(self, span: Span) -> Loaded:
        """This process's part of the batch of these places; called from several threads at once."""
        raise NotImplementedError

    def start_loading(self, epoch: int, record: int) -> Any:
        """An iterator over the batches from a position on, made ahead; it has `close`."""
        plan, count = self.plan, self.plan.count(epoch, record)
        make = lambda number: self.load(plan.span(epoch, record, number))  # noqa: E731
        if self.num_workers:
            workers = Workers(make, self.loaded_spec, count, self.num_workers, self.ahead)
            return InOrder(workers.take, lambda loaded: loaded, count, 1, 1, workers.close)
        if self.num_threads and self.ahead:
            return InOrder(lambda number: number, make, count, self.num_threads, self.ahead)
        return (made(make, number) for number in range(count))

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def count_until(self, record: int) -> int:
        """The number of records that the share `max_skipped` refers to, after `record` records."""
        return self.num_records

    def note_skipped(self, skipped: tuple[tuple[str, str], ...]) -> None:
        """Logs skipped records, once each."""
        for where, why in skipped:
            if where not in self._bad:
                self._bad[where] = why
                logger.warning("skipped %s: %s", where, why)


class BatchIterator(grain.DatasetIterator):
    """Iterates over a data set's batches; its state is the position and nothing else."""

    _loader: Any = None  # iterates over the batches from the position on, once started

    def __init__(self, dataset: Batches):
        super().__init__()
        self.dataset = dataset
        self._epoch = self._record = 0  # where the next batch begins
        self._skipped_in_epoch = self._skipped = 0
        self._open = True

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._open:
            raise ValueError("This iterator over batches has been closed.")
        self.start_prefetch()
        loaded = next(self._loader)
        plan = self.dataset.plan
        if self._record == 0:
            self._skipped_in_epoch = 0
        # The position moves before an error is raised: the next call continues after it.
        self._epoch, self._record, _ = plan.span(self._epoch, self._record, 1)
        if loaded.error is not None:
            raise loaded.error
        if loaded.skipped:
            self._count(loaded.skipped)
        assert loaded.batch is not None
        return self.dataset.mapped(loaded.batch)

    @property
    def skipped(self) -> int:
        """The number of unreadable records in the batches so far."""
        return self._skipped

    def _count(self, skipped: tuple[tuple[str, str], ...]) -> None:
        self.dataset.note_skipped(skipped)
        self._skipped += len(skipped)
        self._skipped_in_epoch += len(skipped)
        bad, records = self._skipped_in_epoch, self.dataset.count_until(self._record)
        share = self.dataset.max_skipped
        # One bad image among few says little about the archive.
        if bad > (max(1, share * records) if share else 0):
            where, why = skipped[-1]
            raise check.DataError(
                f"{bad} of {records} records cannot be read, more than the share of "
                f"{share} that `max_skipped` allows. The last: {where}: {why}."
            )

    def get_state(self) -> dict[str, Any]:
        """The position, as a small dict for JSON."""
        order = self.dataset.order
        return {
            "version": _VERSION,
            "epoch": self._epoch,
            "record": self._record,
            "skipped": self._skipped,
            "skipped_in_epoch": self._skipped_in_epoch,
            "num_records": order.num_records,
            "shuffle": order.shuffle,
            "seed": order.seed,
            "order": order.name,
            "data": self.dataset.fingerprint,
        }

    def set_state(self, state: Any) -> None:
        """Moves to a position from `get_state`, of this process or another.

        Batch size and the numbers of threads, workers, hosts and epochs may differ; the data, the
        seed, and whether and how they are shuffled may not.

        Raises:
          DataError: if they do.
        """
        mine = self.get_state()
        if not isinstance(state, dict):
            raise check.DataError(f"This is no position in the data: {state!r}.")
        for field, what in _SAME.items():
            if state.get(field) != mine[field]:
                raise check.DataError(
                    f"The saved position belongs to other data: its {field!r}{what} is "
                    f"{state.get(field)!r}, that of this data set {mine[field]!r}."
                )
        fields = ("epoch", "record", "skipped", "skipped_in_epoch")
        try:
            epoch, record, skipped, in_epoch = (int(state[field]) for field in fields)
        except (KeyError, TypeError, ValueError) as error:
            raise check.DataError(f"This is no position in the data: {state!r}.") from error
        if min(epoch, skipped, in_epoch) < 0 or not 0 <= record <= self.dataset.plan.num_records:
            raise check.DataError(f"There is no such position in the data: {state!r}.")
        self._stop()
        # What is left of the epoch may be too small for a batch of the present size.
        self._epoch, self._record, _ = self.dataset.plan.span(epoch, record, 0)
        self._skipped, self._skipped_in_epoch = skipped, in_epoch

    def start_prefetch(self) -> None:
        """Starts loading ahead before the first batch is asked for."""
        if self._loader is None:
            self._loader = self.dataset.start_loading(self._epoch, self._record)

    def close(self) -> None:
        """Stops the threads; the iterator has no more batches."""
        self._open = False
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def __str__(self) -> str:
        return f"BatchIterator(epoch={self._epoch}, record={self._record})"
