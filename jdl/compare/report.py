"""A study's report: a page that needs no network, a short version in Markdown, and the data.

report.html   headline, pictures, tables, settings, machine, data; light and dark
report.md     the same in short
curves, steps, sensitivity, profiles   .png and .svg; of several problems with their names
results.csv   every evaluation
"""

import csv
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jdl.compare import drawing, machine, plots, store, tables
from jdl.compare import results as res
from jdl.compare.results import Results
from jdl.core import check
from jdl.core.files import write_atomically

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --soft: #f5f6f8;
  --ink: #1b1d22; --muted: #5a5e68; --grid: #e4e5e9; --paper: #ffffff; %s }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --soft: #1e2126;
  --ink: #e8e9ec; --muted: #a0a5b0; --grid: #33373f; --paper: #15171b; %s } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.1rem; color: var(--muted); font-weight: 600; margin: 0 0 1.2rem }
h2 { font-size: 1.45rem; line-height: 1.3; margin: 2.2rem 0 .6rem; max-width: 46rem }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p, li { max-width: 46rem } .note { color: var(--muted); font-size: .9rem }
.trouble { border-left: 3px solid #d55e00; padding-left: .7rem }
.figures { display: grid; gap: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%%, 24rem), 1fr)) }
svg { width: 100%%; height: auto; display: block }
.scroll { overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--grid);
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600 }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal }
.wide { text-align: left; white-space: normal; min-width: 15rem; font-size: .85rem }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%%; margin-right: .5em }
a { color: inherit } code { font-size: .9em }
"""


def write(workdir: str | Path, results: Results | None = None) -> Path:
    """Writes all files of the report into the study's directory and returns `report.html`.

    Args:
      workdir: the study's directory.
      results: its results; None to read them from there.

    Raises:
      UserError: they cannot be written: the disk is full, for example.
    """
    workdir = Path(workdir)
    results = store.load_results(workdir) if results is None else results
    try:
        for problem in results.problems:
            suffix = _suffix(results, problem)
            drawn = {"curves": plots.curves, "steps": plots.steps, "sensitivity": plots.sensitivity}
            for name, draw in drawn.items():
                _save(draw(results, problem), workdir / f"{name}{suffix}")
        _save(plots.profiles(results), workdir / "profiles")
        write_atomically(workdir / "results.csv", csv_text(results))
        write_atomically(workdir / "report.md", markdown(results))
        write_atomically(workdir / "report.html", page(results))
    except OSError as error:
        raise check.UserError(
            f"The report cannot be written into {workdir}: {error.strerror}. The measurements "
            f"are kept; afterwards `jdl compare --report --workdir {workdir}` writes the report."
        ) from error
    return workdir / "report.html"


def _suffix(results: Results, problem: str) -> str:
    """What follows a picture's name where there are several problems."""
    return "" if len(results.problems) == 1 else f"-{problem}"


def _save(figure: Any | None, stem: Path) -> None:
    if figure is not None:
        for ending in (".png", ".svg"):
            drawing.save(figure, stem.with_name(stem.name + ending))


# ------------------------------------------------------------------ the page


def page(results: Results) -> str:
    """`report.html`: everything in one file, all text from outside escaped."""
    colors = [
        " ".join(f"--line-{i}: {color};" for i, color in enumerate(line))
        for line in (drawing.LINES, drawing.LINES_DARK)
    ]
    body = "".join(_problem(results, problem, i) for i, problem in enumerate(results.problems))
    body += _standings(results) + _settings(results) + _foot(results)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_title(results)}</title><style>{STYLE % tuple(colors)}</style></head><body>\n"
        f"<h1>{_title(results)}</h1>\n{body}</body></html>\n"
    )


def _title(results: Results) -> str:
    names = ", ".join(results.optimizers)
    return _escape(f"{names} on {', '.join(results.problems)}")


def _problem(results: Results, problem: str, place: int) -> str:
    title = tables.named(results, problem) + res.headline(results, problem)
    found = [f"<h2>{_escape(title)}</h2>", f"<p>{_escape(tables.question(results, problem))}</p>"]
    for trouble in tables.troubles(results, problem):
        found.append(f'<p class="trouble">{_escape(trouble)}</p>')
    panels = [
        _picture(
            plots.panel_figure(results, problem, panel),
            f"p{place}f{i}",
            f"{panel.title}: {panel.y_label} against {panel.x_label}, one line per optimizer. "
            "The table below has the numbers.",
        )
        for i, panel in enumerate(plots.panels(results, problem))
    ]
    found += ['<div class="figures">', *panels, "</div>", _note(tables.caption(results))]
    header, rows = res.table(results, problem)
    found.append(f"<h3>Final values, and the way to {_escape(str(results.target(problem)))}</h3>")
    found.append(_table(tables.Table(header, rows), results))
    if (steps := tables.describe_steps(results, problem)) is not None:
        found += ["<h3>What each second-order step did</h3>", _table(steps, results)]
        figure, about = plots.steps(results, problem), "What each second-order step did."
        found += [_wide_picture(figure, f"p{place}s", about), _note(steps.note)]
    if (tuning := tables.tuning_table(results, problem)) is not None:
        found += ["<h3>Tuning</h3>", _table(tuning, results), _note(tuning.note)]
        figure, about = plots.sensitivity(results, problem), "What each value tried ended with."
        found.append(_wide_picture(figure, f"p{place}t", about))
        marks = "Large dots: chosen. Rings: cut early. Crosses on the upper edge: "
        found.append(_note(marks + "diverged or failed."))
    found.append(f"<h3>The problem</h3>{_facts(results.problem(problem))}")
    return "\n".join(found) + "\n"


def _standings(results: Results) -> str:
    table = tables.standings(results)
    if table is None:
        return ""
    about = "Performance profiles; the scores above sum them up."
    return (
        f"<h3>Over all problems and seeds</h3>{_table(table, results)}{_note(table.note)}"
        + _picture(plots.profiles(results), "profile", about, "max-width:30rem")
    )


def _settings(results: Results) -> str:
    table = tables.Table(["optimizer", "settings"], tables.settings(results))
    return "<h3>Settings</h3>" + _table(table, results)


def _picture(figure: Any, prefix: str, description: str, style: str = "") -> str:
    svg = drawing.inline_svg(figure, prefix, description)
    return f"<figure style='margin:0;{style}'>{svg}</figure>"


def _wide_picture(figure: Any | None, prefix: str, description: str) -> str:
    """A picture that scrolls on narrow screens."""
    if figure is None:
        return ""
    return f"<div class='scroll'>{_picture(figure, prefix, description, 'min-width:34rem')}</div>"


def _note(text: str) -> str:
    return f'<p class="note">{_escape(text)}</p>'


def _foot(results: Results) -> str:
    where = results.study["machine"]
    rules = "".join(f"<li>{_escape(rule)}</li>" for rule in tables.rules_of(results))
    flags = f" XLA_FLAGS: {where['xla_flags']}." if where["xla_flags"] else ""
    data = "data:text/csv;charset=utf-8," + quote(csv_text(results))
    return (
        f"<h3>How it was measured</h3><ul>{rules}</ul>"
        f"<h3>Machine and versions</h3><p>{_escape(machine.sentence(where))}.{_escape(flags)}</p>"
        f"<p>{_escape(_versions(results))}.</p>"
        f'<h3>Data</h3><p><a download="results.csv" href="{data}">results.csv</a>, every '
        "evaluation, is part of this page; <code>metrics.jsonl</code> beside it also has every "
        "step.</p>"
    )


def _table(table: tables.Table, results: Results) -> str:
    """A table whose first column names optimizers, each with its colour."""
    wide = {"settings", "how steps ended"}  # columns of sentences
    kinds = [' class="wide"' if name in wide else "" for name in table.header]
    pairs = zip(kinds, table.header, strict=True)
    head = "".join(f"<th{kind}>{_escape(name)}</th>" for kind, name in pairs)
    lines = []
    for row in table.rows:
        color = drawing.color_of(results.optimizers, row[0])
        key = f'<span class="key" style="background:var(--line-{color})"></span>'
        cells = [f"<td>{key}{_escape(row[0])}</td>"]
        pairs = zip(kinds[1:], row[1:], strict=True)
        cells += [f"<td{kind}>{_escape(cell)}</td>" for kind, cell in pairs]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head, body = f"<thead><tr>{head}</tr></thead>", "\n".join(lines)
    return f'<div class="scroll"><table>{head}\n<tbody>{body}</tbody></table></div>'


def _versions(results: Results) -> str:
    found = [f"{name} {number}" for name, number in results.study["machine"]["versions"].items()]
    if commit := results.study.get("commit"):
        found.append(f"commit {commit}")
    return ", ".join(found)


def _facts(problem: Mapping[str, Any]) -> str:
    facts = {"training examples": problem["examples"], **problem["about"]}
    items = "".join(f"<li>{_escape(f'{k}: {tables.value(v)}')}</li>" for k, v in facts.items())
    return f"<ul>{items}</ul>"


def _escape(text: str) -> str:
    return html.escape(text, quote=True).replace(" %", "&nbsp;%")


# ------------------------------------------------------------------ Markdown and CSV


def markdown(results: Results) -> str:
    """`report.md`: headline, table, settings and machine."""
    found = []
    for problem in results.problems:
        suffix = _suffix(results, problem)
        title = tables.named(results, problem) + res.headline(results, problem)
        found += [f"# {title}", "", tables.question(results, problem), ""]
        found += [f"- **{trouble}**" for trouble in tables.troubles(results, problem)]
        found += ["", f"![Training curves](curves{suffix}.png)", "", tables.caption(results), ""]
        found += [*_pipes(tables.Table(*res.table(results, problem))), ""]
        if (steps := tables.describe_steps(results, problem)) is not None:
            found += ["Medians over the steps of the second-order methods:", "", *_pipes(steps)]
            found += ["", f"![Steps](steps{suffix}.png)", ""]
        if (tuning := tables.tuning_table(results, problem)) is not None:
            found += ["## Tuning", "", *_pipes(tuning), "", tuning.note, ""]
            found += [f"![What each value tried ended with](sensitivity{suffix}.png)", ""]
    if (over_all := tables.standings(results)) is not None:
        found += ["## Over all problems and seeds", "", *_pipes(over_all), "", over_all.note, ""]
        found += ["![Performance profile](profiles.png)", ""]
    found += ["## Settings", ""]
    found += [f"- **{name}**: {settings}" for name, settings in tables.settings(results)]
    found += ["", "## How it was measured", "", *(f"- {rule}" for rule in tables.rules_of(results))]
    found += ["", f"{machine.sentence(results.study['machine'])}. {_versions(results)}.", ""]
    found.append(
        "Every evaluation: [results.csv](results.csv). Every step: [metrics.jsonl](metrics.jsonl)."
    )
    return "\n".join(found) + "\n"


def _pipes(table: tables.Table) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    align = ["---", *["---:"] * (len(table.header) - 1)]
    return [line(table.header), line(align), *(line(row) for row in table.rows)]


def csv_text(results: Results) -> str:
    """Every evaluation in a line, with its trial."""
    rows = [
        {"problem": t.problem, "optimizer": t.optimizer, "seed": t.seed, **row}
        for t in results.trials
        for row in t.evaluations
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "split"))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
