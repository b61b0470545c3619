"""The style of all plots: colours, names beside lines, and SVG for pages.

The colours are Okabe and Ito's, which the colour-blind can distinguish; lines are named at their
ends instead of in a legend; text becomes paths, so that a picture looks the same everywhere.
matplotlib is imported when something is drawn.

To draw your own pictures in this style, use `LINES`, the colours in order; `STYLE`, settings for
`plt.rcParams.update`; `name_lines`, `leave_room` and `plain_ticks`.
"""

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito, "Color Universal Design", 2008, in the order of use.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
# The same hues for a dark page, lighter for contrast.
LINES_DARK = ("#4aa8e0", "#ff8a3d", "#2fd3a2", "#e6a3c9", "#f5b933", "#8fd0f5", "#a9a9a9")
INK, MUTED, GRID, PAPER = "#1b1d22", "#5a5e68", "#e4e5e9", "#fffffe"

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
    """Widens a logarithmic x axis, so that names fit inside the figure; sets both axes' ticks.

    Args:
      axes: with labelled lines, before `name_lines`.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot(xscale="log", xlim=(1, 100))
    >>> leave_room(axes)
    >>> bool(axes.get_xlim()[1] > 200)
    True
    """
    from matplotlib import ticker

    low, high = axes.get_xlim()
    names = [line.get_label() for line in axes.get_lines()]
    longest = max((len(name) for name in names if not name.startswith("_")), default=0)
    axes.set_xlim(low, high * (high / low) ** max(0.17, 0.021 * longest))
    plain_ticks(axes.xaxis, low, high)
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        plain_ticks(axes.yaxis, *axes.get_ylim())


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


def color_of(optimizers: Sequence[str], optimizer: str) -> int:
    """The index of an optimizer's colour; tuned and untuned share one.

    >>> [color_of(["adam", "adam-tuned", "hf"], x) for x in ("adam", "adam-tuned", "hf")]
    [0, 0, 1]
    """
    bases = list(dict.fromkeys(name.removesuffix("-tuned") for name in optimizers))
    return bases.index(optimizer.removesuffix("-tuned")) % len(LINES)


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


def inline_svg(figure: Any, prefix: str, description: str) -> str:
    """The figure as an SVG element for a page, its colours replaced by CSS variables.

    Args:
      figure: the matplotlib figure.
      prefix: put before every id, so that several pictures can share a page.
      description: for screen readers.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', _keep_inner, svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    for name, color in [
        *((f"line-{i}", c) for i, c in enumerate(LINES)),
        ("ink", INK),
        ("muted", MUTED),
        ("grid", GRID),
        ("paper", PAPER),
    ]:
        svg = svg.replace(color, f"var(--{name})")
    label = html.escape(description, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _keep_inner(match: re.Match[str]) -> str:
    """Removes namespaces everywhere, and sizes from the root, whose viewBox scales it."""
    attribute = match.group(0)
    is_size = attribute.lstrip().startswith(("width", "height"))
    return attribute if is_size and not attribute.rstrip('"').endswith("pt") else ""


@contextmanager
def figures() -> Iterator[Any]:
    """matplotlib's figure module, in this style."""
    import matplotlib
    from matplotlib import figure

    with matplotlib.rc_context(STYLE):
        yield figure


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks 1, 2, 5, 10, … on a log axis, within the range shown.

    Args:
      axis: an x or y axis on a log scale.
      low: the smallest value shown, > 0.
      high: the largest.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot(yscale="log", ylim=(1, 20))
    >>> plain_ticks(axes.yaxis, 1.0, 20.0)
    >>> axes.yaxis.get_majorticklocs().tolist()
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    from matplotlib import ticker

    decades = math.log10(max(high / low, 1.0))
    if decades > 5:
        return  # powers of ten, as matplotlib writes them
    steps = (1, 2, 5) if decades < 2.6 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    axis.set_major_locator(ticker.FixedLocator([t for t in ticks if low <= t <= high * 1.001]))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
