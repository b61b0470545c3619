"""The model's outputs for every example of a pass over data."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdl.core import check
from jdl.core.types import Batch, ModelState, Outputs, Params
from jdl.train.feed import EMPTY
from jdl.train.parallel import own_rows
from jdl.train.run import EvalBatch

Predict = Callable[[Params, ModelState, Batch], Outputs]


class Predictor:
    """Predicts with one function.

    Args:
      predict: pure.
      inputs: the entries of the batch that it reads, or the only one.
    """

    def __init__(self, predict: Predict, inputs: str | Iterable[str]):
        self._predict = jax.jit(predict)
        self._inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)

    def pairs(self, batches: Iterable[EvalBatch]) -> Iterator[tuple[Batch, Outputs]]:
        """Pairs (batch, outputs) on the host: this process's rows, without padding."""
        for batch, params, model_state, texts in batches:
            host = own_rows((dict(batch), self._predict(params, model_state, batch)))
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
        from jdl.train.export import save

        first = next(iter(batches), None)
        if first is None:
            raise check.DataError("The data holds no example to take the inputs' shapes from.")
        params, model_state = jax.device_get((first.params, first.model_state))
        inputs = {name: first.batch[name] for name in self._inputs}
        return save(path, self._predict, params, model_state, inputs, **options)
