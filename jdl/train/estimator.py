"""The Estimator: a model, a loss and an optimizer, trained, evaluated and asked for predictions.

It is composed of parts that serve alone: `step.build` makes the pure functions, `parallel` places
and compiles them, `loop.run` drives them, `checkpoint` and `writers` keep what they make.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl.core import check
from jdl.core.model import Model, as_model
from jdl.core.types import Batch, Loss, Metric, Mode, Outputs, Params
from jdl.optim import registry
from jdl.train.checkpoint import Checkpoints
from jdl.train.clock import Clock, Finished, LateLog, as_floats
from jdl.train.feed import Feed
from jdl.train.parallel import SplitRule, placement
from jdl.train.step import TrainState, build
from jdl.train.writers import JsonlWriter

Data = Iterable[Batch] | Callable[[], Iterable[Batch]]


class Report(dict[str, Any]):
    """One row of a run's log: step, seconds, epoch, split and the values."""


class Estimator:
    """Trains, evaluates and predicts with one model, one loss and one optimizer.

    Args:
      model: a `jdl.Model` or a Flax Linen module.
      loss: `loss(outputs, batch) -> float[B]`, one value an example.
      optimizer: any optax transformation, first or second order, or a name: sgd, momentum,
        nesterov, adam, adamw, lbfgs, cg, newton, hf.
      metrics: name -> `metric(outputs, batch) -> float[B]`, averaged over examples.
      workdir: the run directory, for `metrics.jsonl` and `checkpoints/`; a run started again in it
        goes on from its last checkpoint. None keeps everything in memory.
      seed: of the initial parameters and all that is random in training.
      inputs: the entry of the batch that the model is given, or a tuple of several.
      regularizer: a scalar function of the parameters, added to the loss in training.
      microbatches: slices a batch is cut into, to bound memory.
      curvature_batch_size: examples of the batch that curvature products use; None for all.
      devices: the devices to share each batch; None for all.
      parallel: "jit", or "fsdp" to split large parameters and their optimizer state over the
        devices as well, or "pmap".
      split_rule: `rule(path, shape, num_devices) -> axis or None`, what "fsdp" splits.
      log_every: steps between two rows of the log.
      save_every: steps between two checkpoints; None for one at the end of `train` only.
      keep: how many checkpoints to keep.
      hooks: functions called with each row of the log; one that raises ends the run.

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
        metrics: Mapping[str, Metric] | None = None,
        workdir: str | Path | None = None,
        seed: int = 0,
        inputs: str | Sequence[str] = "image",
        regularizer: Callable[[Params], jax.Array] | None = None,
        microbatches: int = 1,
        curvature_batch_size: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        parallel: str = "jit",
        split_rule: SplitRule | None = None,
        log_every: int = 10,
        save_every: int | None = 1000,
        keep: int = 3,
        hooks: Sequence[Callable[[Report], None]] = (),
    ):
        check.argument(callable(loss), "loss", "a function of (outputs, batch)", loss)
        check.positive_int("microbatches", microbatches)
        check.positive_int("log_every", log_every)
        check.positive_int("keep", keep)
        if save_every is not None:
            check.positive_int("save_every", save_every)
        self.model: Model = as_model(model)
        self.workdir = None if workdir is None else Path(workdir)
        self.seed = seed
        self.compile_seconds = 0.0
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
            _as_optimizer(optimizer),
            metrics=metrics,
            inputs=inputs if isinstance(inputs, str) else tuple(inputs),
            regularizer=regularizer,
            microbatches=microbatches,
            curvature_batch_size=curvature_batch_size,
            axis_name=placed.axis_name,
        )
        self._evaluate_batch = jax.jit(self._program.evaluate)
        self._predict_batch = jax.jit(self._program.predict)
        self._log_every, self._save_every, self._keep = log_every, save_every, keep
        self._hooks = tuple(hooks)
        self._state: TrainState | None = None
        self._lent = False  # whether someone may hold on to arrays of the state
        self._steps_done = 0
        self._clock = Clock()
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._position: Any = None
        self._feed: tuple[Data, bool, Feed] | None = None
        self._checkpoints: Checkpoints | None = None

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

    # ------------------------------------------------------------------ TRAIN

    def train(
        self,
        data: Data,
        *,
        steps: int | None = None,
        max_steps: int | None = None,
        epochs: int | None = None,
        seconds: float | None = None,
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

        Returns:
          This Estimator.

        Raises:
          TrainingError: the loss is not finite.
        """
        limits = {"steps": steps, "max_steps": max_steps, "epochs": epochs}
        given = [name for name, value in limits.items() if value is not None]
        check.argument(len(given) <= 1, "steps, max_steps, epochs", "given one at a time", given)
        for name in given:
            check.positive_int(name, limits[name])
        if seconds is not None:
            check.in_range("seconds", seconds, 0.0, open_low=True)

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
            last_step = self._steps_done + epochs * _batches_per_epoch(data)
        if last_step is not None and self._steps_done >= last_step:
            return self
        self.classes = getattr(data, "classes", None) or self.classes
        step_fn = self._compiled_step(batch)
        if self._lent:  # the step reuses the memory of the state it is given
            self._state, self._lent = jax.tree.map(jnp.copy, self._state), False
        deadline = None if seconds is None else self.seconds + seconds
        log = LateLog(self._clock, self._log_every, self._on_finished(data, feed))

        with self._clock as clock:
            began, first = clock.seconds, self._steps_done
            while last_step is None or self._steps_done < last_step:
                batch = feed.take()
                if batch is None:
                    break
                self._state, logs = step_fn(self._state, batch)
                self._steps_done += 1
                self._position = feed.position
                if self._steps_done != last_step:
                    feed.prefetch()  # the next batch travels while the device works
                log.push(self._steps_done, logs)
                if self._save_every and self._steps_done % self._save_every == 0:
                    log.flush()
                    self._save()
                if deadline is not None:
                    if self._steps_done == first + 1:
                        log.flush()  # else the mean is of dispatching, and a second step follows
                    mean = (clock.seconds - began) / (self._steps_done - first)
                    if clock.seconds + 2 * mean >= deadline:
                        log.flush()  # near the end step by step, not to overrun by one in flight
                    if clock.seconds >= deadline:
                        break
            log.finish()
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

    def evaluate(self, data: Data, *, name: str | None = None) -> dict[str, float]:
        """The mean loss and metrics over one pass of the data, every example counted once.

        Args:
          data: as for `train`; a data set of `jdl.data` is passed over once, whatever its own
            `epochs`, with the last batch's remainder.
          name: the `split` under which the row is logged; by default the data's own, or "evaluate".

        Returns:
          `{"loss": …, metric: …}`.
        """
        sums: dict[str, float] = {}
        count = 0.0
        state = None
        for batch in self._once(data):
            state = state or self._held(batch)
            found, examples = self._evaluate_batch(state.params, state.model_state, batch)
            for key, value in as_floats(found).items():
                sums[key] = sums.get(key, 0.0) + value
            count += float(examples)
        if count == 0:
            raise check.DataError("The evaluation data holds no example.")
        values = {key: value / count for key, value in sums.items()}
        split = name or getattr(data, "split", None) or Mode.EVALUATE.value
        self._report(self._steps_done, self.seconds, None, split, values)
        return values

    # ------------------------------------------------------------------ PREDICT

    def predict(self, data: Data) -> Outputs:
        """The model's outputs for every example, in order, as NumPy arrays with leading axis N."""
        batches = [outputs for _, outputs in self.predict_batches(data)]
        if not batches:
            raise check.DataError("The data to predict holds no example.")
        return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

    def predict_batches(self, data: Data) -> Iterator[tuple[Batch, Outputs]]:
        """Pairs (batch, outputs), batch by batch, in constant memory; padding is left out."""
        for batch in self._once(data):
            state = self._held(batch)
            outputs = self._predict_batch(state.params, state.model_state, batch)
            mask = batch.get("mask")
            kept = slice(None) if mask is None else np.asarray(mask) > 0
            host = jax.device_get((dict(batch), outputs))
            yield jax.tree.map(lambda x, kept=kept: x[kept], host)

    # ------------------------------------------------------------------ inner workings

    def _feed_for(self, data: Data, repeat: bool) -> Feed:
        """The feed of the same data goes on; a new one starts where the last checkpoint was."""
        if self._feed is not None and self._feed[0] is data and self._feed[1] == repeat:
            return self._feed[2]
        batches = _opened(data)
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
        batches = _opened(data)
        if hasattr(batches, "once"):
            batches = batches.once()
        placed = self._placement
        feed = Feed(batches, dict if placed.is_host else placed.put_batch)
        while (batch := feed.take()) is not None:
            yield batch

    def _current(self) -> TrainState:
        if self._state is None:
            raise check.UserError("This Estimator holds no parameters yet: train it first.")
        return self._state

    def _held(self, batch: Batch) -> TrainState:
        """The state, restored from the run directory if need be."""
        if self._state is None and self.workdir is not None:
            if self._manager().latest_step() is None:
                raise check.UserError(f"{self.workdir} holds no checkpoint: train first.")
            self._prepare(batch)
        return self._current()

    def _prepare(self, batch: Batch) -> None:
        """Makes the initial state, or takes up the run directory's last checkpoint."""
        key = jax.random.key(self.seed)
        init = self._placement.compile_init(self._program.init, key, batch)
        if self.workdir is not None:
            expected = jax.eval_shape(init, key, batch)
            restored = self._manager().restore(expected, self._placement.shardings(expected))
            if restored is not None:
                self._state, meta = restored
                self._steps_done = int(self._state.step)
                self._clock = Clock(meta["seconds"])
                self._position = meta["position"]
                self.classes = None if meta["classes"] is None else tuple(meta["classes"])
                JsonlWriter(self.workdir / "metrics.jsonl").rewind(self._steps_done)
                return
            JsonlWriter(self.workdir / "metrics.jsonl").rewind(0)  # of a run that saved nothing
        start = time.perf_counter()
        self._state = jax.block_until_ready(init(key, batch))
        self.compile_seconds += time.perf_counter() - start

    def _compiled_step(self, batch: Batch) -> Callable[..., Any]:
        """The step, compiled ahead for batches of this shape."""
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), dict(batch))
        signature = str(shapes)
        if signature not in self._compiled:
            start = time.perf_counter()
            lowered = self._placement.lower_step(self._program.train, self._current(), batch)
            _refuse_changed_types(self._current(), lowered.out_info[0])
            self._compiled[signature] = _naming_shapes(lowered.compile(), shapes)
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[signature]

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
            if not math.isfinite(finished.logs["loss"]):
                kept = self._manager().latest_step() if self.workdir is not None else None
                raise check.TrainingError(
                    f"The loss is {finished.logs['loss']} at step {finished.step}. "
                    + ("" if kept is None else f"The checkpoint of step {kept} is intact. ")
                    + "Try a smaller learning rate, and see that the labels are class numbers "
                    "below the model's number of outputs."
                )

        return on_finished

    def _report(
        self, step: int, seconds: float, epoch: float | None, split: str, values: dict[str, float]
    ) -> None:
        row = Report(step=step, seconds=seconds, epoch=epoch, split=split, **values)
        if self.workdir is not None:
            JsonlWriter(self.workdir / "metrics.jsonl").write(row)
        for hook in self._hooks:
            hook(row)

    def _manager(self) -> Checkpoints:
        if self._checkpoints is None:
            assert self.workdir is not None
            self._checkpoints = Checkpoints(self.workdir / "checkpoints", self._keep)
        return self._checkpoints

    def _save(self, wait: bool = False) -> None:
        if self.workdir is None:
            return
        self._clock.stop()
        meta = {"seconds": self.seconds, "position": self._position, "classes": self.classes}
        self._manager().save(self._steps_done, self._current(), meta)
        if wait:
            self._manager().wait()
        else:
            self._clock.start()


def _as_optimizer(optimizer: str | optax.GradientTransformation) -> optax.GradientTransformation:
    if isinstance(optimizer, str):
        return registry.by_name(optimizer)
    ok = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    check.argument(ok, "optimizer", "an optax transformation or a name", optimizer)
    return optimizer


def _opened(data: Data) -> Any:
    return data() if callable(data) else data


def _batches_per_epoch(data: Data) -> int:
    number = getattr(data, "batches_per_epoch", None)
    check.argument(
        number is not None,
        "epochs",
        "left out for data that does not tell its batches_per_epoch",
        type(data).__name__,
        "Give steps instead.",
    )
    return int(number)  # type: ignore[arg-type]


def _refuse_changed_types(before: Any, after: Any) -> None:
    """A state whose types change from step to step would recompile, or fail, at the next."""

    def types(tree: Any) -> dict[str, str]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(p): f"{x.dtype}{list(x.shape)}" for p, x in leaves}

    old, new = types(before), types(after)
    changed = [f"{p}: {old.get(p)} -> {new.get(p)}" for p in old | new if old.get(p) != new.get(p)]
    if changed:
        raise check.TrainingError(
            f"The step changes the types of its state, first {changed[0]}. "
            "Mend the optimizer or the model so that they stay the same."
        )


def _naming_shapes(compiled: Any, shapes: Any) -> Callable[..., Any]:
    def step(state: TrainState, batch: Batch) -> Any:
        try:
            return compiled(state, batch)
        except TypeError as error:
            found = jax.tree.map(lambda x: (x.shape, str(x.dtype)), dict(batch))
            if found == shapes:
                raise
            raise check.DataError(
                f"A batch differs from the first one: it has {found}, the first had {shapes}."
            ) from error

    return step
