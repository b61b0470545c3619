"""A study: problems × optimizers × seeds, one trial at a time, on one machine, under one clock.

    <workdir>/study.toml                                  its settings, and the machine
    <workdir>/metrics.jsonl                               the rows of all trials
    <workdir>/<problem>/<optimizer>-seed<k>/config.toml   one trial's settings
                                           /metrics.jsonl its rows
                                           /checkpoints/  from which it is resumed
                                           /result.json   its outcome; written last
    <workdir>/<problem>/<optimizer>-seed<k>-share0.5/     one with half the budget, likewise
    <workdir>/<problem>/tuning/<optimizer>/<k>/           the k-th values tried, likewise

A trial with a `result.json` and the same settings in `config.toml` is done and is not run again;
one with other settings is moved aside, never overwritten.
"""

import itertools
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jdl.compare import machine, record, store
from jdl.compare import results as res
from jdl.compare import tuning as tune
from jdl.compare.budget import Budget
from jdl.compare.feeds import Evaluation, Training, gradient_seconds, step_rows
from jdl.compare.identity import fingerprint, plain
from jdl.compare.optimizers import TUNED, Entry, as_entry
from jdl.compare.problems import Problem
from jdl.compare.results import Results, Row, Trial
from jdl.compare.trial import Outcome, Task
from jdl.compare.tuning import Tuning
from jdl.core import check
from jdl.core.files import write_atomically
from jdl.train.writers import directions

logger = logging.getLogger("jdl.compare")

CLOCKS = {
    "wall": time.perf_counter,
    "cpu": lambda: time.process_time() / machine.describe()["cores"],
}


class Event(NamedTuple):
    """The progress of a study, for display.

    Attributes:
      kind: "prepare", "begin", "row", "end", "skip" for a trial that is done already, or "tune" for
        the end of a tuning trial.
      problem, optimizer, seed: the trial; empty and -1 for "prepare".
      number, total: the trial's number among all, from 1.
      row: the evaluation, for "row".
      status, words: the trial's outcome, for "end", "skip" and "tune"; what is prepared.
      share: the trial's budget as a share of the study's.

    >>> event = Event("begin", "digits-cnn", "adam", seed=0, number=3, total=8)
    >>> f"{event.number}/{event.total} {event.optimizer}"
    '3/8 adam'
    """

    kind: str
    problem: str
    optimizer: str = ""
    seed: int = -1
    number: int = 0
    total: int = 0
    row: Row | None = None
    status: str = ""
    words: str = ""
    share: float = 1.0


class Study:
    """Compares optimizers on problems, over seeds, on one machine and under the same budget.

    For one seed all optimizers start from the same parameters, those with the same batch size see
    the data in the same order, and all are evaluated by one compiled program. The budget is in
    seconds on the training clock, which is paused during compilation and evaluation, or in epochs,
    work or steps.

    Args:
      problems: one or several.
      optimizers: `Entry`s, or names for default settings.
      seeds: their number, or the seeds themselves.
      seconds: each trial's budget, on the training clock; 30 if no budget is given.
      budget: a budget of another kind, in place of `seconds`.
      ends: shares of the budget, in (0, 1]: each trial is also run with these alone, tuned values
        being those of the whole budget.
      workdir: the study's directory; a study started there again runs the missing trials.
      evaluations: number of evaluations of each trial, besides the one before the first step.
      tuning: how settings are chosen; None for no tuning.
      clock: "wall", or "cpu" for the process's CPU time divided by the number of cores, which is
        less affected by other work on the machine.
      devices: to train on; None for one, so that "full" need not be a multiple of several.
      sources: problem -> the options of `jdl compare` that make it, so that the report can say how
        to run each row again.
      on_event: called with each `Event`; by default failures are logged as warnings.

    Example:
      >>> import tempfile
      >>> from jdl.compare import Study, digits_cnn
      >>> study = Study(digits_cnn(), ["sgd", "lbfgs"], seconds=0.1, workdir=tempfile.mkdtemp())
      >>> [trial.optimizer for trial in study.trials]
      ['sgd', 'lbfgs']
    """

    def __init__(
        self,
        problems: Problem | Sequence[Problem],
        optimizers: Sequence[Entry | str],
        *,
        seeds: int | Sequence[int] = 1,
        seconds: float | None = None,
        budget: Budget | None = None,
        ends: Sequence[float] = (1.0,),
        workdir: str | Path,
        evaluations: int = 30,
        tuning: Tuning | None = None,
        clock: str = "wall",
        devices: Sequence[jax.Device] | None = None,
        sources: Mapping[str, Sequence[str]] = {},
        on_event: Callable[[Event], None] | None = None,
    ):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.optimizers = tuple(as_entry(optimizer) for optimizer in optimizers)
        if isinstance(seeds, int):
            seeds = range(check.positive_int("seeds", seeds))
        self.seeds = tuple(int(seed) for seed in seeds)
        one = budget is None or seconds is None
        check.argument(one, "seconds", "left out where a budget is given", seconds)
        default = 30.0 if seconds is None else seconds
        self.budget = Budget.checked(*(budget or (default, "seconds")))
        shares = {check.in_range("ends", float(x), 0.0, 1.0, open_low=True) for x in ends}
        self.ends = tuple(sorted(shares | {1.0}))
        self.evaluations = check.positive_int("evaluations", evaluations)
        self.tuning = None if tuning is None else tuning.checked()
        for problem in () if self.tuning is None else self.problems:
            criterion = self.tuning.criterion_of(problem.split is not None)  # type: ignore[union-attr]
            known = _lower_is_better(problem, criterion) is not None
            must = "a metric with a direction, see jdl.metrics.direction"
            check.argument(known, f"criterion for {problem.name}", must, criterion)
        self.clock = check.one_of("clock", clock, CLOCKS)
        self.workdir = Path(workdir)
        self._sources = {name: list(options) for name, options in sources.items()}
        self._devices = jax.devices()[:1] if devices is None else list(devices)
        self._on_event = on_event or _warn
        _check_names("problems", [problem.name for problem in self.problems])
        _check_names("optimizers", [entry.name for entry in self.optimizers])
        check.argument(bool(self.seeds), "seeds", "at least one", seeds)
        check.argument(
            len(set(self.seeds)) == len(self.seeds), "seeds", "different from each other", seeds
        )

    @property
    def trials(self) -> list[Trial]:
        """All trials, as the directory has them now, in the order in which they run."""
        problems = [problem.name for problem in self.problems]
        return store.load_trials(self.workdir, problems, self._names(), self.seeds, self.ends)

    def run(self, share: tuple[int, int] = (1, 1)) -> Results:
        """Runs the trials that have not run yet, and returns all results.

        A trial that fails or diverges is recorded as such, and so are those of a problem whose data
        cannot be read; the others still run.

        Args:
          share: (k, n) to run the k-th of n shares only, k from 1: all trials of every n-th pair of
            problem and optimizer. Processes with different k may share a directory.
        """
        k, n = share
        check.argument(1 <= k <= n, "share", "(k, n) with 1 ≤ k ≤ n", share)
        self._take_directory()
        total = len(self.problems) * len(self.seeds) * len(self.ends) * len(self._names())
        for i, problem in enumerate(self.problems):
            # Pairs of problem and optimizer are dealt out one after another.
            mine = [
                entry
                for j, entry in enumerate(self.optimizers)
                if (i * len(self.optimizers) + j) % n == k - 1
            ]
            held = _Held(self, problem)
            contestants = self._contestants(problem, mine, held)
            for place, seed in enumerate(self.seeds):
                # The order alternates, so that no optimizer is always first.
                ordered = contestants[:: -1 if place % 2 else 1]
                for end, (name, entry, words) in itertools.product(self.ends, ordered):
                    number = 1 + self._number(problem, name, seed, end)
                    event = Event("begin", problem.name, name, seed, number, total, share=end)
                    self._one(problem, name, entry, seed, held, event, words)
        self._merge()
        if n == 1:
            self._write_study()  # with the settings that were chosen
        return store.load_results(self.workdir)

    def _names(self) -> list[str]:
        """The names of the report: optimizers as they are, and tuned."""
        found = []
        for entry in self.optimizers:
            is_tuned = self.tuning is not None and bool(entry.space)
            if not is_tuned or self.tuning.defaults:  # type: ignore[union-attr]
                found.append(entry.name)
            if is_tuned:
                found.append(entry.name + TUNED)
        return found

    def _number(self, problem: Problem, name: str, seed: int, share: float) -> int:
        """The trial's number among all, from 0."""
        names = self._names()
        place = self.problems.index(problem) * len(self.seeds) + self.seeds.index(seed)
        return (place * len(self.ends) + self.ends.index(share)) * len(names) + names.index(name)

    def _contestants(
        self, problem: Problem, entries: Sequence[Entry], held: "_Held"
    ) -> list[tuple[str, Entry | None, str]]:
        """The report's (name, entry, reason if there is no entry) on this problem."""
        found: list[tuple[str, Entry | None, str]] = []
        for entry in entries:
            if self.tuning is None or not entry.space or entry.tuned is None:
                found.append((entry.name, entry, ""))
                continue
            if self.tuning.defaults:
                found.append((entry.name, entry, ""))
            values = self._tune(problem, entry, held)
            tuned = None if values is None else entry.tuned(values)
            words = "" if tuned else f"None of {self.tuning.trials} tuning trials came to its end."
            found.append((entry.name + TUNED, tuned, words))
        return found

    # ------------------------------------------------------------------ one trial

    def _one(
        self,
        problem: Problem,
        name: str,
        entry: Entry | None,
        seed: int,
        held: "_Held",
        event: Event,
        words: str,
    ) -> None:
        """One reported trial, unless it is done."""
        share = event.share
        directory = store.trial_directory(self.workdir, problem.name, name, seed, share)
        if entry is None:
            if not (directory / "result.json").exists():
                self._on_event(event)
                record.write(directory, Outcome("failed", words))
                self._on_event(event._replace(kind="end", status="failed", words=words))
            return
        budget = Budget(self.budget.amount * share, self.budget.kind)
        config = self._config(problem, entry, seed, budget)
        done = store.load_trial(directory, problem.name, name, seed)
        if done.status not in ("missing", "failed") and store.same_trial(done.settings, config):
            self._on_event(event._replace(kind="skip", status=done.status, words=done.words))
            return
        self._on_event(event)

        task = self._task(problem, entry, seed, budget)
        if len(self._devices) == 1:
            task = task._replace(gradient_seconds=held.gradient_seconds)
        on_row = lambda row: self._on_event(event._replace(kind="row", row=row))  # noqa: E731
        ended = record.run(directory, _toml(config), task, held.evaluation, on_row)
        self._on_event(event._replace(kind="end", status=ended.status, words=ended.words))
        self._merge()

    def _task(self, problem: Problem, entry: Entry, seed: int, budget: Budget) -> Task:
        return Task(
            problem,
            entry,
            seed,
            budget,
            self.evaluations,
            devices=self._devices,
            clock=CLOCKS[self.clock],
        )

    # ------------------------------------------------------------------ tuning

    def _tune(self, problem: Problem, entry: Entry, held: "_Held") -> dict[str, int | float] | None:
        """The values chosen for this optimizer on this problem; None if no trial is "done"."""
        tuning, tuned = self.tuning, entry.tuned
        assert tuning is not None
        assert tuned is not None
        space = tuning.space(entry.space)
        own = problem.name, entry.name
        budget = Budget(self.budget.amount * tuning.share, self.budget.kind)
        criterion = tuning.criterion_of(problem.split is not None)
        inner = problem
        if problem.split is not None and criterion.startswith("validation_"):
            inner = problem._replace(train=problem.split.train, size=problem.split.size)
        earlier: list[tune.Curve] = []
        tried = tune.points(space, tuning.trials, entry.defaults(space))
        for number, values in enumerate(tried):
            place = store.tuning_directory(self.workdir, *own, number)
            task = self._task(inner, tuned(values), tune.SEED, budget)
            of_tuning: dict[str, Any] = {"values": values, "criterion": criterion}
            of_tuning["best"] = "min" if _lower_is_better(problem, criterion) else "max"
            found = self._tuning_trial(place, entry.name, task, of_tuning, earlier, held)
            earlier.append(res.criterion_curve(found.within(budget), of_tuning, budget))
            last = earlier[-1].points[-1][1] if earlier[-1].points else math.nan
            words = ", ".join(f"{name} = {value:g}" for name, value in values.items())
            words += f": {criterion.replace('_', ' ')} {last:.4g}"
            ending = "" if found.status == "done" else f" ({found.status})"
            self._on_event(
                Event(
                    "tune",
                    *own,
                    number=number + 1,
                    total=tuning.trials,
                    status=found.status,
                    words=words + ending,
                )
            )
        return res.chosen(store.load_tuning(self.workdir, *own, tuning.trials))

    def _tuning_trial(
        self,
        directory: Path,
        name: str,
        task: Task,
        of_tuning: dict[str, Any],
        earlier: Sequence[tune.Curve],
        held: "_Held",
    ) -> Trial:
        """One tuning trial, unless it is done; cut where the earlier ones' curves are better."""
        budget = task.budget
        own = task.problem.name, name, tune.SEED
        config = self._config(task.problem, task.entry, tune.SEED, budget)
        config["tuning"] = of_tuning
        found = store.load_trial(directory, *own)
        if found.status not in ("missing", "failed") and store.same_trial(found.settings, config):
            return found
        rows: list[Row] = list(found.evaluations) if found.settings == config else []

        def cut(row: Row) -> bool:
            rows.append(row)
            curve = res.criterion_curve(rows, of_tuning, budget)
            return tune.hopeless(curve, earlier, budget.amount)

        record.run(directory, _toml(config), task._replace(cut=cut), held.tuning_evaluation)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        return store.load_trial(directory, *own)

    # ------------------------------------------------------------------ the directory

    def _take_directory(self) -> None:
        """Makes the study's directory, or checks that the existing one can be continued."""
        found = store.read_toml(self.workdir / "study.toml")
        if found:
            store.check_format(self.workdir, found)
        elif self.workdir.exists():
            check.argument(
                self.workdir.is_dir() and not (self.workdir / "checkpoints").exists(),
                "workdir",
                "a new directory, or that of a study",
                str(self.workdir),
            )
        self._write_study()

    def _write_study(self) -> None:
        known = {entry.name: entry for entry in self.optimizers}
        optimizers = []
        for name in self._names():
            entry = known.get(name) or known[name.removesuffix(TUNED)]
            described: dict[str, Any] = {"name": name, "settings": entry.settings()}
            if name not in known and self.tuning is not None:
                space = [x._asdict() for x in self.tuning.space(entry.space)]
                described["search"] = {"of": entry.name, "space": space}
            optimizers.append(described)
        study: dict[str, Any] = {
            "format": store.FORMAT,
            "budget": self.budget._asdict(),
            "ends": list(self.ends),
            "clock": self.clock,
            "evaluations": self.evaluations,
            "seeds": list(self.seeds),
            "problems": [
                _described(problem)
                | {"validates": problem.split is not None}
                | {"source": self._sources.get(problem.name, [])}
                for problem in self.problems
            ],
            "optimizers": optimizers,
            "machine": machine.describe(),
            "commit": machine.commit(),
        }
        if self.tuning is not None:
            study["tuning"] = self.tuning._asdict()
        try:
            write_atomically(self.workdir / "study.toml", _toml(study))
        except OSError as error:
            raise check.UserError(
                f"{self.workdir / 'study.toml'} cannot be written: {error.strerror}. Finished "
                "trials are kept; the same command continues from there."
            ) from error

    def _config(self, problem: Problem, entry: Entry, seed: int, budget: Budget) -> dict[str, Any]:
        """Everything that determines a trial, and the machine; see `store.same_trial`."""
        described = _described(problem)
        del described["target"], described["directions"]  # they do not change the rows
        functions = ("model", "loss", "metrics", "inputs", "regularizer")
        described |= {name: fingerprint(getattr(problem, name)) for name in functions}
        optimizer: dict[str, Any] = {"name": entry.name, "settings": entry.settings()}
        optimizer |= {"make": entry.of or fingerprint(entry.make), "call": entry.call}
        return {
            "format": store.FORMAT,
            "seed": seed,
            "budget": budget._asdict(),
            "clock": self.clock,
            "evaluations": self.evaluations,
            "devices": len(self._devices),
            "problem": described,
            "optimizer": optimizer,
            "rows_of_a_step": step_rows(problem, entry),
            "machine": machine.describe(),
        }

    def _merge(self) -> None:
        """Writes the rows of all trials into one file, each with its trial."""
        lines = [
            json.dumps(
                {"problem": t.problem, "optimizer": t.optimizer, "seed": t.seed}
                | ({} if t.share == 1.0 else {"share": t.share})
                | row
            )
            for t in self.trials
            for row in sorted(
                (*t.evaluations, *t.steps), key=lambda row: (row["step"], row["split"])
            )
        ]
        try:
            write_atomically(self.workdir / "metrics.jsonl", "".join(line + "\n" for line in lines))
        except OSError as error:  # nothing is lost: each trial has its own rows
            logger.warning("%s could not be written: %s", self.workdir / "metrics.jsonl", error)


class _Held:
    """The evaluations of one problem, made at first use and shared by its trials."""

    def __init__(self, study: Study, problem: Problem):
        self._study, self._problem = study, problem
        self._made: dict[str, Any] = {}
        self._gradients: dict[tuple[int, int], float] = {}

    def gradient_seconds(self, rows: int, train_on: Training, params: Any, state: Any) -> float:
        """Of a batch of `rows`, measured once."""
        key = rows, train_on.microbatches
        if key not in self._gradients:
            clock = CLOCKS[self._study.clock]
            self._gradients[key] = gradient_seconds(self._problem, train_on, params, state, clock)
        return self._gradients[key]

    def evaluation(self) -> Any:
        """On training and test data."""
        return self._of("test", self._problem.evaluated())

    def tuning_evaluation(self) -> Any:
        """On the data that tuning trials train on and are chosen by."""
        split = self._problem.split
        if split is None:
            return self._of("train", {"train": self._problem.train})
        return self._of("tune", {"train": split.train, "validation": split.validation})

    def _of(self, kind: str, splits: dict[str, Any]) -> Any:
        if kind not in self._made:
            words = f"reading the data of {self._problem.name}"
            self._study._on_event(Event("prepare", self._problem.name, words=words))
            self._made[kind] = Evaluation(self._problem, self._study._devices, splits)
        return self._made[kind]


def _lower_is_better(problem: Problem, column: str) -> bool | None:
    return res.lower_is_better(column, problem.target, directions(problem.metrics))


def _described(problem: Problem) -> dict[str, Any]:
    return {
        "name": problem.name,
        "version": problem.version,
        "examples": problem.size,
        "target": problem.target._asdict(),
        "directions": directions(problem.metrics),
        "about": {name: plain(value) for name, value in problem.about.items()},
    }


def _warn(event: Event) -> None:
    """The default of `on_event`: failures are logged."""
    if event.kind == "end" and event.status == "failed":
        logger.warning(
            "%s on %s, seed %d, failed: %s",
            event.optimizer,
            event.problem,
            event.seed,
            event.words,
        )


def _check_names(argument: str, names: list[str]) -> None:
    """Names become directories and labels."""
    check.argument(bool(names), argument, "at least one", names)
    check.argument(
        len(set(names)) == len(names), argument, "named differently from each other", names
    )
    for name in names:
        must = "named by letters, digits and . _ + = - (they become directories)"
        reserved = ("earlier", "tuning")
        fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name) and name not in reserved
        check.argument(bool(fits), argument, must, name)


def _toml(content: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(content)
