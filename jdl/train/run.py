"""The state of a training, from its initial parameters or its last checkpoint on."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl.core import check
from jdl.core.types import Batch, Key, ModelState, Params
from jdl.train.clock import Clock
from jdl.train.ema import weights_of
from jdl.train.feed import Data, Feed, for_training, is_dataset, once, opened, refuse_endless
from jdl.train.parallel import Placement
from jdl.train.run_directory import RunDirectory
from jdl.train.signals import Interrupted, Signals, Stopped
from jdl.train.step import TrainState

logger = logging.getLogger("jdl.train")


class EvalBatch(NamedTuple):
    """A batch on the devices, and what evaluation and prediction use for it."""

    batch: Batch
    params: Params
    model_state: ModelState
    texts: dict[str, np.ndarray]  # the batch's entries that are not numeric, on the host


class Run:
    """All that changes as an Estimator trains: state, step, clock, position in the data.

    Args:
      init: makes the initial state.
      seed: for that state.
      placement: where arrays lie.
      directory: saves and restores.
      now: reads the time that the clock counts.

    Attributes:
      state: None before the first `feed` or pass `once` over data.
      step: steps done.
      clock: the training clock.
      position: where in the data the next step begins.
      trail: (step, position) of recent steps.
      steps_per_dispatch: the length of the stacks of batches; None before it is known.
      classes: those of the training data, where it has any.
      restores: how often a checkpoint has been restored.
      init_seconds: time spent on the initial state.
      signals: SIGTERM and Ctrl-C, while training.
    """

    def __init__(
        self,
        init: Callable[[Key, Batch], TrainState],
        seed: int,
        placement: Placement,
        directory: RunDirectory,
        now: Callable[[], float],
    ):
        self.placement, self.directory = placement, directory
        self._init, self._seed, self._now = init, seed, now
        self._shapes: TrainState | None = None  # shapes of the state, once a batch has been seen
        self._rate: float | None = None  # the learning rate that the optimizer was made with
        self._rate_is_saved = False  # whether `_rate` comes from a checkpoint
        self.state: TrainState | None = None
        self._borrowed = False  # whether a caller may hold arrays of the state
        self.step = 0
        self.clock = Clock(now=now)
        self.position: Any = None
        self._resumed = False  # whether the position comes from a checkpoint
        self.trail: deque[tuple[int, Any]] = deque(maxlen=256)
        self.steps_per_dispatch: int | None = None
        self.classes: tuple[str, ...] | None = None
        self.restores = 0
        self.init_seconds = 0.0
        self.signals = Signals(saves=directory.workdir is not None)
        self._feed: tuple[Data, bool | None, Feed] | None = None  # None: not repeatable

    # ------------------------------------------------------------------ the state

    def current(self) -> TrainState:
        """The state; raises where there is none yet."""
        if self.state is None:
            raise check.UserError("This Estimator holds no parameters yet: train it first.")
        return self.state

    def borrow(self) -> TrainState:
        """The state, for a caller who may keep it."""
        self._borrowed = True
        return self.current()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within it, what is read of the state is not kept: the next step need not copy it."""
        kept = self._borrowed
        yield
        self._borrowed = kept

    def take(self) -> TrainState:
        """The state, for a step that reuses its memory: a copy if it has been borrowed."""
        if self._borrowed:
            self.state, self._borrowed = jax.tree.map(jnp.copy, self.state), False
        return self.current()

    def _prepare(self, batch: Batch) -> None:
        """Restores the last checkpoint, or makes the initial state."""
        self._see(batch)
        if self.restore():
            return
        start = time.perf_counter()
        # One jitted call: a state built eagerly could not be donated to the first step.
        init = jax.jit(self._init, out_shardings=self.placement.shardings(self._shapes))
        self.state = jax.block_until_ready(init(jax.random.key(self._seed), batch))
        self.init_seconds += time.perf_counter() - start
        rate = learning_rate_of(self.state)
        self._rate = None if rate is None else float(rate)

    def _see(self, batch: Batch) -> None:
        if self._shapes is None or self.state is None:
            self._shapes = jax.eval_shape(self._init, jax.random.key(self._seed), batch)

    # ------------------------------------------------------------------ the data

    def feed(self, data: Data, *, repeat: bool) -> Feed:
        """Continues the feed of the same data, or starts one at the last checkpoint's position."""
        if self._feed is not None and self._feed[0] is data and self._feed[1] in (None, repeat):
            if not repeat:
                refuse_endless(data)
            return self._feed[2]
        # A position in data of another library is valid for certain only with the same object.
        same = self._feed is not None and self._feed[0] is data
        batches = for_training(data, repeat=repeat)
        feed = Feed(batches, self.placement)
        if self.state is None:
            with self.signals.window("data"):
                first = feed.prefetch()
            if first is not None:
                self._prepare(first)
        if self._resumed and feed.begins_again:
            logger.warning("this data keeps no position: it is read from its beginning again")
        elif self.position is not None and (self._resumed or same or is_dataset(batches)):
            try:
                feed = Feed(batches, self.placement, self.position)
            except check.DataError:
                if self._resumed:
                    raise
                # This process has trained on other data: start at the beginning.
        self._resumed = False
        self._feed = (data, repeat if is_dataset(batches) else None, feed)
        return feed

    def once(self, data: Data) -> Iterator[EvalBatch]:
        """The batches of one pass over the data, with the weights to use for them."""
        state: TrainState | None = None
        params: Params = None
        for batch, texts in once(data, self.placement):
            held = self._held(batch)
            if held is not state:
                state, params = held, weights_of(held.opt_state, held.params)
            yield EvalBatch(batch, params, held.model_state, texts)

    def _held(self, batch: Batch) -> TrainState:
        """The state, restored from the run directory if need be."""
        workdir = self.directory.workdir
        if self.state is None and workdir is not None:
            self._see(batch)
            if not self.restore():
                raise check.UserError(f"{workdir} holds no checkpoint: train first.")
        return self.current()

    # ------------------------------------------------------------------ the learning rate

    def apply_learning_rate(self, batch: Batch) -> None:
        """Before training: the optimizer's learning rate, where a restored run had another.

        The rate in the state may differ from both, by a schedule or a rollback.
        """
        before, held = self._rate, learning_rate_of(self.current())
        if not self._rate_is_saved or before is None or held is None:
            return
        asked = jax.jit(lambda key, batch: learning_rate_of(self._init(key, batch)))
        self._rate = float(asked(jax.random.key(self._seed), batch))
        self._rate_is_saved = False
        if self._rate != before:
            self.set_learning_rate(jnp.full(held.shape, self._rate, held.dtype))
            logger.warning("learning rate %g from here on, before %g", self._rate, before)

    def set_learning_rate(self, rate: jax.Array) -> None:
        """Replaces the learning rate in the optimizer's state."""
        self.set_in_optimizer(learning_rate=rate)

    def set_in_optimizer(self, **fields: jax.Array) -> None:
        """Replaces fields of the optimizer's state, by name."""
        state = self.current()
        opt_state = optax.tree.set(state.opt_state, **fields)
        self.state = self.placement.put_state(state._replace(opt_state=opt_state))

    # ------------------------------------------------------------------ checkpoints

    def restore(self, *, best: bool = False, step: int | None = None) -> bool:
        """Restores the newest checkpoint, the best, or one; returns whether there is one."""
        assert self._shapes is not None
        shardings = self.placement.shardings(self._shapes)
        restored = self.directory.restore(self._shapes, shardings, best=best, step=step)
        if restored is None:
            return False
        self.state, meta = restored
        self.restores += 1
        self.step = int(self.state.step)
        self.clock = Clock(meta["seconds"], self._now)
        self.position, self._resumed = meta["position"], True
        self.classes = None if meta["classes"] is None else tuple(meta["classes"])
        self._rate, self._rate_is_saved = meta["learning_rate"], True
        self.steps_per_dispatch = self.steps_per_dispatch or meta.get("steps_per_dispatch", 1)
        self._feed = None  # the data restarts from there too
        return True

    def restore_best(self, data: Data) -> None:
        """Restores the best checkpoint of a training on such data; raises where there is none."""
        batch = Feed(opened(data), self.placement).prefetch()
        if batch is not None:
            self._see(batch)
        if batch is None or not self.restore(best=True):
            raise check.UserError(
                "There is no best checkpoint: train with a work directory, keep_best and "
                "validation data."
            )

    def begin_training(self) -> None:
        """Makes the run directory agree with the state: no later checkpoints, no later log rows."""
        if self.step < (self.directory.latest_step() or 0):
            self.save(wait=True)  # which deletes later ones
        self.directory.rewind_log()

    def save(self, *, wait: bool = False) -> None:
        """Saves the state, off the clock."""
        with self.off_clock():
            self.directory.save(self.current(), self._meta())
            if wait:
                self.directory.close()

    def save_if_best(self, values: dict[str, Any]) -> None:
        """Saves the state in `best/` if this validation is the best so far."""
        self.directory.save_if_best(self.current(), self._meta(), values)

    def save_after(self, signal: KeyboardInterrupt | Stopped) -> KeyboardInterrupt | Stopped:
        """Saves where a signal ended training; returns the exception to raise."""
        workdir, step = self.directory.workdir, self.step
        begun = self.state is not None and step > 0
        if isinstance(signal, Stopped):
            if begun:
                self.save(wait=True)
            return Stopped(step)
        message = f"interrupted after step {step}"
        if workdir is None or not begun:
            return Interrupted(message)
        if jax.process_count() > 1:  # the others may be at another step, and would not join a save
            return Interrupted(f"{message}; {workdir} holds what was saved before")
        try:
            self.save(wait=True)
        except check.TrainingError as error:
            return Interrupted(f"{message}, which could not be saved: {error}")
        where = workdir / "checkpoints"
        return Interrupted(f"{message}, saved in {where}; the same command goes on from there")

    @contextmanager
    def off_clock(self) -> Iterator[None]:
        """Time spent inside is not counted."""
        running = self.clock.running
        self.clock.stop()
        yield
        if running:
            self.clock.start()

    def _meta(self) -> dict[str, Any]:
        return {
            "seconds": self.clock.seconds,
            "position": self.position,
            "classes": self.classes,
            "learning_rate": self._rate,
            "steps_per_dispatch": self.steps_per_dispatch,
        }


def learning_rate_of(state: TrainState) -> Any:
    """The one scalar `learning_rate` in the optimizer's state; None for none, or a schedule's."""
    found = optax.tree.get_all_with_path(state.opt_state, "learning_rate")
    return found[0][1] if len(found) == 1 and found[0][1].shape == () else None
