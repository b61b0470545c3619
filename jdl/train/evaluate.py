"""Evaluation: the mean loss and metrics of a pass over data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jdl.core import check
from jdl.core.objective import asked
from jdl.core.types import Batch, Outputs, Params
from jdl.train.feed import EMPTY
from jdl.train.parallel import Placement
from jdl.train.run import EvalBatch
from jdl.train.step import Program, as_floats

Sums = Mapping[str, Callable[[Outputs, Batch], jax.Array]]


class Evaluator:
    """Evaluates a program, compiled once for each set of sums.

    Args:
      program: the pure functions.
      placement: where they run.
    """

    def __init__(self, program: Program, placement: Placement):
        self._program, self._placement = program, placement
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def over(
        self, batches: Iterable[EvalBatch], sums: Sums
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The means over all examples, and the sums as float64 arrays.

        Args:
          batches: of one pass.
          sums: name -> `function(outputs, batch) -> array`, to be summed over batches.
        """
        totals: dict[str, float] = {}
        tables: dict[str, Any] = {}
        count = 0.0
        evaluate = self.compiled(sums)
        for batch, params, model_state, _ in batches:
            (found, examples), of_batch = evaluate(params, model_state, batch)
            for key, value in as_floats(found).items():
                totals[key] = totals.get(key, 0.0) + value
            for key, table in jax.device_get(of_batch).items():
                tables[key] = tables.get(key, 0.0) + np.asarray(table, np.float64)
            count += float(examples)
        if count == 0:
            raise check.DataError(f"The evaluation data holds no example: {EMPTY}.")
        check.argument(
            not tables.keys() & totals.keys(),
            "sums",
            f"named other than {list(totals)}",
            list(tables),
        )
        return {key: value / count for key, value in totals.items()}, tables

    def compiled(self, sums: Sums) -> Callable[..., Any]:
        """The compiled evaluation of a batch; `sums` share its forward pass."""
        named = tuple(sums.items())
        if named not in self._compiled:
            program = self._program

            def evaluate(params: Params, model_state: Any, batch: Batch) -> Any:
                found = program.evaluate(params, model_state, batch)
                # XLA merges this forward pass with the one above.
                outputs = program.predict(params, model_state, batch) if named else None
                return found, {
                    name: asked(function, f"sums[{name!r}]", outputs, batch)
                    for name, function in named
                }

            # Replicated, so that each of several processes can read it.
            whole = self._placement.state
            self._compiled[named] = jax.jit(evaluate, out_shardings=whole)
        return self._compiled[named]
