"""`jdl index`, `jdl pack` and `jdl bench data`, as a user types them."""

import bz2
import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jdl.cli import bench_data, compare, train
from jdl.cli.main import in_flags, main, parse
from jdl.compare import tar_problem
from jdl.compare.problems import VALIDATION
from jdl.data import Holdout, TarSource
from jdl.recipes.datasets import choice
from jdl.recipes.run_config import RunConfig


def png(value):
    out = io.BytesIO()
    Image.new("L", (12, 10), value).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as out:
        for i in range(30):
            data = png(i)
            info = tarfile.TarInfo(f"train/{i % 3}/{i:02d}.png")
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def spoilt(whole, kind):
    changed = bytearray(whole)
    changed[5 * 1024 + 3] ^= 1
    return {
        "checksum": bytes(changed),
        "truncated in a header": whole[: 7 * 1024 + 100],
        "truncated in a member": whole[: 7 * 1024 + 520],
        "truncated at its end": whole[: 30 * 1024],
        "damaged": b"this is no tar" * 100,
        "empty": b"",
        "truncated gzip": gzip.compress(whole)[:-50],
        "damaged bzip2": bz2.compress(whole)[:200] + b"junk" * 300,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "word", "images"),
    [
        ("checksum", "checksum", 29),
        ("truncated in a header", "truncated", 7),
        ("truncated in a member", "truncated", 7),
        ("truncated at its end", "truncated", 30),
        ("damaged", "damaged", 0),
        ("empty", "truncated", 0),
        ("truncated gzip", "truncated", 29),
        ("damaged bzip2", "damaged", 0),
    ],
)
def test_index_finishes_and_says_the_damage(kind, word, images, tar, tmp_path, capsys):
    path = tmp_path / "bad.tar"
    path.write_bytes(spoilt(tar.read_bytes(), kind))
    assert main(["index", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"members", "images", "classes", "damage"} <= found.keys()
    assert word in {each["word"] for each in found["damage"]}
    assert found["images"] == images == sum(found["classes"].values())
    assert main(["index", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{word}:" in out
    assert "damaged: " in out
    assert main(["train", "mlp", "--data", str(path), "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "damaged" in said
    assert word in said


def test_index_says_how_an_archive_is_read(tar, tmp_path, capsys):
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    assert main(["index", str(packed)]) == 0
    out = capsys.readouterr().out
    assert "30 images" in out
    assert "read in order" in out
    assert "jdl pack" in out
    pytest.importorskip("indexed_gzip")
    assert main(["index", str(packed), "--seekable"]) == 0
    assert "in any order through its seek file" in capsys.readouterr().out
    assert main(["index", str(tar), "--seekable"]) == 2
    assert "needs none" in capsys.readouterr().err


def test_pack(tar, tmp_path, capsys):
    out = str(tmp_path / "out-%05d.tar")
    assert main(["pack", str(tar), out, "--shard-images", "20"]) == 0
    assert "30 members" in capsys.readouterr().out
    assert len(list(tmp_path.glob("out-*.tar"))) == 2
    assert main(["pack", str(tar), out, "--shard-images", "20"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["pack", str(tar), out, "--overwrite", "--size", "4x6"]) == 0
    with tarfile.open(tmp_path / "out-00000.tar") as packed:
        assert Image.open(packed.extractfile(packed.next())).size == (6, 4)
    capsys.readouterr()
    assert main(["pack", str(tar), str(tmp_path / "out-00000.tar")]) == 2
    assert "Pass `--overwrite` to replace it." in capsys.readouterr().err
    tar.write_bytes(spoilt(tar.read_bytes(), "checksum"))
    options = ["pack", str(tar), out, "--overwrite"]
    assert main(options) == 2
    assert "pass --on-error skip." in capsys.readouterr().err
    assert main([*options, "--on-error", "skip"]) == 0
    assert f"left out '{tar}' at byte 5120: checksum" in capsys.readouterr().out
    both = tmp_path / "b.tar"
    both.write_bytes((tmp_path / "out-00000.tar").read_bytes())
    pattern = str(tmp_path / "{out-00000,b}.tar")
    assert main(["pack", pattern, str(tmp_path / "both.tar")]) == 0
    printed = capsys.readouterr().out
    assert "another key than 'train/0/00', which is taken: 'train/0/00-2'" in printed
    assert "and 9 more" in printed
    assert main(["pack", str(tmp_path / "nowhere"), out]) == 2
    assert main(["pack", str(tar), str(tmp_path / "x.zip")]) == 2
    assert not list(Path(tmp_path).glob("*.tmp"))


def test_bench_data(tar, capsys):
    arguments = ["bench", "data", str(tar), "--seconds", "0.1", "--size", "8", "--batch-size", "8"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 30
    rates = found["images_per_second"]
    assert {"reading alone", "decoded on demand", "2 threads", "2 worker processes"} <= {*rates}
    assert all(np.isfinite(rate) and rate > 0 for rate in rates.values())
    assert found["decoded"] >= 30
    assert (found["skipped"], found["damage"]) == ({}, [])
    assert main(["bench", "dta"]) == 2
    assert "Did you mean 'data'" in capsys.readouterr().err


def test_bench_data_says_what_was_skipped_and_lost(tar, capsys, monkeypatch):
    """A speed over a damaged archive would pass for that of a whole one."""
    monkeypatch.setattr("jdl.cli.bench_data.cores", lambda: 1)
    whole = bytearray(tar.read_bytes())
    for i in range(8):  # more than the tenth that training lets pass
        whole[i * 1024 + 512 : i * 1024 + 560] = b"x" * 48
    tar.write_bytes(whole[: 29 * 1024 + 520])
    report = bench_data.measure(str(tar), size="8", channels=3, batch_size=29, seconds=0.01)
    report.show(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 29
    assert {where.split("/")[-1] for where in found["skipped"]} == {f"0{i}.png'" for i in range(8)}
    assert found["decoded"] % 21 == 0
    assert {each["word"] for each in found["damage"]} == {"truncated"}
    report.show(as_json=False)
    printed = capsys.readouterr().out
    assert "0/00.png" in printed
    assert "and 5 more, which --json lists" in printed
    assert "damaged: truncated at byte 29696" in printed


@pytest.mark.slow
def test_bench_train_compares_with_a_bare_loop(capsys):
    arguments = ["bench", "train", "mlp", "--size", "8", "--batch-size", "4", "--seconds", "0.05"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rates = found["images_per_second"]
    assert found["ratio"] == pytest.approx(rates["jdl"] / rates["bare jit loop"])
    assert main(["bench", "train", "cn"]) == 2
    assert "Did you mean 'cnn'" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_optim_tells_costs_in_gradients(capsys):
    arguments = ["bench", "optim", "mlp", "--size", "4", "--batch-size", "4", "--seconds", "0.01"]
    assert main([*arguments, "--json"]) == 0
    costs = {row["what"]: row for row in json.loads(capsys.readouterr().out)["costs"]}
    assert costs["gradient"]["gradients"] == 1.0
    assert {"Gauss-Newton product", "Hessian product", "step of hf"} <= costs.keys()
    assert costs["step of sgd"]["counted"] is None
    assert costs["step of hf"]["counted"] > 2
    assert all(row["seconds"] > 0 for row in costs.values())
    assert main(arguments) == 0
    assert "Gauss-Newton product" in capsys.readouterr().out


# ---------------------------------------------------------------------- choosing members, labels


def write(path, names):
    with tarfile.open(path, "w") as out:
        for i, name in enumerate(names):
            data = png(i * 5 % 256)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return str(path)


ESCAPE, MARKUP = "\x1b[2Jcat", "[red]dog:cat:"


@pytest.fixture
def tarball(tmp_path):
    """As GitHub makes them: all in one folder; with litter, and names that a terminal obeys."""
    parts = [(s, c, i) for s in ("train", "test") for c in (ESCAPE, MARKUP) for i in range(4)]
    names = [f"repo-main/{s}/{c}/s{i % 2}_{i}.png" for s, c, i in parts]
    return write(tmp_path / "repo.tar", [*names, "repo-main/train/.cache/1.png", "preview.png"])


def indexed(capsys, *arguments):
    assert main(["index", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_index_counts_what_the_options_choose(tarball, capsys):
    whole = indexed(capsys, tarball)
    assert whole["classes"] == {ESCAPE: 8, MARKUP: 8}
    assert whole["left_out"] == {".*": 1, "/preview.*": 1}
    assert whole["images"] == 18
    for arguments, classes in [
        (("--label", "1"), {"train": 8, "test": 8}),
        (("--label", "-2"), {"train": 8, "test": 8}),
        (("--label", "re:(s.)_"), {"s0": 8, "s1": 8}),
        (("--label", "none"), {"": 16}),
        (("--split", "test"), {ESCAPE: 4, MARKUP: 4}),
        (("--split", f"repo-main/test/{MARKUP}"), {MARKUP: 4}),
        (("--include", "train/,nowhere", "--label", "1"), {"train": 8}),
        (("--exclude", "s0_*", "--label", "re:(s.)_"), {"s1": 8}),
        (("--exclude", "!.*,!/preview.*", "--label", "re:(....)$"), {".png": 18}),
        (("--exclude", "none", "--label", "re:(....)$"), {".png": 18}),
    ]:
        assert indexed(capsys, tarball, *arguments)["classes"] == classes, arguments
    nothing = indexed(capsys, tarball, "--include", "nowhere")
    assert (nothing["classes"], nothing["left_out"]["include"]) == ({}, 16)
    assert main(["index", tarball]) == 0
    assert "left out: 1 by '.*', 1 by '/preview.*'; --exclude '!" in capsys.readouterr().out
    for arguments, words in [
        (("--label", "re:("), "`--label` must be re: and a regular expression"),
        (("--label", "foo"), "`--label` must be"),
        (("--exclude", "!*.sge.*"), r"Did you mean '*.seg.*'"),
        (("--split", "trian"), "Paths begin with: 'repo-main/train', 'repo-main/test'"),
    ]:
        code = main(["index", tarball, *arguments])
        assert (code, words in capsys.readouterr().err) == (2, True), arguments


def test_labels_of_a_table_beside_the_archive(tmp_path, capsys):
    flat = write(tmp_path / "flat.tar", [f"{i}.png" for i in range(12)])
    (tmp_path / "t.csv").write_text(
        "id,age,breed\n" + "".join(f"{i},{i},b{i % 2}\n" for i in range(12))
    )
    table = f"{tmp_path / 't.csv'}:breed"
    assert indexed(capsys, flat, "--label", table)["classes"] == {"b0": 6, "b1": 6}
    config = job("mlp", flat, "--label", table).config
    assert (config.label, config.classes) == (table, ("b0", "b1"))
    (batch,) = config.images(flat, None, batch_size=12, epochs=1, shuffle=False)
    assert batch["label"].tolist() == [0, 1] * 6
    assert main(["index", flat, "--label", f"{tmp_path / 't.csv'}:bred"]) == 2
    assert "no column 'bred', but 'id', 'age', 'breed'" in capsys.readouterr().err
    assert choice("re:(.).csv")["label"].pattern == "(.).csv"  # no table


def test_index_shows_names_that_a_terminal_obeys_as_escapes(tarball, capsys):
    assert main(["index", tarball]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"\x1b[2Jcat" in shown  # spelled out
    assert MARKUP in shown


@pytest.mark.slow
def test_names_that_a_terminal_obeys_are_shown_as_escapes(tarball, tmp_path, capsys):
    workdir = ["--workdir", str(tmp_path / "run")]
    out = str(tmp_path / "out.jsonl")
    for arguments in [
        ["train", "mlp", "--data", tarball, "--size", "8", "--max-steps", "2", *workdir],
        ["evaluate", *workdir, "--per-class", "--confusion"],
        ["predict", *workdir, "--out", out],
        ["evaluate", *workdir, "--label", "re:_(.)"],
    ]:
        code = main(arguments)
        said = capsys.readouterr()
        assert code == (2 if "re:_(.)" in arguments else 0), said.err
        shown = said.out + said.err.replace("\r", "").replace("\x1b[K", "")
        assert "\x1b" not in shown
        if arguments[0] == "evaluate":
            assert r"\x1b[2Jcat" in shown
            assert MARKUP in shown
    classes = {json.loads(line)["class"] for line in Path(out).read_text().splitlines()}
    assert classes <= {ESCAPE, MARKUP}


def job(model, path, *more):
    return train._job(parse("train", train, [model, "--data", path, "--size", "8", *more]))


@pytest.mark.parametrize("model", ["autoencoder", "denoising", "rbm", "gan"])
def test_models_that_learn_no_labels_ask_for_none(model, tmp_path, tarball):
    flat = write(tmp_path / "flat.tar", [f"{i}.png" for i in range(8)])
    assert job(model, flat).config.label == "none"
    assert "label" not in job(model, flat).data.element_spec
    assert job(model, tarball).config.classes == (ESCAPE, MARKUP)  # for pictures by class
    assert job(model, tarball, "--label", "none").config.classes == ()
    differ = write(tmp_path / "differ.tar", ["train/a/1.png", "train/b/2.png", "test/c/3.png"])
    config = job(model, differ).config
    assert (config.label, config.split) == ("none", "train")
    assert "label" not in config.images(differ, "test", batch_size=1).element_spec


@pytest.mark.slow
def test_an_autoencoder_of_unlabelled_images_is_evaluated_on_labelled_ones(tmp_path, tarball):
    flat = write(tmp_path / "flat.tar", [f"{i}.png" for i in range(8)])
    run = ["--workdir", str(tmp_path / "run")]
    given = ["train", "autoencoder", "--data", flat, "--size", "8", "--max-steps", "1"]
    assert main([*given, *run]) == 0
    assert main(["evaluate", *run, "--data", tarball]) == 0
    assert main(["evaluate", *run, "--label", "0"]) == 2


def test_a_classifier_without_classes_is_refused(tmp_path, capsys):
    flat = write(tmp_path / "flat.tar", [f"{i}.png" for i in range(8)])
    given = ["train", "mlp", "--data", flat, "--size", "8", "--workdir", str(tmp_path / "run")]
    assert main(given) == 2
    assert "has no label: `--label folder` finds none" in capsys.readouterr().err
    compared = ["compare", "--data", flat, "--workdir", str(tmp_path / "study")]
    for arguments in (given, compared):
        assert main([*arguments, "--label", "none"]) == 2
        assert "needs classes, got" in capsys.readouterr().err
    assert main([*given, "--label", "re:(.)", "--max-steps", "1"]) == 0
    assert main(["evaluate", "--workdir", str(tmp_path / "run"), "--label", "none"]) == 2
    assert "`--label` must be other than none for a classifier" in capsys.readouterr().err


@pytest.mark.slow
def test_a_runs_members_and_labels_are_those_of_later_commands(tarball, tmp_path, capsys):
    workdir = ["--workdir", str(tmp_path / "run")]
    chosen = ["--label", "re:_(.)", "--include", "s0_*", "--exclude", "none"]
    given = ["train", "mlp", "--data", tarball, "--size", "8", "--max-steps", "1"]
    assert main([*given, *chosen, *workdir]) == 0
    config = RunConfig.load(tmp_path / "run")
    assert (config.label, config.include, config.exclude) == ("re:_(.)", "s0_*", "none")
    assert (config.split, config.classes) == ("train", ("0", "2"))
    again = ["--config", str(tmp_path / "run/config.toml"), "--workdir", str(tmp_path / "again")]
    assert main(["train", *again]) == 0
    assert RunConfig.load(tmp_path / "again") == config
    out = str(tmp_path / "out.jsonl")
    for more, n in [((), 4), (("--split", "all", "--include", "none", "--exclude", "s1_*"), 8)]:
        assert main(["predict", *workdir, "--out", out, *more]) == 0
        assert len(Path(out).read_text().splitlines()) == n
    capsys.readouterr()
    assert main(["evaluate", *workdir, "--include", "s1_*"]) == 2  # labels 1 and 3
    assert "not there in training: '1', '3'" in capsys.readouterr().err


def test_other_commands_choose_members_too(tarball, tmp_path, capsys):
    bench = ["bench", "data", tarball, "--seconds", "0.01", "--size", "8", "--batch-size", "2"]
    assert main([*bench, "--json", "--split", "test", "--include", "s0_*"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4
    assert main(["bench", "train", "--split", "test"]) == 2
    assert "--split" in capsys.readouterr().err
    for arguments, flag in [
        (["activations", "vgg16", "a.png", "--include", "x"], "`--include`"),
        (["compare", "--problem", "quadratic", "--label", "0"], "`--label`"),
        (["train", "recursive", "--exclude", "x"], "`--exclude`"),
    ]:
        assert main(arguments) == 2
        assert flag in capsys.readouterr().err
    given = ["--data", tarball, "--size", "8", "--include", "s0_*", "--label", "re:_(.)"]
    ((problem, _),) = compare._problem(parse("compare", compare, given))
    assert (problem.size, problem.about["classes"], problem.about["held out"]) == (4, 2, "test/")
    # Part of a trial's settings, so that results of other data are not taken for these.
    assert (problem.about["include"], problem.about["label"].pattern) == (["s0_*"], "_(.)")


def test_a_held_out_part_of_the_training_images_is_of_the_training_folder(tmp_path):
    names = [f"repo/{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in range(60)]
    problem = tar_problem(write(tmp_path / "a.tar", names), size=(8, 8))
    assert problem.size == 120
    assert problem.split is not None
    held_out = TarSource(str(tmp_path / "a.tar"), split=Holdout("test", VALIDATION, folder="train"))
    assert problem.split.size + len(held_out) == 120
    assert {held_out.name(i)[:11] for i in range(len(held_out))} == {"repo/train/"}


def test_an_error_names_flags():
    message = "pass label=None, on_error=\"skip\", exclude='!*.a', split=-1; `size` or size=(1, 2)"
    names = ["label", "on_error", "exclude", "split", "size"]
    assert in_flags(message, names) == (
        "pass --label none, --on-error skip, --exclude '!*.a', --split -1; `--size` or size=(1, 2)"
    )
