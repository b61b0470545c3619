"""The Estimator: a model, a loss and an optimizer, trained, evaluated and asked for predictions.

It is composed of parts that serve alone: `step.build` makes the pure functions, `parallel` places
and `compiled` compiles them, `feed` brings batches, `keeper` saves and restores and writes the log.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl.core import check
from jdl.core.model import Model, as_model, in_precision, rematerialized
from jdl.core.types import Batch, Loss, Metric, Mode, Outputs, Params
from jdl.optim import registry
from jdl.train.clock import Clock, Finished, LateLog, as_floats
from jdl.train.compiled import CompiledSteps
from jdl.train.ema import average, averaging
from jdl.train.feed import Data, Feed, batches_per_epoch, opened, record_names
from jdl.train.hooks import Profile, StopTraining
from jdl.train.keeper import Keeper, NonFiniteError
from jdl.train.parallel import SplitRule, own_rows, placement
from jdl.train.step import Metrics, TrainState, build
from jdl.train.termination import Stopped, Termination

logger = logging.getLogger("jdl.train")

MAX_ROLLBACKS = 8


class Report(dict[str, Any]):
    """One row of a run's log: step, seconds, epoch, split and the values."""

    estimator: "Estimator"


class Estimator:
    """Trains, evaluates and predicts with one model, one loss and one optimizer.

    Args:
      model: a `jdl.Model` or a Flax Linen module.
      loss: `loss(outputs, batch) -> float[B]`, one value an example.
      optimizer: any optax transformation, first or second order, or a name of
        `jdl.optim.registry`: sgd, adam, lbfgs, hf, kfac …
      metrics: name -> `metric(outputs, batch) -> float[B]`, averaged over examples; or one function
        that gives a dict of such values.
      workdir: the run directory, for `metrics.jsonl` and `checkpoints/`; a run started again in it
        goes on from its last checkpoint. None keeps everything in memory.
      seed: of the initial parameters and all that is random in training.
      inputs: the entry of the batch that the model is given, or a tuple of several.
      regularizer: a scalar function of the parameters, added to the loss in training.
      microbatches: slices a batch is cut into, to bound memory.
      curvature_batch_size: examples of the batch that curvature products use; None for all.
      precision: a type such as "bfloat16" for the model to compute in; parameters, losses,
        gradients and optimizer stay float32. None for float32 throughout.
      rematerialize: whether to compute activations once more for the gradient instead of keeping
        them.
      devices: the devices to share each batch; None for all.
      parallel: "jit", or "fsdp" to split large parameters and their optimizer state over the
        devices as well, or "pmap".
      split_rule: `rule(path, shape, num_devices) -> axis or None`, what "fsdp" splits.
      log_every: steps between two rows of the log.
      logs: what to write besides `metrics.jsonl`: "csv" for `metrics.csv`, "tensorboard".
      save_every: steps between two checkpoints; None for one at the end of `train` only.
      keep: how many checkpoints to keep, the newest ones.
      keep_every: besides, all whose step is a multiple of this; None for none.
      keep_best: besides, the one of the best validation, by `("accuracy", "max")` or
        `("loss", "min")`, in `best/`.
      ema: decay of an exponential moving average of the parameters, in (0, 1); evaluation and
        prediction then use the average. None for none.
      on_nonfinite: what to do when a loss, a gradient or new parameters are not finite: "stop";
        "skip" the step; or "rollback" to the last checkpoint, with half the learning rate.
      log_norms: whether to log the norms of gradients and updates.
      profile: (first, last) step to trace into `profile/`, for TensorBoard or Perfetto.
      clock: reads the time that training seconds are counted in; `time.process_time` is disturbed
        less where a machine is shared.
      hooks: functions called with each row of the log, see `jdl.train.hooks`; one that raises
        ends the run.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from jdl import Estimator, from_fns, losses
      >>> from jdl.data import from_arrays
      >>> line = from_fns(lambda key, x: jnp.zeros((1, 1)), lambda slope, x: x @ slope)
      >>> x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
      >>> data = from_arrays(x, 3 * x, batch_size=16, shuffle=True, seed=0)
      >>> estimator = Estimator(line, losses.squared_error, optax.sgd(0.5))
      >>> _ = estimator.train(data, steps=60)
      >>> estimator.params.round(2).tolist()
      [[3.0]]
    """

    def __init__(
        self,
        model: Any,
        loss: Loss,
        optimizer: str | optax.GradientTransformation,
        *,
        metrics: Mapping[str, Metric] | Metrics | None = None,
        workdir: str | Path | None = None,
        seed: int = 0,
        inputs: str | Sequence[str] = "image",
        regularizer: Callable[[Params], jax.Array] | None = None,
        microbatches: int = 1,
        curvature_batch_size: int | None = None,
        precision: str | None = None,
        rematerialize: bool = False,
        devices: Sequence[jax.Device] | None = None,
        parallel: str = "jit",
        split_rule: SplitRule | None = None,
        log_every: int = 10,
        logs: Sequence[str] = (),
        save_every: int | None = 1000,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: tuple[str, str] | None = None,
        ema: float | None = None,
        on_nonfinite: str = "stop",
        log_norms: bool = False,
        profile: tuple[int, int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        hooks: Sequence[Callable[[Report], None]] = (),
    ):
        check.argument(callable(loss), "loss", "a function of (outputs, batch)", loss)
        check.positive_int("microbatches", microbatches)
        check.positive_int("log_every", log_every)
        if save_every is not None:
            check.positive_int("save_every", save_every)
        check.one_of("on_nonfinite", on_nonfinite, ("stop", "skip", "rollback"))
        check.argument(
            on_nonfinite != "rollback" or workdir is not None,
            "workdir",
            'given with on_nonfinite="rollback", which goes back to its checkpoints',
            workdir,
        )
        self.model: Model = as_model(model)
        if precision is not None:
            self.model = in_precision(self.model, precision)
        if rematerialize:
            self.model = rematerialized(self.model)
        self.loss: Loss = loss
        self.workdir = None if workdir is None else Path(workdir)
        self.seed = seed
        self.classes: tuple[str, ...] | None = None  # of the training data
        self._placement = placed = placement(devices, parallel, split_rule)
        if curvature_batch_size is not None and placed.mode == "pmap":
            check.argument(
                curvature_batch_size % placed.num_devices == 0,
                "curvature_batch_size",
                f"a multiple of the {placed.num_devices} devices that share it",
                curvature_batch_size,
            )
            curvature_batch_size //= placed.num_devices
        self._program = build(
            self.model,
            loss,
            _as_optimizer(optimizer) if ema is None else averaging(_as_optimizer(optimizer), ema),
            metrics=metrics,
            inputs=inputs if isinstance(inputs, str) else tuple(inputs),
            regularizer=regularizer,
            microbatches=microbatches,
            curvature_batch_size=curvature_batch_size,
            axis_name=placed.axis_name,
            skip_nonfinite=on_nonfinite == "skip",
            log_norms=log_norms,
        )
        self._evaluations: dict[Any, Callable[..., Any]] = {}
        self._predict_batch = jax.jit(self._program.predict)
        self._predict_inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        self._steps = CompiledSteps(self._program.train, placed)
        self._keeper = Keeper(self.workdir, logs, keep, keep_every, keep_best)
        self._log_every, self._save_every = log_every, save_every
        self._averages, self._on_nonfinite = ema is not None, on_nonfinite
        self._profile = Profile(profile, self.workdir)
        self._hooks = tuple(hooks)
        self._state: TrainState | None = None
        self._lent = False  # whether someone may hold on to arrays of the state
        self._steps_done = 0
        self._clock = Clock(now=clock)
        self._now = clock
        self._init_seconds = 0.0
        self._position: Any = None
        self._feed: tuple[Data, bool, Feed] | None = None
        self._trail: deque[tuple[int, Any]] = deque(maxlen=256)  # where recent steps' data began

    # ------------------------------------------------------------------ what it holds

    @property
    def state(self) -> TrainState:
        """All that training changes; raises before the first `train`."""
        self._lent = True
        return self._current()

    @property
    def params(self) -> Params:
        """The model's parameters."""
        return self.state.params

    @property
    def ema_params(self) -> Params:
        """The moving average of the parameters."""
        check.argument(self._averages, "ema", "a decay for there to be an average", None)
        return average(self.state.opt_state)

    @property
    def model_state(self) -> Any:
        """What the model carries besides its parameters."""
        return self.state.model_state

    @property
    def step(self) -> int:
        """Steps done."""
        return self._steps_done

    @property
    def seconds(self) -> float:
        """Time spent in training steps: without compilation, evaluation, logging and saving."""
        return self._clock.seconds

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling, which is in no clock."""
        return self._init_seconds + self._steps.seconds

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that a step needs on each device, see `CompiledSteps.memory`."""
        return self._steps.memory

    # ------------------------------------------------------------------ TRAIN

    def train(
        self,
        data: Data,
        *,
        steps: int | None = None,
        max_steps: int | None = None,
        epochs: int | None = None,
        seconds: float | None = None,
        validation: Data | None = None,
        validate_every: int | None = None,
        save: bool = True,
    ) -> "Estimator":
        """Trains, going on from where the last call or the last checkpoint stopped.

        With a limit, a data set of `jdl.data` is passed over as often as it takes, whatever its
        own `epochs`; without one, it is passed over as it is.

        Args:
          data: batches: a data set, any iterable of dicts of arrays, or a function that makes one.
          steps: how many more steps to run.
          max_steps: run until this many steps in total.
          epochs: how many more passes over the data.
          seconds: how many more seconds on the training clock, alone or beside a step limit.
          validation: data to evaluate on in between, under the split "validation".
          validate_every: steps between two such evaluations; by default an epoch.
          save: whether to write a checkpoint at the end; else at `save_every` and `save` alone.

        Returns:
          This Estimator.

        Raises:
          TrainingError: the loss is not finite, or a checkpoint could not be written.
          Stopped: SIGTERM came; everything is saved. It is a SystemExit with code 75.
          UserError: another process is training in the same run directory.
        """
        with self._keeper.lock():
            limits = (steps, max_steps, epochs, seconds)
            trained = self._train(data, limits, validation, validate_every)
            if trained and save:
                self._save(wait=True)
        return self

    def _train(
        self,
        data: Data,
        limits_given: tuple[int | None, int | None, int | None, float | None],
        validation: Data | None,
        validate_every: int | None,
    ) -> bool:
        steps, max_steps, epochs, seconds = limits_given
        limits = {"steps": steps, "max_steps": max_steps, "epochs": epochs}
        given = [name for name, value in limits.items() if value is not None]
        check.argument(len(given) <= 1, "steps, max_steps, epochs", "given one at a time", given)
        for name in given:
            check.positive_int(name, limits[name])
        if seconds is not None:
            check.in_range("seconds", seconds, 0.0, open_low=True)
            check.argument(
                jax.process_count() == 1,
                "seconds",
                "left out where several processes train together, whose clocks differ",
                seconds,
                "Give steps instead.",
            )

        feed = self._feed_for(data, repeat=bool(given) or seconds is not None)
        batch = feed.prefetch()
        if batch is None:
            raise check.DataError(
                "The training data gives no batch: it is at its end, or holds fewer examples than "
                "one batch."
            )
        last_step = max_steps
        if steps is not None:
            last_step = self._steps_done + steps
        if epochs is not None:
            last_step = self._steps_done + epochs * batches_per_epoch(data)
        if last_step is not None and self._steps_done >= last_step:
            return False
        self.classes = getattr(data, "classes", None) or self.classes
        if validation is not None:
            validate_every = validate_every or batches_per_epoch(data)
            check.positive_int("validate_every", validate_every)
        step_fn = self._steps.for_batch(self._current(), batch)
        deadline = None if seconds is None else self.seconds + seconds
        rollbacks, rate = 0, math.inf
        while True:
            log = LateLog(self._clock, self._log_every, self._on_finished(data, feed))
            try:
                self._run(step_fn, feed, log, last_step, deadline, (validation, validate_every))
                break
            except StopTraining as stop:
                log.drop()
                logger.info("training ended at step %d: %s", self._steps_done, stop)
                break
            except NonFiniteError as error:
                rollbacks += 1
                if self._on_nonfinite != "rollback" or rollbacks > MAX_ROLLBACKS:
                    raise
                log.drop()
                feed, rate = self._roll_back(data, feed, error, rate)
        return True

    def _run(
        self,
        step_fn: Callable[..., Any],
        feed: Feed,
        log: LateLog,
        last_step: int | None,
        deadline: float | None,
        validate: tuple[Data | None, int | None],
    ) -> None:
        """The loop: nothing in it waits for the step just dispatched."""
        self._keeper.begin()
        with Termination() as termination, self._clock as clock, self._profile as profile:
            began, first = clock.seconds, self._steps_done
            while last_step is None or self._steps_done < last_step:
                self._trail.append((self._steps_done, feed.position))
                batch = feed.take()
                if batch is None:
                    break
                profile.before(self._steps_done + 1)
                if self._lent:  # the step reuses the memory of the state it is given
                    self._state, self._lent = jax.tree.map(jnp.copy, self._state), False
                self._state, logs = step_fn(self._current(), batch)
                self._steps_done += 1
                self._position = feed.position
                if self._steps_done != last_step:
                    feed.prefetch()  # the next batch travels while the device works
                log.push(self._steps_done, logs)
                if profile.ends(self._steps_done):
                    log.flush()
                    profile.stop()
                if validate[0] is not None and self._steps_done % (validate[1] or 1) == 0:
                    log.flush()
                    self._validate(validate[0])
                if self._save_every and self._steps_done % self._save_every == 0:
                    log.flush()
                    self._save()
                if self.workdir is not None and termination.asked(self._steps_done):
                    log.flush()
                    self._save(wait=True)
                    raise Stopped(self._steps_done)
                if deadline is not None:
                    if self._steps_done == first + 1:
                        log.flush()  # else the mean is of dispatching, and a second step follows
                    mean = (clock.seconds - began) / (self._steps_done - first)
                    if clock.seconds + 2 * mean >= deadline:
                        log.flush()  # near the end step by step, not to overrun by one in flight
                    if clock.seconds >= deadline:
                        break
            log.finish()

    def _validate(self, data: Data) -> None:
        self._clock.stop()
        values = self.evaluate(data, name="validation")
        self._keeper.save_if_best(self._current(), self._meta(), values)
        self._clock.start()

    def restore_best(self, data: Data) -> "Estimator":
        """Takes up the checkpoint of the best validation so far.

        Args:
          data: what `train` is given.
        """
        feed = Feed(opened(data), self._placement.put_step_batch)
        batch = feed.prefetch()
        if batch is None or not self._restore(self._placement.whole_batch(batch), best=True):
            raise check.UserError(
                "There is no best checkpoint: train with a work directory, keep_best and "
                "validation data."
            )
        return self

    def _roll_back(
        self, data: Data, feed: Feed, error: NonFiniteError, last_rate: float
    ) -> tuple[Feed, float]:
        """The last checkpoint again, with half the learning rate or half of the last half."""
        batch = feed.prefetch()
        self._keeper.wait()
        if batch is None or not self._restore(self._placement.whole_batch(batch)):
            raise error
        state = self._current()
        rate = optax.tree.get(state.opt_state, "learning_rate", None)
        if rate is None:
            raise check.TrainingError(
                f"{error} There is no learning rate in the optimizer's state to make smaller: take "
                "the optimizer by name, or wrap it in optax.inject_hyperparams."
            ) from error
        smaller = min(float(rate), last_rate) / 2
        opt_state = optax.tree.set(
            state.opt_state, learning_rate=jnp.full(rate.shape, smaller, rate.dtype)
        )
        self._state = self._placement.put_state(state._replace(opt_state=opt_state))
        logger.warning("%s Back to step %d, learning rate %g.", error, self._steps_done, smaller)
        self._report(self._steps_done, self.seconds, None, "rollback", {"learning_rate": smaller})
        self._feed = None
        return self._feed_for(data, repeat=True), smaller

    def save(self) -> "Estimator":
        """Writes a checkpoint of this step into the run directory, if there is one."""
        with self._keeper.lock():
            self._save(wait=True)
        return self

    def initialize(self, data: Data) -> "Estimator":
        """Makes the initial parameters, or takes up the last checkpoint, without a step.

        Args:
          data: what `train` will be given.
        """
        if self._feed_for(data, repeat=True).prefetch() is None:
            raise check.DataError("The training data gives no batch to initialize the model with.")
        return self

    # ------------------------------------------------------------------ EVALUATE

    def evaluate(
        self,
        data: Data,
        *,
        name: str | None = None,
        sums: Mapping[str, Callable[[Outputs, Batch], jax.Array]] | None = None,
    ) -> dict[str, Any]:
        """The mean loss and metrics over one pass of the data, every example counted once.

        Args:
          data: as for `train`; a data set of `jdl.data` is passed over once, whatever its own
            `epochs`, with the last batch's remainder.
          name: the `split` under which the row is logged; by default the data's own, or "evaluate".
          sums: name -> `function(outputs, batch) -> array`, to be summed over the batches as is,
            such as `jdl.metrics.confusion_matrix`; not logged.

        Returns:
          `{"loss": …, metric: …}`, and the `sums` as float64 arrays.
        """
        totals: dict[str, float] = {}
        tables: dict[str, Any] = {}
        count = 0.0
        evaluate_batch = self._evaluation(sums or {})
        state = None
        for batch in self._once(data):
            state = state or self._held(batch)
            params = self._serving(state)
            (found, examples), of_batch = evaluate_batch(params, state.model_state, batch)
            for key, value in as_floats(found).items():
                totals[key] = totals.get(key, 0.0) + value
            for key, table in jax.device_get(of_batch).items():
                tables[key] = tables.get(key, 0.0) + np.asarray(table, np.float64)
            count += float(examples)
        if count == 0:
            raise check.DataError("The evaluation data holds no example.")
        check.argument(
            not tables.keys() & totals.keys(),
            "sums",
            f"named other than {list(totals)}",
            list(tables),
        )
        values = {key: value / count for key, value in totals.items()}
        split = name or getattr(data, "split", None) or Mode.EVALUATE.value
        self._report(self._steps_done, self.seconds, None, split, values)
        return values | tables

    def _evaluation(self, sums: Mapping[str, Any]) -> Callable[..., Any]:
        """One compiled pass over a batch; with `sums`, which share its forward pass."""
        named = tuple(sums.items())
        if named not in self._evaluations:
            program = self._program

            def evaluate(params: Params, model_state: Any, batch: Batch) -> Any:
                found = program.evaluate(params, model_state, batch)
                # The compiler sees that this forward pass is the one above.
                outputs = program.predict(params, model_state, batch) if named else None
                return found, {name: function(outputs, batch) for name, function in named}

            # Whole everywhere, so that each of several processes can read it.
            whole = self._placement.state
            self._evaluations[named] = jax.jit(evaluate, out_shardings=whole)
        return self._evaluations[named]

    # ------------------------------------------------------------------ PREDICT

    def predict(self, data: Data) -> Outputs:
        """The model's outputs for every example, in order, as NumPy arrays with leading axis N.

        Where several processes work together, each is given those of its own rows.
        """
        batches = [outputs for _, outputs in self.predict_batches(data)]
        if not batches:
            raise check.DataError("The data to predict holds no example.")
        return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

    def predict_batches(self, data: Data) -> Iterator[tuple[Batch, Outputs]]:
        """Pairs (batch, outputs), batch by batch, in constant memory; padding is left out.

        Where several processes work together, each is given its own rows.
        """
        for batch in self._once(data):
            state = self._held(batch)
            outputs = self._predict_batch(self._serving(state), state.model_state, batch)
            host = own_rows((dict(batch), outputs))
            mask = host[0].get("mask")
            kept = slice(None) if mask is None else mask > 0
            yield jax.tree.map(lambda x, kept=kept: x[kept], host)

    def predict_by(
        self, predict: Callable[[Params, Any, Batch], Outputs], *, inputs: Sequence[str]
    ) -> "Estimator":
        """Predictions by a function of one's own instead of the model's outputs.

        Args:
          predict: `predict(params, model_state, batch) -> outputs`, pure.
          inputs: the entries of the batch that it reads.

        Returns:
          This Estimator.
        """
        self._predict_batch, self._predict_inputs = jax.jit(predict), tuple(inputs)
        return self

    def export(self, path: str | Path, data: Data, **options: Any) -> Path:
        """Writes the predict function and its parameters to one file, which needs no code of ours.

        Args:
          path: the file; `jdl.train.export.load` reads it.
          data: as for `predict`; its first batch tells shapes and types.
          **options: as for `jdl.train.export.save`.
        """
        from jdl.train.export import save

        batch = next(iter(self._once(data)), None)
        if batch is None:
            raise check.DataError("The data holds no example to take the inputs' shapes from.")
        state = self._held(batch)
        inputs = {name: batch[name] for name in self._predict_inputs}
        return save(
            path,
            self._predict_batch,
            jax.device_get(self._serving(state)),
            jax.device_get(state.model_state),
            inputs,
            **options,
        )

    # ------------------------------------------------------------------ inner workings

    def scratch(self, data: Data) -> tuple[Callable[..., Any], TrainState, Iterator[Batch]]:
        """The compiled step, a copy of the state, and batches: to try things out, off the record.

        Args:
          data: as for `train`.
        """
        batches = opened(data)
        batches = batches.repeat() if hasattr(batches, "repeat") else batches
        feed = Feed(batches, self._placement.put_step_batch)
        first = feed.prefetch()
        if first is None:
            raise check.DataError("The data gives no batch.")
        return (
            self._steps.for_batch(self._current(), first),
            jax.tree.map(jnp.copy, self._current()),
            iter(feed.take, None),
        )

    def _feed_for(self, data: Data, repeat: bool) -> Feed:
        """The feed of the same data goes on; a new one starts where the last checkpoint was."""
        if self._feed is not None and self._feed[0] is data and self._feed[1] == repeat:
            return self._feed[2]
        batches = opened(data)
        if repeat and hasattr(batches, "repeat"):
            batches = batches.repeat()
        put = self._placement.put_step_batch
        feed = Feed(batches, put)
        if self._state is None:
            first = feed.prefetch()
            if first is not None:
                self._prepare(self._placement.whole_batch(first))
        if self._position is not None:
            feed = Feed(batches, put, self._position)
        self._feed = (data, repeat, feed)
        return feed

    def _once(self, data: Data) -> Iterator[Batch]:
        """The batches of one pass, on the devices."""
        batches = opened(data)
        if hasattr(batches, "once"):
            batches = batches.once()
        placed = self._placement
        feed = Feed(batches, dict if placed.is_host else placed.put_batch)
        while (batch := feed.take()) is not None:
            yield batch

    def _serving(self, state: TrainState) -> Params:
        """The parameters that evaluation and prediction use."""
        return average(state.opt_state) if self._averages else state.params

    def _current(self) -> TrainState:
        if self._state is None:
            raise check.UserError("This Estimator holds no parameters yet: train it first.")
        return self._state

    def _held(self, batch: Batch) -> TrainState:
        """The state, restored from the run directory if need be."""
        if self._state is None and self.workdir is not None:
            if self._keeper.latest_step() is None:
                raise check.UserError(f"{self.workdir} holds no checkpoint: train first.")
            self._prepare(batch)
        return self._current()

    def _prepare(self, batch: Batch) -> None:
        """Makes the initial state, or takes up the run directory's last checkpoint."""
        key = jax.random.key(self.seed)
        init = self._placement.compile_init(self._program.init, key, batch)
        if self._restore(batch):
            return
        start = time.perf_counter()
        self._state = jax.block_until_ready(init(key, batch))
        self._init_seconds += time.perf_counter() - start

    def _restore(self, batch: Batch, *, best: bool = False) -> bool:
        """Takes up the newest checkpoint, or the best, if there is one."""
        expected = jax.eval_shape(self._program.init, jax.random.key(self.seed), batch)
        restored = self._keeper.restore(expected, self._placement.shardings(expected), best=best)
        if restored is None:
            return False
        self._state, meta = restored
        self._steps_done = int(self._state.step)
        self._clock = Clock(meta["seconds"], self._now)
        self._position = meta["position"]
        self.classes = None if meta["classes"] is None else tuple(meta["classes"])
        return True

    def _on_finished(self, data: Data, feed: Feed) -> Callable[[Finished], None]:
        per_epoch = getattr(data, "batches_per_epoch", None)
        waited, began = feed.wait_seconds, self._clock.seconds

        def on_finished(finished: Finished) -> None:
            trained = max(finished.seconds - began, 1e-9)
            values = finished.logs | {"data_wait": (feed.wait_seconds - waited) / trained}
            if skipped := getattr(data, "skipped", 0):
                values["skipped"] = skipped
            epoch = finished.step / per_epoch if per_epoch else None
            self._report(finished.step, finished.seconds, epoch, Mode.TRAIN.value, values)
            if not math.isfinite(finished.logs["loss"]) and self._on_nonfinite != "skip":
                raise self._nonfinite(data, finished)

        return on_finished

    def _nonfinite(self, data: Data, finished: Finished) -> NonFiniteError:
        kept = self._keeper.latest_step()
        position = dict(self._trail).get(finished.step - 1)
        names = record_names(data, position)
        if names:
            logger.warning("the records of step %d: %s", finished.step, ", ".join(names))
        return NonFiniteError(
            f"The loss is {finished.logs['loss']} at step {finished.step}. "
            + ("" if kept is None else f"The checkpoint of step {kept} is intact. ")
            + "Try a smaller learning rate, and see that the labels are class numbers "
            "below the model's number of outputs."
        )

    def _report(
        self, step: int, seconds: float, epoch: float | None, split: str, values: dict[str, float]
    ) -> None:
        row = Report(step=step, seconds=seconds, epoch=epoch, split=split, **values)
        row.estimator = self
        self._keeper.write(row)
        for hook in self._hooks:
            hook(row)

    def _meta(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "position": self._position, "classes": self.classes}

    def _save(self, wait: bool = False) -> None:
        running = self._clock.running
        self._clock.stop()
        self._keeper.save(self._current(), self._meta(), wait=wait)
        if running:
            self._clock.start()


def _as_optimizer(optimizer: str | optax.GradientTransformation) -> optax.GradientTransformation:
    if isinstance(optimizer, str):
        return registry.by_name(optimizer)
    ok = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    check.argument(ok, "optimizer", "an optax transformation or a name", optimizer)
    return optimizer
