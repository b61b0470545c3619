"""One trial: an optimizer on a problem from a seed, through the Estimator, on the training clock.

Evaluations lie at times fixed beforehand, the same for every optimizer and denser early; a step
that would end beyond the budget is not begun, as far as the last ones tell.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl.compare.budget import Budget
from jdl.compare.feeds import Evaluation, Training
from jdl.compare.optimizers import Entry
from jdl.compare.problems import Problem
from jdl.compare.results import EVALUATION, STEP, Row
from jdl.core import check
from jdl.core.model import as_model
from jdl.core.types import Batch
from jdl.optim import diagnostics
from jdl.train import step
from jdl.train.estimator import Estimator, Report

# Training aims at an end this share of the budget early: a hiccup of the machine in the very last
# step would otherwise cost the last evaluation, which does not count beyond the budget.
OVERRUN = 0.005

# What the report shows of a second-order method's step.
STEP_FIELDS = (
    "loss",
    "gradient_equivalents",
    "step_size",
    "damping",
    "reduction_ratio",
    "linear_iterations",
    "termination",
)


class Outcome(NamedTuple):
    """How a trial ended; see `results.Trial`."""

    status: str
    words: str
    compile_seconds: float
    initial_params: str  # a digest: equal for all optimizers of one seed


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
      write: receives the rows.
      devices: as for `Estimator`.
    """
    batch_size = problem.size if entry.batch_size == "full" else entry.batch_size
    passes = batch_size / problem.size  # over the data, by one step
    data, optimizer = train_on.data, entry.make()

    def on_step(report: Report) -> None:
        own = {name: report[name] for name in STEP_FIELDS if name in report}
        write(
            {
                "step": report["step"],
                "seconds": report["seconds"],
                "epoch": report["step"] * passes,
                "split": STEP,
                **own,
            }
        )

    tells = diagnostics.read(_state_shape(problem, optimizer, data)) is not None
    estimator = Estimator(
        problem.model(),
        problem.loss,
        optimizer,
        seed=seed,
        inputs=problem.inputs,
        microbatches=train_on.microbatches,
        curvature_batch_size=entry.curvature_batch_size,
        devices=devices,
        # One that says nothing of its steps needs no row for each of them.
        log_every=1 if tells else 1 << 30,
        hooks=[on_step] if tells else [],
    )
    estimator.initialize(data)
    digest = _digest(estimator.params)

    def ended(status: str, words: str = "") -> Outcome:
        return Outcome(status, words, estimator.compile_seconds, digest)

    def measure() -> float:
        values = evaluate(estimator.params, estimator.model_state)
        write(
            {
                "step": estimator.step,
                "seconds": estimator.seconds,
                "epoch": estimator.step * passes,
                "split": EVALUATION,
                "work": work(),
                **values,
            }
        )
        return values["train_loss"]

    def work() -> float:
        found = diagnostics.read(estimator.state.opt_state)
        done = estimator.step if found is None else float(found.gradient_equivalents)
        return done * passes

    def spent() -> float:
        counts = {"steps": estimator.step, "epochs": estimator.step * passes}
        return float(counts[budget.kind]) if budget.kind in counts else work()

    if not math.isfinite(measure()):
        return ended("diverged", "The loss of the initial parameters is not finite.")
    step_cost = 0.0  # of the last steps, in the budget's unit
    for point in schedule(budget.amount, evaluations):
        before = estimator.step
        try:
            if budget.kind == "seconds":
                if estimator.seconds >= point and estimator.step:
                    continue  # a long step has passed this point by
                margin = max(step_cost, OVERRUN * budget.amount)
                left = min(point, budget.amount - margin) - estimator.seconds
                if estimator.step and left <= 0:
                    break  # the next step would end beyond the budget
                began = estimator.seconds
                estimator.train(data, seconds=max(left, 1e-9))
                step_cost = (estimator.seconds - began) / max(estimator.step - before, 1)
                total = estimator.seconds
            else:
                while spent() < point * (1.0 - 1e-9):
                    began = spent()
                    if estimator.step and began + step_cost > budget.amount * (1.0 + 1e-9):
                        break
                    estimator.train(data, steps=1)
                    step_cost = spent() - began
                total = spent()
                if estimator.step == before:
                    continue
        except check.TrainingError as error:
            return ended("diverged", str(error))
        if not math.isfinite(measure()):
            return ended("diverged", f"The training loss is not finite at step {estimator.step}.")
        if not before and total > budget.amount * (1.0 + 1e-9):
            took, needed = budget.spoken(f"{step_cost:.3g}"), budget.spoken(f"{2 * step_cost:.2g}")
            return ended(
                "budget",
                f"One step took {took}, more than the budget of {budget}: give at least {needed}.",
            )
    return ended("done")


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
