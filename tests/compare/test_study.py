import functools
import json
import subprocess
from pathlib import Path

import numpy as np
import optax
import pytest

from jdl import losses, optim
from jdl.cli import runs
from jdl.compare import Budget, Entry, Study, Target, load_results, machine, named, table, tables
from jdl.compare.feeds import Repeated, training
from jdl.compare.optimizers import as_entry
from jdl.compare.problems import arrays_problem
from jdl.compare.results import headline
from jdl.compare.trial import schedule
from jdl.core.check import ArgumentError, DataError
from jdl.models import MLP
from jdl.optim.registry import REGISTRY

RATES = (0.1,)


def run(problem, optimizers, workdir, **options):
    events = []
    options = {"evaluations": 4, "on_event": events.append} | options
    if "seconds" not in options:
        options = {"budget": Budget(8.0, "epochs")} | options  # the same on a machine at work
    study = Study(problem, optimizers, workdir=workdir, **options)
    return study.run(), events


def test_the_commit_is_gits():
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if told.returncode:
        pytest.skip("no checkout here")
    assert told.stdout.startswith(machine.commit().removesuffix("-dirty"))
    assert len(machine.commit()) >= 12


def sgd(name="sgd", learning_rate=0.1, batch_size=9):
    options = {"learning_rate": learning_rate}
    return Entry(name, lambda: optax.sgd(learning_rate), batch_size, options=options)


def broken():
    def update(grads, state, params=None, **_):
        raise RuntimeError("the <b>belt</b> tore")

    return Entry("broken", lambda: optax.GradientTransformation(lambda p: (), update), 9)


@pytest.fixture(scope="module")
def lbfgs():
    return Entry("lbfgs", optim.lbfgs)


def test_all_start_alike_and_are_charged_what_they_did(problem, lbfgs, tmp_path):
    results, _ = run(problem, [sgd(batch_size=5), lbfgs], tmp_path, seeds=[0, 7])
    digests = {}
    for trial in results.trials:
        directory = tmp_path / "blobs" / f"{trial.optimizer}-seed{trial.seed}"
        found = json.loads((directory / "result.json").read_text())
        assert found["status"] == "done"
        assert found["commit"] == machine.commit()
        digests.setdefault(trial.seed, set()).add(found["initial_params"])
        first, *later = trial.evaluations
        assert (first["step"], first["seconds"], first["work"]) == (0, 0.0, 0.0)
        assert later
        assert all(
            row["seconds"] <= row_after["seconds"]
            for row, row_after in zip(trial.evaluations, later, strict=False)
        )
        assert trial.compile_seconds > 0
    assert [len(found) for found in digests.values()] == [1, 1]
    assert digests[0] != digests[7]
    last = {t.optimizer: t.evaluations[-1] for t in results.trials}
    assert last["sgd"]["work"] == pytest.approx(last["sgd"]["step"] * 5 / 45)
    assert last["sgd"]["epoch"] == last["sgd"]["work"]
    assert last["lbfgs"]["work"] > last["lbfgs"]["step"]  # its line search is not free
    steps = {t.optimizer: t.steps for t in results.trials}
    assert not steps["sgd"]
    assert steps["lbfgs"][0]["termination"] == 1
    merged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(row["optimizer"], row["seed"]) for row in merged} == {
        (name, seed) for name in ("sgd", "lbfgs") for seed in (0, 7)
    }


def test_the_runs_of_a_study_go_by_what_its_metrics_declare(problem, tmp_path):
    results, _ = run(problem, [sgd()], tmp_path, seeds=[0])
    found = runs.about(tmp_path / "blobs" / "sgd-seed0", tmp_path)
    rows = results.trials[0].evaluations
    assert found["best"]["test_accuracy"] == max(row["test_accuracy"] for row in rows)
    assert found["best"]["train_loss"] == min(row["train_loss"] for row in rows)


def test_finished_trials_are_not_run_again(problem, tmp_path):
    run(problem, [sgd(), sgd("other")], tmp_path)
    before = (tmp_path / "blobs" / "sgd-seed0" / "metrics.jsonl").read_text()
    (tmp_path / "blobs" / "other-seed0" / "result.json").unlink()  # as if killed
    _, events = run(problem, [sgd(), sgd("other"), sgd("new")], tmp_path)
    kinds = {(e.optimizer, e.kind) for e in events if e.kind in ("skip", "begin")}
    assert kinds == {("sgd", "skip"), ("other", "begin"), ("new", "begin")}
    assert (tmp_path / "blobs" / "sgd-seed0" / "metrics.jsonl").read_text() == before


def test_trials_of_other_settings_are_moved_aside(problem, tmp_path):
    run(problem, [sgd()], tmp_path)
    before = (tmp_path / "blobs" / "sgd-seed0" / "metrics.jsonl").read_text()
    _, events = run(problem, [sgd(learning_rate=0.2)], tmp_path)
    assert "begin" in {event.kind for event in events}
    moved = tmp_path / "blobs" / "earlier" / "sgd-seed0-1" / "metrics.jsonl"
    assert moved.read_text() == before


def scheduled(rate):
    return Entry("sgd", lambda: optax.sgd(rate), 9, options={"learning_rate": rate})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            scheduled(optax.cosine_decay_schedule(0.1, 50)),
            scheduled(optax.cosine_decay_schedule(0.1, 60)),
        ),
        (scheduled(lambda step: 0.1 / (1 + step)), scheduled(lambda step: 0.2 / (1 + step))),
        (
            scheduled(functools.partial(lambda at, step: at, 0.1)),
            scheduled(functools.partial(lambda at, step: at, 0.2)),
        ),
        (Entry("sgd", lambda: optax.sgd(0.1), 9), Entry("sgd", lambda: optax.sgd(0.2), 9)),
        (
            Entry("sgd", lambda: optax.sgd(RATES[0]), 9, options={"rates": np.array([0.1, 0.2])}),
            Entry("sgd", lambda: optax.sgd(RATES[0]), 9, options={"rates": np.array([0.1, 0.3])}),
        ),
        (named("adam", label="sgd", batch_size=9), named("nadam", label="sgd", batch_size=9)),
    ],
)
def test_two_trials_of_one_label_are_the_same_only_if_their_settings_are(
    one, other, problem, tmp_path
):
    kinds = []
    for entry in (one, one, other):
        _, events = run(problem, [entry], tmp_path, budget=Budget(3, "steps"), evaluations=1)
        kinds.append({event.kind for event in events} & {"begin", "skip"})
    assert kinds == [{"begin"}, {"skip"}, {"begin"}]


def test_another_loss_is_another_trial(problem, tmp_path):
    def kinds(loss):
        changed = problem._replace(loss=loss)
        _, events = run(changed, [sgd()], tmp_path, budget=Budget(3, "steps"), evaluations=1)
        return {event.kind for event in events} & {"begin", "skip"}

    smooth = functools.partial(losses.softmax_cross_entropy, label_smoothing=0.1)
    assert kinds(losses.softmax_cross_entropy) == {"begin"}
    assert kinds(smooth) == {"begin"}
    assert kinds(functools.partial(losses.softmax_cross_entropy, label_smoothing=0.1)) == {"skip"}


def test_other_data_are_another_trial(tmp_path):
    def kinds(labels):
        rows = {"image": np.eye(3, dtype=np.float32), "label": np.array(labels, np.int32)}
        problem = arrays_problem(
            "rows",
            lambda: MLP(widths=(), num_outputs=3),
            losses.softmax_cross_entropy,
            rows,
            target=Target("train_loss", "at most", 0.1),
        )
        _, events = run(problem, [sgd()], tmp_path, budget=Budget(3, "steps"), evaluations=1)
        return {event.kind for event in events} & {"begin", "skip"}

    assert kinds([0, 1, 2]) == {"begin"}
    assert kinds([0, 1, 1]) == {"begin"}
    assert kinds([0, 1, 1]) == {"skip"}


@pytest.mark.parametrize(("kind", "again"), [("steps", "skip"), ("seconds", "begin")])
def test_another_machine_is_another_trial_only_for_budgets_in_seconds(
    kind, again, problem, tmp_path, monkeypatch
):
    budget = Budget(0.05 if kind == "seconds" else 3, kind)
    run(problem, [sgd()], tmp_path, budget=budget, evaluations=1)
    other = machine.describe() | {"cores": 64, "xla_flags": "--xla_other"}
    monkeypatch.setattr(machine, "describe", lambda: other)
    _, events = run(problem, [sgd(), sgd("new")], tmp_path, budget=budget, evaluations=1)
    assert again in {event.kind for event in events if event.optimizer == "sgd"}
    results = load_results(tmp_path)
    told = tables.troubles(results, "blobs")
    assert any("2 different machines" in words for words in told) == (kind == "steps")


def test_a_schedule_is_named_in_the_settings(problem, tmp_path):
    entry = scheduled(optax.cosine_decay_schedule(0.25, 50))
    results, _ = run(problem, [entry], tmp_path, budget=Budget(2, "steps"), evaluations=1)
    told = dict(tables.settings(results))["sgd"]
    assert "cosine_decay_schedule(alpha=0.0, decay_steps=50" in told
    assert "0.25 at step 0" in told


def test_a_failing_or_diverging_trial_does_not_stop_the_others(problem, tmp_path):
    wild = sgd("wild", learning_rate=1e38)
    results, events = run(problem, [broken(), wild, sgd()], tmp_path)
    statuses = {t.optimizer: t.status for t in results.trials}
    assert statuses == {"broken": "failed", "wild": "diverged", "sgd": "done"}
    words = {e.optimizer: e.words for e in events if e.kind == "end"}
    assert "RuntimeError: the <b>belt</b> tore" in words["broken"]
    assert "not finite" in words["wild"] or "nan" in words["wild"]
    assert "belt" in (tmp_path / "blobs" / "broken-seed0" / "error.txt").read_text()
    shown = {row[0]: row for row in table(results, "blobs")[1]}
    assert shown["wild"][1] == "diverged"
    _, events = run(problem, [broken(), wild, sgd()], tmp_path)
    begun = [e.optimizer for e in events if e.kind == "begin"]
    assert begun == ["broken"]  # an error may have been mended since; a divergence has not


def test_a_budget_too_small_for_one_step_is_reported(problem, tmp_path):
    results, _ = run(problem, [sgd()], tmp_path, seconds=1e-9)
    (trial,) = results.trials
    assert trial.status == "budget"
    assert "give at least" in trial.words
    header, (row,) = table(results, "blobs")
    assert [found["step"] for found in trial.within(results.budget)] == [0]
    assert row[header.index("seconds to target")] == "not reached"


def test_full_batches_are_cut_evenly_and_filled_up(problem):
    entry = Entry("cut", lambda: optax.sgd(0.1), microbatches=4)
    found = training(problem, entry, seed=0)
    assert found.microbatches == 4
    assert isinstance(found.data, Repeated)
    batch = next(iter(found.data))
    assert batch["image"].shape == (48, 2)
    assert float(batch["mask"].sum()) == 45


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "`seconds` must be"),
        ({"seeds": 0}, "`seeds` must be"),
        ({"seeds": [1, 1]}, "`seeds` must be different"),
        ({"evaluations": 0}, "`evaluations` must be"),
        ({"optimizers": []}, "`optimizers` must be at least one"),
        ({"optimizers": [sgd(), sgd()]}, "`optimizers` must be named differently"),
        ({"optimizers": [sgd("a/b")]}, "`optimizers` must be named by letters"),
        ({"optimizers": ["lbgfs"]}, "Did you mean 'lbfgs'"),
        ({"optimizers": [sgd(batch_size=0)]}, "`batch_size` must be"),
        ({"seconds": 1.0, "budget": Budget(1, "work")}, "`seconds` must be left out"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(problem, tmp_path, options, message):
    options = {"optimizers": [sgd()], "workdir": tmp_path} | options
    with pytest.raises(ArgumentError, match=message):
        Study(problem, **options)
    assert not list(tmp_path.iterdir())


def test_an_optimizer_that_is_no_entry_is_reported_how_to_be_one():
    with pytest.raises(ArgumentError, match=r"of your own use Entry\("):
        as_entry(optax.sgd(0.1))
    with pytest.raises(ArgumentError, match=r"`make` must be a function .*lambda"):
        as_entry(Entry("mine", optax.sgd(0.1)))


def test_a_failure_is_logged_without_a_listener(problem, tmp_path, caplog):
    Study(problem, [broken()], budget=Budget(1, "epochs"), evaluations=1, workdir=tmp_path).run()
    assert "broken on blobs, seed 0, failed: RuntimeError" in caplog.text


def test_the_directory_of_something_else_is_refused(problem, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ArgumentError, match="`workdir` must be"):
        run(problem, [sgd()], tmp_path)
    (tmp_path / "study.toml").write_text("format = 99\n")
    with pytest.raises(DataError, match="format 99"):
        run(problem, [sgd()], tmp_path)


def test_schedule_ends_with_the_budget():
    times = schedule(25.0, 25)
    assert len(times) == 25
    assert times[-1] == 25.0
    assert times == sorted(times)
    assert schedule(3.0, 1) == [3.0]


def test_settings_by_name_are_all_listed():
    settings = named("hf").settings()
    assert settings["batch_size"] == "full"
    assert settings["damping"] > 0
    assert (
        named("adam").settings().items()
        >= {
            "batch_size": 64,
            "learning_rate": 0.001,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
        }.items()
    )
    assert named("momentum").settings()["momentum"] == 0.9


@pytest.mark.parametrize("name", REGISTRY)
def test_settings_are_the_same_in_every_process(name):
    assert " at 0x" not in str(named(name).settings())
    assert str(Target("test_loss", "at most", 0.5)) == "test loss ≤ 0.5"


@pytest.mark.parametrize(("amount", "kind"), [(12, "steps"), (3, "epochs"), (20, "work")])
def test_budgets_of_other_kinds_are_kept(amount, kind, problem, lbfgs, tmp_path):
    budget = Budget(amount, kind)
    results, _ = run(problem, [sgd(batch_size=9), lbfgs], tmp_path, budget=budget)
    assert results.budget == budget
    for trial in results.trials:
        last = trial.evaluations[-1]
        assert trial.status == "done"
        assert last[budget.column] <= amount * (1 + 1e-9)
        assert last[budget.column] > 0.5 * amount
    told = headline(results, "blobs")
    assert f"within {budget}" in told or budget.in_words("") in told


def test_a_step_that_costs_more_than_the_budget_is_reported(problem, lbfgs, tmp_path):
    results, _ = run(problem, [lbfgs], tmp_path, budget=Budget(0.5, "work"))
    (trial,) = results.trials
    assert trial.status == "budget"
    assert "One step took" in trial.words
