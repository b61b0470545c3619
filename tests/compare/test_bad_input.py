"""Errors of users and machines: each is reported, and the other trials run."""

import errno

import optax
import pytest

from jdl.cli.main import main
from jdl.compare import Budget, Entry, Study, feeds, load_results, record
from jdl.train.lock import run_lock


def sgd(name="sgd"):
    return Entry(name, lambda: optax.sgd(0.1), 9, options={"learning_rate": 0.1})


def run(problems, entries, workdir, **options):
    events = []
    options = {"budget": Budget(2, "epochs"), "evaluations": 2} | options
    found = Study(problems, entries, workdir=workdir, on_event=events.append, **options)
    return found.run(), events


def test_a_full_disk_in_one_trial_is_reported_and_the_others_go_on(problem, tmp_path, monkeypatch):
    class Full(record.JsonlWriter):
        def write(self, row):
            if "first-seed0" in str(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(row)

    monkeypatch.setattr(record, "JsonlWriter", Full)
    results, _ = run(problem, [sgd("first"), sgd("second")], tmp_path)
    first, second = results.trials
    assert first.status == "failed"
    assert "is full. Make room and start the study again." in first.words
    assert second.status == "done"
    monkeypatch.undo()
    again, events = run(problem, [sgd("first"), sgd("second")], tmp_path)
    assert [t.status for t in again.trials] == ["done", "done"]
    assert [e.optimizer for e in events if e.kind == "begin"] == ["first"]


def test_a_problem_whose_data_fail_does_not_stop_the_others(problem, tmp_path):
    def torn(batch_size, seed, epochs):
        raise ValueError("the tape is torn")

    bad = problem._replace(name="bad", train=torn)
    results, _ = run([bad, problem], [sgd()], tmp_path)
    statuses = {t.problem: (t.status, t.words) for t in results.trials}
    assert statuses["bad"][0] == "failed"
    assert "the tape is torn" in statuses["bad"][1]
    assert statuses["blobs"][0] == "done"


def test_two_processes_do_not_run_one_trial(problem, tmp_path):
    with run_lock(tmp_path / "blobs" / ".sgd-seed0"):
        results, _ = run(problem, [sgd(), sgd("other")], tmp_path)
    statuses = {t.optimizer: t.status for t in results.trials}
    assert statuses == {"sgd": "missing", "other": "done"}


def test_shares_of_a_study_are_disjoint_and_all_of_it(problem, tmp_path):
    entries = [sgd(name) for name in "abc"]
    options = {"budget": Budget(1, "epochs"), "evaluations": 1, "workdir": tmp_path}
    ran = []
    for k in (1, 2):
        Study(
            problem,
            entries,
            on_event=lambda e: ran.append(e.optimizer) if e.kind == "begin" else None,
            **options,
        ).run(share=(k, 2))
    assert sorted(ran) == ["a", "b", "c"]
    assert {t.status for t in load_results(tmp_path).trials} == {"done"}


@pytest.mark.slow
def test_a_problem_file_that_fails_leaves_the_other_problems(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import nothing_of_this_name\n")
    options = ["--work", "3", "--workdir", str(tmp_path / "study"), "--optimizers", "lbfgs"]
    code = main(["compare", "--problem", f"{tmp_path / 'mine.py'},quadratic", *options])
    told = capsys.readouterr()
    assert code == 2
    assert "line 1: ModuleNotFoundError" in told.err
    assert "Traceback" not in told.err
    (trial,) = load_results(tmp_path / "study").trials
    assert (trial.problem, trial.status) == ("quadratic", "done")
    report = tmp_path / "study" / "report.html"
    assert report.exists()
    report.unlink()
    assert main(["compare", "--report", "--workdir", str(tmp_path / "study")]) == 0
    assert "quadratic" in report.read_text()
    assert main(["compare", "--report", "--workdir", str(tmp_path / "nothing")]) == 2


def test_a_study_whose_trials_all_failed_fails(tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("the belt tore")

    monkeypatch.setattr(feeds, "training", fails)
    options = ["--problem", "quadratic", "--optimizers", "sgd,adam", "--work", "1"]
    assert main(["compare", *options, "--workdir", str(tmp_path)]) != 0
    told = "Every trial failed; the first, sgd on quadratic, seed 0: RuntimeError: the belt tore"
    assert told in capsys.readouterr().err
    assert (tmp_path / "report.html").exists()
    assert main(["compare", "--report", "--workdir", str(tmp_path)]) != 0
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "rosenbrok"], "Did you mean 'rosenbrock'"),
        (["--problem", "mnist-mlp"], "needs MNIST. Give --data"),
        (["--problem", "nowhere.py"], "There is no problem file nowhere.py"),
        (["--problem", "quadratic,logistic", "--data", "x.tar"], "quadratic, logistic has its own"),
        (["--trials", "-1"], "`--trials` must be 0 or more"),
        (["--share", "3/2"], "`--share` must be K/N"),
        (["--share", "half"], "`--share` must be K/N"),
        (["--clock", "sun"], "invalid choice 'sun'"),
        (["--epochs", "1", "--work", "2"], "given one at a time"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message, tmp_path, capsys):
    code = main(["compare", *arguments, "--workdir", str(tmp_path / "study")])
    told = capsys.readouterr().err
    assert code == 2
    assert message in told
    assert "Traceback" not in told


def test_the_study_of_another_version_is_reported_on_the_command_line(tmp_path, capsys):
    (tmp_path / "study.toml").write_text("format = 2\n")
    code = main(["compare", "--problem", "quadratic", "--workdir", str(tmp_path)])
    assert code == 2
    assert "is of format 2; this version of jdl reads format 5" in capsys.readouterr().err
