"""Our train step against a bare, hand-written jit loop: the same model, optimizer and batches.

    make bench-step

Both run in one process, in turn. The figures are ratios of medians: of images per second of wall
time, and of CPU time per image, which other processes affect less. A step of the default CNN at
128×128×1, batch 64, takes most of a second on two CPU cores; steps of the MLPs take about half a
millisecond and, for the smallest, which measures only overhead, a few hundredths of one.
"""

import argparse
import json
import statistics
import time

import numpy as np
import optax

import jdl
from jdl.cli.bench_train import bare_loop
from jdl.data import from_arrays
from jdl.models import CNN, MLP

CASES = {
    "default CNN, 128x128x1, batch 64": (CNN, (128, 128, 1), 64, 5),
    "MLP 784-256-10, batch 128": (lambda: MLP(widths=(256,)), (28, 28, 1), 128, 400),
    "MLP 64-32-10, batch 64": (lambda: MLP(widths=(32,)), (8, 8, 1), 64, 2000),
}


def our_loop(module, images, labels, batch_size):
    """`run(steps)` of an Estimator on the same arrays, shuffled, logging as it does by default."""
    data = from_arrays(images, labels, batch_size=batch_size, shuffle=True, seed=0)
    estimator = jdl.classifier(module, optax.sgd(0.01), seed=0)
    return lambda steps: estimator.train(data, steps=steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try the script")
    args = parser.parse_args()
    rounds = args.rounds
    for name, (make, shape, batch_size, steps) in CASES.items():
        steps = max(2, round(args.share * steps))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (16 * batch_size, *shape), dtype=np.uint8)
        labels = rng.integers(0, 10, 16 * batch_size).astype(np.int32)
        loops = {
            "jdl": our_loop(make(), images, labels, batch_size),
            "bare": bare_loop(jdl.from_linen(make()), images, labels, batch_size),
        }
        rates, work = {loop: [] for loop in loops}, {loop: [] for loop in loops}
        for run in loops.values():
            run(2)  # compile and warm up
        for _ in range(rounds):
            for loop, run in loops.items():
                start, processor = time.perf_counter(), time.process_time()
                run(steps)
                work[loop].append((time.process_time() - processor) / (batch_size * steps))
                rates[loop].append(batch_size * steps / (time.perf_counter() - start))
        medians = {loop: statistics.median(r) for loop, r in rates.items()}
        figures = {f"{loop}_images_per_second": round(m, 1) for loop, m in medians.items()}
        ratio = round(medians["jdl"] / medians["bare"], 3)
        spent = statistics.median(work["bare"]) / statistics.median(work["jdl"])
        figures |= {"ratio": ratio, "processor_ratio": round(spent, 3), "rounds": rounds}
        print(json.dumps({"case": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
