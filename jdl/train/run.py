"""Where a training stands, from its initial parameters or its last checkpoint on."""

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
from jdl.train.ema import average
from jdl.train.feed import Data, Feed, ending, is_dataset, once, opened, repeated
from jdl.train.parallel import Placement
from jdl.train.run_directory import RunDirectory
from jdl.train.signals import Interrupted, Signals, Stopped
from jdl.train.step import TrainState

logger = logging.getLogger("jdl.train")


class EvalBatch(NamedTuple):
    """A batch on the devices, and what evaluation and prediction are to use for it."""

    batch: Batch
    params: Params
    model_state: ModelState
    texts: dict[str, np.ndarray]  # the batch's entries that are no numbers, on the host


class Run:
    """What changes as an Estimator trains: the state, the step, the clock, the place in the data.

    Args:
      init: makes the initial state.
      seed: of that state.
      placement: where arrays lie.
      keeper: saves and restores.
      averages: whether the state holds a moving average of the parameters.
      now: reads the time that the clock counts.

    Attributes:
      state: None before the first `feed` or pass `once` over data.
      step: steps done.
      clock: the training clock.
      position: where in the data the next step begins.
      trail: (step, position) of recent steps.
      classes: those of the training data; None where it tells none.
      restores: how often a checkpoint has been taken up.
      init_seconds: time spent on the initial state.
      signals: SIGTERM and Ctrl-C, while training.
    """

    def __init__(
        self,
        init: Callable[[Key, Batch], TrainState],
        seed: int,
        placement: Placement,
        keeper: RunDirectory,
        averages: bool,
        now: Callable[[], float],
    ):
        self.placement, self.keeper = placement, keeper
        self._init, self._seed, self._now = init, seed, now
        self._rate: float | None = None  # the learning rate asked for, where the state holds it
        self._rate_is_old = False  # whether it is the one asked for when the state was saved
        self.averages = averages
        self.state: TrainState | None = None
        self._borrowed = False  # whether someone may hold on to arrays of the state
        self.step = 0
        self.clock = Clock(now=now)
        self.position: Any = None
        self._resumed = False  # whether the position is a checkpoint's
        self.trail: deque[tuple[int, Any]] = deque(maxlen=256)
        self.classes: tuple[str, ...] | None = None
        self.restores = 0
        self.init_seconds = 0.0
        self.signals = Signals(saves=keeper.workdir is not None)
        self._feed: tuple[Data, bool | None, Feed] | None = None  # None: not repeatable

    # ------------------------------------------------------------------ the state

    def current(self) -> TrainState:
        """The state; raises where there is none yet."""
        if self.state is None:
            raise check.UserError("This Estimator holds no parameters yet: train it first.")
        return self.state

    def borrow(self) -> TrainState:
        """The state, for someone who may hold on to it."""
        self._borrowed = True
        return self.current()

    def take(self) -> TrainState:
        """The state, for a step that reuses its memory: a copy if someone may hold on to it."""
        if self._borrowed:
            self.state, self._borrowed = jax.tree.map(jnp.copy, self.state), False
        return self.current()

    def _held(self, batch: Batch) -> TrainState:
        """The state, restored from the run directory if need be."""
        workdir = self.keeper.workdir
        if self.state is None and workdir is not None and not self.restore(batch):
            raise check.UserError(f"{workdir} holds no checkpoint: train first.")
        return self.current()

    def _prepare(self, batch: Batch) -> None:
        """Makes the initial state, or takes up the run directory's last checkpoint."""
        key = jax.random.key(self._seed)
        init = self.placement.compile_init(self._init, key, batch)
        if self.restore(batch):
            return
        start = time.perf_counter()
        self.state = jax.block_until_ready(init(key, batch))
        self.init_seconds += time.perf_counter() - start
        rate = _learning_rate(self.state)
        self._rate = None if rate is None else float(rate)

    # ------------------------------------------------------------------ the data

    def feed(self, data: Data, *, repeat: bool) -> Feed:
        """The feed of the same data goes on; a new one starts where the last checkpoint was."""
        if self._feed is not None and self._feed[0] is data and self._feed[1] in (None, repeat):
            if not repeat:
                ending(data)
            return self._feed[2]
        batches = repeated(opened(data)) if repeat else ending(opened(data))
        feed = Feed(batches, self.placement)
        if self.state is None:
            with self.signals.window("data"):
                first = feed.prefetch()
            if first is not None:
                self._prepare(self.placement.whole_batch(first))
        # Of other data than ours nothing tells whether a position is one in it.
        known = is_dataset(batches) or (self._feed is not None and self._feed[0] is data)
        if self._resumed and feed.begins_again:
            logger.warning("this data keeps no position: it is read from its beginning again")
        elif self.position is not None and (self._resumed or known):
            try:
                feed = Feed(batches, self.placement, self.position)
            except check.DataError:
                if self._resumed:
                    raise
                # Other data than this process has trained on so far: from its beginning.
        self._resumed = False
        self._feed = (data, repeat if is_dataset(batches) else None, feed)
        return feed

    def once(self, data: Data) -> Iterator[EvalBatch]:
        """The batches of one pass over the data, and what is to serve them."""
        for batch, texts in once(data, self.placement):
            state = self._held(batch)
            params = average(state.opt_state) if self.averages else state.params
            yield EvalBatch(batch, params, state.model_state, texts)

    def leave_feed(self) -> None:
        """The next feed is a new one, even of the same data."""
        self._feed = None

    # ------------------------------------------------------------------ checkpoints

    def restore(self, batch: Batch, *, best: bool = False) -> bool:
        """Takes up the newest checkpoint, or the best, if there is one."""
        expected = jax.eval_shape(self._init, jax.random.key(self._seed), batch)
        restored = self.keeper.restore(expected, self.placement.shardings(expected), best=best)
        if restored is None:
            return False
        self.state, meta = restored
        self.restores += 1
        self.step = int(self.state.step)
        self.clock = Clock(meta["seconds"], self._now)
        self.position, self._resumed = meta["position"], True
        self.classes = None if meta["classes"] is None else tuple(meta["classes"])
        self._rate, self._rate_is_old = meta.get("learning_rate"), True
        return True

    def take_up_rate(self, batch: Batch) -> None:
        """Before training: the learning rate asked for now, where another was asked for before.

        The state's own may differ from both: a schedule or a way back has changed it.
        """
        state, before = self.current(), self._rate
        old = _learning_rate(state)
        if not self._rate_is_old or before is None or old is None:
            return
        asked = jax.jit(lambda key, batch: _learning_rate(self._init(key, batch)))
        self._rate = float(asked(jax.random.key(self._seed), self.placement.whole_batch(batch)))
        self._rate_is_old = False
        if self._rate == before:
            return
        opt_state = optax.tree.set(
            state.opt_state, learning_rate=jnp.full(old.shape, self._rate, old.dtype)
        )
        self.state = self.placement.put_state(state._replace(opt_state=opt_state))
        logger.warning("learning rate %g from here on, before %g", self._rate, before)

    def restore_best(self, data: Data) -> None:
        """Takes up the best checkpoint of a training on such data; raises where there is none."""
        batch = Feed(opened(data), self.placement).prefetch()
        if batch is None or not self.restore(self.placement.whole_batch(batch), best=True):
            raise check.UserError(
                "There is no best checkpoint: train with a work directory, keep_best and "
                "validation data."
            )
        self.leave_feed()  # the data too goes on from there

    def save(self, *, wait: bool = False) -> None:
        """Saves the state, off the clock."""
        with self.off_clock():
            self.keeper.save(self.current(), self._meta())
            if wait:
                self.keeper.close()

    @contextmanager
    def off_clock(self) -> Iterator[None]:
        """What is done inside is in no training clock."""
        running = self.clock.running
        self.clock.stop()
        yield
        if running:
            self.clock.start()

    def leave_later_checkpoints(self) -> None:
        """Before training goes on from an older step: what is saved is then where it stands."""
        if self.step < (self.keeper.latest_step() or 0):
            self.save(wait=True)

    def ended_by(self, signal: KeyboardInterrupt | Stopped) -> KeyboardInterrupt | Stopped:
        """Saves where training was ended by a signal; what is to be raised then."""
        keeper, step = self.keeper, self.step
        begun = self.state is not None and step > 0
        if isinstance(signal, Stopped):
            if begun:
                self.save(wait=True)
            return Stopped(step)
        told = f"interrupted after step {step}"
        if keeper.workdir is None or not begun:
            return Interrupted(told)
        if jax.process_count() > 1:  # the others may be at another step, and do not wait to save
            return Interrupted(f"{told}; {keeper.workdir} holds what was saved before")
        try:
            self.save(wait=True)
        except check.TrainingError as error:
            return Interrupted(f"{told}, which could not be saved: {error}")
        where = keeper.workdir / "checkpoints"
        return Interrupted(f"{told}, saved in {where}; the same command goes on from there")

    def save_if_best(self, values: dict[str, Any]) -> None:
        """Saves the state in `best/` if this validation is the best so far."""
        self.keeper.save_if_best(self.current(), self._meta(), values)

    def _meta(self) -> dict[str, Any]:
        return {
            "seconds": self.clock.seconds,
            "position": self.position,
            "classes": self.classes,
            "learning_rate": self._rate,
        }


def _learning_rate(state: TrainState) -> Any:
    """The one scalar of that name in the optimizer's state; None for none or several."""
    found = optax.tree.get_all_with_path(state.opt_state, "learning_rate")
    return found[0][1] if len(found) == 1 and found[0][1].shape == () else None
