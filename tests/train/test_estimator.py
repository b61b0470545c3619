"""Training that goes on, resumes, evaluates exactly, and refuses what it must."""

import contextlib
import errno
import inspect
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import losses
from jdl.core import check
from jdl.data import from_arrays
from jdl.models import MLP
from jdl.optim import lbfgs
from jdl.train import estimator as estimators
from jdl.train.parallel import placement
from jdl.train.step import build


def data(batch_size=16, epochs=None, n=70):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    return from_arrays(
        x, np.argmax(x[:, :3], 1).astype(np.int32), batch_size=batch_size, epochs=epochs
    )


def make(optimizer, width=8, **options):
    net = MLP(widths=(width,), num_outputs=3, dropout=0.2)
    return jdl.classifier(net, optimizer, devices=jax.devices()[:1], **options)


@pytest.mark.parametrize("optimizer", [lambda: optax.adam(0.01), lambda: lbfgs()])
def test_resumed_equals_uninterrupted_bit_for_bit(optimizer, tmp_path):
    whole = make(optimizer()).train(data(), steps=11)
    make(optimizer(), workdir=tmp_path).train(data(), steps=5)
    resumed = make(optimizer(), workdir=tmp_path).train(data(), max_steps=11)
    assert resumed.step == 11
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))


def test_evaluation_counts_every_example_once():
    estimator = make("adam").train(data(), steps=3)
    found = estimator.evaluate(data(batch_size=16))
    logits = estimator.predict(data(batch_size=32))
    assert logits.shape == (70, 3)
    labels = data(batch_size=70, epochs=1)
    (batch,) = list(labels.once())
    expected = np.mean(np.argmax(logits, 1) == batch["label"])
    assert found["accuracy"] == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    make("adam", workdir=tmp_path).train(data(), steps=2)
    with pytest.raises(check.DataError, match=r"Dense_0.*kernel.* was float32\[6, 8\]"):
        make("adam", width=9, workdir=tmp_path).train(data(), steps=2)


def test_looking_for_a_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(check.UserError, match="holds no checkpoint: train first"):
        make("adam", workdir=tmp_path).evaluate(data())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("state/_sharding", 40),
        ("state/_METADATA", 0),
        ("meta/metadata", 0),
        ("state/manifest.ocdbt", 20),
        ("state/d/*", 100),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's reading
def test_a_damaged_checkpoint_is_left_out_and_told(file, kept, tmp_path, caplog):
    whole = make("adam").train(data(), steps=9)
    make("adam", workdir=tmp_path, save_every=3).train(data(), steps=6)
    newest = tmp_path / "checkpoints" / "6"
    for path in newest.glob(file):
        path.write_bytes(path.read_bytes()[:kept])
    reader = make("adam", workdir=tmp_path)
    reader.evaluate(data(epochs=1))
    assert reader.step == 3
    told = caplog.messages[-1]
    assert "step 6 cannot be read" in told
    assert "that of step 3 is taken instead" in told
    assert f"rm -r {newest}" in told
    assert newest.is_dir()  # who only reads changes nothing
    resumed = make("adam", workdir=tmp_path, save_every=3).train(data(), max_steps=9)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    names = {path.name for path in newest.parent.iterdir()}
    assert names == {"3", "6", "9", "damaged-6"}
    assert make("adam", workdir=tmp_path).train(data(), max_steps=9).step == 9


def test_where_no_checkpoint_can_be_read_nothing_begins_anew_by_itself(tmp_path):
    make("adam", workdir=tmp_path).train(data(), steps=2)
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_bytes(b"")
    with pytest.raises(check.DataError, match=r"can be read .step 2: .*To begin anew, remove"):
        make("adam", workdir=tmp_path).train(data(), steps=2)


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_called_damaged(tmp_path, monkeypatch):
    make("adam", workdir=tmp_path, save_every=3).train(data(), steps=6)

    def away(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("jdl.train.checkpoint.Checkpoints._read", away)
        with pytest.raises(OSError, match="Input/output"):
            make("adam", workdir=tmp_path).train(data(), steps=1)
    assert make("adam", workdir=tmp_path).train(data(), steps=1).step == 7
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "6", "7"}


def test_an_estimator_that_only_reads_makes_no_file(tmp_path):
    make("adam", workdir=tmp_path, keep_best=("accuracy", "max")).train(
        data(), steps=2, validation=data(epochs=1), validate_every=1
    )

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = files()
    reader = make("adam", workdir=tmp_path)
    reader.predict(data(epochs=1))
    make("adam", workdir=tmp_path).restore_best(data())
    make("adam", workdir=tmp_path).initialize(data())
    assert files() == before
    make("adam", workdir=tmp_path / "none", logs=("csv", "tensorboard"))
    assert not (tmp_path / "none").exists()


def test_an_evaluation_that_cannot_be_logged_is_told_and_given(tmp_path, monkeypatch, caplog):
    make("adam", workdir=tmp_path).train(data(), steps=2)
    log = (tmp_path / "metrics.jsonl").read_bytes()

    def refused(*_):
        raise PermissionError(13, "Permission denied", "metrics.jsonl")

    monkeypatch.setattr("jdl.train.writers.JsonlWriter.write", refused)
    assert make("adam", workdir=tmp_path).evaluate(data(epochs=1))["loss"] > 0
    assert "the evaluation is not logged" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    with pytest.raises(PermissionError):  # a training without its log is refused
        make("adam", workdir=tmp_path).train(data(), steps=2)


def test_what_is_being_written_survives_the_next_estimator(tmp_path):
    def fail(row):
        if row["step"] == 5:
            raise RuntimeError("a fault in a hook")

    for end in (10, 20, 30):
        estimator = make("adam", 512, workdir=tmp_path, save_every=4, log_every=1, hooks=[fail])
        with contextlib.suppress(RuntimeError):
            estimator.train(data(), max_steps=end)
        assert make("adam", 512, workdir=tmp_path).initialize(data()).step >= 4
        assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    make("sgd", workdir=tmp_path).train(data(), steps=4)
    estimator = make(optax.sgd(np.nan), workdir=tmp_path / "other", log_every=1)
    with pytest.raises(check.TrainingError, match="loss is nan at step 2"):
        estimator.train(data(), steps=9)
    assert make("sgd", workdir=tmp_path).train(data(), steps=1).step == 5


def test_batches_that_change_shape_are_refused():
    (one,) = list(data(batch_size=70, epochs=1))
    two = one | {"label": one["label"].astype(np.float32)}
    told = r"differs from the first.*Only the number of examples"
    with pytest.raises(check.DataError, match=told):
        make("sgd").train([one, two])


def test_parameters_handed_out_survive_further_training():
    estimator = make("sgd").train(data(), steps=1)
    before = estimator.params
    kept = jax.tree.map(np.array, before)
    estimator.train(data(), steps=2)
    jax.tree.map(np.testing.assert_array_equal, before, kept)


def test_double_precision_arrays_train_as_single_ones():
    (one,) = list(data(batch_size=70, epochs=1))
    wide = {"image": one["image"].astype(np.float64), "label": one["label"].astype(np.int64)}
    found = [make("sgd").train([batch] * 3).params for batch in (one, wide)]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_finished_run_started_again_tells_nothing_twice(tmp_path):
    for _ in range(2):
        run = make("adam", workdir=tmp_path, log_every=1).train(data(), max_steps=3)
        run.evaluate(data(), name="test")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    told = [(row["step"], row["split"]) for row in map(json.loads, lines)]
    assert told == [(1, "train"), (2, "train"), (3, "train"), (3, "test")]


def test_every_so_many_checkpoints_are_kept_for_good(tmp_path):
    make("adam", workdir=tmp_path, save_every=2, keep=1, keep_every=4).train(data(), max_steps=10)
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {4, 8, 10}


def test_data_without_an_end_wants_a_limit():
    with pytest.raises(check.ArgumentError, match="`steps` must be given for data without an end"):
        make("sgd").train(data())
    assert make("sgd").train(data(epochs=2)).step == 10
    with pytest.raises(check.ArgumentError, match="`validation` must be given with validate_every"):
        make("sgd").train(data(), steps=1, validate_every=1)


@pytest.mark.parametrize(
    ("outputs", "label", "said"),
    [
        (np.zeros((4, 2, 2, 3)), np.zeros(4, np.int32), r"got \(4, 2, 2, 3\).*reshape"),
        (np.zeros((4, 3)), np.zeros(4, np.float32), "integer type"),
        (np.zeros((4, 3)), np.zeros((4, 1), np.int32), r"batch\['label'\].*got \(4, 1\)"),
    ],
)
def test_outputs_and_labels_that_do_not_fit_are_told(outputs, label, said):
    loss = inspect.unwrap(losses.softmax_cross_entropy)  # without the tests' own check of shapes
    with pytest.raises(check.ArgumentError, match=said):
        loss(jnp.float32(outputs), {"label": jnp.asarray(label)})


def test_an_argument_that_cannot_be_meant_is_refused_at_once():
    with pytest.raises(check.ArgumentError, match=r"It is a class: call it, MLP\(…\)"):
        jdl.classifier(MLP)
    with pytest.raises(check.ArgumentError, match="`compute_dtype` must be a floating type"):
        jdl.classifier(MLP(), compute_dtype="float61")
    # Without the tests' own check of types:
    with pytest.raises(check.ArgumentError, match="`hooks` must be a list of functions"):
        inspect.unwrap(estimators._check)(len, 1, 1, None, "stop", None, print)
    with pytest.raises(check.ArgumentError, match=r"`devices` must be .*jax\.devices\(\)"):
        inspect.unwrap(placement)(2)
    with pytest.raises(check.ArgumentError, match="Call it"):
        inspect.unwrap(estimators._prepared_optimizer)(optax.adam, None)
    with pytest.raises(check.ArgumentError, match="`metrics` must be a dict of functions"):
        inspect.unwrap(build)(jdl.from_linen(MLP()), len, optax.sgd(0.1), metrics=["accuracy"])


def test_what_is_trained_from_an_older_checkpoint_is_saved(tmp_path):
    options = {"workdir": tmp_path, "keep_best": ("loss", "max"), "log_every": 2}
    estimator = make("adam", **options)
    estimator.train(data(), steps=40, validation=data(), validate_every=4)
    assert estimator.restore_best(data()).step == 4
    estimator.train(data(), steps=6)
    again = make("adam", **options).initialize(data())
    assert again.step == 10
    jax.tree.map(np.testing.assert_array_equal, again.params, estimator.params)
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 10


def test_a_second_data_set_begins_at_its_start_but_not_after_a_restart(tmp_path):
    first, second = data(n=64), data(n=48)
    estimator = make("sgd", workdir=tmp_path)
    assert estimator.train(first, steps=3).train(second, steps=2).step == 5
    assert estimator.train(first, steps=1).step == 6
    with pytest.raises(check.DataError, match="other data"):
        make("sgd", workdir=tmp_path).train(second, steps=1)


def test_a_learning_rate_asked_for_anew_is_taken(tmp_path):
    def rate(asked):
        adam = jdl.optim.by_name("adam", asked)
        estimator = make(adam, workdir=tmp_path).train(data(), steps=2)
        return float(optax.tree.get(estimator.state.opt_state, "learning_rate"))

    found = [rate(0.1), rate(0.1), rate(1e-3), rate(1e-3)]
    assert found == pytest.approx([0.1, 0.1, 1e-3, 1e-3])


def test_names_of_columns_and_masks_of_other_shapes_are_refused():
    x = np.ones((8, 6), np.float32)
    with pytest.raises(check.ArgumentError, match="`metrics` must be named other than 'damping'"):
        make("sgd", metrics={"damping": jdl.metrics.accuracy})
    batch = {"image": x, "label": np.zeros(8, np.int32), "mask": np.ones((8, 8), np.float32)}
    with pytest.raises(check.ArgumentError, match=r"mask.*a number an example, \(8,\)"):
        make("sgd").train([batch], steps=1)


def test_a_run_directory_takes_one_training_at_a_time(tmp_path):
    """Of the same process too; and what a killed one left in the lock is not believed."""
    (tmp_path / ".lock").write_text("999999\n")
    second = make("adam", workdir=tmp_path)
    refused = []

    def intrude(row):
        with pytest.raises(check.UserError, match=f"Process {os.getpid()} is training in") as error:
            second.train(data(), steps=1)
        refused.append(str(error.value))

    make("adam", workdir=tmp_path, hooks=[intrude]).train(data(), steps=2)
    assert refused
    assert str(tmp_path) in refused[0]
    assert make("adam", workdir=tmp_path).train(data(), steps=1).step == 3


def test_a_directory_without_locks_is_trained_in_and_one_without_rights_is_not(
    tmp_path, monkeypatch
):
    def unsupported(descriptor, **_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("jdl.train.lock.lock_descriptor", unsupported)
    assert make("adam", workdir=tmp_path / "a").train(data(), steps=1).step == 1
    (tmp_path / "b" / ".lock").mkdir(parents=True)
    with pytest.raises(OSError, match=r"\.lock"):
        make("adam", workdir=tmp_path / "b").train(data(), steps=1)


@pytest.mark.parametrize(("limit", "fewest", "most"), [("wall_seconds", 1, 3), ("seconds", 8, 8)])
def test_the_time_in_all_counts_what_the_training_clock_leaves_out(limit, fewest, most):
    """Validations of .2 s after each step end half a second in all after three of them."""

    def slow():
        time.sleep(0.2)
        return data(epochs=1)

    estimator = make(optax.sgd(0.1)).train(data(), steps=1)  # compiles
    limits = {limit: 0.5 if limit == "wall_seconds" else 60.0}
    estimator.train(data(), max_steps=9, validation=slow, validate_every=1, **limits)
    assert fewest <= estimator.step - 1 <= most
