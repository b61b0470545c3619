"""The training clock, and numbers that are read one step late."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax

from jdl.train.step import Logs

PILE_SECONDS, PILE_STEPS = 1e-3, 16


class Clock:
    """Counts the seconds it runs, summed over all stretches between `start` and `stop`.

    Args:
      seconds: counted before.
      now: reads the time in seconds; another than the wall's, such as the process's CPU time.

    >>> clock = Clock(seconds=2.0)
    >>> with clock:
    ...     pass
    >>> clock.seconds >= 2.0
    True
    """

    def __init__(self, seconds: float = 0.0, now: Callable[[], float] = time.perf_counter):
        self._before, self._now = seconds, now
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """The time counted so far."""
        running = 0.0 if self._started is None else self._now() - self._started
        return self._before + running

    @property
    def running(self) -> bool:
        """Whether it counts now."""
        return self._started is not None

    def start(self) -> None:
        """Counts from here on."""
        if self._started is None:
            self._started = self._now()

    def stop(self) -> None:
        """Counts no further."""
        self._before, self._started = self.seconds, None

    def __enter__(self) -> "Clock":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Finished(NamedTuple):
    """A step whose numbers have arrived."""

    step: int  # steps done, this one included
    seconds: float  # on the training clock
    logs: dict[str, float]
    nonfinite: tuple[int, float] | None  # the first step since the last row whose loss is, and it


class _Dispatched(NamedTuple):
    step: int
    logs: Logs
    at: float  # perf_counter's time


class DeferredMetrics:
    """Waits for each step only after the next has been dispatched, so the device never idles.

    Steps shorter than a millisecond, where waiting itself would be felt, pile up a little first.

    Args:
      clock: stopped while `on_log` runs.
      every: steps between two calls of `on_log`.
      on_log: receives the step's numbers.
    """

    def __init__(self, clock: Clock, every: int, on_log: Callable[[Finished], None]):
        self._clock, self._every, self._on_log = clock, every, on_log
        self._in_flight: deque[_Dispatched] = deque()
        self._arrived: tuple[int, Logs, float] | None = None  # not logged, so far
        self._losses: list[tuple[int, jax.Array]] = []  # of the steps since the last row

    def push(self, step: int, logs: Logs) -> None:
        """Takes the numbers of the step just dispatched, and waits for earlier ones."""
        now = time.perf_counter()
        self._in_flight.append(_Dispatched(step, logs, now))
        while len(self._in_flight) > 1:
            oldest = self._in_flight[0]
            if now - oldest.at < PILE_SECONDS and len(self._in_flight) <= PILE_STEPS:
                break
            self._wait_for_oldest()

    def flush(self) -> None:
        """Waits for all steps in flight."""
        while self._in_flight:
            self._wait_for_oldest()

    def drop(self) -> None:
        """Forgets the steps in flight."""
        self._in_flight.clear()
        self._losses.clear()
        self._arrived = None

    def finish(self) -> None:
        """Waits for the step in flight and logs it, due or not."""
        self.flush()
        self._log_arrived()

    def _wait_for_oldest(self) -> None:
        step, logs, _ = self._in_flight.popleft()
        logs["loss"].block_until_ready()
        self._arrived = (step, logs, self._clock.seconds)
        self._losses.append((step, logs["loss"]))
        if step % self._every == 0:
            self._log_arrived()

    def _log_arrived(self) -> None:
        if self._arrived is None:
            return
        step, logs, seconds = self._arrived
        self._arrived = None
        self._clock.stop()
        losses, self._losses = self._losses, []
        values = as_floats(logs)
        nonfinite = None
        if not math.isfinite(values["loss"]):
            each = ((at, float(loss)) for at, loss in losses)
            nonfinite = next((at, loss) for at, loss in each if not math.isfinite(loss))
        self._on_log(Finished(step, seconds, values, nonfinite))
        self._clock.start()


def as_floats(logs: Logs) -> dict[str, float]:
    """The logs as Python numbers, in one transfer."""
    return {name: float(x) for name, x in jax.device_get(logs).items()}
