"""What `jdl` says of a run: summary, evaluation by class, predictions in every format, progress."""

import csv
import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console
from sklearn import metrics as sk

import jdl
from jdl.cli import progress
from jdl.cli.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A classifier's and an autoencoder's run directory."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--steps", "12", "--batch-size", "128", "--workdir"]
    assert main(["train", "mlp", "--logs", "csv", *common, str(folder / "mlp")]) == 0
    assert main(["train", "autoencoder", *common, str(folder / "ae")]) == 0
    return folder


def said(capsys, *arguments):
    capsys.readouterr()
    code = main([str(x) for x in arguments])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def test_csv_log_beside_the_jsonl(runs):
    # Training's rows: another test may have evaluated the run, without a CSV, by now.
    lines = [json.loads(x) for x in (runs / "mlp/metrics.jsonl").read_text().splitlines()]
    with (runs / "mlp/metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    expected = [(x["step"], x["loss"]) for x in lines if x["split"] == "train"]
    assert expected
    assert [(int(x["step"]), float(x["loss"])) for x in table if x["split"] == "train"] == expected


def test_summary_of_a_run_and_of_its_model_agree(runs, capsys):
    of_run = json.loads(said(capsys, "summary", runs / "mlp", "--json"))
    of_model = json.loads(said(capsys, "summary", "mlp", "--json"))
    assert of_run == of_model
    widths = [64, 500, 500, 10]
    pairs = list(itertools.pairwise(widths))
    assert of_run["parameters"] == sum(a * b + b for a, b in pairs)
    assert of_run["forward_flops"] >= sum(2 * a * b for a, b in pairs)
    text = said(capsys, "summary", "cnn", "--size", "128")
    assert "33,592,170" in text
    assert "32768×1024" in text


def test_evaluation_by_class_is_that_of_the_predictions(runs, capsys, tmp_path):
    options = ("--confusion", "--per-class", "--top-k", "3", "--json")
    found = json.loads(said(capsys, "evaluate", "--workdir", runs / "mlp", *options))
    said(capsys, "predict", "--workdir", runs / "mlp", "--out", tmp_path / "p.jsonl")
    rows = [json.loads(x) for x in (tmp_path / "p.jsonl").read_text().splitlines()]
    truth, taken = [r["name"].split("/")[1] for r in rows], [r["class"] for r in rows]
    expected = sk.confusion_matrix(truth, taken, labels=found["classes"])
    assert found["confusion"] == expected.tolist()
    recall = sk.recall_score(truth, taken, labels=found["classes"], average=None)
    assert [c["recall"] for c in found["per_class"]] == pytest.approx(recall.tolist())
    assert found["accuracy"] <= found["top_3_accuracy"] <= 1.0
    text = said(capsys, "evaluate", "--workdir", runs / "mlp", "--per-class", "--confusion")
    assert "precision" in text
    assert "classified as" in text


def test_predictions_are_the_same_in_every_format(runs, capsys, tmp_path):
    for suffix in ("npz", "jsonl", "csv"):
        out = tmp_path / f"p.{suffix}"
        said(capsys, "predict", "--workdir", runs / "mlp", "--out", out, "--probabilities")
    rows = [json.loads(x) for x in (tmp_path / "p.jsonl").read_text().splitlines()]
    with np.load(tmp_path / "p.npz") as arrays:
        assert arrays["name"].tolist() == [row["name"] for row in rows]
        assert arrays["class"].tolist() == [row["class"] for row in rows]
        np.testing.assert_allclose(arrays["probabilities"].sum(1), 1.0, rtol=1e-5)
    with (tmp_path / "p.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(x["probability"]) for x in lines] == [row["probability"] for row in rows]


def test_an_autoencoder_predicts_reconstructions(runs, capsys, tmp_path):
    said(capsys, "predict", "--workdir", runs / "ae", "--out", tmp_path / "p.npz")
    found = json.loads(said(capsys, "evaluate", "--workdir", runs / "ae", "--json"))
    with np.load(tmp_path / "p.npz") as arrays:
        assert arrays["reconstruction"].shape == (359, 8, 8, 1)
        assert arrays["squared_error"].mean() == pytest.approx(found["squared_error"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "--workdir", "ae", "--per-class"), "is for classifiers"),
        (("evaluate", "--workdir", "mlp", "--top-k", "11"), "1 to 10"),
        (("predict", "--workdir", "ae", "--out", "p.csv", "--probabilities"), "no classes"),
        (("predict", "--workdir", "mlp", "--out", "p.txt"), ".npz, .jsonl or .csv"),
        (("summary", "cnnn"), "Did you mean 'cnn'?"),
    ],
)
def test_what_cannot_be_asked_is_refused(runs, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(runs)
    capsys.readouterr()
    assert main(list(arguments)) == 2
    assert words in capsys.readouterr().err


def rows(count, every=10):
    for i in range(1, count + 1):
        yield {
            "split": "train",
            "step": i * every,
            "seconds": 0.02 * i * every,
            "loss": 1.0 / i,
            "data_wait": 0.25,
        }


def test_plain_lines_tell_speed_wait_and_what_is_left(monkeypatch):
    times = iter(np.arange(0.0, 1e4, 3.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    shown = progress.StepProgress(total=100, batch_size=64)
    shown._console = Console(file=io.StringIO(), force_terminal=False, width=100)
    with shown:
        for row in rows(10):
            shown(row)
    lines = shown._console.file.getvalue().splitlines()
    assert lines[-1].startswith("step 100/100  loss 0.1  3200 images/s  20 ms/step  wait 25%")
    assert lines[-1].endswith("ETA 0:00")
    assert 3 <= len(lines) <= 10
    assert any("ETA" in line and not line.endswith("ETA 0:00") for line in lines[:-1])


def test_a_second_run_is_not_timed_with_the_first():
    shown = progress.StepProgress(total=100, batch_size=64)
    shown._console = Console(file=io.StringIO(), force_terminal=False, width=100)
    images, labels = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
    for steps in (2, 4):
        data = jdl.data.from_arrays(images, labels, batch_size=4)
        net = jdl.models.MLP(widths=(), num_outputs=2)
        jdl.classifier(net, "sgd", hooks=[shown], log_every=1).train(data, steps=steps)
    assert [point.step for point in shown._recent] == [1, 2, 3, 4]
    later = jdl.classifier(net, "sgd", hooks=[shown], log_every=5).train(data, steps=5)
    assert [point.step for point in shown._recent] == [later.step]


def test_a_terminal_shows_one_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = progress.StepProgress(total=100, batch_size=64)
    file = io.StringIO()
    shown._console = shown._bar.live.console = Console(file=file, force_terminal=True, width=80)
    with shown:
        for row in rows(9):
            shown(row)
        shown._bar.refresh()
    text = file.getvalue()
    assert " 90/100" in text
    assert "…" not in text.replace("compiling …", "")
    assert "images/s" in text
    assert "ETA" in text
