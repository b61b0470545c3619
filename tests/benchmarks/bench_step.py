"""Our train step against a bare, hand-written jit loop: the same model, optimizer and batches.

    make bench-step

All run in one process, in turn: ours with as many steps in one dispatch as it chooses, and with
one, logging and saving as it does by default. The figures are ratios of medians: of images per
second of wall time, and of CPU time per image, which other processes affect less. A step of the
default CNN at 128×128×1, batch 64, takes most of a second on two CPU cores; steps of the MLPs take
about half a millisecond and, for the smallest, which measures only overhead, a few hundredths of
one.
"""

import argparse
import json
import statistics
import tempfile
import time

import jax
import numpy as np
import optax

import jdl
from jdl.cli.bench_train import bare_loop
from jdl.data import from_arrays
from jdl.models import CNN, MLP

CASES = {
    "default CNN, 128x128x1, batch 64": (CNN, (128, 128, 1), 64, 5),
    "MLP 784-256-10, batch 128": (lambda: MLP(widths=(256,)), (28, 28, 1), 128, 400),
    "MLP 64-256-256-10, batch 64": (lambda: MLP(widths=(256, 256)), (8, 8, 1), 64, 800),
    "MLP 64-32-10, batch 64": (lambda: MLP(widths=(32,)), (8, 8, 1), 64, 2000),
}


def our_loop(module, images, labels, batch_size, workdir, steps_per_dispatch=None):
    """`run(steps)` of an Estimator on the same arrays, shuffled, with log and checkpoints."""
    data = from_arrays(images, labels, batch_size=batch_size, shuffle=True, seed=0)
    device = jax.devices()[:1]
    estimator = jdl.classifier(
        module,
        optax.sgd(0.01),
        devices=device,
        workdir=workdir,
        steps_per_dispatch=steps_per_dispatch,
    )
    return lambda steps: estimator.train(data, steps=steps, save=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try the script")
    parser.add_argument("--only", default="", help="cases whose name has this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args.rounds, args.share, args.only, folder)


def measure(rounds, share, only, folder):
    for number, (name, (make, shape, batch_size, steps)) in enumerate(CASES.items()):
        if only not in name:
            continue
        steps = max(2, round(share * steps))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (16 * batch_size, *shape), dtype=np.uint8)
        labels = rng.integers(0, 10, 16 * batch_size).astype(np.int32)
        loops = {
            "jdl": our_loop(make(), images, labels, batch_size, f"{folder}/{number}"),
            "single": our_loop(make(), images, labels, batch_size, f"{folder}/{number}-1", 1),
            "bare": bare_loop(jdl.from_linen(make()), images, labels, batch_size),
        }
        rates, work = {loop: [] for loop in loops}, {loop: [] for loop in loops}
        for run in loops.values():
            run(20 if steps > 20 else 2)  # compile and warm up
        for _ in range(rounds):
            for loop, run in loops.items():
                start, processor = time.perf_counter(), time.process_time()
                run(steps)
                work[loop].append((time.process_time() - processor) / (batch_size * steps))
                rates[loop].append(batch_size * steps / (time.perf_counter() - start))
        medians = {loop: statistics.median(r) for loop, r in rates.items()}
        figures = {f"{loop}_images_per_second": round(m, 1) for loop, m in medians.items()}
        for loop, prefix in (("jdl", ""), ("single", "single_")):
            ratio = medians[loop] / medians["bare"]
            spent = statistics.median(work["bare"]) / statistics.median(work[loop])
            figures |= {f"{prefix}ratio": round(ratio, 3)}
            figures |= {f"{prefix}processor_ratio": round(spent, 3)}
        figures["rounds"] = rounds
        print(json.dumps({"case": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
