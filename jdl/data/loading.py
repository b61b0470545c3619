"""Batches made before they are asked for: in threads, in processes, or by one reader in order."""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np

from jdl.data.plan import Plan, Span

_READ, _DECODE = "jdl-read", "jdl-decode"  # threads' names


class Loaded(NamedTuple):
    """A batch, or the error in making it, and the records that were skipped: (where, why)."""

    batch: dict[str, np.ndarray] | None
    skipped: tuple[tuple[str, str], ...] = ()
    error: Exception | None = None


class FromPosition:
    """The batches from a position on, as a grain data source for its threads to read from.

    Args:
      load: makes the batch of a span; called by several threads or, pickled, in processes.
      plan: which places each batch holds.
      epoch: with `record`, the position.
      record: how many records of the epoch have been used.
    """

    def __init__(self, load: Callable[[Span], Loaded], plan: Plan, epoch: int, record: int):
        self._load, self._plan, self._epoch, self._record = load, plan, epoch, record

    def __len__(self) -> int:
        return self._plan.count(self._epoch, self._record)

    def __getitem__(self, number: int) -> Loaded:
        # grain would change the type of an exception raised in one of its threads.
        try:
            return self._load(self._plan.span(self._epoch, self._record, number))
        except Exception as error:
            return Loaded(None, error=error)

    def __repr__(self) -> str:
        return f"Batches(epoch={self._epoch}, record={self._record})"


def load_ahead(batches: FromPosition, threads: int, workers: int, ahead: int) -> Any:
    """An iterator over batches, which has `close`.

    Args:
      batches: the batches.
      threads: how many make them; 0 for none, batches are made when asked for.
      workers: processes that make them instead.
      ahead: batches made before they are asked for.
    """
    if workers:
        return _in_workers(batches, workers, ahead)
    if not (threads and ahead):
        return (batches[number] for number in range(len(batches)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    loader = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    loader.start_prefetch()
    return loader


def _in_workers(batches: FromPosition, workers: int, ahead: int) -> Any:
    """An iterator over batches that spawned processes make in turns."""
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain asks for it, and plain scripts never do it
        flags.FLAGS.mark_as_parsed()
    one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=max(1, ahead // workers)
    )
    made = grain.MapDataset.source(batches).to_iter_dataset(one_thread)
    loader = iter(made.mp_prefetch(options))
    loader.start_prefetch()
    return loader


class InOrder:
    """Batches that one thread reads in order and other threads decode, ahead of being asked for.

    Args:
      read: `read(i)` gives the records of batch i; called for 0, 1, … in this order by one thread.
        None says that there are no more.
      decode: makes a batch of them, in any thread.
      count: how many batches there are at most.
      threads: how many decode.
      ahead: batches made before they are asked for.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        decode: Callable[[Any], Loaded],
        count: int,
        threads: int,
        ahead: int,
    ):
        self._reader = ThreadPoolExecutor(1, _READ)
        self._decoders = ThreadPoolExecutor(max(threads, 1), _DECODE)
        self._read, self._decode, self._count = read, decode, count
        self._ahead = max(ahead, 1)
        self._waiting: deque[Future[Loaded | None]] = deque()
        self._next = 0

    def start_prefetch(self) -> None:
        """Starts as many batches as there may be ahead."""
        while len(self._waiting) < self._ahead and self._next < self._count:
            read = self._reader.submit(self._read, self._next)
            self._waiting.append(self._decoders.submit(self._finish, read))
            self._next += 1

    def _finish(self, read: "Future[Any]") -> Loaded | None:
        try:
            records = read.result()
            return None if records is None else self._decode(records)
        except Exception as error:
            return Loaded(None, error=error)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        self.start_prefetch()
        loaded = self._waiting.popleft().result() if self._waiting else None
        if loaded is None:
            raise StopIteration
        self.start_prefetch()
        return loaded

    # Kept here: when the interpreter ends, a module's own names may be gone before its objects.
    _interpreter_ends = staticmethod(sys.is_finalizing)

    def close(self) -> None:
        """Ends the threads, and waits for them unless it is called in one of them.

        The garbage collector may close an iterator in any thread. When the interpreter ends, the
        threads have ended already.
        """
        if self._interpreter_ends():
            return
        wait = not threading.current_thread().name.startswith((_READ, _DECODE))
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._reader.shutdown(wait=wait, cancel_futures=True)
        self._decoders.shutdown(wait=wait)
