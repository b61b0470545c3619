"""What every data set of this room is: batches in a planned order, resumable at any of them.

A position is two numbers, the epoch and how many of its records are behind. Batches never cross
the end of an epoch; what is left over there is dropped, or padded and masked, so that shapes never
change. Which records a batch holds follows from the position alone: never from the number of
threads, worker processes or hosts that read, nor from which records turned out to be unreadable.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from jdl.core import check
from jdl.data.loading import Loaded, load_ahead
from jdl.data.order import Order
from jdl.data.plan import Plan, Span

logger = logging.getLogger("jdl.data")

_VERSION = 1


@runtime_checkable
class Dataset(Protocol):
    """What the trainer asks of a data set; its iterators have `get_state` and `set_state`.

    >>> from jdl.data import from_arrays
    >>> data: Dataset = from_arrays(np.eye(5), batch_size=2, epochs=3)
    >>> data.steps_per_epoch, data.epochs
    (3, 3)
    """

    @property
    def batch_size(self) -> int:
        """Rows in every batch."""

    @property
    def num_records(self) -> int:
        """Records in an epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""

    @property
    def epochs(self) -> int | None:
        """How many epochs there are; None for no end."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, or None where there is no such table."""

    @property
    def skipped(self) -> int:
        """How many records have turned out unreadable so far, each counted once."""

    @property
    def element_spec(self) -> dict[str, Any]:
        """What a batch is made of: name -> jax.ShapeDtypeStruct."""

    def repeat(self) -> "Dataset":
        """The same data without end."""

    def once(self) -> "Dataset":
        """One pass over all records in their own order."""

    def shard(self, part: int, parts: int) -> "Dataset":
        """The same batches, of which this process makes one part."""

    def __iter__(self) -> Any: ...


def _refused(name: str) -> Any:
    def method(self: Any, *args: Any, **options: Any) -> Any:
        """Refused."""
        del self, args, options
        raise check.ArgumentError(
            f"`{name}` would lose what these batches know of their epochs, processes and position. "
            "Use `map(function)`, from batch to batch, or give what loads them other arguments."
        )

    return method


class Batches(grain.IterDataset):
    """A data set of batches, each a dict of arrays with leading axis B; a `grain.IterDataset`.

    Subclasses say how to `load` a span; everything about order and position is here. Of grain's own
    methods `map` keeps that; those that change which batches there are, or draw by a count of
    their own, are refused: filter, batch, seed, random_map, map_with_index, prefetch,
    mp_prefetch.

    Attributes:
      plan: which places each batch holds.
      order: which record stands at which place.
      classes: the names of the classes; None where there is no such table.
      fingerprint: names the data, so that a position in others is refused.
      max_skipped: the share of an epoch's records that may be skipped.
    """

    num_threads = 0  # of those that load ahead; 0: batches are made when asked for
    num_workers = 0  # processes that do so instead
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
        self.plan, self.order, self._classes = plan, order, classes
        self.fingerprint, self.max_skipped = fingerprint, max_skipped
        self._bad: set[str] = set()

    def repeat(self) -> "Batches":
        """The same data without end; what fills no batch of an epoch is left out, if any does."""
        plan = self.plan
        drop = plan.drop_remainder or plan.num_records >= plan.batch_size
        return self._with(replace(plan, epochs=None, drop_remainder=drop), self.order)

    def once(self) -> "Batches":
        """One pass over all records in their own order, the last batch padded and masked."""
        return self._with(replace(self.plan, epochs=1, drop_remainder=False), self.order.plain())

    def shard(self, part: int, parts: int) -> "Batches":
        """The same batches, of which this process makes rows [part, part + 1) · B / parts.

        With `shard(jax.process_index(), jax.process_count())` every process has the same number of
        batches of B / parts rows, no record comes twice and none is lost; the position is that of
        whole batches, good for any number of processes.
        """
        return self._with(self.plan.sharded(part, parts), self.order)

    def map(self, transform: Any) -> "Batches":
        """The same data set, its batches changed by a function as they are asked for.

        Args:
          transform: `transform(batch) -> batch`, from dict to dict of arrays, row by row: where
            several processes train together it is given this process's rows. It is to keep the
            rows' number and `"mask"`, and to draw nothing at random, or a resumed run would draw
            something else.

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
        """A batch as loaded, changed by all functions of `map`."""
        for function in self._maps:
            batch = function(batch)
        return batch

    def _with(self, plan: Plan, order: Order) -> "Batches":
        other = copy.copy(self)
        other.plan, other.order = plan, order
        return other

    @property
    def batch_size(self) -> int:
        """Rows in every batch, those that other processes make included."""
        return self.plan.batch_size

    @property
    def num_records(self) -> int:
        """Records in an epoch."""
        return self.plan.num_records

    @property
    def epochs(self) -> int | None:
        """How many epochs there are; None for no end."""
        return self.plan.epochs

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.plan.steps_per_epoch

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, or None where there is no such table."""
        return self._classes

    @property
    def skipped(self) -> int:
        """How many records have turned out unreadable so far, each counted once."""
        return len(self._bad)

    @property
    def skipped_names(self) -> tuple[str, ...]:
        """Which these are."""
        return tuple(sorted(self._bad))

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
        """The same of a batch as loaded, before `map`."""
        raise NotImplementedError

    @property
    def _element_spec(self) -> dict[str, Any]:  # grain's name for it
        return self.element_spec

    def load(self, span: Span) -> Loaded:
        """What is made here of the batch of these places; called from several threads at once."""
        raise NotImplementedError

    def start_loading(self, epoch: int, record: int) -> Any:
        """The batches from a position on, ahead of being asked for; has `close`."""
        return load_ahead(
            self.load,
            self.plan,
            epoch,
            record,
            threads=self.num_threads,
            workers=self.num_workers,
            ahead=self.ahead,
        )

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def count_until(self, record: int) -> int:
        """Of how many records those skipped up to that one in an epoch are a share."""
        del record
        return self.num_records

    def note_skipped(self, skipped: tuple[tuple[str, str], ...]) -> None:
        """Logs what has been skipped, once each."""
        for where, why in skipped:
            if where not in self._bad:
                self._bad.add(where)
                logger.warning("skipped %s: %s", where, why)


class BatchIterator(grain.DatasetIterator):
    """Goes through a data set's batches; its state is the position and nothing else."""

    _loader: Any = None  # gives the batches from the position on, once one has been asked for

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
        # An error has been told when it has been raised: to go on is to go on behind it.
        self._epoch, self._record, _ = plan.span(self._epoch, self._record, 1)
        if loaded.error is not None:
            raise loaded.error
        if loaded.skipped:
            self._count(loaded.skipped)
        assert loaded.batch is not None
        return self.dataset.mapped(loaded.batch)

    @property
    def skipped(self) -> int:
        """How many rows of the batches so far stood for unreadable records."""
        return self._skipped

    def _count(self, skipped: tuple[tuple[str, str], ...]) -> None:
        self.dataset.note_skipped(skipped)
        self._skipped += len(skipped)
        self._skipped_in_epoch += len(skipped)
        bad, records = self._skipped_in_epoch, self.dataset.count_until(self._record)
        # One bad image in a handful says nothing yet of the archive.
        if bad > max(1, self.dataset.max_skipped * records):
            where, why = skipped[-1]
            raise check.DataError(
                f"{bad} of {records} records cannot be read, more than the share of "
                f"{self.dataset.max_skipped} that `max_skipped` allows. The last: {where}: {why}."
            )

    def get_state(self) -> dict[str, Any]:
        """The position, a small dict that JSON can hold."""
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

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, here or in another process.

        The batch size may be another, as may the number of threads, workers, hosts and epochs; the
        data, the seed, and whether and how they are shuffled may not.

        Raises:
          DataError: if they are.
        """
        mine = self.get_state()
        for field in ("version", "data", "num_records", "shuffle", "seed", "order"):
            theirs = state.get(field, "global" if field == "order" else None)
            if theirs != mine[field]:
                raise check.DataError(
                    f"The saved position belongs to other data: its {field!r} is "
                    f"{theirs!r}, that of this data set {mine[field]!r}."
                )
        fields = ("epoch", "record", "skipped", "skipped_in_epoch")
        try:
            epoch, record, skipped, in_epoch = (int(state[field]) for field in fields)
        except (KeyError, TypeError, ValueError) as error:
            raise check.DataError(f"This is no position in the data: {state!r}.") from error
        if min(epoch, skipped, in_epoch) < 0 or not 0 <= record <= self.dataset.plan.num_records:
            raise check.DataError(f"There is no such position in the data: {state!r}.")
        self._stop()
        # A remainder too small for a batch of the present size may be all that is left.
        self._epoch, self._record, _ = self.dataset.plan.span(epoch, record, 0)
        self._skipped, self._skipped_in_epoch = skipped, in_epoch

    def start_prefetch(self) -> None:
        """Begins to load ahead before the first batch is asked for."""
        if self._loader is None:
            self._loader = self.dataset.start_loading(self._epoch, self._record)

    def close(self) -> None:
        """Stops the threads; the iterator gives no more batches."""
        self._open = False
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def __str__(self) -> str:
        return f"BatchIterator(epoch={self._epoch}, record={self._record})"
