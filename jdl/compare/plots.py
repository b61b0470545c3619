"""The pictures of a study: curves over seeds, second-order steps, tuning, performance profiles.

Second-order methods are drawn solid, first-order ones dashed; an untuned optimizer is drawn thin
where its tuned version is shown too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdl.compare import drawing
from jdl.compare.budget import Budget
from jdl.compare.results import (
    Results,
    Row,
    Trial,
    Tuned,
    cost_to_target,
    is_accuracy,
    reached,
    tuning_cost,
    tunings,
)
from jdl.compare.statistics import performance_profiles
from jdl.optim.registry import TuningRange

UNITS = {"seconds": "seconds of training", "epoch": "epochs", "work": "work", "step": "steps"}
FLOOR = 1e-8  # smaller losses, rounding of a float32 mean, are drawn at this value


class Panel(NamedTuple):
    """One pair of axes: a column of the evaluation rows against another."""

    x: str
    y: str
    title: str
    x_label: str
    y_label: str
    charged: bool = False  # whether curves begin after the cost of tuning

    def value(self, y: float) -> float:
        """The column's value as drawn: accuracies as errors in percent.

        On a log axis an error shows the difference between 98 and 99 %.
        """
        return max(100.0 * (1.0 - y), 0.05) if is_accuracy(self.y) else max(y, FLOOR)


def panels(results: Results, problem: str) -> list[Panel]:
    """Training loss against seconds, epochs and work, and the test metric against seconds."""

    def loss(x: str, title: str, x_label: str, charged: bool = False) -> Panel:
        return Panel(x, "train_loss", title, x_label, "training loss", charged)

    def against_time(metric: str) -> Panel:
        words = metric.replace("_", " ")
        words = words.replace("accuracy", "error") if is_accuracy(metric) else words
        unit = " (%)" if is_accuracy(metric) else ""
        title = f"{words.capitalize()} against time"
        return Panel("seconds", metric, title, UNITS["seconds"], words + unit)

    found = [
        loss("seconds", "Loss against time", UNITS["seconds"]),
        loss("epoch", "Loss against passes over the data", "epochs"),
        loss("work", "Loss against work", "work: gradients of the whole training set"),
    ]
    if results.tuned:
        column = results.budget.column
        found.append(loss(column, "Loss, tuning included", f"{UNITS[column]}, after tuning", True))
    metric = results.target(problem).metric
    if metric not in ("train_loss", "test_accuracy"):
        found.insert(0, against_time(metric))
    columns = {c for t in results.trials if t.problem == problem for r in t.evaluations for c in r}
    if "test_accuracy" in columns:
        found.insert(1, against_time("test_accuracy"))
    return found


def _figure(
    draws: Iterable[Callable[[Any], None]], width: float, height: float, columns: int = 1
) -> Any:
    """A figure with a pair of axes for each function, lines named at their ends.

    Args:
      draws: each draws into the axes given to it.
      width: of the figure, in inches.
      height: of each row of axes, in inches.
      columns: axes beside each other.
    """
    draws = list(draws)
    rows = math.ceil(len(draws) / columns)
    with drawing.figures() as figure_module:
        figure = figure_module.Figure(figsize=(width, height * rows))
        for place, draw in enumerate(draws, 1):
            draw(figure.add_subplot(rows, columns, place))
        figure.tight_layout(w_pad=2.0, h_pad=1.5)
        for axes in figure.axes:
            drawing.name_lines(figure, axes)
        return figure


def curves(results: Results, problem: str) -> Any:
    """All panels in one figure of a page's width."""
    draws = [_curves_of(results, problem, panel) for panel in panels(results, problem)]
    return _figure(draws, 9.6, 3.5, columns=2)


def panel_figure(results: Results, problem: str, panel: Panel) -> Any:
    """One panel in a figure narrow enough for a phone."""
    return _figure([_curves_of(results, problem, panel)], 5.0, 3.5)


def _style(results: Results, optimizer: str) -> dict[str, Any]:
    """Colour, dashes and width of an optimizer's line."""
    second = any(trial.steps for trial in results.trials if trial.optimizer == optimizer)
    return {
        "color": drawing.LINES[drawing.color_of(results.optimizers, optimizer)],
        "linestyle": "-" if second else (0, (4.5, 1.6)),
        "linewidth": 0.9 if f"{optimizer}-tuned" in results.optimizers else None,
        "label": optimizer,
    }


def _curves_of(results: Results, problem: str, panel: Panel) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        target = results.target(problem)
        axes.set_yscale("log")
        axes.set_xscale("log")
        for optimizer in results.optimizers:
            _curve(axes, results, problem, optimizer, panel)
        if target.metric == panel.y:
            _target_line(axes, panel.value(target.threshold))
        axes.set_title(panel.title, pad=7)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        drawing.leave_room(axes)

    return draw


def _curve(axes: Any, results: Results, problem: str, optimizer: str, panel: Panel) -> None:
    """The median over seeds, their range, and where the target was reached or a trial diverged."""
    trials, style = results.of(problem, optimizer), _style(results, optimizer)
    before = 0.0
    if panel.charged:
        before = tuning_cost(results.tuned.get((problem, optimizer), ()), panel.x)
    grid, values = _on_one_grid(trials, panel, results.budget)
    if not len(grid):
        return
    axes.plot(grid + before, np.nanmedian(values, axis=0), zorder=3, **style)
    color = style["color"]
    if len(values) > 1:
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(grid + before, low, high, color=color, alpha=0.16, linewidth=0, zorder=2)
    mark = {"color": color, "zorder": 5}
    paper = {"markeredgecolor": drawing.PAPER, "markeredgewidth": 0.9}
    for trial in trials:
        row = reached(trial, results.target(problem), results.budget)
        if row is not None and row[panel.x] > 0:
            x, y = _point(row, panel)
            axes.plot(x + before, y, "o", markersize=5.5, **mark, **paper)
        last = _usable(trial, panel, results.budget)[-1:]
        if trial.status == "diverged" and last:
            x, y = _point(last[0], panel)
            axes.plot(x + before, y, "x", markersize=7, **mark)


def _target_line(axes: Any, level: float) -> None:
    axes.axhline(level, color=drawing.MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.annotate(
        "target",
        (0.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(3, 2.5),
        textcoords="offset points",
        color=drawing.MUTED,
        fontsize=8,
    )


def _point(row: Row, panel: Panel) -> tuple[float, float]:
    return float(row[panel.x]), panel.value(row[panel.y])


def _usable(trial: Trial, panel: Panel, budget: Budget) -> list[Row]:
    """The evaluations that can be drawn on log axes."""
    return [
        row
        for row in trial.within(budget)
        if row[panel.x] > 0 and row.get(panel.y) is not None and math.isfinite(row[panel.y])
    ]


def _on_one_grid(
    trials: Sequence[Trial], panel: Panel, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """The seeds' curves [seed, x] at common places x, interpolated linearly on log axes.

    A trial that ended keeps its last value; one that diverged has none after its end.
    """
    points = [np.array([_point(r, panel) for r in _usable(t, panel, budget)]) for t in trials]
    drawn = [(t, p) for t, p in zip(trials, points, strict=True) if len(p)]
    if not drawn:
        return np.empty(0), np.empty((0, 0))
    grid = np.unique(np.concatenate([p[:, 0] for _, p in drawn]))
    values = []
    for trial, p in drawn:
        right = np.nan if trial.status == "diverged" else None
        line = np.interp(np.log(grid), np.log(p[:, 0]), np.log(p[:, 1]), left=np.nan, right=right)
        values.append(np.exp(line))
    kept = ~np.all(np.isnan(values), axis=0)
    return grid[kept], np.asarray(values)[:, kept]


# ------------------------------------------------------------------ second-order steps


class Field(NamedTuple):
    """A diagnostic that second-order methods log at each step."""

    name: str
    title: str
    cumulative: bool
    log: bool


FIELDS = (
    Field("gradient_equivalents", "Cost of a step (gradients)", True, True),
    Field("linear_iterations", "CG iterations of a step", True, False),
    Field("damping", "Damping λ", False, True),
    Field("reduction_ratio", "Reduction ratio ρ (actual / predicted)", False, False),
    Field("step_size", "Step length", False, True),
)


def step_values(trial: Trial, field: Field) -> list[tuple[float, float]]:
    """(seconds, value) of each step that has the field; of cumulative counts, the step's own."""
    found, before = [], 0.0
    for row in trial.steps:
        value = row.get(field.name)
        if value is None:
            continue
        found.append((row["seconds"], float(value - before if field.cumulative else value)))
        before = value
    # Methods without damping or an inner solver log zeros.
    return found if any(value for _, value in found) else []


def steps(results: Results, problem: str) -> Any | None:
    """What each second-order step did, against time; None where there is no such method."""

    def points(trial: Trial, field: Field) -> list[tuple[float, float]]:
        return [point for point in step_values(trial, field) if not field.log or point[1] > 0]

    drawn = []
    for field in FIELDS:
        lines = {
            optimizer: found
            for optimizer in results.optimizers
            for trial in results.of(problem, optimizer)[:1]  # one seed: steps do not average
            if (found := points(trial, field))
        }
        if lines:
            drawn.append(_steps_of(results, field, lines))
    return _figure(drawn, 9.6, 2.7, columns=2) if drawn else None


def _steps_of(
    results: Results, field: Field, lines: dict[str, list[tuple[float, float]]]
) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        if field.log:
            axes.set_yscale("log")
        for optimizer, points in lines.items():
            seconds, values = zip(*points, strict=True)
            color = drawing.LINES[drawing.color_of(results.optimizers, optimizer)]
            marker = {"marker": "o" if len(points) < 60 else "", "markersize": 2.5}
            axes.plot(seconds, values, color=color, label=optimizer, linewidth=1.1, **marker)
        axes.set_title(field.title, pad=6)
        axes.set_xlabel(UNITS["seconds"])
        drawing.leave_room(axes)

    return draw


# ------------------------------------------------------------------ tuning, and all problems


def sensitivity(results: Results, problem: str) -> Any | None:
    """The criterion at the end for each value tried, one panel per number; None without tuning.

    Rings are trials that were cut; crosses, on the upper edge, ones that diverged or failed; the
    large dot is the value chosen.
    """
    found = tunings(results, problem)
    ranges = {x.parameter: x for tuned in found.values() for x in tuned.space}
    if not ranges:
        return None
    columns = min(3, len(ranges))
    draws = [_values_of(results, found, x) for x in ranges.values()]
    return _figure(draws, 4.8 * columns, 3.4, columns=columns)


def _values_of(results: Results, found: dict[str, Tuned], x: TuningRange) -> Callable[[Any], None]:
    falls = x.scale == "one minus log"
    name = x.parameter.replace("_", " ")

    def draw(axes: Any) -> None:
        axes.set_xscale("linear" if x.scale == "linear" else "log")
        axes.set_yscale("log")
        for optimizer, tuned in found.items():
            if x.parameter in {y.parameter for y in tuned.space}:
                color = drawing.LINES[drawing.color_of(results.optimizers, optimizer)]
                label = optimizer.removesuffix("-tuned")
                _values_tried(axes, tuned, x.parameter, falls, label=label, color=color)
        criterion = next(t.criterion for t in found.values())
        axes.set_title(f"Sensitivity to the {name}", pad=6)
        axes.set_xlabel(f"1 − {name}" if falls else name)
        axes.set_ylabel(criterion.replace("_", " ") + " at the end")
        if axes.get_lines() and x.scale != "linear":
            drawing.leave_room(axes)

    return draw


def _values_tried(
    axes: Any, tuned: Tuned, parameter: str, falls: bool, *, label: str, color: str
) -> None:
    """The trials by one number; they are joined where no other was tuned."""

    def at(values: dict[str, int | float]) -> int | float:
        return 1.0 - values[parameter] if falls else values[parameter]

    ordered = sorted(tuned.trials, key=lambda trial: at(trial[0]))
    lost = [at(values) for values, last, _ in ordered if not math.isfinite(last)]
    if lost:
        at_top = axes.get_xaxis_transform()
        axes.plot(lost, np.ones(len(lost)), "x", color=color, transform=at_top, clip_on=False)
    kept = [
        (values, max(last, FLOOR), status) for values, last, status in ordered if last < math.inf
    ]
    if not kept:
        return
    x, y = zip(*((at(values), last) for values, last, _ in kept), strict=True)
    joined = "-" if len(tuned.space) == 1 else ""
    axes.plot(x, y, joined, color=color, label=label, linewidth=1.2)
    for values, last, status in kept:
        size = 8 if values == tuned.values else 4.5
        face = color if status == "done" else drawing.PAPER
        axes.plot(at(values), last, "o", color=color, markersize=size, markerfacecolor=face)


def profiles(results: Results) -> Any | None:
    """Performance profiles over problems and seeds; None for fewer than three pairs of them."""
    costs = cost_to_target(results)
    trials = len(next(iter(costs.values())))
    if trials < 3 or len(costs) < 2:
        return None

    def draw(axes: Any) -> None:
        for name, profile in performance_profiles(costs).items():
            axes.step(profile.ratios, profile.shares, where="post", **_style(results, name))
        axes.set_xlim(1.0, 5.2)
        axes.set_xticks([1, 2, 3, 4])
        axes.set_ylim(-0.03, 1.03)
        axes.set_title("Performance profile", pad=6)
        axes.set_xlabel("cost to the target, in units of the best optimizer's")
        axes.set_ylabel("share of problems and seeds")

    return _figure([draw], 5.0, 3.4)
