"""Equal tuning: the values tried, the rule that cuts, what is chosen and what it is charged."""

import json

import numpy as np
import optax
import pytest
from scipy import stats
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
from jdl.compare.catalogue import quadratic
from jdl.compare.results import Spread, Tuned, chosen, importance, tunings
from jdl.compare.tables import settings, tuning_table
from jdl.core.check import ArgumentError
from jdl.optim.registry import REGISTRY, TuningRange


def sgd(name="sgd", learning_rate=0.1, low=1e-3, high=10.0):
    return Entry(
        name,
        lambda: optax.sgd(learning_rate),
        9,
        options={"learning_rate": learning_rate},
        search=TuningRange("learning_rate", low, high),
        tuned=lambda values: sgd("sgd-tuned", values["learning_rate"]),
    )


def test_places_are_scipys_halton_sequence():
    expected = qmc.Halton(d=6, scramble=False).random(17)[1:]
    found = [[tune.place(k, base) for base in tune.PRIMES] for k in range(1, 17)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_values_lie_in_the_ranges_and_begin_with_the_default():
    space = [
        TuningRange("damping", 1e-4, 10.0),
        TuningRange("b2", 0.9, 0.9999, "one minus log"),
        TuningRange("warmup", 0.0, 0.2, "linear"),
        TuningRange("batch_size", 16, 256, whole=True),
    ]
    default = {"damping": 0.3, "b2": 0.999, "warmup": 0.0, "batch_size": 64}
    found = tune.points(space, 8, default)
    assert len(found) == 8
    assert found[0] == default
    for x in space:
        values = [point[x.parameter] for point in found]
        assert all(x.low <= value <= x.high for value in values)
    assert all(isinstance(point["batch_size"], int) for point in found)
    halton = qmc.Halton(d=4, scramble=False).random(8)[1:]
    assert [p["damping"] for p in found[1:]] == pytest.approx(1e-4 * 1e5 ** halton[:, 0], rel=1e-3)
    assert all({**p, "damping": 0.3} == default for p in found[:4])  # the main number alone
    below = [1 - p["b2"] for p in found[4:]]
    assert below == pytest.approx(0.1 * 1e-3 ** halton[3:, 1], rel=1e-3)
    assert [p["warmup"] for p in found[4:]] == pytest.approx(0.2 * halton[3:, 2], rel=1e-3)
    assert tune.points(space, 7)[0]["warmup"] == pytest.approx(0.2 * halton[0, 2])  # no default


def test_a_point_beside_the_default_is_not_tried_again():
    x = TuningRange("learning_rate", 1e-3, 10.0)
    assert [p["learning_rate"] for p in tune.points([x], 3, {"learning_rate": 0.1})] == [
        0.1,
        0.01,
        1.0,
    ]


@pytest.mark.parametrize("name", REGISTRY)
def test_every_number_of_a_space_is_an_option_and_its_values_are_accepted(name):
    entry = named(name)
    default = entry.defaults(entry.space)
    assert default is not None
    for values in tune.points(entry.space, 3, default):
        settings = entry.tuned(values).settings()
        assert {key: settings[key] for key in values} == values
        entry.tuned(values).make()


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
            rate = trial.settings["tuning"]["values"]["learning_rate"]
            ends[rate] = trial.evaluations[-1]["validation_loss"]
    best = min(ends, key=ends.get)
    assert chosen(trials) == {"learning_rate": best}
    (trial, _) = results.of("blobs", "sgd-tuned")
    assert trial.settings["optimizer"]["settings"]["learning_rate"] == best
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
    assert dict(settings(results))["sgd-tuned"].endswith(f"learning_rate = {best:.4g}")
    assert rows[0][header.index("chosen")] == f"learning rate {best:.4g}"
    assert "importance" not in header  # of fewer than 10 trials

    page = write_report(workdir).read_text()
    assert "Sensitivity to the learning rate" in page
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
    assert [x.parameter for x in named("hf", learning_rate=rate).space] == ["damping"]


def test_where_every_value_diverges_the_tuned_trial_fails_and_the_others_go_on(problem, tmp_path):
    wild = sgd("wild", 1e38, 1e37, 1e38)
    wild = wild._replace(tuned=lambda values: sgd("wild-tuned", values["learning_rate"]))
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


def valley(learning_rate=0.3, momentum=0.0):
    """On ½ |x − 1|², one step's error is (1 − rate + 0 · momentum)²: the best rate is 1."""
    return Entry(
        "valley",
        lambda: optax.sgd(learning_rate, momentum),
        options={"learning_rate": learning_rate, "momentum": momentum},
        search=(
            TuningRange("learning_rate", 1e-2, 1.9),
            TuningRange("momentum", 0.0, 0.9, "linear"),
        ),
        tuned=lambda values: valley(**values),
    )


def test_importance_is_the_share_of_each_number():
    space = [TuningRange("rate", 1e-4, 1.0), TuningRange("momentum", 0.0, 0.9, "linear")]
    points = tune.points(space, 200)
    z = np.array([[x.share(p[x.parameter]) for x in space] for p in points])
    # Ranks of a sum of two independent uniform numbers, a and 2 b: closed forms of the shares of
    # the sum's variance are 1/5 and 4/5, and its ranks are nearly linear in it.
    ends = z[:, 0] + 2.0 * z[:, 1]
    trials = tuple((p, float(end), "done") for p, end in zip(points, ends, strict=True))
    tuned = Tuned(tuple(space), None, trials, "train_loss", "min", 0.0, Spread(0.0, 0.0, 0.0))
    found = importance(tuned)
    linear = {
        x.parameter: stats.spearmanr(z[:, j], ends).statistic ** 2 for j, x in enumerate(space)
    }
    assert found == pytest.approx(linear, abs=0.02)
    assert found == pytest.approx({"rate": 0.2, "momentum": 0.8}, abs=0.05)
    assert importance(tuned._replace(best="max")) == pytest.approx(found)
    assert importance(tuned._replace(trials=trials[:9])) == {"rate": None, "momentum": None}


@pytest.mark.slow
def test_several_numbers_are_tuned_together_and_their_importance_is_told(tmp_path):
    def run(numbers, trials, workdir):
        study = Study(
            quadratic(10, 1.0),
            [valley()],
            budget=Budget(1, "steps"),
            evaluations=1,
            tuning=Tuning(trials, defaults=False, numbers=numbers),
            workdir=workdir,
        )
        results = study.run()
        return results, tunings(results, "quadratic")["valley-tuned"]

    results, found = run("all", 16, tmp_path / "all")
    tried = [values for values, _, _ in found.trials]
    assert tried[0] == {"learning_rate": 0.3, "momentum": 0.0}
    assert [x["momentum"] for x in tried[:8]] == [0.0] * 8
    assert len({x["momentum"] for x in tried[8:]}) == 8
    # One step is the same for every momentum: the best rate is the one nearest to 1.
    nearest = min(tried, key=lambda values: abs(1 - values["learning_rate"]))
    assert found.values == nearest
    (trial,) = results.of("quadratic", "valley-tuned")
    own = trial.settings["optimizer"]["settings"]
    assert {key: own[key] for key in nearest} == nearest
    shares = importance(found)
    assert shares["learning_rate"] > 0.9
    assert shares["momentum"] < 0.15
    header, rows, _ = tuning_table(results, "quadratic")
    assert rows[0][header.index("chosen")].startswith("learning rate ")
    assert "; momentum " in rows[0][header.index("chosen")]
    write_report(tmp_path / "all")
    assert (tmp_path / "all" / "sensitivity.png").stat().st_size > 5000

    _, found = run("main", 2, tmp_path / "main")
    assert {tuple(values) for values, _, _ in found.trials} == {("learning_rate",)}


@pytest.mark.parametrize("arguments", [(0,), (3, 0.0), (3, 1.5), (3, 1.0, "train_loss", True, "x")])
def test_bad_tuning_is_refused(arguments, problem, tmp_path):
    with pytest.raises(ArgumentError):
        Study(problem, [sgd()], tuning=Tuning(*arguments), workdir=tmp_path)
