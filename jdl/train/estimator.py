"""The Estimator: a model, a loss and an optimizer; trains, evaluates and predicts.

Its parts can be used alone: `step.build` makes the pure functions, `parallel` places and `compiled`
compiles them, `feed` brings batches, `run` holds the state, `run_directory` saves, restores and
logs it, `loop` trains, `evaluate` and `predict` use it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdl.core import check
from jdl.core.model import Model, ModelLike, as_model, with_compute_dtype, with_remat
from jdl.core.objective import Objective
from jdl.core.types import Batch, Key, Loss, Metric, Mode, ModelState, Outputs, Params
from jdl.optim import registry
from jdl.train.compiled import CompiledSteps, Step
from jdl.train.ema import averaging, weights_of
from jdl.train.evaluate import Evaluator, Sums
from jdl.train.feed import Data, Feed, for_training
from jdl.train.log_row import Hook, LogRow, StopTraining
from jdl.train.loop import Limits, TrainLoop
from jdl.train.parallel import Placement, SplitRule, placement
from jdl.train.predict import Predict, Predictor
from jdl.train.profile import Profile
from jdl.train.run import Run
from jdl.train.run_directory import RunDirectory
from jdl.train.signals import Stopped
from jdl.train.step import Metrics, TrainState, build, scale_images
from jdl.train.writers import directions

logger = logging.getLogger("jdl.train")


class Estimator:
    """Trains, evaluates and predicts with one model, one loss and one optimizer.

    Args:
      model: a `jdl.Model` or a Flax Linen module.
      loss: `loss(outputs, batch) -> float[B]`, one value per example.
      optimizer: any optax transformation, first or second order, such as `optax.adam(3e-3)`; or a
        name, for its default settings: sgd, adam, lbfgs, hf, kfac … (`jdl.optim.by_name`).
      metrics: name -> `metric(outputs, batch) -> float[B]`, averaged over examples; or one function
        that returns a dict of such values. `jdl.metrics.direction` declares whether their largest
        or smallest value is best.
      workdir: the run directory, for `metrics.jsonl` and `checkpoints/`; a run started again in it
        continues from its last checkpoint. None keeps everything in memory.
      seed: for the initial parameters and all that is random in training.
      inputs: the entry of the batch that the model takes, or a tuple of several; () for the whole
        batch. Images, uint8 [B, H, W, C] with C of 1, 3 or 4, reach it as float32 in [0, 1]; other
        uint8 arrays reach it as they are.
      regularizer: a scalar function of the parameters, added to the loss in training.
      batch_transform: `transform(batch, key) -> batch`, pure, for training batches on the device,
        such as `jdl.data.mixup(num_classes=10)`; its key depends on seed and step alone.
      microbatches: slices a batch is cut into, to bound memory.
      curvature_batch_size: examples of the batch that curvature products use; None for all.
      compute_dtype: a type such as "bfloat16" for the model to compute in; parameters, losses,
        gradients and optimizer stay float32. None for float32 throughout.
      remat: whether to recompute activations for the gradient instead of keeping them.
      devices: the devices to share each batch; None for all.
      parallel: "jit"; "fsdp" to split large parameters and their optimizer state over the devices
        as well; or "pmap" to run the step on each device. All give the same numbers.
      split_rule: `rule(path, shape, num_devices) -> axis or None`, what "fsdp" splits.
      log_every: steps between two rows of the log.
      logs: what to write besides `metrics.jsonl`: "csv" for `metrics.csv`, "tensorboard", and
        "wandb" or "mlflow" for a run there, which a resumed run continues.
      save_every: steps between two checkpoints; None for one at the end of `train` only; "auto"
        for every 1,000th step that is at least 10 s of training after the last.
      keep: how many checkpoints to keep, the newest ones.
      keep_every: also keep all whose step is a multiple of this; None for none.
      keep_best: also keep the one of the best validation, by `("accuracy", "max")` or
        `("loss", "min")`, in `best/` of the run directory; with another metric or mode than
        before, the best from then on.
      ema: decay of an exponential moving average of the parameters, in (0, 1); evaluation and
        prediction then use the average. None for no average.
      on_nonfinite: what to do when a loss, a gradient or new parameters are not finite: "stop";
        "skip" the step; or "rollback" to the last checkpoint, with half the learning rate.
      log_norms: whether to log the norms of gradients and updates.
      profile: (first, last) step to trace into `profile/`, for TensorBoard or Perfetto.
      steps_per_dispatch: the most steps that one device makes without the host, which speeds up
        short ones; fewer where a validation or a checkpoint is due, or a row that hooks read. Each
        number may round differently. None for a resumed run's own, else 1; several on one CPU if
        XLA counts little.
      clock: reads the time for training seconds; `time.process_time` varies less on a shared
        machine.
      hooks: functions called with each row of the log, see `jdl.train.hooks`; one that raises
        ends the run, and one that remembers rows must be a `StatefulHook`.

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
        model: ModelLike,
        loss: Loss,
        optimizer: str | optax.GradientTransformation,
        *,
        metrics: Mapping[str, Metric] | Metrics | None = None,
        workdir: str | Path | None = None,
        seed: int = 0,
        inputs: str | Sequence[str] = "image",
        regularizer: Callable[[Params], jax.Array] | None = None,
        batch_transform: Callable[[Batch, Key], Batch] | None = None,
        microbatches: int = 1,
        curvature_batch_size: int | None = None,
        compute_dtype: str | None = None,
        remat: bool = False,
        devices: Sequence[jax.Device] | None = None,
        parallel: str = "jit",
        split_rule: SplitRule | None = None,
        log_every: int = 10,
        logs: Sequence[str] = (),
        save_every: int | str | None = "auto",
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: tuple[str, str] | None = None,
        ema: float | None = None,
        on_nonfinite: str = "stop",
        log_norms: bool = False,
        profile: tuple[int, int] | None = None,
        steps_per_dispatch: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        hooks: Sequence[Hook] = (),
    ):
        _check(loss, microbatches, log_every, save_every, on_nonfinite, workdir, hooks)
        if steps_per_dispatch is not None:
            check.positive_int("steps_per_dispatch", steps_per_dispatch)
        self.model = _prepared_model(model, compute_dtype, remat)
        self.loss = loss
        # Absolute, so that a later os.chdir does not split the run.
        self.workdir = None if workdir is None else Path(workdir).absolute()
        self.seed = seed
        self._inputs = inputs = inputs if isinstance(inputs, str) else tuple(inputs)
        placed = placement(devices, parallel, split_rule)._replace(inputs=inputs)
        program = build(
            self.model,
            loss,
            _prepared_optimizer(optimizer, ema),
            metrics=metrics,
            inputs=inputs,
            regularizer=regularizer,
            batch_transform=batch_transform,
            microbatches=microbatches,
            curvature_batch_size=_curvature_share(curvature_batch_size, placed),
            axis_name=placed.axis_name,
            skip_nonfinite=on_nonfinite == "skip",
            log_norms=log_norms,
        )
        self._evaluator = Evaluator(program, placed)
        self._predictor = Predictor(program.predict, inputs)
        self._directory = RunDirectory(
            self.workdir, logs, keep, keep_every, keep_best, lambda: directions(metrics)
        )
        self._run = run = Run(program.init, seed, placed, self._directory, clock)
        self._steps = CompiledSteps(program.train, placed, run.off_clock)
        self._loop = TrainLoop(
            run,
            self._steps,
            Profile(profile, self.workdir),
            self._means,
            self._report,
            self._tell_compiled,
            program.refuse,
            bool(hooks),
            log_every,
            save_every,
            on_nonfinite,
            steps_per_dispatch,
        )
        self._hooks, self._keep_best = tuple(hooks), keep_best

    # ------------------------------------------------------------------ what it holds

    @property
    def state(self) -> TrainState:
        """All that training changes; raises before the first `train`."""
        return self._run.borrow()

    @property
    def params(self) -> Params:
        """The model's parameters, which training changes."""
        return self.state.params

    @property
    def evaluation_params(self) -> Params:
        """What evaluation and prediction use: an average that the optimizer keeps, or `params`."""
        return weights_of(self.state.opt_state, self.state.params)

    @property
    def model_state(self) -> ModelState:
        """The model's state besides its parameters, such as batch statistics."""
        return self.state.model_state

    @property
    def step(self) -> int:
        """Steps done."""
        return self._run.step

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Those of the training data; None where it has none."""
        return self._run.classes

    @property
    def seconds(self) -> float:
        """Time spent in training steps: without compilation, evaluation, logging and saving."""
        return self._run.clock.seconds

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling, which the training clock leaves out."""
        return self._run.init_seconds + self._steps.seconds

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that training needs on each device; {} before a step is compiled.

            peak = state + batches + temporaries

        This is an estimate, from XLA's analysis of the compiled step, all steps of a dispatch
        included: the state, which a step reuses for the next one; temporaries, such as activations;
        the batches of the step that runs, of the one behind it, and the one on its way. `seen` is
        the peak that the device itself reports for the whole process, where it does.

        Not included: other programs (initial parameters, evaluation), arrays that the caller holds,
        the compiler's trials of kernels; and of the host Python, the threads that decode, the data.
        On a CPU the scratch of its kernels comes on top: 5 to 11 % with `adam`, to 23 % with `hf`.
        """
        return self._steps.memory

    def memory_estimate(self, data: Data) -> dict[str, int]:
        """`memory`, before the first step, which is compiled for it; `train` compiles nothing more.

        Args:
          data: as for `train`.

        >>> from jdl import from_fns, losses
        >>> line = from_fns(lambda key, x: jnp.zeros((1, 1)), lambda slope, x: x @ slope)
        >>> one = {"devices": jax.devices()[:1], "steps_per_dispatch": 1}
        >>> estimator = Estimator(line, losses.squared_error, optax.sgd(0.5), **one)
        >>> batch = {"image": jnp.ones((4, 1)), "label": jnp.ones((4, 1))}  # 2·4 floats of 4 bytes
        >>> estimator.memory_estimate([batch])["batches"]  # 3 of them
        96
        """
        with self._run.signals, self._directory.writing():
            self._loop.compile(data)
        return self.memory

    @property
    def log_every(self) -> int:
        """Steps between two rows of the log; may be set between two calls of `train`."""
        return self._loop.log_every

    @log_every.setter
    def log_every(self, steps: int) -> None:
        check.positive_int("log_every", steps)
        self._loop.log_every = steps

    # ------------------------------------------------------------------ TRAIN

    def train(
        self,
        data: Data,
        *,
        steps: int | None = None,
        max_steps: int | None = None,
        epochs: int | None = None,
        seconds: float | None = None,
        wall_seconds: float | None = None,
        validation: Data | None = None,
        validate_every: int | None = None,
        save: bool = True,
    ) -> "Estimator":
        """Trains, continuing from the last call or the last checkpoint.

        With a limit, a data set of `jdl.data` is repeated as often as needed, and its own `epochs`
        is ignored; without a limit it must have an end. Other data that ends before the limit ends
        the training, with a warning.

        Args:
          data: batches: a data set, any iterable of dicts of arrays, or a function that makes one.
            The leading axis of every array is B; entries of text stay on the host. A batch of
            another size, such as a smaller last one, costs one more compilation. An iterator with
            `get_state` and `set_state`, such as grain's, continues where it stopped after a
            restart; other iterables begin again.
          steps: how many more steps to run.
          max_steps: steps of the run in total, for a script that may be started again.
          epochs: how many more passes over the data.
          seconds: how many more seconds on the training clock, alone or beside a step limit.
          wall_seconds: likewise in all, with compiling, validating and saving.
          validation: data to evaluate on in between, under the split "validation"; not an
            iterator, which has only one pass.
          validate_every: steps between two validations; by default an epoch.
          save: whether to write a checkpoint at the end.

        Returns:
          This Estimator.

        Raises:
          ArgumentError: there is no limit and the data has no end, or several limits of steps.
          TrainingError: the loss is not finite, or a checkpoint could not be written.
          Stopped: SIGTERM came; everything is saved. It is a SystemExit with code 75. Without a
            run directory SIGTERM ends the program as usual.
          KeyboardInterrupt: Ctrl-C was pressed. Training ends after the current step, and saves
            if there is a run directory; the Estimator can be used, and trained on. A second Ctrl-C
            also interrupts a hook, a validation, or a wait for data.
          UserError: another process is training in the same run directory.
        """
        limits = Limits(steps, max_steps, epochs, seconds, wall_seconds)
        self._warn_of_missing_rows(validates=validation is not None)
        run = self._run
        with run.signals as signals, self._directory.writing():
            try:
                if self._loop.train(data, limits, validation, validate_every) and save:
                    run.save(wait=True)
                if signals.terminated:
                    raise Stopped(run.step)
            except (KeyboardInterrupt, Stopped) as end:
                raise run.save_after(end) from end
        return self

    def restore_best(self, data: Data) -> "Estimator":
        """Restores the checkpoint of the best validation so far.

        Args:
          data: as for `train`.
        """
        self._run.restore_best(data)
        return self

    def checkpoints(self, data: Data) -> Iterator[int]:
        """Restores the run's checkpoints one by one, the oldest first, and gives their steps.

        Args:
          data: as for `predict`.
        """
        next(iter(self._run.once(data)))  # restores the newest
        for step in self._directory.steps():
            self._run.restore(step=step)
            yield step

    def save(self) -> "Estimator":
        """Writes a checkpoint of this step into the run directory, if there is one."""
        with self._run.signals, self._directory.writing():
            self._run.save(wait=True)
        return self

    def initialize(self, data: Data) -> "Estimator":
        """Makes the initial parameters, or restores the last checkpoint, without a step.

        Args:
          data: as for `train`.
        """
        if self._run.feed(data, repeat=True).prefetch() is None:
            raise check.DataError("The training data gives no batch to initialize the model with.")
        return self

    # ------------------------------------------------------------------ EVALUATE

    def objective(self, batch: Batch) -> Objective:
        """The loss that `evaluate` has on a batch, as a function of parameters: for curvature."""
        inputs = self._inputs
        scaled = scale_images(batch, inputs)
        return Objective(
            self.model, self.loss, self.model_state, scaled, inputs=inputs, train=False
        )

    def evaluate(
        self, data: Data, *, name: str | None = None, sums: Sums | None = None
    ) -> dict[str, Any]:
        """The mean loss and metrics over one pass of the data, every example counted once.

        Args:
          data: as for `train`; a data set of `jdl.data` is read once, ignoring its own
            `epochs`, with the last batch's remainder.
          name: the `split` under which the row is logged; by default the data's own, or "evaluate".
          sums: name -> `function(outputs, batch) -> array`, to be summed over the batches as is,
            such as `jdl.metrics.confusion_matrix`; not logged.

        Returns:
          `{"loss": …, metric: …}`, and the `sums` as float64 arrays.
        """
        values, tables = self._evaluator.over(self._run.once(data), sums or {})
        split = name or getattr(data, "split", None) or Mode.EVALUATE.value
        with contextlib.suppress(StopTraining):  # there is no training to stop
            self._report(self.step, self.seconds, None, split, values)
        return values | tables

    # ------------------------------------------------------------------ PREDICT

    def predict(self, data: Data) -> Outputs:
        """The model's outputs for every example, in order, as NumPy arrays with leading axis N.

        Where several processes work together, each has those of its own examples.
        """
        return self._predictor.whole(self._run.once(data))

    def predict_batches(self, data: Data) -> Iterator[tuple[Batch, Outputs]]:
        """Pairs (batch, outputs), batch by batch, in constant memory; padding is left out.

        The batch has all its entries, text too, as NumPy arrays.

        Where several processes work together, each has its own examples.
        """
        return self._predictor.pairs(self._run.once(data))

    def predict_by(self, predict: Predict, *, inputs: Sequence[str]) -> "Estimator":
        """Predicts with another function instead of the model's outputs.

        Args:
          predict: `predict(params, model_state, batch) -> outputs`, pure.
          inputs: the entries of the batch that it reads.

        Returns:
          This Estimator.
        """
        self._predictor = Predictor(predict, inputs)
        return self

    def export(self, path: str | Path, data: Data, **options: Any) -> Path:
        """Writes the predict function and its parameters to one file, which runs without the model.

        Args:
          path: the file; `jdl.train.export.load_exported` reads it.
          data: as for `predict`; its first batch gives shapes and types.
          **options: as for `jdl.train.export.save`.
        """
        return self._predictor.export(path, self._run.once(data), **options)

    # ------------------------------------------------------------------ inner workings

    def scratch(self, data: Data) -> tuple[Step, TrainState, Iterator[Batch]]:
        """The compiled step, a copy of the state, and batches, to run steps without changing this.

        Args:
          data: as for `train`.
        """
        feed = Feed(for_training(data, repeat=True), self._run.placement)
        first = feed.prefetch()
        if first is None:
            raise check.DataError("The data gives no batch.")
        state = self._run.current()
        step = self._steps.for_batch(state, first)
        return step, jax.tree.map(jnp.copy, state), iter(feed.take, None)

    def _means(self, data: Data) -> dict[str, Any]:
        """The means of `evaluate`, not logged."""
        return self._evaluator.over(self._run.once(data), {})[0]

    def _report(
        self, step: int, seconds: float, epoch: float | None, split: str, values: dict[str, float]
    ) -> None:
        row = LogRow(step=step, seconds=seconds, epoch=epoch, split=split, **values)
        row.estimator, row.restores = self, self._run.restores
        try:
            with self._run.signals.window("hooks"):
                for hook in self._hooks:
                    hook(row)
        finally:
            self._directory.write(row)  # with the entries that hooks have added

    def _tell_compiled(self) -> None:
        """Tells the hooks that have a method `compiled`, before the first step of a `train`."""
        for hook in self._hooks:
            getattr(hook, "compiled", lambda _: None)(self)

    def _warn_of_missing_rows(self, *, validates: bool) -> None:
        """Warns of hooks and `keep_best` that wait for rows which this training does not log."""
        logged = {"train", *(["validation"] if validates else [])}
        splits = {s for hook in self._hooks if isinstance(s := getattr(hook, "split", None), str)}
        for split in sorted(splits - logged):
            logger.warning(
                "a hook such as early_stopping reads rows of split %r; this training logs none.%s",
                split,
                " Give `validation`." if split == "validation" else "",
            )
        if self._keep_best is not None and not validates:
            message = "keep_best compares validations, of which there are none: give `validation`"
            logger.warning(message)


def _check(
    loss: Loss,
    microbatches: int,
    log_every: int,
    save_every: int | str | None,
    on_nonfinite: str,
    workdir: Any,
    hooks: Any,
) -> None:
    """Checks the arguments that no part of the Estimator checks."""
    check.argument(
        isinstance(hooks, Sequence) and all(map(callable, hooks)),
        "hooks",
        "a list of functions",
        hooks,
    )
    check.argument(
        callable(loss), "loss", "a function of (outputs, batch)", loss, "`jdl.losses` has some."
    )
    check.positive_int("microbatches", microbatches)
    check.positive_int("log_every", log_every)
    if save_every not in (None, "auto"):
        check.positive_int("save_every", save_every)
    check.one_of("on_nonfinite", on_nonfinite, ("stop", "skip", "rollback"))
    check.argument(
        on_nonfinite != "rollback" or workdir is not None,
        "workdir",
        'given with on_nonfinite="rollback", which goes back to its checkpoints',
        workdir,
    )


def _prepared_model(model: ModelLike, compute_dtype: str | None, remat: bool) -> Model:
    """The model's pure functions, in the compute dtype and with rematerialization if asked for."""
    prepared = as_model(model)
    if compute_dtype is not None:
        prepared = with_compute_dtype(prepared, compute_dtype)
    return with_remat(prepared) if remat else prepared


def _prepared_optimizer(
    optimizer: str | optax.GradientTransformation, ema: float | None
) -> optax.GradientTransformation:
    """The transformation, looked up if it is a name, with a moving average if asked for."""
    if isinstance(optimizer, str):
        optimizer = registry.by_name(optimizer)
    ok = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    hint = "Call it: it makes a transformation." if callable(optimizer) else ""
    check.argument(ok, "optimizer", "an optax transformation or a name", optimizer, hint)
    return optimizer if ema is None else averaging(optimizer, ema)


def _curvature_share(curvature_batch_size: int | None, placed: Placement) -> int | None:
    """The examples for curvature products in one call of the step: with pmap, on one device."""
    if curvature_batch_size is None or placed.mode != "pmap":
        return curvature_batch_size
    check.argument(
        curvature_batch_size % placed.num_devices == 0,
        "curvature_batch_size",
        f"a multiple of the {placed.num_devices} devices that share it",
        curvature_batch_size,
    )
    return curvature_batch_size // placed.num_devices
