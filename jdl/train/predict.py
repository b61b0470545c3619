"""Predictions for every example of a pass over data: as arrays, batch by batch, or in a file."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jdl.core import check
from jdl.core.objective import batch_size
from jdl.core.types import Batch, ModelState, Outputs, Params
from jdl.train import export
from jdl.train.feed import EMPTY, Data, entries, one_pass, opened
from jdl.train.parallel import own_examples
from jdl.train.run import EvalBatch
from jdl.train.tables import open_table

Predict = Callable[[Params, ModelState, Batch], Outputs]
Columns = Callable[[Batch, Outputs], Mapping[str, Any]]


class Predictor:
    """Predicts with one function.

    Args:
      predict: `predict(params, model_state, batch) -> outputs`, pure.
      inputs: the entries of the batch that it reads, or the only one.
    """

    def __init__(self, predict: Predict, inputs: str | Iterable[str]):
        self._predict = jax.jit(predict)
        self._inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)

    def pairs(self, batches: Iterable[EvalBatch]) -> Iterator[tuple[Batch, Outputs]]:
        """Pairs (batch, outputs) on the host: this process's examples, without padding."""
        for batch, params, model_state, texts in batches:
            host = own_examples((dict(batch), self._predict(params, model_state, batch)))
            host[0].update(texts)
            mask = host[0].get("mask")
            kept = slice(None) if mask is None else mask > 0
            yield jax.tree.map(lambda x, kept=kept: x[kept], host)

    def whole(self, batches: Iterable[EvalBatch]) -> Outputs:
        """All outputs, in order, as NumPy arrays with leading axis N."""
        parts = [outputs for _, outputs in self.pairs(batches)]
        if not parts:
            raise check.DataError(f"The data to predict holds no example: {EMPTY}.")
        return jax.tree.map(lambda *parts: np.concatenate(parts), *parts)

    def export(self, path: str | Path, batches: Iterable[EvalBatch], **options: Any) -> Path:
        """Writes function and parameters to a file, see `jdl.train.export.save`."""
        first = next(iter(batches), None)
        if first is None:
            raise check.DataError("The data holds no example to take the inputs' shapes from.")
        params, model_state = jax.device_get((first.params, first.model_state))
        inputs = {name: first.batch[name] for name in self._inputs}
        return export.save(path, self._predict, params, model_state, inputs, **options)


@runtime_checkable
class PredictsBatches(Protocol):
    """A `jdl.Estimator`, as far as predictions need it."""

    def predict_batches(self, data: Data) -> Iterator[tuple[Batch, Outputs]]:
        """Pairs (batch, outputs)."""


class Predicted(NamedTuple):
    """The predictions for one batch's records, without padding and unreadable records.

    Attributes:
      names: the records' names; their numbers, as text, for data without names.
      batch: the records' entries.
      outputs: the Estimator's predictions for them.
    """

    names: list[str]
    batch: Batch
    outputs: Outputs


def predictions(estimator: PredictsBatches, data: Data) -> Iterator[Predicted]:
    """The predictions of one pass of the data, batch by batch, with the records' names.

    Args:
      estimator: a trained one.
      data: as for `Estimator.predict`.
    """
    check.argument(
        jax.process_count() == 1, "jax.process_count()", "1 to predict", jax.process_count()
    )
    name = getattr(getattr(data, "source", None), "name", str)
    for batch, outputs in estimator.predict_batches(_Numbered(data)):
        rest = dict(batch)
        yield Predicted([name(int(i)) for i in rest.pop(_RECORD)], rest, outputs)


def write_predictions(
    path: str | Path, estimator: PredictsBatches, data: Data, columns: Columns | None = None
) -> int:
    """Writes names and predictions, a row for each record, to an `.npz`, `.jsonl` or `.csv` file.

    Args:
      path: the file; it appears when it is complete.
      estimator: a trained one.
      data: as for `Estimator.predict`.
      columns: `columns(batch, outputs) -> {column: array}`, on the host; by default the outputs'
        own entries, or `output` for a single array.

    Returns:
      The number of rows.
    """
    columns = columns or _entries
    count = 0
    with open_table(path) as table:
        for names, batch, outputs in predictions(estimator, data):
            if names:
                table.write({"name": names, **columns(batch, outputs)})
            count += len(names)
        if not count:
            raise check.DataError("The data to predict holds no example.")
    return count


_RECORD = "record number"


class _Numbered:
    """One pass of a data set, each example with the number of its record."""

    def __init__(self, data: Data):
        self._data = opened(data)

    def __iter__(self) -> Iterator[Batch]:
        # A pass by `once` is in the records' own order, its last batch padded to full size.
        at = 0
        for batch in one_pass(self._data):
            arrays, texts = entries(batch)
            size = batch_size(arrays | texts)
            yield {**batch, _RECORD: np.arange(at, at + size, dtype=np.int32)}
            at += size


def _entries(batch: Batch, outputs: Outputs) -> Mapping[str, Any]:
    del batch
    found = jax.tree.leaves_with_path(outputs)
    if len(found) == 1 and not found[0][0]:
        return {"output": outputs}
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}
