"""One of several processes that train together: `run_distributed.py WORKDIR STEPS [options]`.

Coordinates come from the environment or the launcher. `--fail KIND` makes process 1 raise, kill
itself, be interrupted, leave or come 40 s late: at step 5, or as `--at` says when the data is
opened or a checkpoint is written.
"""

import argparse
import os
import signal
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("workdir")
parser.add_argument("steps", type=int)
parser.add_argument("--optimizer", default="adam")
parser.add_argument("--parallel", default="jit")
parser.add_argument("--fail")
parser.add_argument("--at", default="step")
parser.add_argument("--rank", type=int, default=1)
parser.add_argument("--slow", type=float, default=0.0)
args = parser.parse_args()

from jdl.train import distributed  # noqa: E402

distributed.initialize()

import jax  # noqa: E402
import numpy as np  # noqa: E402

import jdl  # noqa: E402
from jdl.core.check import UserError  # noqa: E402
from jdl.data import from_arrays  # noqa: E402
from jdl.models import MLP  # noqa: E402
from jdl.optim import registry  # noqa: E402
from jdl.train.checkpoint import Checkpoints  # noqa: E402

print(f"process {jax.process_index()} of {jax.process_count()}", flush=True)


def fail(at):
    if args.at != at or args.rank not in (-1, jax.process_index()):
        return
    if args.fail == "raise":
        raise ValueError("this one raises")
    if args.fail == "mistake":
        raise UserError("this is not to be done")
    if args.fail == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if args.fail == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if args.fail == "leave":
        sys.exit(3)
    if args.fail == "late":
        time.sleep(40)
        print("40 s late", flush=True)


def trouble(row):
    time.sleep(args.slow)
    if row["step"] == 5:
        fail("step")


def opened():
    fail("data")
    return data


def save(*given, save=Checkpoints.save):
    fail("checkpoint")
    return save(*given)


Checkpoints.save = save
rng = np.random.default_rng(0)
x = rng.normal(size=(101, 6)).astype(np.float32)
labels = np.argmax(x[:, :3], axis=1).astype(np.int32)
options = {"max_cg_iterations": 5} if args.optimizer == "hf" else {}
estimator = jdl.classifier(
    MLP(widths=(16,), num_outputs=3),
    registry.by_name(args.optimizer, **options),
    workdir=args.workdir,
    parallel=args.parallel,
    log_every=1,
    save_every=10,
    hooks=[trouble],
)
data = from_arrays(x, labels, batch_size=24, seed=0)
estimator.train(opened, max_steps=args.steps)
values = estimator.evaluate(from_arrays(x, labels, batch_size=8, epochs=1))
rows = estimator.predict(from_arrays(x, labels, batch_size=8, epochs=1))
print(f"evaluation {values['loss']:.6f} {values['accuracy']:.6f} {len(rows)}", flush=True)
sys.exit(0)
