"""Models from the command line: train, evaluate, predict, pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from jdl.cli.main import main
from jdl.data import from_arrays
from jdl.recipes.pictures import some_images

PICTURES = {
    "rbm": ("filters", "reconstructions", "chains", "curves"),
    "denoising": ("reconstructions", "curves"),
    "autoencoder": ("reconstructions", "codes", "curves"),
    "dbn": ("dreams", "filters", "curves"),
    "gan": ("samples", "samples_over_time", "walk", "nearest", "curves"),
    "recursive": ("trees", "curves"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("model", PICTURES)
def test_a_run_reloads_and_leaves_pictures(model, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", model, "--steps", "30", "--workdir", run]) == 0
    for name in PICTURES[model]:
        pixels = np.asarray(Image.open(tmp_path / "run" / f"{name}.png"))
        assert pixels.std() > 10
    capsys.readouterr()
    assert main(["evaluate", "--workdir", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measure = {"rbm": "free_energy", "denoising": "psnr_gain", "gan": "generator"}
    measure |= dict.fromkeys(("dbn", "recursive"), "accuracy")
    assert np.isfinite(found[measure.get(model, "squared_error")])
    out = tmp_path / "p.npz"
    assert main(["predict", "--workdir", run, "--out", str(out)]) == 0
    with np.load(out) as saved:
        examples = 1000 if model == "recursive" else 359
        assert all(len(saved[name]) == examples for name in saved.files)
        if model == "rbm":
            assert saved["hidden"].shape == (359, 128)
            mean = saved["positive"].mean()
            assert mean == pytest.approx(found["free_energy"], rel=1e-4)


def test_the_images_drawn_do_not_depend_on_the_batch_size():
    x = np.arange(2100, dtype=np.float32).reshape(-1, 1, 1, 1)
    for size in (64, 999, 4000):
        data = from_arrays(x, np.zeros(2100, np.int32), batch_size=size, drop_remainder=False)
        images, _ = some_images(data, 10)
        assert images.ravel().tolist() == [200.0 * i for i in range(10)], size
