"""SIGTERM and Ctrl-C during training: it ends between two steps, with a complete state.

Schedulers send SIGTERM before they reclaim a machine; Ctrl-C comes from the user.
Both wait for the current step, during which the old parameters are donated and the new ones are not
there yet. A second Ctrl-C also interrupts a hook, a validation, or a wait for data.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start me again


class Stopped(SystemExit):
    """Training ended after SIGTERM, and everything is saved."""

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

    Where several processes train together, a SIGTERM to one of them ends all at the same step, by
    JAX's preemption service. Without a run directory there is nothing to save, and SIGTERM ends the
    process as usual.

    Args:
      saves: whether there is a run directory.
    """

    def __init__(self, saves: bool):
        self._saves = saves
        self._before: dict[int, Any] = {}
        self._entered = 0  # nesting depth: saving in a hook enters this context again
        self._terminated = self._interrupted = False
        self._window: str | None = None

    def __enter__(self) -> "Signals":
        if self._entered:
            self._entered += 1
            return self
        self._terminated = self._interrupted = False
        if threading.current_thread() is threading.main_thread():
            # A handler that is not a function ignores the signal, or is not Python's.
            if callable(signal.getsignal(signal.SIGINT)):
                self._take_over(signal.SIGINT, self._interrupt)
            ignored = signal.getsignal(signal.SIGTERM) in (None, signal.SIG_IGN)
            if self._saves and not ignored and jax.process_count() == 1:
                self._take_over(signal.SIGTERM, self._terminate)
        self._entered = 1  # last, so that a Ctrl-C during this method leaves it unentered
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
        # A signal that came after the last step ends the program now.
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
        """Calls the previous handler: Python's raises KeyboardInterrupt."""
        self._interrupted = False
        self._before[signal.SIGINT](signal.SIGINT, frame)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._terminated = True
        if self._window == "data":
            raise Stopped(0)  # waiting for data that never comes would use up the time to save

    def window(self, name: str) -> "_Window":
        """A context for the user's code: "data", "hooks" or "validation"."""
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
        """Whether SIGTERM has come; all processes must ask, with the same step."""
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
