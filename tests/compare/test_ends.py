"""Several budgets, and what a trial measures besides its rows."""

import itertools

import jax
import optax
import pytest

from jdl.compare import Budget, Entry, Study, load_results
from jdl.compare.results import at_ends
from jdl.core.check import ArgumentError
from jdl.optim import lbfgs


def sgd(name="sgd", rate=0.1, momentum=None):
    options = {"learning_rate": rate}
    return Entry(name, lambda: optax.sgd(rate, momentum), 9, options=options)


def run(problem, workdir, **options):
    events = []
    options = {"budget": Budget(20, "steps"), "evaluations": 2} | options
    entries = [sgd(), sgd("momentum", momentum=0.9)]
    study = Study(problem, entries, workdir=workdir, on_event=events.append, **options)
    return study.run(), events, study


@pytest.mark.slow
def test_each_end_of_the_budget_is_a_run_of_its_own(problem, tmp_path):
    results, events, study = run(problem, tmp_path, ends=(0.5, 0.25), seeds=2)
    assert results.ends == study.ends == (0.25, 0.5, 1.0)
    numbers = [event.number for event in events if event.kind == "begin"]
    assert sorted(numbers) == list(range(1, 13))
    assert len(study.trials) == 12
    for share, steps in ((0.25, 5), (0.5, 10), (1.0, 20)):
        trials = results.of("blobs", "sgd", share)
        assert [trial.evaluations[-1]["step"] for trial in trials] == [steps, steps]
    assert [trial.share for trial in results.trials] == [1.0] * 4
    found = at_ends(results, "blobs")["sgd"]
    accuracy = [t.evaluations[-1]["test_accuracy"] for t in results.of("blobs", "sgd", 0.25)]
    assert (found[0].low, found[0].high) == (min(accuracy), max(accuracy))
    assert (tmp_path / "blobs" / "sgd-seed1-share0.25" / "result.json").exists()

    _, events, _ = run(problem, tmp_path, ends=(0.5, 0.25), seeds=2)
    assert {event.kind for event in events} == {"skip"}
    assert at_ends(load_results(tmp_path), "blobs").keys() == {"sgd", "momentum"}


def test_ends_are_shares(problem, tmp_path):
    with pytest.raises(ArgumentError, match="`ends` must be"):
        run(problem, tmp_path, ends=(0.5, 2.0))


def test_a_trial_knows_its_state_and_its_times(problem, tmp_path):
    results, _, _ = run(problem, tmp_path, budget=Budget(40, "steps"), evaluations=5)
    plain, momentum = (results.of("blobs", name)[0] for name in ("sgd", "momentum"))
    numbers = 2 * 3 + 3  # a velocity for each parameter, float32
    assert momentum.state_bytes - plain.state_bytes == 4 * numbers
    for trial in (plain, momentum):
        seconds = trial.evaluations[-1]["seconds"]
        assert trial.step_seconds == pytest.approx(seconds / 40)
        assert trial.evaluation_seconds > 0
        assert 0 < trial.gradient_seconds < 1.0
    assert plain.gradient_seconds == momentum.gradient_seconds  # measured once


def test_rows_of_steps_thin_out(problem, tmp_path, monkeypatch):
    """Else 40,000 short steps of a trial leave 12 MB, and a study half a gigabyte."""
    monkeypatch.setattr("jdl.compare.trial.FULL_ROWS", 10)
    entry = Entry("lbfgs", lambda: lbfgs(0.1), 9)
    options = {"budget": Budget(200, "steps"), "evaluations": 12}
    results = Study(problem, [entry], workdir=tmp_path, **options).run()
    rows = [row["step"] for row in results.trials[0].steps]
    assert rows[:10] == list(range(1, 11))
    assert 40 <= len(rows) <= 80
    assert max(b / a for a, b in itertools.pairwise(rows[9:])) < 1.35


def test_evaluation_seconds_are_of_the_clock(problem, tmp_path, monkeypatch):
    from jdl.compare import feeds
    from jdl.compare.study import CLOCKS

    now = [0.0]
    monkeypatch.setitem(CLOCKS, "wall", lambda: now[0])
    evaluate = feeds.Evaluation.__call__

    def slow(self, params, model_state):
        now[0] += 2.0
        return evaluate(self, jax.block_until_ready(params), model_state)

    monkeypatch.setattr(feeds.Evaluation, "__call__", slow)
    results, _, _ = run(problem, tmp_path, evaluations=3)
    for trial in results.trials:
        assert trial.evaluation_seconds == pytest.approx(2.0 * len(trial.evaluations))
        assert trial.step_seconds == 0.0
