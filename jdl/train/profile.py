"""Traces some steps of a training with JAX's profiler."""

from pathlib import Path

import jax

from jdl.core import check


class Profile:
    """Traces the steps from `span[0]` to `span[1]` into `workdir/profile`; without a span, none.

    Args:
      span: first and last step, both included.
      workdir: the run directory.
    """

    def __init__(self, span: tuple[int, int] | None, workdir: Path | None):
        if span is not None:
            check.argument(
                len(span) == 2 and 1 <= span[0] <= span[1],
                "profile",
                "a pair of steps (first, last)",
                span,
            )
            check.argument(workdir is not None, "workdir", "given with `profile`", workdir)
        self._span, self._workdir = span, workdir
        self._tracing = False

    def before(self, step: int) -> None:
        """Begins the trace if this is its first step."""
        if self._span is not None and step == self._span[0]:
            assert self._workdir is not None
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._tracing = True

    def due(self, step: int) -> list[int]:
        """How many steps after this one the trace begins and ends, where it has yet to."""
        first, last = self._span or (0, 0)
        return [at - step for at in (first - 1, last) if at > step]

    def ends(self, step: int) -> bool:
        """Whether this is the last step of a trace that has begun."""
        return self._tracing and self._span is not None and step >= self._span[1]

    def stop(self) -> None:
        """Ends the trace and writes it."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
