"""Several steps in one dispatch: the same numbers, rows, checkpoints and resume as one by one."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl.core.check import ArgumentError
from jdl.data import from_arrays
from jdl.models import MLP
from jdl.train.clock import Clock
from jdl.train.deferred_metrics import DeferredMetrics
from jdl.train.dispatch import chosen_length
from jdl.train.hooks import StopTraining
from jdl.train.run_directory import NonFiniteError
from jdl.train.signals import Stopped

OPTIMIZERS = {
    "adam": lambda: "adam",
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 40), momentum=0.9),
    "newton": lambda: "newton",
}
NEWTON = pytest.param("newton", marks=pytest.mark.slow)


def data(batch_size=16, **options):
    x = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    labels = np.argmax(x[:, :3], 1).astype(np.int32)
    return from_arrays(x, labels, batch_size=batch_size, shuffle=True, seed=0, **options)


def make(length, optimizer="adam", *, devices=1, **options):
    return jdl.classifier(
        MLP(widths=(8,), num_outputs=3, dropout=0.2),
        optimizer,
        devices=jax.devices()[:devices],
        steps_per_dispatch=length,
        **options,
    )


def plain(rows):
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "data_wait", "memory_estimate")}
        for r in rows
    ]


def logged(workdir):
    return plain(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.step), (b.params, b.step))


def train(estimator, **limit):
    return estimator.train(data(), validation=data(30), validate_every=7, **limit)


@pytest.mark.parametrize("optimizer", ["adam", "schedule", NEWTON])
def test_parameters_rows_and_checkpoints_do_not_depend_on_the_length(optimizer, tmp_path):
    runs = {}
    for length in (1, 3, 8):
        workdir = tmp_path / str(length)
        options = {"ema": 0.9, "log_norms": True} if optimizer == "adam" else {}
        estimator = make(
            length, OPTIMIZERS[optimizer](), workdir=workdir, log_every=5, save_every=6, **options
        )
        runs[length] = train(estimator, steps=23)
        runs[length].rows = logged(workdir)
        runs[length].saved = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    steps = {(row["step"], row["split"]) for row in runs[1].rows}
    assert {(20, "train"), (23, "train"), (21, "validation")} <= steps
    for length in (3, 8):
        assert_same(runs[length], runs[1])
        assert runs[length].rows == runs[1].rows
        assert runs[length].saved == runs[1].saved == [12, 18, 23]


@pytest.mark.parametrize("optimizer", ["adam", NEWTON])
@pytest.mark.parametrize("length", [3, 8])
def test_a_run_killed_in_the_middle_resumes_as_if_uninterrupted(optimizer, length, tmp_path):
    options = {"log_every": 5, "save_every": 7}

    def die(row):
        if row["step"] == 10:
            raise RuntimeError("killed")

    killed = make(length, optimizer, workdir=tmp_path / "killed", hooks=[die], **options)
    with pytest.raises(RuntimeError, match="killed"):
        train(killed, steps=23)
    resumed = train(make(None, optimizer, workdir=tmp_path / "killed", **options), max_steps=23)
    assert resumed._run.steps_per_dispatch == length  # a resumed run keeps it
    whole = train(make(length, optimizer, workdir=tmp_path / "whole", **options), steps=23)
    assert_same(resumed, whole)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def test_rows_inside_a_dispatch_share_its_time_evenly():
    now, rows = [0.0], []
    clock = Clock(now=lambda: now[0])
    clock.start()
    metrics = DeferredMetrics(clock, 2, rows.append)
    for last, losses, number in ((3, [0.0, 1.0, 2.0], 3), (5, [3.0, np.inf, 9.0], 2)):
        metrics.push(last, {"loss": jnp.array(losses)}, number)  # 9 is beyond the two
        now[0] += 6.0
        metrics.flush()
    metrics.finish()
    assert [(row.step, row.seconds, row.logs["loss"]) for row in rows] == [
        (2, 4.0, 1.0),
        (4, 9.0, 3.0),
        (5, 12.0, np.inf),
    ]
    assert [row.nonfinite for row in rows] == [None, None, (5, np.inf)]


def test_checkpoints_are_some_seconds_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("jdl.train.loop.SAVE_STEPS", 2)
    monkeypatch.setattr("jdl.train.loop.SAVE_SECONDS", 4.5)
    ticks = itertools.count()  # each look at the clock is a second later
    saved = {}
    for name, options in (("auto", {}), ("each", {"save_every": 2})):
        folder, clock = tmp_path / name, lambda: float(next(ticks))
        make(1, workdir=folder, keep=20, clock=clock, **options).train(data(), steps=12)
        saved[name] = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert saved["each"] == [2, 4, 6, 8, 10, 12]
    assert {12} < {*saved["auto"]} < {*saved["each"]}
    with pytest.raises(ArgumentError, match="save_every"):
        make(1, save_every="often")


def test_training_in_any_pieces_is_the_same():
    whole, pieces = make(8).train(data(), steps=19), make(8)
    same_data = data()
    for steps in (1, 5, 2, 8, 3):
        pieces.train(same_data, steps=steps)
    assert_same(pieces, whole)


def test_a_partial_batch_and_the_end_of_the_data():
    x = np.random.default_rng(0).normal(size=(7, 16, 6)).astype(np.float32)
    batches = [{"image": a, "label": np.argmax(a[:, :3], 1)} for a in x]
    batches[4] = {name: array[:5] for name, array in batches[4].items()}
    rows = {1: [], 3: []}
    one, three = (make(n, log_every=1, hooks=[rows[n].append]).train(batches) for n in (1, 3))
    assert three.step == 7
    assert_same(three, one)
    assert plain(rows[3]) == plain(rows[1])


def test_where_the_loss_is_not_finite(tmp_path):
    batches = [
        {
            "image": np.full((4, 6), np.inf if i == 11 else 0.5, np.float32),
            "label": np.arange(4) % 3,
        }
        for i in range(20)
    ]
    found = {}
    for length in (1, 8):
        with pytest.raises(NonFiniteError) as caught:
            make(length, log_every=10).train(batches)
        skips = make(length, on_nonfinite="skip", hooks=[(rows := []).append], log_every=4)
        found[length] = str(caught.value), skips.train(batches), plain(rows)
    assert "at step 12" in found[8][0]
    assert found[8][0] == found[1][0]
    assert_same(found[8][1], found[1][1])
    assert [row["step_skipped"] for row in found[8][2]] == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_sigterm_and_stop_training_end_it_with_a_whole_state(tmp_path):
    import signal

    def terminate(row):
        if row["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    stopped = make(4, workdir=tmp_path, hooks=[terminate], log_every=4)
    with pytest.raises(Stopped):
        stopped.train(data(), steps=40)
    assert int(stopped.state.step) == stopped.step <= 16
    assert_same(
        make(4, workdir=tmp_path, log_every=4).train(data(), max_steps=30),
        make(4).train(data(), steps=30),
    )

    def stop(row):
        if row["split"] == "validation":
            raise StopTraining("enough")

    assert (
        make(8, hooks=[stop]).train(data(), steps=40, validation=data(), validate_every=13).step
        == 13
    )


def test_several_devices(tmp_path):
    for options in ({"devices": 2}, {"parallel": "pmap"}):
        with pytest.raises(ArgumentError, match="several devices"):
            make(4, **options).train(data(), steps=1)
    make(4, workdir=tmp_path).train(data(), steps=2)
    several = make(None, devices=2, workdir=tmp_path).train(data(), steps=1)
    assert several._run.steps_per_dispatch == 1


def test_going_back_to_a_checkpoint_of_another_length(tmp_path):
    make(3, workdir=tmp_path).train(data(), steps=4)
    bad = [{"image": np.full((4, 6), np.inf, np.float32), "label": np.arange(4) % 3}] * 9
    other = make(8, workdir=tmp_path, on_nonfinite="rollback", log_every=2)
    with pytest.raises(NonFiniteError, match="at step 5"):
        other.train(bad, steps=4)
    assert other._run.steps_per_dispatch == 8


def test_data_that_reuses_its_arrays():
    def batches():
        batch = {"image": np.zeros((4, 6), np.float32), "label": np.zeros(4, np.int32)}
        for i in range(11):
            batch["image"][:], batch["label"][:] = i / 10, i % 3
            yield batch

    assert_same(
        make(4).train(batches), make(1).train(lambda: [jax.tree.map(np.copy, b) for b in batches()])
    )


def test_the_length_is_chosen_by_the_work_of_a_step():
    class Lowered:
        def __init__(self, seconds):
            self.seconds = seconds

        def cost_analysis(self):
            return {"flops": 1e11 * self.seconds, "bytes accessed": 0.0}

    lengths = [chosen_length(Lowered(s), 100) for s in (1e-5, 4e-4, 1.9e-3, 2e-3)]
    assert lengths == [25, 25, 10, 1]
    assert chosen_length(Lowered(1e-5), 10) == 10
    assert chosen_length(Lowered(1e-5), 1) == 1
    for hooks, log_every, length in (((), 1, 32), ([print], 10, 10), ([print], 1, 1)):
        estimator = make(None, log_every=log_every, hooks=hooks).train(data(), steps=2)
        assert estimator._run.steps_per_dispatch == length
    with pytest.raises(ArgumentError, match="steps_per_dispatch"):
        make(0)
