"""Metrics that are read one step late, so that the device never waits for the host."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

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
    step: int  # steps done, the last of these included
    number: int
    logs: Logs  # scalars of one step, or [length] of several
    at: float  # perf_counter's time


class DeferredMetrics:
    """Waits for each step only after the next has been dispatched, so the device never idles.

    Several steps shorter than a millisecond are in flight at a time: waiting costs as much as one.
    Of several steps in one dispatch the last one's metrics are logged.

    Args:
      clock: stopped while `on_log` runs.
      every: steps between two calls of `on_log`.
      on_log: takes the step's metrics.
    """

    def __init__(self, clock: Clock, every: int, on_log: Callable[[Finished], None]):
        self._clock, self._every, self._on_log = clock, every, on_log
        self._in_flight: deque[_Dispatched] = deque()
        self._arrived: tuple[_Dispatched, float] | None = None  # not logged yet
        self._since: list[_Dispatched] = []  # since the last row

    def push(self, step: int, logs: Logs, number: int = 1) -> None:
        """Takes the metrics of the `number` steps just dispatched, the last of them `step`."""
        self._in_flight.append(_Dispatched(step, number, logs, time.perf_counter()))

    def wait_for_earlier_steps(self) -> None:
        """Waits for all steps but those dispatched last."""
        now = time.perf_counter()
        while len(self._in_flight) > 1:
            oldest = self._in_flight[0]
            steps = sum(dispatched.number for dispatched in self._in_flight)
            if now - oldest.at < PILE_SECONDS and steps <= PILE_STEPS:
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
        oldest = self._in_flight.popleft()
        oldest.logs["loss"].block_until_ready()
        self._arrived = (oldest, self._clock.seconds)
        self._since.append(oldest)
        if oldest.step % self._every == 0:
            self._log_arrived()

    def _log_arrived(self) -> None:
        if self._arrived is None:
            return
        last, seconds = self._arrived
        self._arrived = None
        self._clock.stop()
        since, self._since = self._since, []
        values = as_floats(last.logs, last.number)
        nonfinite = None
        if not math.isfinite(values["loss"]):
            losses = [x for d in since for x in np.ravel(d.logs["loss"])[: d.number].tolist()]
            each = enumerate(losses, last.step - len(losses) + 1)
            nonfinite = next((at, loss) for at, loss in each if not math.isfinite(loss))
        self._on_log(Finished(last.step, seconds, values, nonfinite))
        self._clock.start()
