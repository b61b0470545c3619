"""`jdl curvature` as a user types it, on a run of a few steps."""

import json

import numpy as np
import pytest
from PIL import Image

from jdl.cli.main import main


@pytest.mark.slow
def test_writes_a_picture_and_the_numbers(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "mlp", "--steps", "2", "--workdir", str(run)]) == 0
    rows = (run / "metrics.jsonl").read_text()
    options = ["--images", "160", "--batch-size", "40", "--top", "2", "--steps", "5"]
    command = ["curvature", "--workdir", str(run), "--data", "digits", "--probes", "1", *options]
    assert main(command) == 0
    found = json.loads((run / "curvature.json").read_text())
    assert (found["images"], found["batches"], found["step"]) == (160, 4, 2)
    assert found["eigenvalues"][0] >= found["eigenvalues"][1]
    assert len(found["eigenvalue_spread_over_batches"]) == 2
    assert len(found["top_eigenvalue_of_single_batches"]) == 4
    # The largest eigenvalue is convex in the matrix: single batches see more on average.
    assert np.mean(found["top_eigenvalue_of_single_batches"]) >= 0.99 * found["eigenvalues"][0]
    area = np.trapezoid(found["density"]["density"], found["density"]["eigenvalue"])
    assert area == pytest.approx(1.0, abs=0.02)
    with Image.open(run / "curvature.png") as picture:
        assert picture.size[0] > 1000
    assert (run / "metrics.jsonl").read_text() == rows
    assert "eigenvalue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"), [(["--top", "0"], "--top"), (["--rho", "0"], "--rho"), ([], "nowhere")]
)
def test_mistakes_are_told_in_one_line(options, said, capsys):
    assert main(["curvature", "--workdir", "nowhere", *options]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_follows_sharpness_along_checkpoints(tmp_path, capsys):
    run = tmp_path / "run"
    often = ["--save-every", "1", "--keep-every", "1", "--workdir", str(run)]
    assert main(["train", "mlp", "--optimizer", "adam", "--steps", "5", *often]) == 0
    options = ["--images", "80", "--batch-size", "40", "--along"]
    assert main(["curvature", "--workdir", str(run), *options]) == 0
    found = json.loads((run / "curvature-along.json").read_text())
    assert found["step"] == [1, 2, 3, 4, 5]
    both = zip(found["sharpness"], found["preconditioned_sharpness"], strict=True)
    assert all(0 < x < y for x, y in both)
    with Image.open(run / "curvature-along.png") as picture:
        assert picture.size[0] > 1000
    assert "preconditioned_sharpness" in capsys.readouterr().out
    assert main(["curvature", "--workdir", str(run), *options, "--matrix", "gauss_newton"]) == 2
