"""What a report says: its tables and sentences, for the page and for Markdown alike."""

import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from jdl.compare import plots, statistics, tuning
from jdl.compare import results as res
from jdl.compare.results import Results
from jdl.optim import result

RULES = (
    "All have the same budget. The training clock stands still during compilation, evaluation and "
    "logging. A step that would end beyond the budget is not begun, and one that does all the "
    "same does not count.",
    "A target counts as reached at the first evaluation that meets it, without interpolation. "
    "Evaluations lie at the same places for every optimizer, each the same factor after the last; "
    "a long step is evaluated when it ends.",
    "Work is what the optimizer evaluated, in gradients of the whole training set: line searches "
    "and curvature products count by their nominal cost (a value alone ⅓, a Gauss-Newton product "
    "1⅓, a Hessian product 2 gradients), K-FAC by its multiplications, factors and inverses among "
    "them.",
    "Final values are those of the last evaluation within the budget, not the best. Over several "
    "seeds: the median, and (least–largest). Misses and divergences count as ∞.",
)


class Steps(NamedTuple):
    """What one second-order optimizer did on one problem, over all its seeds."""

    optimizer: str
    number: int
    cells: tuple[str, ...]  # under STEP_HEADER, from the third on


STEP_HEADER = (
    "optimizer",
    "steps",
    "cost of a step",
    "CG iterations",
    "damping λ",
    "ratio ρ",
    "step length",
    "how steps ended",
)


def settings(results: Results) -> list[tuple[str, str]]:
    """Each optimizer's settings in a line; of a tuned one, what was chosen on which problem."""
    found = []
    for entry in results.study["optimizers"]:
        own = dict(entry["settings"])
        if search := entry.get("search"):
            values = {p: res.tunings(results, p).get(entry["name"]) for p in results.problems}
            own[search["parameter"]] = ", ".join(
                f"{'none' if t is None or t.value is None else format(t.value, '.4g')}"
                + (f" on {problem}" if len(values) > 1 else "")
                for problem, t in values.items()
            )
        found.append((entry["name"], ", ".join(f"{k} = {value(v)}" for k, v in own.items())))
    return found


def named(results: Results, problem: str) -> str:
    """The problem's name, where there are several."""
    return f"{problem}: " if len(results.problems) > 1 else ""


def question(results: Results, problem: str) -> str:
    """What was asked, and how it stood at the end."""
    seeds = len(results.study["seeds"])
    return (
        f"{len(results.optimizers)} optimizers, {results.budget} each, "
        f"{seeds} seed{'' if seeds == 1 else 's'}, from the same initial parameters. The target, "
        f"{results.target(problem)}, was fixed before anything ran. {res.ending(results, problem)}"
    )


def caption(results: Results) -> str:
    """What the pictures show."""
    several = len(results.study["seeds"]) > 1
    lines = (
        "Lines: the median over seeds; bands: from the least to the largest. " if several else ""
    )
    return (
        f"{lines}Dots: the target is reached. Dashed: first order; solid: second order. All axes "
        "are logarithmic, and begin with the first evaluation after a step; losses below "
        f"{plots.FLOOR:g} are drawn there."
    )


def troubles(results: Results, problem: str) -> list[str]:
    """What went wrong, and what makes the comparison unequal, a sentence each."""
    found = [
        f"{line.optimizer}, {words}"
        for line in res.lines(results, problem)
        for words in line.troubles
    ]
    for seed in results.study["seeds"]:
        initial = {
            trial.evaluations[0]["train_loss"]
            for trial in results.trials
            if (trial.problem, trial.seed) == (problem, seed) and trial.evaluations
        }
        if len(initial) > 1:
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
            f"The trials ran on {len(machines)} machines that differ (see each config.toml): their "
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


def tuning_table(results: Results, problem: str) -> tuple[list[str], list[list[str]], str] | None:
    """What was chosen and what that cost; None where nothing was tuned.

    Returns:
      Column names, a row a tuned optimizer, and how it was done.
    """
    found = res.tunings(results, problem)
    if not found:
        return None
    unit = results.budget.kind
    header = ["optimizer", "parameter", "chosen", "range tried", "trials", "cut", "diverged"]
    header += [f"{unit} of tuning", f"{unit} to target, tuning included"]
    rows = []
    for name, tuned in found.items():
        values = [value for value, _, _ in tuned.trials]
        ends = Counter(status for _, _, status in tuned.trials)
        rows.append(
            [
                name,
                tuned.parameter.replace("_", " "),
                "none" if tuned.value is None else f"{tuned.value:.4g}",
                f"{min(values):.2g}–{max(values):.2g}",
                str(len(values)),
                str(ends["cut"]),
                str(ends["diverged"] + ends["failed"]),
                res.formatted(results.budget.column, tuned.cost),
                "not reached" if np.isinf(tuned.judged.low) else res.shown(tuned.judged, ""),
            ]
        )
    how = results.study["tuning"]
    criterion = next(iter(found.values())).criterion.replace("_", " ")
    note = (
        f"{how['trials']} trials for every optimizer, the default first and then quasi-random "
        f"values, each with {100 * how['share']:g} % of the budget, chosen by the {criterion} at "
        f"the end, with a seed of its own. {tuning.RULE}"
    )
    return header, rows, note


def standings(results: Results) -> tuple[list[str], list[list[str]], str] | None:
    """Who beat whom over problems and seeds; None where there is too little to tell.

    Returns:
      Column names, a row an optimizer, and what they mean.
    """
    costs = res.cost_to_target(results)
    trials = len(next(iter(costs.values())))
    if trials < 3 or len(costs) < 2:
        return None
    profiles = statistics.performance_profiles(costs)
    duels = statistics.win_matrix(costs)
    header = ["optimizer", "reached", "profile score", *(f"against {x}" for x in costs)]

    def against(one: str, other: str) -> str:
        if one == other:
            return "–"
        found = duels[one, other]
        return f"{found.wins}–{found.losses} (p {found.p_value:.2g})"

    rows = [
        [
            name,
            f"{int(np.isfinite(cost).sum())} of {trials}",
            f"{profiles[name].score:.2f}",
            *(against(name, other) for other in costs),
        ]
        for name, cost in costs.items()
    ]
    return (
        header,
        rows,
        f"{trials} pairs of problem and seed. Wins and losses by {results.budget.kind} to the "
        "target, a miss losing to any that reached it; p by the exact two-sided sign test, of one "
        "pair, not corrected for their number. Profile score: the mean share of trials solved "
        "within τ times what the best took, over τ from 1 to 4.",
    )


def describe_steps(results: Results, problem: str) -> list[Steps]:
    """One line for each optimizer that told of its steps."""
    found = []
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
        endings = Counter(
            result.words(row["termination"])
            for trial in trials
            for row in trial.steps
            if row.get("termination") is not None
        )
        told = "; ".join(f"{words} ({number:,})" for words, number in endings.most_common())
        steps = sum(len(trial.steps) for trial in trials)
        found.append(Steps(optimizer, steps, (*medians, told)))
    return found


def value(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
