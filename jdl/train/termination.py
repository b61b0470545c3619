"""SIGTERM and Ctrl-C while a training runs: it ends between two steps, with its state whole.

SIGTERM is the notice that a scheduler gives before it takes a machine away; Ctrl-C is a person's.
Both wait for the step at hand, since in the midst of one the old parameters are given up and the
new ones are not there yet. A second Ctrl-C ends the data's, a hook's or a validation's own work.
"""

import os
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


class Interrupted(KeyboardInterrupt):
    """Training was interrupted by Ctrl-C; the Estimator holds its state after the last step."""


class Signals:
    """Takes SIGTERM and Ctrl-C as wishes to end after the step at hand, while it is entered.

    Where several processes train together, a SIGTERM to one of them ends all at the same step:
    JAX's own preemption service carries it. Without a run directory there is nothing to save, and
    SIGTERM ends the process as it does anywhere else.

    Args:
      saves: whether there is a run directory.
    """

    def __init__(self, saves: bool):
        self._saves = saves
        self._before: dict[int, Any] = {}
        self._terminated = self._interrupted = False
        self._window: str | None = None

    def __enter__(self) -> "Signals":
        self._terminated = self._interrupted = False
        if threading.current_thread() is threading.main_thread() and not self._before:
            # A handler that is no function is to ignore the signal, or not Python's.
            if callable(signal.getsignal(signal.SIGINT)):
                self._take_over(signal.SIGINT, self._interrupt)
            if self._saves and jax.process_count() == 1:
                self._take_over(signal.SIGTERM, self._terminate)
        return self

    def _take_over(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        del kind, trace
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        # What came too late to end the training ends what comes after it.
        if self._terminated and not isinstance(error, Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        if self._interrupted and error is None:
            before[signal.SIGINT](signal.SIGINT, None)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and self._window is not None:
            self._pass_on(frame)
        else:
            self._interrupted = True

    def _pass_on(self, frame: FrameType | None = None) -> None:
        """To the handler of before: Python's raises KeyboardInterrupt."""
        self._interrupted = False
        self._before[signal.SIGINT](signal.SIGINT, frame)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._terminated = True
        if self._window == "data":
            raise Stopped(0)  # data that never comes would hold up what there is time for

    def window(self, name: str) -> "_Window":
        """A context for work that is not ours: "data", "hooks" or "validation"."""
        return _Window(self, name)

    def check(self) -> None:
        """Between two steps: raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._interrupted:
            self._pass_on()

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM has come to this process, the only one."""
        return self._terminated

    def asked(self, step: int) -> bool:
        """Whether SIGTERM has come; all processes are to ask, with the same step."""
        if jax.process_count() == 1:
            return self._terminated
        from jax.experimental import multihost_utils

        try:
            asked = bool(multihost_utils.reached_preemption_sync_point(step))
        except RuntimeError:  # JAX's service is switched off, and takes no signal then
            if self._saves:
                raise
            return False
        if asked and not self._saves:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        return asked


class _Window:
    __slots__ = ("_name", "_signals")

    def __init__(self, signals: Signals, name: str):
        self._signals, self._name = signals, name

    def __enter__(self) -> None:
        self._signals._window = self._name

    def __exit__(self, *_: object) -> None:
        self._signals._window = None
