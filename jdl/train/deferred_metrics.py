"""Metrics that are read one step late, so that the device never waits for the host."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax

from jdl.train.clock import Clock
from jdl.train.step import Logs, as_floats

PILE_SECONDS, PILE_STEPS = 1e-3, 16


class Finished(NamedTuple):
    """A step whose metrics have arrived."""

    step: int  # steps done, this one included
    seconds: float  # on the training clock
    logs: dict[str, float]
    # The first step since the last row whose loss is not finite, and that loss.
    nonfinite: tuple[int, float] | None


class _Dispatched(NamedTuple):
    step: int
    logs: Logs
    at: float  # perf_counter's time


class DeferredMetrics:
    """Waits for each step only after the next has been dispatched, so the device never idles.

    Several steps shorter than a millisecond are in flight at a time: waiting costs as much as one.

    Args:
      clock: stopped while `on_log` runs.
      every: steps between two calls of `on_log`.
      on_log: takes the step's metrics.
    """

    def __init__(self, clock: Clock, every: int, on_log: Callable[[Finished], None]):
        self._clock, self._every, self._on_log = clock, every, on_log
        self._in_flight: deque[_Dispatched] = deque()
        self._arrived: tuple[int, Logs, float] | None = None  # not logged yet
        self._losses: list[tuple[int, jax.Array]] = []  # of the steps since the last row

    def push(self, step: int, logs: Logs) -> None:
        """Takes the metrics of the step just dispatched."""
        self._in_flight.append(_Dispatched(step, logs, time.perf_counter()))

    def wait_for_earlier_steps(self) -> None:
        """Waits for all steps but the one dispatched last."""
        now = time.perf_counter()
        while len(self._in_flight) > 1:
            oldest = self._in_flight[0]
            if now - oldest.at < PILE_SECONDS and len(self._in_flight) <= PILE_STEPS:
                break
            self._wait_for_oldest()

    def flush(self) -> None:
        """Waits for all steps in flight."""
        while self._in_flight:
            self._wait_for_oldest()

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
