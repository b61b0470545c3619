"""`jdl style`: pictures, runs, folders; mistakes in one line, nothing written."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from jdl.cli.main import main
from jdl.vision import pretrained, style

LAYERS = ["--content-layers", "relu", "--style-layers", "conv", "relu"]


def picture(path, shape, seed):
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize(shape, Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photograph, two paintings, a tar of photographs."""
    folder = tmp_path_factory.mktemp("style")
    picture(folder / "photo.jpg", (40, 28), 0)
    picture(folder / "waves.png", (30, 30), 1)
    picture(folder / "stone.png", (24, 32), 2)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for i in range(8):
            tar.add(picture(folder / "one.png", (24, 20), 10 + i), f"{i}.png")
        (folder / "one.png").unlink()
    return folder


@pytest.fixture(autouse=True)
def tiny_model(tiny, monkeypatch):
    """Every name means the tiny trunk."""
    monkeypatch.setattr(pretrained, "load_trunk", lambda name: tiny)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, int)


def training(folder, workdir, steps, *more):
    words = (
        "--batch-size 2 --size 16 --filters 4 8 8 --blocks 1 --style-size 32 --learning-rate .01"
    )
    return [
        "style", "train", str(folder / "waves.png"), str(folder / "stone.png"), *LAYERS,
        "--data", str(folder / "photos.tar"), "--workdir", str(workdir), *words.split(),
        "--steps", str(steps), *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_transfer(folder, tmp_path, capsys):
    photo, waves = str(folder / "photo.jpg"), str(folder / "waves.png")
    found = {}
    for optimizer in ("lbfgs", "adam"):
        out = tmp_path / f"{optimizer}.png"
        command = ["style", "transfer", photo, waves, *LAYERS, "--optimizer", optimizer]
        command += ["--longest", "32", "--steps", "5", "--out", str(out)]
        assert main(command) == 0
        found[optimizer] = pixels(out)
    assert found["lbfgs"].shape == (22, 32, 3)
    assert np.abs(found["lbfgs"] - found["adam"]).mean() > 0.5
    first, last = (
        capsys.readouterr().out.splitlines()[0].split(" (")[0].split("loss ")[1].split(" → ")
    )
    assert float(last) < float(first)

    out = tmp_path / "kept.png"
    command = ["style", "transfer", photo, waves, *LAYERS, "--longest", "32", "--steps", "5"]
    assert main([*command, "--keep-colors", "--out", str(out)]) == 0
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs((pixels(out) - found["lbfgs"]) @ luma).mean() < 3
    assert np.abs(pixels(out) - found["lbfgs"]).mean() > 3


def test_steps_are_counted_over_all_scales(folder, tmp_path, capsys, monkeypatch):
    def transfer(trunk, photograph, paintings, *, steps, scales, hook, **_):
        for step in [*range(steps)] * scales:
            hook(step, 1.0)
        terms = style.Terms(*np.ones((3, 1), np.float32))
        return style.Painted(photograph, np.ones(steps + 1), terms)

    monkeypatch.setattr(style, "transfer", transfer)
    command = ["style", "transfer", str(folder / "photo.jpg"), str(folder / "waves.png"), *LAYERS]
    out = ["--out", str(tmp_path / "out.jpg")]
    assert main([*command, "--scales", "2", "--steps", "3", *out]) == 0
    heard = capsys.readouterr()
    assert "3 steps at each of 2 scales" in heard.out
    (last,) = [line for line in heard.err.splitlines() if line.startswith("step 6/6")]
    assert "steps/s" in last
    assert "images/s" not in last


@pytest.mark.slow
def test_train_goes_on_and_apply_paints(folder, tmp_path, capsys):
    pytest.importorskip("flatbuffers")
    run, file = tmp_path / "run", tmp_path / "painter.jdl"
    assert main(training(folder, run, 2)) == 0
    assert main(training(folder, run, 4, "--export", str(file))) == 0
    assert "4 steps" in capsys.readouterr().out
    assert pixels(run / "samples.png").std() > 5
    assert (run / "curves.png").exists()

    photo = str(folder / "photo.jpg")
    for source, name in ((run, "run.png"), (file, "file.png")):
        command = ["style", "apply", str(source), photo, "--mix", "waves:1", "stone:3"]
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    assert pixels(tmp_path / "run.png").shape == (28, 40, 3)
    assert np.abs(pixels(tmp_path / "run.png") - pixels(tmp_path / "file.png")).max() <= 1

    many = tmp_path / "many"
    many.mkdir()
    picture(many / "a.png", (33, 21), 5)
    picture(many / "a.jpg", (16, 16), 6)
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(many / "alpha.png")
    (many / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    command = ["style", "apply", str(file), str(many), "--mix", "stone", "--out", str(out)]
    assert main(command) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.jpg.png", "a.png.png", "alpha.png"]
    assert pixels(out / "a.png.png").shape == (21, 33, 3)

    (many / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    assert main(command) == 2
    heard = capsys.readouterr()
    assert "1 of 4 pictures could not be read: broken.jpg" in heard.err
    assert not (out / "broken.png").exists()

    assert main(training(folder, run, 6, "--style", "3")) == 2
    assert "style: 10.0 there, 3.0 now" in capsys.readouterr().err

    wrong = [
        ([str(run), photo, "--mix", "stoned"], "Did you mean 'stone'"),
        ([str(run), photo, "--mix", "stone:x"], "STYLE:SHARE"),
        ([str(run), photo, "--mix", "stone:"], "STYLE:SHARE"),
        ([str(run), photo, "--mix", "stone:1", "stone:3"], "each once"),
        ([str(run), photo, "--tile", "30"], "multiple of 4"),
        ([str(folder), photo], "not a run directory of `jdl style train`"),
        ([photo, photo], "damaged"),
        ([str(run), str(folder / "photos.tar")], "is not an image"),
    ]
    nothing = tmp_path / "nothing.png"
    for words, told in wrong:
        assert main(["style", "apply", *words, "--out", str(nothing)]) == 2
        heard = capsys.readouterr()
        assert told in heard.err
        assert heard.err.count("\n") == 1
    assert not nothing.exists()


def test_mistakes_end_in_one_line_and_write_nothing(folder, tmp_path, capsys):
    photo, waves, out = str(folder / "photo.jpg"), str(folder / "waves.png"), tmp_path / "o.png"
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    wrong = [
        ([photo, str(text)], "is not an image"),
        ([str(tmp_path / "none.jpg"), waves], "no such image file"),
        ([photo], "at least one"),
        ([photo, waves, "--style-layers", "rely"], "The nearest: relu"),
        ([photo, waves, "--style", "-1"], "weights.style"),
        ([photo, waves, "--steps", "0"], "at least 1"),
        ([photo, waves, "--style-size", "0"], "at least 1"),
        ([photo, waves, *LAYERS, "--learning-rate", "0"], "--learning-rate"),
        ([photo, waves, *LAYERS, "--shares", "1", "2"], "one for each style"),
        ([photo, waves, *LAYERS, "--scales", "5"], "at least 16 pixels"),
    ]
    for words, told in wrong:
        assert main(["style", "transfer", *words, "--out", str(out)]) == 2
        heard = capsys.readouterr().err
        assert told in heard, heard
        assert heard.count("\n") == 1, heard
    assert not out.exists()
    run = tmp_path / "run"
    twice = training(folder, run, 2)
    twice[3] = twice[2]
    assert main(twice) == 2
    assert "different names" in capsys.readouterr().err
    wrong = [
        (["--data", str(tmp_path / "none.tar")], "none.tar"),
        (["--size", "18"], "multiple of 4"),
        (["--style-layers", "rely"], "The nearest: relu"),
    ]
    for words, told in wrong:
        assert main(training(folder, run, 2, *words)) == 2
        assert told in capsys.readouterr().err
        assert not run.exists()
