"""The training clock."""

import time
from collections.abc import Callable


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
        """Starts counting."""
        if self._started is None:
            self._started = self._now()

    def stop(self) -> None:
        """Stops counting."""
        self._before, self._started = self.seconds, None

    def __enter__(self) -> "Clock":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
