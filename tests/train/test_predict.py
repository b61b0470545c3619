"""Predictions by name, in constant memory, past what cannot be read; exact sums on remainders."""

import io
import json
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

import jdl
from jdl import metrics
from jdl.core import check
from jdl.data import from_arrays, from_tar
from jdl.models import MLP
from jdl.train.predict import predictions, write_predictions

ONE = jax.devices()[:1]
CLASSES = ("cat", "dog", "owl")


def write_tar(path, n=23, bad=()):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in range(n):
            data = io.BytesIO(b"no image" * 9)
            if i not in bad:
                data = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (6, 5), dtype=np.uint8)).save(data, "PNG")
            info = tarfile.TarInfo(f"{CLASSES[i % 3]}/{i:02d}.png")
            info.size = len(data.getvalue())
            data.seek(0)
            archive.addfile(info, data)
    return path


def images(path, **options):
    return from_tar(path, grayscale=True, size=(6, 5), batch_size=8, threads=0, **options)


@pytest.fixture
def classifier(tmp_path):
    data = images(write_tar(tmp_path / "whole.tar"))
    net = MLP(num_outputs=3, widths=(8,), dropout=0.0)
    return jdl.classifier(net, "adam", devices=ONE).train(data, steps=3)


def test_every_readable_record_is_named_and_in_order(classifier, tmp_path):
    bad = (1, 8, 22)
    damaged = images(write_tar(tmp_path / "bad.tar", bad=bad), on_error="skip", max_skipped=0.5)
    found = list(predictions(classifier, damaged))
    names = [name for part in found for name in part.names]
    assert names == [f"{CLASSES[i % 3]}/{i:02d}.png" for i in range(23) if i not in bad]
    whole = classifier.predict(images(tmp_path / "whole.tar"))
    outputs = np.concatenate([part.outputs for part in found])
    # The pixels of the readable ones were drawn in another order, so compare by their own.
    again = classifier.predict(
        from_arrays(np.concatenate([p.batch["image"] for p in found]), batch_size=20)
    )
    np.testing.assert_allclose(outputs, again, rtol=1e-5, atol=1e-6)
    assert whole.shape == (23, 3)


def test_an_unreadable_record_ends_it_otherwise_and_leaves_no_file(classifier, tmp_path):
    damaged = images(write_tar(tmp_path / "bad.tar", bad=(9,)))
    with pytest.raises(check.DataError, match=r"owl/09|cat/09"):
        write_predictions(tmp_path / "p.npz", classifier, damaged)
    assert not (tmp_path / "p.npz").exists()


@pytest.mark.parametrize("suffix", ["npz", "jsonl", "csv"])
def test_files_hold_what_predict_gives(classifier, tmp_path, suffix):
    data = images(tmp_path / "whole.tar")
    path = tmp_path / f"p.{suffix}"
    assert write_predictions(path, classifier, data) == 23
    expected = classifier.predict(data)
    if suffix == "npz":
        with np.load(path) as found:
            np.testing.assert_array_equal(found["output"], expected)
            assert found["name"][4] == "dog/04.png"
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        np.testing.assert_array_equal(np.float32([row["output"] for row in rows]), expected)
    else:
        lines = path.read_text().splitlines()
        assert lines[0] == "name,output_0,output_1,output_2"
        np.testing.assert_array_equal(np.float32(lines[5].split(",")[1:]), expected[4])


def test_data_without_names_is_numbered_and_pytrees_are_spread(tmp_path):
    def both(params, model_state, batch):
        del params, model_state
        return {"sum": batch["image"].sum(axis=(1, 2)), "rows": batch["image"].sum(axis=2)}

    x = np.random.default_rng(0).normal(size=(11, 4, 3)).astype(np.float32)
    data = from_arrays(x, np.zeros(11, np.int32), batch_size=4)
    net = MLP(num_outputs=2, widths=(4,))
    estimator = jdl.classifier(net, "adam", devices=ONE).initialize(data)
    estimator.predict_by(both, inputs=("image",))
    write_predictions(tmp_path / "p.npz", estimator, data)
    with np.load(tmp_path / "p.npz") as found:
        assert found["name"].tolist() == [str(i) for i in range(11)]
        np.testing.assert_allclose(found["sum"], x.sum((1, 2)), rtol=1e-4, atol=1e-5)
        assert found["rows"].shape == (11, 4)


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 2), (7, 1), (64, 2)])
def test_confusion_is_exact_on_remainders(batch_size, devices):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(45, 5)).astype(np.float32), rng.integers(0, 3, 45).astype(np.int32)
    data = from_arrays(x, y, batch_size=batch_size)
    devices = jax.devices()[:devices]
    estimator = jdl.classifier(MLP(num_outputs=3, widths=(8,)), "adam", devices=devices)
    estimator.train(data, steps=4)
    found = estimator.evaluate(data, sums={"confusion": metrics.confusion_matrix})
    expected = sk.confusion_matrix(y, estimator.predict(data).argmax(1), labels=range(3))
    np.testing.assert_array_equal(found["confusion"], expected)
    assert found["accuracy"] == pytest.approx(np.trace(expected) / 45, abs=1e-6)
    assert set(found) == {"loss", "accuracy", "confusion"}


def test_sums_share_the_forward_pass():
    data = from_arrays(np.ones((8, 64), np.float32), np.zeros(8, np.int32), batch_size=8)
    estimator = jdl.classifier(MLP(num_outputs=3, widths=(256,)), "adam", devices=ONE)
    estimator.initialize(data)
    (batch,) = data.once()

    def cost(sums):
        evaluate = estimator._evaluator.compiled(sums)
        state = estimator.state
        compiled = evaluate.lower(state.params, state.model_state, batch).compile()
        return compiled.cost_analysis()["flops"]

    assert cost({"confusion": metrics.confusion_matrix}) < 1.1 * cost({})


def test_names_already_taken_are_refused():
    data = from_arrays(np.ones((8, 4), np.float32), np.zeros(8, np.int32), batch_size=8)
    estimator = jdl.classifier(MLP(num_outputs=3, widths=(4,)), "adam", devices=ONE)
    estimator.initialize(data)
    with pytest.raises(check.ArgumentError, match="accuracy"):
        estimator.evaluate(data, sums={"accuracy": metrics.confusion_matrix})


def test_an_evaluation_leaves_the_log_of_a_running_training_alone(tmp_path):
    data = from_arrays(np.ones((8, 4), np.float32), np.zeros(8, np.int32), batch_size=8)
    net = MLP(num_outputs=3, widths=(4,))
    make = lambda: jdl.classifier(net, "adam", devices=ONE, workdir=tmp_path, log_every=1)  # noqa: E731
    make().train(data, steps=2)
    log = tmp_path / "metrics.jsonl"
    with log.open("a") as file:  # what another process has trained since its last checkpoint
        file.write('{"step": 3, "split": "train", "loss": 1.0}\n')
    make().evaluate(data)
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [1, 2, 3, 2]
    make().train(data, steps=1)
    rows = [json.loads(x) for x in log.read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3]
    assert rows[-1]["seconds"] > 0
