"""Batches from tars and arrays: their contents, their order, and resuming at a position."""

import bz2
import contextlib
import gc
import gzip
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jdl.core.check import ArgumentError, DataError, UserError
from jdl.data import (
    Dataset,
    TarSource,
    digits,
    digits_path,
    from_arrays,
    from_tar,
    resolve,
    splits,
)
from jdl.data.loading import Workers
from jdl.data.plan import Plan
from jdl.data.stdin import standard_input
from jdl.data.tar import index as tar_index
from jdl.data.tar.paths import braces, expand
from jdl.data.tar.seekable import make_seekable


def png(value, size=(6, 5)):
    out = io.BytesIO()
    Image.new("L", size[::-1], value).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def tar(tmp_path):
    """23 images; image i has the value i everywhere, and the class i mod 3."""
    return write_tar(tmp_path / "a.tar", [(f"{i % 3}/{i:02d}.png", png(i)) for i in range(23)])


@pytest.fixture
def damaged(tmp_path):
    members = [(f"c/{i:02d}.png", png(i) if i % 10 != 4 else b"junk") for i in range(23)]
    return write_tar(tmp_path / "damaged.tar", members)


def values(batches, key="image"):
    """The value of each row that counts, batch by batch."""
    found = []
    for batch in batches:
        rows = np.asarray(batch[key]).reshape(len(batch[key]), -1)[:, 0]
        found.append(rows[batch.get("mask", np.ones(len(rows))) > 0].tolist())
    return found


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


# ---------------------------------------------------------------------- batches


def test_one_pass_in_order(tar):
    data = from_tar(tar, grayscale=True, batch_size=5)
    batches = list(data)
    assert values(batches) == [list(range(i, min(i + 5, 23))) for i in range(0, 23, 5)]
    assert batches[0]["label"].tolist() == [0, 1, 2, 0, 1]
    assert (data.num_records, data.steps_per_epoch, data.epochs) == (23, 5, 1)
    assert data.classes == ("0", "1", "2")
    for batch in batches:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (s.shape, s.dtype) for k, s in data.element_spec.items()
        }
    assert batches[-1]["mask"].tolist() == [1, 1, 1, 0, 0]
    assert list(from_tar(tar, batch_size=5, drop_remainder=True))[-1].keys() == {"image", "label"}


def test_values_sizes_and_types(tar):
    (batch,) = from_tar(tar, batch_size=23, size=(3, 4), dtype="float32")
    assert batch["image"].shape == (23, 3, 4, 3)
    assert batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], np.arange(23) / 255, rtol=1e-6)
    (batch,) = from_tar(tar, batch_size=23, label=None)
    assert batch.keys() == {"image"}
    assert batch["image"].shape == (23, 6, 5, 3)


def test_data_sets_share_one_interface(tar):
    for data in (
        from_tar(tar, batch_size=4, epochs=None),
        from_arrays(np.arange(23), batch_size=4),
        digits("test", batch_size=4),
    ):
        assert isinstance(data, Dataset)
        assert isinstance(data, grain.IterDataset)
        assert data.batch_size == 4
        iterator = iter(data)
        batch = next(iterator)
        assert {k: jnp.asarray(v).shape for k, v in batch.items()} == {
            k: s.shape for k, s in data.element_spec.items()
        }
        json.dumps(iterator.get_state())
        iterator.close()


@pytest.mark.parametrize("kind", ["tar", "arrays"])
@pytest.mark.parametrize("drop", [False, True])
def test_every_epoch_is_a_new_permutation(kind, drop, tar):
    options = {"batch_size": 5, "epochs": 3, "shuffle": True, "drop_remainder": drop}
    if kind == "tar":
        data = from_tar(tar, grayscale=True, **options)
    else:
        data = from_arrays(np.arange(23), np.arange(23), **options)
    found = values(data)
    n = data.steps_per_epoch
    assert n == (4 if drop else 5)
    epochs = [flat(found[i : i + n]) for i in range(0, 3 * n, n)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == (20 if drop else 23)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(len(epochs[0])))
    assert values(data) == found
    other = {**options, "seed": 1}
    other = from_tar(tar, grayscale=True, **other) if kind == "tar" else None
    assert other is None or values(other) != found


def test_threads_do_not_matter(tar):
    options = {"batch_size": 4, "epochs": 4, "shuffle": True, "cache_bytes": 0}
    reference = list(from_tar(tar, threads=0, **options))
    for threads in (1, 2, 5):
        assert_same(list(from_tar(tar, threads=threads, **options)), reference)


@pytest.mark.parametrize("kind", ["tar", "arrays"])
def test_resuming_at_any_position(kind, tar):
    def make(threads=0, **options):
        options = {"batch_size": 5, "epochs": 3, "shuffle": True, **options}
        if kind == "arrays":
            return from_arrays(np.arange(23), np.arange(23), **options)
        return from_tar(tar, threads=threads, **options)

    reference = list(make())
    for done in range(len(reference) + 1):
        iterator = iter(make(threads=done % 3))
        take(iterator, done)
        state = json.loads(json.dumps(iterator.get_state()))
        assert len(json.dumps(state)) < 400
        resumed = iter(make(threads=(done + 1) % 3))
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert_same(list(resumed), reference[done:])
        iterator.set_state({**state, "epoch": 0, "record": 0})
        assert_same(take(iterator, 2), reference[:2])
        iterator.close()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Makes data of three archives by weights; image i of archive k has the value 80 k + i."""
    folder = tmp_path_factory.mktemp("mixed")
    paths = [
        write_tar(folder / f"{k}.tar", [(f"{k}/{i}.png", png(80 * k + i)) for i in range(n)])
        for k, n in enumerate((7, 80, 13))
    ]

    def make(**options):
        options = {"batch_size": 12, "epochs": None, "seed": 5, "grayscale": True, **options}
        return from_tar(paths, weights=[3, 1, 0.2], cache_bytes=0, **options)

    return make


def whole(parts):
    """The values in each batch, of which each host has a part."""
    parts = [[batch["image"][:, 0, 0, 0] for batch in part] for part in parts]
    return [np.concatenate(each).tolist() for each in zip(*parts, strict=True)]


@given(
    st.lists(
        st.tuples(st.integers(0, 15), st.integers(0, 2), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=6, deadline=None)
def test_a_mixture_resumes_with_any_number_of_threads_and_hosts(mixed, runs):
    iterator = iter(mixed(threads=0))
    expected = whole([take(iterator, sum(steps for steps, _, _ in runs))])
    found, state = [], None
    for steps, threads, hosts in runs:
        iterators = [iter(mixed(threads=threads, shard=(p, hosts))) for p in range(hosts)]
        for each in iterators:
            if state is not None:
                each.set_state(json.loads(json.dumps(state)))
        found += whole([take(each, steps) for each in iterators])
        states = [each.get_state() for each in iterators]
        assert all(each == states[0] for each in states)
        state = states[0]
        for each in iterators:
            each.close()
    assert found == expected


@pytest.mark.slow
def test_a_mixture_resumes_in_worker_processes(mixed):
    iterator = iter(mixed(threads=0))
    expected = whole([take(iterator, 40)])
    assert len({tuple(batch) for batch in expected}) == 40
    before = iter(mixed(threads=2))
    found = whole([take(before, 9)])
    state = before.get_state()
    before.close()
    for steps, workers in ((20, 2), (11, 1)):
        resumed = iter(mixed(workers=workers))
        resumed.set_state(state)
        found += whole([take(resumed, steps)])
        state = resumed.get_state()
        resumed.close()
    assert found == expected


def test_resuming_with_another_batch_size(tar):
    iterator = iter(from_tar(tar, grayscale=True, batch_size=5, epochs=2, shuffle=True))
    before = flat(values(take(iterator, 2)))
    state = iterator.get_state()
    iterator.close()
    for drop, expected in ((False, 23), (True, 22)):
        data = from_tar(
            tar, grayscale=True, batch_size=4, epochs=2, shuffle=True, drop_remainder=drop
        )
        resumed = iter(data)
        resumed.set_state(state)
        after = values(resumed)
        first = before + flat(after[: len(after) - data.steps_per_epoch])
        assert len(first) == len(set(first)) == expected
        assert len(flat(after)) == expected - 10 + (20 if drop else 23)


def test_a_position_in_other_data_is_refused(tar, tmp_path):
    state = iter(from_tar(tar, batch_size=5, epochs=None, threads=0)).get_state()
    other = write_tar(tmp_path / "b.tar", [(f"{i % 3}/{i}.png", png(i + 1)) for i in range(23)])
    for field, data in (
        ("data", from_tar(other, batch_size=5, epochs=None)),
        ("seed", from_tar(tar, batch_size=5, epochs=None, seed=1)),
        ("shuffle", from_tar(tar, batch_size=5)),
    ):
        with pytest.raises(DataError, match=field):
            iter(data).set_state(state)
    data = from_tar(tar, batch_size=5, epochs=None)
    for wrong in ({**state, "record": -1}, {**state, "epoch": None}, {**state, "record": 99}):
        with pytest.raises(DataError, match="position in the data"):
            iter(data).set_state(wrong)
    for wrong in (None, 3, [state], "a"):
        with pytest.raises(DataError, match="This is no position in the data"):
            iter(data).set_state(wrong)
    for wrong in ({}, {**state, "version": 1}):
        with pytest.raises(DataError, match="its 'version' is"):
            iter(data).set_state(wrong)


def test_a_position_among_other_images_of_the_archives_is_refused(tmp_path):
    """Even as many of them: of another split, or with the archives in another order."""
    members = [(f"{s}/{i}.png", png(i)) for s in ("train", "test") for i in range(6)]
    a = write_tar(tmp_path / "a.tar", members)
    b = write_tar(tmp_path / "b.tar", [(name, png(7)) for name, _ in members])
    options = {"batch_size": 2, "label": None}
    state = iter(from_tar([a, b], split="train", **options)).get_state()
    for paths, split in (([a, b], "test"), ([b, a], "train"), ([a, b], "train:0.5")):
        data = from_tar(paths, split=split, **options)
        assert data.num_records == 12
        with pytest.raises(
            DataError, match=r"other data: its 'data' .*chosen from them by `split`"
        ):
            iter(data).set_state(state)
    # The same images with other labels, moved, are the same data.
    (tmp_path / "elsewhere").mkdir()
    moved = [Path(path).rename(tmp_path / "elsewhere" / Path(path).name) for path in (a, b)]
    iter(from_tar(moved, split="train", batch_size=3, label=0)).set_state(state)


@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 50),
    epochs=st.integers(1, 3),
    drop=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_plans_cover_each_epoch_once(n, batch, epochs, drop):
    if drop and batch > n:
        return
    plan = Plan.checked(n, batch, epochs, drop)
    spans = [plan.span(0, 0, i) for i in range(plan.count(0, 0))]
    assert len(spans) == epochs * plan.steps_per_epoch
    for e in range(epochs):
        places = [p for span in spans if span.epoch == e for p in range(span.start, span.stop)]
        assert places == list(range(n - n % batch if drop else n))
    for i, span in enumerate(spans):
        assert plan.span(span.epoch, span.start, 0) == span
        assert plan.count(span.epoch, span.start) == len(spans) - i


def test_an_endless_stream_drops_its_remainder_if_it_can(tar):
    data = from_tar(tar, batch_size=5, epochs=None)
    assert data.steps_per_epoch == 4
    assert next(iter(data)).keys() == {"image", "label"}
    large = iter(from_tar(tar, batch_size=30, epochs=None))
    assert [b["mask"].sum() for b in take(large, 3)] == [23] * 3
    large.close()


def test_a_few_images_are_kept_decoded(tar):
    data = from_tar(tar, batch_size=5, epochs=4, shuffle=True)
    assert_same(
        list(data), list(from_tar(tar, batch_size=5, epochs=4, shuffle=True, cache_bytes=0))
    )


def test_first_batch_is_made_ahead_of_being_asked_for(tar):
    iterator = iter(from_tar(tar, batch_size=5, threads=1))
    iterator.start_prefetch()
    assert values([next(iterator)]) == [[0, 1, 2, 3, 4]]
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_every_thread_may_hold_a_batch_however_large(tar):
    """Else some would stand still: 16 threads on batches of 38 MB."""
    options = {"size": (224, 224), "batch_size": 256, "epochs": None, "cache_bytes": 0}
    assert from_tar(tar, threads=16, **options).ahead == 16
    assert from_tar(tar, threads=2, **options).ahead == 4


def test_threads_end_with_their_iterator(tar):
    iterator = iter(from_tar(tar, batch_size=5, epochs=None, threads=2))
    next(iterator)
    ours = [t for t in threading.enumerate() if "jdl" in t.name]
    assert ours
    iterator.close()
    del iterator
    gc.collect()
    for thread in ours:
        thread.join(5)
        assert not thread.is_alive()


# ---------------------------------------------------------------------- bad data


@pytest.mark.parametrize("threads", [0, 2])
def test_a_corrupt_image_is_named_once(damaged, threads):
    iterator = iter(from_tar(damaged, size=(6, 5), batch_size=5, threads=threads))
    with pytest.raises(DataError, match=r"damaged\.tar.*'c/04\.png'.*on_error=\"skip\""):
        next(iterator)
    assert next(iterator)["image"][:, 0, 0, 0].tolist() == [5, 6, 7, 8, 9]
    iterator.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_corrupt_images_are_skipped_counted_and_named(damaged, threads, caplog):
    data = from_tar(
        damaged, batch_size=5, epochs=2, on_error="skip", grayscale=True, threads=threads
    )
    with caplog.at_level(logging.WARNING, "jdl.data"):
        iterator = iter(data)
        batches = list(iterator)
    assert batches[0]["mask"].tolist() == [1, 1, 1, 1, 0]
    assert flat(values(batches)) == [i for i in range(23) if i % 10 != 4] * 2
    assert (data.skipped, iterator.skipped) == (2, 4)
    assert len(data.skipped_records) == 2
    assert all(name in " ".join(data.skipped_records) for name in ("c/04.png", "c/14.png"))
    assert [record.args[0].split()[-1] for record in caplog.records] == ["'c/04.png'", "'c/14.png'"]


def test_resuming_after_skipped_records(damaged):
    def make():
        return from_tar(damaged, batch_size=5, epochs=2, on_error="skip", shuffle=True)

    reference = iter(make())
    expected = list(reference)
    for done in range(len(expected)):
        iterator = iter(make())
        take(iterator, done)
        resumed = iter(make())
        resumed.set_state(iterator.get_state())
        iterator.close()
        assert_same(list(resumed), expected[done:])
        assert resumed.get_state() == reference.get_state()


def test_too_much_skipping_is_an_error(damaged):
    data = from_tar(damaged, batch_size=5, on_error="skip", max_skipped=0.05)
    with pytest.raises(DataError, match=r"2 of 23 records cannot be read.*'c/14\.png'"):
        list(data)


def test_one_of_few_may_be_skipped_but_none_with_a_share_of_zero(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("c/0.png", png(0)), ("c/1.png", b"junk")])
    options = {"batch_size": 2, "size": (6, 5), "on_error": "skip"}
    assert len(list(from_tar(path, max_skipped=0.01, **options))) == 1
    with pytest.raises(DataError, match=r"1 of 2 records cannot be read.*'c/1\.png'"):
        list(from_tar(path, max_skipped=0.0, **options))
    with pytest.raises(ArgumentError, match="max_skipped"):
        standard_input(batch_size=2, size=(6, 5), label=None, max_skipped=float("nan"))


def test_a_damaged_archive_is_refused_unless_skipping(tar):
    with open(tar, "r+b") as file:
        file.seek(3 * 1024 + 5)
        file.write(b"?")
    with pytest.raises(DataError, match="damaged: checksum at byte 3072"):
        from_tar(tar, batch_size=2)
    assert from_tar(tar, batch_size=2, on_error="skip").num_records == 22


def test_images_of_different_sizes(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("c/0.png", png(0)), ("c/1.png", png(1, (7, 5)))])
    with pytest.raises(DataError, match=r"'c/1\.png' is 7 × 5, while the first image is 6 × 5"):
        list(from_tar(path, batch_size=2, on_error="skip"))
    assert len(list(from_tar(path, batch_size=2, size=(4, 4)))) == 1


def test_images_of_their_own_size_may_be_long(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("c/0.png", png(7, (4, 40_000)))])
    data = from_tar(path, batch_size=1)
    assert next(iter(data))["image"].shape == (1, 4, 40_000, 3)
    assert from_tar(path, batch_size=1, size=[6, 6]).size == (6, 6)


def test_mistakes(tar, tmp_path):
    for options, words in [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 24, "drop_remainder": True}, "at most the 23 records"),
        ({"epochs": 0}, "epochs"),
        ({"size": (128,)}, "size"),
        ({"size": (0, 4)}, "size"),
        ({"on_error": "skp"}, "Did you mean 'skip'"),
        ({"dtype": "float16"}, "dtype"),
        ({"threads": -1}, "threads"),
        ({"label": "file"}, "label"),
        ({"max_skipped": 2.0}, "max_skipped"),
        ({"weights": []}, "weights"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            from_tar(tar, **{"batch_size": 4, **options})
    flat = write_tar(tmp_path / "flat.tar", [("0.png", png(0))])
    with pytest.raises(DataError, match=r"'0\.png' has no label"):
        from_tar(flat, batch_size=1)
    assert len(list(from_tar(flat, batch_size=1, label=None))) == 1
    bad = write_tar(tmp_path / "bad.tar", [("c/0.png", b"junk")])
    with pytest.raises(DataError, match=r"None of the first images.*'c/0\.png'"):
        from_tar(bad, batch_size=1)


# ---------------------------------------------------------------------- paths


def test_an_archive_under_two_names_is_refused(tar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link.tar").symlink_to("a.tar")
    os.link("a.tar", "hard.tar")
    Path("d").symlink_to(tmp_path)
    many = [shutil.copy(tar, f"{i}.tar") for i in range(1200)]
    for other in ("./a.tar", tar, "link.tar", "hard.tar", "d/a.tar"):
        for between in ([], many):
            with pytest.raises(
                ArgumentError, match=rf"named once each, got \['a.tar', '{other}'\]"
            ):
                expand(["a.tar", *between, other])
    assert expand(many) == many
    with pytest.raises(ArgumentError, match="named once each"):
        expand(["http://a/b.tar", "http://a/b.tar"])


@pytest.mark.skipif(not shutil.which("bash"), reason="bash tells what is right")
def test_braces_are_expanded_as_bash_does():
    patterns = (
        "{1..4..3} {4..1} {10..1..4} {01..10..4} {1..010} {-1..2} {-01..2} {1..-05} {1..3..0} "
        "{1..5..-2} {5..1..-2} {0..00} {-0..2} {-00..1} {1..3..02} x{,a} {a} y{}z {1..2}{a,b} "
        "{100..098} {x,y a{1..2 {1..2}} {a,b}{ {1..2..} {9..0099..30} {000..-1} {a}{1..2}"
    )
    out = subprocess.run(["bash", "-c", f"echo {patterns}"], capture_output=True, check=True)
    found = itertools.chain.from_iterable(map(braces, patterns.split()))
    assert list(found) == out.stdout.decode().split()
    for pattern in ("{1..1000001}", "{1..1001}-{1..1000}", "{0..999999999999999999}"):
        with pytest.raises(ArgumentError, match="at most 1000000 files"):
            braces(pattern)


# ---------------------------------------------------------------------- the operating system


def run_python(code, **options):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert not done.returncode, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the limit is POSIX's")
def test_three_thousand_archives_need_few_descriptors(tar, tmp_path):
    folder, data = tmp_path / "shards", Path(tar).read_bytes()
    folder.mkdir()
    for i in range(3000):
        (folder / f"{i}.tar").write_bytes(data)
    out = run_python(
        f"""
import os, resource, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import numpy as np
from jdl.data import TarSource
sources = [TarSource({str(folder)!r}) for _ in range(2)]
begin = time.monotonic()
sources.append(TarSource({str(folder)!r}))
print(time.monotonic() - begin)
records = np.random.default_rng(0).integers(3000 * 23, size=4000)
for source in sources:
    assert len(source) == 3000 * 23
    for record, data in zip(records.tolist(), source.read_many(records), strict=True):
        assert data == source[record % 23].data
"""
    )
    assert float(out[0]) < 30


@pytest.mark.parametrize("mapped", [False, True])
def test_an_index_may_be_replaced_and_a_read_one_overwritten_while_in_use(tar, tmp_path, mapped):
    index, other = Path(tar + ".jdlidx"), tmp_path / "other"
    source = TarSource(tar)
    expected = list(source.read_many(range(23)))
    write_tar(tmp_path / "b.tar", [("c/0.png", png(0))])
    TarSource(str(tmp_path / "b.tar"))
    (tmp_path / "b.tar.jdlidx").rename(other)
    out = run_python(
        f"""
import os, shutil
from jdl.data import TarSource
from jdl.data.tar import index
if {mapped}:
    index._READ = 0
source = TarSource({tar!r})
(os.replace if {mapped} else shutil.copyfile)({str(other)!r}, {str(index)!r})
for i, data in enumerate(source.read_many(range(23))):
    print(source.name(i), data.hex())
"""
    )
    assert out[1::2] == [data.hex() for data in expected]
    assert out[::2] == [source.name(i) for i in range(23)]


def test_mapped_indexes_are_read_only_and_unmapped(tar, monkeypatch):
    TarSource(tar)
    monkeypatch.setattr(tar_index, "_READ", 0)
    source = TarSource(tar)
    with pytest.raises(ValueError, match="read-only"):
        source.indexes[0].columns.offsets[0] = 1
    mapped = lambda: tar + ".jdlidx" in Path("/proc/self/maps").read_text()  # noqa: E731
    if Path("/proc/self/maps").exists():
        assert mapped()
        del source
        gc.collect()
        assert not mapped()


def test_a_worker_refuses_an_archive_that_has_changed(tmp_path):
    """Its rows would be those of the old one."""
    path = write_tar(tmp_path / "a.tar", [(f"{i}/0.png", png(i)) for i in range(9)])
    pickled = pickle.dumps(TarSource(path, split="3"))
    os.utime(path, (0, 0))
    TarSource(path)  # rebuilds the index
    assert pickle.loads(pickled).name(0) == "3/0.png"
    write_tar(path, [(f"{i}/0.png", png(i)) for i in range(1, 9)])
    with pytest.raises(DataError, match="changed since it was indexed"):
        pickle.loads(pickled)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_forked_children_read_a_compressed_archive_by_themselves(tmp_path):
    noise = np.random.default_rng(0)
    members = [(f"c/{i}.png", noise.bytes(10_000)) for i in range(300)]
    plain = Path(write_tar(tmp_path / "a.tar", members))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(plain.read_bytes(), 1))
    run_python(
        f"""
import os, tarfile
from jdl.data import TarSource
with tarfile.open({str(plain)!r}) as tar:
    expected = [tar.extractfile(member).read() for member in tar]
source = TarSource({str(path)!r})
assert list(source.read_many(range(100))) == expected[:100]
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        right = list(source.read_many(range(100, 300))) == expected[100:]
        os._exit(0 if right else 1)
    children.append(child)
assert list(source.read_many(range(100, 300))) == expected[100:]
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
"""
    )


def test_a_seek_file_of_an_earlier_state_is_renewed_by_the_command_in_the_error(tmp_path, capsys):
    pytest.importorskip("indexed_gzip")
    from jdl.cli.main import main

    path = tmp_path / "a b.tar.gz"

    def write(n, compress):
        plain = Path(write_tar(tmp_path / "plain", [(f"c/{i}.png", png(i)) for i in range(n)]))
        path.write_bytes(compress(plain.read_bytes()))

    write(9, gzip.compress)
    make_seekable(str(path))
    assert TarSource(path).mode == "seekable"
    write(20, gzip.compress)
    with pytest.raises(DataError, match="seek file") as error:
        TarSource(path)
    command = str(error.value).split("`")[1]
    assert main(shlex.split(command)[1:]) == 0
    assert "20 images" in capsys.readouterr().out
    assert (TarSource(path).mode, len(TarSource(path))) == ("seekable", 20)
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(8))  # as large as before, with other contents
    with pytest.raises(DataError, match="of an earlier state"):
        TarSource(path)
    write(7, bz2.compress)  # no longer gzip: it has nothing to seek
    assert (TarSource(path).mode, len(TarSource(path))) == ("stream", 7)


WITH_WORKERS = """
import multiprocessing, os, sys, time
from jdl.data import from_tar
if __name__ == "__main__":
    iterator = iter(from_tar({tar!r}, batch_size=5, epochs={epochs}, workers=2))
    batch = next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    {then}
"""


def running(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_workers_end_with_a_killed_parent(tar, tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(WITH_WORKERS.format(tar=tar, epochs=None, then="time.sleep(100)"))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(running, workers))
        parent.send_signal(getattr(signal, name))
    end = time.monotonic() + 15
    while any(map(running, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(running, workers))


@pytest.mark.slow
@pytest.mark.parametrize("then", ["iterator.close()", "list(iterator)", "pass", "sys.exit(0)"])
def test_workers_leave_nothing_and_say_nothing_at_a_normal_end(tar, tmp_path, then):
    script = tmp_path / "script.py"
    epochs = 1 if then.startswith("list") else None
    script.write_text(WITH_WORKERS.format(tar=tar, epochs=epochs, then=then))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not any(running(int(pid)) for pid in done.stdout.split())


def test_a_killed_worker_is_named_and_a_function_of_the_script_reaches_it(tar):
    options = {"batch_size": 5, "epochs": None, "shuffle": False, "label": lambda name: name[0]}
    iterator = iter(from_tar(tar, workers=1, **options))
    assert next(iterator)["label"].tolist() == [0, 1, 2, 0, 1]
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(DataError, match=r"worker process has ended \(exit code -9\)"):
        take(iterator, 100)
    iterator.close()
    assert not multiprocessing.active_children()


def test_an_error_that_cannot_be_pickled_is_told_by_a_worker():
    class TwoArguments(Exception):
        def __init__(self, one, other):
            super().__init__(f"{one} and {other}")

    def make(number):
        if number == 0:
            raise TwoArguments("left", "right")
        error = ValueError("third") if number == 1 else DataError("fourth")
        error.lock = None if number == 2 else threading.Lock()
        raise error

    workers = Workers(make, {}, 3, 1, 1)
    first, second, third = (workers.take(number).error for number in range(3))
    workers.close()
    assert "TwoArguments: left and right" in str(first)
    assert "ValueError: third" in str(second)
    assert (type(third), str(third)) == (DataError, "fourth")


# ---------------------------------------------------------------------- arrays


def test_arrays_of_any_shape_and_type_come_unchanged():
    features = np.arange(24, dtype=np.float64).reshape(6, 2, 2)
    targets = np.arange(12, dtype=np.uint8).reshape(6, 2)
    (batch,) = from_arrays(features, targets, batch_size=6, epochs=1)
    for key, array in (("image", features), ("label", targets)):
        assert batch[key].dtype == array.dtype
        np.testing.assert_array_equal(batch[key], array)
        assert not np.shares_memory(batch[key], array)
    shuffled = from_arrays(features, targets, batch_size=4)
    batch = next(iter(shuffled))
    assert batch["image"].dtype == np.float64
    np.testing.assert_array_equal(batch["image"][:, 0, 0] / 2, batch["label"][:, 0])
    (batch,) = from_arrays(jnp.ones((3, 2)), batch_size=3, epochs=1)
    assert batch.keys() == {"image"}


def test_array_mistakes():
    x = np.zeros((5, 2))
    for arguments, words in [
        ((x, np.zeros(4)), "`targets` must be an array of 5 rows"),
        ((np.zeros((0, 2)),), "at least one row"),
        ((np.float32(1),), "leading axis"),
        ((np.array([None]),), "numbers"),
    ]:
        with pytest.raises(UserError, match=words):
            from_arrays(*arguments, batch_size=2)
    state = iter(from_arrays(x, batch_size=2)).get_state()
    other = iter(from_arrays(x[:, :1], batch_size=2))
    with pytest.raises(UserError, match="other data"):
        other.set_state(state)


# ---------------------------------------------------------------------- digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = digits(None, batch_size=1797, threads=0)
    (batch,) = data
    places = [int(data.source.name(i)[-8:-4]) for i in range(1797)]
    assert sorted(places) == list(range(1797))
    np.testing.assert_array_equal(batch["label"], bunch.target[places])
    scaled = np.rint(batch["image"][..., 0] * (16 / 255))
    np.testing.assert_array_equal(scaled, bunch.images[places])
    train, test = (digits(split, batch_size=1).source for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    for digit, count in train.count_classes().items():
        assert abs(count / (count + test.count_classes()[digit]) - 0.8) < 0.005
    assert splits(digits_path(), keep_index=False) == ("train", "test")


def test_the_bundled_archive_is_what_its_script_makes(tmp_path):
    script = Path(__file__).with_name("make_digits.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "digits.tar")], check=True)
    with open(digits_path(), "rb") as bundled:
        assert (tmp_path / "digits.tar").read_bytes() == bundled.read()


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("digits") == digits_path()
    assert resolve("a.tar") == "a.tar"


def test_importing_jdl_data_imports_nothing_heavy():
    heavy = "('jax', 'grain', 'PIL', 'numpy')"
    code = f"import sys, jdl.data; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_batch_goes_straight_to_the_device(tar):
    data = from_tar(tar, batch_size=5, drop_remainder=True)
    mean = jax.jit(lambda batch: jnp.mean(batch["image"].astype(jnp.float32)))
    assert float(mean(jax.device_put(next(iter(data))))) == 2.0


def test_the_first_batches_come_in_every_epoch(tmp_path):
    data = digits("train", batch_size=32, shuffle=True, seed=3, epochs=2)
    every = list(data)
    few = data.first(2)
    found = list(few)
    assert (few.num_records, few.steps_per_epoch, len(found)) == (64, 2, 4)
    for i, batch in enumerate(found):
        np.testing.assert_array_equal(batch["image"], every[i % 2]["image"])
        np.testing.assert_array_equal(batch["label"], every[i % 2]["label"])
    for batch, expected in zip(few.once(), every, strict=False):
        np.testing.assert_array_equal(batch["image"], expected["image"])
    reader = iter(few.repeat())
    for _ in range(3):
        next(reader)
    again = iter(few.repeat())
    again.set_state(reader.get_state())
    np.testing.assert_array_equal(next(again)["label"], every[1]["label"])
    with pytest.raises(DataError, match="other data"):
        iter(data).set_state(reader.get_state())
    with pytest.raises(ArgumentError, match="1 to 44"):
        data.first(45)
