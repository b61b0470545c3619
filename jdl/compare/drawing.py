"""The style of all plots: colours, dashes, names beside lines, ticks.

The colours are Okabe and Ito's, which the colour-blind can distinguish; lines are named at their
ends instead of in a legend; text becomes paths, so that a picture looks the same everywhere.
matplotlib is imported when something is drawn.

To draw your own pictures in this style, use `LINES`, the colours in order; `STYLE`, settings for
`plt.rcParams.update`; `name_lines`, `leave_room` and `plain_ticks`.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Dashes: TypeAlias = tuple[tuple[float, ...], ...]

# Okabe and Ito, "Color Universal Design", 2008, in the order of use.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c4a2f")
# The same hues for a dark page, lighter for contrast.
LINES_DARK = (
    "#4aa8e0",
    "#ff8a3d",
    "#2fd3a2",
    "#e6a3c9",
    "#f5b933",
    "#8fd0f5",
    "#a9a9a9",
    "#c9866b",
)
# Dashes of first- and second-order methods' lines: the first, and where the colours recur.
DASHED: Dashes = ((4.5, 1.6), (1.2, 1.2), (6.0, 1.5, 1.2, 1.5))
SOLID: Dashes = ((), (12.0, 1.5), (12.0, 1.5, 1.2, 1.5))
INK, MUTED, GRID, PAPER = "#1b1d22", "#5a5e68", "#e4e5e9", "#fffffe"

LONGEST = 20  # letters of a label

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "figure.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "jdl",  # the same picture gives the same file
    "path.simplify": True,
}


# ------------------------------------------------------------------ names at the lines' ends


def leave_room(axes: Any) -> None:
    """Widens the x axis, so that names fit inside the figure; sets both axes' ticks.

    Args:
      axes: with labelled lines, before `name_lines`.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot(xscale="log", xlim=(1, 100))
    >>> leave_room(axes)
    >>> bool(axes.get_xlim()[1] > 200)
    True
    """
    low, high = axes.get_xlim()
    names = [line.get_label() for line in axes.get_lines()]
    longest = max((len(name) for name in names if not name.startswith("_")), default=0)
    width = axes.bbox.width * 72 / axes.figure.dpi
    share = min(max(0.15, (5.6 * longest + 20.0) / width), 0.7)  # 5.6 points a letter
    if axes.get_xscale() == "log":
        axes.set_xlim(low, high * (high / low) ** (share / (1.0 - share)))
    else:
        axes.set_xlim(low, high + (high - low) * share / (1.0 - share))
    plain_ticks(axes.xaxis, low, high)
    plain_ticks(axes.yaxis, *axes.get_ylim())


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> a label for pictures; "…" is what long ones share, or the middle of one.

    Labels stay different from each other. Where all were tuned, they do not say so.

    >>> names = ["adam-with-a-long-schedule-0.1", "adam-with-a-long-schedule-0.01", "hf"]
    >>> list(short_names(names[:2]).values()), short_names(names)["hf"]
    (['…0.1', '…0.01'], 'hf')
    """
    tuned = all(name.endswith("-tuned") for name in names)
    found = [name.removesuffix("-tuned") if tuned else name for name in names]
    if max(map(len, found)) > LONGEST and len(names) > 1:
        for _ in range(2):  # what they share at the beginning, then at the end
            same = itertools.takewhile(lambda x: len(set(x)) == 1, zip(*found, strict=False))
            shared = re.match(r".*[-_+=]", "".join(letters[0] for letters in same))
            if shared and shared.end() > 2:
                found = [f"…{name[shared.end() :]}" for name in found]
            found = [name[::-1] for name in found]
    for kept in range(LONGEST // 2, max(map(len, found))):
        shorter = [
            x if len(x) <= 2 * kept + 1 else f"{x[:kept]}…{x[len(x) - kept :]}" for x in found
        ]
        if len(set(shorter)) == len(names):
            return dict(zip(names, shorter, strict=True))
    return dict(zip(names, found, strict=True))


def name_lines(figure: Any, axes: Any) -> None:
    """Writes each line's name beside its end, moved up or down to avoid overlaps.

    Args:
      figure: the axes' figure, after its layout is done.
      axes: with lines plotted with a `label`.

    >>> from matplotlib.figure import Figure
    >>> figure = Figure()
    >>> axes = figure.add_subplot()
    >>> _ = axes.plot([1, 2], [3, 4], label="adam")
    >>> name_lines(figure, axes)
    >>> [text.get_text() for text in axes.texts]
    ['adam']
    """
    from matplotlib import patheffects

    figure.draw_without_rendering()
    height = 8.5 * figure.dpi / 72 * 1.15
    names = []
    for line in axes.get_lines():
        if not line.get_label().startswith("_"):
            end = axes.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))
            names.append((line, end))
    ends = [end for _, end in names]
    widths = [0.62 * height * len(line.get_label()) for line, _ in names]
    bottom, top = axes.bbox.y0 + height / 2, axes.bbox.y1 - height / 2
    places = spread([(x, y) for x, y in ends], widths, height, low=float(bottom), high=float(top))
    halo = [patheffects.withStroke(linewidth=2.5, foreground=PAPER)]
    for (line, end), y in zip(names, places, strict=True):
        moved = y - end[1]
        leader = abs(moved) > 0.6 * height
        text = axes.annotate(
            line.get_label(),
            axes.transData.inverted().transform(end),
            xytext=(13 if leader else 6, moved * 72 / figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color=line.get_color(),
            zorder=6,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            }
            if leader
            else None,
        )
        text.set_path_effects(halo)


def place_of(optimizers: Sequence[str], optimizer: str) -> int:
    """The place of an optimizer among the colours; tuned and untuned share one.

    >>> [place_of(["adam", "adam-tuned", "hf"], x) for x in ("adam", "adam-tuned", "hf")]
    [0, 0, 1]
    """
    bases = list(dict.fromkeys(name.removesuffix("-tuned") for name in optimizers))
    return bases.index(optimizer.removesuffix("-tuned"))


def spread(
    ends: Sequence[tuple[float, float]],
    widths: Sequence[float],
    height: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> list[float]:
    """Heights at which names beside `ends` do not overlap, close to where the lines end.

    >>> spread([(0.0, 10.0), (0.0, 10.0), (500.0, 10.0)], [30.0, 30.0, 30.0], 8.0)
    [6.0, 14.0, 10.0]
    """
    places = [min(max(y, low), high) for _, y in ends]
    for _ in range(200):
        moved = False
        order = sorted(range(len(ends)), key=lambda i: (places[i], ends[i][1], i))
        for below, above in ((i, j) for n, i in enumerate(order) for j in order[n + 1 :]):
            apart = ends[below][0] + widths[below] <= ends[above][0]
            apart |= ends[above][0] + widths[above] <= ends[below][0]
            lacking = height - (places[above] - places[below])
            if apart or lacking <= 1e-6:
                continue
            down = min(lacking / 2, max(places[below] - low, 0.0))
            up = min(lacking - down, max(high - places[above], 0.0))
            places[below] -= max(down, min(lacking - up, max(places[below] - low, 0.0)))
            places[above] += up
            moved = True
        if not moved:
            break
    return places


# ------------------------------------------------------------------ files


def save(figure: Any, path: str | Path) -> None:
    """Writes a PNG at 200 dpi or an SVG, by the name's ending."""
    import matplotlib

    metadata = {"Date": None} if Path(path).suffix == ".svg" else None
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=200, metadata=metadata)


@contextmanager
def figures() -> Iterator[Any]:
    """matplotlib's figure module, in this style."""
    import matplotlib
    from matplotlib import figure

    with matplotlib.rc_context(STYLE):
        yield figure


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at round numbers, within the range shown; see `ticks`.

    Args:
      axis: an x or y axis.
      low: the smallest value shown; > 0 on a log scale.
      high: the largest.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot(yscale="log", ylim=(1, 20))
    >>> plain_ticks(axes.yaxis, 1.0, 20.0)
    >>> axes.yaxis.get_majorticklocs().tolist()
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    from matplotlib import ticker

    found = ticks(low, high, axis.get_scale() == "log")
    axis.set_major_locator(ticker.FixedLocator([at for at, _ in found]))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FixedFormatter([text for _, text in found]))


def ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """(value, text) of two to eight round numbers in [low, high].

    >>> ticks(3.0, 7.0, True)
    [(3.0, '3'), (4.0, '4'), (5.0, '5'), (6.0, '6'), (7.0, '7')]
    >>> [text for _, text in ticks(1e-8, 1.0, True)]
    ['10⁻⁸', '10⁻⁶', '10⁻⁴', '10⁻²', '10⁰']
    """
    slack = 1e-9 * (high - low)
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 2, 5)):
            found = [step * 10.0**power for power in powers for step in steps]
            found = [t for t in found if low - slack <= t <= high * 1.001]
            if len(steps) == 1 and len(found) > 5:
                raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
                found = found[:: math.ceil(len(found) / 7)]
                return [(t, "10" + str(round(math.log10(t))).translate(raised)) for t in found]
            if len(found) >= (3 if len(steps) == 1 else 4):
                return [(t, f"{t:,.6g}") for t in found]
    raw = (high - low) / 6.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * x for x in (1, 2, 2.5, 5, 10) if unit * x >= raw)
    first, last = math.ceil((low - slack) / step), math.floor((high + slack) / step)
    return [(t, f"{t:,.6g}") for t in (float(f"{k * step:.9g}") for k in range(first, last + 1))]


def limits(values: np.ndarray, log: bool) -> tuple[float, float]:
    """The ends of an axis: the values' range and 4 % more on each side; never within rounding.

    >>> limits(np.array([1.0, np.nan, 3.0]), log=False)
    (0.92, 3.08)
    """
    values = values[np.isfinite(values)]
    scaled = np.log(values) if log else values
    low, high = float(scaled.min()), float(scaled.max())
    least = 0.01 if log else 1e-3 * max(abs(low), abs(high), 1e-9)
    room = 0.04 * (high - low) if high - low > least else 5.0 * least
    low, high = low - room, high + room
    return (math.exp(low), math.exp(high)) if log else (low, high)
