import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest

from jdl.compare import drawing, load_results, plots, report, table, tables, write_report
from jdl.compare.drawing import spread
from jdl.compare.results import beside, read_csv
from jdl.core.check import DataError
from jdl.optim.registry import TuningRange

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
            "iterations": i,
            "evaluations": 2 * i,
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
    assert lines[0].startswith(
        "problem,optimizer,seed,share,status,budget,unit,step,seconds,epoch,work,train_loss"
    )
    assert len(lines) == 1 + 2 * (4 + 4 + 1)
    text = (workdir / "report.md").read_text()
    assert "| sgd | 0.02 |" in text
    assert "![Curves](curves.png)" in text


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
    namespace = "http://www.w3.org/2000/svg"  # a name, not an address
    assert not re.search(r"(?:https?:)?//[a-z]", page.replace(namespace, ""))
    assert "prefers-color-scheme: dark" in page
    assert "viewport" in page


def embedded(page):
    """The data that the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def test_words_from_outside_are_escaped(workdir):
    page = report.page(load_results(workdir))
    assert page.count("<script") == page.count("</script>") == 2  # the data, and the page's own
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_names_from_outside_do_not_end_the_data(plant):
    results = load_results(plant({("a", 0): FALL}))
    name = "</script><!--<script>"
    results.study["optimizers"][0]["name"] = name
    results = results._replace(trials=tuple(t._replace(optimizer=name) for t in results.trials))
    page = report.page(results)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert embedded(page)["lines"][0]["name"] == name


def test_the_page_has_the_curves_of_the_files(workdir):
    results = load_results(workdir)
    data = embedded(report.page(results))
    assert [line["name"] for line in data["lines"]] == ["sgd", "hf", "wild"]
    chart = next(c for c in data["charts"] if c["title"] == "Loss against time")
    sgd = chart["series"][0]
    assert sgd["x"] == [1.0, 2.0, 9.0]
    assert sgd["y"] == [0.5, 0.09, 0.02]
    assert sgd["marks"] == [[2.0, 0.09, "reached"]] * 2
    assert chart["level"] == 0.1
    for chart in data["charts"]:
        if chart["title"].startswith("Ranks"):  # all equal here
            continue
        for axis in (chart["x"], chart["y"]):
            shown = [at for at, _ in axis["ticks"] if axis["low"] <= at <= axis["high"]]
            assert len(shown) >= 2, (chart["title"], axis)
    assert data["lines"][0]["dashes"] != data["lines"][1]["dashes"] == []


def test_negative_losses_are_drawn_on_a_linear_axis(plant):
    rows = {("a", 0): [(0.0, 2.0, 0.1), (1.0, 0.5, 0.6), (2.0, -3.0, 0.9)]}
    results = load_results(plant(rows))
    (chart,) = [c for c in plots.curve_charts(results, "planted") if c.title == "Loss against time"]
    assert chart.logs == (True, False)
    assert chart.series[0].y.tolist() == [0.5, -3.0]
    assert plots.data(results, chart)["y"]["low"] < -3.0


def test_a_far_target_is_told_instead_of_drawn(plant):
    results = load_results(plant({("a", 0): FALL}, target=("train_loss", "at most", 1e-9)))
    chart = plots.curve_charts(results, "planted")[0]
    assert chart.level is None
    assert chart.y_label == "training loss (train loss ≤ 1e-09 is below)"


def test_a_target_below_the_floor_is_drawn_where_it_is(plant):
    rows = {("a", s): [(0.0, 1.0, 0.1), (1.0, 1e-6, 0.6), (2.0, 3e-10, 0.6)] for s in (0, 1)}
    results = load_results(plant(rows, target=("train_loss", "at most", 1e-9)))
    chart = plots.curve_charts(results, "planted")[0]
    assert chart.level == 1e-9
    assert chart.series[0].y[-1] == pytest.approx(3e-10)


def test_costs_of_the_same_evaluation_have_equal_ranks(plant):
    rows = {("a", s): [(0.0, 2.0, 0.1), (4.0, 0.05, 0.6)] for s in (0, 1)}
    rows |= {("b", s): [(0.0, 2.0, 0.1), (4.01, 0.05, 0.6)] for s in (0, 1)}
    rows |= {("c", s): [(0.0, 2.0, 0.1), (5.0, 0.05, 0.6)] for s in (0, 1)}
    chart = plots.rank_chart(load_results(plant(rows)), "planted")
    assert {series.name: series.y[2] for series in chart.series} == {"a": -1, "b": -1, "c": -3}


def test_steps_that_decide_nothing_are_those_of_first_order(plant):
    """SOAP and Muon report their steps too, but evaluate each once."""
    kept = {"split": "train", "seconds": 0.1, "termination": 1.0}
    both = {
        name: [kept | {"step": k, "iterations": float(k), "evaluations": each * k} for k in (1, 2)]
        for name, each in (("soap", 1.0), ("lbfgs", 1.5))
    }
    results = load_results(plant({(name, 0): FALL for name in both}, steps=both))
    assert {t.optimizer: len(t.steps) for t in results.trials} == {"soap": 0, "lbfgs": 2}
    assert plots.style_of(results, "soap")[1] != ()
    assert plots.style_of(results, "lbfgs")[1] == ()


def test_ranks_move_with_the_unit_of_cost(plant):
    """a is faster; b, evaluated at every other step, needs fewer of them."""
    rows = {("a", s): [(0.0, 2.0, 0.1), (1.0, 0.5, 0.6), (2.0, 0.05, 0.6)] for s in (0, 1)}
    rows |= {("b", s): [(0.0, 2.0, 0.1), (4.0, 0.05, 0.6)] for s in (0, 1)}
    chart = plots.rank_chart(load_results(plant(rows)), "planted")
    ranks = {series.name: series.y.tolist() for series in chart.series}
    assert ranks == {"a": [-2.0, -1.0, -1.0], "b": [-1.0, -2.0, -2.0]}


def test_long_names_are_whole_and_differ():
    names = [f"adamw-cosine-{x}-weight-decay-0.01" for x in ("0.1", "0.01", "0.001")]
    short = drawing.short_names(names)
    assert list(short.values()) == ["…0.1…", "…0.01…", "…0.001…"]
    for alike in (
        ["x" * 60 + "1", "x" * 60 + "2"],
        ["m" * 30 + "1" + "n" * 30, "m" * 30 + "2" + "n" * 30],
    ):
        assert len(set(drawing.short_names(alike).values())) == 2


def test_long_names_stay_inside_their_axes(plant):
    names = [f"{letter * 9}-with-{letter * 9}" for letter in "abc"]
    results = load_results(plant({(name, 0): FALL for name in names}))
    figure = plots.figure(results, plots.curve_charts(results, "planted"))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in axes.texts:
            if text.get_text() != "target":
                assert text.get_window_extent().x1 <= axes.bbox.x1 + 1


@pytest.mark.parametrize(
    ("low", "high"),
    [(3.0, 7.0), (0.95, 1.05), (1e-8, 1.0), (4.0, 19.0), (1.0, 1e4), (2e-14, 3e-14)],
)
def test_every_axis_has_ticks(low, high):
    for log in (False, True):
        found = [at for at, _ in drawing.ticks(low, high, log)]
        assert 2 <= len(found) <= 9
        assert all(low * 0.999 <= at <= high * 1.001 for at in found)
        assert found == sorted(set(found))


def test_a_published_study_is_laid_beside(plant, tmp_path):
    rows = {(name, seed): FALL for name in ("sgd", "hf") for seed in (0, 1)}
    results = load_results(plant(rows, statuses={("hf", 1): "diverged"}, words="loss is nan"))
    published = tmp_path / "theirs" / "results.csv"
    published.parent.mkdir()
    published.write_text(report.csv_text(results))
    trials = read_csv(published)
    assert [(t.optimizer, t.seed, t.status) for t in trials] == [
        ("hf", 0, "done"),
        ("hf", 1, "diverged"),
        ("sgd", 0, "done"),
        ("sgd", 1, "done"),
    ]
    assert [row["seconds"] for row in trials[0].evaluations] == [0.0, 1.0, 2.0, 9.0]
    both = beside(results, published)
    assert both.optimizers == ("sgd", "hf", "hf (theirs)", "sgd (theirs)")
    found = table(both, "planted")[1]
    assert found[0][1:] == found[3][1:]  # of the same trials the same line
    assert found[1][1:] == found[2][1:]
    assert "theirs" in tables.troubles(both, "planted")[-1]
    page = report.page(both)
    assert "sgd (theirs)" in page
    names = [line["name"] for line in embedded(page)["lines"]]
    assert names == list(both.optimizers)
    assert report.csv_text(both) == report.csv_text(results)  # not what is another's


def test_a_study_of_several_ends_is_laid_beside_with_them(plant, tmp_path):
    results = load_results(plant({("a", 0): FALL}))
    results = results._replace(
        study=dict(results.study) | {"ends": [0.5, 1.0]},
        shorter=(results.trials[0]._replace(share=0.5),),
    )
    path = tmp_path / "theirs.csv"
    path.write_text(report.csv_text(results))
    path = path.rename(tmp_path / "results.csv")
    both = beside(results, path)
    assert [(t.optimizer, t.share) for t in both.shorter] == [
        ("a", 0.5),
        (f"a ({tmp_path.name})", 0.5),
    ]
    _, rows, _ = tables.at_ends(both, "planted")
    assert rows[0][1:] == rows[1][1:] == ["0.09", "0.02"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: the column 'problem' is missing"),
        ("{head}\nplanted,a,0,1.0,done,1\n", "line 2: it has not as many values"),
        ("{head}\nplanted,a,zero,1.0,done,10,seconds,1,1,1,1\n", "line 2: invalid literal"),
        ("{head}\nplanted,a,0,1.0,done,10,seconds,1,1,1,much\n", "line 2: could not convert"),
        ("{head}\nplanted,a,0,1.0,done,10,years,1,1,1,1\n", "line 2: `budget` must be one of"),
        ("{head}\nother,a,0,1.0,done,10,seconds,1,1,1,1\n", "has no problem and seed of this"),
        ("{head}\nplanted,a,0,1.0,done,9,seconds,1,1,1,1\n", "a budget of 9 s of training, this"),
        ("{head}\nplanted,a,0,1.0,done,99,steps,1,1,1,1\n", "a budget of 99 steps, this study 10"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_csv_that_is_none_is_reported(plant, tmp_path, text, message):
    results = load_results(plant({("a", 0): FALL}))
    path = tmp_path / "other.csv"
    if text is not None:
        head = "problem,optimizer,seed,share,status,budget,unit,step,seconds,epoch,work"
        path.write_text(text.format(head=head))
    with pytest.raises(DataError, match=re.escape(message)):
        beside(results, path)


def test_a_wide_good_region_and_the_gain_of_tuning_are_reported(plant):
    """Five rates a decade apart; three end within 10 % of the best, and tuning halves the cost."""
    slow = [(0.0, 2.0, 0.1), (4.0, 0.05, 0.6)]
    fast = [(0.0, 2.0, 0.1), (2.0, 0.05, 0.6)]
    results = load_results(plant({("sgd", 0): slow, ("sgd-tuned", 0): fast}))
    space = [TuningRange("rate", 1e-5, 1.0)._asdict()]
    results.study["optimizers"][1]["search"] = {"of": "sgd", "space": space}
    tuning = {"criterion": "train_loss", "best": "min"}
    ends = {1e-4: 0.3, 1e-3: 0.108, 1e-2: 0.1, 1e-1: 0.109, 1.0: math.nan}

    def trial(rate, end):
        row = results.trials[0].evaluations[0] | {"train_loss": end}
        settings = {"budget": {"amount": 10.0}, "tuning": tuning | {"values": {"rate": rate}}}
        status = "done" if math.isfinite(end) else "diverged"
        return results.trials[0]._replace(evaluations=(row,), settings=settings, status=status)

    tuned = {("planted", "sgd-tuned"): tuple(trial(*x) for x in ends.items())}
    results = results._replace(tuned=tuned)
    (row,) = tables.robustness(results, "planted").rows
    assert row == ["sgd-tuned", "3 of 5", "rate 2 decades", "2"]
    (chart,) = plots.sensitivity_charts(results, "planted")
    (series,) = chart.series
    assert series.x.tolist() == [1e-4, 1e-3, 1e-2, 1e-1]
    assert [kind for _, _, kind in series.marks] == [
        "tried",
        "tried",
        "chosen",
        "tried",
        "diverged",
    ]
    assert plots.data(results, chart)["series"][0]["marks"][-1] == [1.0, None, "diverged"]


def test_cost_of_what_was_measured(plant):
    workdir = plant({("a", s): FALL for s in range(3)} | {("b", s): FALL for s in range(3)})
    for seed, seconds in enumerate((0.1, 0.2, 0.4)):
        path = workdir / "planted" / f"a-seed{seed}" / "result.json"
        measured = {"evaluation_seconds": 0.25, "step_seconds": seconds, "gradient_seconds": 0.1}
        told = json.loads(path.read_text()) | measured | {"state_bytes": 2_000_000}
        path.write_text(json.dumps(told))
    header, (a, b), _ = tables.costs(load_results(workdir), "planted")
    told = dict(zip(header, a, strict=True))
    assert (told["steps"], told["seconds"], told["step ms"]) == ("30", "9", "200")
    assert (told["step / gradient"], told["state kB"]) == ("2", "2,000")
    assert told["evaluation"] == "10 %"  # 4 of ¼ s, beside 9 s of training
    assert b[header.index("step / gradient")] == b[header.index("evaluation")] == "–"


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
    (axes, *_) = plots.figure(results, plots.curve_charts(results, "planted")).axes
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
