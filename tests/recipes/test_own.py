"""A Python file's model from the shell: trained, and found again by the other commands."""

import contextlib
import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import jdl
from jdl.cli.main import main
from jdl.recipes.run_config import RunConfig

LINE = """
import flax.linen as nn
import numpy as np
from beside_line import ROWS

rng = np.random.default_rng(0)
x = rng.normal(size=(ROWS, 3)).astype(np.float32)
y = x @ np.array([[1.0], [2.0], [-1.0]], np.float32)

model = nn.Dense(1)
loss = "squared_error"
inputs = "points"
data = {"points": x, "label": y}
"""
DIGITS = """
import flax.linen as nn
import numpy as np
from sklearn.datasets import load_digits

class Net(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, image):
        return nn.Dense(self.classes)(image.reshape(len(image), -1))

def model(num_classes):
    return Net(num_classes)

loss = "softmax_cross_entropy"
x, y = load_digits(return_X_y=True)
x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
data = {"image": x[:1400], "label": y[:1400]}
test = {"image": x[1400:], "label": y[1400:]}
"""
COLOURS = """
import flax.linen as nn
import jdl.losses

class Net(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.BatchNorm(use_running_average=not train)(image.mean(axis=(1, 2)))
        return nn.Dense(self.classes)(nn.Dropout(0.1, deterministic=not train)(x))

def model(image_shape, num_classes):
    assert image_shape == (16, 16, 3)
    return Net(num_classes)

def loss(outputs, batch):
    return jdl.losses.softmax_cross_entropy(outputs, batch, label_smoothing=0.1)
"""


def photographs(path):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in range(80):
            pixels = rng.integers(0, 120, (20, 24, 3))
            pixels[..., i % 2] += 120
            data = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
            info = tarfile.TarInfo(
                f"{'test' if i > 63 else 'train'}/{('red', 'green')[i % 2]}/{i:02}.png"
            )
            info.size = data.tell()
            data.seek(0)
            archive.addfile(info, data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files and a run of each, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("runs") / "my nets"
    folder.mkdir()
    (folder / "beside_line.py").write_text("ROWS = 200\n")
    photographs(folder / "photos.tar")
    texts = {"my line.py": LINE, "figures.py": DIGITS, "colours.py": COLOURS}
    with contextlib.chdir(folder):
        for name, text in texts.items():
            (folder / name).write_text(text)
        common = ["--max-steps", "20", "--workdir"]
        tar = ["--data", "photos.tar", "--size", "16", "--color", "--learning-rate", "0.1"]
        assert main(["train", "my line.py", *common, "line"]) == 0
        assert main(["train", "figures.py", *common, "figures", "--batch-size", "128"]) == 0
        assert main(["train", "colours.py", *tar, *common, "colours"]) == 0
    return folder


@pytest.fixture
def away(folder, tmp_path, monkeypatch):
    """The same, from another working directory."""
    monkeypatch.chdir(tmp_path)
    return folder


def told_json(arguments, capsys):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def kernel_and_bias(workdir):
    config = RunConfig.load(workdir)
    estimator = config.estimator(workdir)
    next(iter(estimator.predict_batches(config.images(config.data, config.split, batch_size=8))))
    (dense,) = (p for name, p in estimator.params.items() if name.startswith("Dense"))
    return np.asarray(dense["kernel"]), np.asarray(dense["bias"])


def test_evaluation_finds_the_file_again(away, capsys):
    x, y = load_digits(return_X_y=True)
    kernel, bias = kernel_and_bias(away / "figures")
    logits = x[1400:] / 16 @ kernel + bias
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = told_json(["evaluate", "--workdir", str(away / "figures"), "--confusion"], capsys)
    assert found["loss"] == pytest.approx(-log_p[np.arange(397), y[1400:]].mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(axis=1) == y[1400:]).mean())
    assert found["classes"] == [*"0123456789"]
    train = told_json(["evaluate", "--workdir", str(away / "figures"), "--split", "train"], capsys)
    assert train["loss"] != found["loss"]


def test_predictions_of_classes_and_of_numbers(away, tmp_path):
    x, _ = load_digits(return_X_y=True)
    kernel, bias = kernel_and_bias(away / "figures")
    out = tmp_path / "found.csv"
    assert main(["predict", "--workdir", str(away / "figures"), "--out", str(out)]) == 0
    with open(out) as file:
        rows = [row["class"] for row in csv.DictReader(file)]
    assert rows == [str(i) for i in (x[1400:] / 16 @ kernel + bias).argmax(axis=1)]
    out = tmp_path / "found.npz"
    assert main(["predict", "--workdir", str(away / "line"), "--out", str(out)]) == 0
    assert np.load(out)["output"].shape == (200, 1)


def test_curvature_is_that_of_least_squares(away, capsys):
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    rows = np.concatenate([x, np.ones((200, 1))], axis=1)
    options = ["--images", "0", "--batch-size", "200", "--top", "3", "--steps", "4"]
    assert main(["curvature", "--workdir", str(away / "line"), *options]) == 0
    found = json.loads((away / "line" / "curvature.json").read_text())
    expected = np.linalg.eigvalsh(rows.T @ rows / 200)[::-1][:3]
    np.testing.assert_allclose(found["eigenvalues"], expected, rtol=1e-3)


def test_a_tar_s_classes_and_shape_make_the_model(away, monkeypatch, capsys):
    monkeypatch.chdir(away)  # where the tar is
    found = told_json(["evaluate", "--workdir", "colours", "--per-class"], capsys)
    assert found["accuracy"] == 1.0
    assert [row["class"] for row in found["per_class"]] == ["green", "red"]
    assert main(["predict", "--workdir", "colours", "--out", "colours.jsonl"]) == 0
    rows = [json.loads(line) for line in (away / "colours.jsonl").read_text().splitlines()]
    assert all(row["class"] in row["name"] for row in rows)
    assert len(rows) == 16


def test_a_picture_and_a_summary_of_its_layers(away, capsys):
    assert main(["activations", str(away / "colours"), "--list"]) == 0
    assert "BatchNorm_0" in capsys.readouterr().out
    assert main(["activations", str(away / "line"), "--list"]) == 2
    assert "no image inputs" in capsys.readouterr().err
    for named in ("figures", "figures.py"):
        assert told_json(["summary", str(away / named)], capsys)["parameters"] == 650
    found = told_json(["summary", str(away / "figures.py"), "--size", "4"], capsys)
    assert found["parameters"] == 170
    assert told_json(["summary", str(away / "my line.py")], capsys)["image_shape"] == [3]


def test_an_exported_run_predicts_the_same(away, tmp_path):
    pytest.importorskip("flatbuffers")
    config = RunConfig.load(away / "line")
    data = config.images(config.data, None, batch_size=200)
    estimator = config.estimator(away / "line")
    estimator.export(tmp_path / "line.jdl", data)
    predict = jdl.train.export.load_exported(tmp_path / "line.jdl")
    (batch,) = data
    kernel, bias = map(np.asarray, (estimator.params["kernel"], estimator.params["bias"]))
    found = predict({"points": batch["points"]})
    np.testing.assert_allclose(found, batch["points"] @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_a_run_is_made_anew_and_continued(away, tmp_path, capsys):
    again = ["train", "--config", str(away / "figures" / "config.toml"), "--workdir", "again"]
    assert main([*again, "--max-steps", "2"]) == 0
    assert main([*again, "--max-steps", "3"]) == 0
    assert "to step 3" in capsys.readouterr().out
    assert RunConfig.load(tmp_path / "again") == RunConfig.load(away / "figures")


def test_a_changed_file_is_told_and_its_parameters_must_fit(folder, monkeypatch, capsys, caplog):
    monkeypatch.chdir(folder)
    (folder / "changed.py").write_text(DIGITS)
    assert main(["train", "changed.py", "--max-steps", "2", "--workdir", "changed"]) == 0
    before = told_json(["evaluate", "--workdir", "changed"], capsys)
    assert "has changed" not in caplog.text
    (folder / "changed.py").write_text(DIGITS + "# said otherwise\n")
    assert told_json(["evaluate", "--workdir", "changed"], capsys) == before
    assert "changed.py has changed since changed was trained" in caplog.text
    for text, said in (
        (DIGITS.replace("Dense(self.classes)", "Dense(11)"), "was float32[64, 10], is float32[64"),
        (DIGITS.replace("image.reshape", "image.reshap"), "changed.py, line 11: AttributeError"),
        ("x = (\n", "changed.py, line 1: SyntaxError"),
        ("x = 1\n", "changed.py must define `data`"),
    ):
        (folder / "changed.py").write_text(text)
        assert main(["evaluate", "--workdir", "changed"]) == 2
        assert said in capsys.readouterr().err
    (folder / "changed.py").unlink()
    assert main(["evaluate", "--workdir", "changed"]) == 2
    assert "There is no model file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("x = 1\n\n(", [], "line 3: SyntaxError"),
        (LINE.replace("model =", "mine ="), [], "must define `model` and `loss`; it lacks model"),
        (LINE.replace("data =", "mine ="), [], "`--data` must be given"),
        (LINE.replace("squared_error", "squared_eror"), [], "line 11: `loss` must be one of"),
        (LINE.replace("Dense(1)", "Dense(2)"), [], "line 13: `outputs` must be of the shape"),
        (LINE + "def model(width): ...", [], "line 14: `model` must be a function of image_shape"),
        (LINE + "metrics = {'m': 3}", [], "line 14: `metrics` must be a dict of functions"),
        (LINE + "def classes(): ...", [], "line 14: `classes` must be a list of names"),
        (LINE, ["--size", "8"], "`--size` must be left out: a file's data are arrays"),
        (LINE, ["--flip"], "`--flip` must be left out"),
        (LINE, ["--split", "test"], "`--split` must be train, as"),
        (LINE, ["--batch-size", "201"], "`--batch-size` must be at most the 200"),
        (LINE, ["--data", "trees.txt"], "`--data` must be images, or a Python file"),
        (LINE, ["--data", "digits"], "line 12: `inputs` must be among ['image', 'label']"),
    ],
)
def test_mistakes_are_one_line_before_the_first_step(text, options, said, tmp_path, capsys):
    (tmp_path / "beside_line.py").write_text("ROWS = 200\n")
    (tmp_path / "mine.py").write_text(text)
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "mine.py"), *options, "--workdir", str(run)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not run.exists()


def test_a_file_s_data_are_for_a_file_s_model(away, capsys):
    figures = str(away / "figures.py")
    assert main(["train", "mlp", "--data", figures]) == 2
    assert "`--data` must be images for this model" in capsys.readouterr().err
    assert main(["evaluate", "--workdir", str(away / "line"), "--data", "digits"]) == 2
    assert "`--data` must be a file's arrays for this" in capsys.readouterr().err
