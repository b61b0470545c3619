"""A training script for the tests that kill processes: `run_training.py WORKDIR OPTIMIZER STEPS`.

Every step sleeps a little, so that a kill at a random moment finds it anywhere. Options:
`--slow S` seconds a step, `--filesize BYTES` as the largest file the process may write.
"""

import argparse
import resource
import signal
import time

parser = argparse.ArgumentParser()
parser.add_argument("workdir")
parser.add_argument("optimizer")
parser.add_argument("steps", type=int)
parser.add_argument("--slow", type=float, default=0.0)
parser.add_argument("--filesize", type=int)
parser.add_argument("--width", type=int, default=16)
args = parser.parse_args()

if args.filesize:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (args.filesize, args.filesize))

import numpy as np  # noqa: E402

import jdl  # noqa: E402
from jdl.core.check import UserError  # noqa: E402
from jdl.data import from_arrays  # noqa: E402
from jdl.models import MLP  # noqa: E402
from jdl.optim import registry  # noqa: E402

rng = np.random.default_rng(0)
x = rng.normal(size=(100, 6)).astype(np.float32)
labels = np.argmax(x[:, :3], axis=1).astype(np.int32)
options = {"max_cg_iterations": 5} if args.optimizer == "hf" else {}
estimator = jdl.classifier(
    MLP(widths=(args.width,), num_outputs=3, dropout=0.2),
    registry.by_name(args.optimizer, **options),
    workdir=args.workdir,
    log_every=3,
    save_every=4,
    hooks=[lambda row: time.sleep(args.slow)],
)
print("ready", flush=True)
try:
    estimator.train(from_arrays(x, labels, batch_size=24, seed=0), max_steps=args.steps)
except UserError as error:
    raise SystemExit(f"refused: {error}") from error
print("done", flush=True)
