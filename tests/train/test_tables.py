"""Streamed tables, read back by numpy, csv and json."""

import csv
import json
import tracemalloc

import numpy as np
import pytest

from jdl.core import check
from jdl.train.tables import open_table


def blocks(numbers=(3, 1, 400)):  # names enough for several chunks
    rng = np.random.default_rng(0)
    at = 0
    for n in numbers:
        yield {
            "name": [f'a/é{"x" * (at + i)}, "{at + i}".png' for i in range(n)],
            "number": np.arange(at, at + n, dtype=np.int32),
            "image": rng.normal(size=(n, 2, 3)).astype(np.float32),
        }
        at += n


def write(path, parts):
    with open_table(path) as table:
        for part in parts:
            table.write(part)


def whole():
    parts = list(blocks())
    names = [name for part in parts for name in part["name"]]
    return names, *(np.concatenate([p[k] for p in parts]) for k in ("number", "image"))


def test_npz_is_read_by_numpy_without_pickle(tmp_path):
    write(tmp_path / "t.npz", blocks())
    names, numbers, images = whole()
    with np.load(tmp_path / "t.npz", allow_pickle=False) as found:
        assert sorted(found) == ["image", "name", "number"]
        assert found["name"].tolist() == names
        assert found["number"].dtype == np.int32
        np.testing.assert_array_equal(found["number"], numbers)
        np.testing.assert_array_equal(found["image"], images)


def test_jsonl_and_csv_hold_the_same_numbers(tmp_path):
    write(tmp_path / "t.jsonl", blocks())
    write(tmp_path / "t.csv", blocks())
    names, numbers, images = whole()
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == names
    np.testing.assert_array_equal(np.float32([row["image"] for row in rows]), images)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == names
    assert [int(line["number"]) for line in lines] == numbers.tolist()
    flat = [[line[f"image_{i}"] for i in range(6)] for line in lines]
    np.testing.assert_array_equal(np.float32(flat), images.reshape(-1, 6))


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    write(tmp_path / "t.jsonl", [{"x": np.array([np.nan, 1.0]), "y": np.array([[np.inf], [2.0]])}])
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert rows == [{"x": None, "y": [None]}, {"x": 1.0, "y": [2.0]}]


@pytest.mark.parametrize("suffix", ["npz", "jsonl", "csv"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    path.write_text("old")

    def broken():
        yield next(blocks())
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write(path, broken())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["npz", "jsonl", "csv"])
def test_memory_does_not_grow_with_the_rows(tmp_path, suffix):
    block = {"name": ["n" * 20] * 64, "code": np.ones((64, 32), np.float32)}

    def peak(times):
        tracemalloc.start()
        write(tmp_path / f"t.{suffix}", (block for _ in range(times)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)
    assert peak(80) < peak(8) + 150_000  # ten times the rows are 0.6 MB more


def test_other_suffixes_and_shapes_are_refused(tmp_path):
    with pytest.raises(check.ArgumentError, match=r"ends in \.npz"):
        write(tmp_path / "t.pickle", [])
    parts = [{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}]
    with pytest.raises(check.ArgumentError, match="rows of"):
        write(tmp_path / "t.npz", parts)
