"""Runs on files of trees, data of another kind than a run's, and samples of a GAN or an RBM."""

import itertools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jdl.cli.main import main
from jdl.models import RBM, Variational
from jdl.recipes import treebanks
from jdl.recipes.registry import RECIPES, Drawn
from jdl.recipes.run_config import RunConfig

BRACKETS = "(1 (0 no) (1 way))\n(0 (0 not) (1 (1 so) (0 bad)))\n"


def row(number, head, relation):
    return f"{number}\tw{number}\t_\t_\t_\t_\t{head}\t{relation}\t_\t_\n"


def test_a_file_of_trees_is_packed_with_the_words_that_were_learned(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_text(BRACKETS + "(1 (0 no)\n")
    words, shape = treebanks.learned(str(path), "skip")
    assert words == ("bad", "no", "not", "so", "way")
    assert shape == (7, 2)
    assert "line 3: A bracket is never closed" in caplog.text
    assert "skipped 1 of 3 trees" in caplog.text
    other = tmp_path / "b.txt"
    other.write_text("(1 (0 no) (1 wonder))\n")
    options = {"size": shape, "words": words, "batch_size": 1, "classes": ("0", "1")}
    (batch,) = treebanks.batches_of(str(other), **options)
    assert batch["word"].tolist() == [[0, 3, 1]]  # 1 for an unknown one
    (batch,) = treebanks.batches_of(str(other), label="none", **options)
    assert batch["labels"].tolist() == [[-1, -1, -1]]


def test_many_children_have_no_order(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text("".join(row(i, int(i > 1), "dep" if i > 1 else "root") for i in range(1, 8)))
    assert treebanks.learned(str(path), "raise")[1] == (9, 0)


@pytest.mark.slow
def test_a_run_on_a_file_of_trees_predicts_others(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(BRACKETS * 3)
    (tmp_path / "b.txt").write_text("(1 (0 no) (1 wonder))\n(0 bad)\n")
    run = ["--workdir", "run"]
    assert main(["train", "recursive", "--data", "a.txt", "--max-steps", "2", *run]) == 0
    capsys.readouterr()
    assert main(["evaluate", *run, "--json"]) == 0
    assert {"loss", "accuracy"} <= json.loads(capsys.readouterr().out).keys()
    assert main(["predict", *run, "--data", "b.txt", "--out", "p.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [r["class"] in ("0", "1") for r in rows] == [True, True]
    capsys.readouterr()
    for command in (["predict", "--out", "p.jsonl"], ["evaluate"]):
        for data in ("digits", "trees"):
            assert main([*command, *run, "--data", data]) == 2
            error = capsys.readouterr().err
            assert f"`--data` must be a file of trees for this recursive, got {data!r}" in error
            assert len(error.splitlines()) == 1
    assert main(["evaluate", *run, "--split", "test"]) == 2
    assert "--split" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_dependency_trees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = "".join(row(i, int(i > 1), "dep" if i > 1 else "root") for i in range(1, 8))
    (tmp_path / "a.conllu").write_text("\n".join([sentence] * 4))
    given = ["--data", "a.conllu", "--max-steps", "2", "--workdir", "run"]
    assert main(["train", "recursive", *given]) == 0
    assert main(["evaluate", "--workdir", "run"]) == 0


def test_images_are_for_images(tmp_path, capsys):
    config = RunConfig("mlp", "digits", "adam", 64, 1, 0, (8, 8, 1), True, ("0", "1"), "raise")
    config.save(tmp_path, {})
    for data in ("trees", "a.txt"):
        assert main(["evaluate", "--workdir", str(tmp_path), "--data", data]) == 2
        assert "`--data` must be images for this mlp" in capsys.readouterr().err


def configured(path, model, classes=("0", "1")):
    """A run directory without a checkpoint."""
    values = ("digits", "adam", 64, 1, 0, (2, 2, 1), True, classes, "raise")
    RunConfig(model, *values).save(path, {})


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("mlp", [], "holds a mlp; samples are made by vae, rbm, dbn"),
        ("rbm", [], "has no checkpoint yet: train it first"),
        ("rbm", ["--class", "1"], "`--class` must be left out: its samples have no class"),
        ("cgan", ["--class", "2"], "`--class` must be one of 0, 1, got '2'"),
        ("gan", ["--temperature", "0"], "`--temperature` must be"),
        ("gan", ["--count", "0"], "`--count` must be at least 1"),
        ("gan", ["--out", "a.txt"], "`--out` must be a .png, .jpg"),
    ],
)
def test_what_cannot_be_sampled_is_said(model, given, said, tmp_path, capsys):
    configured(tmp_path / "run", model)
    assert main(["sample", "--workdir", str(tmp_path / "run"), *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def drawn(net, params, number, **options):
    estimator = types.SimpleNamespace(evaluation_params=params, model_state={})
    shape = (2, 2, 1)
    return Drawn(net, estimator, Path(), shape, number, jax.random.key(0), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_rbm_s_samples_have_its_means(temperature):
    """By enumeration of exp(−F / T)'s machine, whose energy is divided by T."""
    net, rng = RBM(hidden=3), np.random.default_rng(0)
    sizes = {"kernel": (4, 3), "visible_bias": (4,), "hidden_bias": (3,)}
    params = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    found = np.asarray(RECIPES["rbm"].sample(drawn(net, params, 4000, temperature=temperature)))
    w, b, c = (params[name].astype(float) / temperature for name in sizes)
    v = np.array(list(itertools.product([0, 1], repeat=4)))
    p = np.exp(v @ b) * np.prod(1 + np.exp(v @ w + c), axis=1)
    expected = p @ v / p.sum()
    np.testing.assert_allclose(found.reshape(4000, 4).mean(0), expected, atol=0.03)


def test_the_temperature_scales_a_vae_s_code():
    """A decoder that is one layer: its logits are linear in the code."""
    net, key = Variational(widths=(), code=5), jax.random.key(1)
    params = net.init({"params": key}, jnp.zeros((1, 2, 2, 1)))["params"]

    def logits(temperature):
        x = np.asarray(RECIPES["vae"].sample(drawn(net, params, 50, temperature=temperature)))
        return np.log(x) - np.log1p(-x)

    np.testing.assert_allclose(logits(0.5), 0.5 * logits(1.0), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "columns"),
    [
        ("gan", {"score": ()}),
        ("cgan", {"score": ()}),
        ("vae", {"squared_error": (), "reconstruction": (8, 8, 1)}),
        ("rbm", {"positive": (), "hidden": (128,)}),
    ],
)
def test_predictions_and_samples_of_models_of_images(model, columns, tmp_path, monkeypatch):
    run, path = ["--workdir", str(tmp_path / "run")], tmp_path / "p.npz"
    assert main(["train", model, "--max-steps", "2", *run]) == 0
    assert main(["predict", *run, "--out", str(path)]) == 0
    with np.load(path) as found:
        assert {name: found[name].shape[1:] for name in columns} == columns
    assert main(["evaluate", *run]) == 0
    assert main(["summary", str(tmp_path / "run")]) == 0
    monkeypatch.setattr("jdl.recipes.run_config.open_images", None)  # no data are needed
    drawn = []
    for seed in (0, 0, 1):
        given = ["--count", "12", "--seed", str(seed), "--out", str(path)]
        assert main(["sample", *run, *given]) == 0
        with np.load(path) as found:
            drawn.append(found["sample"])
            assert ("class" in found.files) == (model == "cgan")
            if model == "cgan":
                assert found["class"].tolist() == sorted("012345678901")
    assert drawn[0].shape == (12, 8, 8, 1)
    assert 0 <= drawn[0].min() < drawn[0].max() <= 1
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
    assert not np.allclose(drawn[0][0], drawn[0][1])
    assert main(["sample", *run]) == 0
    assert np.asarray(Image.open(tmp_path / "run" / "sampled.png")).std() > 10


@pytest.mark.slow
@pytest.mark.parametrize(("model", "why"), [("rbm", "Contrastive divergence"), ("gan", "A GAN")])
@pytest.mark.parametrize("optimizer", ["lbfgs", "hf"])
def test_optimizers_that_ask_for_more_than_gradients_are_refused(
    model, why, optimizer, tmp_path, capsys
):
    run = ["--workdir", str(tmp_path), "--optimizer", optimizer, "--max-steps", "1"]
    assert main(["train", model, *run]) == 2
    assert why in capsys.readouterr().err
