"""Hooks: functions called with each row of a run's log, given to `Estimator(hooks=[…])`.

A row is `{"step", "seconds", "epoch", "split", values…}`; `row.estimator` is the Estimator that
made it, whose parameters may be a step or more ahead of the row. A hook that raises `StopTraining`
ends `train` as at its last step: it saves and returns. Any other exception ends it as an error.

A hook that remembers rows must be a `StatefulHook`, as those here are. A hook that reads the rows
of one split only may name it in an attribute `split`; `train` warns where it logs no such rows. A
hook with a method `compiled(estimator)` has it called in each `train`, before its first step.
"""

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.core.types import Batch
from jdl.train.dead_units import dead_shares
from jdl.train.log_row import Hook as Hook
from jdl.train.log_row import StopTraining as StopTraining
from jdl.train.step import scale_images
from jdl.train.writers import JsonlWriter, Row, is_number, read_jsonl

logger = logging.getLogger("jdl.train")


class StatefulHook:
    """A hook with a state for each run.

    The state is new in each run, persists over several calls of `train` of one Estimator, and
    forgets the steps after a checkpoint that the run went back to.

    `make(earlier)` returns a function of a row. It is called at the first row of each Estimator,
    and again after its run has gone back to a checkpoint. `earlier` are the rows of the run's log
    up to there, so that a resumed run has the same state as an uninterrupted one.

    Args:
      make: `make(earlier) -> hook`, with the state in the hook's closure.
      split: the only split whose rows count; None where several do.

    >>> def make(earlier):
    ...     losses = [row["loss"] for row in earlier]
    ...     def hook(row):
    ...         losses.append(row["loss"])
    ...         print(min(losses))
    ...     return hook
    >>> best_so_far = StatefulHook(make)
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
        run = getattr(row, "estimator", self)  # plain dicts belong to one run
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

    Validations in the log from before a restart count too, where they have the metric. A value
    that is not finite does not count as an improvement.

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
    jdl.train.log_row.StopTraining: no better loss than 0.5 in the last 2 validations
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

    return StatefulHook(make, split)


def parameter_histograms(path: str | Path, *, every: int = 1, bins: int = 40) -> Hook:
    """Writes a histogram of each parameter array at every `every`-th logged training row.

    A histogram counts the array's finite values at the time the row is written, which may be a step
    or more after the row's own.

    Each is a line `{"step", "parameter", "counts"[bins], "edges"[bins + 1]}` of the file. The file
    belongs to one run: a resumed run first drops the steps after its checkpoint, and another run
    renames the file to `NAME-1.jsonl` and begins a new one.

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

    return StatefulHook(make, "train")


def _histogram(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    values = values[np.isfinite(values)]
    least, largest = (values.min(), values.max()) if values.size else (0.0, 1.0)
    if least == largest:  # numpy's own range of ± ½ rounds to zero width at a large value
        pad = 0.5 * max(1.0, abs(least))
        least, largest = least - pad, largest + pad
    return np.histogram(values, bins=bins, range=(least, largest))


def dead_units(batch: Batch, *, every: int = 1, inputs: str = "image") -> Hook:
    """Adds to training rows, for each layer, the share of ReLU units that are 0 on a whole batch.

    A unit is an index of the activation's last axis: a channel, in a convolution. Entries are named
    `dead/<layer>`, with layers numbered in the order of computation.

    Args:
      batch: the examples to measure on, as for `Estimator.evaluate`; its mask leaves some out.
      every: rows between two measurements.
      inputs: the entry of the batch that the model takes.

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
        x = scale_images(batch, inputs)[inputs]
        x = x[np.asarray(batch["mask"]) > 0] if "mask" in batch else x
        run = row.estimator
        shares = dead_shares(run.model, run.params, run.model_state, x)
        row.update({f"dead/{i}": float(share) for i, share in enumerate(shares)})

    return StatefulHook(lambda earlier: _each_training_row(every, earlier, measure), "train")


def sharpness(batch: Batch, *, every: int = 1, **options: Any) -> Hook:
    """Adds to training rows the largest eigenvalue of the Hessian on a batch.

    The entry is `sharpness`; for Adam, RMSprop and K-FAC `preconditioned_sharpness` is that of the
    Hessian as their steps see it. See `jdl.curvature.SharpnessTracker`: one compiled call, of a
    product for each value where its last eigenvector still holds. At every 50th step, on a batch of
    the training's size, that added 6 % (SGD) and 10 to 11 % (Adam, its state 169,000 numbers three
    times) to the CPU time of an MLP of 1.2 ms a step once the training had settled. The first
    measurements take more products, up to a dozen: 40 % in the first 250 steps of a CNN.

    Args:
      batch: the examples to measure on, as the model takes them.
      every: rows between two measurements.
      **options: of `SharpnessTracker`, such as Adam's b1, b2 and eps.

    >>> import jdl
    >>> rows, x = [], np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    >>> data = {"image": x, "label": np.arange(8) % 2}
    >>> hooks = [sharpness(data), rows.append]
    >>> net = jdl.models.MLP(widths=(4,), num_outputs=2)
    >>> _ = jdl.classifier(net, "adam", hooks=hooks, log_every=1).train([data], steps=1)
    >>> 0.0 < rows[0]["sharpness"] < rows[0]["preconditioned_sharpness"]
    True
    """
    from jdl.curvature.tracking import SharpnessTracker  # slow to import

    check.positive_int("every", every)

    def make(earlier: Sequence[Row]) -> Hook:
        track, held = SharpnessTracker(**options), batch

        def measure(row: Any) -> None:
            nonlocal held
            run = row.estimator
            with run._run.lent():
                objective = run.objective(held)
                held = jax.tree.map(jnp.asarray, objective.batch)  # copied to the device once
                row.update(track(objective, run.params, run.state.opt_state))

        return _each_training_row(every, earlier, measure)

    return StatefulHook(make, "train")


def _each_training_row(every: int, earlier: Sequence[Row], act: Hook) -> Hook:
    """A hook that calls `act` at every `every`-th training row, `earlier` ones counted."""
    seen = sum(row.get("split") == "train" for row in earlier)

    def hook(row: Row) -> None:
        nonlocal seen
        if row["split"] == "train":
            seen += 1
            if seen % every == 0:
                act(row)

    return hook
