"""The pictures of a study: curves over seeds, second-order steps, tuning, ranks, profiles.

A picture is a `Chart`, plain data, drawn by matplotlib for the files and by `report.js` for the
page. Second-order methods are drawn solid, first-order ones dashed; an untuned optimizer is drawn
thin where its tuned version is shown too.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdl.compare import drawing
from jdl.compare.budget import Budget
from jdl.compare.results import (
    Results,
    Row,
    Target,
    Trial,
    Tuned,
    cost_to_target,
    is_accuracy,
    lines,
    reached,
    tuning_cost,
    tunings,
)
from jdl.compare.statistics import performance_profiles

UNITS = {"seconds": "seconds of training", "epoch": "epochs", "work": "work", "step": "steps"}
FLOOR = 1e-8  # the rounding of a float32 mean of losses near 1
MOST = 60  # points of a line on the page
# The marker and its size of each kind of mark; the ring of "cut" is empty.
MARKS = {"reached": ("o", 4.5), "tried": ("o", 4.5), "cut": ("o", 4.5), "chosen": ("o", 8.0)}
MARKS |= {"diverged": ("x", 7.0)}


class Series(NamedTuple):
    """One optimizer's line.

    Attributes:
      name: the optimizer.
      x, y: its points, in order.
      band: the lower and upper edge; None for none.
      marks: (x, y, kind), y ∞ for the upper edge; the kinds are those of `MARKS`.
      joined: whether a line joins the points.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None
    marks: tuple[tuple[float, float, str], ...] = ()
    joined: bool = True


class Chart(NamedTuple):
    """One pair of axes and its lines.

    Attributes:
      logs: whether x and y are logarithmic.
      level: the target's height; None for none.
      ticks: (value, text) of x and of y, in place of ones at round numbers.
      drawn: how points are joined, "line" or "steps", right-continuous.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    logs: tuple[bool, bool] = (True, True)
    level: float | None = None
    ticks: tuple[Sequence[tuple[float, str]] | None, ...] = (None, None)
    drawn: str = "line"


class Panel(NamedTuple):
    """One pair of axes: a column of the evaluation rows against another."""

    x: str
    y: str
    title: str
    x_label: str
    y_label: str
    log: bool = True  # the y axis; not where a value is negative
    charged: bool = False  # whether curves begin after the cost of tuning
    floor: float = FLOOR  # smaller values are drawn here on a log axis

    def value(self, y: float) -> float:
        """The column's value as drawn: accuracies as errors in percent.

        On a log axis an error shows the difference between 98 and 99 %.
        """
        if is_accuracy(self.y):
            return max(100.0 * (1.0 - y), 0.05)
        return max(y, self.floor) if self.log else y


def floor_of(target: Target) -> float:
    """Where smaller values are drawn: `FLOOR`, or a thousandth of the target if that is less.

    >>> [floor_of(Target("test_loss", "at most", x)) for x in (1e-9, 0.1)]
    [1e-12, 1e-08]
    """
    low = target.goal == "at most" and target.threshold > 0.0
    return min(FLOOR, float(f"{1e-3 * target.threshold:.6g}")) if low else FLOOR


def panels(results: Results, problem: str) -> list[Panel]:
    """Training loss against seconds, epochs and work, and the test metric against seconds."""
    rows = [r for t in results.trials if t.problem == problem for r in t.within(results.budget)]

    def panel(x: str, y: str, title: str, x_label: str, y_label: str) -> Panel:
        negative = any((value := row.get(y)) is not None and value < 0.0 for row in rows)
        floor = floor_of(results.target(problem))
        return Panel(x, y, title, x_label, y_label, log=not negative, floor=floor)

    def loss(x: str, title: str, x_label: str) -> Panel:
        return panel(x, "train_loss", title, x_label, "training loss")

    def against_time(metric: str) -> Panel:
        words = metric.replace("_", " ")
        words = words.replace("accuracy", "error") if is_accuracy(metric) else words
        unit = " (%)" if is_accuracy(metric) else ""
        title = f"{words.capitalize()} against time"
        return panel("seconds", metric, title, UNITS["seconds"], words + unit)

    found = [
        loss("seconds", "Loss against time", UNITS["seconds"]),
        loss("epoch", "Loss against passes over the data", "epochs"),
        loss("work", "Loss against work", "work: gradients of the whole training set"),
    ]
    if results.tuned:
        column = results.budget.column
        charged = loss(column, "Loss, tuning included", f"{UNITS[column]}, after tuning")
        found.append(charged._replace(charged=True))
    metric = results.target(problem).metric
    if metric not in ("train_loss", "test_accuracy"):
        found.insert(0, against_time(metric))
    if any("test_accuracy" in row for row in rows):
        found.insert(1, against_time("test_accuracy"))
    return found


# ------------------------------------------------------------------ drawing by matplotlib


def figure(results: Results, charts: Sequence[Chart]) -> Any | None:
    """The charts in one figure of a page's width; None where there are none."""
    if not charts:
        return None
    columns = min(len(charts), 2)
    rows = math.ceil(len(charts) / columns)
    with drawing.figures() as figure_module:
        drawn = figure_module.Figure(figsize=(4.8 * columns, 3.4 * rows))
        for place, chart in enumerate(charts, 1):
            _draw(results, chart, drawn.add_subplot(rows, columns, place))
        drawn.tight_layout(w_pad=2.0, h_pad=1.5)
        for axes in drawn.axes:
            drawing.name_lines(drawn, axes)
        return drawn


def _draw(results: Results, chart: Chart, axes: Any) -> None:
    axes.set_xscale("log" if chart.logs[0] else "linear")
    axes.set_yscale("log" if chart.logs[1] else "linear")
    where = "steps-post" if chart.drawn == "steps" else "default"
    for series in chart.series:
        style = _style(results, series.name)
        if not len(series.x):
            continue
        if not series.joined:
            style["linestyle"] = ""
        axes.plot(series.x, series.y, zorder=3, drawstyle=where, **style)
        if series.band is not None:
            axes.fill_between(
                series.x, *series.band, color=style["color"], alpha=0.16, linewidth=0, zorder=2
            )
        for x, y, kind in series.marks:
            marker, size = MARKS[kind]
            drawn: dict[str, Any] = {"marker": marker, "markersize": size, "zorder": 5}
            drawn |= {"color": style["color"], "clip_on": False}
            if marker == "o":
                drawn["markeredgecolor"] = drawing.PAPER
            if kind == "cut":
                drawn |= {"markerfacecolor": drawing.PAPER, "markeredgecolor": style["color"]}
            at = axes.transData if math.isfinite(y) else axes.get_xaxis_transform()
            axes.plot([x], [y if math.isfinite(y) else 1.0], transform=at, **drawn)
    if chart.level is not None:
        _target_line(axes, chart.level)
    axes.set_title(chart.title, pad=7)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_xlim(*_limits(chart)[0])
    axes.set_ylim(*_limits(chart)[1])
    drawing.leave_room(axes)
    for axis, ticks in zip((axes.xaxis, axes.yaxis), chart.ticks, strict=True):
        if ticks is not None:
            axis.set_ticks([at for at, _ in ticks], [text for _, text in ticks])


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


def _style(results: Results, optimizer: str) -> dict[str, Any]:
    """Colour, dashes, width and label of an optimizer's line."""
    color, dashes = style_of(results, optimizer)
    return {
        "color": drawing.LINES[color],
        "linestyle": (0, dashes) if dashes else "-",
        "linewidth": 0.9 if f"{optimizer}-tuned" in results.optimizers else None,
        "label": drawing.short_names(results.optimizers)[optimizer],
    }


def style_of(results: Results, optimizer: str) -> tuple[int, tuple[float, ...]]:
    """The index of an optimizer's colour, and its dashes; where colours recur, other dashes."""
    second = any(trial.steps for trial in results.trials if trial.optimizer == optimizer)
    place = drawing.place_of(results.optimizers, optimizer)
    dashes = drawing.SOLID if second else drawing.DASHED
    return place % len(drawing.LINES), dashes[place // len(drawing.LINES) % len(dashes)]


# ------------------------------------------------------------------ as data for the page


def _limits(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ends of both axes."""
    ys = [y for s in chart.series for y in (s.y, *(s.band or ()), [m[1] for m in s.marks])]
    xs = [x for s in chart.series for x in (s.x, [m[0] for m in s.marks])]
    ys += [] if chart.level is None else [np.array([chart.level])]
    x, y = (
        drawing.limits(np.concatenate(values), log)
        for values, log in zip((xs, ys), chart.logs, strict=True)
    )
    return x, y


def data(results: Results, chart: Chart) -> dict[str, Any]:
    """The chart as plain lists for `report.js`: limits, ticks, and at most `MOST` points a line."""
    found: dict[str, Any] = {"title": chart.title, "drawn": chart.drawn, "level": chart.level}
    labels = chart.x_label, chart.y_label
    of_axes = zip("xy", labels, _limits(chart), chart.logs, chart.ticks, strict=True)
    for key, label, (low, high), log, ticks in of_axes:
        ticks = drawing.ticks(low, high, log) if ticks is None else ticks
        found[key] = {"label": label, "log": log, "low": low, "high": high, "ticks": ticks}
    found["series"] = [_series_data(results, series) for series in chart.series]
    return found


def _series_data(results: Results, series: Series) -> dict[str, Any]:
    kept = np.unique(np.linspace(0, max(len(series.x) - 1, 0), MOST).round().astype(int))
    kept = kept[: len(series.x)]

    def short(values: np.ndarray) -> list[float]:
        return [float(f"{value:.4g}") for value in values[kept]]

    low, high = series.band or (None, None)
    return {
        "line": results.optimizers.index(series.name),
        "x": short(series.x),
        "y": short(series.y),
        "low": None if low is None else short(low),
        "high": None if high is None else short(high),
        "marks": [
            [float(f"{x:.4g}"), float(f"{y:.4g}") if math.isfinite(y) else None, kind]
            for x, y, kind in series.marks
        ],
        "joined": series.joined,
    }


# ------------------------------------------------------------------ curves


def curve_charts(results: Results, problem: str) -> list[Chart]:
    """A chart for each of `panels`."""
    target, found = results.target(problem), []
    for panel in panels(results, problem):
        series = [_curve(results, problem, name, panel) for name in results.optimizers]
        level = panel.value(target.threshold) if target.metric == panel.y else None
        logs = True, panel.log
        kept = tuple(s for s in series if s is not None)
        if kept:
            chart = Chart(panel.title, panel.x_label, panel.y_label, kept, logs)
            found.append(chart if level is None else _with_target(chart, level, str(target)))
    return found


def _with_target(chart: Chart, level: float, words: str) -> Chart:
    """The chart with the target's line, or in words where it would more than halve the curves."""
    with_line = chart._replace(level=level)

    def height(chart: Chart) -> float:
        low, high = _limits(chart)[1]
        return math.log(high / low) if chart.logs[1] else high - low

    if height(with_line) <= 2.0 * height(chart):
        return with_line
    where = "below" if level < _limits(chart)[1][0] else "above"
    return chart._replace(y_label=f"{chart.y_label} ({words} is {where})")


def _curve(results: Results, problem: str, optimizer: str, panel: Panel) -> Series | None:
    """The median over seeds, their range, and where a seed reached the target or diverged."""
    trials = results.of(problem, optimizer)
    before = 0.0
    if panel.charged:
        before = tuning_cost(results.tuned.get((problem, optimizer), ()), panel.x)
    grid, values = _on_one_grid(trials, panel, results.budget)
    if not len(grid):
        return None
    marks = []
    for trial in trials:
        row = reached(trial, results.target(problem), results.budget)
        if row is not None and row[panel.x] > 0:
            marks.append((row, "reached"))
        last = _usable(trial, panel, results.budget)[-1:]
        if trial.status == "diverged" and last:
            marks.append((last[0], "diverged"))
    points = [(*_point(row, panel), kind) for row, kind in marks]
    return Series(
        optimizer,
        grid + before,
        np.nanmedian(values, axis=0),
        (np.nanmin(values, axis=0), np.nanmax(values, axis=0)) if len(values) > 1 else None,
        tuple((x + before, y, kind) for x, y, kind in points),
    )


def rank_chart(results: Results, problem: str) -> Chart | None:
    """How ranks by the median cost to the target move from steps to work to seconds.

    None for fewer than two optimizers that reached it in most seeds.
    """
    columns = ("step", "work", "seconds")
    found = [line for line in lines(results, problem) if math.isfinite(line.cost.median)]
    if len(found) < 2:
        return None
    costs = np.array([[line.costs[column].median for column in columns] for line in found])
    # Costs that differ by less than 1 %, as those of one evaluation do, have equal ranks.
    ranks = 1 + np.sum(1.01 * costs[None] < costs[:, None], axis=1)
    places = np.arange(3.0)
    return Chart(
        "Ranks by the cost to the target",
        "",
        "rank, 1 is best",
        tuple(Series(x.optimizer, places, -1.0 * r) for x, r in zip(found, ranks, strict=True)),
        (False, False),
        ticks=(
            list(zip(places.tolist(), ("steps", "work", "seconds"), strict=True)),
            [(-float(r), str(r)) for r in range(1, len(found) + 1, 1 + len(found) // 8)],
        ),
    )


def _point(row: Row, panel: Panel) -> tuple[float, float]:
    return float(row[panel.x]), panel.value(row[panel.y])


def _usable(trial: Trial, panel: Panel, budget: Budget) -> list[Row]:
    """The evaluations that can be drawn on a logarithmic x axis."""
    return [
        row
        for row in trial.within(budget)
        if row[panel.x] > 0 and row.get(panel.y) is not None and math.isfinite(row[panel.y])
    ]


def _on_one_grid(
    trials: Sequence[Trial], panel: Panel, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """The seeds' curves [seed, x] at common places x, interpolated linearly on the axes drawn.

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
        y = np.log(p[:, 1]) if panel.log else p[:, 1]
        line = np.interp(np.log(grid), np.log(p[:, 0]), y, left=np.nan, right=right)
        values.append(np.exp(line) if panel.log else line)
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


def step_charts(results: Results, problem: str) -> list[Chart]:
    """A chart for each of `FIELDS` that a method logged, of its first seed."""
    found = []
    for field in FIELDS:
        series = []
        for optimizer in results.optimizers:
            for trial in results.of(problem, optimizer)[:1]:  # one seed: steps do not average
                points = [p for p in step_values(trial, field) if p[0] > 0]
                points = [p for p in points if not field.log or p[1] > 0]
                if points:
                    series.append(Series(optimizer, *np.array(points).T))
        if series:
            chart = Chart(field.title, UNITS["seconds"], "", tuple(series), (True, field.log))
            found.append(chart)
    return found


# ------------------------------------------------------------------ tuning, and all problems


def sensitivity_charts(results: Results, problem: str) -> list[Chart]:
    """The criterion at the end for each value tried, a chart for each number.

    Trials are joined where no other number was tuned.
    """
    found = tunings(results, problem)
    ranges = {x.parameter: x for tuned in found.values() for x in tuned.space}
    ends = [end for tuned in found.values() for _, end, _ in tuned.trials]
    floor = floor_of(results.target(problem))
    log_y = all(end >= 0.0 for end in ends)
    charts = []
    for x in ranges.values():
        falls, name = x.scale == "one minus log", x.parameter.replace("_", " ")
        logs = x.scale != "linear", log_y
        series = tuple(
            _tried(optimizer, tuned, x.parameter, falls, logs, floor)
            for optimizer, tuned in found.items()
            if x in tuned.space
        )
        criterion = next(t.criterion for t in found.values()).replace("_", " ")
        title, at_end = f"Sensitivity to the {name}", f"{criterion} at the end"
        if any(len(one.x) for one in series):
            charts.append(Chart(title, f"1 − {name}" if falls else name, at_end, series, logs))
    return charts


def _tried(
    optimizer: str,
    tuned: Tuned,
    parameter: str,
    falls: bool,
    logs: tuple[bool, bool],
    floor: float,
) -> Series:
    """One optimizer's tuning trials by one number; a lost one's criterion is ∞."""
    marks = []
    for values, end, status in tuned.trials:
        x = float(1.0 - values[parameter] if falls else values[parameter])
        kind = "chosen" if values == tuned.values else "tried" if status == "done" else "cut"
        lost = not math.isfinite(end)
        if x > 0.0 or not logs[0]:
            y = math.inf if lost else max(end, floor) if logs[1] else end
            marks.append((x, y, "diverged" if lost else kind))
    marks.sort()
    points = np.array([(x, y) for x, y, _ in marks if math.isfinite(y)]).reshape(-1, 2)
    joined = len(tuned.space) == 1
    return Series(optimizer, points[:, 0], points[:, 1], None, tuple(marks), joined)


def profile_chart(results: Results) -> Chart | None:
    """Performance profiles over problems and seeds; None for fewer than three pairs of them."""
    costs = cost_to_target(results)
    if len(next(iter(costs.values()))) < 3 or len(costs) < 2:
        return None
    found = performance_profiles(costs).items()
    return Chart(
        "Performance profile",
        "cost to the target, in units of the best optimizer's",
        "share of problems and seeds",
        tuple(Series(name, np.array(p.ratios), np.array(p.shares)) for name, p in found),
        (False, False),
        ticks=([(float(x), str(x)) for x in (1, 2, 3, 4)], None),
        drawn="steps",
    )
