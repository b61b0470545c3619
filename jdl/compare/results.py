"""The results of a study: its trials, and the tables and sentences computed from them.

Nothing here runs a model: everything is computed from the files of the trials, so that a report can
be made again years later, and tests can plant rows.

A trial reaches its target at the first evaluation within the budget that meets it; there is no
interpolation between evaluations.
"""

import bisect
import csv
import itertools
import math
import operator
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdl.compare.budget import KINDS, Budget
from jdl.compare.statistics import duel, median_interval, pooled_deviation, target_p_value
from jdl.compare.tuning import Curve
from jdl.core import check
from jdl.optim.registry import TuningRange

Row = dict[str, Any]  # one line of metrics.jsonl

EVALUATION, STEP = "evaluate", "train"  # the `split` of a row
LEVEL = 0.05  # of significance
MAX_CSV = 1 << 26  # bytes of a results.csv that is read
# Its first columns: the trial, and the whole budget of its study.
IDENTITY = ("problem", "optimizer", "seed", "share", "status")
BUDGET = ("budget", "unit")
COSTS = tuple(column for column, _ in KINDS.values())


class Target(NamedTuple):
    """The value of a metric that counts as solved, fixed before anything runs.

    Attributes:
      metric: a column of the evaluation rows: train_loss, test_loss, test_accuracy …
      goal: "at least" or "at most".
      threshold: the value to reach.

    >>> str(Target("test_accuracy", "at least", 0.97))
    'test accuracy ≥ 97 %'
    >>> Target("train_loss", "at most", 0.01).met({"train_loss": 0.02})
    False
    """

    metric: str
    goal: str
    threshold: float

    def met(self, row: Mapping[str, Any]) -> bool:
        """Whether the evaluation meets the target; one without the metric, or NaN, does not."""
        value = row.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        return value >= self.threshold if self.goal == "at least" else value <= self.threshold

    def __str__(self) -> str:
        value = formatted(self.metric, self.threshold, digits=4)
        sign = "≥" if self.goal == "at least" else "≤"
        return f"{self.metric.replace('_', ' ')} {sign} {value}"


def lower_is_better(column: str, target: Target, declared: Mapping[str, str]) -> bool | None:
    """Whether small values of an evaluation's column are good; None where nothing declares it.

    Args:
      column: such as "test_coverage".
      target: whose goal holds for its own metric, on any part of the data.
      declared: metric -> "max" or "min", by `jdl.metrics.direction`.

    >>> target = Target("test_coverage", "at least", 0.9)
    >>> [lower_is_better(f"test_{x}", target, {}) for x in ("coverage", "loss", "length")]
    [False, True, None]
    """
    metric = column.partition("_")[2]
    if metric == target.metric.partition("_")[2]:
        return target.goal == "at most"
    best = {"loss": "min", "accuracy": "max", **declared}.get(metric)
    return None if best is None else best == "min"


class Trial(NamedTuple):
    """One optimizer on one problem from one seed.

    Attributes:
      status: "done"; "diverged": the loss is not finite; "budget": one step takes more than the
        budget; "failed": an error ended it; "cut": tuning stopped it early; "missing": it has not
        run.
      words: what happened, in a sentence; empty for "done".
      evaluations: rows in order, the first at step 0.
      steps: the rows of a second-order method's steps.
      compile_seconds: not part of the budget.
      settings: its `config.toml`.
      share: its budget as a share of the study's, in (0, 1].
      state_bytes: the optimizer's state on one device; like the next three None if not measured.
      evaluation_seconds: of all evaluations, by the training clock but not on it.
      step_seconds: the mean of its steps, on the training clock.
      gradient_seconds: of one value and gradient of the same batch, compiled by itself.
    """

    problem: str
    optimizer: str
    seed: int
    status: str
    words: str
    evaluations: tuple[Row, ...]
    steps: tuple[Row, ...]
    compile_seconds: float
    settings: Mapping[str, Any]
    share: float = 1.0
    state_bytes: int | None = None
    evaluation_seconds: float | None = None
    step_seconds: float | None = None
    gradient_seconds: float | None = None

    def within(self, budget: Budget) -> tuple[Row, ...]:
        """The evaluations within the budget; costs never fall from one to the next."""
        most = float(budget.amount) * (1.0 + 1e-9)
        cost = operator.itemgetter(budget.column)
        return self.evaluations[: bisect.bisect_right(self.evaluations, most, key=cost)]


class Results(NamedTuple):
    """A study and its trials.

    Attributes:
      study: its settings, as in `study.toml`.
      trials: those of the whole budget, in the order they ran.
      tuned: (problem, optimizer) -> the trials that tuned it.
      shorter: the trials with a share of the budget, runs of their own.
    """

    study: Mapping[str, Any]
    trials: tuple[Trial, ...]
    tuned: Mapping[tuple[str, str], tuple[Trial, ...]] = {}
    shorter: tuple[Trial, ...] = ()

    @property
    def ends(self) -> tuple[float, ...]:
        """The shares of the budget with which each trial was run, ascending to 1."""
        return tuple(self.study.get("ends", (1.0,)))

    @property
    def budget(self) -> Budget:
        """The budget of each trial."""
        return Budget(**self.study["budget"])

    @property
    def problems(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(problem["name"] for problem in self.study["problems"])

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(entry["name"] for entry in self.study["optimizers"])

    def problem(self, name: str) -> Mapping[str, Any]:
        """The problem's entry in `study.toml`."""
        return next(p for p in self.study["problems"] if p["name"] == name)

    def target(self, problem: str) -> Target:
        """The problem's target."""
        return Target(**self.problem(problem)["target"])

    def lower_is_better(self, problem: str, column: str) -> bool | None:
        """Whether small values of a column are good; see `lower_is_better`."""
        declared = self.problem(problem).get("directions", {})
        return lower_is_better(column, self.target(problem), declared)

    def of(self, problem: str, optimizer: str, share: float = 1.0) -> tuple[Trial, ...]:
        """The trials of one optimizer on one problem, by seed, with that share of the budget."""
        own = problem, optimizer, share
        return tuple(
            t for t in self.trials + self.shorter if (t.problem, t.optimizer, t.share) == own
        )


# ------------------------------------------------------------------ another study's results.csv


def read_csv(path: str | Path) -> tuple[Trial, ...]:
    """The trials of a `results.csv`, by problem, optimizer, seed and share of the budget.

    Their `settings` have the study's budget alone.

    Raises:
      DataError: it is missing, larger than 64 MiB, or not such a file; the message has the line.
    """
    path, number = Path(path), 1
    rows: dict[tuple[str, str, int, float], list[Row]] = {}
    statuses: dict[tuple[str, str, int, float], str] = {}
    budgets: dict[tuple[str, str, int, float], dict[str, Any]] = {}
    try:
        if path.stat().st_size > MAX_CSV:
            raise check.DataError(f"{path} is larger than {MAX_CSV >> 20} MiB.")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            needed = IDENTITY + BUDGET + COSTS
            lacking = [name for name in needed if name not in (reader.fieldnames or ())]
            if lacking:
                raise ValueError(f"the column {lacking[0]!r} is missing")
            for line in reader:
                number = reader.line_num
                if None in line or None in line.values():
                    raise ValueError("it has not as many values as the first line")
                names, seed = (line.pop("problem"), line.pop("optimizer")), int(line.pop("seed"))
                own = (*names, seed, float(line.pop("share")))
                statuses[own] = line.pop("status")
                amount, kind = float(line.pop("budget")), line.pop("unit")
                budgets[own] = {"budget": Budget.checked(amount, kind)._asdict()}
                rows.setdefault(own, []).append({k: float(v) for k, v in line.items() if v})
    except OSError as error:
        raise check.DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, csv.Error) as error:
        raise check.DataError(f"{path} is not a results.csv: line {number}: {error}.") from error
    return tuple(
        Trial(
            *own[:3],
            status,
            "" if status == "done" else status,
            tuple(rows[own]),
            (),
            0.0,
            budgets[own],
            share=own[3],
        )
        for own, status in sorted(statuses.items())
    )


def beside(results: Results, path: str | Path) -> Results:
    """The results, and beside them those of another study's `results.csv`, marked with its name.

    Target and budget are this study's. Only the seeds that both have are kept.

    Raises:
      DataError: as `read_csv`, or the studies share no problem or no seed, or the other's budget is
        shorter or of another kind.
    """
    path = Path(path)
    mark = f" ({path.parent.name or path.stem})"
    others = [t for t in read_csv(path) if t.problem in results.problems]
    seeds = [s for s in results.study["seeds"] if s in {t.seed for t in others}]
    if not seeds:
        raise check.DataError(
            f"{path} has no problem and seed of this study: {', '.join(results.problems)}; "
            f"{', '.join(map(str, results.study['seeds']))}."
        )
    for theirs in {Budget(**t.settings["budget"]) for t in others}:
        # What they would have reached in the rest of a longer budget is not known.
        if theirs.kind != results.budget.kind or theirs.amount < results.budget.amount:
            raise check.DataError(
                f"{path} has a budget of {theirs}, this study {results.budget}: the other's must "
                "be of the same kind, and as large or larger."
            )
    names = list(dict.fromkeys(t.optimizer for t in others))
    found = {(t.problem, t.optimizer, t.seed, t.share): t for t in others}
    missing = Trial("", "", 0, "missing", f"is not in {path.name}", (), (), 0.0, {})
    more = [
        found.get((p, n, s, share), missing)._replace(
            problem=p, optimizer=n + mark, seed=s, share=share
        )
        for p, s, n, share in itertools.product(results.problems, seeds, names, results.ends)
    ]
    entries = [{"name": name + mark, "settings": {"from": str(path)}} for name in names]
    study = dict(results.study) | {"seeds": seeds, "against": f"{path}, marked{mark}"}
    study["optimizers"] = [*results.study["optimizers"], *entries]
    own = [t for t in (*results.trials, *results.shorter) if t.seed in seeds]
    whole = tuple(t for t in own + more if t.share == 1.0)
    shorter = tuple(t for t in own + more if t.share != 1.0)
    return results._replace(study=study, trials=whole, shorter=shorter)


class Spread(NamedTuple):
    """Median, smallest and largest over seeds.

    A lost value counts as ∞ where small is good, −∞ where large is; else all three are NaN.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of at least one value.

        >>> Spread.of([3.0, math.inf, 2.0])
        Spread(median=3.0, low=2.0, high=inf)
        """
        values = [float(value) for value in values]
        if any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.median(values), min(values), max(values))


class Line(NamedTuple):
    """One optimizer's line of the table; every spread is over all its seeds."""

    optimizer: str
    trials: int
    reached: int  # trials that met the target
    each: tuple[float, ...]  # each trial's cost to the target, in the budget's unit; ∞ for never
    costs: dict[str, Spread]  # to the target, by column: step, seconds, epoch, work
    train_loss: Spread  # at the last evaluation within the budget
    test: dict[str, Spread]  # likewise, of each test metric and the target's metric
    ends: dict[str, tuple[float, ...]]  # column -> each trial's value there
    statuses: tuple[str, ...]  # how each trial ended

    @property
    def cost(self) -> Spread:
        """Over `each`."""
        return Spread.of(self.each)


def reached(trial: Trial, target: Target, budget: Budget) -> Row | None:
    """The first evaluation within the budget that meets the target, or None."""
    return next((row for row in trial.within(budget) if target.met(row)), None)


def costs_by_problem(results: Results) -> dict[str, list[np.ndarray]]:
    """Optimizer -> of each problem, its cost to the target for each seed, ∞ where it was missed."""
    return {
        optimizer: [np.array(_line(results, p, optimizer).each) for p in results.problems]
        for optimizer in results.optimizers
    }


def cost_to_target(results: Results) -> dict[str, np.ndarray]:
    """As `costs_by_problem`, the problems one after another."""
    return {name: np.concatenate(of) for name, of in costs_by_problem(results).items()}


def lines(results: Results, problem: str) -> list[Line]:
    """The table of one problem, in the optimizers' order."""
    return [_line(results, problem, optimizer) for optimizer in results.optimizers]


def _line(results: Results, problem: str, optimizer: str) -> Line:
    target, budget = results.target(problem), results.budget
    trials = results.of(problem, optimizer)
    first = [reached(trial, target, budget) for trial in trials]
    last = [(trial.within(budget) or ({},))[-1] for trial in trials]

    def to_target(column: str) -> Spread:
        return Spread.of(math.inf if row is None else row[column] for row in first)

    def final(column: str) -> tuple[float, ...]:
        return _final(results, problem, trials, budget, column)

    tests = sorted({c for row in last for c in row if c.startswith("test_") and c != "test_loss"})
    if target.metric not in ("train_loss", *tests):
        tests.insert(0, target.metric)
    ends = {column: final(column) for column in ("train_loss", *tests)}
    return Line(
        optimizer=optimizer,
        trials=len(trials),
        reached=sum(row is not None for row in first),
        each=tuple(math.inf if row is None else float(row[budget.column]) for row in first),
        costs={column: to_target(column) for column in COSTS},
        train_loss=Spread.of(ends["train_loss"]),
        test={name: Spread.of(ends[name]) for name in tests},
        ends=ends,
        statuses=tuple(trial.status for trial in trials),
    )


def _final(
    results: Results, problem: str, trials: tuple[Trial, ...], budget: Budget, column: str
) -> tuple[float, ...]:
    """The column at each trial's last evaluation within the budget."""
    # A trial that diverged has no final value: an earlier one does not count. Of a metric without a
    # direction no median can then be given.
    worst = {True: math.inf, False: -math.inf, None: math.nan}
    lost = worst[results.lower_is_better(problem, column)]
    last = [(trial, (trial.within(budget) or ({},))[-1]) for trial in trials]
    return tuple(
        lost if trial.status == "diverged" or (value := row.get(column)) is None else float(value)
        for trial, row in last
    )


def at_ends(results: Results, problem: str) -> dict[str, tuple[Spread, ...]]:
    """Optimizer -> the target's metric at the end of each share of the budget, see `Results.ends`.

    Each is of runs of its own, whose schedules ended there.
    """
    metric, budget = results.target(problem).metric, results.budget

    def at(optimizer: str, share: float) -> Spread:
        trials = results.of(problem, optimizer, share)
        end = Budget(budget.amount * share, budget.kind)
        return Spread.of(_final(results, problem, trials, end, metric))

    return {name: tuple(at(name, share) for share in results.ends) for name in results.optimizers}


# ------------------------------------------------------------------ tuning


def criterion_curve(rows: Iterable[Row], tuning: Mapping[str, Any], budget: Budget) -> Curve:
    """The criterion against the cost so far; small values are good.

    Args:
      rows: evaluations.
      tuning: the `criterion`, a column, and which of its values are `best`, "min" or "max".
      budget: whose column counts the cost.
    """
    criterion = tuning["criterion"]
    sign = -1.0 if tuning["best"] == "max" else 1.0
    return Curve(
        tuple(
            (float(row[budget.column]), sign * float(value))
            for row in rows
            if (value := row.get(criterion)) is not None and math.isfinite(value)
        )
    )


def final_value(trial: Trial) -> float:
    """The criterion at the end of a tuning trial, small values good; ∞ unless it is "done"."""
    tuning = trial.settings.get("tuning")
    if trial.status != "done" or tuning is None:
        return math.inf
    budget = Budget(**trial.settings["budget"])
    points = criterion_curve(trial.within(budget), tuning, budget).points
    return points[-1][1] if points else math.inf


def chosen(trials: Iterable[Trial]) -> dict[str, int | float] | None:
    """The values of the best tuning trial, by parameter; None if none is "done"."""
    best = min(trials, key=final_value, default=None)
    if best is None or math.isinf(final_value(best)):
        return None
    return dict(best.settings["tuning"]["values"])


def tuning_cost(trials: Iterable[Trial], column: str) -> float:
    """The total cost of the tuning trials, by a column of their rows."""
    return float(sum(trial.evaluations[-1][column] for trial in trials if trial.evaluations))


class Tuned(NamedTuple):
    """The tuning of one optimizer on one problem.

    Attributes:
      space: what was tuned, the main number first.
      values: the values chosen, by parameter; None if no trial is "done".
      trials: (values, criterion at the end, status) of each, in the order they ran; the criterion
        is ∞ where a trial diverged or failed.
      criterion: the column by which the values were chosen.
      best: which of its values are, "min" or "max".
      cost: the cost of all tuning trials, in the budget's unit.
      charged: the cost to the target over seeds, the cost of tuning added to each.
    """

    space: tuple[TuningRange, ...]
    values: dict[str, int | float] | None
    trials: tuple[tuple[dict[str, int | float], float, str], ...]
    criterion: str
    best: str
    cost: float
    charged: Spread


def tunings(results: Results, problem: str) -> dict[str, Tuned]:
    """Each tuned optimizer's tuning on this problem."""
    found = {}
    for optimizer in results.optimizers:
        trials = results.tuned.get((problem, optimizer), ())
        trials = tuple(trial for trial in trials if "tuning" in trial.settings)
        if not trials:
            continue
        tuning = trials[0].settings["tuning"]
        best = tuning["best"]
        ends = []
        for trial in trials:
            points = criterion_curve(trial.evaluations, tuning, results.budget).points
            lost = not points or trial.status in ("diverged", "failed")
            last = math.inf if lost else points[-1][1] * (-1.0 if best == "max" else 1.0)
            ends.append((dict(trial.settings["tuning"]["values"]), last, trial.status))
        cost = tuning_cost(trials, results.budget.column)
        charged = Spread(*(x + cost for x in _line(results, problem, optimizer).cost))
        entry = next(x for x in results.study["optimizers"] if x["name"] == optimizer)
        space = tuple(TuningRange(**x) for x in entry["search"]["space"])
        found[optimizer] = Tuned(
            space, chosen(trials), tuple(ends), tuning["criterion"], best, cost, charged
        )
    return found


def importance(tuned: Tuned) -> dict[str, float | None]:
    """The share of the variance of the criterion's rank that each number explains by itself.

    R² of the rank regressed on z and z², adjusted for the number of trials, where z is the value on
    its range's scale. A trial that diverged or failed has the worst rank; one that was cut that of
    its last value. None for fewer than 10 trials, or 5 for each number.

    Args:
      tuned: see `tunings`.

    >>> space = TuningRange("rate", 1e-4, 1.0), TuningRange("b", 0.0, 1.0, "linear")
    >>> ends = [({"rate": 10.0**-k, "b": k * 0.3 % 1}, (k - 2) ** 2, "done") for k in range(11)]
    >>> tuned = Tuned(space, None, tuple(ends), "train_loss", "min", 0.0, Spread(0, 0, 0))
    >>> {name: round(share, 2) for name, share in importance(tuned).items()}
    {'rate': 0.89, 'b': 0.0}

    References:
      Saltelli et al., Global sensitivity analysis: the primer (2008), section 1.2: ranks.
      Hutter, Hoos & Leyton-Brown, An efficient approach for assessing hyperparameter importance
      (2014): the share of one number alone.
    """
    n = len(tuned.trials)
    if n < max(10, 5 * len(tuned.space)):
        return dict.fromkeys(x.parameter for x in tuned.space)
    sign = -1.0 if tuned.best == "max" else 1.0
    ends = np.array(
        [sign * last if math.isfinite(last) else math.inf for _, last, _ in tuned.trials]
    )
    ranks = np.array([np.sum(ends < x) + 0.5 * np.sum(ends == x) for x in ends])
    total = float(np.sum((ranks - ranks.mean()) ** 2))

    def alone(x: TuningRange) -> float:
        z = np.clip([x.share(values[x.parameter]) for values, _, _ in tuned.trials], -1.0, 2.0)
        design = np.stack([np.ones(n), z, z * z], axis=1)
        left = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
        unexplained = float(np.sum(left**2)) / total if total else 1.0
        return max(0.0, 1.0 - unexplained * (n - 1) / (n - 3))

    return {x.parameter: alone(x) for x in tuned.space}


def good_trials(tuned: Tuned, within: float = 0.1) -> list[dict[str, int | float]]:
    """The values of the finished trials whose criterion is within 10 % of the best; see `tunings`.

    Of an accuracy, the error is; of another criterion that is negative, its absolute value.

    >>> space = (TuningRange("rate", 1e-4, 1.0),)
    >>> ends = [({"rate": 10.0**-k}, 1.0 + 0.08 * abs(k - 2), "done") for k in range(5)]
    >>> tuned = Tuned(space, None, tuple(ends), "train_loss", "min", 0.0, Spread(0, 0, 0))
    >>> [values["rate"] for values in good_trials(tuned)]
    [0.1, 0.01, 0.001]
    """
    done = [(values, last) for values, last, status in tuned.trials if status == "done"]
    if is_accuracy(tuned.criterion):
        done = [(values, 1.0 - last) for values, last in done]
    elif tuned.best == "max":
        done = [(values, -last) for values, last in done]
    best = min((last for _, last in done), default=math.inf)
    return [values for values, last in done if last <= best + within * abs(best)]


def command(results: Results, problem: str, optimizer: str) -> str | None:
    """The line that runs an optimizer's trials again with `jdl compare`, tuned values written out.

    None where the problem or the optimizer was made in Python, or no trial has begun.
    """
    source, seeds = results.problem(problem).get("source"), list(results.study["seeds"])
    trials = [t for t in results.of(problem, optimizer) if "optimizer" in t.settings]
    call = trials[0].settings["optimizer"].get("call") if trials else None
    if not source or not call or seeds != list(range(len(seeds))):
        return None
    call = f'{call[:-1]}{"" if call.endswith("()") else ", "}label="{optimizer}")'
    line = ["jdl", "compare", *source, "--optimizers", call, "--seeds", str(len(seeds))]
    line += [f"--{results.budget.kind}", f"{results.budget.amount:g}"]
    if len(results.ends) > 1:
        line += ["--ends", ",".join(str(Fraction(x).limit_denominator(1000)) for x in results.ends)]
    if (clock := results.study.get("clock", "wall")) != "wall":
        line += ["--clock", clock]
    return shlex.join([*line, "--workdir", "runs/again"])


# ------------------------------------------------------------------ in words


def table(results: Results, problem: str) -> tuple[list[str], list[list[str]]]:
    """The table of one problem as plain text: column names, and one row per optimizer.

    Args:
      results: what `Study.run` or `jdl.compare.load_results` returned.
      problem: the problem's name.
    """
    found = lines(results, problem)
    tests = list(dict.fromkeys(name for line in found for name in line.test))
    costs = {"seconds": "seconds", "work": "work"}
    costs = {results.budget.column: results.budget.kind} | costs  # the budget's own first
    header = ["optimizer", "train loss", *(name.replace("_", " ") for name in tests)]
    header += [*(f"{kind} to target" for kind in costs.values()), "meets target at end"]
    metric = results.target(problem).metric
    deviation = pooled_deviation([np.array(line.ends.get(metric, ())) for line in found])
    rows = []
    for line in found:
        lost = math.isinf(line.train_loss.median)
        row = [line.optimizer, _ended(line) if lost else shown(line.train_loss, "train_loss")]
        row += [shown(line.test[name], name) if name in line.test else "–" for name in tests]
        row += [_to_target(line, line.costs[column]) for column in costs]
        rows.append([*row, _met(line, results.target(problem), deviation)])
    return header, rows


def _met(line: Line, target: Target, deviation: float | None) -> str:
    """Whether the mean of the last values meets the target, with the p-value of that."""
    values = line.ends.get(target.metric, ())
    if not values or not target.met({target.metric: statistics.fmean(values)}):
        return "no"
    at_most = target.goal == "at most"
    p_value = target_p_value(values, target.threshold, at_most, deviation)
    if p_value is None:
        return "yes, of one seed" if len(values) == 1 else "yes"
    return f"{'yes' if p_value <= LEVEL else 'undecided'} ({p_text(p_value)})"


def headline(results: Results, problem: str) -> str:
    """Who reached the target first, and whether the seeds separate the first two."""
    target, budget = results.target(problem), results.budget
    found = sorted(lines(results, problem), key=lambda line: line.cost.median)
    seeds = max(line.trials for line in found)

    def in_words(amount: float) -> str:
        return budget.in_words(formatted(budget.column, amount))

    def some(candidates: list[Line]) -> str:
        return ", ".join(
            f"{x.optimizer} ({x.reached} of {x.trials})" for x in candidates if x.reached
        )

    winner = found[0]
    if not any(line.reached for line in found):
        return f"No optimizer reached {target} within {budget}."
    if math.isinf(winner.cost.median):
        return (
            f"No optimizer reached {target} within {budget} in most seeds; some did: {some(found)}."
        )
    level = [line for line in found if line.cost.median == winner.cost.median]
    others = found[len(level) :]
    when = "after the same" if len(level) > 1 else "first, after"
    first = f"{_and(level)} reached {target} {when} {in_words(winner.cost.median)}"
    if len(level) > 1 and seeds > 1:
        first += f" (medians of {seeds} seeds)"
    elif seeds > 1:
        first += f" (median of {seeds} seeds, {budget.in_words(_interval(winner.each))})"
    if len(level) > 1:
        split = [line for line in level if line.each != winner.each]
        seen = _verdict(winner, split[0]) if split else "No difference was seen."
        return f"{first}. {seen}"
    if not others:
        return f"{first}."
    second = others[0]
    if math.isinf(second.cost.median):
        if also := some(others):
            return f"{first}; no other reached it in most seeds within {budget}, some did: {also}."
        missed = f"in {winner.reached} of {winner.trials} seeds" if seeds > 1 else "at all"
        return f"{first}; it alone reached it {missed} within {budget}."
    first += f"; next {second.optimizer}, after {in_words(second.cost.median)}"
    if seeds == 1:
        return f"{first}. One seed: whether that is luck, only more seeds can tell."
    return f"{first}. {_verdict(winner, second)}"


def _and(found: Sequence[Line]) -> str:
    names = [line.optimizer for line in found]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _verdict(one: Line, other: Line) -> str:
    """Whether the costs of the same seeds separate two optimizers, by the sign test."""
    found = duel(np.array(one.each), np.array(other.each))
    names = f"{one.optimizer} against {other.optimizer}"
    told = (
        f"Seed by seed, {names}: {found.wins}–{found.losses} (sign test, {p_text(found.p_value)})"
    )
    if found.p_value <= LEVEL:
        ahead = one if found.wins > found.losses else other
        return f"{told}: {ahead.optimizer} was ahead."
    few = f"; fewer than six seeds cannot reach p {LEVEL:g}" if one.trials < 6 else ""
    return f"{told}: undecided{few}."


def ending(results: Results, problem: str) -> str:
    """Who had the best loss and test metric at the end of the budget."""
    found = lines(results, problem)
    columns = {c for line in found for c in line.test}
    metric = results.target(problem).metric
    metric = metric if metric in columns else "test_accuracy"
    parts = [_best(found, "train_loss", True, "the lowest training loss")]
    lower = results.lower_is_better(problem, metric)
    if metric in columns and lower is not None:
        parts.append(_best(found, metric, lower, f"the best {metric.replace('_', ' ')}"))
    told = "; ".join(part for part in parts if part)
    return f"After {results.budget} {told}." if told else ""


def _best(found: Sequence[Line], column: str, lower: bool, words: str) -> str:
    """Who had the best median of the last values, and how the seeds compare it with the next."""
    sign = 1.0 if lower else -1.0

    def median(line: Line) -> float:
        return sign * Spread.of(line.ends[column]).median

    ranked = sorted((line for line in found if column in line.ends), key=median)
    best = ranked[0]
    if math.isinf(median(best)):
        return ""
    level = [line for line in ranked if median(line) == median(best)]
    had = "both had" if len(level) == 2 else "all had" if len(level) > 2 else "had"
    told = f"{_and(level)} {had} {words}, {shown(Spread.of(best.ends[column]), column)}"
    if len(level) == len(ranked) or len(level) > 1 or best.trials == 1:
        return told
    one, other = (sign * np.array(line.ends[column]) for line in (best, ranked[1]))
    pair = duel(one, other)
    against = f"against {ranked[1].optimizer} {pair.wins}–{pair.losses}, {p_text(pair.p_value)}"
    return f"{told} ({against}{'' if pair.p_value <= LEVEL else ': undecided'})"


def p_text(p_value: float) -> str:
    """A p-value in words.

    >>> p_text(0.0312), p_text(0.0)
    ('p 0.031', 'p < 1e-12')
    """
    return "p < 1e-12" if p_value < 1e-12 else f"p {p_value:.2g}"


def is_accuracy(column: str) -> bool:
    """Whether the column is a share of right answers, in [0, 1]."""
    return column.endswith("_accuracy")


def formatted(metric: str, value: float, digits: int = 3) -> str:
    """A value of that metric: accuracies in percent.

    >>> formatted("test_accuracy", 0.9721), formatted("train_loss", 0.00123456)
    ('97.2 %', '0.00123')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if is_accuracy(metric):
        return f"{100 * value:.{digits}g} %"
    if metric in ("step", "epoch"):
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    return f"{value:.{digits}g}"


def shown(spread: Spread, metric: str) -> str:
    """The median, and the range where seeds differ.

    >>> shown(Spread(0.972, 0.97, 0.98), "test_accuracy")
    '97.2 % (97–98)'
    """
    text = formatted(metric, spread.median)
    if spread.low == spread.high or math.isnan(spread.median):
        return text
    low, high = (formatted(metric, x).removesuffix(" %") for x in (spread.low, spread.high))
    low = "lost" if spread.low == -math.inf else low
    return text if low == high else f"{text} ({low}–{high})"


def _ended(line: Line) -> str:
    """The most common status other than "done", shown in place of a final loss."""
    return statistics.mode(status for status in line.statuses if status != "done")


def _to_target(line: Line, spread: Spread) -> str:
    if not line.reached:
        return "not reached"
    if line.reached == line.trials:
        return shown(spread, "")
    return f"{shown(spread, '')}, {line.reached} of {line.trials}"


def _interval(values: tuple[float, ...]) -> str:
    """The bootstrap interval of the median; for fewer than five seeds, their range."""
    if len(values) < 5:
        return f"{formatted('', min(values))}–{formatted('', max(values))}"
    low, high = median_interval(values)
    return f"95 % interval {formatted('', low)}–{formatted('', high)}"
