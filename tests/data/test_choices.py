"""Options: selection, mixtures, labels, augmentation, hosts and worker processes."""

import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from jdl.core.check import ArgumentError, DataError, UserError
from jdl.data import Holdout, TarSource, decode, from_tar
from jdl.data.images import CENTER, Crop
from jdl.data.plan import Plan
from jdl.data.tar import index as tar_index
from jdl.data.tar import scan as tar_scan
from jdl.data.tar.selection import Selection

PHOTO = Image.fromarray(load_sample_images().images[0])  # 427 × 640


def encode(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(value, size=(6, 5)):
    return encode(Image.new("L", size[::-1], value))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def people(tmp_path, n=40):
    members = [(f"test/person{i % n}/{i}.png", png(i % 256)) for i in range(5 * n)]
    return write_tar(tmp_path / "faces.tar", members)


# ---------------------------------------------------------------------- rows


@given(st.lists(st.booleans(), max_size=3000), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_selection_finds_its_rows(wanted, random):
    wanted = np.array(wanted, bool)
    chosen = Selection(wanted)
    expected = np.flatnonzero(wanted)
    assert len(chosen) == len(expected)
    np.testing.assert_array_equal(chosen.all(), expected)
    numbers = np.array(random.sample(range(len(expected)), len(expected) // 2), np.int64)
    np.testing.assert_array_equal(chosen.rows(numbers), expected[numbers])


# ---------------------------------------------------------------------- labels and splits


def test_webdataset_layout(tmp_path):
    members = []
    for i in range(6):
        members.append((f"a/{i:03d}.jpg", encode(PHOTO.resize((8, 8)), "JPEG")))
        members.append((f"a/{i:03d}.cls", f"{i % 3}\n".encode()))
        members.append((f"a/{i:03d}.json", json.dumps({"label": i, "who": f"p{i % 2}"}).encode()))
    path = write_tar(tmp_path / "a.tar", members)
    for label, classes, expected in [
        ("cls", ("0", "1", "2"), [0, 1, 2, 0, 1, 2]),
        ("json", tuple("012345"), [0, 1, 2, 3, 4, 5]),
        ("json:who", ("p0", "p1"), [0, 1] * 3),
    ]:
        source = TarSource(path, label=label)
        assert source.classes == classes
        assert source.labels(np.arange(6)).tolist() == expected
    with pytest.raises(DataError, match=r"a/000\.json' names no class: KeyError\('age'\)"):
        TarSource(path, label="json:age")
    with pytest.raises(ArgumentError, match="`label`"):
        TarSource(path, label="npy")
    members[1] = ("a/000.cls", b"\xff\xfe")
    path = write_tar(tmp_path / "b.tar", members)
    with pytest.raises(DataError, match="names no class"):
        TarSource(path, label="cls")
    path = write_tar(tmp_path / "c.tar", [m for m in members if m[0] != "a/000.cls"])
    with pytest.raises(DataError, match=r"'a/000\.jpg' has no label"):
        from_tar(path, label="cls", batch_size=2)


def test_no_person_is_on_both_sides(tmp_path):
    path = people(tmp_path)
    sides = {}
    for part in ("train", "test"):
        for split in (f"{part}:0.3:1", Holdout(part, 0.3, re.compile(r"(person\d+)"))):
            source = TarSource(path, label=1, split=split, classes=TarSource(path, label=1).classes)
            names = {source.name(i) for i in range(len(source))}
            # The expression and the path component name the same groups.
            assert sides.setdefault(part, names) == names
    assert not sides["train"] & sides["test"]
    assert len(sides["train"] | sides["test"]) == 200
    who = {part: {name.split("/")[1] for name in names} for part, names in sides.items()}
    assert not who["train"] & who["test"]
    assert 5 <= len(who["test"]) <= 20


def test_a_split_by_name_does_not_change_with_other_records(tmp_path):
    path = people(tmp_path)
    test = TarSource(path, split="test:0.25")
    train = TarSource(path, split="train:0.25")
    names = [{s.name(i) for i in range(len(s))} for s in (test, train)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 200
    assert 30 <= len(test) <= 70
    more = write_tar(
        tmp_path / "more.tar",
        [(f"test/person{i % 40}/{i}.png", png(0)) for i in range(300)],
    )
    again = TarSource(more, split="test:0.25")
    assert names[0] <= {again.name(i) for i in range(len(again))}
    for split, words in [
        ("train:2", "share"),
        ("test:0.1:x", "split"),
        (Holdout("tset", 0.1), "Did you mean 'test'"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            TarSource(path, split=split)


# ---------------------------------------------------------------------- mixtures


def test_mixing_archives(tmp_path):
    a = write_tar(tmp_path / "a.tar", [(f"a/{i}.png", png(0)) for i in range(10)])
    b = [
        write_tar(tmp_path / f"b-{k}.tar", [(f"b/{i}.png", png(1)) for i in range(200)])
        for k in "01"
    ]
    options = {"batch_size": 100, "epochs": None, "seed": 1}
    data = from_tar([a, str(tmp_path / "b-*.tar")], weights=[1, 3], **options)
    iterator = iter(data)
    labels = np.concatenate([next(iterator)["label"] for _ in range(20)])
    assert np.mean(labels) == pytest.approx(0.75, abs=0.01)
    state = iterator.get_state()
    expected = next(iterator)
    iterator.close()
    resumed = iter(from_tar([a, str(tmp_path / "b-*.tar")], weights=[1, 3], **options))
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["label"], expected["label"])
    resumed.close()
    other = iter(from_tar([a, *b], weights=[1, 1, 1], **options))
    with pytest.raises(DataError, match="'order'"):
        other.set_state(state)
    assert sum(int(batch["mask"].sum()) for batch in data.once()) == 410
    for weights in ([1], [1, -1], [1, float("nan")]):
        with pytest.raises(ArgumentError, match="weights"):
            from_tar([a, str(tmp_path / "b-*.tar")], weights=weights, **options)
    with pytest.raises(ArgumentError, match="shuffle"):
        from_tar([a, b[0]], weights=[1, 1], batch_size=2, shuffle=False)
    other = write_tar(tmp_path / "other.tar", [("elsewhere/1/1.png", png(1))])
    with pytest.raises(DataError, match=r"other\.tar.* no images of the split"):
        from_tar([a, other], split="a", weights=[1, 1], batch_size=2)
    with pytest.raises(ArgumentError, match="workers"):
        from_tar(a, window=4, workers=1, **options)


# ---------------------------------------------------------------------- hosts


@given(
    n=st.integers(1, 60),
    rows=st.integers(1, 8),
    parts=st.integers(1, 4),
    drop=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_hosts_have_equal_batches_and_no_record_twice(n, rows, parts, drop):
    batch = rows * parts
    if drop and batch > n:
        return
    plan = Plan.checked(n, batch, 1, drop)
    seen = []
    for number in range(plan.count(0, 0)):
        for part in range(parts):
            mine = plan.sharded(part, parts)
            assert mine.rows == rows
            assert mine.steps_per_epoch == plan.steps_per_epoch
            _, start, stop = mine.mine(plan.span(0, 0, number))
            assert 0 <= stop - start <= rows
            seen += range(start, stop)
    assert seen == list(range(n - n % batch if drop else n))


def test_resuming_with_another_number_of_hosts(tmp_path):
    path = people(tmp_path)
    options = {"epochs": 2, "shuffle": True, "batch_size": 12, "label": None, "grayscale": True}
    whole = [b["image"][:, 0, 0, 0] for b in from_tar(path, **options)]

    def run(parts, state, n):
        iterators = [iter(from_tar(path, shard=(p, parts), **options)) for p in range(parts)]
        for iterator in iterators:
            if state is not None:
                iterator.set_state(state)
        batches = [
            np.concatenate([next(iterator)["image"][:, 0, 0, 0] for iterator in iterators])
            for _ in range(n)
        ]
        states = [iterator.get_state() for iterator in iterators]
        assert all(state == states[0] for state in states)
        for iterator in iterators:
            iterator.close()
        return batches, states[0]

    first, state = run(2, None, 5)
    second, state = run(3, state, 9)
    third, _ = run(1, state, len(whole) - 14)
    for found, expected in zip(first + second + third, whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    sharded = from_tar(path, **options).shard(1, 4)
    assert sharded.element_spec["image"].shape == (3, 6, 5, 1)
    for shard, words in [((0, 5), "multiple of the 5"), ((2, 2), "part")]:
        with pytest.raises(ArgumentError, match=words):
            from_tar(path, shard=shard, **options)


# ---------------------------------------------------------------------- workers


def test_spawned_workers_give_the_same(tmp_path, monkeypatch):
    path = people(tmp_path)
    options = {"epochs": 2, "shuffle": True, "batch_size": 16, "label": 1, "flip": True}
    reference = list(from_tar(path, threads=0, **options))
    iterator = iter(from_tar(path, workers=2, **options))
    found = [next(iterator) for _ in range(4)]
    methods = {type(p).__name__ for p in multiprocessing.active_children()}
    assert methods == {"SpawnProcess"}
    state = iterator.get_state()
    iterator.close()
    resumed = iter(from_tar(path, workers=1, **options))
    resumed.set_state(state)
    found += list(resumed)
    resumed.close()
    assert len(found) == len(reference)
    for a, b in zip(found, reference, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_workers_exception_arrives_once_with_the_members_name(tmp_path):
    members = [(f"c/{i:02d}.png", png(i) if i != 4 else b"junk") for i in range(12)]
    path = write_tar(tmp_path / "a.tar", members)
    iterator = iter(from_tar(path, batch_size=3, workers=1))
    assert next(iterator)["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"Corrupt image: .*'c/04\.png'"):
        next(iterator)
    assert next(iterator)["image"][:, 0, 0, 0].tolist() == [6, 7, 8]
    iterator.close()


@pytest.mark.release
def test_ten_million_members_in_a_worker(tmp_path):
    """The memory of a worker that maps an index of ten million members."""
    n, folders = 10_000_000, 100_000
    path = tmp_path / "huge.tar"
    with open(path, "wb") as file:
        file.truncate(n * 1024 + 1024)  # holes
    names = b"".join(b"%07d.jpg" % i for i in range(n))
    folder_names = [b"train/p%06d" % i for i in range(folders)]
    columns = tar_scan.Columns(
        offsets=np.arange(n, dtype=np.int64) * 1024 + 512,
        sizes=np.full(n, 100, np.int64),
        kinds=np.full(n, tar_scan.IMAGE, np.uint8),
        folder_ids=(np.arange(n) % folders).astype(np.int32),
        base_ends=np.arange(1, n + 1, dtype=np.int64) * 11,
        bases=np.frombuffer(names, np.uint8),
        folder_ends=np.cumsum([len(f) for f in folder_names]),
        folders=np.frombuffer(b"".join(folder_names), np.uint8),
    )
    from jdl.data.tar.open import open_archive

    archive = open_archive(str(path))
    index = tar_index.TarIndex(str(path), columns, (), archive.stamp(), archive.size)
    tar_index.save(index, str(path) + tar_index.SUFFIX)
    for split in (None, "train:0.5:folder"):
        code = f"""
import pickle, sys, numpy as np
from jdl.data import TarSource
source = TarSource({str(path)!r}, split={split!r})
open({str(tmp_path / "source")!r}, "wb").write(pickle.dumps(source))
"""
        if split is None:
            subprocess.run([sys.executable, "-c", code], check=True)
        else:  # half of the rows, in bits
            source = TarSource([tar_index.open_index(str(path))])
            source._rows = [Selection(np.arange(n) % 3 > 0)]
            source._ends = np.cumsum([len(rows) for rows in source._rows])
            import pickle

            (tmp_path / "source").write_bytes(pickle.dumps(source))
        worker = f"""
import pickle, numpy as np, jdl.data.tar.source, jdl.data.pipeline
def unshared():
    with open("/proc/self/smaps_rollup") as file:
        lines = dict(line.split(":") for line in file if ":" in line and "rollup" not in line)
    return sum(int(lines[k].split()[0]) for k in ("Private_Clean", "Private_Dirty")) * 1024
before = unshared()
source = pickle.load(open({str(tmp_path / "source")!r}, "rb"))
rng = np.random.default_rng(0)
for _ in range(200):
    for data in source.read_many(rng.integers(len(source), size=64)):
        assert len(data) == 100
    source.labels(rng.integers(len(source), size=64))
private = unshared()
print(private - before)
"""
        # The pages of a mapped file count as private while one process alone maps it.
        holder = np.memmap(str(path) + tar_index.SUFFIX, np.uint8, "r")
        assert int(holder[::4096].sum()) >= 0
        done = subprocess.run(
            [sys.executable, "-c", worker], capture_output=True, text=True, check=True
        )
        grown = int(done.stdout)
        print(
            f"split {split}: {grown / 2**20:.1f} MiB unshared; pickled "
            f"{os.path.getsize(tmp_path / 'source') / 2**20:.1f} MiB"
        )
        assert grown <= 50e6


# ---------------------------------------------------------------------- crops and chance


def reference_crop(image, box, size):
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box=box))


def deviation(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize("size", [(64, 64), (50, 120)])
@pytest.mark.parametrize("crop", [CENTER, Crop(0.6, 0.1, 0.9)])
def test_crops_are_those_of_pillow(size, crop):
    top, left, high, wide = crop.box(427, 640, size)
    assert wide / high == pytest.approx(size[1] / size[0])
    expected = reference_crop(PHOTO, (left, top, left + wide, top + high), size)
    png_data, jpeg = encode(PHOTO), encode(PHOTO, "JPEG", quality=95)
    assert deviation(decode(png_data, size=size, crop=crop), expected) == 0
    assert deviation(decode(jpeg, size=size, crop=crop, exact=True), expected) < 2
    assert deviation(decode(jpeg, size=size, crop=crop), expected) < 6
    turned = Image.Exif()
    turned[0x0112] = 6
    sideways = encode(PHOTO.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned)
    assert deviation(decode(sideways, size=size, crop=crop), expected) < 6


def test_augmentation_is_a_function_of_seed_epoch_and_record(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 24, 20), dtype=np.uint8)
    path = write_tar(
        tmp_path / "a.tar",
        [(f"c/{i:02d}.png", encode(Image.fromarray(x))) for i, x in enumerate(images)],
    )

    def noise(pixels, rng):
        return np.where(rng.random(pixels.shape) < 0.1, 0, pixels).astype(np.uint8)

    def epochs(shuffle, threads, **options):
        data = from_tar(
            path,
            size=(16, 16),
            grayscale=True,
            label=lambda name: name[2:4],
            batch_size=7,
            epochs=2,
            shuffle=shuffle,
            threads=threads,
            **{"crop": "random", "flip": True, "augment": noise, **options},
        )
        found = [{}, {}]
        for number, batch in enumerate(data):
            for image, label, counts in zip(*batch.values(), strict=True):
                if counts:
                    found[number // data.steps_per_epoch][int(label)] = image
        return found

    one, two = epochs(True, 0), epochs(False, 3)
    for a, b in zip(one, two, strict=True):
        assert sorted(a) == sorted(b) == list(range(30))
        for record in a:
            np.testing.assert_array_equal(a[record], b[record])
    assert sum(np.array_equal(one[0][i], one[1][i]) for i in range(30)) == 0
    other = epochs(True, 0, seed=1)
    assert sum(np.array_equal(one[0][i], other[0][i]) for i in range(30)) == 0
    plain = epochs(False, 0, crop="center", flip=False, augment=None)
    mirrored = epochs(False, 0, crop="center", augment=None)
    turned = [np.array_equal(mirrored[0][i], plain[0][i][:, ::-1]) for i in range(30)]
    same = [np.array_equal(mirrored[0][i], plain[0][i]) for i in range(30)]
    assert all(a or b for a, b in zip(turned, same, strict=True))
    assert 5 < sum(turned) < 25


def test_normalization(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"c/{i}.png", png(i * 50)) for i in range(5)])
    options = {"batch_size": 5, "dtype": "float32"}
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    (batch,) = from_tar(path, normalize=(mean, std), **options)
    expected = (np.arange(5)[:, None] * 50 / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(batch["image"][:, 0, 0], expected, rtol=1e-5, atol=1e-6)
    (padded,) = from_tar(path, normalize=(0.5, 0.5), **{**options, "batch_size": 8})
    assert np.all(padded["image"][5:] == 0)
    for wrong in ((0.5, 0.0), (0.5, -1.0), ((1, 2), (1, 2))):
        with pytest.raises(ArgumentError, match="normalize"):
            from_tar(path, normalize=wrong, **options)
    with pytest.raises(ArgumentError, match="dtype"):
        from_tar(path, normalize=(0.5, 0.5), batch_size=5)
    with pytest.raises(ArgumentError, match="size"):
        from_tar(path, crop="center", batch_size=5)
    with pytest.raises(ArgumentError, match="Did you mean 'random'"):
        from_tar(path, crop="randm", size=(4, 4), batch_size=5)
    with pytest.raises(UserError, match="`augment`"):
        list(from_tar(path, augment=lambda pixels, rng: pixels[:1], batch_size=5))


def test_an_archive_replaced_by_another(tmp_path):
    path = people(tmp_path)
    data = iter(from_tar(path, batch_size=5, epochs=None, threads=0, cache_bytes=0))
    next(data)
    other = write_tar(tmp_path / "other.tar", [("c/0.png", png(0))] * 300)
    os.replace(other, path)
    with pytest.raises(DataError, match="has changed since it was indexed"):
        next(data)
    os.unlink(path)
    with pytest.raises(DataError, match="is gone"):
        next(data)


def test_flat_iteration_is_finite(tmp_path):
    assert len(list(itertools.islice(from_tar(people(tmp_path), batch_size=50), 10))) == 4
