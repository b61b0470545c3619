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

from jdl.cli.main import main


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
    monkeypatch.setattr("jdl.cli.options.cores", lambda: 1)
    whole = bytearray(tar.read_bytes())
    for i in range(8):  # more than the tenth that training lets pass
        whole[i * 1024 + 512 : i * 1024 + 560] = b"x" * 48
    tar.write_bytes(whole[: 29 * 1024 + 520])
    arguments = [
        "bench",
        "data",
        str(tar),
        "--seconds",
        "0.05",
        "--size",
        "8",
        "--batch-size",
        "29",
    ]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 29
    assert {where.split("/")[-1] for where in found["skipped"]} == {f"0{i}.png'" for i in range(8)}
    assert found["decoded"] % 21 == 0
    assert {each["word"] for each in found["damage"]} == {"truncated"}
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "0/00.png" in printed
    assert "and 3 more, which --json lists" in printed
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
