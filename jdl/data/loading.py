"""Batches made before they are asked for: in threads, in processes, or by one reader in order."""

import contextlib
import ctypes
import functools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import cloudpickle
import numpy as np

from jdl.core import check

_READ, _DECODE = "jdl-read", "jdl-decode"  # threads' names


class Loaded(NamedTuple):
    """A batch, or the error in making it, and the records that were skipped: (where, why)."""

    batch: dict[str, np.ndarray] | None
    skipped: tuple[tuple[str, str], ...] = ()
    error: Exception | None = None


Make: TypeAlias = Callable[[int], Loaded]


def made(make: Callable[[Any], Any], of: Any) -> Any:
    """What `make` makes, or the error in making it."""
    try:
        return make(of)
    except Exception as error:
        return Loaded(None, error=error)


class Workers:
    """Spawned processes that make batches in turns, in memory that they share with this one.

    They end when they are closed, and when this process ends, however it does. The shared memory
    has no name, so nothing is left of it then. `make`, which makes the batch of a number, is
    pickled; `ahead` batches are made before they are taken, at least one in each process.
    """

    def __init__(self, make: Make, spec: dict[str, Any], count: int, workers: int, ahead: int):
        self._count, self._slots = count, max(1, ahead // workers) * workers
        context, memory = multiprocessing.get_context("spawn"), {}
        for name, entry in spec.items():
            shape = (self._slots, *entry.shape)
            raw = context.RawArray(ctypes.c_ubyte, math.prod(shape) * entry.dtype.itemsize)
            memory[name] = raw, entry.dtype.str, shape
        self._arrays, pickled = _arrays(memory), cloudpickle.dumps(make)
        self._workers = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, pickled, memory), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for number in range(self._slots):
            self._ask(number)

    def _ask(self, number: int) -> None:
        if number < self._count:
            with contextlib.suppress(OSError):  # it has ended: `take` says so
                self._workers[number % len(self._workers)][1].send((number, number % self._slots))

    def take(self, number: int) -> Loaded:
        """The batch of a number; called for 0, 1, … in this order."""
        process, pipe = self._workers[number % len(self._workers)]
        try:
            names, loaded = pipe.recv()
        except (EOFError, OSError):
            process.join(5)
            raise check.DataError(
                f"A worker process has ended (exit code {process.exitcode}). If it was killed, "
                "memory may be too small for so many `workers`. A script must start them under "
                '`if __name__ == "__main__":`.'
            ) from None
        if names:
            slot = number % self._slots
            batch = {name: self._arrays[name][slot].copy() for name in names}
            loaded = loaded._replace(batch=batch)
        self._ask(number + self._slots)
        return loaded

    def close(self) -> None:
        """Ends the processes."""
        for process, _ in self._workers:
            process.kill()  # not by a signal that it may have inherited to ignore
        for process, _ in self._workers:
            process.join()


def _arrays(memory: dict[str, Any]) -> dict[str, np.ndarray]:
    """Each entry's arrays in the shared memory, [slots, …]."""
    return {name: np.ndarray(shape, dtype, raw) for name, (raw, dtype, shape) in memory.items()}


def _work(pipe: Any, pickled: bytes, memory: dict[str, Any]) -> None:
    """Makes the batches that are asked for; runs in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    arrays, load = _arrays(memory), functools.cache(pickle.loads)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended
        while True:
            number, slot = pipe.recv()
            loaded = made(lambda number: load(pickled)(number), number)
            batch = loaded.batch or {}
            for name, array in batch.items():
                arrays[name][slot] = array
            pipe.send((list(batch), loaded._replace(batch=None, error=_sendable(loaded.error))))


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one that says the same where the parent could not unpickle it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class InOrder:
    """Batches that one thread reads in order and other threads decode, ahead of being asked for."""

    def __init__(
        self,
        read: Callable[[int], Any],  # the records of batch 0, 1, … in this order; None at the end
        decode: Callable[[Any], Loaded],  # makes a batch of them, in any thread
        count: int,  # how many batches there are at most
        threads: int,
        ahead: int,  # batches made before they are asked for
        close: Callable[[], None] = lambda: None,  # ends what `read` waits for
    ):
        self._stop_reading = close
        self._reader = ThreadPoolExecutor(1, _READ)
        self._decoders = ThreadPoolExecutor(max(threads, 1), _DECODE)
        self._read, self._decode, self._count = read, decode, count
        self._ahead = max(ahead, 1)
        self._waiting: deque[Future[Loaded | None]] = deque()
        self._next = 0
        self._start()

    def _start(self) -> None:
        while len(self._waiting) < self._ahead and self._next < self._count:
            read = self._reader.submit(self._read, self._next)
            self._waiting.append(self._decoders.submit(made, self._finish, read))
            self._next += 1

    def _finish(self, read: "Future[Any]") -> Loaded | None:
        records = read.result()
        return None if records is None else self._decode(records)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        loaded = self._waiting.popleft().result() if self._waiting else None
        if loaded is None:
            raise StopIteration
        self._start()
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
        self._stop_reading()
        wait = not threading.current_thread().name.startswith((_READ, _DECODE))
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._reader.shutdown(wait=wait, cancel_futures=True)
        self._decoders.shutdown(wait=wait)
