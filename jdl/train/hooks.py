"""What to do at each row of a run's log: plain functions, given to `Estimator(hooks=[…])`.

A hook is called with one row, `{"step", "seconds", "epoch", "split", values…}`; `row.estimator` is
the Estimator that made it, whose parameters may be a step or more ahead of the row. One that raises
`StopTraining` ends `train` in good order; whatever else it raises ends it as an error.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

from jdl.core import check
from jdl.core.types import Batch
from jdl.train import relu
from jdl.train.writers import read_jsonl

if TYPE_CHECKING:
    from jdl.train.estimator import Estimator

logger = logging.getLogger("jdl.train")


class Report(dict[str, Any]):
    """One row of a run's log: step, seconds, epoch, split and the values."""

    estimator: "Estimator"


Hook = Callable[[Any], None]


class StopTraining(Exception):
    """Raised by a hook: `train` saves and returns."""


def early_stopping(
    metric: str = "loss",
    *,
    patience: int = 5,
    minimum_change: float = 0.0,
    mode: str = "min",
    split: str = "validation",
) -> Hook:
    """Ends training when `metric` has not improved for `patience` validations.

    Validations that the run's log holds from before it was taken up again are counted too.

    Args:
      metric: a name among the row's values.
      patience: how many rows without improvement, ≥ 1.
      minimum_change: what counts as improvement, ≥ 0.
      mode: "min" or "max".
      split: the rows to look at.

    >>> hook = early_stopping(patience=2)
    >>> for loss in (1.0, 0.5, 0.6):
    ...     hook({"split": "validation", "step": 1, "loss": loss})
    >>> hook({"split": "validation", "step": 4, "loss": 0.7})
    Traceback (most recent call last):
        ...
    jdl.train.hooks.StopTraining: no better loss than 0.5 in the last 2 validations
    """
    check.positive_int("patience", patience)
    check.in_range("minimum_change", minimum_change, 0.0)
    check.one_of("mode", mode, ("min", "max"))
    sign = 1.0 if mode == "max" else -1.0
    best, since, taken_up = -math.inf, 0, False

    def count(row: Mapping[str, Any]) -> None:
        nonlocal best, since
        if row["split"] != split:
            return
        check.one_of("metric", metric, [k for k in row if k != "split"])
        better = sign * row[metric] > best + minimum_change
        best, since = (sign * row[metric], 0) if better else (best, since + 1)

    def hook(row: Mapping[str, Any]) -> None:
        nonlocal taken_up
        if not taken_up:
            taken_up = True
            for earlier in _logged_before(row):
                count(earlier)
        count(row)
        if row["split"] == split and since >= patience:
            raise StopTraining(
                f"no better {metric} than {sign * best:.4g} in the last {since} {split}s"
            )

    return hook


def _logged_before(row: Any) -> list[dict[str, Any]]:
    """The rows of earlier steps in the log of the run that this one is of."""
    workdir = getattr(getattr(row, "estimator", None), "workdir", None)
    if workdir is None:
        return []
    return [r for r in read_jsonl(workdir / "metrics.jsonl") if r["step"] < row["step"]]


def parameter_histograms(path: str | Path, *, every: int = 1, bins: int = 40) -> Hook:
    """Writes a histogram of each parameter array at every `every`-th logged training row.

    Each is a line `{"step", "parameter", "counts"[bins], "edges"[bins + 1]}` of the file.

    Args:
      path: the JSONL file to append to.
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
    ...     sum(json.loads(Path(folder, "histograms.jsonl").read_text())["counts"])
    2
    """
    due = _each_training_row(every)
    check.positive_int("bins", bins)
    path = Path(path)

    def hook(row: Any) -> None:
        if not due(row):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for where, values in jax.tree.leaves_with_path(row.estimator.params):
                counts, edges = np.histogram(np.asarray(values, np.float32), bins=bins)
                line = {
                    "step": row["step"],
                    "parameter": jax.tree_util.keystr(where, simple=True, separator="/"),
                    "counts": counts.tolist(),
                    "edges": edges.tolist(),
                }
                file.write(json.dumps(line) + "\n")

    return hook


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
    due = _each_training_row(every)

    def hook(row: Any) -> None:
        if not due(row):
            return
        estimator = row.estimator
        shares = relu.dead_shares(
            estimator.model, estimator.params, estimator.model_state, batch[inputs]
        )
        row.update({f"dead/{i}": float(share) for i, share in enumerate(shares)})

    return hook


def _each_training_row(every: int) -> Callable[[Mapping[str, Any]], bool]:
    """Tells whether to do something at a row: at every `every`-th of training."""
    check.positive_int("every", every)
    seen = 0

    def due(row: Mapping[str, Any]) -> bool:
        nonlocal seen
        if row["split"] != "train":
            return False
        seen += 1
        return seen % every == 0

    return due


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
