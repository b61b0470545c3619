import itertools
import re
from html.parser import HTMLParser

import pytest

from jdl.compare import load_results, plots, report, tables, write_report
from jdl.compare.drawing import spread

FALL = [(0.0, 2.0, 0.1), (1.0, 0.5, 0.6), (2.0, 0.09, 0.9), (9.0, 0.02, 1.0)]
WORDS = "</script><script>alert('1')</script> & \"more\""
VOID = {"meta", "br", "img", "link", "input", "hr"}


def steps():
    return [
        {
            "split": "train",
            "step": i,
            "seconds": 0.5 * i,
            "epoch": float(i),
            "loss": 1.0 / i,
            "gradient_equivalents": 10.0 * i,
            "linear_iterations": 7 * i,
            "damping": 1.0 / i,
            "reduction_ratio": None if i == 1 else 0.9,
            "step_size": 1.0,
            "termination": 1,
        }
        for i in (1, 2, 3)
    ]


class Strict(HTMLParser):
    """Every element that opens closes, in order; collects ids and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self._attributes(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _attributes(self, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.addresses.append(value)


@pytest.fixture
def workdir(plant):
    rows = {(name, seed): FALL for name in ("sgd", "hf", "wild") for seed in (0, 1)}
    rows[("wild", 0)] = rows[("wild", 1)] = [(0.0, 2.0, 0.1)]
    statuses = {("wild", seed): "diverged" for seed in (0, 1)}
    return plant(rows, statuses=statuses, steps={"hf": steps()}, words=WORDS)


def test_every_file_is_written(workdir):
    assert write_report(workdir) == workdir / "report.html"
    names = {path.name for path in workdir.iterdir() if path.is_file()}
    assert names >= {"report.md", "curves.png", "curves.svg", "steps.png", "results.csv"}
    lines = (workdir / "results.csv").read_text().splitlines()
    assert lines[0].startswith("problem,optimizer,seed,step,seconds,epoch,work,train_loss")
    assert len(lines) == 1 + 2 * (4 + 4 + 1)
    text = (workdir / "report.md").read_text()
    assert "| sgd | 0.02 |" in text
    assert "![Training curves](curves.png)" in text


def test_the_page_is_whole_and_stands_alone(workdir):
    page = report.page(load_results(workdir))
    parser = Strict()
    parser.feed(page)
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    assert all(a.startswith(("#", "data:")) for a in parser.addresses)
    references = {a[1:] for a in parser.addresses if a.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert references <= set(parser.ids)
    assert not re.search(r"(?:https?:)?//[a-z]", page)
    assert "prefers-color-scheme: dark" in page
    assert "viewport" in page


def test_words_from_outside_are_escaped(workdir):
    page = report.page(load_results(workdir))
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page


def test_what_steps_did_is_counted_step_by_step(workdir):
    results = load_results(workdir)
    (hf,) = tables.describe_steps(results, "planted").rows
    assert hf == ["hf", "6", "10", "7", "1 → 0.33", "0.9", "1", "step accepted (6)"]


def test_an_unequal_start_is_reported(plant):
    other = [(0.0, 1.9, 0.1), (1.0, 0.5, 0.6)]
    results = load_results(plant({("a", 0): FALL, ("b", 0): other}))
    assert any(
        "did not start" in w or "not all started" in w for w in tables.troubles(results, "planted")
    )


def test_bands_lie_between_the_seeds(plant):
    high = [(s, 2 * loss, a) for s, loss, a in FALL]
    results = load_results(plant({("a", 0): FALL, ("a", 1): high, ("a", 2): high}))
    (axes, *_) = plots.curves(results, "planted").axes
    (line,) = [line for line in axes.get_lines() if line.get_label() == "a"]
    assert line.get_ydata() == pytest.approx([1.0, 0.18, 0.04])
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().ymin == pytest.approx(0.02)


def test_names_at_the_ends_keep_apart():
    ends = [(0.0, 5.0), (0.0, 6.0), (3.0, 5.5), (200.0, 5.0), (0.0, 0.0)]
    places = spread(ends, [40.0] * 5, 10.0, low=0.0, high=100.0)
    near = sorted(places[i] for i in (0, 1, 2, 4))
    assert all(b - a >= 10 - 1e-3 for a, b in itertools.pairwise(near))
    assert near[0] >= 0
    assert places[3] == 5.0


def test_standings_tell_wins_and_how_surely(plant):
    rows = {}
    for seed in range(5):
        rows["fast", seed] = [(0.0, 1.0, 0.0), (2.0, 0.05, 0.0), (9.0, 0.04, 0.5)]
        rows["slow", seed] = [(0.0, 1.0, 0.0), (4.0, 0.05, 0.0), (9.0, 0.03, 0.5)]
    results = load_results(plant(rows))
    header, table_rows, note = tables.standings(results)
    assert table_rows == [["fast", "5 of 5", "1.00"], ["slow", "5 of 5", "0.67"]]
    assert "5 pairs of problem and seed" in note
    header, (pair,), _ = tables.pairs(results)
    told = dict(zip(header, pair, strict=True))
    assert (told["optimizer"], told["against"]) == ("fast", "slow")
    assert (told["won–lost"], told["p"]) == ("5–0", "0.062")
    assert told["cost ratio"] == "2 (2–2)"
    assert told["P(faster)"] == "1.00 (1.00–1.00)"
    assert "Over all problems and seeds" in report.page(results)
    assert (
        tables.standings(
            load_results(plant({("a", 0): [(0.0, 1.0, 0.0)], ("b", 0): [(0.0, 1.0, 0.0)]}))
        )
        is None
    )
