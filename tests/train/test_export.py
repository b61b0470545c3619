"""An exported predict function gives the same outputs, in a process that knows no model."""

import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

import jdl
from jdl.core import check
from jdl.data import from_arrays
from jdl.models import CNN, RNN
from jdl.models.cnn import Block
from jdl.train import export

pytest.importorskip("flatbuffers")


def images(n=10, batch_size=4):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    return from_arrays(pixels, np.arange(n, dtype=np.int32) % 3, batch_size=batch_size)


def trained(net):
    one = jax.devices()[:1]
    return jdl.classifier(net, "adam", devices=one).train(images(), steps=2)


@pytest.fixture(scope="module")
def cnn():
    return trained(CNN(num_classes=3, blocks=(Block(filters=4),), units=8))


RELOAD = """
import sys, jax, numpy as np
class Finder:  # no code of models, trainer aside from the reader
    def find_spec(self, name, path=None, target=None):
        assert not name.startswith(("flax", "optax", "jdl.models", "jdl.train.estimator")), name
sys.meta_path.insert(0, Finder())
from jdl.train.export import load_exported
predict = load_exported(sys.argv[1])
batch = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], np.asarray(predict(batch)))
print(predict.inputs)
"""


def test_another_process_gives_the_same_outputs(cnn, tmp_path):
    path = cnn.export(tmp_path / "cnn.jdl", images())
    (batch,) = images(n=7, batch_size=7).once()
    np.savez(tmp_path / "batch.npz", image=batch["image"])
    arguments = [path, tmp_path / "batch.npz", tmp_path / "outputs.npy"]
    command = [sys.executable, "-c", RELOAD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(None, 8, 8, 1)" in done.stdout
    expected = cnn.predict(images(n=7, batch_size=7))
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-6, atol=1e-6)


def test_any_batch_size_or_only_one(cnn, tmp_path):
    (batch,) = images(n=4).once()
    any_size = export.load_exported(cnn.export(tmp_path / "any", images()))
    for n in (1, 3):
        part = {name: x[:n] for name, x in batch.items()}
        assert any_size(part).shape == (n, 3)
    only = export.load_exported(cnn.export(tmp_path / "only", images(), any_batch_size=False))
    assert only(batch).shape == (4, 3)
    with pytest.raises(check.ArgumentError, match=r"must be uint8\[4, 8, 8, 1\]"):
        only({"image": batch["image"][:2]})
    with pytest.raises(check.ArgumentError, match="uint8"):
        any_size({"image": batch["image"].astype(np.float32)})


def test_a_scanned_model_is_exported_too(tmp_path):
    rnn = trained(RNN(num_outputs=3, hidden=8))
    found = export.load_exported(rnn.export(tmp_path / "rnn", images()))
    assert set(found.platforms) == set(export.PLATFORMS)
    (batch,) = images(n=4).once()
    np.testing.assert_allclose(found(batch), rnn.predict(images(n=4)), rtol=1e-6, atol=1e-6)


def test_damaged_files_are_refused_in_words(cnn, tmp_path):
    path = cnn.export(tmp_path / "whole", images())
    data = path.read_bytes()
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    (tmp_path / "other").write_bytes(b"words")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "less", "w") as less:
        for name in whole.namelist():
            less.writestr(name, whole.read(name)[:-4] if name == "leaf-00000" else whole.read(name))
    for name in ("half", "other", "less", "none"):
        with pytest.raises(check.DataError, match=name):
            export.load_exported(tmp_path / name)
