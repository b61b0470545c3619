"""The training loop: what happens between two steps, and what ends it."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jdl.core import check
from jdl.core.types import Batch, Mode
from jdl.train import dispatch
from jdl.train.clock import Clock
from jdl.train.compiled import CompiledSteps, Step
from jdl.train.deferred_metrics import DeferredMetrics, Finished
from jdl.train.feed import Data, Feed, steps_per_epoch
from jdl.train.log_row import StopTraining
from jdl.train.positions import record_names
from jdl.train.profile import Profile
from jdl.train.run import Run, learning_rate_of
from jdl.train.run_directory import NonFiniteError
from jdl.train.signals import Stopped
from jdl.train.step import TrainState

logger = logging.getLogger("jdl.train")

MAX_ROLLBACKS = 8
SAVE_STEPS, SAVE_SECONDS = 1000, 10.0  # at least, between two checkpoints that "auto" makes

# report(step, seconds, epoch, split, values)
Reporter = Callable[[int, float, float | None, str, dict[str, float]], None]


class Limits(NamedTuple):
    """How far one call of `train` goes: at most one limit of steps, and maybe a time.

    Attributes:
      steps: how many more steps.
      max_steps: steps of the run in total.
      epochs: how many more passes over the data.
      seconds: how many more seconds on the training clock.
      wall_seconds: how many more seconds in all.
    """

    steps: int | None
    max_steps: int | None
    epochs: int | None
    seconds: float | None
    wall_seconds: float | None = None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return any(limit is not None for limit in self)

    def check(self) -> None:
        """Raises for limits that are out of range or contradict each other."""
        of_steps = {"steps": self.steps, "max_steps": self.max_steps, "epochs": self.epochs}
        given = [name for name, value in of_steps.items() if value is not None]
        check.argument(len(given) <= 1, "steps, max_steps, epochs", "given one at a time", given)
        for name in given:
            check.positive_int(name, of_steps[name])
        for name in ("seconds", "wall_seconds"):
            if (value := getattr(self, name)) is not None:
                check.in_range(name, value, 0.0, open_low=True)
                check.argument(
                    jax.process_count() == 1,
                    name,
                    "left out where several processes train together, whose clocks differ",
                    value,
                    "Give steps instead.",
                )

    def last_step(self, done: int, data: Data) -> int | None:
        """The number of the last step after `done` steps; None for no limit."""
        if self.steps is not None:
            return done + self.steps
        if self.epochs is not None:
            return done + self.epochs * steps_per_epoch(data)
        return self.max_steps


class Call(NamedTuple):
    """One call of `train`.

    Attributes:
      data: the training data.
      limits: how far to go.
      last_step: the number of the last step; None to continue to the end of the data.
      deadlines: clocks, and the seconds on each at which to end.
      validation: data to evaluate on in between; None for none.
      validate_every: steps between two validations; None for none.
    """

    data: Data
    limits: Limits
    last_step: int | None
    deadlines: tuple[tuple[Clock, float], ...]
    validation: Data | None
    validate_every: int | None


class TrainLoop:
    """Trains a run.

    Args:
      run: the state of the training.
      steps: the compiled step.
      profile: traces some steps.
      evaluate: `evaluate(data) -> values`, for validation.
      report: takes each row of the log.
      compiled: called once the step is compiled, before it runs.
      refuse: `refuse(state, batch)` raises for the first batch of data, if it must.
      reads_state: whether `report` may read the state of a row's step.
      log_every, save_every, on_nonfinite, steps_per_dispatch: as for `jdl.Estimator`.
    """

    def __init__(
        self,
        run: Run,
        steps: CompiledSteps,
        profile: Profile,
        evaluate: Callable[[Data], dict[str, Any]],
        report: Reporter,
        compiled: Callable[[], None],
        refuse: Callable[[TrainState, Batch], None],
        reads_state: bool,
        log_every: int,
        save_every: int | str | None,
        on_nonfinite: str,
        steps_per_dispatch: int | None,
    ):
        self._run, self._steps, self._profile = run, steps, profile
        self._evaluate, self._report, self._refuse = evaluate, report, refuse
        self._compiled = compiled
        self._reads_state, self.log_every = reads_state, log_every
        self._save_every = SAVE_STEPS if isinstance(save_every, str) else save_every
        # Several processes save together, and their clocks differ.
        spaced = isinstance(save_every, str) and jax.process_count() == 1
        self._apart = SAVE_SECONDS if spaced else 0.0
        self._saved: float | None = None  # when, on the training clock
        self._on_nonfinite, self._steps_per_dispatch = on_nonfinite, steps_per_dispatch

    def train(
        self,
        data: Data,
        limits: Limits,
        validation: Data | None,
        validate_every: int | None,
    ) -> bool:
        """See `jdl.Estimator.train`; returns whether any step was left to do."""
        limits.check()
        _check_validation(validation, validate_every)
        wall = Clock()
        wall.start()
        run = self._run
        feed, batch = self._first(data, repeat=limits.given)
        last_step = limits.last_step(run.step, data)
        if last_step is not None and run.step >= last_step:
            return False
        self._check(feed, batch)
        self._saved = run.clock.seconds if self._saved is None else self._saved
        run.apply_learning_rate(batch)
        run.classes = getattr(data, "classes", None) or run.classes
        if validation is not None and validate_every is None:
            validate_every = steps_per_epoch(data, "validate_every", "given")
        ends = ((run.clock, run.clock.seconds, limits.seconds), (wall, 0.0, limits.wall_seconds))
        deadlines = tuple((clock, now + left) for clock, now, left in ends if left is not None)
        call = Call(data, limits, last_step, deadlines, validation, validate_every)
        run.steps_per_dispatch = self._length(batch)
        step = self._steps.for_batch(run.current(), self._next(call, feed))
        with run.signals.window("hooks"):
            self._compiled()
        try:
            self._run_and_roll_back(call, step, feed)
        except StopTraining as stop:
            logger.info("training ended at step %d: %s", run.step, stop)
        return True

    def compile(self, data: Data) -> None:
        """Compiles the step that `train` with a limit would begin with."""
        run = self._run
        feed, batch = self._first(data, repeat=True)
        self._check(feed, batch)
        run.steps_per_dispatch = length = self._length(batch)
        self._steps.for_batch(run.current(), feed.prefetch(1, length))

    def _first(self, data: Data, *, repeat: bool) -> tuple[Feed, Batch]:
        feed = self._run.feed(data, repeat=repeat)
        with self._run.signals.window("data"):
            batch = feed.prefetch()
        if batch is None:
            raise check.DataError(
                "The training data gives no batch: it is at its end, or holds fewer examples than "
                "one batch."
            )
        return feed, batch

    def _check(self, feed: Feed, batch: Batch) -> None:
        if not feed.checked:
            self._refuse(self._run.current(), batch)
            feed.checked = True

    def _length(self, batch: Batch) -> int:
        """The most steps in one dispatch: as asked for, as before, or chosen."""
        run, steps, asked = self._run, self._steps, self._steps_per_dispatch
        one = not isinstance(run.placement.batch, NamedSharding)
        if not one or not all(isinstance(x.dtype, np.dtype) for x in jax.tree.leaves(batch)):
            must = "1 or None on several devices, with pmap, and for batches with random keys"
            check.argument(asked in (None, 1), "steps_per_dispatch", must, asked)
            return 1
        ends = [n for n in (self._rows_end(), self._save_every) if n]
        most = min(ends, default=dispatch.MOST_STEPS)
        return asked or run.steps_per_dispatch or steps.choose_length(run.current(), batch, most)

    def _rows_end(self) -> int | None:
        """The steps between rows, if each has to end a dispatch."""
        return self.log_every if self._reads_state else None

    def _is_save_due(self) -> bool:
        run, every = self._run, self._save_every
        if not every or run.step % every:
            return False
        return run.clock.seconds - (self._saved or 0.0) >= self._apart

    def _next(self, call: Call, feed: Feed) -> Any:
        """The batch or stack of the next dispatch, which ends where something is due, or None."""
        step, length = self._run.step, self._run.steps_per_dispatch or 1
        ends = self._rows_end(), self._save_every, call.validate_every
        due = [n - step % n for n in ends if n]
        if call.last_step is not None:
            due.append(call.last_step - step)
        with self._run.signals.window("data"):
            return feed.prefetch(min(length, *due, *self._profile.due(step)), length)

    def _run_and_roll_back(self, call: Call, step: Step, feed: Feed) -> None:
        """Runs the steps; after one that is not finite, again from the last checkpoint."""
        run, began = self._run, self._run.step
        rollbacks, rate = 0, math.inf
        while True:
            try:
                self._run_steps(call, step, feed)
                if feed.ended and call.limits.given and run.step != call.last_step:
                    _warn_of_short_data(call, run.step, began)
                return
            except NonFiniteError as error:
                rollbacks += 1
                if self._on_nonfinite != "rollback" or rollbacks > MAX_ROLLBACKS:
                    raise
                rate = _roll_back(run, error, rate)
            self._report(run.step, run.clock.seconds, None, "rollback", {"learning_rate": rate})
            feed = run.feed(call.data, repeat=call.limits.given)

    def _run_steps(self, call: Call, step: Step, feed: Feed) -> None:
        run = self._run
        metrics = DeferredMetrics(run.clock, self.log_every, self._on_finished(call.data, feed))
        run.begin_training()
        with run.clock, self._profile:
            try:
                self._loop(call, step, feed, metrics)
            except (KeyboardInterrupt, Stopped):
                with contextlib.suppress(StopTraining, NonFiniteError):
                    metrics.flush()  # log the steps that have run
                raise

    def _loop(self, call: Call, step: Step, feed: Feed, metrics: DeferredMetrics) -> None:
        """Nothing in it waits for the step just dispatched."""
        run, profile, signals = self._run, self._profile, self._run.signals
        deadlines = [_Deadline(*deadline) for deadline in call.deadlines]
        while call.last_step is None or run.step < call.last_step:
            signals.check()
            batches = self._next(call, feed)
            if batches is None:
                break
            profile.before(run.step + 1)
            run.state, logs = step(run.take(), batches)
            positions = feed.advance()
            run.trail.extend(enumerate(positions, run.step))
            run.step += len(positions)
            run.position = feed.position
            metrics.push(run.step, logs, len(positions))
            if run.step != call.last_step:
                self._next(call, feed)  # travels while the device computes
            metrics.wait_for_earlier_steps()
            if profile.ends(run.step):
                metrics.flush()
                profile.stop()
            if call.validation is not None and run.step % (call.validate_every or 1) == 0:
                metrics.flush()
                with run.off_clock():
                    self._validate(call.validation)
            if self._is_save_due():
                metrics.flush()
                run.save()
                self._saved = run.clock.seconds
            if signals.asked(run.step):
                raise Stopped(run.step)
            if any(deadline.reached(metrics) for deadline in deadlines):
                break
        metrics.finish()

    def _validate(self, data: Data) -> None:
        run = self._run
        with run.signals.window("validation"):
            values = self._evaluate(data)
        run.save_if_best(values)  # first, since a hook may end the training here
        self._report(run.step, run.clock.seconds, None, "validation", values)

    def _on_finished(self, data: Data, feed: Feed) -> Callable[[Finished], None]:
        """Logs a step whose metrics have arrived; raises where its loss is not finite."""
        per_epoch = getattr(data, "steps_per_epoch", None)
        waited, began = feed.wait_seconds, self._run.clock.seconds
        memory = self._steps.memory if self._run.step == 0 else {}
        once = {"memory_estimate": memory["peak"]} if memory else {}  # in the run's first row

        def on_finished(finished: Finished) -> None:
            trained = max(finished.seconds - began, 1e-9)
            values = finished.logs | {"data_wait": (feed.wait_seconds - waited) / trained}
            if skipped := getattr(data, "skipped", 0):
                values["skipped"] = skipped
            values |= once
            once.clear()
            epoch = finished.step / per_epoch if per_epoch else None
            self._report(finished.step, finished.seconds, epoch, Mode.TRAIN.value, values)
            if finished.nonfinite is not None and self._on_nonfinite != "skip":
                raise _nonfinite_loss(self._run, data, *finished.nonfinite)

        return on_finished


class _Deadline:
    """Ends a training at a time of a clock, without one more step in flight."""

    def __init__(self, clock: Clock, seconds: float):
        self._clock, self._end = clock, seconds
        self._began, self._steps = clock.seconds, 0

    def reached(self, metrics: DeferredMetrics) -> bool:
        """Whether to end after this step."""
        self._steps += 1
        if self._steps == 1:
            metrics.flush()  # else the mean would be of dispatching alone
        mean = (self._clock.seconds - self._began) / self._steps
        if self._clock.seconds + 2 * mean >= self._end:
            metrics.flush()
        return self._clock.seconds >= self._end


def _check_validation(validation: Data | None, validate_every: int | None) -> None:
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
    if validate_every is not None:
        check.positive_int("validate_every", validate_every)


def _warn_of_short_data(call: Call, step: int, began: int) -> None:
    limit = next(f"{k}={v}" for k, v in call.limits._asdict().items() if v is not None)
    of = "" if call.last_step is None else f" of {call.last_step - began}"
    logger.warning(
        "the data ended before %s: %d%s steps were made. Only data sets of jdl.data repeat by "
        "themselves; of a list, make itertools.cycle(list).",
        limit,
        step - began,
        of,
    )


def _nonfinite_loss(run: Run, data: Data, step: int, loss: float) -> NonFiniteError:
    """The error for a step; logs the names of the records in its batch."""
    run.directory.close()  # a checkpoint being written counts
    kept = run.directory.latest_step()
    names = record_names(data, dict(run.trail).get(step - 1))
    if names:
        logger.warning("the records of step %d: %s", step, ", ".join(names))
    return NonFiniteError(
        f"The loss is {loss} at step {step}. "
        + ("" if kept is None else f"The checkpoint of step {kept} is intact. ")
        + "Try a smaller learning rate, and check that the labels are class numbers "
        "below the model's number of outputs."
    )


def _roll_back(run: Run, error: NonFiniteError, last_rate: float) -> float:
    """Restores the last checkpoint with half the learning rate.

    Args:
      run: the state of the training.
      error: raised again where there is no checkpoint.
      last_rate: the rate of the rollback before, of which half is taken if it is smaller;
        infinity at first.

    Returns:
      The learning rate.

    Raises:
      TrainingError: the optimizer's state holds no learning rate.
    """
    if not run.restore():
        raise error
    state = run.current()
    rate = learning_rate_of(state)
    if rate is None:
        raise check.TrainingError(
            f"{error} There is no learning rate in the optimizer's state to make smaller: take "
            "the optimizer by name with a number, or wrap it in optax.inject_hyperparams."
        ) from error
    smaller = min(float(rate), last_rate) / 2
    run.set_learning_rate(jnp.full(rate.shape, smaller, rate.dtype))
    logger.warning("%s Back to step %d, learning rate %g.", error, run.step, smaller)
    return smaller
