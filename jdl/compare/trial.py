"""One trial: an optimizer on a problem from a seed, through the Estimator, on the training clock.

Evaluations are at points fixed beforehand, the same for every optimizer and denser early. A step
expected to end beyond the budget is not started. A schedule of the learning rate ends with the
budget. With a directory, a trial that was killed resumes from its last checkpoint, which is less
than a minute old.
"""

import contextlib
import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl.compare.budget import Budget
from jdl.compare.feeds import Evaluation, Training, step_rows
from jdl.compare.optimizers import Entry
from jdl.compare.problems import Problem
from jdl.compare.results import EVALUATION, Row
from jdl.core import check
from jdl.core.model import as_model
from jdl.core.types import Batch
from jdl.optim import diagnostics, schedules
from jdl.train import step
from jdl.train.estimator import Estimator
from jdl.train.run_directory import NonFiniteError

logger = logging.getLogger("jdl.compare")

# Training aims to end this share of the budget early: a slower last step would otherwise cost the
# last evaluation, which does not count beyond the budget.
OVERRUN = 0.005
FULL_ROWS = 250  # this many steps and the next have a row each, then ever fewer: 1,300 of 20,000
SAVE_SECONDS, STRETCH_SECONDS = 45.0, 10.0  # between checkpoints; without a look at the clock


class Outcome(NamedTuple):
    """How a trial ended, and what was measured beside its rows; see `results.Trial`."""

    status: str
    words: str = ""
    compile_seconds: float = 0.0
    initial_params: str = ""  # a digest, equal for all optimizers of a seed; empty if resumed
    state_bytes: int | None = None
    evaluation_seconds: float | None = None  # of one, on average
    step_seconds: float | None = None
    gradient_seconds: float | None = None


class Task(NamedTuple):
    """A trial to run.

    Attributes:
      problem: what to solve.
      entry: the optimizer.
      seed: for the initial parameters.
      budget: of the trial.
      evaluations: how many, besides the one at step 0.
      devices: to train on, as for `Estimator`.
      clock: reads the training clock.
      cut: called with the row of each evaluation; whether to end the trial.
      gradient_seconds: `f(rows, train_on, params, model_state)`, the seconds of one gradient of
        such a batch; None not to measure them.
    """

    problem: Problem
    entry: Entry
    seed: int
    budget: Budget
    evaluations: int
    devices: Sequence[jax.Device] | None = None
    clock: Callable[[], float] = time.perf_counter
    cut: Callable[[Row], bool] = lambda row: False
    gradient_seconds: Callable[[int, Training, Any, Any], float] | None = None


def schedule(amount: float, evaluations: int) -> list[float]:
    """The points of evaluation: from ½ % of the budget on, each the same factor after the last.

    A cost to the target is then known to that factor.

    >>> [round(t, 2) for t in schedule(100.0, 4)]
    [0.5, 2.92, 17.1, 100.0]
    """
    factor = 200 ** (1 / max(evaluations - 1, 1))
    return [amount * factor ** (k - evaluations) for k in range(1, evaluations + 1)]


def run(
    task: Task,
    *,
    train_on: Training,
    evaluate: Evaluation,
    write: Callable[[Row], None],
    directory: Path | None = None,
) -> Outcome:
    """Runs one trial and writes its rows as they come.

    Args:
      task: the trial.
      train_on: the batches, see `feeds.training`.
      evaluate: the problem's evaluation.
      write: receives the rows of evaluations.
      directory: for checkpoints and the rows of steps; a trial cut short resumes from there. None
        keeps neither.
    """
    running = _Running(task, train_on, directory)
    estimator, budget = running.estimator, task.budget

    def measured() -> Row:
        with running.evaluating():
            values = evaluate(estimator.evaluation_params, estimator.model_state)
        row = running.row() | values
        write(row)
        return row

    if estimator.step == 0 and not math.isfinite(measured()["train_loss"]):
        return running.ended("diverged", "The loss of the initial parameters is not finite.")
    for point in schedule(budget.amount, task.evaluations):
        first = estimator.step == 0
        try:
            if not running.advance(point):
                continue
        except check.TrainingError as error:
            return running.ended("diverged", str(error))
        row = measured()
        if not math.isfinite(row["train_loss"]):
            words = f"The training loss is not finite at step {estimator.step}."
            return running.ended("diverged", words)
        if first and running.spent() > budget.amount * (1.0 + 1e-9):
            cost = running.step_cost
            took, needed = (budget.in_words(x) for x in (f"{cost:.3g}", f"{2 * cost:.2g}"))
            words = f"One step took {took}, more than the budget of {budget}: "
            return running.ended("budget", f"{words}give at least {needed}.")
        if task.cut(row):
            return running.ended("cut", "No better than the median of the earlier trials.")
    try:
        running.save()
    except NonFiniteError as error:
        return running.ended("diverged", str(error))
    return running.ended("done")


class _Running:
    """The Estimator of a trial, and its cost so far."""

    def __init__(self, task: Task, train_on: Training, directory: Path | None):
        problem, entry = task.problem, task.entry
        self._task, self._train_on = task, train_on
        self._budget, self._data = task.budget, train_on.data
        self._evaluations: list[float] = []  # seconds of each
        self._passes = step_rows(problem, entry) / problem.size  # over the data, by one step
        optimizer = entry.make()
        if entry.is_scheduled:
            by_rate = bool(entry.of) and entry.of not in schedules.BY_STEP
            optimizer = schedules.scheduled(optimizer, by_rate=by_rate)
        shape = _state_shape(problem, optimizer, self._data)
        self._has_diagnostics = diagnostics.read(shape) is not None
        kind, equal = task.budget.kind, not self._has_diagnostics
        self._equal_steps = kind in ("steps", "epochs") or (kind == "work" and equal)
        cost = 1.0 if kind == "steps" else self._passes
        steps = task.budget.amount / cost if self._equal_steps else schedules.PIECES
        self._pieces = max(1.0, min(schedules.PIECES, steps))  # with a learning rate each
        self.estimator = Estimator(
            problem.model(),
            problem.loss,
            optimizer,
            workdir=directory,
            seed=task.seed,
            inputs=problem.inputs,
            regularizer=problem.regularizer,
            microbatches=train_on.microbatches,
            curvature_batch_size=_curvature_rows(problem, entry),
            devices=task.devices,
            log_every=1 if self._has_diagnostics else 1 << 30,
            keep=1,
            steps_per_dispatch=1,  # budgets and schedules in seconds look at the clock each step
            clock=task.clock,
        )
        self.estimator.initialize(self._data)
        self._digest = "" if self.estimator.step else _digest(self.estimator.params)
        self._saved = time.monotonic()
        self.step_cost = 0.0  # of the last steps, in the budget's unit

    def ended(self, status: str, words: str = "") -> Outcome:
        estimator, task, times = self.estimator, self._task, self._evaluations
        gradient = None
        if task.gradient_seconds is not None:
            rows, state = step_rows(task.problem, task.entry), estimator.state
            gradient = task.gradient_seconds(rows, self._train_on, state.params, state.model_state)
        return Outcome(
            status,
            words,
            estimator.compile_seconds,
            self._digest,
            sum(
                x.addressable_shards[0].data.nbytes
                for x in jax.tree.leaves(estimator.state.opt_state)
            ),
            statistics.mean(times[1:] or times) if times else None,  # the first may compile
            estimator.seconds / estimator.step if estimator.step else None,
            gradient,
        )

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measures the seconds of an evaluation, which is not on the training clock."""
        began = self._task.clock()
        yield
        self._evaluations.append(self._task.clock() - began)

    def save(self) -> None:
        try:
            self.estimator.save()
        except NonFiniteError:
            raise
        except check.TrainingError as error:  # the trial continues, but could not be resumed
            logger.warning("%s", error)

    def row(self) -> Row:
        """The costs so far, as columns of an evaluation's row."""
        return {
            "step": self.estimator.step,
            "seconds": self.estimator.seconds,
            "epoch": self.estimator.step * self._passes,
            "split": EVALUATION,
            "work": self._work(),
        }

    def spent(self) -> float:
        """The cost so far, in the budget's unit."""
        counts = {
            "seconds": self.estimator.seconds,
            "steps": self.estimator.step,
            "epochs": self.estimator.step * self._passes,
        }
        kind = self._budget.kind
        return float(counts[kind]) if kind in counts else self._work()

    def advance(self, point: float) -> bool:
        """Trains until the cost is `point`; False if no step was made.

        That is where a long step has passed the point already, or the next one is expected to end
        beyond the budget.
        """
        before = self.estimator.step
        if before and self.spent() >= point * (1.0 - 1e-9):
            return False
        if self._budget.kind == "seconds":
            self._train_seconds(point)
        else:
            self._train_counted(point)
        return self.estimator.step > before

    def _train_seconds(self, point: float) -> None:
        estimator, amount = self.estimator, self._budget.amount
        before, began = estimator.step, estimator.seconds
        until = min(point, amount - self.step_cost - OVERRUN * amount)
        if before and began >= until:
            return
        while estimator.step == before or estimator.seconds < until:
            left = min(until, self._piece()[1] * (1.0 - 1e-9)) - estimator.seconds
            self._train(seconds=max(min(left, STRETCH_SECONDS), 1e-9))
        self.step_cost = (estimator.seconds - began) / (estimator.step - before)

    def _train_counted(self, point: float) -> None:
        amount = self._budget.amount
        while (began := self.spent()) < point * (1.0 - 1e-9):
            before, steps = self.estimator.step, 1
            if before and began + self.step_cost > amount * (1.0 + 1e-9):
                return
            if self.step_cost and self._equal_steps:
                within = math.floor((amount - began) / self.step_cost + 1e-6)
                until = min(point, self._piece()[1])
                steps = min(math.ceil((until - began) / self.step_cost - 1e-6), within)
            self._train(steps=max(steps, 1), seconds=STRETCH_SECONDS)
            self.step_cost = (self.spent() - began) / (self.estimator.step - before)

    def _piece(self) -> tuple[float, float]:
        """The middle of the present piece of the schedule, as a share, and the cost at its end."""
        if not self._task.entry.is_scheduled:
            return 0.0, math.inf
        share = self.spent() / self._budget.amount
        k = min(math.floor(share * self._pieces + 1e-6), math.ceil(self._pieces) - 1)
        return min((k + 0.5) / self._pieces, 1.0), (k + 1) / self._pieces * self._budget.amount

    def _train(self, **limit: Any) -> None:
        entry = self._task.entry
        if entry.is_scheduled:
            by = schedules.factor(entry.schedule, entry.warmup, self._piece()[0], entry.decay_to)
            self.estimator._run.set_in_optimizer(schedule_factor=jnp.asarray(by, jnp.float32))
        if self._has_diagnostics:
            self.estimator.log_every = max(1, self.estimator.step // FULL_ROWS)
        self.estimator.train(self._data, save=False, **limit)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()
            self._saved = time.monotonic()

    def _work(self) -> float:
        step = self.estimator.step
        return gradients_of_work(self.estimator.state.opt_state, step) * self._passes


def gradients_of_work(opt_state: Any, steps: int) -> float:
    """The cost of the steps so far, in gradients of their batch.

    From the optimizer's own count, `Diagnostics.gradient_equivalents`; else one gradient per step.
    """
    account = diagnostics.read(opt_state)
    return float(steps if account is None else account.gradient_equivalents)


def _curvature_rows(problem: Problem, entry: Entry) -> int | None:
    """The size of the curvature batch; None where it would be no smaller than the batch."""
    size = entry.curvature_batch_size
    return None if size is None or size >= step_rows(problem, entry) else size


def _state_shape(problem: Problem, optimizer: Any, data: Iterable[Batch]) -> Any:
    program = step.build(as_model(problem.model()), problem.loss, optimizer, inputs=problem.inputs)
    batch = next(iter(data))
    return jax.eval_shape(program.init, jax.random.key(0), batch).opt_state


def _digest(params: Any) -> str:
    """A short fingerprint of all the numbers."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        sha.update(np.ascontiguousarray(jnp.asarray(leaf)).tobytes())
    return sha.hexdigest()[:12]
