"""Packing, read back with tarfile, NumPy and Pillow."""

import contextlib
import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jdl.core.check import ArgumentError, DataError
from jdl.data import Holdout, TarSource, describe, standard_input
from jdl.data.idx import read_idx
from jdl.data.pack import header, pack

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (23, 9, 7), dtype=np.uint8)
LABELS = np.arange(23, dtype=np.uint8) % 4


def encode(pixels, format="PNG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def members(path):
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for i, image in enumerate(PIXELS):
        file = root / f"train/{LABELS[i]}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image))
    (root / "notes.txt").write_text("no image")
    (root / "train/0/._00.png").write_text("macOS")
    return root


def digest(paths):
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def test_a_folder(folder, tmp_path):
    done = pack(str(folder), str(tmp_path / "a-%03d.tar"), shard_images=10)
    assert [os.path.basename(s) for s in done.shards] == ["a-000.tar", "a-001.tar", "a-002.tar"]
    found = [member for shard in done.shards for member in members(shard)]
    expected = sorted((f"train/{LABELS[i]}/{i:02d}.png", encode(PIXELS[i])) for i in range(23))
    assert found == expected
    assert done.bytes == sum(os.path.getsize(shard) for shard in done.shards)
    listed = subprocess.run(["tar", "-tf", done.shards[2]], capture_output=True, check=True)
    assert len(listed.stdout.splitlines()) == 3
    assert describe(done.shards).damage == []
    os.utime(folder / "train/0/00.png", (1, 1))
    again = pack(str(folder), str(tmp_path / "b-%03d.tar"), shard_images=10)
    assert digest(again.shards) == digest(done.shards)
    small = pack(str(folder), str(tmp_path / "c-%05d.tar"), shard_bytes=8192)
    assert max(os.path.getsize(shard) for shard in small.shards) <= 8192
    assert sum(len(members(shard)) for shard in small.shards) == 23


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path, ending):
    root = tmp_path / "mnist"
    root.mkdir()
    wrap = gzip.compress if ending else bytes
    (root / f"train-images-idx3-ubyte{ending}").write_bytes(wrap(idx(PIXELS)))
    (root / f"train-labels-idx1-ubyte{ending}").write_bytes(wrap(idx(LABELS)))
    (root / f"t10k-images-idx3-ubyte{ending}").write_bytes(wrap(idx(PIXELS[:5])))
    (root / f"t10k-labels-idx1-ubyte{ending}").write_bytes(wrap(idx(LABELS[:5])))
    pack(str(root), str(tmp_path / "a.tar"))
    source = TarSource(tmp_path / "a.tar", split="train")
    assert len(source) == 23
    for i in range(23):
        number = int(source.name(i)[-9:-4])
        np.testing.assert_array_equal(pixels(source[i].data), PIXELS[number])
        assert source.classes[source[i].label] == str(LABELS[number])
    assert len(TarSource(tmp_path / "a.tar", split="test")) == 5
    one = pack(str(root / f"train-images-idx3-ubyte{ending}"), str(tmp_path / "one.tar"))
    assert one.members == 23
    np.testing.assert_array_equal(read_idx(root / f"train-images-idx3-ubyte{ending}"), PIXELS)
    (root / "bad-idx3-ubyte").write_bytes(idx(PIXELS)[:-1])
    with pytest.raises(DataError, match="its header says"):
        read_idx(root / "bad-idx3-ubyte")
    (root / "bad-idx3-ubyte").write_bytes(b"\0\0\x08\x04" + b"\xff" * 20)
    with pytest.raises(DataError, match="its header says"):
        read_idx(root / "bad-idx3-ubyte")


def test_idx_files_of_any_name_are_packed_once_each_apart(tmp_path):
    root = tmp_path / "idx"
    root.mkdir()
    for kind, n in [("train", 7), ("test", 5)]:
        images = root / f"emnist-letters-{kind}-images-idx3-ubyte"
        images.write_bytes(idx(PIXELS[:n]))
        Path(f"{images}.gz").write_bytes(gzip.compress(idx(PIXELS[:n])))
        labels = root / f"emnist-letters-{kind}-labels-idx1-ubyte.gz"
        labels.write_bytes(gzip.compress(idx(LABELS[:n])))
    (root / "more.a-images-idx3-ubyte").write_bytes(idx(PIXELS[:2]))
    (root / "more.b-images-idx3-ubyte").write_bytes(idx(PIXELS[:3]))
    pack(str(root), str(tmp_path / "a.tar"))
    names = [name for name, _ in members(tmp_path / "a.tar")]
    assert len(names) == len(set(names)) == 17
    counts = {"train": 7, "test": 5, "more-a": 2, "more-b": 3}
    assert Counter(name.split("/")[0] for name in names) == counts
    assert "train/3/00003.png" in names
    (root / "emnist-digits-train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    with pytest.raises(DataError, match="would both be packed as 'train'"):
        pack(str(root), str(tmp_path / "b.tar"))


def test_npz(tmp_path):
    path = tmp_path / "a.npz"
    colors = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez(path, x_train=PIXELS, y_train=LABELS, x_test=colors, y_test=np.array(list("abca")))
    pack(str(path), str(tmp_path / "a.tar"))
    train, test = (TarSource(tmp_path / "a.tar", split=split) for split in ("train", "test"))
    assert (len(train), len(test), test.classes) == (23, 4, ("a", "b", "c"))
    np.testing.assert_array_equal(pixels(train[0].data), PIXELS[0])
    np.testing.assert_array_equal(pixels(test[3].data), colors[3])
    for arrays, words in [
        ({"images": PIXELS.astype(np.float32)}, "uint8"),
        ({"images": PIXELS, "labels": LABELS[:3]}, "a label for each"),
        ({"images": PIXELS, "labels": LABELS[None]}, "a label for each"),
        ({"weights": PIXELS}, "holds no images: it has weights"),
        ({"images": np.array([{}, {}], object)}, "cannot be read"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=words):
            pack(str(path), str(tmp_path / "b.tar"))
    assert not (tmp_path / "b.tar").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_labels_of_npz_are_the_classes_that_are_read_again(tmp_path):
    path = tmp_path / "a.npz"
    for labels, classes in [
        (LABELS[:, None], list("0123")),
        (np.array([b"cat", b"caf\xc3\xa9"] * 2), ["caf\xe9", "cat"]),
        (np.array(["a_b", "a b", "a..", "cafe\u0301"]), ["a b", "a..", "a_b", "caf\xe9"]),
        (np.array([3, -1, 0, 1 << 40]), ["-1", "0", "1099511627776", "3"]),
    ]:
        np.savez(path, images=PIXELS[: len(labels)], labels=labels)
        done = pack(str(path), str(tmp_path / "a.tar"), overwrite=True)
        source = TarSource(done.shards, keep_index=False)
        assert list(source.classes) == classes
        texts = [t.decode() if isinstance(t, bytes) else str(t) for t in np.ravel(labels).tolist()]
        found = {
            int(source.name(i)[-9:-4]): source.classes[source[i].label] for i in range(len(source))
        }
        assert [found[i] for i in range(len(texts))] == [
            unicodedata.normalize("NFC", t) for t in texts
        ]


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("", "a"),
        ("a/b", "a_b"),
        ("..", "a"),
        (".", "a"),
        (".a", "a"),
        ("a\nb", "a"),
        ("a\0b", "a"),
        ("e\u0301", "\xe9"),
        (b"\xff", b"a"),
    ],
)
def test_labels_that_no_folder_can_have_are_refused_by_name(tmp_path, bad, good):
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:2], y_train=np.array([bad, good]))
    with pytest.raises(DataError, match=r"has the label '.*cannot be the name of a folder"):
        pack(str(tmp_path / "a.npz"), str(tmp_path / "a.tar"))
    assert not (tmp_path / "a.tar").exists()


def test_another_tar(folder, tmp_path):
    first = pack(str(folder), str(tmp_path / "a.tar")).shards[0]
    with open(first, "rb") as file:
        whole = file.read()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    second = pack(str(tmp_path / "a.tar.gz"), str(tmp_path / "b.tar")).shards[0]
    assert digest([first]) == digest([second])
    damaged = bytearray(whole)
    damaged[1024 + 5] ^= 1
    (tmp_path / "d.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"checksum.*on_error"):
        pack(str(tmp_path / "d.tar"), str(tmp_path / "c.tar"))
    done = pack(str(tmp_path / "d.tar"), str(tmp_path / "c.tar"), on_error="skip")
    assert (done.members, len(done.skipped)) == (22, 1)


def test_links_inside_a_folder_are_followed_and_others_told(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root-2"
    for i, file in enumerate((root / "a/0.png", root / "a/sub/1.png", outside / "2.png")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(PIXELS[i]))
    for name, target in {"b": "a", "c": str(root / "a/sub"), "a/l.png": "0.png"}.items():
        (root / name).symlink_to(target)
    expected = {
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
    }
    assert len(expected) == 7
    out = {"d": "../root-2", "a/x.png": str(outside / "2.png"), "a/gone.png": "nothing", "e": "e"}
    for name, target in (out | {"a/loop": "..", "self": "."}).items():
        (root / name).symlink_to(target)
    done = pack(str(root), str(tmp_path / "a.tar"))
    assert {name for name, _ in members(done.shards[0])} == expected
    told = {os.path.relpath(eval(name), root): why for name, why in done.skipped}
    assert {"d", "a/x.png", "a/gone.png", "e", "a/loop", "self"} <= {*told}
    assert str(outside) in told["d"]
    assert told["a/x.png"].startswith("a link out of")
    assert told["a/loop"] == told["self"] == "a link to a folder that it is in"
    assert told["e"] == told["a/gone.png"] == "a link to no file or folder"
    (root / "a").rename(outside / "a")
    with pytest.raises(DataError, match=r"no image is left.*a link"):
        pack(str(root), str(tmp_path / "b.tar"))


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows have no such names")
def test_names_that_are_no_utf8_have_the_same_class_as_in_a_tar_of_them(tmp_path):
    root = os.fsencode(tmp_path / "root")
    for name in (
        b"caf\xe9/1.png",
        b"caf\xe9/\xff.png",
        b"caf\xe9/README\xff",
        b"b/\xff" + b"x" * 200 + b".png",
    ):
        os.makedirs(os.path.join(root, os.path.dirname(name)), exist_ok=True)
        with open(os.path.join(root, name), "wb") as file:
            file.write(encode(PIXELS[0]))
    done = pack(str(tmp_path / "root"), str(tmp_path / "a.tar"))
    subprocess.run(["tar", "-cf", tmp_path / "b.tar", "-C", root, "b", b"caf\xe9"], check=True)
    ours, theirs = TarSource(done.shards), TarSource(tmp_path / "b.tar")
    assert sorted(ours.name(i) for i in range(3)) == sorted(theirs.name(i) for i in range(3))
    assert ours.count_classes() == theirs.count_classes() == {"b": 1, "caf\\xe9": 2}
    again = pack(str(tmp_path / "b.tar"), str(tmp_path / "c.tar"))
    assert TarSource(again.shards).count_classes() == ours.count_classes()
    assert digest(pack(str(tmp_path / "root"), str(tmp_path / "d.tar"), size=(4, 4)).shards)


def test_overwriting_leaves_no_further_shards(folder, tmp_path):
    out = str(tmp_path / "a-%03d.tar")
    before = pack(str(folder), out, shard_images=5).shards
    assert len(before) == 5
    TarSource(before)
    kept = {"a-4.tar", "a-0004.tar", "a-004.tar.gz", "a-00x.tar", "b-004.tar", "photos"}
    for name in kept - {"photos"}:
        (tmp_path / name).write_bytes(b"another's")
    with pytest.raises(DataError, match="is there already"):
        pack(str(folder), out, shard_images=10)
    assert len(list(tmp_path.glob("a-???.tar.jdlidx"))) == 5
    done = pack(str(folder), out, shard_images=10, overwrite=True)
    there = {p.name for p in tmp_path.iterdir()} - kept
    now = {os.path.basename(shard) for shard in done.shards}
    assert there == now | {f"{name}.jdlidx" for name in now}
    assert len(TarSource(tmp_path / "a-00[0-9].tar")) == 23


def test_a_folder_of_tars(folder, tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    pack(str(folder), str(root / "a-%01d.tar"), shard_images=12)
    TarSource(root)
    for name in ("a-0.tar.sha256", "a-0.tar.123.tmp", "b.tar.jdlseek", "c.tar.txt"):
        (root / name).write_bytes(b"no tar")
    assert pack(str(root), str(tmp_path / "x.tar")).members == 23
    for tar in root.glob("a-?.tar"):
        tar.with_suffix(".tgz").write_bytes(gzip.compress(tar.read_bytes()))
        tar.unlink()
    assert pack(str(root), str(tmp_path / "y.tar")).members == 23
    (folder / "notes.tar.sha256").write_text("no tar")
    assert pack(str(folder), str(tmp_path / "z.tar")).members == 23
    (folder / "a.tar").write_bytes((tmp_path / "x.tar").read_bytes())
    with pytest.raises(DataError, match="holds both tars and images"):
        pack(str(folder), str(tmp_path / "w.tar"))


def test_sidecars_stay_with_their_images(tmp_path):
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for name, data in [("a.png", encode(PIXELS[0])), ("a.cls", b"7"), ("b.exe", b"no")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pack(str(tmp_path / "w.tar"), str(tmp_path / "x.tar"))
    assert [name for name, _ in members(tmp_path / "x.tar")] == ["a.png", "a.cls"]
    assert TarSource(tmp_path / "x.tar", label="cls").classes == ("7",)


def webdataset(path, samples, image):
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            for ending, data in [("cls", b"%d" % i), ("png", image), ("json", b"{}")]:
                info = tarfile.TarInfo(f"a/{i:02d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_samples_stay_in_one_shard(tmp_path):
    path = webdataset(tmp_path / "w.tar", 7, encode(PIXELS[0]))
    done = pack(path, str(tmp_path / "x-%02d.tar"), shard_images=3)
    assert [len(members(shard)) for shard in done.shards] == [9, 9, 3]
    assert done.members == 21
    done = pack(path, str(tmp_path / "y-%02d.tar"), shard_bytes=5 * 1024 + 512)
    assert [len(members(shard)) for shard in done.shards] == [3] * 7
    assert TarSource(done.shards, label="cls").classes == tuple("0123456")
    names = tmp_path / "names"
    names.mkdir()
    for i in range(5):
        (names / f"one.{i}.png").write_bytes(encode(PIXELS[i]))
    done = pack(str(names), str(tmp_path / "z-%02d.tar"), shard_images=2)
    assert [len(members(shard)) for shard in done.shards] == [2, 2, 1]


def test_a_source_without_usable_images(tmp_path):
    path = webdataset(tmp_path / "w.tar", 2, b"junk")
    with pytest.raises(DataError, match=r"no image is left, 2 left out.*a/00\.png"):
        pack(path, str(tmp_path / "x.tar"), size=(4, 4), on_error="skip")
    assert [p.name for p in tmp_path.iterdir()] == ["w.tar"]


def test_resizing(folder, tmp_path):
    photo = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (folder / "train/0/photo.jpeg").write_bytes(encode(photo, "JPEG"))
    (folder / "train/0/bad.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"bad\.png"):
        pack(str(folder), str(tmp_path / "a.tar"), size=(8, 6))
    done = pack(str(folder), str(tmp_path / "a.tar"), size=(8, 6), on_error="skip")
    assert [name for name, _ in done.skipped] == ["'train/0/bad.png'"]
    found = dict(members(done.shards[0]))
    assert len(found) == 24
    assert {pixels(data).shape for data in found.values()} == {(8, 6), (8, 6, 3)}
    assert found["train/0/photo.jpg"][:3] == b"\xff\xd8\xff"
    expected = Image.fromarray(PIXELS[0]).resize((6, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels(found["train/0/00.png"]), np.asarray(expected))


def test_mistakes(folder, tmp_path):
    for out, words in [("a.zip", r"\.tar"), ("%05d-%05d.tar", "one %05d"), ("a%s.tar", "%05d")]:
        with pytest.raises(ArgumentError, match=words):
            pack(str(folder), str(tmp_path / out))
    with pytest.raises(ArgumentError, match="more than one shard"):
        pack(str(folder), str(tmp_path / "a.tar"), shard_images=5)
    pack(str(folder), str(tmp_path / "a.tar"))
    with pytest.raises(DataError, match="is there already"):
        pack(str(folder), str(tmp_path / "a.tar"))
    pack(str(folder), str(tmp_path / "a.tar"), overwrite=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        pack(str(tmp_path / "empty"), str(tmp_path / "b.tar"))
    with pytest.raises(DataError, match="no archive"):
        pack(str(tmp_path / "nowhere"), str(tmp_path / "b.tar"))


@pytest.mark.parametrize("name", ["a.png", "d" * 90 + "/" + "n" * 90 + ".png", "ü" * 200 + ".png"])
def test_headers_are_tars(name):
    data = header(name, 3) + b"abc" + bytes(509) + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        (info,) = tar.getmembers()
        assert (info.name, info.size, info.mtime, info.uid, info.mode) == (name, 3, 0, 0, 0o644)


# ---------------------------------------------------------------------- standard input


@pytest.fixture
def pipe(monkeypatch):
    opened = []

    def feed(data):
        reading, writing = os.pipe()

        def write():
            with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as file:
                file.write(data)

        threading.Thread(target=write, daemon=True).start()
        opened.append(io.TextIOWrapper(os.fdopen(reading, "rb")))
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield feed
    for file in opened:
        file.close()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_standard_input(folder, tmp_path, pipe, compress):
    path = pack(str(folder), str(tmp_path / "a.tar")).shards[0]
    with open(path, "rb") as file:
        whole = file.read()
    expected = TarSource(path)
    options = {"size": (9, 7), "batch_size": 5, "grayscale": True, "classes": expected.classes}
    pipe(compress(whole))
    iterator = iter(standard_input(**options))
    batches = [next(iterator), next(iterator)]
    state = iterator.get_state()
    batches += list(iterator)
    assert [int(b["mask"].sum()) for b in batches] == [5, 5, 5, 5, 3]
    rows = [row for b in batches for row in b["image"][b["mask"] > 0][..., 0]]
    for i in range(23):
        np.testing.assert_array_equal(rows[i], pixels(expected[i].data))
    labels = np.concatenate([b["label"] for b in batches])[:23]
    np.testing.assert_array_equal(labels, expected.labels(np.arange(23)))
    iterator.close()
    pipe(compress(whole))
    resumed = iter(standard_input(**options))
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["image"], batches[2]["image"])
    resumed.close()
    pipe(compress(whole)[:-2000] if compress is gzip.compress else whole[:-3000])
    with pytest.raises(DataError, match="Standard input is damaged: truncated"):
        list(standard_input(**options))
    damaged = bytearray(whole)
    damaged[3 * 1024 + 7] ^= 1
    pipe(compress(bytes(damaged)))
    batches = list(standard_input(on_error="skip", **options))
    assert sum(int(batch["mask"].sum()) for batch in batches) == 22
    pipe(whole)
    done = pack("-", str(tmp_path / "b.tar"))
    assert digest(done.shards) == digest([path])


def test_a_split_of_standard_input(folder, tmp_path, pipe):
    path = pack(str(folder), str(tmp_path / "a.tar")).shards[0]
    whole = Path(path).read_bytes()
    options = {"size": (9, 7), "batch_size": 4, "grayscale": True, "classes": tuple("0123")}
    for split in ("train", "train:0.3", Holdout("test", 0.3)):
        pipe(whole)
        data = standard_input(split=split, **options)
        found = [row for b in data for row in b["image"][b["mask"] > 0][..., 0]]
        source = TarSource(path, split=split)
        assert len(found) == len(source)
        for i, row in enumerate(found):
            np.testing.assert_array_equal(row, pixels(source[i].data))
    pipe(whole)
    with pytest.raises(DataError, match=r"no images of the split 'val' among its 23.*'train/0'"):
        list(standard_input(split="val", **options))
    pipe(bytes(1024))
    with pytest.raises(DataError, match="Standard input holds no images"):
        list(standard_input(**options))
    pipe(whole[:100])
    with pytest.raises(DataError, match="is damaged"):
        list(standard_input(**options))


def test_standard_input_mistakes(tmp_path, pipe):
    with pytest.raises(ArgumentError, match="classes"):
        standard_input(size=(4, 4), batch_size=2)
    data = standard_input(size=(4, 4), batch_size=2, label=None)
    with pytest.raises(DataError, match="comes once"):
        data.repeat()
    with pytest.raises(DataError, match="is not known"):
        len(str(data.num_records))


def test_shards_that_would_replace_their_source_are_refused(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    pack(str(tmp_path), str(tmp_path / "s" / "x-%05d.tar"))
    before = (tmp_path / "s" / "x-00000.tar").read_bytes()
    for source in ("s", "s/x-00000.tar", "s/x-*.tar"):
        with pytest.raises(ArgumentError, match="apart from the tars that are packed"):
            pack(str(tmp_path / source), str(tmp_path / "s" / "x-%05d.tar"), overwrite=True)
    assert (tmp_path / "s" / "x-00000.tar").read_bytes() == before
