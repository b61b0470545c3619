"""The tables and sentences of a report, shared by `report.html` and `report.md`."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdl.compare import plots, statistics, tuning
from jdl.compare import results as res
from jdl.compare.results import Results
from jdl.optim.registry import TuningRange
from jdl.optim.result import words

RULES = (
    "All have the same budget. The training clock is paused during compilation, evaluation and "
    "logging. A step expected to end beyond the budget is not started; one that ends beyond it "
    "does not count.",
    "A target counts as reached at the first evaluation that meets it, without interpolation. "
    "Evaluations are at the same points for every optimizer, each the same factor after the last; "
    "a long step is evaluated when it ends.",
    "Work is what the optimizer evaluated, in gradients of the whole training set: line searches "
    "and curvature products count by their nominal cost (a value alone ⅓, a Gauss-Newton product "
    "1⅓, a Hessian product 2 gradients), K-FAC by its multiplications, including factors and "
    "inverses.",
    "Final values are those of the last evaluation within the budget, not the best. Over several "
    "seeds: the median, and (smallest–largest). Misses and divergences count as ∞.",
    "Meets target at end: whether the mean over seeds of the final values meets it; yes at a p of "
    f"{res.LEVEL:g} or less by a one-sided t test, for two seeds a z test with the standard "
    "deviation pooled over optimizers.",
)


class Table(NamedTuple):
    """A table whose first column names optimizers, and a note about it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def settings(results: Results) -> list[tuple[str, str]]:
    """Each optimizer's settings in a line; of a tuned one, the value chosen on each problem."""
    found = []
    for entry in results.study["optimizers"]:
        own = dict(entry["settings"])
        if search := entry.get("search"):
            values = {p: res.tunings(results, p).get(entry["name"]) for p in results.problems}
            for parameter in (x["parameter"] for x in search["space"]):
                own[parameter] = ", ".join(
                    ("none" if t is None or t.values is None else f"{t.values[parameter]:.4g}")
                    + (f" on {problem}" if len(values) > 1 else "")
                    for problem, t in values.items()
                )
        found.append((entry["name"], ", ".join(f"{k} = {setting(v)}" for k, v in own.items())))
    return found


def setting(given: Any) -> str:
    """A setting as text; of a schedule its function and its first value.

    >>> setting({"function": "cosine_decay_schedule(init_value=0.1)", "values": [0.1, 0.0999]})
    'cosine_decay_schedule(init_value=0.1), 0.1 at step 0'
    """
    if isinstance(given, dict) and "function" in given:
        return f"{given['function']}, {given['values'][0]:g} at step 0"
    return value(given)


def named(results: Results, problem: str) -> str:
    """The problem's name, where there are several."""
    return f"{problem}: " if len(results.problems) > 1 else ""


def question(results: Results, problem: str) -> str:
    """The study's terms, and who was best at the end."""
    seeds = len(results.study["seeds"])
    return (
        f"{len(results.optimizers)} optimizers, {results.budget} each, "
        f"{seeds} seed{'' if seeds == 1 else 's'}, from the same initial parameters. The target, "
        f"{results.target(problem)}, was fixed beforehand. {res.ending(results, problem)}"
    )


def caption(results: Results) -> str:
    """What the curves show."""
    several = len(results.study["seeds"]) > 1
    lines = "Lines: the median over seeds; bands: smallest to largest. " if several else ""
    besides = ", and all of the study beside" if "against" in results.study else ""
    dots = "one for each seed, which need not lie on the median's line" if several else ""
    return (
        f"{lines}Dots: the first evaluation that meets the target{dots and ', '}{dots}. Crosses: "
        f"diverged. Dashed: first order{besides}; solid: second order. Axes are logarithmic unless "
        "a value is negative, and begin with the first evaluation after a step; losses below "
        f"{plots.FLOOR:g}, or below a thousandth of the target if that is less, are drawn there."
    )


def troubles(results: Results, problem: str) -> list[str]:
    """A sentence for each trial that failed and each difference between the trials' conditions."""
    seeds: dict[tuple[str, str], list[int]] = {}  # (optimizer, words) -> the seeds
    for trial in results.trials:
        if trial.problem == problem and trial.status != "done":
            seeds.setdefault((trial.optimizer, trial.words), []).append(trial.seed)
    found = [
        f"{name}, seed{'s' if len(of) > 1 else ''} {', '.join(map(str, of))}: {words}"
        for (name, words), of in seeds.items()
    ]
    if against := results.study.get("against"):
        seeds_of = ", ".join(map(str, results.study["seeds"]))
        found.append(
            f"Beside this study is {against}: its target and budget are this study's, its seconds "
            f"can be compared only if its machine was equal. Seeds that both have: {seeds_of}."
        )
    for seed in results.study["seeds"]:
        initial = {
            trial.evaluations[0]["train_loss"]
            for trial in results.trials
            if (trial.problem, trial.seed) == (problem, seed) and trial.evaluations
        }
        # One program on other batches of the same data may differ in the last digits.
        if initial and not np.allclose(list(initial), max(initial), rtol=1e-5):
            found.append(
                f"Seed {seed}: the optimizers did not start from the same loss: {initial}."
            )
    machines = {
        json.dumps(trial.settings["machine"], sort_keys=True)
        for trial in results.trials
        if trial.problem == problem and "machine" in trial.settings
    }
    if len(machines) > 1:
        found.append(
            f"The trials ran on {len(machines)} different machines (see each config.toml): their "
            "seconds cannot be compared, their work and epochs can."
        )
    return found


def rules_of(results: Results) -> list[str]:
    """How this study was measured."""
    found = list(RULES)
    if results.study.get("clock") == "cpu":
        found.insert(1, "Seconds are the process's CPU time divided by the machine's cores.")
    if results.tuned:
        found.append(tuning.RULE)
    return found


def tuning_table(results: Results, problem: str) -> Table | None:
    """The values chosen for each tuned optimizer, and their cost; None where nothing was tuned."""
    found = res.tunings(results, problem)
    if not found:
        return None
    unit = results.budget.kind
    shares = {name: res.importance(tuned) for name, tuned in found.items()}
    weighed = any(x is not None for each in shares.values() for x in each.values())
    header = ["optimizer", "chosen", "range tried", *["importance"] * weighed]
    header += ["trials", "cut", "diverged"]
    header += [f"{unit} of tuning", f"{unit} to target, tuning included"]
    rows = []
    for name, tuned in found.items():
        names = [x.parameter for x in tuned.space]
        ends = Counter(status for _, _, status in tuned.trials)
        tried = {name: [values[name] for values, _, _ in tuned.trials] for name in names}
        told = {k: "–" if x is None else f"{100 * x:.0f} %" for k, x in shares[name].items()}
        rows.append(
            [
                name,
                "none" if tuned.values is None else _each(names, tuned.values, "{:.4g}"),
                _each(names, {k: f"{min(x):.2g}–{max(x):.2g}" for k, x in tried.items()}, "{}"),
                *[_each(names, told, "{}")] * weighed,
                str(len(tuned.trials)),
                str(ends["cut"]),
                str(ends["diverged"] + ends["failed"]),
                res.formatted(results.budget.column, tuned.cost),
                "not reached" if np.isinf(tuned.charged.low) else res.shown(tuned.charged, ""),
            ]
        )
    how = results.study["tuning"]
    criterion = next(iter(found.values())).criterion.replace("_", " ")
    note = (
        f"{how['trials']} trials for every optimizer, the default first and then quasi-random "
        f"values, each with {100 * how['share']:g} % of the budget, chosen by the {criterion} at "
        f"the end, with a separate seed. {tuning.RULE}"
    )
    if weighed:
        note += (
            " Importance: the share of the variance of the trials' ranks that a quadratic function "
            "of that number alone explains, adjusted for their number; – for fewer than 10 trials, "
            "or 5 for each number."
        )
    return Table(header, rows, note)


def robustness(results: Results, problem: str) -> Table | None:
    """How much each optimizer needs its tuning; None where nothing was tuned."""
    rows, costs = [], {line.optimizer: line.cost.median for line in res.lines(results, problem)}
    for name, tuned in res.tunings(results, problem).items():
        good = res.good_trials(tuned)

        def width(x: TuningRange, good: list[dict[str, int | float]] = good) -> str:
            shares = [x.share(values[x.parameter]) for values in good]
            shares = [share for share in shares if math.isfinite(share)]
            if len(shares) < 2:
                return "–"
            spread = max(shares) - min(shares)
            if x.scale == "linear":
                return f"{spread * (x.high - x.low):.2g}"
            ends = (x.high, x.low) if x.scale == "log" else (1.0 - x.low, 1.0 - x.high)
            return f"{spread * math.log10(ends[0] / ends[1]):.2g} decades"

        default, own = costs.get(name.removesuffix("-tuned"), math.nan), costs[name]
        known = math.isfinite(default) and math.isfinite(own) and own > 0.0
        widths = {x.parameter: width(x) for x in tuned.space}
        rows.append(
            [
                name,
                f"{len(good)} of {len(tuned.trials)}",
                _each(list(widths), widths, "{}"),
                f"{default / own:.3g}" if known else "∞" if default == math.inf > own else "–",
            ]
        )
    note = (
        "Good values: those of trials whose criterion at the end was within 10 % of the best's (of "
        "an accuracy, its error); the width is from the smallest to the largest tried, so that few "
        "trials can only show a part of it. Cost: the median to the target with default settings "
        "over the one with tuned settings."
    )
    header = ["optimizer", "good trials", "width of good values", "cost, default / tuned"]
    return Table(header, rows, note) if rows else None


def _each(names: Sequence[str], values: Any, form: str) -> str:
    """A value for each number, with its name."""
    shown = [f"{name.replace('_', ' ')} {form.format(values[name])}" for name in names]
    return "; ".join(shown)


def costs(results: Results, problem: str) -> Table:
    """What each optimizer's trials took, medians over seeds."""
    header = ["optimizer", "steps", "epochs", "work", "seconds", "evaluation", "compilation s"]
    header += ["step ms", "step / gradient", "state kB"]
    rows = []
    for optimizer in results.optimizers:
        trials = results.of(problem, optimizer)
        last = [(trial.within(results.budget) or ({},))[-1] for trial in trials]

        def median(found: Iterable[Any], form: str = ".3g") -> str:
            known = [value for value in found if value is not None]
            return format(float(np.median(known)), form) if known else "–"

        counts = [
            res.formatted(column, float(np.median([row.get(column, 0.0) for row in last])))
            for column in ("step", "epoch", "work", "seconds")
        ]
        evaluated = [
            (t.evaluation_seconds, row.get("seconds", 0.0))
            for t, row in zip(trials, last, strict=True)
            if t.evaluation_seconds
        ]
        rows.append(
            [
                optimizer,
                *counts,
                median((own / (own + rest) for own, rest in evaluated), ".0%").replace("%", " %"),
                median(trial.compile_seconds or None for trial in trials),
                median(t.step_seconds and 1e3 * t.step_seconds for t in trials),
                median(
                    t.gradient_seconds and t.step_seconds and t.step_seconds / t.gradient_seconds
                    for t in trials
                ),
                median((t.state_bytes and t.state_bytes / 1e3 for t in trials), ",.5g"),
            ]
        )
    note = (
        "Medians over seeds at the end of the budget. Evaluation: its share of all seconds but "
        "compilation. Step / gradient: a step's seconds in those of one value and gradient of the "
        "same batch, compiled by itself. State: the optimizer's, on one device. –: not measured."
    )
    return Table(header, rows, note)


def at_ends(results: Results, problem: str) -> Table | None:
    """The target's metric at the end of each budget; None where there is one budget."""
    if len(results.ends) < 2:
        return None
    metric = results.target(problem).metric
    amounts = [results.budget.amount * share for share in results.ends]
    found = res.at_ends(results, problem)
    rows = [[name, *(res.shown(x, metric) for x in spreads)] for name, spreads in found.items()]
    note = (
        f"The {metric.replace('_', ' ')} at the end; each budget is a run of its own, whose "
        "schedules end there."
    )
    return Table(["optimizer", *(results.budget.in_words(f"{x:.3g}") for x in amounts)], rows, note)


def negatives(results: Results, problem: str) -> list[str]:
    """What did not work: sentences on misses, divergences, and tuning that did not help."""
    found = res.lines(results, problem)
    seeds = len(results.study["seeds"])

    def listed(words: str, counts: dict[str, int]) -> list[str]:
        names = [name if n == seeds else f"{name} ({n} of {seeds})" for name, n in counts.items()]
        return [f"{words}: {', '.join(names)}."] if names else []

    said = listed(
        f"Did not reach {results.target(problem)} within {results.budget}",
        {line.optimizer: line.trials - line.reached for line in found if line.reached < seeds},
    )
    lost = {line.optimizer: line.statuses.count("diverged") for line in found}
    said += listed("Diverged", {name: n for name, n in lost.items() if n})
    costs = {line.optimizer: line.cost.median for line in found}
    worse = [
        name
        for name, cost in costs.items()
        if name.endswith("-tuned") and cost > costs.get(name.removesuffix("-tuned"), np.inf)
    ]
    if worse:
        said.append(f"Slower to the target than with default settings: {', '.join(worse)}.")
    return said


def standings(results: Results) -> Table | None:
    """Each optimizer over all problems and seeds; None for fewer than three pairs of them."""
    costs = res.cost_to_target(results)
    trials = len(next(iter(costs.values())))
    if trials < 3 or len(costs) < 2:
        return None
    profiles = statistics.performance_profiles(costs)
    rows = [
        [name, f"{int(np.isfinite(cost).sum())} of {trials}", f"{profiles[name].score:.2f}"]
        for name, cost in sorted(costs.items(), key=lambda item: -profiles[item[0]].score)
    ]
    note = (
        f"{trials} pairs of problem and seed. Profile score: the mean share of trials solved "
        f"within τ times the best optimizer's cost, over τ from 1 to 4. {power(results)}"
    )
    return Table(["optimizer", "reached", "profile score"], rows, note)


def power(results: Results) -> str:
    """The smallest difference that so many seeds can show."""
    seeds = len(results.study["seeds"])
    factor = 200 ** (1 / max(results.study["evaluations"] - 1, 1))
    told = (
        f"Evaluations are a factor {factor:.2f} apart in cost: smaller differences show as ties "
        "or not at all."
    )
    samples = [x for of in res.costs_by_problem(results).values() for x in of]
    with np.errstate(divide="ignore"):
        deviation = statistics.pooled_deviation([np.log(x) for x in samples])
    if not deviation or seeds < 2:
        return told
    ratio = statistics.detectable_ratio(deviation, seeds)
    return (
        f"With {seeds} seeds, differences below {100 * (ratio - 1):.2g} % in cost on one problem "
        f"cannot be told at p {res.LEVEL:g} with power 0.8 (the logarithm of a cost has a standard "
        f"deviation of {deviation:.2g} over seeds, pooled). {told}"
    )


def pairs(results: Results) -> Table | None:
    """Every two optimizers over all problems and seeds; None where there are no `standings`."""
    if (over_all := standings(results)) is None:
        return None
    costs = res.costs_by_problem(results)
    rows = []
    for one, other in itertools.combinations([row[0] for row in over_all.rows], 2):
        duel = statistics.duel(np.concatenate(costs[one]), np.concatenate(costs[other]))
        chance = statistics.probability_of_improvement(costs[one], costs[other])
        ratio = statistics.cost_ratio(costs[one], costs[other])
        rows.append(
            [
                one,
                other,
                f"{duel.wins}–{duel.losses}",
                res.p_text(duel.p_value).removeprefix("p "),
                "–" if ratio is None else "{:.3g} ({:.3g}–{:.3g})".format(*ratio),
                "{:.2f} ({:.2f}–{:.2f})".format(*chance),
            ]
        )
    kind = results.budget.kind
    note = (
        f"Wins and losses by {kind} to the target, seed by seed; a miss loses to any that reached "
        "it. p by the exact two-sided sign test, not corrected for multiple comparisons. Cost "
        f"ratio: the second's {kind} to the target over the first's, the geometric mean over "
        "problems and seeds, with Student's 95 % interval; – where one missed. P(faster): the "
        "probability that the first's cost is smaller, for any two seeds of a problem, ties as "
        "half; 95 % interval by a bootstrap over seeds, stratified by problem."
    )
    header = ["optimizer", "against", "won–lost", "p", "cost ratio", "P(faster)"]
    return Table(header, rows, note)


def describe_steps(results: Results, problem: str) -> Table | None:
    """Medians over the steps of each second-order method, all seeds; None where there is none."""
    rows = []
    for optimizer in results.optimizers:
        trials = [trial for trial in results.of(problem, optimizer) if trial.steps]
        if not trials:
            continue
        medians = []
        for field in plots.FIELDS:
            values = [v for trial in trials for _, v in plots.step_values(trial, field)]
            medians.append(f"{np.median(values):.3g}" if values else "–")
        damping = plots.step_values(trials[0], plots.FIELDS[2])
        if damping:
            medians[2] = f"{damping[0][1]:.2g} → {damping[-1][1]:.2g}"
        codes = Counter(
            code
            for trial in trials
            for row in trial.steps
            if (code := row.get("termination")) is not None
        )
        endings = "; ".join(f"{words(code)} ({n:,})" for code, n in codes.most_common())
        steps = sum(len(trial.steps) for trial in trials)
        rows.append([optimizer, f"{steps:,}", *medians, endings])
    header = ("optimizer", "steps", "cost of a step", "CG iterations", "damping λ", "ratio ρ")
    note = (
        f"Pictures: seed {results.study['seeds'][0]}. Table: medians over the steps of all seeds; "
        "costs in gradients of the step's batch."
    )
    return Table((*header, "step length", "how steps ended"), rows, note) if rows else None


def value(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
