"""Models from the command line: train, evaluate, predict, pictures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import jdl
from jdl.cli.main import main
from jdl.data import from_arrays
from jdl.models import scores
from jdl.recipes import pictures, registry
from jdl.recipes.pictures import some_images
from jdl.train import plot

PICTURES = {
    "rbm": ("filters", "reconstructions", "chains", "curves"),
    "denoising": ("reconstructions", "curves"),
    "vae": ("reconstructions", "samples", "curves"),
    "autoencoder": ("reconstructions", "codes", "curves"),
    "dbn": ("dreams", "filters", "curves"),
    "gan": ("samples", "samples_over_time", "walk", "nearest", "curves"),
    "cgan": ("samples", "samples_over_time", "walk", "nearest", "curves"),
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
    measure = {
        "rbm": "free_energy",
        "denoising": "psnr_gain",
        "gan": "generator",
        "cgan": "generator",
    }
    measure |= {"cgan": "generator"} | dict.fromkeys(("dbn", "recursive"), "accuracy")
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


def test_a_sheet_enlarges_small_images_and_names_rows_and_columns(tmp_path):
    for side, shown in ((8, 96), (36, 108), (64, 128), (100, 100)):
        images = np.ones((2, 3, side, side, 1))
        images[1, 2] = 0
        bare = pictures.tiles(images, tmp_path / "a.png", "")
        named = pictures.tiles(images, tmp_path / "b.png", "title", rows="ab", columns="xyz")
        plain, pixels = (np.asarray(Image.open(path).convert("L")) for path in (bare, named))
        assert plain.shape == (2 * shown + 4, 3 * shown + 8)
        assert np.all(plain[: shown + 4] == 255)
        assert np.all(plain[shown + 4 :, 2 * (shown + 4) :] == 0)
        assert np.all(plain[:, : 2 * shown + 8] == 255)
        top, left = pixels.shape[0] - plain.shape[0], pixels.shape[1] - plain.shape[1]
        assert (top, left > 10) == (48, True)
        assert pixels[:28].min() < 100  # the title
        assert pixels[28:48, left:].min() < 100  # the columns' names
        assert min(pixels[top : top + shown, :left].min(), pixels[-shown:, :left].min()) < 100


@pytest.mark.slow
def test_a_belief_net_s_samples_are_of_all_classes(tmp_path, monkeypatch):
    """Judged by the nearest digit: three of four were eights, of some classes none."""
    drawn, tiles = [], pictures.tiles

    def watched(images, *arguments, **options):
        drawn.append(images)
        return tiles(images, *arguments, **options)

    monkeypatch.setattr(pictures, "tiles", watched)
    net = registry.recipe("dbn").build((8, 8, 1), 10)
    data = jdl.data.digits("train", batch_size=64)
    registry.recipe("dbn").prepare(net, data, tmp_path, 0)
    x, y = zip(*((b["image"] / np.float32(255), b["label"]) for b in data.once()), strict=True)
    dreams = np.asarray(drawn[0]).reshape(120, 8, 8, 1)
    seen = np.concatenate(y)[scores.nearest(dreams, np.concatenate(x)).place].reshape(10, 12)
    right = np.sum(seen == np.arange(10)[:, None], axis=1)
    assert right.min() >= 4
    assert right.sum() >= 90
    flat = dreams.reshape(120, -1)
    apart = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    assert apart.mean() > 2.2  # the digits' own is 3.0; it was 1.3
    label = jnp.repeat(jnp.arange(10), 12)
    again = registry.Drawn(net, None, tmp_path, (8, 8, 1), 120, jax.random.key(0), label, 0.75)
    found = registry.recipe("dbn").sample(again)
    np.testing.assert_array_equal(found, dreams)  # the layers as they were pretrained


def test_the_images_drawn_do_not_depend_on_the_batch_size():
    x = np.arange(2100, dtype=np.float32).reshape(-1, 1, 1, 1)
    for size in (64, 999, 4000):
        data = from_arrays(x, np.zeros(2100, np.int32), batch_size=size, drop_remainder=False)
        images, _ = some_images(data, 10)
        assert images.ravel().tolist() == [200.0 * i for i in range(10)], size


def test_the_ticks_of_a_loss_are_plain_numbers():
    axes = Figure().add_subplot()
    rows = [{"split": "train", "step": i, "loss": 0.65 - 0.02 * i} for i in range(20)]
    plot._panel(axes, rows, "loss")
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    shown = zip(axes.get_yticks(), axes.get_yticklabels(which="both"), strict=True)
    assert [text.get_text() for at, text in shown if low <= at <= high] == ["0.3", "0.5"]
