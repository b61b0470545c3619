"""Interrupts a training at random moments: `run_interrupted.py OPTIMIZER TIMES [--workdir DIR]`.

After each Ctrl-C what the Estimator holds must be usable, and training goes on: now with the same
Estimator, now with a new one where there is a run directory. At the end everything must be as in a
training that nobody interrupted, bit for bit.
"""

import argparse
import json
import math
import os
import random
import signal
import threading
from pathlib import Path

import jax
import numpy as np

import jdl
from jdl.data import from_arrays
from jdl.models import MLP
from jdl.optim import registry

parser = argparse.ArgumentParser()
parser.add_argument("optimizer")
parser.add_argument("times", type=int)
parser.add_argument("--workdir", type=Path)
args = parser.parse_args()

# A shell ignores Ctrl-C for what it runs in the background, and all that comes of it.
signal.signal(signal.SIGINT, signal.default_int_handler)

rng = np.random.default_rng(0)
x = rng.normal(size=(100, 6)).astype(np.float32)
labels = np.argmax(x[:, :3], axis=1).astype(np.int32)
data = from_arrays(x, labels, batch_size=24, shuffle=True, seed=0)
validation = from_arrays(x[:30], labels[:30], batch_size=30, epochs=1)


def make(workdir, rows):
    options = {"max_cg_iterations": 5} if args.optimizer == "hf" else {}
    return jdl.classifier(
        MLP(widths=(16,), num_outputs=3, dropout=0.2),
        registry.by_name(args.optimizer, **options),
        workdir=workdir,
        log_every=3,
        save_every=10,
        hooks=[rows.append],
    )


def train(estimator, **limit):
    return estimator.train(data, validation=validation, validate_every=7, **limit)


def same(a, b):
    plain = [
        jax.tree.map(
            lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x, state
        )
        for state in (a, b)
    ]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, *plain)


def logged(rows):
    """The rows without their clock and those that end a call; files have null for infinity."""
    clock = {"seconds", "data_wait"}
    due = [r for r in rows if r["split"] != "train" or r["step"] % 3 == 0]

    def plain(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{k: plain(v) for k, v in row.items() if k not in clock} for row in due]


chance = random.Random(args.optimizer)
rows = []
estimator = make(args.workdir, rows)
interrupted = fresh = 0
while interrupted < args.times:
    longest = 4.0 if estimator.compile_seconds == 0 else 0.15
    delay = chance.uniform(0.0, longest)
    timer = threading.Timer(delay, os.kill, [os.getpid(), signal.SIGINT])
    try:
        timer.start()
        train(estimator, steps=10**6)
        raise AssertionError("nobody interrupted")
    except KeyboardInterrupt:
        timer.join()
        interrupted += 1
    if estimator._run.state is None:
        continue
    assert int(estimator.state.step) == estimator.step
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(estimator.params))
    assert np.isfinite(estimator._means(validation)["loss"])
    if args.workdir and estimator.step:
        saved = {p.name for p in (args.workdir / "checkpoints").iterdir()}
        assert str(estimator.step) in saved, (estimator.step, saved)
        if interrupted % 5 == 0:
            fresh += 1
            estimator = make(args.workdir, rows)
train(estimator, steps=3)

expected_rows = []
whole = train(make(None, expected_rows), steps=estimator.step)
same(whole.state, estimator.state)
assert logged(rows) == logged(expected_rows)
if args.workdir:
    lines = (args.workdir / "metrics.jsonl").read_text().splitlines()
    assert logged(map(json.loads, lines)) == logged(expected_rows)
print(f"{interrupted} interrupts, {fresh} new Estimators, {estimator.step} steps: the same")
