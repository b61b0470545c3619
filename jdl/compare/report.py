"""A study's report: a page that needs no network, a short version in Markdown, and the data.

report.html   headline, pictures, tables, settings, machine, data; light and dark
report.md     the same in short
curves, steps, sensitivity, profiles   .png and .svg; of several problems with their names
results.csv   every evaluation
"""

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jdl.compare import drawing, machine, plots, store, tables
from jdl.compare import results as res
from jdl.compare.results import Results
from jdl.core import check
from jdl.core.files import write_atomically

PAPER = "--page: #ffffff; --soft: #f1f3f6; --ink: #1b1d22; --muted: #5a5e68; --grid: #e4e5e9;"
NIGHT = "--page: #15171b; --soft: #22262c; --ink: #e8e9ec; --muted: #a0a5b0; --grid: #33373f;"
STYLE = """
:root { color-scheme: light dark; @light }
@media screen and (prefers-color-scheme: dark) { :root { @dark } }
* { box-sizing: border-box } [hidden] { display: none !important }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.1rem; color: var(--muted); font-weight: 600; margin: 0 0 1.2rem }
h2 { font-size: 1.45rem; line-height: 1.3; margin: 2.2rem 0 .6rem; max-width: 50rem }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p, li { max-width: 50rem } .note { color: var(--muted); font-size: .9rem }
.trouble { border-left: 3px solid #d55e00; max-height: 12rem; overflow: auto }
.figures { display: grid; gap: 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; position: relative; min-height: 13rem; break-inside: avoid }
figcaption { font-weight: 600; font-size: .92rem } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--ink); font-size: 11px } svg .muted { fill: var(--muted) }
.grid { stroke: var(--grid) } .target { stroke: var(--muted); stroke-dasharray: 2 2 }
.cursor { stroke: var(--muted) } .line { stroke: var(--c); fill: none; stroke-linejoin: round }
.band { fill: var(--c); opacity: .15 } .dot { fill: var(--c); stroke: var(--page) }
.cut { fill: var(--page); stroke: var(--c) }
svg text.name { fill: var(--c); font-weight: 600 }
output { position: absolute; z-index: 2; left: 0; right: 0; top: 100%; padding: .3rem .5rem;
  background: var(--soft); font-size: .82rem; border-radius: .3rem } output:empty { display: none }
#bar { display: flex; flex-wrap: wrap; gap: .3rem; padding: .4rem 0; background: var(--page) }
@media (min-width: 60rem) { #bar { position: sticky; top: 0; z-index: 3 } }
button, input { font: inherit; font-size: .85rem; color: inherit; background: var(--soft);
  border: 1px solid var(--grid); border-radius: .4rem; padding: .15rem .5rem }
button[aria-pressed=false] { opacity: .45; text-decoration: line-through }
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " ↑" }
th[aria-sort=descending] button::after { content: " ↓" }
.scroll { overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--grid) }
th:first-child { text-align: left; padding-left: 0; min-width: 8rem; overflow-wrap: anywhere }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom } i { font-style: normal;
  white-space: nowrap }
.wide { text-align: left; min-width: 15rem; font-size: .85rem }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
a { color: inherit } code { font-size: .9em; user-select: all }
@page { size: A4; margin: 13mm }
@media print { #bar { display: none } :root { font-size: 9pt } body { padding: 0 }
  .scroll, .trouble { overflow: visible; max-height: none } table { font-size: 7.5pt; width: 100% }
  th, td { padding: .2rem .3rem } i { white-space: normal } .wide, th:first-child { min-width: 0 }
  .figures { grid-template-columns: 1fr 1fr } tr, figure { break-inside: avoid }
  h2, h3 { break-after: avoid } * { print-color-adjust: exact } }
"""
SMALL = 200_000  # letters of a results.csv that the page holds
MANY = 40  # rows of a table that is folded up


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
        for section in [*(s for p in results.problems for s in _of(results, p)), *_all(results)]:
            if (figure := plots.figure(results, section.charts)) is not None:
                for ending in (".png", ".svg"):
                    drawing.save(figure, workdir / f"{section.picture}{ending}")
        write_atomically(workdir / "results.csv", csv_text(results))
        write_atomically(workdir / "report.md", markdown(results))
        write_atomically(workdir / "report.html", page(results))
    except OSError as error:
        raise check.UserError(
            f"The report cannot be written into {workdir}: {error.strerror}. The measurements "
            f"are kept; afterwards `jdl compare --report --workdir {workdir}` writes the report."
        ) from error
    return workdir / "report.html"


class Section(NamedTuple):
    """A part of the report: a table, charts with a caption, and sentences, as there are.

    Attributes:
      picture: the name of the file of its charts, without the ending.
    """

    title: str
    table: tables.Table | None = None
    charts: Sequence[plots.Chart] = ()
    picture: str = ""
    caption: str = ""
    said: Sequence[str] = ()


def _of(results: Results, problem: str) -> list[Section]:
    """The parts on one problem that have content."""
    suffix = "" if len(results.problems) == 1 else f"-{problem}"
    curves = plots.curve_charts(results, problem)
    curves += [] if (ranks := plots.rank_chart(results, problem)) is None else [ranks]
    marks = "Large dots: chosen. Rings: cut early. Crosses on the upper edge: diverged or failed."
    values = tables.Table(*res.table(results, problem))
    tried = plots.sensitivity_charts(results, problem)
    caption = tables.caption(results)
    found = [
        Section(f"Final values, and the way to {results.target(problem)}", values),
        Section("Curves", None, curves, f"curves{suffix}", caption),
        Section("Cost", tables.costs(results, problem)),
        Section("At the end of each budget", tables.at_ends(results, problem)),
        Section("What did not work", said=tables.negatives(results, problem)),
        Section(
            "What each second-order step did",
            tables.describe_steps(results, problem),
            plots.step_charts(results, problem),
            f"steps{suffix}",
        ),
        Section(
            "Tuning", tables.tuning_table(results, problem), tried, f"sensitivity{suffix}", marks
        ),
        Section("Robustness", tables.robustness(results, problem)),
    ]
    return [x for x in found if x.table is not None or x.charts or x.said]


def _all(results: Results) -> list[Section]:
    """The parts on all problems together; none for fewer than three pairs of problem and seed."""
    standings, chart = tables.standings(results), plots.profile_chart(results)
    if standings is None or chart is None:
        return []
    over_all = Section("Over all problems and seeds", standings, [chart], "profiles")
    return [over_all, Section("Every pair", tables.pairs(results))]


# ------------------------------------------------------------------ the page


def page(results: Results) -> str:
    """`report.html`: everything in one file, all text from outside escaped."""
    charts: list[plots.Chart] = []
    body = _bar(results)
    body += "".join(_problem(results, problem, charts) for problem in results.problems)
    body += "".join(_section(results, section, charts) for section in _all(results))
    body += _settings(results) + _foot(results)
    colors = [
        base + "".join(f" --line-{i}: {color};" for i, color in enumerate(line))
        for base, line in ((PAPER, drawing.LINES), (NIGHT, drawing.LINES_DARK))
    ]
    style = STYLE.replace("@light", colors[0]).replace("@dark", colors[1])
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_title(results)}</title><style>{style}</style></head><body>\n"
        f"<h1>{_title(results)}</h1>\n{body}\n"
        f'<script type="application/json" id="data">{_data(results, charts)}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def _data(results: Results, charts: Iterable[plots.Chart]) -> str:
    """The lines and charts as JSON that cannot end its element."""
    short = drawing.short_names(results.optimizers)
    lines = []
    for name in results.optimizers:
        color, dashes = plots.style_of(results, name)
        thin = f"{name}-tuned" in results.optimizers
        line = {"name": name, "short": short[name], "color": color, "dashes": dashes, "thin": thin}
        lines.append(line)
    found = {"lines": lines, "charts": [plots.data(results, chart) for chart in charts]}
    text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _title(results: Results) -> str:
    names = results.optimizers
    told = ", ".join(names) if len(names) <= 8 else f"{len(names)} optimizers"
    return _escape(f"{told} on {', '.join(results.problems)}")


def _bar(results: Results) -> str:
    """Chooses which optimizers are shown; hidden where no script runs."""
    buttons = "".join(
        f'<button aria-pressed="true">{_key(results, name)}{_escape(name)}</button>'
        for name in results.optimizers
    )
    label = "Show optimizers whose name contains"
    return (
        f'<div id="bar" role="group" aria-label="Optimizers shown" hidden>'
        f'<input type="search" aria-label="{label}" placeholder="Filter">{buttons}</div>\n'
        "<noscript><p>The pictures here need JavaScript; they are also beside this page, as "
        "PNG and SVG.</p></noscript>\n"
    )


def _problem(results: Results, problem: str, charts: list[plots.Chart]) -> str:
    title = tables.named(results, problem) + res.headline(results, problem)
    found = [f"<h2>{_escape(title)}</h2>", f"<p>{_escape(tables.question(results, problem))}</p>"]
    if troubles := tables.troubles(results, problem):
        found.append(f'<div class="trouble">{_list(troubles)}</div>')
    found += [_section(results, section, charts) for section in _of(results, problem)]
    found.append(f"<h3>The problem</h3>{_facts(results.problem(problem))}")
    lines = {name: res.command(results, problem, name) for name in results.optimizers}
    again = "".join(
        f"<li>{_escape(name)}: <code>{html.escape(line)}</code></li>"
        for name, line in lines.items()
        if line is not None
    )
    if again:
        found.append(f"<details><summary>Run a row again</summary><ul>{again}</ul></details>")
    return "\n".join(found) + "\n"


def _section(results: Results, section: Section, charts: list[plots.Chart]) -> str:
    """A part as HTML: places for its charts, which `report.js` draws, are added to the page's."""
    found = []
    if section.table is not None:
        found.append(_table(section.table, results) + _note(section.table.note))
        if len(section.table.rows) > MANY:
            count = f"<summary>{len(section.table.rows)} rows</summary>"
            found = [f"<details>{count}{found[0]}</details>"]
    places = []
    for chart in section.charts:
        places.append(
            f'<figure data-chart="{len(charts)}"><figcaption>{_escape(chart.title)}'
            '</figcaption><output aria-live="polite"></output></figure>'
        )
        charts.append(chart)
    if places:
        found.append(f'<div class="figures">{"".join(places)}</div>{_note(section.caption)}')
    if section.said:
        found.append(_list(section.said))
    return f"<h3>{_escape(section.title)}</h3>\n" + "\n".join(found)


def _settings(results: Results) -> str:
    table = tables.Table(["optimizer", "settings"], tables.settings(results))
    return "<h3>Settings</h3>" + _table(table, results)


def _note(text: str) -> str:
    return text and f'<p class="note">{_escape(text)}</p>'


def _foot(results: Results) -> str:
    where = results.study["machine"]
    flags = f" XLA_FLAGS: {where['xla_flags']}." if where["xla_flags"] else ""
    data, where_from = csv_text(results), "lies beside this page"
    address = "results.csv"
    if len(data) <= SMALL:
        address = "data:text/csv;charset=utf-8," + quote(data)
        where_from = "is part of this page"
    return (
        f"<h3>How it was measured</h3>{_list(tables.rules_of(results))}"
        f"<h3>Machine and versions</h3><p>{_escape(machine.sentence(where))}.{_escape(flags)}</p>"
        f"<p>{_escape(_versions(results))}.</p>"
        f'<h3>Data</h3><p><a download="results.csv" href="{address}">results.csv</a>, every '
        f"evaluation, {where_from}; <code>metrics.jsonl</code> beside it has steps between.</p>"
    )


def _key(results: Results, optimizer: str) -> str:
    color = plots.style_of(results, optimizer)[0]
    return f'<span class="key" style="background:var(--line-{color})"></span>'


def _table(table: tables.Table, results: Results) -> str:
    """A table whose first column names optimizers, each with its colour."""
    wide = {"settings", "how steps ended"}  # columns of sentences
    kinds = [' class="wide"' if name in wide else "" for name in table.header]
    pairs = zip(kinds, table.header, strict=True)
    head = "".join(f'<th scope="col"{kind}>{_escape(name)}</th>' for kind, name in pairs)
    places = {name: i for i, name in enumerate(results.optimizers)}
    lines = []
    for row in table.rows:
        cells = [f'<th scope="row">{_key(results, row[0])}{_escape(row[0])}</th>']
        pairs = zip(kinds[1:], row[1:], strict=True)
        cells += [f"<td{kind}>{_cell(cell)}</td>" for kind, cell in pairs]
        of = " ".join(str(places[cell]) for cell in row[:2] if cell in places)
        own = f' data-line="{of}"' if of else ""
        lines.append(f"<tr{own}>{''.join(cells)}</tr>")
    head, body = f"<thead><tr>{head}</tr></thead>", "\n".join(lines)
    return f'<div class="scroll" tabindex="0"><table>{head}\n<tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """A range in parentheses stays in one line."""
    return re.sub(r"\([^()]{1,24}\)", r"<i>\g<0></i>", _escape(text))


def _versions(results: Results) -> str:
    found = [f"{name} {number}" for name, number in results.study["machine"]["versions"].items()]
    if commit := results.study.get("commit"):
        found.append(f"commit {commit}")
    return ", ".join(found)


def _facts(problem: Mapping[str, Any]) -> str:
    facts = {"training examples": problem["examples"], **problem["about"]}
    return _list(f"{k}: {tables.value(v)}" for k, v in facts.items())


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_escape(text)}</li>' for text in sentences)}</ul>"


def _escape(text: str) -> str:
    return html.escape(text, quote=True).replace(" %", "&nbsp;%")


# ------------------------------------------------------------------ Markdown and CSV


def markdown(results: Results) -> str:
    """`report.md`: headline, table, settings and machine."""
    found = []
    for problem in results.problems:
        title = tables.named(results, problem) + res.headline(results, problem)
        found += [f"# {title}", "", tables.question(results, problem), ""]
        found += [*(f"- **{trouble}**" for trouble in tables.troubles(results, problem)), ""]
        found += [line for section in _of(results, problem) for line in _markdown(section)]
    found += [line for section in _all(results) for line in _markdown(section)]
    found += ["## Settings", ""]
    found += [f"- **{name}**: {settings}" for name, settings in tables.settings(results)]
    found += ["", "## How it was measured", "", *(f"- {rule}" for rule in tables.rules_of(results))]
    found += ["", f"{machine.sentence(results.study['machine'])}. {_versions(results)}.", ""]
    found.append(
        "Every evaluation: [results.csv](results.csv). With steps: [metrics.jsonl](metrics.jsonl)."
    )
    return "\n".join(found) + "\n"


def _markdown(section: Section) -> list[str]:
    found = [f"## {section.title}", ""]
    if section.table is not None:
        found += [
            *_pipes(section.table),
            "",
            *([section.table.note, ""] if section.table.note else []),
        ]
    if section.charts:
        found += [f"![{section.title}]({section.picture}.png)", "", section.caption, ""]
    return [*found, *(f"- {text}" for text in section.said), ""]


def _pipes(table: tables.Table) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    align = ["---", *["---:"] * (len(table.header) - 1)]
    return [line(table.header), line(align), *(line(row) for row in table.rows)]


def csv_text(results: Results) -> str:
    """Every evaluation of the study's own trials in a line, with its trial and the budget."""
    beside = {x["name"] for x in results.study["optimizers"] if "from" in x["settings"]}
    budget = dict(zip(res.BUDGET, results.budget, strict=True))
    rows = [
        {name: getattr(t, name) for name in res.IDENTITY} | budget | row
        for t in (*results.trials, *results.shorter)
        for row in t.evaluations
        if t.optimizer not in beside
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "split"))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
