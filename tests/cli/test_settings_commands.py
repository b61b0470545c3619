"""`jdl runs`, `doctor`, `completion`, and settings from a file."""

import dataclasses
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jdl
from jdl.cli import completion, config_file, runs, train
from jdl.cli.main import main, parse
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
    (folder / "directions.json").write_text('{"accuracy": "max", "odd": 3}')


def test_runs_are_listed_with_their_best(tmp_path, capsys):
    write_run(tmp_path / "a", "adam", 0.8)
    write_run(tmp_path / "deep" / "b", "hf", 0.9)
    found = runs.about(tmp_path / "a", tmp_path)
    assert (found["steps"], found["seconds"], found["optimizer"]) == (9, 2.5, "adam")
    assert found["best"] == {"batch_loss": 0.1, "test_accuracy": 0.8, "test_loss": 0.6}
    assert main(["runs", str(tmp_path), "--sort", "accuracy", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["run"] for line in lines] == ["deep/b", "a"]
    assert main(["runs", str(tmp_path)]) == 0
    assert "0.9" in capsys.readouterr().out
    assert main(["runs", str(tmp_path), "--sort", "acuracy"]) == 2
    assert "test_accuracy" in capsys.readouterr().err
    rows = ['{"step": null, "seconds": "12s", "split": "test", "loss": 0.5}', "1" * 5000]
    rows += ['{"step": 7, "seconds": Infinity, "loss": 1%s}' % ("0" * 400), '{"step": [1]}', "3"]
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "metrics.jsonl").write_text("\n".join(rows))
    found = runs.about(tmp_path / "another", tmp_path)
    assert (found["steps"], found["seconds"], found["best"]) == (7, 0.0, {"test_loss": 0.5})
    assert main(["runs", str(tmp_path)]) == 0
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none")]) == 2


def test_no_column_of_a_wide_table_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    write_run(tmp_path / ("a" * 50), "adam", 0.8)
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("a" * 50, "adam", "test_accuracy", "test_loss", "0.8"):
        assert word in printed


def f1(outputs, batch):
    return outputs[:, 0]


def trained_in_python(folder, values, metric):
    """A run by an Estimator whose metric takes these values at steps 1, 2 ….

    Its parameter and its loss are 0 throughout.
    """
    model = jdl.from_fns(lambda key, x: jnp.zeros(()), lambda w, x: x + 0.0 * w)
    estimator = jdl.Estimator(
        model,
        lambda outputs, batch: 0.0 * outputs[:, 0],
        "sgd",
        metrics={"f1": metric},
        workdir=folder,
        log_every=1,
    )
    for value in values:
        x = np.full((2, 1), value, np.float32)
        estimator.train([{"image": x}], steps=1, save=False)
        estimator.evaluate([{"image": x}], name="test")


def said(capsys, *arguments):
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    heard = capsys.readouterr()
    return code, heard.out, heard.err


def test_runs_go_by_what_a_metric_declares_and_not_by_its_name(tmp_path, capsys):
    for name, values in {"a": [0.2, 0.9, 0.3], "b": [0.5, 0.6, 0.4]}.items():
        declared = jdl.metrics.direction("max")(lambda outputs, batch: outputs[:, 0])
        trained_in_python(tmp_path / "declared" / name, values, declared)
        trained_in_python(tmp_path / "silent" / name, values, f1)
    known = json.loads((tmp_path / "declared" / "a" / "directions.json").read_text())
    assert known == {"loss": "min", "f1": "max"}
    code, out, _ = said(capsys, "runs", tmp_path / "declared", "--sort", "f1")
    header, first, second = (line.split() for line in out.splitlines() if line.strip(" ─"))
    assert code == 0
    assert header[4:] == ["best", "test_f1", "best", "test_loss"]
    assert (first[0], first[-2], second[0], second[-2]) == ("a", "0.9", "b", "0.6")
    code, _, err = said(capsys, "runs", tmp_path / "silent", "--sort", "f1")
    assert code == 2
    assert "`--direction` must be min or max with --sort f1" in err
    folder = tmp_path / "silent"
    assert said(capsys, "runs", folder, "--direction", "min")[0] == 2
    for direction, best in (("min", ["0.2", "0.4"]), ("max", ["0.9", "0.6"])):
        _, out, _ = said(capsys, "runs", folder, "--sort", "f1", "--direction", direction)
        table = [line.split() for line in out.splitlines() if line.strip(" ─")]
        assert [row[-2] for row in table[1:]] == best
    entry = runs.about(folder / "a", folder)
    assert entry["best"] == {"batch_loss": 0.0, "test_loss": 0.0}
    assert (entry["last"]["test_f1"], entry["max"]["test_f1"]) == pytest.approx((0.3, 0.9))


def test_accuracy_without_a_direction_shows_its_last_value(tmp_path, capsys):
    write_run(tmp_path / "a", "adam", 0.8)
    (tmp_path / "a" / "directions.json").unlink()
    _, out, _ = said(capsys, "runs", tmp_path)
    assert "last test_accuracy" in out
    assert "0.7" in out
    assert "0.8" not in out
    write_run(tmp_path / "b", "adam", 0.8)
    (tmp_path / "a" / "directions.json").write_text('{"accuracy": "min"}')  # they disagree
    code, _, err = said(capsys, "runs", tmp_path, "--sort", "accuracy")
    assert code == 2
    assert "The runs do not declare which value of test_accuracy is the best." in err


@pytest.mark.parametrize("flag", [["--compile-cache", "{}"], ["--compile-cache={}"]])
def test_compiled_programs_are_kept_where_the_flag_says(tmp_path, flag):
    """In a process of its own, since JAX reads its variables when it is imported."""
    code = (
        "import sys; from jdl.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "jax.jit(lambda x: x + 1)(2.0)"
    )
    folder = tmp_path / "my programs"
    for place in (str(folder), "off"):
        flags = [part.format(place) for part in flag]
        done = subprocess.run(
            [sys.executable, "-c", code, "doctor", *flags, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        said = json.loads(done.stdout)["compile_cache"]
        assert said == (None if place == "off" else f"0 in {folder}, 0.0 MiB")
    assert len([f for f in folder.iterdir() if f.name.endswith("-cache")]) == 1


def test_the_flag_of_compiled_programs_needs_a_folder(capsys):
    for arguments in (["doctor", "--compile-cache"], ["doctor", "--compile-cache", "--json"]):
        assert main(arguments) == 2
        assert "must be followed by a folder" in capsys.readouterr().err


def test_the_doctor_tells_what_there_is(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "cpu"
    assert len(found["devices"]) == 2
    assert found["machine"]["memory"] > 1 << 28
    monkeypatch.setattr("jdl.cli.doctor._found", lambda module: module != "indexed_gzip")
    assert main(["doctor"]) == 0
    assert "pip install 'jax-jdl[seekable]'" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_the_shell_reads(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
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


def test_of_several_files_the_later_wins_and_of_all_the_command_line(tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.yaml"
    first.write_text('model = "mlp"\nsteps = 3\nflip = true\ncolor = true\nlogs = ["csv"]\n')
    second.write_text("max_steps: 4\nworkdir: here/run\nflip: false\nlogs: []\n")
    files = ["--config", str(first), f"--config={second}"]

    def parsed(*arguments):
        expanded = config_file.expand([*arguments], train.Args)
        return parse("train", train, expanded)

    args = parsed(*files)
    assert (args.model, args.max_steps, args.flip, args.color, args.logs) == (
        "mlp",
        4,
        False,
        True,
        (),
    )
    assert args.workdir == Path("here/run")  # as the flag: from the folder one is in
    args = parsed("cnn", *files, "--no-color", "--flip", "--workdir", "x", "--logs", "csv")
    assert (args.model, args.color, args.flip, args.logs) == ("cnn", False, True, ("csv",))
    assert args.workdir == Path("x")
    args = parsed(*files[::-1][:1], *files[:2], "--no-flip")
    assert (args.max_steps, args.flip) == (3, False)
    assert not parsed("mlp", "--flip", "--no-flip").flip
    assert parsed("mlp", "--no-flip", "--flip").flip


def test_a_switch_is_taken_back_without_a_file(capsys):
    code, _, err = said(capsys, "train", "mlp", "--no-flip", "--data", "missing.tar")
    assert code == 2
    assert "missing.tar" in err
    assert "--no-flip" not in said(capsys, "train", "--help")[1]
    assert "--no-nothing" in said(capsys, "train", "mlp", "--no-nothing")[2]


def test_the_names_of_settings_are_told_in_the_order_of_the_help(tmp_path):
    (tmp_path / "a.toml").write_text("qqq = 3")
    with pytest.raises(
        ArgumentError, match="one of model, data, optimizer, learning-rate, option, weight-decay,"
    ):
        config_file.expand(["--config", str(tmp_path / "a.toml")], train.Args)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("b.toml", "seed = true", "seed in .* must be a value or a list of them, got True"),
        ("b.yaml", "flip: maybe", "flip in .* must be true or false, got 'maybe'"),
        ("b.toml", "[seed]\nx = 1", "a value or a list"),
        ("b.yaml", "workdirr: x", "Did you mean 'workdir'"),
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


@pytest.mark.parametrize("mixed", [(), pytest.param(("mixup", "cutmix"), marks=pytest.mark.slow)])
def test_a_runs_own_settings_make_it_anew(mixed, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--steps", "3", "--crop", "random", "--flip", "--size", "6", "--batch-size", "16"]
    arguments += ["--augment", "rand_augment", *mixed]
    assert main(["train", "mlp", *arguments, "--workdir", str(first)]) == 0
    config = str(first / "config.toml")
    assert main(["train", "--config", config, "--workdir", str(second)]) == 0
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (first, second)
    ]
    losses = [[row["loss"] for row in log] for log in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 3
    settings = tomllib.loads((second / "config.toml").read_text())
    assert settings["crop"] == "random"
    assert settings["augment"] == ["rand_augment", *mixed]
    assert settings["command"]["max_steps"] == 3
    capsys.readouterr()


@pytest.mark.parametrize(
    ("model", "name"), [("autoencoder", "mixup"), ("rbm", "cutmix"), ("recursive", "rand_augment")]
)
def test_augmentations_that_a_model_cannot_learn_from_are_refused(model, name, tmp_path, capsys):
    arguments = ["--augment", name, "--workdir", str(tmp_path / "run")]
    assert main(["train", model, *arguments]) == 2
    assert "--augment" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", [("train", "mlp", "--workdir"), ("evaluate", "--workdir"), ("summary",)]
)
def test_a_run_made_in_python_is_told_apart_and_left_alone(command, tmp_path, capsys):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert main([*command, str(tmp_path)]) == 2
    assert "in Python" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
