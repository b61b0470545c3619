"""What `jdl train` is told of its optimizer: options, decay, clipping, schedule."""

import json
import re
import shutil
import tomllib

import jax
import numpy as np
import optax
import pytest

import jdl
from jdl.cli import config_file, train
from jdl.cli.main import main, parse
from jdl.recipes.registry import RECIPES
from jdl.recipes.run_config import RunConfig
from jdl.recipes.warm_start import starting_from
from jdl.train.checkpoint import Checkpoints

FLAGS = ["--optimizer", "adam", "--learning-rate", "0.01", "--option", "b1=.8", "--clip", "0.5"]
FLAGS += ["--weight-decay", ".1", "--schedule", "cosine", "--warmup", "2", "--decay-to", ".1"]


def said(capsys, *arguments):
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    heard = capsys.readouterr()
    return code, heard.out, heard.err


def trained(run, *flags, steps=6, model="mlp"):
    return main(["train", model, *flags, "--batch-size", "32", "--workdir", str(run)])


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("options") / "run"
    assert trained(run, *FLAGS, "--steps", "6") == 0
    return run


def test_a_run_is_that_of_optax_with_the_same_settings(run):
    """Its first steps, its last checkpoint: against a chain of optax's own."""
    shift = optax.warmup_cosine_decay_schedule(0.0, 0.01, 2, 6, 0.001)
    chain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda count: shift(count + 0.5), b1=0.8, weight_decay=0.1),
    )
    config = RunConfig.load(run)
    data = config.images("digits", "train", batch_size=32, shuffle=True, seed=0, epochs=None)
    theirs = jdl.classifier(RECIPES["mlp"].build((8, 8, 1), 10), chain)
    with jax.numpy_dtype_promotion("standard"):
        theirs.train(data, steps=6)
    ours = config.estimator(run).initialize(data)
    assert ours.step == 6
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_the_settings_are_in_the_run_s_file_and_make_it_anew(run, tmp_path):
    settings = tomllib.loads((run / "config.toml").read_text())
    expected = {"option": ["b1=0.8"], "clip": 0.5, "weight_decay": 0.1, "schedule": "cosine"}
    expected |= {"warmup": 2, "decay_to": 0.1}
    assert {name: settings[name] for name in expected} == expected
    assert {name: settings["command"][name] for name in expected} == expected
    again = tmp_path / "again"
    config = str(run / "config.toml")
    assert main(["train", "--config", config, "--workdir", str(again)]) == 0
    assert losses(again) == losses(run)


def test_other_commands_know_the_optimizer(run, capsys):
    code, out, _ = said(capsys, "evaluate", "--workdir", run, "--json")
    assert code == 0
    assert 0.0 < json.loads(out)["loss"] < 3.0
    out = said(capsys, "runs", run.parent, "--json")[1]
    assert json.loads(out)["optimizer"] == (
        "adam(b1=0.8, learning_rate=0.01, weight_decay=0.1, clip=0.5, schedule=cosine, warmup=2, "
        "decay_to=0.1)"
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--option", "b1=0.7"], "option: ('b1=0.8',) there, ('b1=0.7',) now"),
        (["--clip", "2"], "clip: 0.5 there, 2.0 now"),
        (["--steps", "9"], "schedule_steps: 6 there, 9 now"),
    ],
)
def test_a_run_is_not_continued_with_another_optimizer(run, more, told, capsys):
    flags = ["--steps", "6", *more]
    code, _, err = said(
        capsys, "train", "mlp", *FLAGS, "--batch-size", 32, *flags, "--workdir", run
    )
    assert code == 2
    assert told in err


def test_a_run_with_a_warm_up_alone_goes_on_to_more_steps(tmp_path):
    flags = ["--option", "momentum=.5", "--optimizer", "sgd", "--warmup", "2", "--steps"]
    assert trained(tmp_path, *flags, "4") == 0
    assert trained(tmp_path, *flags, "5") == 0
    assert RunConfig.load(tmp_path).schedule_steps is None


def test_the_recipe_of_hessian_free_with_options(tmp_path):
    flags = ["--optimizer", "hf", "--option", "max_cg_iterations=3", "--option", "damping=1"]
    flags += ["--steps", "2", "--curvature-batch-size", "16"]
    assert trained(tmp_path, *flags, model="autoencoder") == 0
    assert RunConfig.load(tmp_path).option == ("damping=1.0", "max_cg_iterations=3")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["linear_iterations"] == 6  # in two steps


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--optimizer", "hf", "--option", "max_cg_iteration=7"], "'max_cg_iterations'"),
        (["--optimizer", "hf", "--weight-decay", ".1"], "--option l2_reg=0.001"),
        (["--optimizer", "lbfgs", "--clip", "1"], "`--clip` must be left out: the line search"),
        (["--option", "weight_decay=.1", "--weight-decay", ".1"], "`--weight-decay` is given"),
        (["--steps", "6", "--warmup", "4"], "`--warmup` must be a number of steps from 0 to 3"),
        (["--decay-to", ".1"], "without a --schedule"),
        (["--schedule", "linear", "--decay-to", "2"], "`--decay-to` must be a number in [0.0, 1"),
        (["--overfit", "2", "--flip"], "`--flip` must be left out"),
        (["--overfit", "200"], "`--overfit` must be at most the 22 full batches"),
        (["--max-time", "10x"], "`--max-time` must be a time above 0 such as 90s, 10m"),
        (["--optimizer", "schedule_free_sgd", "--schedule", "linear"], "warmup_steps"),
    ],
)
def test_what_cannot_be_is_told_in_one_line_before_a_run_is_made(flags, told, tmp_path, capsys):
    code, _, err = said(capsys, "train", "mlp", *flags, "--workdir", tmp_path / "run")
    assert code == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_options_of_a_file_come_before_those_given_here(tmp_path):
    lists, table = tmp_path / "a.toml", tmp_path / "b.yaml"
    lists.write_text('model = "mlp"\noption = ["b1=0.5", "b2=0.9"]\n')
    table.write_text("model: mlp\noption:\n  b1: 0.5\n  b2: 0.9\n")
    for path in (lists, table):
        words = config_file.expand(["--config", str(path), "--option", "b1=.7"], train.Args)
        assert parse("train", train, words).option == ("b1=0.5", "b2=0.9", "b1=.7")


def test_overfitting_goes_over_the_same_batches_and_is_evaluated_on_them(tmp_path):
    flags = ["--optimizer", "sgd", "--overfit", "2", "--steps"]
    assert trained(tmp_path, *flags, "3") == 0
    assert trained(tmp_path, *flags, "6") == 0  # in the middle of an epoch of two
    config = RunConfig.load(tmp_path)
    data = config.images("digits", "train", batch_size=32, shuffle=True, seed=0, epochs=None)
    few = [batch for batch, _ in zip(data, range(2), strict=False)]
    theirs = jdl.classifier(RECIPES["mlp"].build((8, 8, 1), 10), "sgd")
    theirs.train(few * 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "all of train"}
    assert rows[-1]["loss"] == pytest.approx(theirs.evaluate(few)["loss"], rel=1e-4)


def test_a_run_that_is_stopped_by_the_time_goes_on(tmp_path, capsys):
    flags = ["train", "mlp", "--optimizer", "sgd", "--batch-size", 32, "--workdir", tmp_path]
    code, out, _ = said(capsys, *flags, "--steps", 10**6, "--max-time", "0.2s")
    step = int(re.search(r"stopped by --max-time at step (\d+)", out)[1])
    assert code == 0
    assert 0 < step < 10**6
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    code, out, _ = said(capsys, *flags, "--steps", step + 1, "--max-time", "1h")
    assert code == 0
    assert f"{step + 1} steps" in out
    assert "stopped by --max-time" not in out


def test_a_try_does_each_part_once_and_keeps_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    flags = ["--batch-size", 32, "--workdir", tmp_path / "run"]
    code, out, _ = said(capsys, "train", "mlp", "--try", *flags)
    assert code == 0
    *parts, last = out.splitlines()
    assert [line.split()[0] for line in parts] == ["read", "train", "validate", "save", "predict"]
    assert all(re.search(r"^\w+ +\d+\.\d\d s  \w", line) for line in parts)
    assert "image uint8[32, 8, 8, 1]" in parts[0]
    assert "288,010 parameters" in parts[1]  # 64·500 + 500 + 500·500 + 500 + 500·10 + 10
    assert "float32[32, 10]" in parts[4]
    assert f"to step 400 in {tmp_path / 'run'}" in last
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_a_run_starts_from_what_fits_of_another(run, tmp_path, capsys):
    source, new = shutil.copytree(run, tmp_path / "source"), tmp_path / "new"
    flags = ["--size", "6", "--optimizer", "sgd", "--learning-rate", "1e-30", "--steps"]
    command = ["train", "mlp", "--init-from", source, "--workdir", new, "--batch-size", 32, *flags]
    code, out, _ = said(capsys, *command, 1)
    assert code == 0
    fitting = "Dense_0/bias, Dense_1/bias, Dense_1/kernel, outputs/bias, outputs/kernel"
    assert f"\ntaken from {source}: {fitting}\n" in out
    assert "\nnot taken: Dense_0/kernel is [64, 500] there, [36, 500] here\n" in out
    there, here = (Checkpoints(x / "checkpoints").arrays() for x in (run, new))
    for name in fitting.split(", "):
        path = ".params['" + name.replace("/", "']['") + "']"
        np.testing.assert_allclose(here[path], there[path], rtol=0, atol=1e-30, err_msg=name)
    assert RunConfig.load(new).init_from == str(source)
    shutil.rmtree(source)
    code, out, _ = said(capsys, *command, 2)  # goes on by itself
    assert code == 0
    assert "taken" not in out
    code, _, err = said(capsys, *command, 2, "--workdir", tmp_path / "another")
    assert code == 2
    assert "there is no checkpoint" in err


def test_another_run_s_average_is_taken_and_one_that_does_not_fit_refused(tmp_path, capsys):
    def model(name):
        return jdl.from_fns(
            lambda key, x: {name: np.zeros(3, np.float32)}, lambda w, x: x + w[name][None]
        )

    batch = {"image": np.ones((2, 3), np.float32)}
    loss = lambda outputs, batch: ((outputs - 2.0) ** 2).sum(1)  # noqa: E731
    source = jdl.Estimator(model("w"), loss, "sgd", ema=0.9, workdir=tmp_path)
    source.train([batch] * 3)
    assert not np.allclose(source.params["w"], source.evaluation_params["w"])
    started, told = starting_from(model("w"), tmp_path)
    found, _ = started.init(jax.random.key(0), batch["image"])
    np.testing.assert_array_equal(found["w"], source.evaluation_params["w"])
    assert told == [f"taken from {tmp_path}: w", "not taken: nothing"]
    flags = ["--init-from", tmp_path, "--steps", "1", "--workdir", tmp_path / "run"]
    code, _, err = said(capsys, "train", "mlp", *flags)
    assert code == 2
    assert "nothing fits" in err
    assert "w is only there" in err
