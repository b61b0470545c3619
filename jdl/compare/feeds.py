"""The data of a study's trials: batches to train on, and one evaluation shared by all."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from jdl.compare.optimizers import Entry
from jdl.compare.problems import Data, Problem
from jdl.core import check
from jdl.core.model import as_model
from jdl.core.objective import Objective
from jdl.core.types import Batch
from jdl.train import parallel, step
from jdl.train.step import as_floats

EVALUATION_BATCH = 1024
HELD_BYTES = 1 << 30  # larger evaluation data is read again at each evaluation
MICROBATCH_NUMBERS = 1 << 22  # in the inputs of one batch of evaluation
MICROBATCH_BYTES = 2 << 30  # kept for the gradient of one slice of a full batch


class Training(NamedTuple):
    """The batches an entry trains on, and the number of slices of each."""

    data: Iterable[Batch]
    microbatches: int


def training(
    problem: Problem, entry: Entry, seed: int, devices: Sequence[jax.Device] | None = None
) -> Training:
    """The batches of an entry, in the same order for all with the same seed and batch size."""
    if (rows := step_rows(problem, entry)) < problem.size:
        return Training(problem.train(rows, seed, None), entry.microbatches or 1)
    # The order within a full batch changes sums by rounding only: one for all seeds.
    whole = next(iter(problem.train(problem.size, 0, 1)))
    slices = entry.microbatches or -(-problem.size * kept_bytes(problem) // MICROBATCH_BYTES)
    placement = parallel.placement(devices)
    # Equal slices, filled up with masked examples.
    share = slices * placement.num_devices
    if problem.size % share:
        (whole,) = _padded([whole], -(-problem.size // share) * share)
    return Training(Repeated(placement.put_batch(whole)), slices)


def step_rows(problem: Problem, entry: Entry) -> int:
    """The number of examples of a step: the batch size, or all there are."""
    return problem.size if entry.batch_size == "full" else min(entry.batch_size, problem.size)


def kept_bytes(problem: Problem) -> int:
    """The bytes that the gradient of the loss keeps of the forward pass, for each example."""
    model = as_model(problem.model())
    names = (problem.inputs,) if isinstance(problem.inputs, str) else problem.inputs

    def backward(key: Any, batch: Batch) -> Any:
        batch = step.scale_images(batch, problem.inputs)
        given = [batch[name] for name in names]
        params, state = model.init(key, *given)

        def loss(params: Any) -> Any:
            return problem.loss(model.apply(params, state, *given, key=key, train=True)[0], batch)

        return jax.vjp(loss, params)[1]

    one = next(iter(problem.train(1, 0, 1)))
    sizes = []
    for rows in (1, 2):  # the difference is free of the parameters
        batch = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in one.items()}
        kept = jax.tree.leaves(jax.eval_shape(backward, jax.random.key(0), batch))
        sizes.append(sum(x.size * x.dtype.itemsize for x in kept))
    return max(1, sizes[1] - sizes[0])


def _numbers(problem: Problem) -> int:
    """The number of array elements of one example."""
    batch = next(iter(problem.train(1, 0, 1)))
    names = (problem.inputs,) if isinstance(problem.inputs, str) else problem.inputs
    return max(1, sum(np.size(batch[name]) for name in names))


class Repeated:
    """One batch over and over, held on the device: the data of a full-batch method."""

    steps_per_epoch = 1

    def __init__(self, batch: Batch):
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self._batch)


class Evaluation:
    """The loss and the metrics on training and other data: one program for all optimizers.

    Compiled once for each problem.

    Args:
      problem: of the model, loss and metrics.
      devices: as for `Estimator`.
      splits: name -> data; by default the problem's training and test data.
    """

    def __init__(
        self,
        problem: Problem,
        devices: Sequence[jax.Device] | None = None,
        splits: Mapping[str, Data] | None = None,
    ):
        placement = parallel.placement(devices)
        rows = min(EVALUATION_BATCH, problem.size, max(1, MICROBATCH_NUMBERS // _numbers(problem)))
        rows = -(-rows // placement.num_devices) * placement.num_devices
        self._evaluate = jax.jit(
            step.build(
                as_model(problem.model()),
                problem.loss,
                optax.identity(),
                metrics=problem.metrics,
                inputs=problem.inputs,
            ).evaluate
        )
        self._data = {
            split: _passes(factory, rows, placement.put_batch)
            for split, factory in (splits or problem.evaluated()).items()
        }
        self._penalty = None if problem.regularizer is None else jax.jit(problem.regularizer)

    def __call__(self, params: Any, model_state: Any) -> dict[str, float]:
        """{"train_loss": …, "test_loss": …, "train_<metric>": …, "test_<metric>": …}."""
        values: dict[str, float] = {}
        for split, batches in self._data.items():
            sums: dict[str, float] = {}
            count = 0.0
            for batch in batches:
                found, examples = self._evaluate(params, model_state, batch)
                for name, value in as_floats(found).items():
                    sums[name] = sums.get(name, 0.0) + value
                count += float(examples)
            if count == 0:
                raise check.DataError(f"The {split} data has no examples.")
            values |= {f"{split}_{name}": value / count for name, value in sums.items()}
        if self._penalty is not None:
            values["train_loss"] += float(self._penalty(params))
        return values


def gradient_seconds(
    problem: Problem,
    train_on: Training,
    params: Any,
    model_state: Any,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The seconds of one value and gradient of a batch, compiled: the fastest of a few.

    Args:
      problem: of the model and the loss.
      train_on: whose first batch is used.
      params: where to take the gradient.
      model_state: as of the model.
      clock: reads the time.
    """
    model = as_model(problem.model())

    @jax.jit
    def value_and_grad(params: Any, model_state: Any, batch: Batch) -> Any:
        objective = Objective(
            model,
            problem.loss,
            model_state,
            step.scale_images(batch, problem.inputs),
            key=jax.random.key(0),
            inputs=problem.inputs,
            regularizer=problem.regularizer,
            microbatches=train_on.microbatches,
        )
        return objective.value_and_grad(params)[:2]

    batch = jax.device_put(next(iter(train_on.data)))
    jax.block_until_ready(value_and_grad(params, model_state, batch))
    found: list[float] = []
    while len(found) < 3 or (len(found) < 20 and sum(found) < 0.2):
        began = clock()
        jax.block_until_ready(value_and_grad(params, model_state, batch))
        found.append(clock() - began)
    return min(found)


Put: TypeAlias = Callable[[Batch], Batch]


def _passes(factory: Data, rows: int, put: Put) -> Iterable[Batch]:
    """Batches to iterate over repeatedly: held in memory if small enough, else read each time."""
    held: list[Batch] = []
    size = 0
    for batch in _padded(factory(rows, 0, 1), rows):
        size += sum(x.nbytes for x in batch.values())
        if size > HELD_BYTES:
            return _Reread(factory, rows, put)
        held.append(put(batch))
    return held


class _Reread:
    def __init__(self, factory: Data, rows: int, put: Put):
        self._factory, self._rows, self._put = factory, rows, put

    def __iter__(self) -> Iterator[Batch]:
        return map(self._put, _padded(self._factory(self._rows, 0, 1), self._rows))


def _padded(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The batches filled up to `size` examples, so that one compiled program serves all.

    They are filled with their own examples, whose mask is 0, so that the statistics of batch
    normalization in training are not those of zeros.
    """
    for batch in batches:
        number = len(next(iter(batch.values())))
        filled = {"mask": np.ones(number, np.float32), **batch}
        filled = {name: x[np.arange(size) % number] for name, x in filled.items()}
        filled["mask"][number:] = 0.0
        yield filled
