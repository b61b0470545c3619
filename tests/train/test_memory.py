"""The memory that training is said to need, against what the process has grown by."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import jdl
from jdl.cli import output, progress
from jdl.data import from_arrays
from jdl.models import MLP
from jdl.train.writers import read_jsonl
from tests.train.test_recompilation import compilations

PEAK = """
import json, sys
import jax, numpy as np, optax, jdl
from jdl.data import from_arrays
from jdl.models import MLP

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))

name, widths, size, several = json.loads(sys.argv[1])
x = np.zeros((2 * size, 64), np.float32)
data = from_arrays(x, np.zeros(len(x), np.int32), batch_size=size)
estimator = jdl.classifier(
    MLP(widths=widths, num_outputs=10), name, devices=jax.devices()[:1], steps_per_dispatch=several
)
estimate = estimator.memory_estimate(data)
live = sum(x.nbytes for x in jax.live_arrays())
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak from here on
estimator.train(data, steps=3 * several, save=False)
print(json.dumps([estimate, live + status("VmHWM") - before]))
"""
CASES = {
    "adam": ("adam", [1024] * 12, 4096, 1),
    "several steps in a dispatch": ("adam", [1024] * 16, 2048, 3),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_15_percent_of_the_peak(case):
    command = [sys.executable, "-c", PEAK, json.dumps(CASES[case])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    estimate, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured > 200e6
    assert estimate["peak"] == pytest.approx(measured, rel=0.15)


def digits(batch_size=16):
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    labels = np.argmax(x[:, :3], 1).astype(np.int32)
    return from_arrays(x, labels, batch_size=batch_size, shuffle=True, seed=0)


def make(**options):
    return jdl.classifier(MLP(widths=(8,), num_outputs=3), "adam", log_every=2, **options)


@pytest.mark.parametrize("several", [1, 4])
def test_training_compiles_nothing_after_the_estimate_and_learns_the_same(several):
    one = {"devices": jax.devices()[:1], "steps_per_dispatch": several}
    plain, asked, data = make(**one), make(**one), digits()
    plain.train(data, steps=5)
    estimate = asked.memory_estimate(data)
    seconds = asked.compile_seconds
    with compilations() as found:
        asked.train(data, steps=5)
    assert found == []
    assert (asked.compile_seconds, asked.memory) == (seconds, estimate)
    jax.tree.map(np.testing.assert_array_equal, plain.params, asked.params)


@pytest.mark.parametrize("several", [1, 4])
def test_state_and_batches_are_counted_in_bytes(several):
    estimator = make(devices=jax.devices()[:1], steps_per_dispatch=several)
    assert estimator.memory == {}
    found = estimator.memory_estimate(digits())
    batch = 16 * (6 + 1) * 4  # of images and labels
    assert found["batches"] == 3 * (several * batch + 4 * (several > 1))  # and the number of them
    arrays = jax.tree.leaves(estimator.state._replace(key=jax.random.key_data(estimator.state.key)))
    assert found["state"] == pytest.approx(sum(x.nbytes for x in arrays), rel=0.1)
    assert found["peak"] == found["state"] + found["batches"] + found["temporaries"]


def test_devices_share_a_batch():
    estimator = make(devices=jax.devices()[:2])
    assert estimator.memory_estimate(digits())["batches"] == 3 * 8 * (6 + 1) * 4


def test_the_first_row_of_a_run_has_the_estimate_and_a_resumed_one_no_other(tmp_path):
    for steps in (4, 8):
        estimator = make(workdir=tmp_path)
        estimator.train(digits(), max_steps=steps)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row.get("memory_estimate") for row in rows] == [estimator.memory["peak"], *3 * [None]]


def test_a_hook_is_told_before_the_first_step(capsys):
    told, rows = [], []

    class Hook(progress.StepProgress):
        def compiled(self, estimator):
            super().compiled(estimator)
            told.append((estimator.step, len(rows), estimator.memory["peak"]))

        def __call__(self, row):
            rows.append(row)

    estimator = make(hooks=[Hook(4, 16)])
    estimator.train(digits(), steps=4)
    assert told == [(0, 0, estimator.memory["peak"])]
    assert f"memory: {output.amount(estimator.memory['peak'])} on each device (state" in (
        capsys.readouterr().out
    )


def test_bytes_are_told_with_three_digits():
    found = [output.amount(n) for n in (96, 999_700, 1_000_000, 999_400_000, 80 * 10**9)]
    assert found == ["96 bytes", "1 MB", "1 MB", "999 MB", "80 GB"]
