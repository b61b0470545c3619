"""The index and the source, against Python's tarfile and GNU tar."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jdl.core.check import DataError, UserError
from jdl.data import TarSource, describe, from_tar
from jdl.data.tar import archive, resolve
from jdl.data.tar import format as fmt
from jdl.data.tar import index as tar_index
from jdl.data.tar.paths import expand
from jdl.data.tar.scan import image_name

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path, members, format=tarfile.USTAR_FORMAT, **options):
    with tarfile.open(path, "w", format=format, **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def listing(path):
    """(name, kind, bytes) of every member, as we see them."""
    index = tar_index.open_index(str(path), keep=False)
    found = []
    with open(path, "rb") as file:
        for i in range(len(index)):
            file.seek(index.columns.offsets[i])
            data = file.read(index.columns.sizes[i])
            found.append((index.name(i), int(index.columns.kinds[i]), data))
    return found, index


def plain(name):
    """A name as `posixpath.normpath` has it, but for "..", in composed letters."""
    parts = unicodedata.normalize("NFC", name).split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def tarfile_listing(path):
    found = []
    with tarfile.open(path) as tar:
        for info in tar:
            linked = info.isreg() or info.islnk() or info.issym()
            data = tar.extractfile(info).read() if linked else b""
            name = info.name.encode("utf-8", "surrogateescape")
            found.append((plain(name.decode("utf-8", "backslashreplace")), data))
    return found


def assert_like_tarfile(path):
    found, index = listing(path)
    assert sorted((name, data) for name, _, data in found) == sorted(tarfile_listing(path))
    return index


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs",)),
    min_size=1,
    max_size=150,
).filter(lambda s: s not in (".", ".."))
MEMBERS = st.lists(
    st.tuples(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=1500)),
    max_size=8,
)


@pytest.mark.parametrize("format", ["gnu", "pax"])
@given(members=MEMBERS)
@example(members=[("0/0/png", b""), ("0/0/png", b"")])
@settings(max_examples=60, deadline=None)
def test_random_archives_read_as_tarfile_reads_them(format, members, tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "a.tar"
    write_tar(path, members, FORMATS[format])
    index = assert_like_tarfile(path)
    names = [plain(name) for name, _ in members]
    images = [name for name in names if image_name(name.rpartition("/")[2].encode())]
    repeated = {name for name in images if images.count(name) > 1}
    told = {(d.word, d.name, d.lost) for d in index.damage}
    assert told == {("duplicate", name, False) for name in repeated}


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax", "v7", "oldgnu"])
def test_gnu_tar_archives(tmp_path, format):
    tree = tmp_path / "tree"
    long = "n" * 90 if format == "v7" else "n" * 200
    names = ["train/a/1.png", "train/b/2.PNG", "._1.png"]
    names += ["d" * 20 + "/" + long[:70] + ".jpg"] if format == "v7" else []
    names += [] if format == "v7" else ["train/" + "d" * 90 + "/" + long[:90] + ".jpg"]
    names += ["ünïcode/ß.png"] if format != "v7" else []
    names += [long + ".png"] if format in ("gnu", "pax", "oldgnu") else []
    for i, name in enumerate(names):
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(i * 300))
    os.link(tree / "train/a/1.png", tree / "hard.png")
    os.symlink("train/a/1.png", tree / "soft.png")
    os.mkfifo(tree / "pipe.png")
    path = tmp_path / "a.tar"
    command = ["tar", f"--format={format}", "-cf", str(path), "-C", str(tree), "--sort=name", "."]
    if format in ("v7", "ustar"):
        os.unlink(tree / "pipe.png")
    subprocess.run(command, check=True)
    index = assert_like_tarfile(path)
    assert index.damage == ()
    listed = subprocess.run(["tar", "-tf", str(path)], capture_output=True, check=True).stdout
    assert len(listed.splitlines()) == len(index)
    source = TarSource(path)
    assert len(source) == len(names) - 1 + 2  # without `._` and the pipe, with both links
    found = {record.name: record.data for record in source}
    assert found["hard.png"] == found["soft.png"] == found["train/a/1.png"]


def test_pax_globals_and_sizes_in_pax(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("a/1.png", b"x" * 700)], tarfile.PAX_FORMAT, pax_headers={"comment": "hi"})
    assert_like_tarfile(path)
    # A size in a pax record overrides the header's, and moves everything that follows.
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("b.png")
        info.size, info.pax_headers = 600, {"size": "600", "mtime": "1.5"}
        tar.addfile(info, io.BytesIO(b"y" * 600))
        tar.addfile(tarfile.TarInfo("c.png"))
    assert_like_tarfile(path)


@pytest.mark.parametrize("length", [1_500_000, 12_000_000])
def test_a_large_pax_header_is_read_as_gnu_tar_reads_it(length, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(2):
            info = tarfile.TarInfo(f"{'n' * 120}{i}.png")
            info.pax_headers = {"comment": "path=" * (length // 5)}
            tar.addfile(info)
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
    found, index = listing(path)
    assert [name for name, _, _ in found] == listed.stdout.splitlines()
    assert index.damage == ()


def test_a_pax_header_beyond_the_bound_is_damage(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.png")
            info.pax_headers = {"comment": "x" * (17 << 20)} if i == 1 else {}
            tar.addfile(info)
    (only,) = describe(path).damage
    assert (only["word"], only["lost"]) == ("damaged", True)
    assert "more than 16777216" in only["detail"]


RECORDS = st.dictionaries(
    st.sampled_from(["path", "size", "mtime", "comment", "uname", "zpath"]),
    st.sampled_from(["3", "700"]),
    max_size=3,
)
VALUES = ["a/1.png", "x\n13 path=b.png\n", "zip", "\u00fc.png", "n" * 300]
MEMBERS_WITH_RECORDS = st.lists(
    st.tuples(RECORDS, st.sampled_from(VALUES), st.sampled_from("xgL")), min_size=1, max_size=5
)


@given(MEMBERS_WITH_RECORDS)
@settings(max_examples=150, deadline=None)
def test_pax_records_mean_what_they_mean_to_tarfile(members):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.tar")
        with open(path, "wb") as file:
            for i, (records, text, kind) in enumerate(members):
                info = tarfile.TarInfo(f"{i}.png")
                size = int(records.get("size", "5"))
                info.size = 5 if kind == "x" else size
                given = {k: v if k in ("size", "mtime") else text for k, v in records.items()}
                if kind == "g":  # for all members from here on
                    given = {"comment": text}
                if kind == "L":
                    info.name = f"{'m' * 120}{i}.png"
                    given = {}
                make = info._create_pax_generic_header
                file.write(make(given, kind.encode(), "utf-8") if given else b"")
                file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes([i]) * size + bytes(-size % 512))
            file.write(bytes(1024))
        index = assert_like_tarfile(path)
        assert {d.word for d in index.damage} <= {"duplicate"}


def test_members_beyond_8_gib(tmp_path):
    path = tmp_path / "big.tar"
    size = 9 << 30
    with open(path, "wb") as file:  # holes: nothing of this is on the disk
        for format in ("gnu", "pax"):
            info = tarfile.TarInfo(f"{format}.bin")
            info.size = size
            file.write(info.tobuf(FORMATS[format]))
            file.seek(size, os.SEEK_CUR)
        info = tarfile.TarInfo("a.png")
        info.size = 3
        file.write(info.tobuf() + b"abc" + bytes(509) + bytes(1024))
    index = tar_index.open_index(str(path), keep=False)
    assert index.columns.sizes.tolist() == [size, size, 3]
    assert TarSource(path, keep_index=False)[0].data == b"abc"
    assert index.damage == ()


def test_sparse_members_are_reported_and_not_read(tmp_path):
    (tmp_path / "s.png").write_bytes(b"")
    with open(tmp_path / "s.png", "wb") as file:
        for i in range(30):  # more pieces than one header can list
            file.seek(i * 100_000)
            file.write(b"x" * 4096)
    (tmp_path / "t.png").write_bytes(b"after")
    for format in ("gnu", "pax"):
        path = tmp_path / f"{format}.tar"
        command = ["tar", "-S", f"--format={format}", "-cf", str(path), "-C", str(tmp_path)]
        subprocess.run([*command, "s.png", "t.png"], check=True)
        source = TarSource(path)
        assert [source[i].data for i in range(len(source))] == [b"after"]
        assert [d.word for _, d in source.damage] == ["sparse"]


# ---------------------------------------------------------------------- damage


@pytest.fixture
def ten(tmp_path):
    return write_tar(
        tmp_path / "ten.tar", [(f"c/{i}.png", bytes([i + 1]) * 700) for i in range(10)]
    )


def patch(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def names(path):
    source = TarSource(path, keep_index=False)
    return [source[i].name for i in range(len(source))], [d for _, d in source.damage]


STRIDE = 512 + 1024  # of the members of `ten`


def test_a_bad_checksum_costs_one_member(ten):
    patch(ten, 3 * STRIDE + 10, b"?")
    found, damage = names(ten)
    assert found == [f"c/{i}.png" for i in range(10) if i != 3]
    (only,) = damage
    assert (only.word, only.offset, only.lost) == ("checksum", 3 * STRIDE, True)
    assert only.name.startswith("c/3.png")


def test_a_destroyed_header_costs_one_member(ten):
    patch(ten, 3 * STRIDE, bytes([255]) * 512)
    found, damage = names(ten)
    assert found == [f"c/{i}.png" for i in range(10) if i != 3]
    assert [d.word for d in damage] == ["checksum"]


def test_a_zeroed_header_does_not_end_the_archive(ten):
    patch(ten, 3 * STRIDE, bytes(512))
    found, damage = names(ten)
    assert found == [f"c/{i}.png" for i in range(10) if i != 3]
    assert [d.word for d in damage] == ["damaged"]


def test_a_wrong_size_is_noticed(ten):
    with open(ten, "r+b") as file:
        file.seek(3 * STRIDE)
        info = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict")
        info.size = 2000
        file.seek(3 * STRIDE)
        file.write(info.tobuf())
    found, damage = names(ten)
    assert found == [f"c/{i}.png" for i in range(10) if i != 3]
    assert [(d.word, d.name) for d in damage] == [("damaged", "c/3.png")]


@pytest.mark.parametrize(
    ("length", "images", "words"),
    [
        (3 * STRIDE, 3, ["truncated"]),  # between members: the end marker is missing
        (3 * STRIDE + 100, 3, ["truncated"]),  # inside a header
        (3 * STRIDE + 600, 3, ["truncated", "truncated"]),  # inside a member
    ],
)
def test_a_cut_archive(ten, length, images, words):
    os.truncate(ten, length)
    found, damage = names(ten)
    assert found == [f"c/{i}.png" for i in range(images)]
    assert [d.word for d in damage] == words


def test_concatenated_archives_are_read_through(ten, tmp_path):
    more = write_tar(tmp_path / "more.tar", [("d/x.png", b"x")])
    both = tmp_path / "both.tar"
    both.write_bytes(Path(ten).read_bytes() + Path(more).read_bytes())
    found, damage = names(both)
    assert found == [*(f"c/{i}.png" for i in range(10)), "d/x.png"]
    assert [(d.word, d.lost) for d in damage] == [("concatenated", False)]


def test_rows_after_thousands_of_headers_survive_a_bad_one(tmp_path):
    n = 9000
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", b"") for i in range(n)])
    patch(path, 5000 * 512, b"?")
    found, damage = names(path)
    assert found == [f"{i}.png" for i in range(n) if i != 5000]
    assert len(damage) == 1


def test_no_tars(tmp_path):
    path = tmp_path / "a.tar"
    for content, word, words in [
        (b"", "truncated", "is empty"),
        (b"\x1f\x8b" + bytes(600), "damaged", "its gzip data are damaged"),
        (b"hello " * 1000, "damaged", "is no tar archive"),
        (b"\1" + os.urandom(3 << 20), "damaged", "is no tar archive"),
        (b"PK\3\4" + bytes(2000), "damaged", "zip archive"),
    ]:
        path.write_bytes(content)
        about = describe(path)
        assert about.images == 0
        assert [(d["word"], d["lost"]) for d in about.damage] == [(word, True)]
        assert words in about.damage[0]["detail"]
        with pytest.raises(DataError, match=rf"holds no images.*damaged \({word}\): .*{words}"):
            TarSource(path)
    path.write_bytes(bytes(10240))
    assert describe(path).members == 0
    with pytest.raises(DataError, match="holds no images"):
        TarSource(path)
    with pytest.raises(DataError, match=r"no archive .*b\.tar.* Did you mean .*a\.tar"):
        TarSource(tmp_path / "b.tar")


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("split", ["test:0.3", "test:0.3:folder", "test:0.3:0", "café"])
def test_the_same_names_are_on_the_same_side_whatever_wrote_them(split, tmp_path):
    names = [f"{c}/{i % 7}/ñ{i}.png" for c in ("café", *"abcdef") for i in range(30)]
    ways = [
        lambda name: name,
        lambda name: "./" + name,
        lambda name: "/" + name.replace("/", "//"),
        lambda name: unicodedata.normalize("NFD", name).replace("/", "/./"),
    ]
    found = []
    for i, way in enumerate(ways):
        members = [(way(name), name.encode()) for name in names]
        path = write_tar(tmp_path / f"{i}.tar", members, tarfile.PAX_FORMAT)
        source = TarSource(path, split=split)
        found.append([(source[k].name, source[k].data.decode()) for k in range(len(source))])
        assert all(name == data for name, data in found[-1])
    assert 0 < len(found[0]) < len(names)
    assert found == [found[0]] * len(ways)


def test_an_archive_made_again_from_inside_the_folder_has_the_same_split(tmp_path):
    for i in range(60):
        file = tmp_path / "d" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"%d" % i)
    subprocess.run(["tar", "-cf", tmp_path / "1.tar", "-C", tmp_path / "d", "a", "b"], check=True)
    subprocess.run(["tar", "-cf", tmp_path / "2.tar", "-C", tmp_path / "d", "."], check=True)
    sides = [
        {
            part: {r.name for r in TarSource(tmp_path / tar, split=f"{part}:0.3")}
            for part in ("train", "test")
        }
        for tar in ("1.tar", "2.tar")
    ]
    assert sides[0] == sides[1]
    assert len(sides[0]["test"]) > 5
    assert not sides[0]["test"] & sides[1]["train"]


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed, decomposed = "caf\xe9", "cafe\u0301"
    both = [(f"{composed}/1.png", b"1"), (f"{decomposed}/2.png", b"2"), ("x/3.png", b"3")]
    one = write_tar(tmp_path / "one.tar", both, tarfile.PAX_FORMAT)
    assert TarSource(one).count_classes() == {composed: 2, "x": 1}
    apart = [write_tar(tmp_path / f"{i}.tar", [m], tarfile.PAX_FORMAT) for i, m in enumerate(both)]
    several = TarSource(apart)
    assert several.classes == (composed, "x")
    assert several.labels([0, 1, 2]).tolist() == [0, 0, 1]
    given = TarSource(apart, classes=("x", decomposed))
    assert given.labels([0, 1, 2]).tolist() == [1, 1, 0]
    assert len(TarSource(apart, split=decomposed)) == 2
    assert TarSource(one, label=lambda name: decomposed).classes == (composed,)
    assert describe(apart).splits == {composed: 2, "x": 1}


@given(st.lists(st.sampled_from(["a", "..", ".", "", "\xe9", "e\u0301", "\u212b"]), min_size=1))
def test_plain_names_do_not_change_again(parts):
    name = fmt.plain("/".join(parts).encode())
    assert name.decode() == plain("/".join(parts))
    assert fmt.plain(name) == name


def test_bytes_that_are_no_text_keep_names_apart(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("./\udcff.png", "\udcfe.png", "\\xff.png"):
            tar.addfile(tarfile.TarInfo(name))
    assert [r.name for r in TarSource(path)] == ["\\xff.png", "\\xfe.png", "\\xff.png"]
    assert describe(path).damage == []


# ---------------------------------------------------------------------- links and equal names


def images_of(path):
    """What is read of an archive: name -> bytes."""
    try:
        source = TarSource(path, keep_index=False)
    except DataError:  # it holds none
        return {}
    assert len({source.name(i) for i in range(len(source))}) == len(source)
    return {record.name: record.data for record in source}


def images_below(root, strict=True):
    """What the operating system reads in a folder, through links but not out of it.

    If not strict, `..` also goes back from a file and from what is not there.
    """
    found = {}
    for folder, _, files in os.walk(root):
        for file in files:
            try:
                real = os.path.realpath(os.path.join(folder, file), strict=strict)
            except OSError:
                continue
            if file.endswith(".png") and real.startswith(f"{root}/") and os.path.isfile(real):
                found[os.path.relpath(os.path.join(folder, file), root)] = Path(real).read_bytes()
    return found


FOLDERS = ("", "a", "a/b", "c")
LINK_TARGETS = st.lists(
    st.sampled_from(["..", ".", "a", "b", "c", "d", "1.png", "2.png", "3.png", "store"]),
    min_size=1,
    max_size=4,
).map("/".join)


@given(data=st.data(), format=st.sampled_from(["gnu", "pax", "ustar", "v7"]))
@settings(max_examples=80, deadline=None)
def test_links_lead_where_the_operating_system_says(data, format, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
        (root / folder / data.draw(st.sampled_from(["1.png", "store"]))).write_bytes(os.urandom(9))
    for i, folder in enumerate(FOLDERS * 2):
        name = data.draw(st.sampled_from(["2.png", "3.png", "d"]))
        if not os.path.lexists(root / folder / name):
            if i % 3:
                os.symlink(data.draw(LINK_TARGETS), root / folder / name)
            else:  # a hard link, perhaps to a symbolic one
                others = [p for p in root.rglob("*") if not p.is_dir() or p.is_symlink()]
                os.link(
                    data.draw(st.sampled_from(sorted(others))),
                    root / folder / name,
                    follow_symlinks=False,
                )
    path = root.with_suffix(".tar")
    command = ["tar", f"--format={format}", "-cf", str(path), "-C", str(root), "--sort=name", "."]
    subprocess.run(command, check=True)
    found, lenient = images_of(path), images_below(str(root), strict=False)
    assert images_below(str(root)).items() <= found.items() <= lenient.items()
    links = [p for p in root.rglob("*.png") if p.is_symlink()]
    missing = {str(p.relative_to(root)) for p in links} - found.keys()
    listed = {d["name"]: d for d in describe(path, keep_index=False).damage}
    assert missing <= listed.keys()
    assert not listed.keys() & found.keys()
    assert all((d["word"], d["lost"]) == ("link", False) for d in listed.values())


def read_by_tarfile(path):
    """What tarfile reads of each name, its last member and its links: name -> bytes."""
    found = {}
    with tarfile.open(path) as tar:
        for info in tar:
            try:
                found[info.name] = tar.extractfile(tar.getmember(info.name)).read()
            except (KeyError, RecursionError, AttributeError):  # a folder, or a link to nothing
                found.pop(info.name, None)
    return found


def member(name, kind, content):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, content if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
    data = content.encode() if kind == tarfile.REGTYPE else b""
    info.size = len(data)
    if kind == tarfile.LNKTYPE:
        info.linkname = f"f/{content}"
    return info, io.BytesIO(data)


KINDS = (tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
BASES = st.sampled_from(["1.png", "2.png", "3.png", "4.txt"])


@given(st.lists(st.tuples(BASES, st.sampled_from(KINDS), BASES), max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_last_member_of_a_name_and_its_links_count_as_for_tarfile(members):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.tar")
        with tarfile.open(path, "w") as tar:
            for i, (name, kind, content) in enumerate(members):
                content = content if kind != tarfile.REGTYPE else f"{i}"
                tar.addfile(*member(f"f/{name}", kind, content))
        expected = {n: data for n, data in read_by_tarfile(path).items() if n.endswith(".png")}
        assert images_of(path) == expected


def test_a_newer_version_replaces_an_older_one_and_both_are_told(tmp_path):
    (tmp_path / "d").mkdir()
    tar = ["tar", "-C", str(tmp_path), "-f", str(tmp_path / "a.tar")]
    for i in range(3):
        (tmp_path / "d" / f"{i}.png").write_bytes(b"old %d" % i)
    subprocess.run([*tar, "-c", "d"], check=True)
    (tmp_path / "d" / "1.png").write_bytes(b"new 1")
    subprocess.run([*tar, "-r", "./d/1.png", "d"], check=True)
    assert images_of(tmp_path / "a.tar") == images_below(str(tmp_path))
    about = describe(tmp_path / "a.tar")
    assert (about.images, about.kinds["older version of an image"]) == (3, 4)
    duplicates = [(d["word"], d["name"], d["lost"]) for d in about.damage]
    assert sorted(set(duplicates)) == [("duplicate", f"d/{i}.png", False) for i in range(3)]
    with open(tmp_path / "a.tar", "rb") as file:
        for each in about.damage:
            file.seek(each["offset"])
            assert plain(tarfile.TarInfo.frombuf(file.read(512), "utf-8", "").name) == each["name"]


LONG = "n" * 150


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_long_link_targets(format, tmp_path):
    members = [
        (f"{LONG}/{LONG}.png", tarfile.REGTYPE, "x"),
        ("h.png", tarfile.LNKTYPE, "x"),
        ("s.png", tarfile.SYMTYPE, f"./{LONG}/{LONG}.png"),
        ("t.png", tarfile.REGTYPE, "t"),
    ]
    with tarfile.open(tmp_path / "a.tar", "w", format=FORMATS[format]) as tar:
        for name, kind, content in members:
            info, data = member(name, kind, content)
            if kind == tarfile.LNKTYPE:
                info.linkname = f"{LONG}/{LONG}.png"
            tar.addfile(info, data)
    assert images_of(tmp_path / "a.tar") == {
        f"{LONG}/{LONG}.png": b"x",
        "h.png": b"x",
        "s.png": b"x",
        "t.png": b"t",
    }


@pytest.mark.parametrize(
    ("kind", "target", "why"),
    [
        (tarfile.SYMTYPE, "/etc/hostname", "outside the archive"),
        (tarfile.SYMTYPE, "../../x.png", "outside the archive"),
        (tarfile.SYMTYPE, "../d/none.png", "not in the archive"),
        (tarfile.SYMTYPE, "link.png", "circle"),
        (tarfile.SYMTYPE, "up/../x.png", "outside the archive"),
        (tarfile.SYMTYPE, "a/" * 300, "too many"),
        (tarfile.SYMTYPE, "../e", "a folder"),
        (tarfile.SYMTYPE, "../e/deep", "a folder"),
        (tarfile.SYMTYPE, "..", "a folder"),
        (tarfile.SYMTYPE, "pipe", "no complete file"),
        (tarfile.SYMTYPE, "cut.png", "no complete file"),
        (tarfile.LNKTYPE, "d/cut.png", "no earlier member"),
        (tarfile.LNKTYPE, "../x.png", "no earlier member"),
    ],
)
def test_a_link_that_is_not_followed_is_listed_with_the_reason(kind, target, why, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(*member("d/x.png", tarfile.REGTYPE, "x"))
        tar.addfile(*member("d/up", tarfile.SYMTYPE, "../d/.."))
        tar.addfile(*member("d/pipe", tarfile.FIFOTYPE, ""))
        tar.addfile(*member("e/deep/er/x.txt", tarfile.REGTYPE, "x"))
        info, _ = member("d/link.png", kind, target)
        info.linkname = target
        tar.addfile(info)
        tar.addfile(*member("d/cut.png", tarfile.REGTYPE, "x" * 9000))
    os.truncate(path, os.path.getsize(path) - os.path.getsize(path) % 10240 // 512 * 512 - 8192)
    assert [*images_of(path)] == ["d/x.png"]
    (found,) = (d for d in describe(path).damage if d["name"] == "d/link.png")
    assert (found["word"], found["lost"], why in found["detail"]) == ("link", False, True), found
    with tarfile.open(path) as tar:
        assert next(i.offset_data for i in tar if i.name == "d/link.png") - 512 == found["offset"]


def test_contents_after_a_hard_link_do_not_hide_what_follows(tmp_path):
    """As POSIX allows; GNU tar takes the size as 0 too."""
    path = tmp_path / "a.tar"
    info, _ = member("b.png", tarfile.LNKTYPE, "")
    info.linkname, info.size = "a.png", 600
    with open(path, "wb") as file:
        for name in ("a.png", "c.png"):
            one, data = member(name, tarfile.REGTYPE, name)
            file.write(one.tobuf() + data.read().ljust(512, b"\0"))
            if name == "a.png":
                file.write(info.tobuf() + b"x" * 1024)
        file.write(bytes(1024))
    assert images_of(path) == {"a.png": b"a.png", "b.png": b"a.png", "c.png": b"c.png"}
    assert [(d["word"], d["lost"]) for d in describe(path).damage] == [("checksum", True)]


def test_many_links_to_nothing_are_counted_and_nothing_is_said_to_be_lost(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*member("x.png", tarfile.REGTYPE, "x"))
        for i in range(1500):
            tar.addfile(*member(f"{i}.png", tarfile.SYMTYPE, "none"))
    damage = describe(tmp_path / "a.tar").damage
    assert {(d["word"], d["lost"]) for d in damage} == {("link", False)}
    assert (len(damage), damage[-1]["detail"]) == (1001, "and 500 more")
    assert from_tar(tmp_path / "a.tar", label=None, size=(2, 2), batch_size=1).num_records == 1


def test_a_link_back_from_below_a_hard_link_finds_it(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*member("f/a.png", tarfile.REGTYPE, "a"))
        tar.addfile(*member("f/b.png", tarfile.LNKTYPE, "a.png"))
        tar.addfile(*member("f/c.png", tarfile.SYMTYPE, "b.png/none/.."))
    assert images_of(tmp_path / "a.tar") == {f"f/{name}.png": b"a" for name in "abc"}


# ---------------------------------------------------------------------- headers


def test_numbers():
    for field in (b"-0000000001\0", b"0x000000017\0", b"0_1         ", b"99999999999\0"):
        with pytest.raises(ValueError, match=r".*"):
            fmt.number(field)
    with pytest.raises(ValueError, match="beyond"):
        fmt.number(b"\x80" + b"\xff" * 11)
    assert fmt.number(b"   17 \0     ") == 15
    assert fmt.number(bytes(12)) == 0


@given(st.binary(max_size=200))
def test_pax_records_never_crash(data):
    try:
        records = fmt.pax_records(data)
    except ValueError:
        return
    assert all(isinstance(key, bytes) for key in records)


def test_signed_checksums_are_accepted():
    info = tarfile.TarInfo("ä" * 20 + ".png")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    signed = sum(b - 256 if b > 127 else b for b in block[:148] + b" " * 8 + block[156:])
    block[148:156] = b"%06o\0 " % signed
    assert fmt.is_header(bytes(block))


# ---------------------------------------------------------------------- the index file


def test_the_index_is_kept_and_used_and_renewed(ten, monkeypatch):
    first = tar_index.open_index(ten)
    assert first.file == ten + tar_index.SUFFIX

    def never(*_):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patched:
        patched.setattr(resolve, "scan", never)
        again = tar_index.open_index(ten)
    for a, b in zip(first.columns, again.columns, strict=True):
        np.testing.assert_array_equal(a, b)
    write_tar(ten, [("other/0.png", b"0")])
    assert [TarSource(ten)[0].name, len(TarSource(ten))] == ["other/0.png", 1]


def test_an_invalid_index_is_not_used(ten):
    good = Path(tar_index.open_index(ten).file)
    whole = good.read_bytes()
    rng = np.random.default_rng(0)
    start = len(b"JDLINDEX3\n") + 8
    length = int.from_bytes(whole[start - 8 : start], "little")
    outside = bytearray(whole)
    at = -(-(start + length) // 64) * 64
    outside[at : at + 8] = (1 << 60).to_bytes(8, "little")
    header = json.loads(whole[start : start + length])
    header["lengths"]["sizes"] = 10**15
    text = json.dumps(header).encode()
    huge = whole[: start - 8] + len(text).to_bytes(8, "little") + text + whole[start + length :]
    candidates = [b"", b"x", whole[:50], whole[:-100], bytes(outside), huge, pickle.dumps(1)]
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=3):
            data[place] = rng.integers(256)
        candidates.append(bytes(data))
    for data in candidates:
        good.write_bytes(data)
        source = TarSource(ten)
        assert len(source) <= 10
        assert all(len(source[i].data) <= os.path.getsize(ten) for i in range(len(source)))


def test_a_read_only_folder_has_its_index_in_the_cache(ten, tmp_path, monkeypatch):
    monkeypatch.setenv("JDL_CACHE", str(tmp_path / "cache"))
    real = tar_index.atomic_file

    def refuse(path, **named):
        if path.startswith(ten):
            raise PermissionError(13, "Permission denied")
        return real(path, **named)

    monkeypatch.setattr(tar_index, "atomic_file", refuse)
    index = tar_index.open_index(ten)
    assert index.file == tar_index.cached(ten)
    assert not os.path.exists(ten + tar_index.SUFFIX)
    monkeypatch.setenv("JDL_CACHE", "/proc/nowhere")
    shutil.rmtree(tmp_path / "cache")
    assert tar_index.open_index(ten).file is None


# ---------------------------------------------------------------------- sources


def test_many_archives_in_order(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"s-{i:02d}.tar", [(f"{c}/{i}{c}.png", b"%d" % i) for c in "ba"])
    expected = [f"{c}/{i}{c}.png" for i in range(3) for c in "ba"]
    for paths in (
        str(tmp_path / "s-{00..02}.tar"),
        str(tmp_path / "s-*.tar"),
        str(tmp_path / "s-*"),  # beside the archives are their indexes now
        tmp_path,
        [tmp_path / f"s-{i:02d}.tar" for i in range(3)],
    ):
        source = TarSource(paths)
        assert [source[i].name for i in range(len(source))] == expected
        assert source.classes == ("a", "b")
        assert source.labels(np.arange(6)).tolist() == [1, 0] * 3
        assert source.count_classes() == {"a": 3, "b": 3}
    with pytest.raises(DataError, match=r"s-03\.tar"):
        expand(str(tmp_path / "s-{00..03}.tar"))
    with pytest.raises(DataError, match="No file matches"):
        expand(str(tmp_path / "*.jdlidx"))
    with pytest.raises(UserError, match="once each"):
        expand([str(tmp_path / "s-00.tar")] * 2)
    assert source[-1].name == expected[-1]
    assert list(source.read_many([-1, -6])) == [source[5].data, source[0].data]
    for read in (lambda i: source[i], lambda i: [*source.read_many([i])], lambda i: source.name(i)):
        for i in (6, -7):
            with pytest.raises(IndexError, match=f"record {i} of 6"):
                read(i)


def test_labels_of_some_records_are_counted_from_the_end_where_negative(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{side}/{i}.png", b"") for i in "abc" for side in ("l", "r")])
    source = TarSource(str(tmp_path / "a.tar"), label=re.compile("(.).png"), split="r")
    assert source.labels([0, -1, -3]).tolist() == [0, 2, 0]
    with pytest.raises(IndexError, match="record 3 of 3"):
        source.labels([3])


@pytest.mark.parametrize("has_pread", [True, False])  # Windows has none
def test_reading_from_threads_and_after_pickling(ten, has_pread, monkeypatch):
    if not has_pread:
        monkeypatch.delattr(os, "pread")
        monkeypatch.setattr(archive, "_pread", archive._seek_and_read)
    source = TarSource(ten)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source[i % 10], range(500)))
    assert all(record.data == bytes([i % 10 + 1]) * 700 for i, record in enumerate(found))
    packed = pickle.dumps(source)
    assert len(packed) < 4000
    assert pickle.loads(packed)[7] == source[7]


def test_an_archive_replaced_while_in_use(ten):
    source = TarSource(ten)
    assert source[0].name == "c/0.png"
    os.utime(ten)
    assert source[1].name == "c/1.png"  # touched, but the same
    os.truncate(ten, 2000)
    with pytest.raises(DataError, match="has changed"):
        source[2]


def test_labels(tmp_path):
    import re

    path = write_tar(
        tmp_path / "a.tar",
        [("./train/x/1_7.png", b""), ("./test/y/2_8.png", b""), ("train/x/3_7.png", b"")],
    )
    assert TarSource(path).classes == ("x", "y")
    assert TarSource(path, label=0).classes == ("test", "train")
    assert TarSource(path, label=re.compile(r"_(\d)")).labels([0, 1, 2]).tolist() == [0, 1, 0]
    by_function = TarSource(path, label=lambda name: None if "1_" in name else "all")
    assert [by_function.name(i) for i in range(2)] == ["test/y/2_8.png", "train/x/3_7.png"]
    assert (len(by_function), by_function.labels([0, 1]).tolist()) == (2, [0, 0])
    for number in (int, np.int64):
        by_number = TarSource(path, label=lambda name, number=number: number(name[-5]))
        assert (by_number.classes, by_number.labels([0, 1, 2]).tolist()) == (("7", "8"), [0, 1, 0])
    for wrong in (True, 1.5, b"x"):
        with pytest.raises(UserError, match=r"`label` must be a function that returns.*1_7\.png"):
            TarSource(path, label=lambda name, wrong=wrong: wrong)
    assert TarSource(path, label=None).labels([0, 1]).tolist() == [-1, -1]
    train = TarSource(path, split="train")
    assert (len(train), train.classes) == (2, ("x",))
    with pytest.raises(DataError, match=r"1 label\(s\) that were not there in training: 'y'"):
        TarSource(path, split="test", classes=train.classes)
    assert TarSource(path, split="train", classes=("y", "x")).labels([0]).tolist() == [1]
    with pytest.raises(DataError, match=r"no images of the split 'val'.*'train'"):
        TarSource(path, split="val")


def test_describe(ten):
    about = describe(ten)
    assert (about.members, about.images, about.classes) == (10, 10, {"c": 10})
    patch(ten, 3 * STRIDE, b"?")
    about = describe(ten)
    assert (about.images, about.classes) == (9, {"c": 9})
    json.dumps(about._asdict())
    assert about.damage[0]["word"] == "checksum"
