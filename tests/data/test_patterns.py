"""Which members are records: patterns, what is left out by default, splits by folder."""

import io
import itertools
import logging
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from jdl.core.check import ArgumentError, DataError
from jdl.data import LITTER, TarSource, describe, from_tar, pipeline, splits
from jdl.data.choice import Patterns
from jdl.data.stdin import standard_input

PNG = io.BytesIO()
Image.new("L", (4, 4), 7).save(PNG, "PNG")


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG.getvalue())
            tar.addfile(info, io.BytesIO(PNG.getvalue()))
    return str(path)


def names_of(source):
    return [source.name(i) for i in range(len(source))]


# ---------------------------------------------------------------------- patterns

NAMES = [
    "a.png",
    ".a.png",
    "train/a.png",
    "train/.hidden/a.png",
    "train/cats/a.seg.png",
    "train/cats/b.png",
    "x/train/cats/b.png",
    "x/y/train/b.png",
    "masks/a.png",
    "masks",
    "ab/masks.png",
    "a-1.png",
    "a-12.png",
    "[1].png",
    "train/d^g.png",
    "préview/éé.png",
]
PATTERNS = [
    *(
        ".*",
        "*.seg.*",
        "*.png",
        "masks",
        "masks/",
        "/masks/",
        "train",
        "/train",
        "train/",
        "train/*",
    ),
    *("train/*.png", "*/train", "**/train", "train/**", "**/cats/*.png", "x/**/b.png", "/a*", "/*"),
    *("a-?.png", "a-[0-9].png", "[!t]*.png", "[^a]*", "*/*/*/*", "?.png", "pr*/", "é*", "d^?.png"),
    *("*", "**", "cats/*", "/.*", "a-1*.png", "a.png", "b.png", "/b.png", "*.seg.*/"),
]


def test_patterns_match_what_git_ignores_by_them(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    members = [name for name in NAMES if name != "masks"]
    index = TarSource(write_tar(tmp_path / "a.tar", members), exclude=()).indexes[0]
    for pattern in PATTERNS:
        (tmp_path / ".gitignore").write_text(pattern + "\n")
        command = ["git", "-c", "core.quotePath=false", "check-ignore", "--no-index", "--stdin"]
        asked = "\n".join(NAMES)
        done = subprocess.run(
            command, cwd=tmp_path, input=asked, capture_output=True, text=True, check=False
        )
        ignored = done.stdout.splitlines()
        patterns = Patterns(None, (pattern,))
        assert [name for name in NAMES if patterns.refuses(name)] == ignored, pattern
        # From an index, where folders are judged once and most names by a looser expression.
        wanted, out = patterns.images(index)
        found = [name for name, used in zip(members, wanted.tolist(), strict=True) if not used]
        assert found == [name for name in ignored if name != "masks"], pattern
        assert out.total() == len(found)


def test_a_bad_pattern_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", ["c/a.png"])
    wrong = [("include", ""), ("exclude", "!"), ("include", "a**b"), ("exclude", "[z-a]")]
    for argument, pattern in [*wrong, ("include", ["*.png", "!a.png"])]:
        with pytest.raises(ArgumentError, match=f"`{argument}`"):
            TarSource(path, **{argument: pattern})
    with pytest.raises(ArgumentError, match=r"Did you mean '\*\.mask\.\*'"):
        TarSource(path, exclude="!*.mask")


# ---------------------------------------------------------------------- what is left out

LEFT_OUT = {
    ".*": ["train/cat/.ipynb_checkpoints/a-checkpoint.png", ".preview.png", "train/cat/.1.png"],
    "@eaDir/": ["train/cat/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg"],
    "__MACOSX/": ["__MACOSX/train/cat/a.png"],
    "#recycle/": ["#recycle/cat/a.png"],
    "$RECYCLE.BIN/": ["$RECYCLE.BIN/R1.png"],
    "lost+found/": ["lost+found/1.png"],
    "*.seg.*": ["train/cat/a.seg.png"],
    "*.mask.*": ["train/cat/a.mask.png"],
    "/preview.*": ["preview.png"],
    "/thumbnail.*": ["thumbnail.jpg"],
}
KEPT = ["train/cat/a.png", "train/dog/preview.png", "train/dog/b.left.png", "../up/x.png"]
ALL = [*KEPT[:1], *itertools.chain(*LEFT_OUT.values()), *KEPT[1:]]


@pytest.fixture
def littered(tmp_path):
    assert set(LEFT_OUT) == set(LITTER)
    return write_tar(tmp_path / "littered.tar", ALL)


def test_litter_is_left_out_and_told_once(littered, caplog):
    source = TarSource(littered)
    assert names_of(source) == KEPT
    assert source.classes == ("cat", "dog", "up")
    assert source.left_out == {pattern: len(names) for pattern, names in LEFT_OUT.items()}
    about = describe(littered)
    assert about.left_out == source.left_out
    assert (about.images, about.classes) == (len(ALL), {"cat": 1, "dog": 2, "up": 1})
    pipeline._told.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert from_tar(littered, batch_size=2).num_records == 4
    (record,) = caplog.records
    assert "littered.tar': 1 by '#recycle/'" in record.getMessage()
    assert "3 by '.*'" in record.getMessage()
    assert "exclude='!PATTERN' takes a pattern back" in record.getMessage()


def test_what_is_left_out_can_be_kept(littered):
    assert names_of(TarSource(littered, exclude=())) == ALL
    for pattern, names in LEFT_OUT.items():
        found = names_of(TarSource(littered, exclude=f"!{pattern}"))
        assert found == [name for name in ALL if name in (*KEPT, *names)]
    more = TarSource(littered, exclude=["*.left.*"])  # besides the defaults
    assert names_of(more) == [name for name in KEPT if "left" not in name]
    only = TarSource(littered, include=["train/dog/", "x.png"])
    assert names_of(only) == KEPT[1:]
    assert only.left_out["include"] == 1
    with pytest.raises(DataError, match=r"all its images are left out, .*4 by 'include'"):
        TarSource(littered, include="nowhere/")


def test_litter_is_left_out_of_standard_input(littered, monkeypatch, caplog):
    options = {"size": (4, 4), "batch_size": 2, "classes": ("cat", "dog", "up"), "threads": 1}

    def labels(**more):
        with open(littered, "rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            descriptor = os.dup(0)
            os.dup2(file.fileno(), 0)
            try:
                batches = list(standard_input(**options, **more))
            finally:
                os.dup2(descriptor, 0)
        return np.concatenate([b["label"][b["mask"] > 0] for b in batches]).tolist()

    assert labels() == [0, 1, 1, 2]
    assert "left out of standard input: 1 by '#recycle/'" in caplog.text
    assert labels(include="dog/") == [1, 1]
    function = {"label": lambda name: "dog" if "dog" in name else None}
    assert labels(**function) == [1, 1]
    assert "2 by 'label'" in caplog.text
    assert labels(split="train/dog") == [1, 1]
    with pytest.raises(DataError, match=r"no images: all are left out, .*4 by 'include'"):
        labels(include="nowhere")
    with pytest.raises(DataError, match=r"Paths begin with: 'train', '\.\.'"):
        labels(split="rain")


def test_a_label_function_leaves_records_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", [f"{c}/{i}.png" for i in range(4) for c in "ab"])
    label = lambda name: name[0] if "2" not in name else None  # noqa: E731
    for source in (TarSource(path, label=label), from_tar(path, label=label, batch_size=2).source):
        assert names_of(source) == [f"{c}/{i}.png" for i in (0, 1, 3) for c in "ab"]
        assert source.labels(np.arange(6)).tolist() == [0, 1] * 3
        assert source.left_out == {"label": 2}
        assert source.unlabelled() is None
    assert describe(path, label=label).classes == {"a": 3, "b": 3}
    with pytest.raises(DataError, match="all its images are left out, 8 by 'label'"):
        TarSource(path, label=lambda name: None)


# ---------------------------------------------------------------------- splits by folder


@pytest.mark.parametrize("top", ["", "ds/", "./repo-main/", "/data//sets/"])
def test_a_split_is_any_folder(top, tmp_path):
    members = [f"{top}{part}/{c}/{i}.png" for part in ("train", "test") for c in "ab" for i in "01"]
    path = write_tar(tmp_path / "a.tar", [*members, f"{top}training/a/1.png", f"{top}readme.png"])
    plain = top.replace("./", "").replace("//", "/").strip("/")
    for split in (f"{top}train", f"{top}train/", f"{top}train/a"):
        found = names_of(TarSource(path, split=split))
        assert len(found) == (2 if split.endswith("a") else 4)
        assert all(name.startswith(f"{plain}/train/".lstrip("/")) for name in found)
    with pytest.raises(DataError, match=r"No path begins with that folder. Paths begin with: '"):
        TarSource(path, split="trai")
    if plain.count("/"):
        return
    assert names_of(TarSource(path, split="test")) == names_of(TarSource(path, split=f"{top}test"))
    assert splits(path) == ("train", "test")
    prefix = f"{plain}/" if plain else ""
    counts = {f"{prefix}test": 4, f"{prefix}train": 4, f"{prefix}training": 1}
    assert describe(path).splits == counts | ({plain: 1} if plain else {})


def test_a_top_folder_is_skipped_only_if_it_is_the_only_one(tmp_path):
    path = write_tar(tmp_path / "a.tar", ["x/train/1.png", "y/train/1.png", "x/test/1.png"])
    with pytest.raises(DataError, match=r"Paths begin with: 'x', 'y'"):
        TarSource(path, split="train")
    assert splits(path) == ()
    litter = ["x/train/1.png", "__MACOSX/x/train/1.png", "x/test/1.png", "preview.png"]
    path = write_tar(tmp_path / "b.tar", litter)
    assert splits(path) == ("train", "test")
    assert splits(path, exclude=()) == ()
    assert splits(path, exclude="test/") == ("train",)
    # A first folder of that name has precedence.
    path = write_tar(tmp_path / "c.tar", ["train/train/1.png", "train/2/1.png"])
    assert len(TarSource(path, split="train")) == 2
