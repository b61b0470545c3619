"""SIGTERM and Ctrl-C while a training runs: it ends between two steps, with its state whole.

SIGTERM is the notice that a scheduler gives before it takes a machine away; Ctrl-C is a person's.
Both wait for the step at hand, since in the midst of one the old parameters are given up and the
new ones are not there yet. A second Ctrl-C also interrupts a hook, a validation, or a wait for
data.
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
        if self.step == 0:
            return "stopped by SIGTERM before a step was made"
        return f"stopped by SIGTERM after step {self.step}; the same command goes on from there"


class Interrupted(KeyboardInterrupt):
    """Training was interrupted by Ctrl-C; the Estimator holds its state after the last step."""


class Signals:
    """While entered, turns SIGTERM and Ctrl-C into a request to stop after the current step.

    Where several processes train together, a SIGTERM to one of them ends all at the same step:
    JAX's own preemption service carries it. Without a run directory there is nothing to save, and
    SIGTERM ends the process as it does anywhere else.

    Args:
      saves: whether there is a run directory.
    """

    def __init__(self, saves: bool):
        self._saves = saves
        self._before: dict[int, Any] = {}
        self._entered = 0  # how often: a hook may save, which enters it too
        self._terminated = self._interrupted = False
        self._window: str | None = None

    def __enter__(self) -> "Signals":
        if self._entered:
            self._entered += 1
            return self
        self._terminated = self._interrupted = False
        if threading.current_thread() is threading.main_thread():
            # A handler that is no function is to ignore the signal, or not Python's.
            if callable(signal.getsignal(signal.SIGINT)):
                self._take_over(signal.SIGINT, self._interrupt)
            ignored = signal.getsignal(signal.SIGTERM) in (None, signal.SIG_IGN)
            if self._saves and not ignored and jax.process_count() == 1:
                self._take_over(signal.SIGTERM, self._terminate)
        self._entered = 1  # last: a Ctrl-C before its handler stands leaves all as it was
        return self

    def _take_over(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        del kind, trace
        self._entered -= 1
        if self._entered:
            return
        before, self._before = self._before, {}
        for number, handler in reversed(before.items()):  # Ctrl-C's last, which may raise at once
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

        if not getattr(jax.config, "jax_enable_preemption_service", True):  # since JAX 0.9
            return False
        asked = bool(multihost_utils.reached_preemption_sync_point(step))
        if asked and not self._saves:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        return asked


class _Window:
    __slots__ = ("_name", "_outer", "_signals")

    def __init__(self, signals: Signals, name: str):
        self._signals, self._name = signals, name
        self._outer: str | None = None

    def __enter__(self) -> None:
        if self._name == "data" and self._signals.terminated:
            raise Stopped(0)
        self._outer = self._signals._window
        self._signals._window = self._name

    def __exit__(self, *_: object) -> None:
        self._signals._window = self._outer
