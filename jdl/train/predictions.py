"""A data set's predictions as named rows, in constant memory."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jdl.core import check
from jdl.core.objective import batch_size
from jdl.core.types import Batch, Outputs
from jdl.train.estimator import Estimator
from jdl.train.feed import Data, entries, one_pass, opened
from jdl.train.tables import open_table

Columns = Callable[[Batch, Outputs], Mapping[str, Any]]


class Predicted(NamedTuple):
    """The predictions of one batch's records; rows that are padding or unreadable are left out.

    Attributes:
      names: the records' names; their numbers, as text, for data that has no names.
      batch: their rows of the batch.
      outputs: what the Estimator predicts for them.
    """

    names: list[str]
    batch: Batch
    outputs: Outputs


def predictions(estimator: Estimator, data: Data) -> Iterator[Predicted]:
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
    path: str | Path, estimator: Estimator, data: Data, columns: Columns | None = None
) -> int:
    """Writes a row a record to an `.npz`, `.jsonl` or `.csv` file: its name and its predictions.

    Args:
      path: the file; it appears when it is whole.
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
    """One pass of a data set, each row with the number of its record."""

    def __init__(self, data: Any):
        self._data = opened(data)

    def __iter__(self) -> Iterator[Batch]:
        # A pass by `once` is in the records' own order, its last batch padded to full size.
        at = 0
        for batch in one_pass(self._data):
            arrays, texts = entries(batch)
            rows = batch_size(arrays | texts)
            yield {**batch, _RECORD: np.arange(at, at + rows, dtype=np.int32)}
            at += rows


def _entries(batch: Batch, outputs: Outputs) -> Mapping[str, Any]:
    del batch
    found = jax.tree.leaves_with_path(outputs)
    if len(found) == 1 and not found[0][0]:
        return {"output": outputs}
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}
