"""A study's report: one page that needs no network, and the same for machines and for READMEs.

report.html   headline, pictures, table, steps, settings, machine, data; light and dark
report.md     the same in short
curves, steps, sensitivity, profiles   .png and .svg; of several problems with their names
results.csv   every evaluation
"""

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
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
    """Writes all files of the report into the study's directory, and gives `report.html`.

    Args:
      workdir: the study's directory.
      results: its results; by default they are read from there.

    Raises:
      UserError: they cannot be written: the disk is full, say.
    """
    workdir = Path(workdir)
    results = store.load_results(workdir) if results is None else results
    try:
        _write(workdir, results)
    except OSError as error:
        raise check.UserError(
            f"The report cannot be written into {workdir}: {error.strerror}. What was measured "
            f"stays there; afterwards `jdl compare --report --workdir {workdir}` writes the report."
        ) from error
    return workdir / "report.html"


def _write(workdir: Path, results: Results) -> None:
    for problem in results.problems:
        suffix = "" if len(results.problems) == 1 else f"-{problem}"
        drawn = {"curves": plots.curves, "steps": plots.steps, "sensitivity": plots.sensitivity}
        for name, draw in drawn.items():
            _save(draw(results, problem), workdir / f"{name}{suffix}")
    _save(plots.profiles(results), workdir / "profiles")
    write_atomically(workdir / "results.csv", csv_text(results))
    write_atomically(workdir / "report.md", markdown(results))
    write_atomically(workdir / "report.html", page(results))


def _save(figure: Any | None, stem: Path) -> None:
    if figure is not None:
        for ending in (".png", ".svg"):
            drawing.save(figure, stem.with_name(stem.name + ending))


# ------------------------------------------------------------------ the page


def page(results: Results) -> str:
    """`report.html`: everything in one file, every word from outside escaped."""
    colors = [
        " ".join(f"--line-{i}: {color};" for i, color in enumerate(line))
        for line in (drawing.LINES, drawing.LINES_DARK)
    ]
    body = "".join(_problem(results, problem, i) for i, problem in enumerate(results.problems))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_title(results)}</title><style>{STYLE % tuple(colors)}</style></head><body>\n"
        f"<h1>{_title(results)}</h1>\n{body}{_standings(results)}{_settings(results)}{_foot(results)}</body></html>\n"
    )


def _title(results: Results) -> str:
    names = ", ".join(results.optimizers)
    return _escape(f"{names} on {', '.join(results.problems)}")


def _problem(results: Results, problem: str, place: int) -> str:
    about = results.problem(problem)
    found = [
        f"<h2>{_escape(tables.named(results, problem) + res.headline(results, problem))}</h2>",
        f"<p>{_escape(tables.question(results, problem))}</p>",
        *(
            f'<p class="trouble">{_escape(words)}</p>'
            for words in tables.troubles(results, problem)
        ),
        '<div class="figures">',
    ]
    for i, panel in enumerate(plots.panels(results, problem)):
        svg = drawing.inline_svg(
            plots.panel_figure(results, problem, panel),
            f"p{place}f{i}",
            f"{panel.title}: {panel.y_label} against {panel.x_label}, one line an optimizer. "
            "The table below has the numbers.",
        )
        found.append(f"<figure style='margin:0'>{svg}</figure>")
    found.append("</div>")
    found.append(f'<p class="note">{_escape(tables.caption(results))}</p>')
    header, rows = res.table(results, problem)
    found.append(f"<h3>Final values, and the way to {_escape(str(results.target(problem)))}</h3>")
    found.append(_table(header, rows, results))
    if described := tables.describe_steps(results, problem):
        found.append("<h3>What each second-order step did</h3>")
        cells = [[s.optimizer, f"{s.number:,}", *s.cells] for s in described]
        found.append(_table(tables.STEP_HEADER, cells, results, wide=len(tables.STEP_HEADER) - 1))
        figure = plots.steps(results, problem)
        if figure is not None:
            svg = drawing.inline_svg(figure, f"p{place}s", "What each second-order step did.")
            found.append(f"<div class='scroll'><div style='min-width:34rem'>{svg}</div></div>")
            found.append(
                f'<p class="note">Seed {results.study["seeds"][0]}. Medians in the table are over '
                "all steps of all seeds; costs are in gradients of the step's batch.</p>"
            )
    if (table := tables.tuning_table(results, problem)) is not None:
        header, rows, note = table
        found.append(f"<h3>Tuning</h3>{_table(header, rows, results)}")
        found.append(f'<p class="note">{_escape(note)}</p>')
        svg = drawing.inline_svg(
            plots.sensitivity(results, problem), f"p{place}t", "What each value tried ended with."
        )
        found.append(f"<div class='scroll'><div style='min-width:34rem'>{svg}</div></div>")
        found.append(
            '<p class="note">Large dots: chosen. Rings: cut early. Crosses on the upper edge: '
            "diverged or failed.</p>"
        )
    found.append(f"<h3>The problem</h3>{_facts(about)}")
    return "\n".join(found) + "\n"


def _standings(results: Results) -> str:
    found = tables.standings(results)
    if found is None:
        return ""
    header, rows, note = found
    svg = drawing.inline_svg(
        plots.profiles(results), "profile", "Performance profiles; the scores above sum them up."
    )
    return (
        "<h3>Over all problems and seeds</h3>"
        f'{_table(header, rows, results)}<p class="note">{_escape(note)}</p>'
        f"<figure style='margin:0;max-width:30rem'>{svg}</figure>"
    )


def _settings(results: Results) -> str:
    rows = [[name, told] for name, told in tables.settings(results)]
    return "<h3>Settings</h3>" + _table(["optimizer", "settings"], rows, results, wide=1)


def _foot(results: Results) -> str:
    where = results.study["machine"]
    versions = _versions(results)
    rules = "".join(f"<li>{_escape(rule)}</li>" for rule in tables.rules_of(results))
    flags = f" XLA_FLAGS: {where['xla_flags']}." if where["xla_flags"] else ""
    data = "data:text/csv;charset=utf-8," + quote(csv_text(results))
    return (
        f"<h3>How it was measured</h3><ul>{rules}</ul>"
        f"<h3>Machine and versions</h3><p>{_escape(machine.sentence(where))}.{_escape(flags)}</p>"
        f"<p>{_escape(versions)}.</p>"
        f'<h3>Data</h3><p><a download="results.csv" href="{data}">results.csv</a>, every '
        "evaluation, is in this page; the same and every step are in <code>metrics.jsonl</code> "
        "beside it.</p>"
    )


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], results: Results, wide: int = -1
) -> str:
    """A table whose first column names optimizers, each with its colour."""
    kinds = [' class="wide"' if place == wide else "" for place in range(len(header))]
    pairs = zip(kinds, header, strict=True)
    head = "".join(f"<th{kind}>{_escape(name)}</th>" for kind, name in pairs)
    lines = []
    for row in rows:
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
        suffix = "" if len(results.problems) == 1 else f"-{problem}"
        header, rows = res.table(results, problem)
        found += [
            f"# {tables.named(results, problem)}{res.headline(results, problem)}",
            "",
            tables.question(results, problem),
            "",
        ]
        found += [f"- **{words}**" for words in tables.troubles(results, problem)]
        found += ["", f"![Training curves](curves{suffix}.png)", "", tables.caption(results), ""]
        found += [*_pipes(header, rows), ""]
        if described := tables.describe_steps(results, problem):
            cells = [[s.optimizer, f"{s.number:,}", *s.cells] for s in described]
            found += ["Medians over the steps of the second-order methods:", ""]
            found += [
                *_pipes(tables.STEP_HEADER, cells),
                "",
                f"![Steps](steps{suffix}.png)",
                "",
            ]
        if (table := tables.tuning_table(results, problem)) is not None:
            header, rows, note = table
            found += ["## Tuning", "", *_pipes(header, rows), "", note, ""]
            found += [f"![What each value tried ended with](sensitivity{suffix}.png)", ""]
    over_all = tables.standings(results)
    if over_all is not None:
        header, rows, note = over_all
        found += ["## Over all problems and seeds", "", *_pipes(header, rows), "", note, ""]
        found += ["![Performance profile](profiles.png)", ""]
    found += ["## Settings", ""]
    found += [f"- **{name}**: {told}" for name, told in tables.settings(results)]
    where = results.study["machine"]
    versions = _versions(results)
    found += ["", "## How it was measured", "", *(f"- {rule}" for rule in tables.rules_of(results))]
    found += ["", f"{machine.sentence(where)}. {versions}."]
    found += ["", "Every evaluation: [results.csv](results.csv). Every step: "]
    found[-1] += "[metrics.jsonl](metrics.jsonl)."
    return "\n".join(found) + "\n"


def _pipes(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    align = ["---", *["---:"] * (len(header) - 1)]
    return [line(header), line(align), *(line(row) for row in rows)]


def csv_text(results: Results) -> str:
    """Every evaluation, one a line, with the trial it is of."""
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
