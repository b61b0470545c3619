"""The loop of training: nothing in it waits for the step just dispatched."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from jdl.train.clock import DeferredMetrics
from jdl.train.compiled import Step
from jdl.train.feed import Feed
from jdl.train.hooks import Profile, StopTraining
from jdl.train.run import Run
from jdl.train.run_directory import NonFiniteError
from jdl.train.signals import Stopped


class Loop(NamedTuple):
    """The steps of one call of `train`.

    Attributes:
      run: where the training stands.
      step: the compiled step.
      profile: traces some of them.
      last_step: the number of the last; None to go on to the data's end.
      deadline: when to end, on the training clock; None for no such time.
      save_every: steps between two checkpoints; None for none.
      validate: a validation, every `validate_every` steps; None for none.
      validate_every: its steps, where it is given.
    """

    run: Run
    step: Step
    profile: Profile
    last_step: int | None
    deadline: float | None
    save_every: int | None
    validate: Callable[[], None] | None
    validate_every: int | None

    def __call__(self, feed: Feed, log: DeferredMetrics) -> None:
        """Runs them on the batches of `feed`, and gives their numbers to `log`.

        Raises:
          Stopped: SIGTERM came.
          KeyboardInterrupt: Ctrl-C was pressed.
        """
        self.run.leave_later_checkpoints()
        self.run.keeper.begin()
        with self.run.clock, self.profile:
            try:
                self._steps(feed, log)
            except (KeyboardInterrupt, Stopped):
                with contextlib.suppress(StopTraining, NonFiniteError):
                    log.flush()  # what has been trained is logged
                raise

    def _steps(self, feed: Feed, log: DeferredMetrics) -> None:
        run, last_step, deadline = self.run, self.last_step, self.deadline
        signals, data = run.signals, run.signals.window("data")
        clock, profile = run.clock, self.profile
        began, first = clock.seconds, run.step
        while last_step is None or run.step < last_step:
            signals.check()
            run.trail.append((run.step, feed.position))
            with data:
                batch = feed.prefetch()
            if batch is None:
                break
            profile.before(run.step + 1)
            run.state, logs = self.step(run.take(), batch)
            run.step += 1
            feed.take()
            run.position = feed.position
            try:
                if run.step != last_step:
                    with data:
                        feed.prefetch()  # the next batch travels while the device works
            except (KeyboardInterrupt, Stopped):
                with contextlib.suppress(StopTraining, NonFiniteError):
                    log.push(run.step, logs)
                raise
            log.push(run.step, logs)
            if profile.ends(run.step):
                log.flush()
                profile.stop()
            if self.validate is not None and run.step % (self.validate_every or 1) == 0:
                log.flush()
                clock.stop()
                self.validate()
                clock.start()
            if self.save_every and run.step % self.save_every == 0:
                log.flush()
                run.save()
            if signals.asked(run.step):
                raise Stopped(run.step)
            if deadline is not None:
                if run.step == first + 1:
                    log.flush()  # else the mean is of dispatching, and a second step follows
                mean = (clock.seconds - began) / (run.step - first)
                if clock.seconds + 2 * mean >= deadline:
                    log.flush()  # near the end step by step, not to overrun by one in flight
                if clock.seconds >= deadline:
                    break
        log.finish()
