"""Labels from tables; regression targets; several classes for an image."""

import io
import json
import logging
import pickle
import tarfile

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

import jdl
from jdl import losses
from jdl.core.check import ArgumentError, DataError
from jdl.data import TarSource, from_tar
from jdl.data.targets import look_up, read_table


def png(value):
    out = io.BytesIO()
    Image.new("L", (4, 4), value).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def brightness(i):
    """Of image i, in [0, 1]."""
    return i * 5 % 256 / 255


def images(folder, n=24):
    return {f"{folder}/{i:02d}.png": png(i * 5 % 256) for i in range(n)}


# ---------------------------------------------------------------------- tables

SECOND = '{"path": "a/2.png", "l": "big dog"}'
WHOLE = {"a/1.png": "cat", "a/2.png": "big dog"}
ORDERED = {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("t.csv", "a/1.png,cat\na/2.png,big dog\n", WHOLE),
        ("t.csv", "name,label\r\n./a/1.png,cat\r\n\r\na//2.png, big dog \r\n", WHOLE),
        ("t.csv", "\ufeffbreed,Filename\ncat,a/1.png\nbig dog,a/2.png\n", WHOLE),
        ("t.TSV", "file\tlabel\na/1.png\tcat\na/2.png\tbig dog", WHOLE),
        ("t.csv:breed", 'image,age,breed\na/1.png,3,cat\na/2.png,4,"big dog"\n', WHOLE),
        ("t.csv:breed", "id,breed\na/1.png,cat\na/2.png,big dog\n", WHOLE),
        ("t.csv", 'path,x,y\n"a,1.png",3,-4e1\n', {"a,1.png": ["3", "-4e1"]}),
        ("t.json", json.dumps(WHOLE), WHOLE),
        ("t.json:k", json.dumps({"a/1.png": {"k": 3, "j": 1}, "a": {"k": [1, 2]}}), None),
        ("t.json", '[{"file": "a/1.png", "l": "cat"}, {"l": "big dog", "name": "a/2.png"}]', WHOLE),
        ("t.jsonl", f'{{"file_name": "a/1.png", "l": "cat"}}\n\n{SECOND}\n', WHOLE),
        ("t.json", '[{"name": "a", "x": 1, "y": 2}, {"y": 2, "x": 1, "name": "b"}]', ORDERED),
    ],
)  # fmt: skip
def test_tables_of_many_forms_are_read(file, content, expected, tmp_path):
    path = tmp_path / file.partition(":")[0]
    path.write_bytes(content.encode())
    found = read_table(str(tmp_path / file))
    assert found == ({"a/1.png": 3, "a": [1, 2]} if expected is None else expected)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("t.csv", b"a,1\na,2\n", "has two values for 'a'"),
        ("t.csv", b"./a,1\na,2\n", "has two values for 'a'"),
        ("t.json", b'{"a": 1, "a": 2}', "a name comes twice"),
        ("t.csv", b"name,label\na,1,2\n", "'a'.* has 3 columns instead of 2"),
        ("t.csv:age", b"name,label\na,1\n", "no column 'age', but 'name', 'label'"),
        ("t.csv", b"\xff\xfea", "cannot be read"),
        ("t.csv", b"a" * 200_000, "field larger"),
        ("t.json", b"{", "cannot be read"),
        ("t.json", b"[" * 5000, "cannot be read"),
        ("t.json", b"[1]", "cannot be read"),
        ("t.json", b'[{"x": 1}]', "has none of name, file"),
        ("t.json", b'[{"name": "a", "x": 1}, {"name": "b", "y": 1}]', "'y', instead of 'x'"),
        ("t.json", b'[{"name": "a", "x": 1}, {"name": "b", "x": 1, "y": 2}]', "instead of 'x'"),
        ("t.csv", b"name,x,x\na,1,2\n", "two columns have one name"),
        ("t.csv", b'name,x\na,"1\nb,2\n', "unexpected end of data"),
        ("t.csv", b'name,x\na,"1\nb,"2\n', "expected after"),
        ("t.json:k", b'{"a": {"j": 1}}', "cannot be read"),
        ("t.jsonl", b'{"name": 1}\n{', "cannot be read"),
        ("none.csv", None, "No such file"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error(file, content, words, tmp_path):
    if content is not None:
        (tmp_path / file.partition(":")[0]).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_table(str(tmp_path / file))
    with pytest.raises(ArgumentError, match=r"\.csv, \.tsv, \.json or \.jsonl"):
        read_table("labels.txt")


def test_a_value_that_is_not_finite_is_one_value(tmp_path):
    (tmp_path / "t.json").write_text('{"a": NaN}')
    assert np.isnan(read_table(tmp_path / "t.json")["a"])


def test_names_are_matched_by_one_rule_for_all():
    records = ["train/a.b/1.png", "train/2.png"]
    for entries in (
        ["train/a.b/1.png", "./train//2.png"],
        ["1.png", "2.png"],
        ["ds/train/a.b/1.png", "ds/train/2.png"],
        ["a.b/1", "2"],
        ["train/a.b/1", "train/2"],
        ["1", "2"],
    ):
        table = dict(zip(entries, "xy", strict=True)) | {"other.png": "z"}
        assert look_up(table, records, True) == ["x", "y"]
    for entries in (["1.png", "test/2.png"], ["train/a.b/1.png", "2"], ["train/1.png", "2.png"]):
        with pytest.raises(DataError, match="no entry for 1 of 2 records"):
            look_up(dict(zip(entries, "xyz", strict=False)), records, True)
    # Two records of one last part, and of one path in two archives.
    for twice, words in [
        (["a/1.png", "b/1.png"], "has no entry for 2 of 2 records"),
        (["1.png", "1.png"], "does not tell the records apart"),
    ]:
        with pytest.raises(DataError, match=words):
            look_up({"1.png": "x"}, twice, True)
    assert look_up({"1.png": "x", "test/1.png": "y"}, ["train/1.png"], True) == ["x"]
    with pytest.raises(DataError, match=r"'1\.png', names no class, but 1.5"):
        look_up({"1.png": 1.5}, ["1.png"], True)


def test_classes_from_a_table(tmp_path, caplog):
    names = images("train") | {f"test/{i}.png": png(i) for i in range(30, 36)}
    path = write_tar(tmp_path / "a.tar", names)
    lines = [f"{name},{'odd' if i % 2 else 'even'}" for i, name in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    options = {"labels": str(tmp_path / "t.csv"), "batch_size": 8}
    with caplog.at_level(logging.INFO):
        train = from_tar(path, split="train", **options)
    assert "6 of 30 entries are of no record" in caplog.text
    assert train.classes == ("even", "odd")
    found = np.concatenate([batch["label"] for batch in train])
    assert found.dtype == np.int32
    assert found.tolist() == [0, 1] * 12
    parts = [from_tar(path, split=f"{part}:0.3", **options) for part in ("train", "test")]
    for part in parts:
        for i in range(part.num_records):
            record = part.source[i]
            assert record.label == list(names).index(record.name) % 2
    assert sum(part.num_records for part in parts) == 30
    with pytest.raises(DataError, match="not there in training: 'odd'"):
        from_tar(path, classes=["even"], **options)
    with pytest.raises(DataError, match=r"no entry for 23 of 30 records, such as 'train/01\.png'"):
        from_tar(
            path, **options | {"labels": {"00.png": 1} | {f"{i}.png": 1 for i in range(30, 36)}}
        )
    for wrong in ({"label": "cls"}, {"label": None}, {"target": "numbr"}):
        with pytest.raises(ArgumentError, match=f"`{next(iter(wrong))}`"):
            from_tar(path, **options, **wrong)


# ---------------------------------------------------------------------- numbers


class Linear(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x, *, train=False):
        y = nn.Dense(self.outputs)(x.reshape(x.shape[0], -1))
        return y[:, 0] if self.outputs == 1 else y


def trained(data, outputs, loss, steps=300):
    model = jdl.from_linen(Linear(outputs))
    estimator = jdl.Estimator(model, loss, optax.adam(0.02))
    estimator.train(data.repeat(), steps=steps)
    return estimator.evaluate(data.once())["loss"]


def test_a_regression_on_numbers_of_a_table(tmp_path):
    path = write_tar(tmp_path / "a.tar", images("c", 30))
    table = {f"{i:02d}": 3 * brightness(i) - 1 for i in range(30)}
    data = from_tar(path, labels=table, target="number", batch_size=8, grayscale=True)
    assert data.classes is None
    assert data.element_spec["label"] == jax.ShapeDtypeStruct((8,), np.float32)
    batches = list(data)
    assert batches[-1]["mask"].tolist() == [1] * 6 + [0] * 2
    found = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(found, np.float32([*table.values(), 0, 0]))
    assert isinstance(data.source[3].label, np.floating)
    again = pickle.loads(pickle.dumps(data.source))  # as worker processes get it
    np.testing.assert_array_equal(again.labels(np.arange(30)), found[:30])
    test = from_tar(path, labels=table, target="number", split="test:0.3", batch_size=8)
    names = [test.source.name(i) for i in range(test.num_records)]
    expected = np.float32([table[name[2:4]] for name in names])
    np.testing.assert_array_equal(test.source.labels(np.arange(len(names))), expected)
    assert trained(data, 1, losses.squared_error) < 0.01  # the targets' variance / 2 is 0.25


def test_a_regression_on_vectors_of_sidecars_and_columns(tmp_path):
    members = {}
    for name, data in images("c").items():
        i = int(name[2:4])
        members[name] = data
        members[name.replace(".png", ".json")] = json.dumps({"at": [brightness(i), 1]}).encode()
    path = write_tar(tmp_path / "a.tar", members)
    options = {"target": "number", "batch_size": 8, "grayscale": True}
    data = from_tar(path, label="json:at", **options)
    assert data.element_spec["label"].shape == (8, 2)
    expected = np.float32([[brightness(i), 1] for i in range(24)])
    found = np.concatenate([batch["label"] for batch in data])
    np.testing.assert_array_equal(found, expected)
    lines = [f"{i:02d}.png,{brightness(i)!r},1" for i in range(24)]
    (tmp_path / "t.csv").write_text("\n".join(["image,x,y", *lines]))
    table = from_tar(path, labels=tmp_path / "t.csv", **options)
    np.testing.assert_array_equal(table.source.labels(np.arange(24)), expected)
    x = from_tar(path, labels=f"{tmp_path / 't.csv'}:x", **options)
    np.testing.assert_array_equal(x.source.labels(np.arange(24)), expected[:, 0])
    names = from_tar(path, label=lambda name: name[2:4], **options)
    assert names.source.labels(np.arange(24)).tolist() == list(range(24))
    assert trained(data, 2, losses.squared_error) < 0.01


@pytest.mark.parametrize(
    "wrong",
    ["x", "", "nan", float("inf"), "1e999", 10**400, None, [1.0], [], {}, [[1]]],
    ids=lambda wrong: repr(wrong)[:9],
)
def test_a_target_that_is_no_number_is_named(wrong, tmp_path):
    path = write_tar(tmp_path / "a.tar", images("c", 3))
    with pytest.raises(DataError, match=r"'c/01\.png' must have a finite number as its target"):
        TarSource(path, labels={"00": 1, "01": wrong, "02": 2}, target="number")
    if wrong == "x":
        for vectors in ([[1, 2], "34"], [[1, 2], [3]], [[1, 2], 3], [(1, 2), "34"]):
            table = dict(zip(["00", "01"], vectors, strict=True)) | {"02": np.array([1, 2])}
            with pytest.raises(DataError, match=r"'c/01\.png' must have 2 finite numbers"):
                TarSource(path, labels=table, target="number")
        table |= {"01": (3, np.float32(4))}
        labels = TarSource(path, labels=table, target="number").labels([0, 1, 2])
        assert labels.tolist() == [[1, 2], [3, 4], [1, 2]]
    table = {"00": [1], "01": [1, 2] if wrong == [1.0] else wrong, "02": [2]}
    with pytest.raises(DataError, match=r"'c/01\.png' must have 1 finite numbers"):
        TarSource(path, labels=table, target="number")


# ---------------------------------------------------------------------- several classes


def test_several_classes_for_an_image(tmp_path):
    names = [["a"] * (i % 2) + ["bc"] * (i % 3 == 0) + ["d"] * (i > 20) for i in range(24)]
    members = {}
    for (name, data), of in zip(images("c").items(), names, strict=True):
        members[name] = data
        members[name.replace(".png", ".json")] = json.dumps({"tags": of}).encode()
    path = write_tar(tmp_path / "a.tar", members)
    lines = [f"{i:02d}.png,{'|'.join(of)}" for i, of in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    options = {"target": "multilabel", "batch_size": 8, "grayscale": True}
    table = from_tar(path, labels=f"{tmp_path / 't.csv'}", **options)
    binarizer = MultiLabelBinarizer()
    expected = binarizer.fit_transform(names)
    for data in (table, from_tar(path, label="json:tags", **options)):
        assert data.classes == tuple(binarizer.classes_) == ("a", "bc", "d")
        assert data.element_spec["label"] == jax.ShapeDtypeStruct((8, 3), np.float32)
        found = np.concatenate([batch["label"] for batch in data])
        np.testing.assert_array_equal(found, expected)
    assert table.source.count_classes() == {"a": 12, "bc": 8, "d": 3}
    assert table.source[9].label.tolist() == [1, 1, 0]
    more = from_tar(path, label="json:tags", classes=[*"xabcd", "bc"], **options)
    assert more.source.labels([9]).tolist() == [[0, 1, 0, 0, 0, 1]]
    with pytest.raises(DataError, match="not there in training: 'd'"):
        from_tar(path, label="json:tags", classes=["a", "bc"], **options)
    chance = trained(data, 3, losses.sigmoid_cross_entropy, steps=1)
    assert trained(data, 3, losses.sigmoid_cross_entropy) < 0.8 * chance
    for wrong in (3, {"a": 1}, [1.5], None):
        with pytest.raises(DataError, match=r"'c/00\.png'"):
            TarSource(path, labels={f"{i:02d}": wrong for i in range(24)}, target="multilabel")


def test_an_image_whose_target_cannot_be_read_is_skipped_in_several_archives(tmp_path):
    paths = []
    for archive, bad in (("a", b"{"), ("b", b"[]")):
        members = {}
        for i in range(5):
            members[f"c/{i}.png"] = png(i)
            members[f"c/{i}.json"] = b'{"at": [%d, 0.5], "tags": ["t%d"]}' % (i, i % 2)
        paths.append(write_tar(tmp_path / f"{archive}.tar", members | {"c/3.json": bad}))
    options = {"batch_size": 10, "max_skipped": 0.5, "grayscale": True}
    with pytest.raises(DataError, match=r"a\.tar', member 'c/3\.json'"):
        from_tar(paths, label="json:at", target="number", **options)
    for label, target, expected in [
        ("json:at", "number", [[i, 0.5] for i in (0, 1, 2, 4)]),
        ("json:tags", "multilabel", [[1 - i % 2, i % 2] for i in (0, 1, 2, 4)]),
    ]:
        data = from_tar(paths, label=label, target=target, on_error="skip", **options)
        (batch,) = data
        assert batch["mask"].tolist() == [1, 1, 1, 0, 1] * 2
        assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 0, 4] * 2
        assert batch["label"][batch["mask"] > 0].tolist() == expected * 2
