"""`jdl runs`, `doctor`, `completion`, and settings from a file."""

import dataclasses
import json
import shutil
import subprocess
import tomllib

import pytest

from jdl import cli
from jdl.cli import completion, config_file, runs, train
from jdl.core.check import ArgumentError, DataError


def write_run(folder, optimizer, accuracy):
    folder.mkdir(parents=True)
    rows = [
        {"step": 1, "seconds": 0.5, "split": "train", "loss": 0.1},
        {"step": 5, "seconds": 1.5, "split": "test", "accuracy": accuracy, "loss": 0.7},
        {"step": 9, "seconds": 2.5, "split": "test", "accuracy": accuracy - 0.1, "loss": 0.6},
        {"step": 9, "seconds": 2.5, "split": "all of train", "loss": float("nan")},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "se'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.toml").write_text(f'optimizer = "{optimizer}"\nmodel = "cnn"\n')


def test_runs_are_listed_with_their_best(tmp_path, capsys):
    write_run(tmp_path / "a", "adam", 0.8)
    write_run(tmp_path / "deep" / "b", "hf", 0.9)
    found = runs.about(tmp_path / "a", tmp_path)
    assert (found["steps"], found["seconds"], found["optimizer"]) == (9, 2.5, "adam")
    assert found["best"] == {"batch_loss": 0.1, "test_accuracy": 0.8, "test_loss": 0.6}
    assert cli.main(["runs", str(tmp_path), "--sort", "accuracy", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["run"] for line in lines] == ["deep/b", "a"]
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "0.9" in capsys.readouterr().out
    assert cli.main(["runs", str(tmp_path), "--sort", "acuracy"]) == 2
    assert "test_accuracy" in capsys.readouterr().err
    rows = ['{"step": null, "seconds": "12s", "split": "test", "loss": 0.5}', "1" * 5000]
    rows += ['{"step": 7, "seconds": Infinity, "loss": 1%s}' % ("0" * 400), '{"step": [1]}', "3"]
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "metrics.jsonl").write_text("\n".join(rows))
    found = runs.about(tmp_path / "another", tmp_path)
    assert (found["steps"], found["seconds"], found["best"]) == (7, 0.0, {"test_loss": 0.5})
    assert cli.main(["runs", str(tmp_path)]) == 0
    (tmp_path / "none").mkdir()
    assert cli.main(["runs", str(tmp_path / "none")]) == 2


def test_the_doctor_tells_what_there_is(capsys, monkeypatch):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "cpu"
    assert len(found["devices"]) == 2
    assert found["machine"]["memory"] > 1 << 28
    monkeypatch.setattr("jdl.cli.doctor._found", lambda module: module != "indexed_gzip")
    assert cli.main(["doctor"]) == 0
    assert "pip install 'jax-jdl[seekable]'" in capsys.readouterr().out


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_is_a_script_the_shell_reads(shell, tmp_path, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--optimizer" in script or "-l optimizer" in script
    if shutil.which(shell):
        path = tmp_path / "script"
        path.write_text(script)
        subprocess.run([shell, "-n", str(path)], check=True)


def test_completion_knows_every_flag():
    flags = completion.flags("train")
    assert "--model" not in flags
    named = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(train.Args)}
    assert named - {"--model"} <= set(flags)
    assert "--json" in completion.flags("doctor")


def test_a_file_says_what_flags_say(tmp_path):
    toml, yaml = tmp_path / "a.toml", tmp_path / "a.yaml"
    toml.write_text('model = "mlp"\nbatch_size = 8\nflip = true\ncolor = false\nlogs = ["csv"]\n')
    yaml.write_text("model: mlp\nbatch-size: 8\nflip: true\ncolor: false\nlogs: [csv]\n")
    expected = ["mlp", "--batch-size", "8", "--flip", "--logs", "csv"]
    for path in (toml, yaml):
        assert config_file.expand(["--config", str(path)], train.Args) == expected
        own = config_file.expand(["cnn", f"--config={path}", "--batch-size", "9"], train.Args)
        assert own == ["cnn", *expected[1:], "--batch-size", "9"]


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.toml", "stepz = 3", "steps"),
        ("a.toml", "steps =", "TOML"),
        ("a.yaml", "{", "YAML"),
        ("a.yaml", "3", "names and values"),
        ("a.json", "{}", ".toml"),
        ("missing.toml", None, "existing"),
    ],
)
def test_a_file_that_says_nothing_sensible_is_refused(name, text, word, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises((ArgumentError, DataError), match=word):
        config_file.expand(["mlp", "--config", str(path)], train.Args)


def test_a_runs_own_settings_make_it_anew(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--steps", "3", "--crop", "random", "--flip", "--size", "6", "--batch-size", "16"]
    assert cli.main(["train", "mlp", *arguments, "--workdir", str(first)]) == 0
    config = str(first / "config.toml")
    assert cli.main(["train", "--config", config, "--workdir", str(second)]) == 0
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (first, second)
    ]
    losses = [[row["loss"] for row in log] for log in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 3
    settings = tomllib.loads((second / "config.toml").read_text())
    assert settings["crop"] == "random"
    assert settings["command"]["steps"] == 3
    capsys.readouterr()


@pytest.mark.parametrize(
    "command", [("train", "mlp", "--workdir"), ("evaluate", "--workdir"), ("summary",)]
)
def test_a_run_made_in_python_is_told_apart_and_left_alone(command, tmp_path, capsys):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert cli.main([*command, str(tmp_path)]) == 2
    assert "in Python" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
