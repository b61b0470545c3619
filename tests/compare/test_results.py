import math

import numpy as np
import pytest
from scipy import stats

from jdl.compare import load_results, table, tables
from jdl.compare.results import Target, ending, headline, lines
from jdl.compare.store import FORMAT
from jdl.core.check import DataError

FAST = [(0.0, 2.0, 0.1), (1.0, 0.5, 0.6), (2.0, 0.09, 0.9), (9.0, 0.2, 0.95)]
SLOW = [(0.0, 2.0, 0.1), (4.0, 0.5, 0.6), (8.0, 0.01, 0.9)]
NEVER = [(0.0, 2.0, 0.1), (5.0, 1.0, 0.5)]


def only(results, optimizer):
    (line,) = [line for line in lines(results, "planted") if line.optimizer == optimizer]
    return line


def test_target_counts_at_the_first_evaluation_that_meets_it(plant):
    line = only(load_results(plant({("a", 0): FAST})), "a")
    assert line.costs["seconds"] == (
        2.0,
        2.0,
        2.0,
    )  # neither before, nor undone by the rise after it
    assert line.costs["work"].median == 4.0
    assert line.train_loss.median == 0.2  # the last, not the best
    assert line.test["test_accuracy"].median == 0.95


def test_nothing_beyond_the_budget_counts(plant):
    late = [(0.0, 2.0, 0.1), (9.0, 0.5, 0.5), (10.1, 0.01, 0.9)]
    line = only(load_results(plant({("a", 0): late})), "a")
    assert line.reached == 0
    assert line.train_loss.median == 0.5


def test_misses_count_as_infinite_and_are_reported(plant):
    rows = {("a", 0): FAST, ("a", 1): NEVER, ("a", 2): SLOW, ("b", 0): NEVER}
    results = load_results(plant(rows | {("b", 1): NEVER, ("b", 2): NEVER}))
    line = only(results, "a")
    assert (line.reached, line.trials) == (2, 3)
    assert line.costs["seconds"] == (8.0, 2.0, math.inf)
    header, rows = table(results, "planted")
    assert [row[0] for row in rows] == ["a", "b"]
    column = header.index("seconds to target")
    assert rows[0][column] == "8 (2–∞), 2 of 3"
    assert rows[1][column] == "not reached"


def test_divergence_takes_the_last_value_away(plant):
    rows = {("a", 0): FAST, ("b", 0): SLOW}
    results = load_results(plant(rows, statuses={("a", 0): "diverged"}, words="loss is nan"))
    header, rows = table(results, "planted")
    assert rows[0][header.index("train loss")] == "diverged"
    assert rows[0][header.index("test accuracy")] == "–"
    assert tables.troubles(results, "planted") == ["a, seed 0: loss is nan"]
    assert "Diverged: a." in tables.negatives(results, "planted")
    assert ending(results, "planted").startswith(
        "After 10 s of training b had the lowest training loss, 0.01"
    )


@pytest.mark.parametrize(
    ("target", "directions"),
    [
        (("test_coverage", "at least", 0.8), {}),
        (("train_loss", "at most", 0.1), {"coverage": "max"}),
    ],
)
def test_a_diverged_seed_never_improves_a_metric(plant, target, directions):
    values = [0.88, 0.9, 0.92, 0.94, 0.99]
    rows = {("a", s): [(0.0, 2.0, 0.1), (2.0, 0.5, v)] for s, v in enumerate(values)}
    options = {"target": target, "directions": directions, "metric": "test_coverage"}
    statuses = {("a", 4): "diverged"}
    results = load_results(plant(rows, statuses=statuses, **options))
    assert only(results, "a").test["test_coverage"] == (0.9, -math.inf, 0.94)
    header, (row,) = table(results, "planted")
    assert row[header.index("test coverage")] == "0.9 (lost–0.94)"


def test_without_a_direction_a_lost_value_leaves_no_median(plant):
    rows = {("a", s): [(0.0, 2.0, 0.1), (2.0, 0.5, 0.9)] for s in range(3)}
    results = load_results(plant(rows, metric="test_size", statuses={("a", 1): "diverged"}))
    header, (row,) = table(results, "planted")
    assert row[header.index("test size")] == "–"
    assert results.lower_is_better("planted", "test_size") is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({("a", 0): NEVER}, "No optimizer reached train loss ≤ 0.1 within 10 s"),
        ({("a", 0): SLOW, ("b", 0): FAST}, "b reached train loss ≤ 0.1 first, after 2 s; next a"),
        ({("a", 0): SLOW, ("b", 0): FAST}, "One seed"),
        (
            {("a", 0): SLOW, ("b", 0): NEVER},
            "a reached train loss ≤ 0.1 first, after 8 s; it alone",
        ),
        (
            {("a", 0): SLOW, ("a", 1): SLOW, ("b", 0): FAST, ("b", 1): NEVER},
            "no other reached it in most seeds within 10 s of training, some did: b (1 of 2).",
        ),
        (
            {(n, s): r for s in range(6) for n, r in (("a", FAST), ("b", SLOW))},
            "a against b: 6–0 (sign test, p 0.031): a was ahead.",
        ),
        (
            {(n, s): r for s in range(5) for n, r in (("a", FAST), ("b", SLOW))},
            "5–0 (sign test, p 0.062): undecided; fewer than six seeds cannot reach p 0.05.",
        ),
        (
            {(n, s): r for s in range(6) for n, r in (("b", SLOW), ("a", FAST if s else SLOW))},
            "a against b: 5–0 (sign test, p 0.062): undecided.",
        ),
        (
            {("a", 0): FAST, ("a", 1): SLOW, ("b", 0): SLOW, ("b", 1): SLOW},
            "1–0 (sign test, p 1): undecided",
        ),
        (
            {(n, s): SLOW for s in range(7) for n in "abc"},
            "a, b and c reached train loss ≤ 0.1 after the same 8 s (medians of 7 seeds). "
            "No difference was seen.",
        ),
        (
            {
                (n, s): r
                for s, (r, q) in enumerate([(FAST, SLOW), (SLOW, FAST)])
                for n, r in zip("ab", (r, q), strict=True)
            }
            | {(n, 2): SLOW for n in "ab"},
            "a and b reached train loss ≤ 0.1 after the same 8 s (medians of 3 seeds). "
            "Seed by seed, a against b: 1–1 (sign test, p 1): undecided",
        ),
    ],
)
def test_headline(plant, rows, expected):
    assert expected in headline(load_results(plant(rows)), "planted")


@pytest.mark.parametrize("kind", ["epochs", "work", "steps"])
def test_equal_costs_are_a_tie_in_every_unit(plant, kind):
    """The seconds differ in each seed; the headline's own unit does not."""
    rows = {(n, s): [(0.0, 2.0, 0.1), (2.0, 0.05, 0.9)] for s in range(6) for n in "ab"}
    results = load_results(plant(rows, kind=kind))
    told = headline(results, "planted")
    assert told.startswith("a and b reached train loss ≤ 0.1 after the same")
    assert told.endswith("No difference was seen.")
    assert "a and b" not in ending(results, "planted").replace("a and b both had", "")


def test_the_end_says_ties_and_what_is_undecided(plant):
    rows = {(n, s): [(0.0, 2, 0.1), (2.0, 0.5, 0.9)] for s in range(3) for n in "ab"}
    assert ending(load_results(plant(rows)), "planted") == (
        "After 10 s of training a and b both had the lowest training loss, 0.5; "
        "a and b both had the best test accuracy, 90 %."
    )


def test_the_end_gives_the_pair_s_p(plant):
    rows = {
        (n, s): [(0.0, 2, 0.1), (2.0, x, x)] for s in range(3) for n, x in (("a", 0.5), ("b", 0.6))
    }
    assert ending(load_results(plant(rows)), "planted") == (
        "After 10 s of training a had the lowest training loss, 0.5 (against b 3–0, p 0.25: "
        "undecided); b had the best test accuracy, 60 % (against a 3–0, p 0.25: undecided)."
    )


@pytest.mark.parametrize(
    ("seeds", "cell"), [(1, "yes, of one seed"), (2, "yes (p "), (5, "yes (p ")]
)
def test_the_target_at_the_end_is_tested(plant, seeds, cell):
    noise = np.random.default_rng(0).normal(size=(2, seeds))
    rows = {
        (n, s): [(0.0, 2.0, 0.1), (2.0, mean + 0.005 * noise[i, s], 0.9)]
        for i, (n, mean) in enumerate((("a", 0.08), ("b", 0.2)))
        for s in range(seeds)
    }
    header, (a, b) = table(load_results(plant(rows)), "planted")
    column = header.index("meets target at end")
    assert a[column].startswith(cell)
    assert b[column] == "no"
    if seeds == 5:
        values = [rows["a", s][1][1] for s in range(5)]
        expected = stats.ttest_1samp(values, 0.1, alternative="less").pvalue
        assert a[column] == f"yes (p {expected:.2g})"


def test_the_headline_of_many_seeds_has_the_medians_interval(plant):
    times = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    rows = {("a", s): [(0.0, 1.0, 0.0), (t, 0.05, 0.9)] for s, t in enumerate(times)}
    rows |= {("b", s): NEVER for s in range(7)}
    told = headline(load_results(plant(rows)), "planted")
    assert "after 4 s (median of 7 seeds, 95 % interval 2–6 s)" in told


def test_a_value_that_is_no_number_meets_no_target():
    target = Target("train_loss", "at most", 1.0)
    assert not target.met({"train_loss": None})
    assert not target.met({"train_loss": math.nan})
    assert not target.met({})


def test_an_unfinished_trial_is_missing_not_dropped(plant):
    workdir = plant({("a", 0): FAST, ("b", 0): SLOW})
    (workdir / "planted" / "a-seed0" / "result.json").unlink()
    assert only(load_results(workdir), "a").statuses == ("missing",)


def test_no_study_and_one_of_another_version_are_reported(plant, tmp_path):
    with pytest.raises(DataError, match=r"there is no study\.toml"):
        load_results(tmp_path / "nowhere")
    workdir = plant({("a", 0): FAST})
    text = (workdir / "study.toml").read_text().replace(f"format = {FORMAT}", "format = 99")
    (workdir / "study.toml").write_text(text)
    with pytest.raises(DataError, match="format 99"):
        load_results(workdir)
