"""Equal tuning: the values tried, the rule that cuts, what is chosen and what it is charged."""

import itertools
import json
import math

import optax
import pytest
from scipy.stats import qmc

from jdl.compare import (
    Budget,
    Entry,
    Split,
    Study,
    Tuning,
    load_results,
    named,
    table,
    write_report,
)
from jdl.compare import tuning as tune
from jdl.compare.results import chosen, tunings
from jdl.compare.tables import settings, tuning_table
from jdl.core.check import ArgumentError
from jdl.optim.registry import TuningRange


def sgd(name="sgd", learning_rate=0.1, low=1e-3, high=10.0):
    return Entry(
        name,
        lambda: optax.sgd(learning_rate),
        9,
        options={"learning_rate": learning_rate},
        search=TuningRange("learning_rate", low, high),
        tuned=lambda value: sgd("sgd-tuned", value),
    )


def test_places_are_scipys_van_der_corput():
    expected = qmc.Halton(d=1, scramble=False).random(17).ravel()[1:].tolist()
    assert [tune.place(k) for k in range(1, 17)] == pytest.approx(expected)


def test_values_lie_in_the_range_and_begin_with_the_default():
    found = tune.values(TuningRange("damping", 1e-4, 10.0), 8, 0.3)
    assert len(found) == 8
    assert found[0] == 0.3
    assert all(1e-4 <= x <= 10 for x in found)
    logs = sorted(math.log10(x) for x in found[1:])
    assert max(b - a for a, b in itertools.pairwise(logs)) < 1.3  # spread over 5 decades


def curve(*values):
    return tune.Curve(tuple((float(i), float(v)) for i, v in enumerate(values)))


def test_a_trial_is_cut_when_its_best_is_worse_than_the_median():
    earlier = [curve(9, 5, 3, 1), curve(9, 6, 4, 2), curve(9, 7, 5, 3)]
    assert not tune.hopeless(curve(9, 6), earlier, 3.0)  # the median itself stays
    assert tune.hopeless(curve(9, 6.5), earlier, 3.0)
    assert not tune.hopeless(curve(2, 9), earlier, 3.0)  # its best counts, not its last
    assert not tune.hopeless(curve(9, 8), earlier[:2], 3.0)  # too few to compare with
    assert not tune.hopeless(curve(9, 8), earlier, 30.0)  # not a tenth of the budget yet
    cut_before = [*earlier, curve(9), curve(9)]  # did not get that far: no part of the median
    assert not tune.hopeless(curve(9, 6), cut_before, 3.0)


@pytest.fixture
def tuned_study(problem, tmp_path):
    problem = problem._replace(split=Split(problem.train, problem.test, 45))
    events = []
    study = Study(
        problem,
        [sgd(), Entry("plain", lambda: optax.sgd(0.1), 9)],
        seeds=2,
        budget=Budget(6, "epochs"),
        evaluations=5,
        tuning=Tuning(5),
        workdir=tmp_path,
        on_event=events.append,
    )
    return study, events, tmp_path


def test_tuned_and_untuned_are_reported_beside_each_other(tuned_study):
    study, events, workdir = tuned_study
    results = study.run()
    assert results.optimizers == ("sgd", "sgd-tuned", "plain")
    assert [e.number for e in events if e.kind == "tune"] == [1, 2, 3, 4, 5]
    assert len([e for e in events if e.kind == "end"]) == 6
    trials = results.tuned["blobs", "sgd-tuned"]
    ends = {}
    for k, trial in enumerate(trials):
        folder = workdir / "blobs" / "tuning" / "sgd" / str(k)
        told = json.loads((folder / "result.json").read_text())
        assert told["status"] in ("done", "cut", "diverged")
        assert not (folder / "checkpoints").exists()
        assert trial.settings["seed"] == tune.SEED  # no reported trial's
        if told["status"] == "done":
            ends[trial.settings["tuning"]["value"]] = trial.evaluations[-1]["validation_loss"]
    assert chosen(trials) == min(ends, key=ends.get)
    (trial, _) = results.of("blobs", "sgd-tuned")
    assert trial.settings["optimizer"]["settings"]["learning_rate"] == chosen(trials)
    assert "test_loss" in trial.evaluations[-1]

    again = len(events)
    study.run()
    assert {e.kind for e in events[again:]} == {"tune", "skip"}  # nothing ran anew

    found = tunings(results, "blobs")["sgd-tuned"]
    spent = sum(t.evaluations[-1]["epoch"] for t in trials)
    assert found.cost == pytest.approx(spent)
    reached = [r for line in table(results, "blobs")[1] for r in line[:1]]
    assert reached == ["sgd", "sgd-tuned", "plain"]
    header, rows, note = tuning_table(results, "blobs")
    assert rows[0][header.index("trials")] == "5"
    assert "5 trials for every optimizer" in note
    assert dict(settings(results))["sgd-tuned"].endswith(f"{chosen(trials):.4g}")

    page = write_report(workdir).read_text()
    assert "What each value tried ended with" in page
    assert "tuning included" in page
    assert (workdir / "sensitivity.png").stat().st_size > 5000
    assert load_results(workdir).tuned.keys() == results.tuned.keys()


@pytest.mark.slow
def test_trials_that_another_study_left_do_not_count(problem, tmp_path):
    def run(trials, epochs):
        budget, tuning = Budget(epochs, "epochs"), Tuning(trials)
        Study(problem, [sgd()], budget=budget, tuning=tuning, workdir=tmp_path).run()
        return load_results(tmp_path)

    run(4, 4)
    results = run(2, 2)
    (found,) = results.tuned.values()
    assert len(found) == 2
    assert all(t.settings["budget"]["amount"] < 4 for t in found)


def test_a_schedule_is_not_tuned():
    rate = optax.cosine_decay_schedule(0.1, 50)
    assert named("adam", learning_rate=rate).search is None
    assert named("hf", learning_rate=rate).search.parameter == "damping"


def test_where_every_value_diverges_the_tuned_trial_fails_and_the_others_go_on(problem, tmp_path):
    wild = sgd("wild", 1e38, 1e37, 1e38)
    wild = wild._replace(tuned=lambda value: sgd("wild-tuned", value))
    study = Study(
        problem,
        [wild, sgd()],
        budget=Budget(4, "epochs"),
        evaluations=3,
        tuning=Tuning(2, defaults=False),
        workdir=tmp_path,
    )
    statuses = {t.optimizer: (t.status, t.words) for t in study.run().trials}
    assert statuses["wild-tuned"] == ("failed", "None of 2 tuning trials came to its end.")
    assert statuses["sgd-tuned"][0] == "done"
    write_report(tmp_path)


@pytest.mark.parametrize("arguments", [(0,), (3, 0.0), (3, 1.5)])
def test_bad_tuning_is_refused(arguments, problem, tmp_path):
    with pytest.raises(ArgumentError):
        Study(problem, [sgd()], tuning=Tuning(*arguments), workdir=tmp_path)
