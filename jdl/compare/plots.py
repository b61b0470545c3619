"""The pictures of a study: curves over seeds, second-order steps, tuning, performance profiles.

Methods of second order are drawn solid, of first order dashed; untuned ones thin where they are
also tuned.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdl.compare import drawing
from jdl.compare.budget import Budget
from jdl.compare.results import Results, Row, Trial, cost_to_target, reached, tuning_cost, tunings
from jdl.compare.statistics import performance_profiles

UNITS = {"seconds": "seconds of training", "epoch": "epochs", "work": "work", "step": "steps"}
FLOOR = 1e-8  # below, a mean of float32 losses is rounding; lower ones are drawn here


class Panel(NamedTuple):
    """One pair of axes: a column of the evaluation rows against another."""

    x: str
    y: str
    title: str
    x_label: str
    y_label: str
    value: Callable[[float], float]  # of the column, as drawn
    charged: bool = False  # whether curves begin after what tuning took


def panels(results: Results, problem: str) -> list[Panel]:
    """Training loss against seconds, epochs and work, and the test metric against seconds."""

    def loss(x: str, title: str, x_label: str) -> Panel:
        return Panel(
            x, "train_loss", title, x_label, "training loss", lambda value: max(value, FLOOR)
        )

    found = [
        loss("seconds", "Loss against time", "seconds of training"),
        loss("epoch", "Loss against passes over the data", "epochs"),
        loss("work", "Loss against work", "work: gradients of the whole training set"),
    ]
    if results.tuned:
        column = results.budget.column
        found.append(
            loss(column, "Loss, tuning included", f"{UNITS[column]}, after tuning")._replace(
                charged=True
            )
        )
    metric = results.target(problem).metric
    if metric not in ("train_loss", "test_accuracy"):
        words = metric.replace("_", " ")
        accuracy = metric.endswith("accuracy")
        found.insert(
            0,
            Panel(
                "seconds",
                metric,
                f"{words.capitalize()} against time",
                "seconds of training",
                f"{words[:-8]}error (%)" if accuracy else words,
                _error if accuracy else lambda value: max(value, FLOOR),
            ),
        )
    columns = {c for t in results.trials if t.problem == problem for r in t.evaluations for c in r}
    if "test_accuracy" in columns:
        # An error on a log axis shows the difference between 98 and 99 % that matters.
        found.insert(
            1,
            Panel(
                "seconds",
                "test_accuracy",
                "Test error against time",
                "seconds of training",
                "test error (%)",
                _error,
            ),
        )
    return found


def _error(accuracy: float) -> float:
    return max(100.0 * (1.0 - accuracy), 0.05)


def curves(results: Results, problem: str) -> Any:
    """All panels in one figure, as wide as a page."""
    with drawing.figures() as figure_module:
        shown = panels(results, problem)
        figure = figure_module.Figure(figsize=(9.6, 3.5 * math.ceil(len(shown) / 2)))
        for place, panel in enumerate(shown, 1):
            _draw(figure.add_subplot(math.ceil(len(shown) / 2), 2, place), results, problem, panel)
        figure.tight_layout(w_pad=2.0, h_pad=1.6)
        for axes in figure.axes:
            drawing.name_lines(figure, axes)
        return figure


def panel_figure(results: Results, problem: str, panel: Panel) -> Any:
    """One panel as a figure of its own, narrow enough for a phone."""
    with drawing.figures() as figure_module:
        figure = figure_module.Figure(figsize=(5.0, 3.5))
        _draw(figure.add_subplot(), results, problem, panel)
        figure.tight_layout()
        drawing.name_lines(figure, figure.axes[0])
        return figure


def _draw(axes: Any, results: Results, problem: str, panel: Panel) -> None:
    target, budget = results.target(problem), results.budget
    axes.set_yscale("log")
    axes.set_xscale("log")
    for optimizer in results.optimizers:
        trials = results.of(problem, optimizer)
        color = drawing.LINES[drawing.color_of(results.optimizers, optimizer)]
        before = 0.0
        if panel.charged:
            before = tuning_cost(results.tuned.get((problem, optimizer), ()), panel.x)
        grid, values = _on_one_grid(trials, panel, budget)
        grid = grid + before
        faint = f"{optimizer}-tuned" in results.optimizers
        if not len(grid):
            continue
        middle = np.nanmedian(values, axis=0)
        dashes = "-" if any(trial.steps for trial in trials) else (0, (4.5, 1.6))
        axes.plot(
            grid,
            middle,
            color=color,
            linestyle=dashes,
            label=optimizer,
            zorder=3,
            linewidth=0.9 if faint else None,
        )
        if len(values) > 1:
            low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
            axes.fill_between(grid, low, high, color=color, alpha=0.16, linewidth=0, zorder=2)
        for trial in trials:
            row = reached(trial, target, budget)
            if row is not None and row[panel.x] > 0:
                x, y = _point(row, panel)
                axes.plot(
                    x + before,
                    y,
                    "o",
                    color=color,
                    markersize=5.5,
                    zorder=5,
                    markeredgecolor=drawing.PAPER,
                    markeredgewidth=0.9,
                )
            last = _usable(trial, panel, budget)[-1:]
            if trial.status == "diverged" and last:
                x, y = _point(last[0], panel)
                axes.plot(x + before, y, "x", color=color, markersize=7, zorder=5)
    if target.metric == panel.y:
        level = panel.value(target.threshold)
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
    axes.set_title(panel.title, pad=7)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    drawing.leave_room(axes)


def _point(row: Row, panel: Panel) -> tuple[float, float]:
    return row[panel.x], panel.value(row[panel.y])


def _usable(trial: Trial, panel: Panel, budget: Budget) -> list[Row]:
    """The evaluations that a log axis can show."""
    return [
        row
        for row in trial.within(budget)
        if row[panel.x] > 0 and row.get(panel.y) is not None and math.isfinite(row[panel.y])
    ]


def _on_one_grid(
    trials: Sequence[Trial], panel: Panel, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """The seeds' curves [seed, x] at common places x, straight between evaluations on log axes.

    A trial that came to its end keeps its last value; one that diverged has none from there on.
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
    """Something that second-order methods say of each step."""

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
    """(seconds, value) of each step that has the field; counts as they grew in that step."""
    found, before = [], 0.0
    for row in trial.steps:
        value = row.get(field.name)
        if value is None:
            continue
        found.append((row["seconds"], float(value - before if field.cumulative else value)))
        before = value
    # A method without damping, or without an inner solver, reports zeros.
    return found if any(value for _, value in found) else []


def steps(results: Results, problem: str) -> Any | None:
    """What each second-order step did, against time; None where there is no such method."""
    drawn = []
    for field in FIELDS:
        lines = [
            (drawing.color_of(results.optimizers, optimizer), optimizer, points)
            for optimizer in results.optimizers
            for trial in results.of(problem, optimizer)[:1]  # one seed: steps do not average
            if (points := [p for p in step_values(trial, field) if not field.log or p[1] > 0])
        ]
        if lines:
            drawn.append((field, lines))
    if not drawn:
        return None
    with drawing.figures() as figure_module:
        rows = math.ceil(len(drawn) / 2)
        figure = figure_module.Figure(figsize=(9.6, 2.7 * rows))
        for place, (field, lines) in enumerate(drawn, 1):
            axes = figure.add_subplot(rows, 2, place)
            axes.set_xscale("log")
            if field.log:
                axes.set_yscale("log")
            for color, optimizer, points in lines:
                seconds, values = zip(*points, strict=True)
                few = "o" if len(points) < 60 else ""
                axes.plot(
                    seconds,
                    values,
                    color=drawing.LINES[color],
                    label=optimizer,
                    linewidth=1.1,
                    marker=few,
                    markersize=2.5,
                )
            axes.set_title(field.title, pad=6)
            axes.set_xlabel("seconds of training")
            drawing.leave_room(axes)
        figure.tight_layout(w_pad=2.0, h_pad=1.4)
        for axes in figure.axes:
            drawing.name_lines(figure, axes)
        return figure


# ------------------------------------------------------------------ tuning, and all problems


def sensitivity(results: Results, problem: str) -> Any | None:
    """What each value tried ended with, one panel a parameter; None where nothing was tuned.

    Rings are trials that were cut; crosses, on the upper edge, ones that diverged or failed; the
    large dot is the value chosen.
    """
    found = tunings(results, problem)
    parameters = list(dict.fromkeys(t.parameter for t in found.values()))
    if not parameters:
        return None
    with drawing.figures() as figure_module:
        figure = figure_module.Figure(figsize=(4.8 * len(parameters), 3.4))
        for place, parameter in enumerate(parameters, 1):
            axes = figure.add_subplot(1, len(parameters), place)
            axes.set_xscale("log")
            axes.set_yscale("log")
            for name, tuned in found.items():
                if tuned.parameter == parameter:
                    color = drawing.LINES[drawing.color_of(results.optimizers, name)]
                    _values_tried(axes, tuned, name.removesuffix("-tuned"), color)
            criterion = next(t.criterion for t in found.values())
            axes.set_title(f"Sensitivity to the {parameter.replace('_', ' ')}", pad=6)
            axes.set_xlabel(parameter.replace("_", " "))
            axes.set_ylabel(criterion.replace("_", " ") + " at the end")
            drawing.leave_room(axes)
        figure.tight_layout(w_pad=2.0)
        for axes in figure.axes:
            drawing.name_lines(figure, axes)
        return figure


def _values_tried(axes: Any, tuned: Any, name: str, color: str) -> None:
    ordered = sorted(tuned.trials)
    lost = [value for value, last, _ in ordered if not math.isfinite(last)]
    if lost:
        at_top = axes.get_xaxis_transform()
        axes.plot(lost, np.ones(len(lost)), "x", color=color, transform=at_top, clip_on=False)
    kept = [(value, max(last, FLOOR), status) for value, last, status in ordered if last < math.inf]
    if not kept:
        return
    x, y, _ = zip(*kept, strict=True)
    axes.plot(x, y, color=color, label=name, linewidth=1.2)
    for value, last, status in kept:
        axes.plot(
            value,
            last,
            "o",
            color=color,
            markersize=8 if value == tuned.value else 4.5,
            markerfacecolor=color if status == "done" else drawing.PAPER,
        )


def profiles(results: Results) -> Any | None:
    """Performance profiles over problems and seeds; None where there is too little to tell."""
    costs = cost_to_target(results)
    trials = len(next(iter(costs.values())))
    if trials < 3 or len(costs) < 2:
        return None
    with drawing.figures() as figure_module:
        figure = figure_module.Figure(figsize=(5.0, 3.4))
        axes = figure.add_subplot()
        for name, profile in performance_profiles(costs).items():
            axes.step(
                profile.ratios,
                profile.shares,
                where="post",
                color=drawing.LINES[drawing.color_of(results.optimizers, name)],
                linestyle="-" if _is_second_order(results, name) else (0, (4.5, 1.6)),
                linewidth=0.9 if f"{name}-tuned" in results.optimizers else None,
                label=name,
            )
        axes.set_xlim(1.0, 5.2)
        axes.set_xticks([1, 2, 3, 4])
        axes.set_ylim(-0.03, 1.03)
        axes.set_title("Performance profile", pad=6)
        axes.set_xlabel("times what the best took to the target")
        axes.set_ylabel("share of problems and seeds")
        figure.tight_layout()
        drawing.name_lines(figure, axes)
        return figure


def _is_second_order(results: Results, name: str) -> bool:
    return any(trial.steps for trial in results.trials if trial.optimizer == name)
