"""A plot of a run: the loss and each metric against steps."""

import math
from pathlib import Path
from typing import Any

from jdl.core import check
from jdl.train.writers import is_number, read_jsonl

# Columns of the log that are not losses or metrics.
_NOT_PLOTTED = {"step", "seconds", "epoch", "split", "data_wait", "skipped", "learning_rate"}
_NOT_PLOTTED |= {"memory_estimate"}


def draw(metrics: str | Path, picture: str | Path) -> Path:
    """Plots a `metrics.jsonl` to a PNG or SVG file.

    Args:
      metrics: the log.
      picture: the file to write; its suffix says the format.

    Returns:
      The picture's path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jdl.train.step import UNIFORM_FIELDS

    rows = [row for row in read_jsonl(metrics) if _is_finite(row.get("step")) and "split" in row]
    drawn = [k for row in rows for k, value in row.items() if value is None or _is_finite(value)]
    names = [k for k in dict.fromkeys(drawn) if k not in _NOT_PLOTTED and k not in UNIFORM_FIELDS]
    if not names:
        raise check.DataError(f"{metrics} holds no rows to draw.")
    figure = Figure(figsize=(5.0 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        _panel(axes, rows, name)
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    return picture


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _panel(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    from matplotlib import ticker

    colors = {"train": "#0072B2", "test": "#D55E00"}
    for split in dict.fromkeys(row["split"] for row in rows):
        points = [
            (row["step"], row[name])
            for row in rows
            if row["split"] == split and _is_finite(row.get(name))
        ]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        few = len(points) < 3
        color = colors.get(split, "#009E73")
        axes.plot(steps, values, "o" if few else "-", color=color, label=split, linewidth=1.4)
    if "loss" in name and all(row[name] > 0 for row in rows if _is_finite(row.get(name))):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("step")
    axes.set_title(name, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
