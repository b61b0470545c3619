"""One trial: an optimizer on a problem from a seed, through the Estimator, on the training clock.

Evaluations lie at times fixed beforehand, the same for every optimizer and denser early; a step
that would end beyond the budget is not begun, as far as the last ones tell. With a directory, a
trial that was killed goes on from its last checkpoint, less than a minute old.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
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
from jdl.optim import diagnostics
from jdl.train import step
from jdl.train.estimator import Estimator
from jdl.train.run_directory import NonFiniteError

logger = logging.getLogger("jdl.compare")

# Training aims at an end this share of the budget early: a dearer last step or a hiccup of the
# machine would otherwise cost the last evaluation, which does not count beyond the budget.
OVERRUN = 0.005
SAVE_SECONDS, STRETCH_SECONDS = 45.0, 10.0  # between checkpoints; without a look at the clock


class Outcome(NamedTuple):
    """How a trial ended; see `results.Trial`."""

    status: str
    words: str
    compile_seconds: float
    initial_params: str  # a digest, equal for all optimizers of a seed; empty for one gone on with


def schedule(amount: float, evaluations: int) -> list[float]:
    """When to evaluate: from ½ % of the budget on, each the same factor after the last.

    A time-to-target is then known to that factor, wherever it lies.

    >>> [round(t, 2) for t in schedule(100.0, 4)]
    [0.5, 2.92, 17.1, 100.0]
    """
    factor = 200 ** (1 / max(evaluations - 1, 1))
    return [amount * factor ** (k - evaluations) for k in range(1, evaluations + 1)]


def run(
    problem: Problem,
    entry: Entry,
    seed: int,
    *,
    budget: Budget,
    evaluations: int,
    train_on: Training,
    evaluate: Evaluation,
    write: Callable[[Row], None],
    devices: Sequence[jax.Device] | None = None,
    directory: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
    cut: Callable[[Row], bool] = lambda row: False,
) -> Outcome:
    """Runs one trial and writes its rows as they come.

    Args:
      problem: what to solve.
      entry: the optimizer.
      seed: of the initial parameters.
      budget: how much it may spend.
      evaluations: how many, besides the one at step 0.
      train_on: the batches, see `training`.
      evaluate: the problem's evaluation.
      write: receives the rows of evaluations.
      devices: as for `Estimator`.
      directory: for checkpoints and the rows of steps; a trial cut short goes on from there. None
        keeps neither.
      clock: reads the training clock.
      cut: told of each evaluation; whether to end the trial.
    """
    passes = step_rows(problem, entry) / problem.size  # over the data, by one step
    data, optimizer = train_on.data, entry.make()
    tells = diagnostics.read(_state_shape(problem, optimizer, data)) is not None
    estimator = Estimator(
        problem.model(),
        problem.loss,
        optimizer,
        workdir=directory,
        seed=seed,
        inputs=problem.inputs,
        regularizer=problem.regularizer,
        microbatches=train_on.microbatches,
        curvature_batch_size=_curvature_rows(problem, entry),
        devices=devices,
        # One that says nothing of its steps needs no row for each of them.
        log_every=1 if tells else 1 << 30,
        keep=1,
        clock=clock,
    )
    estimator.initialize(data)
    digest = "" if estimator.step else _digest(estimator.params)
    saved = time.monotonic()

    def ended(status: str, words: str = "") -> Outcome:
        return Outcome(status, words, estimator.compile_seconds, digest)

    def keep() -> None:
        try:
            estimator.save()
        except NonFiniteError:
            raise
        except check.TrainingError as error:  # what is lost is the way to go on, not the trial
            logger.warning("%s", error)

    def train(**limit: Any) -> None:
        nonlocal saved
        estimator.train(data, save=False, **limit)
        if time.monotonic() - saved > SAVE_SECONDS:
            keep()
            saved = time.monotonic()

    def measure() -> Row:
        values = evaluate(estimator.params, estimator.model_state)
        row = {
            "step": estimator.step,
            "seconds": estimator.seconds,
            "epoch": estimator.step * passes,
            "split": EVALUATION,
            "work": work(),
            **values,
        }
        write(row)
        return row

    def work() -> float:
        return gradients_of_work(estimator.state.opt_state, estimator.step) * passes

    def spent() -> float:
        counts = {
            "seconds": estimator.seconds,
            "steps": estimator.step,
            "epochs": estimator.step * passes,
        }
        return float(counts[budget.kind]) if budget.kind in counts else work()

    if estimator.step == 0 and not math.isfinite(measure()["train_loss"]):
        return ended("diverged", "The loss of the initial parameters is not finite.")
    step_cost = 0.0  # of the last steps, in the budget's unit
    for point in schedule(budget.amount, evaluations):
        if estimator.step and spent() >= point * (1.0 - 1e-9):
            continue  # a long step has passed this point by, or a run before did
        before, first = estimator.step, estimator.step == 0
        try:
            if budget.kind == "seconds":
                margin = step_cost + OVERRUN * budget.amount
                until = min(point, budget.amount - margin)
                if estimator.step and estimator.seconds >= until:
                    break  # the next step would end beyond the budget
                began = estimator.seconds
                while estimator.step == before or estimator.seconds < until:
                    left = min(until - estimator.seconds, STRETCH_SECONDS)
                    train(seconds=max(left, 1e-9))
                step_cost = (estimator.seconds - began) / (estimator.step - before)
            else:
                while spent() < point * (1.0 - 1e-9):
                    began, steps = spent(), 1
                    if estimator.step and began + step_cost > budget.amount * (1.0 + 1e-9):
                        break
                    if step_cost and (budget.kind != "work" or not tells):  # each costs the same
                        within = math.floor((budget.amount - began) / step_cost + 1e-6)
                        steps = min(math.ceil((point - began) / step_cost - 1e-6), within)
                    done = estimator.step
                    train(steps=max(steps, 1), seconds=STRETCH_SECONDS)
                    step_cost = (spent() - began) / (estimator.step - done)
                if estimator.step == before:
                    continue
        except check.TrainingError as error:
            return ended("diverged", str(error))
        row = measure()
        if not math.isfinite(row["train_loss"]):
            return ended("diverged", f"The training loss is not finite at step {estimator.step}.")
        if first and spent() > budget.amount * (1.0 + 1e-9):
            took, needed = budget.spoken(f"{step_cost:.3g}"), budget.spoken(f"{2 * step_cost:.2g}")
            return ended(
                "budget",
                f"One step took {took}, more than the budget of {budget}: give at least {needed}.",
            )
        if cut(row):
            return ended("cut", "No better than the median of the earlier trials.")
    try:
        keep()
    except NonFiniteError as error:
        return ended("diverged", str(error))
    return ended("done")


def gradients_of_work(opt_state: Any, steps: int) -> float:
    """What the steps so far cost, in gradients of their batch.

    By the optimizer's own count (`Diagnostics.gradient_equivalents`), else one gradient a step.
    """
    account = diagnostics.read(opt_state)
    return float(steps if account is None else account.gradient_equivalents)


def _curvature_rows(problem: Problem, entry: Entry) -> int | None:
    """The curvature batch, or none of its own where it would be no smaller than the batch."""
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
