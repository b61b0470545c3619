"""What to do at each row of a run's log: plain functions, given to `Estimator(hooks=[…])`.

A hook is called with one row, `{"step", "seconds", "epoch", "split", values…}`; `row.estimator` is
the Estimator that made it, whose parameters may be a step or more ahead of the row. One that raises
`StopTraining` ends `train` in good order; whatever else it raises ends it as an error.

One that remembers rows is to be a `Remembering`, as those here are. One that looks at the rows of
a single split alone may say so in an attribute `split`; `train` warns where there are none.
"""

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

from jdl.core import check
from jdl.core.types import Batch
from jdl.train import dead_units as dead
from jdl.train.writers import JsonlWriter, Row, is_number, read_jsonl

if TYPE_CHECKING:
    from jdl.train.estimator import Estimator

logger = logging.getLogger("jdl.train")


class Report(dict[str, Any]):
    """One row of a run's log: step, seconds, epoch, split and the values.

    Attributes:
      estimator: the one that made it.
      restores: how often its run has been taken up from a checkpoint so far.
    """

    estimator: "Estimator"
    restores: int


Hook = Callable[[Any], None]


class StopTraining(Exception):
    """Raised by a hook: `train` saves and returns."""


class Remembering:
    """A hook with a memory of its run.

    So it starts fresh in each run that it is given to, goes on in a second `train` of the same
    Estimator, and forgets the steps that a run has gone back from.

    `make(earlier)` gives a function of a row. It is called at the first row of each Estimator, and
    again after its run has gone back to a checkpoint. `earlier` are the rows that the run's log
    holds up to there, so that a run taken up again is remembered as one that never ended.

    Args:
      make: `make(earlier) -> hook`, with the memory in the hook's closure.
      split: the only split whose rows count; None where several do.

    >>> def make(earlier):
    ...     losses = [row["loss"] for row in earlier]
    ...     def hook(row):
    ...         losses.append(row["loss"])
    ...         print(min(losses))
    ...     return hook
    >>> best_so_far = Remembering(make)
    >>> for loss in (0.5, 0.7):
    ...     best_so_far({"split": "train", "step": 1, "loss": loss})
    0.5
    0.5
    """

    def __init__(self, make: Callable[[Sequence[Row]], Hook], split: str | None = None):
        self.split = split
        self._make = make
        self._runs: weakref.WeakKeyDictionary[Any, tuple[int, Hook]] = weakref.WeakKeyDictionary()

    def __call__(self, row: Any) -> None:
        """Gives the row to the hook of its run."""
        run = getattr(row, "estimator", self)  # rows that are plain dicts are one run's
        restores = getattr(row, "restores", 0)
        before, hook = self._runs.get(run, (-1, None))
        if hook is None or before != restores:
            hook = self._make(_logged_before(row))
            self._runs[run] = (restores, hook)
        hook(row)


def _logged_before(row: Any) -> list[Row]:
    """The rows before this one in the log of its run, without those of later steps."""
    workdir = getattr(getattr(row, "estimator", None), "workdir", None)
    if workdir is None:
        return []
    at, split = row["step"], row["split"]

    def is_earlier(logged: Row) -> bool:
        step = logged["step"]
        return step < at or (step == at and logged.get("split") != split)

    rows = read_jsonl(workdir / "metrics.jsonl")
    return [r for r in rows if is_number(r.get("step")) and is_earlier(r)]


def early_stopping(
    metric: str = "loss",
    *,
    patience: int = 5,
    minimum_change: float = 0.0,
    mode: str = "min",
    split: str = "validation",
) -> Hook:
    """Ends training when `metric` has not improved for `patience` validations.

    Validations that the run's log holds from before it was taken up again are counted too, where
    they have the metric. A value that is not finite is no improvement.

    Args:
      metric: a name among the row's values.
      patience: how many rows without improvement, ≥ 1.
      minimum_change: what counts as improvement, ≥ 0.
      mode: "min" or "max".
      split: the rows to look at: "validation" or "train".

    >>> hook = early_stopping(patience=2)
    >>> for step, loss in enumerate((1.0, 0.5, 0.6)):
    ...     hook({"split": "validation", "step": step, "loss": loss})
    >>> hook({"split": "validation", "step": 4, "loss": 0.7})
    Traceback (most recent call last):
        ...
    jdl.train.hooks.StopTraining: no better loss than 0.5 in the last 2 validations
    """
    check.positive_int("patience", patience)
    check.in_range("minimum_change", minimum_change, 0.0)
    check.one_of("mode", mode, ("min", "max"))
    sign = 1.0 if mode == "max" else -1.0

    def make(earlier: Sequence[Row]) -> Hook:
        best, since, last_step = -math.inf, 0, -1

        def count(row: Row) -> None:
            nonlocal best, since, last_step
            if row["step"] == last_step:  # a step evaluated twice is one validation
                return
            last_step = row["step"]
            value = sign * (math.nan if row[metric] is None else row[metric])
            better = math.isfinite(value) and value > best + minimum_change
            best, since = (value, 0) if better else (best, since + 1)

        def hook(row: Row) -> None:
            if row["split"] != split:
                return
            check.one_of("metric", metric, [k for k in row if k != "split"])
            value = row[metric]
            check.argument(value is None or is_number(value), f"row[{metric!r}]", "a number", value)
            count(row)
            if since >= patience:
                raise StopTraining(
                    f"no better {metric} than {sign * best:.4g} in the last {since} {split}s"
                )

        for row in earlier:
            value = row.get(metric, "none")
            if row.get("split") == split and (value is None or is_number(value)):
                count(row)
        return hook

    return Remembering(make, split)


def warn_of_idle(hooks: Sequence[Hook], keep_best: Any, *, validates: bool) -> None:
    """Says which of these have nothing to look at in a training."""
    made = {"train", *(["validation"] if validates else [])}
    splits = {split for h in hooks if isinstance(split := getattr(h, "split", None), str)}
    for split in sorted(splits - made):
        hint = " Give `validation`." if split == "validation" else ""
        told = "a hook such as early_stopping reads rows of split %r; this training logs none.%s"
        logger.warning(told, split, hint)
    if keep_best is not None and not validates:
        logger.warning("keep_best compares validations, of which there are none: give `validation`")


def parameter_histograms(path: str | Path, *, every: int = 1, bins: int = 40) -> Hook:
    """Writes a histogram of each parameter array at every `every`-th logged training row.

    It counts the array's finite values, as they are when the row is written: `row.estimator` may be
    a step or more ahead of the row.

    Each is a line `{"step", "parameter", "counts"[bins], "edges"[bins + 1]}` of the file, which is
    one run's: a run taken up again first drops from it the steps beyond its checkpoint, and for
    another run it is renamed to `NAME-1.jsonl` and begun anew.

    Args:
      path: the JSONL file.
      every: rows between two sets of histograms.
      bins: how many, of equal width between the smallest and the largest value.

    >>> import jdl, tempfile
    >>> line = jdl.from_fns(lambda key, x: jax.numpy.zeros((2, 1)), lambda w, x: x @ w)
    >>> data = jdl.data.from_arrays(np.eye(2, dtype="f"), np.ones((2, 1), "f"), batch_size=2)
    >>> loss = jdl.losses.squared_error
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hook = parameter_histograms(f"{folder}/histograms.jsonl", bins=3)
    ...     estimator = jdl.Estimator(line, loss, "sgd", hooks=[hook], log_every=1)
    ...     _ = estimator.train(data, steps=1)
    ...     sum(read_jsonl(f"{folder}/histograms.jsonl")[0]["counts"])
    2
    """
    check.positive_int("every", every)
    check.positive_int("bins", bins)
    path = Path(path).absolute()

    def make(earlier: Sequence[Row]) -> Hook:
        last_step = max((row["step"] for row in earlier), default=-1)
        file: JsonlWriter | None = None

        def begun() -> JsonlWriter:
            if last_step < 0 and read_jsonl(path):
                names = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(1))
                kept = path.rename(next(name for name in names if not name.exists()))
                logger.warning("the histograms of another run now lie in %s", kept)
            writer = JsonlWriter(path)
            writer.rewind(last_step)
            return writer

        def write(row: Any) -> None:
            nonlocal file
            if jax.process_index() != 0:
                return
            file = file or begun()
            for where, leaf in jax.tree.leaves_with_path(row.estimator.params):
                counts, edges = _histogram(np.asarray(leaf).astype(np.float64), bins)
                line = {
                    "step": row["step"],
                    "parameter": jax.tree_util.keystr(where, simple=True, separator="/"),
                    "counts": counts.tolist(),
                    "edges": edges.tolist(),
                }
                file.write(line)

        return _each_training_row(every, earlier, write)

    return Remembering(make, "train")


def _histogram(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    values = values[np.isfinite(values)]
    least, largest = (values.min(), values.max()) if values.size else (0.0, 1.0)
    if least == largest:  # numpy's own ± ½ is nothing beside a large number
        pad = 0.5 * max(1.0, abs(least))
        least, largest = least - pad, largest + pad
    return np.histogram(values, bins=bins, range=(least, largest))


def dead_units(batch: Batch, *, every: int = 1, inputs: str = "image") -> Hook:
    """Adds to training rows the share of ReLU units, by layer, that are 0 on a whole batch.

    A unit is an index of the activation's last axis: a channel, in a convolution. The entries are
    called `dead/<layer>`, layers numbered in the order in which the model computes them.

    Args:
      batch: the examples to look at, as the model is given them.
      every: rows between two measurements.
      inputs: the entry of the batch that the model is given.

    >>> import jdl
    >>> rows, x = [], np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    >>> data = jdl.data.from_arrays(x, np.arange(8) % 2, batch_size=8)
    >>> hooks = [dead_units({"image": x}), rows.append]
    >>> net = jdl.models.MLP(widths=(4,), num_outputs=2)
    >>> _ = jdl.classifier(net, "sgd", hooks=hooks, log_every=1).train(data, steps=1)
    >>> 0.0 <= rows[0]["dead/0"] <= 1.0
    True
    """
    check.positive_int("every", every)

    def measure(row: Any) -> None:
        estimator = row.estimator
        shares = dead.dead_shares(
            estimator.model, estimator.params, estimator.model_state, batch[inputs]
        )
        row.update({f"dead/{i}": float(share) for i, share in enumerate(shares)})

    return Remembering(lambda earlier: _each_training_row(every, earlier, measure), "train")


def _each_training_row(every: int, earlier: Sequence[Row], act: Hook) -> Hook:
    """Acts at every `every`-th row of training, those before included in the count."""
    seen = sum(row.get("split") == "train" for row in earlier)

    def hook(row: Row) -> None:
        nonlocal seen
        if row["split"] == "train":
            seen += 1
            if seen % every == 0:
                act(row)

    return hook


class RangeTest(NamedTuple):
    """Losses at growing learning rates.

    Attributes:
      rates: learning rates tried, ascending.
      losses: the loss met at each.
      suggestion: a tenth of the rate at which the loss was lowest.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float


def learning_rate_range_test(
    estimator: Any, data: Any, *, low: float = 1e-6, high: float = 1.0, steps: int = 100
) -> RangeTest:
    """Trains a copy at rates growing geometrically from `low` to `high` until the loss blows up.

    The Estimator itself stays as it is.

    Args:
      estimator: one whose optimizer keeps `learning_rate` in its state: any made by name, or
        wrapped in `optax.inject_hyperparams`.
      data: what it is to be trained on.
      low: the first rate, > 0.
      high: the last, > low.
      steps: how many rates.

    >>> import jdl
    >>> line = jdl.from_fns(lambda key, x: jax.numpy.zeros((2, 1)), lambda w, x: x @ w)
    >>> data = jdl.data.from_arrays(np.eye(2, dtype="f"), np.ones((2, 1), "f"), batch_size=2)
    >>> estimator = jdl.Estimator(line, jdl.losses.squared_error, "sgd")
    >>> found = learning_rate_range_test(estimator, data, low=1e-3, high=10.0, steps=20)
    >>> 0.01 < found.suggestion < 1.0
    True

    References:
      Smith, Cyclical learning rates for training neural networks (2017), section 3.3.
    """
    check.in_range("low", low, 0.0, open_low=True)
    check.argument(high > low, "high", f"above low={low}", high)
    check.positive_int("steps", steps)
    estimator.initialize(data)
    step, state, batches = estimator.scratch(data)
    rate = optax.tree.get(state.opt_state, "learning_rate", None)
    check.argument(
        rate is not None,
        "estimator",
        "one whose optimizer has learning_rate in its state",
        type(state.opt_state).__name__,
        "Take the optimizer by name, or wrap it in optax.inject_hyperparams.",
    )
    rates: list[float] = []
    losses: list[float] = []
    for wanted in np.geomspace(low, high, steps):
        opt_state = optax.tree.set(
            state.opt_state,
            learning_rate=jax.device_put(np.asarray(wanted, rate.dtype), rate.sharding),
        )
        batch = next(batches, None)
        if batch is None:
            raise check.DataError(
                f"The data ends after {len(rates)} batches; the test takes {steps}. Give data that "
                "repeats, or fewer steps."
            )
        state, logs = step(state._replace(opt_state=opt_state), batch)
        loss = float(logs["loss"])
        if not math.isfinite(loss) or (losses and loss > 4.0 * min(losses)):
            break
        rates.append(float(wanted))
        losses.append(loss)
    if not losses:
        raise check.TrainingError(f"The loss is not finite at learning rate {low} already.")
    return RangeTest(rates, losses, rates[int(np.argmin(losses))] / 10)


class Profile:
    """Traces the steps from `span[0]` to `span[1]` into `workdir/profile`; nothing without a span.

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
