"""The step, compiled before the loop, once for each shape of batch, alone or several at once."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from jdl.core import check
from jdl.core.objective import batch_size
from jdl.core.types import Batch
from jdl.train import dispatch
from jdl.train.dispatch import Stack, one_of, shapes_of
from jdl.train.parallel import Placement
from jdl.train.step import Logs, TrainState

logger = logging.getLogger("jdl.train")

Step = Callable[[TrainState, Any], tuple[TrainState, Logs]]  # of a batch, or a stack of them


class CompiledSteps:
    """Compiles a step for each shape of batch.

    Args:
      train: the pure step.
      placement: where it runs.
      off_clock: a context that stops the training clock, for a compilation during training.

    Attributes:
      seconds: time spent compiling.
    """

    def __init__(
        self,
        train: Step,
        placement: Placement,
        off_clock: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._train, self._placement, self._off_clock = train, placement, off_clock
        self._steps: dict[str, tuple[Step, Any]] = {}
        self._plan: Any = None  # the bytes of a batch, and XLA's memory analysis of its step
        self.seconds = 0.0

    def choose_length(self, state: TrainState, batch: Batch, most: int) -> int:
        """The steps in one dispatch, see `dispatch.chosen_length`; 1 but on one CPU."""
        if most == 1 or not self._placement.is_host:
            return 1
        return dispatch.chosen_length(self._placement.lower_step(self._train, state, batch), most)

    def for_batch(self, state: TrainState, batch: Batch | Stack) -> Step:
        """The step for batches of this shape; it reuses the memory of the state it takes.

        For a batch, or stack, of another size, and all else the same, it is compiled once more.
        """
        signature = _signature(batch)
        if signature not in self._steps:
            start = time.perf_counter()
            train = dispatch.repeated(self._train) if isinstance(batch, Stack) else self._train
            lowered = self._placement.lower_step(train, state, *_args(batch))
            dispatch.refuse_changed_types(state, lowered.out_info[0])
            compiled = lowered.compile()
            step = self._any_size(compiled, shapes_of(batch))
            nbytes = sum(x.nbytes for x in jax.tree.leaves(_args(batch)))
            plan = nbytes // self._placement.num_devices, compiled.memory_analysis()
            self._steps[signature] = step, plan
            self.seconds += time.perf_counter() - start
        step, self._plan = self._steps[signature]
        return step

    def _any_size(self, compiled: Any, shapes: Any) -> Step:
        def step(state: TrainState, batch: Batch | Stack) -> tuple[TrainState, Logs]:
            try:
                stepped: tuple[TrainState, Logs] = compiled(state, *_args(batch))
                return stepped
            except TypeError as error:
                found = shapes_of(batch)
                if found == shapes:
                    raise
                if _of_an_example(found) != _of_an_example(shapes):
                    raise check.DataError(
                        f"A batch differs from the first one: it has {found}, the first had "
                        f"{shapes}. Only the number of examples may change."
                    ) from error
            if _signature(batch) not in self._steps:
                size = batch_size(one_of(batch), self._placement.inputs)
                logger.warning("a batch of %d examples: one more compilation of the step", size)
            plan = self._plan
            with self._off_clock():
                other = self.for_batch(state, batch)
            self._plan = plan
            return other(state, batch)

        return step

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that training needs on each device, see `jdl.Estimator.memory`."""
        batch, plan = self._plan or (0, None)
        if plan is None:
            return {}
        reused = plan.alias_size_in_bytes
        found = {
            "state": max(reused, plan.argument_size_in_bytes - batch),
            "batches": 3 * batch,  # as many as the loop holds
            "temporaries": plan.temp_size_in_bytes + plan.output_size_in_bytes - reused,
        }
        found["peak"] = sum(found.values())
        # A process knows the memory of its own devices alone.
        own = [d for d in self._placement.devices if d.process_index == jax.process_index()]
        stats = own[0].memory_stats() or {}
        seen = {"seen": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
        return found | seen


def _of_an_example(shapes: Any) -> Any:
    """The shapes of a batch, without its leading axis."""
    is_leaf = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], str)  # noqa: E731
    return jax.tree.map(lambda x: (x[0][1:], x[1]), shapes, is_leaf=is_leaf)


def _args(batch: Batch | Stack) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, Stack) else (batch,)


def _signature(batch: Batch | Stack) -> str:
    return str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), _args(batch)))
