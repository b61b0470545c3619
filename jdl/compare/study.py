"""A study: problems × optimizers × seeds, one trial at a time, on one machine, under one clock.

    <workdir>/study.toml                                  what was asked, and the machine
    <workdir>/metrics.jsonl                               the rows of all trials
    <workdir>/<problem>/<optimizer>-seed<k>/config.toml   one trial's settings
                                           /metrics.jsonl its rows
                                           /result.json   how it ended; written last

A trial with a `result.json` and the same `config.toml` is done and is not run again; one of other
settings is moved aside, never overwritten.
"""

import gc
import json
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jdl.compare import machine
from jdl.compare import results as res
from jdl.compare.budget import Budget
from jdl.compare.optimizers import Entry, as_entry, plain
from jdl.compare.problems import Problem
from jdl.compare.results import Results, Row, Trial
from jdl.core import check
from jdl.train.writers import JsonlWriter, write_atomically


class Event(NamedTuple):
    """Something to show to whoever waits.

    Attributes:
      kind: "prepare", "begin", "row", "end", or "skip" for a trial found done.
      problem, optimizer, seed: which trial; empty and -1 for "prepare".
      number, total: the trial's place among all, from 1.
      row: the evaluation just made, for "row".
      status, words: how the trial ended, for "end" and "skip"; words say what is prepared, too.
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


class Study:
    """Which optimizer gets there first, on these problems and this machine, and is that luck?

    For one seed all optimizers start from the same parameters, those that share a batch size see
    the data in the same order, and all are evaluated by one compiled program. Each has the same
    budget: seconds on the training clock, which stands still during compilation and evaluation, or
    epochs, work or steps.

    Args:
      problems: one or several.
      optimizers: `Entry`s, or names for default settings.
      seeds: how many, or which.
      seconds: each trial's budget, on the training clock.
      budget: a budget of another kind, in place of `seconds`.
      workdir: the study's directory; a study started again there goes on with what is missing.
      evaluations: how many of each trial, besides the one before the first step.
      devices: to train on; by default one, so that "full" need not be a multiple of several.
      on_event: told what happens, as it happens.

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
        seconds: float = 30.0,
        budget: Budget | None = None,
        workdir: str | Path,
        evaluations: int = 30,
        devices: Sequence[jax.Device] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.optimizers = tuple(as_entry(optimizer) for optimizer in optimizers)
        if isinstance(seeds, int):
            seeds = range(check.positive_int("seeds", seeds))
        self.seeds = tuple(int(seed) for seed in seeds)
        self.budget = Budget.checked(*(budget or (seconds, "seconds")))
        self.evaluations = check.positive_int("evaluations", evaluations)
        self.workdir = Path(workdir)
        self._devices = jax.devices()[:1] if devices is None else list(devices)
        self._on_event = on_event or (lambda event: None)
        _check_names("problems", [problem.name for problem in self.problems])
        _check_names("optimizers", [entry.name for entry in self.optimizers])
        check.argument(bool(self.seeds), "seeds", "at least one", seeds)
        check.argument(
            len(set(self.seeds)) == len(self.seeds), "seeds", "different from each other", seeds
        )

    @property
    def trials(self) -> list[Trial]:
        """All trials, as the directory has them now, in the order in which they run.

        Seed by seed, so that a study cut short has compared all optimizers on the seeds it has.
        """
        return [
            res.load_trial(self.workdir, problem.name, entry.name, seed)
            for problem in self.problems
            for seed in self.seeds
            for entry in self.optimizers
        ]

    def run(self) -> Results:
        """Runs what has not run yet, and gives all results.

        A trial that fails or diverges is recorded as such; the others go on.
        """
        self._take_directory()
        number, total = 0, len(self.problems) * len(self.seeds) * len(self.optimizers)
        for problem in self.problems:
            evaluate = None
            for seed in self.seeds:
                for entry in self.optimizers:
                    number += 1
                    event = Event("begin", problem.name, entry.name, seed, number, total)
                    done = self._done(problem, entry, seed)
                    if done is not None:
                        self._on_event(
                            event._replace(kind="skip", status=done.status, words=done.words)
                        )
                        continue
                    if evaluate is None:
                        evaluate = self._evaluation(problem)
                    self._run_trial(problem, entry, seed, evaluate, event)
                    self._merge()
        self._merge()
        return res.load(self.workdir)

    # ------------------------------------------------------------------ one trial

    def _evaluation(self, problem: Problem) -> Any:
        from jdl.compare.feeds import Evaluation

        self._on_event(Event("prepare", problem.name, words=f"reading the data of {problem.name}"))
        return Evaluation(problem, self._devices)

    def _run_trial(
        self, problem: Problem, entry: Entry, seed: int, evaluate: Any, event: Event
    ) -> None:
        from jdl.compare import feeds, trial

        directory = self._cleared(problem, entry, seed)
        write_atomically(directory / "config.toml", _toml(self._config(problem, entry, seed)))
        writer = JsonlWriter(directory / "metrics.jsonl")

        def write(row: Row) -> None:
            writer.write(row)
            if row["split"] == res.EVALUATION:
                self._on_event(event._replace(kind="row", row=row))

        self._on_event(event)
        gc.collect()  # so that the last trial's garbage is not collected on this one's clock
        try:
            ended = trial.run(
                problem,
                entry,
                seed,
                budget=self.budget,
                evaluations=self.evaluations,
                train_on=feeds.training(problem, entry, seed, self._devices),
                evaluate=evaluate,
                write=write,
                devices=self._devices,
            )
        except Exception as error:
            (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            first_line = (str(error).strip().splitlines() or [""])[0]
            words = f"{type(error).__name__}: {first_line} (more in {directory / 'error.txt'})"
            ended = trial.Outcome("failed", words, 0.0, "")
        text = json.dumps(ended._asdict(), indent=1) + "\n"
        write_atomically(directory / "result.json", text)
        self._on_event(event._replace(kind="end", status=ended.status, words=ended.words))

    # ------------------------------------------------------------------ the directory

    def _take_directory(self) -> None:
        """Makes the study's directory, or makes sure that the one there can be gone on with."""
        found = res.read_toml(self.workdir / "study.toml")
        if found:
            res.check_format(self.workdir, found)
        elif self.workdir.exists():
            check.argument(
                self.workdir.is_dir() and not (self.workdir / "checkpoints").exists(),
                "workdir",
                "a new directory, or that of a study",
                str(self.workdir),
            )
        study = {
            "format": res.FORMAT,
            "budget": self.budget._asdict(),
            "evaluations": self.evaluations,
            "seeds": list(self.seeds),
            "problems": [_described(problem) for problem in self.problems],
            "optimizers": [
                {"name": entry.name, "settings": entry.settings()} for entry in self.optimizers
            ],
            "machine": machine.describe(),
        }
        write_atomically(self.workdir / "study.toml", _toml(study))

    def _config(self, problem: Problem, entry: Entry, seed: int) -> dict[str, Any]:
        """All that decides a trial's outcome; two trials of one config are the same trial."""
        described = _described(problem)
        del described["target"]  # judges the rows, does not change them
        return {
            "format": res.FORMAT,
            "seed": seed,
            "budget": self.budget._asdict(),
            "evaluations": self.evaluations,
            "devices": len(self._devices),
            "problem": described,
            "optimizer": {"name": entry.name, "settings": entry.settings()},
            "machine": machine.describe(),
        }

    def _done(self, problem: Problem, entry: Entry, seed: int) -> Trial | None:
        """The trial as it ran before, unless it was another, or an error ended it."""
        found = res.load_trial(self.workdir, problem.name, entry.name, seed)
        if found.status in ("missing", "failed"):
            return None
        return found if found.settings == self._config(problem, entry, seed) else None

    def _cleared(self, problem: Problem, entry: Entry, seed: int) -> Path:
        """The trial's directory, empty; what had ended there lies under `earlier`."""
        directory = res.trial_directory(self.workdir, problem.name, entry.name, seed)
        if (directory / "result.json").exists():
            earlier = directory.parent / "earlier"
            earlier.mkdir(exist_ok=True)
            number = len(list(earlier.glob(f"{directory.name}-*"))) + 1
            directory.rename(earlier / f"{directory.name}-{number}")
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("config.toml", "metrics.jsonl", "error.txt"):  # of a trial cut short
            (directory / name).unlink(missing_ok=True)
        return directory

    def _merge(self) -> None:
        """Writes the rows of all trials into one file, each with the trial it is of."""
        lines = [
            json.dumps({"problem": t.problem, "optimizer": t.optimizer, "seed": t.seed, **row})
            for t in self.trials
            for row in sorted(
                (*t.evaluations, *t.steps), key=lambda row: (row["step"], row["split"])
            )
        ]
        write_atomically(self.workdir / "metrics.jsonl", "".join(line + "\n" for line in lines))


def _described(problem: Problem) -> dict[str, Any]:
    return {
        "name": problem.name,
        "examples": problem.size,
        "target": problem.target._asdict(),
        "about": {name: plain(value) for name, value in problem.about.items()},
    }


def _check_names(argument: str, names: list[str]) -> None:
    """Names become directories and labels."""
    check.argument(bool(names), argument, "at least one", names)
    check.argument(
        len(set(names)) == len(names), argument, "named differently from each other", names
    )
    for name in names:
        must = "named by letters, digits and . _ + = - (they become directories)"
        fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name) and name != "earlier"
        check.argument(bool(fits), argument, must, name)


def _toml(content: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(content)
