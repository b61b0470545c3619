"""Metrics that are read one step late, so that the device never waits for the host."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
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
    last: int  # steps done, the last of these included
    number: int
    logs: Logs  # scalars of one step, or [length] of several
    at: float  # perf_counter's time

    @property
    def first(self) -> int:
        return self.last - self.number + 1

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of each step."""
        losses = np.ravel(self.logs["loss"])[: self.number].tolist()
        return list(enumerate(losses, self.first))


class DeferredMetrics:
    """Waits for each step only after the next has been dispatched, so the device never idles.

    Several steps shorter than a millisecond are in flight at a time: waiting costs as much as one.
    Of several steps in one dispatch those that are due are logged, as if the time were shared
    evenly.

    Args:
      clock: stopped while `on_log` runs.
      every: steps between two calls of `on_log`.
      on_log: takes the step's metrics.
    """

    def __init__(self, clock: Clock, every: int, on_log: Callable[[Finished], None]):
        self._clock, self._every, self._on_log = clock, every, on_log
        self._in_flight: deque[_Dispatched] = deque()
        self._since: list[_Dispatched] = []  # arrived since the last row
        self._arrived = clock.seconds  # when the last one did
        self._logged = 0  # the step of the last row

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
        if self._since and self._since[-1].last != self._logged:
            self._log(self._since[-1], self._since[-1].last, self._arrived)

    def _wait_for_oldest(self) -> None:
        oldest = self._in_flight.popleft()
        oldest.logs["loss"].block_until_ready()
        began, self._arrived = self._arrived, self._clock.seconds
        self._since.append(oldest)
        a_step = (self._arrived - began) / oldest.number
        due = range(oldest.first + -oldest.first % self._every, oldest.last + 1, self._every)
        if due:
            oldest = self._since[-1] = oldest._replace(logs=jax.device_get(oldest.logs))
        for step in due:
            self._log(oldest, step, self._arrived - (oldest.last - step) * a_step)

    def _log(self, arrived: _Dispatched, step: int, seconds: float) -> None:
        self._clock.stop()
        values = as_floats(arrived.logs, step - arrived.first + 1)
        nonfinite = None
        if not math.isfinite(values["loss"]):
            losses = (x for d in self._since for x in d.losses() if self._logged < x[0] <= step)
            nonfinite = next(x for x in losses if not math.isfinite(x[1]))
        self._logged, self._since = step, self._since[-1:]
        self._on_log(Finished(step, seconds, values, nonfinite))
        self._clock.start()
