"""Training: the loop over one's data, what is reported of it, and the way back where it fails."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.types import Batch, Mode
from jdl.train import nonfinite
from jdl.train.clock import DeferredMetrics, Finished
from jdl.train.compiled import CompiledSteps, Step
from jdl.train.feed import Data, Feed, opened, repeated, steps_per_epoch
from jdl.train.hooks import Profile, StopTraining
from jdl.train.limits import Limits
from jdl.train.loop import Loop
from jdl.train.run import Run
from jdl.train.run_directory import NonFiniteError
from jdl.train.step import TrainState

logger = logging.getLogger("jdl.train")

MAX_ROLLBACKS = 8

# report(step, seconds, epoch, split, values)
Reporter = Callable[[int, float, float | None, str, dict[str, float]], None]


class Trainer:
    """Trains a run.

    Args:
      run: where it stands.
      steps: the step, compiled.
      profile: traces some steps.
      validate: gives the values of an evaluation of data.
      report: is given the rows of the log.
      log_every: steps between two of them.
      save_every: steps between two checkpoints; None for none.
      on_nonfinite: "stop", "skip" or "rollback".
    """

    def __init__(
        self,
        run: Run,
        steps: CompiledSteps,
        profile: Profile,
        validate: Callable[[Data], dict[str, Any]],
        report: Reporter,
        log_every: int,
        save_every: int | None,
        on_nonfinite: str,
    ):
        self._run, self._steps, self._profile = run, steps, profile
        self._validate, self._report = validate, report
        self._log_every, self._save_every = log_every, save_every
        self._on_nonfinite = on_nonfinite

    def train(
        self,
        data: Data,
        limits: Limits,
        validation: Data | None,
        validate_every: int | None,
    ) -> bool:
        """Trains within the limits; whether any step was left to make.

        Args:
          data: batches.
          limits: how far to go.
          validation: data to evaluate on in between; None for none.
          validate_every: steps between two such evaluations; None for an epoch.
        """
        limits.check()
        check.argument(
            validation is not None or validate_every is None,
            "validation",
            "given with validate_every",
            None,
        )
        check.argument(
            not isinstance(validation, Iterator),
            "validation",
            "data that can be passed over again: a data set, a list, a function that makes one",
            type(validation).__name__,
        )
        run = self._run
        feed = run.feed(data, repeat=limits.given)
        with run.signals.window("data"):
            batch = feed.prefetch()
        if batch is None:
            raise check.DataError(
                "The training data gives no batch: it is at its end, or holds fewer examples than "
                "one batch."
            )
        last_step = limits.last_step(run.step, data)
        if last_step is not None and run.step >= last_step:
            return False
        run.take_up_rate(batch)
        run.classes = getattr(data, "classes", None) or run.classes
        if validation is not None:
            validate_every = validate_every or steps_per_epoch(data, "validate_every", "given")
            check.positive_int("validate_every", validate_every)
        loop = Loop(
            run,
            self._steps.for_batch(run.current(), batch),
            self._profile,
            last_step=last_step,
            deadline=None if limits.seconds is None else run.clock.seconds + limits.seconds,
            save_every=self._save_every,
            validate=None if validation is None else partial(self._validation, validation),
            validate_every=validate_every,
        )
        rollbacks, rate, began = 0, math.inf, run.step
        while True:
            log = DeferredMetrics(run.clock, self._log_every, self._on_finished(data, feed))
            try:
                loop(feed, log)
                if feed.ended:
                    limits.tell_shortfall(run.step, last_step, began)
                return True
            except StopTraining as stop:
                log.drop()
                return self._stopped(stop)
            except NonFiniteError as error:
                rollbacks += 1
                if self._on_nonfinite != "rollback" or rollbacks > MAX_ROLLBACKS:
                    raise
                log.drop()
                rate = nonfinite.roll_back(run, feed, error, rate)
                seconds = run.clock.seconds
                try:
                    self._report(run.step, seconds, None, "rollback", {"learning_rate": rate})
                except StopTraining as stop:
                    return self._stopped(stop)
                run.leave_feed()
                feed = run.feed(data, repeat=limits.given)

    def _stopped(self, stop: StopTraining) -> bool:
        logger.info("training ended at step %d: %s", self._run.step, stop)
        return True

    def _validation(self, data: Data) -> None:
        run = self._run
        with run.signals.window("validation"):
            values = self._validate(data)
        run.save_if_best(values)  # first, since a hook may end the training here
        self._report(run.step, run.clock.seconds, None, "validation", values)

    def scratch(self, data: Data) -> tuple[Step, TrainState, Iterator[Batch]]:
        """The compiled step, a copy of the state, and batches."""
        feed = Feed(repeated(opened(data)), self._run.placement)
        first = feed.prefetch()
        if first is None:
            raise check.DataError("The data gives no batch.")
        state = self._run.current()
        step = self._steps.for_batch(state, first)
        return step, jax.tree.map(jnp.copy, state), iter(feed.take, None)

    def _on_finished(self, data: Data, feed: Feed) -> Callable[[Finished], None]:
        per_epoch = getattr(data, "steps_per_epoch", None)
        waited, began = feed.wait_seconds, self._run.clock.seconds

        def on_finished(finished: Finished) -> None:
            trained = max(finished.seconds - began, 1e-9)
            values = finished.logs | {"data_wait": (feed.wait_seconds - waited) / trained}
            if skipped := getattr(data, "skipped", 0):
                values["skipped"] = skipped
            epoch = finished.step / per_epoch if per_epoch else None
            self._report(finished.step, finished.seconds, epoch, Mode.TRAIN.value, values)
            if finished.nonfinite is not None and self._on_nonfinite != "skip":
                raise nonfinite.error(self._run, data, finished)

        return on_finished
