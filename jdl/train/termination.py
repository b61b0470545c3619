"""SIGTERM, the notice that a scheduler gives before it takes a machine away."""

import signal
import threading
from types import FrameType
from typing import Any

import jax

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start me again


class Stopped(SystemExit):
    """Training was asked to end by SIGTERM, and everything is saved."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        return f"stopped by SIGTERM after step {self.step}; the same command goes on from there"


class Termination:
    """Takes SIGTERM as a wish to end after the step at hand, for as long as it is entered.

    Where several processes train together, a signal to one of them ends all at the same step: JAX's
    own preemption service carries it.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> "Termination":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)
            self._installed = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to end after this step; all processes are to ask, with the same step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked
