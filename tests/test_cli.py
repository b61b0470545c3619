"""The command as a user types it: help, mistakes, and the way from train to predict."""

import json
import os
import re
import subprocess
import sys
import tarfile

import pytest

from jdl.cli.commands import COMMANDS
from jdl.cli.main import main
from jdl.data.bundled_digits import digits_path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_its_command(command, capsys):
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"jdl {command}" in told
    assert "None" not in told
    assert "default: False" not in told


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_its_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    styles = [["style", kind] for kind in ("transfer", "train", "apply")]
    for command in [*([name] for name in COMMANDS), *styles]:
        assert main([*command, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        whole = ("usage: ", "  jdl ", "  curl ")  # to be copied
        assert not [x for x in lines if len(x) > columns and not x.startswith(whole)], command


def test_help_of_compare_names_every_optimizer_and_problem(capsys):
    from jdl.compare import CATALOGUE
    from jdl.optim.registry import REGISTRY

    assert main(["compare", "--help"]) == 0
    told = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {*REGISTRY, *CATALOGUE} <= told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "cnnn"], "Did you mean 'cnn'?"),
        (["train", "cnn", "--optimizer", "lbgfs"], "Did you mean 'lbfgs'?"),
        (["train", "cnn", "--data", "nowhere.tar"], "nowhere.tar"),
        (["train", "cnn", "--size", "big"], "--size"),
        (["train", "mlp", "--steps", "1", "--workdir", f"{__file__}/run"], "Not a directory"),
        (["train", "mlp", "--steps", "1", "--workdir", __file__], "File exists"),
        (["evaluate", "--workdir", "nowhere"], "nowhere"),
        (["index", "nowhere.tar"], "nowhere.tar"),
        (["compare", "--optimizers", "adma"], "Did you mean 'adam'?"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "cnn", "--stesp", "3"], "--max-steps"),
        (["train", "cnn", "--batch-size", "big"], "big"),
        (["train"], "MODEL"),
        (["curvature", "--workdir", "x", "--matrix", "fischer"], "empirical_fisher"),
        (["style", "trian"], "train"),
    ],
)
def test_a_wrong_option_is_explained_and_code_2(arguments, said, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert f"jdl {arguments[0]} --help" in err


def test_index_accounts_for_the_digits(capsys):
    assert main(["index", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 1797
    assert len(found["classes"]) == 10
    assert found["damage"] == []


def run(arguments, cwd):
    command = [sys.executable, "-m", "jdl", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_go_on_evaluate_predict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = ["train", "mlp", "--batch-size", "128", "--workdir", "run"]
    run([*train, "--steps", "40"], tmp_path)
    assert main([*train, "--steps", "60"]) == 0
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 60
    assert (tmp_path / "run/curves.png").stat().st_size > 1000
    capsys.readouterr()
    assert main(["evaluate", "--workdir", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] > 0.8
    assert main(["predict", "--workdir", "run", "--out", "p.jsonl"]) == 0
    predictions = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    right = [p["name"].split("/")[1] == p["class"] for p in predictions]
    assert len(right) == 359
    assert sum(right) / len(right) == pytest.approx(found["accuracy"], abs=1e-6)


@pytest.mark.parametrize("model", ["mlp", "dbn"])
def test_a_class_that_only_the_test_split_has_is_told_before_training(model, tmp_path, capsys):
    with tarfile.open(digits_path()) as digits, tarfile.open(tmp_path / "a.tar", "w") as archive:
        for member in digits:
            if member.isfile() and not member.name.startswith("train/9"):
                archive.addfile(member, digits.extractfile(member))
    arguments = ["train", model, "--data", str(tmp_path / "a.tar"), "--size", "8", "--workdir"]
    assert main([*arguments, str(tmp_path / "run")]) == 2
    assert "not there in training: '9'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]


@pytest.mark.slow
def test_the_demo_teaches_every_optimizer(tmp_path):
    out = run(["demo", "--seconds", "8", "--workdir", "demo"], tmp_path)
    assert all(name in out for name in ("sgd", "adam", "lbfgs", "cg", "hf"))
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000
    for name in ("sgd", "adam", "lbfgs", "cg", "hf"):
        (trial,) = (tmp_path / "demo").glob(f"*/{name}-seed0")
        rows = [json.loads(x) for x in (trial / "metrics.jsonl").read_text().splitlines()]
        best = max(r["test_accuracy"] for r in rows if r.get("test_accuracy") is not None)
        assert best >= 0.95
