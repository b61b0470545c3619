"""Runs on files of trees, data of another kind than a run's, and samples of a GAN or an RBM."""

import json

import numpy as np
import pytest

from jdl.cli.main import main
from jdl.recipes import treebanks
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
    out = ["--out", str(tmp_path / "p.npz")]
    assert main(["predict", "--workdir", str(tmp_path), *out, "--samples", "3"]) == 2
    assert "`--samples` must be left out: it has none, got 'mlp'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "columns"),
    [("gan", {"score": ()}), ("rbm", {"positive": (), "hidden": (128,)})],
)
def test_a_gan_s_and_an_rbm_s_predictions_and_samples(model, columns, tmp_path):
    run, path = ["--workdir", str(tmp_path / "run")], tmp_path / "p.npz"
    assert main(["train", model, "--max-steps", "2", *run]) == 0
    assert main(["predict", *run, "--out", str(path)]) == 0
    with np.load(path) as found:
        assert {name: found[name].shape[1:] for name in columns} == columns
    assert main(["predict", *run, "--samples", "5", "--out", str(path)]) == 0
    with np.load(path) as found:
        samples = found["sample"]
    assert samples.shape == (5, 8, 8, 1)
    assert 0 <= samples.min() < samples.max() <= 1
    assert not np.allclose(samples[0], samples[1])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "why"), [("rbm", "Contrastive divergence"), ("gan", "A GAN")])
@pytest.mark.parametrize("optimizer", ["lbfgs", "hf"])
def test_optimizers_that_ask_for_more_than_gradients_are_refused(
    model, why, optimizer, tmp_path, capsys
):
    run = ["--workdir", str(tmp_path), "--optimizer", optimizer, "--max-steps", "1"]
    assert main(["train", model, *run]) == 2
    assert why in capsys.readouterr().err
