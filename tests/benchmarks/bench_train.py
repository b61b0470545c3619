"""Training speed: our Estimator, a bare jit loop, PyTorch and Keras, interleaved in one process.

    make bench-train

The same network, optimizer (SGD), batch size and uint8 input for all; ratios of medians, of wall
time and of CPU time per image, which other processes affect less. PyTorch (eager; also with
channels last) and Keras (on JAX, its own `train_on_batch`) take part if they are installed:
`.venv/bin/pip install torch keras`; jdl does not depend on them.

Lines: the default CNN on 128×128×1 images, batch 64, against all others; a network whose step takes
less than a millisecond, against the bare loop, which shows the overhead; the cost of a checkpoint
every 100 steps for both; the programs compiled after the first step, of which there must be none.
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np
import optax
from bench_step import bare_loop

import jdl
from jdl.data import from_arrays
from jdl.models import CNN, MLP

SMALL = (lambda: MLP(widths=(256,)), (28, 28, 1), 128)
LARGE = (CNN, (128, 128, 1), 64)


def arrays(shape, batch_size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8 * batch_size, *shape), dtype=np.uint8)
    return images, rng.integers(0, 10, 8 * batch_size).astype(np.int32)


def our_loop(module, images, labels, batch_size, workdir=None, **options):
    """`run(steps)` of an Estimator, logging as it does by default, to a file with a workdir."""
    data = from_arrays(images, labels, batch_size=batch_size, shuffle=True, seed=0)
    estimator = jdl.classifier(module, optax.sgd(0.01), workdir=workdir, **options)
    return lambda steps: estimator.train(data, steps=steps)


def batches(images, labels, batch_size):
    while True:
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            yield images[rows], labels[rows]


def torch_loop(images, labels, batch_size, channels_last):
    """`run(steps)` of the default CNN in eager PyTorch."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 32 * 32, 1024),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(1024, 10),
    )
    form = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=form)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    source = batches(images, labels, batch_size)

    def run(steps):
        for _ in range(steps):
            image, label = next(source)
            x = torch.from_numpy(image).permute(0, 3, 1, 2).float().div(255.0)
            logits = net(x.contiguous(memory_format=form))
            target = torch.from_numpy(label).long()
            loss = nn.functional.cross_entropy(logits, target)
            accuracy = (logits.argmax(1) == target).float().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return float(loss.detach()), float(accuracy)

    return run


def keras_loop(images, labels, batch_size):
    """`run(steps)` of the default CNN in Keras on JAX."""
    import keras
    from keras import layers

    net = keras.Sequential(
        [
            layers.Input((128, 128, 1)),
            layers.Rescaling(1 / 255.0),
            layers.Conv2D(32, 5, padding="same", activation="relu"),
            layers.MaxPool2D(),
            layers.Conv2D(32, 5, padding="same", activation="relu"),
            layers.MaxPool2D(),
            layers.Flatten(),
            layers.Dense(1024, activation="relu"),
            layers.Dropout(0.4),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.SGD(0.01), loss, metrics=["accuracy"])
    source = batches(images, labels, batch_size)

    def run(steps):
        for _ in range(steps):
            found = net.train_on_batch(*next(source))
        return found

    return run


def measure(loops, batch_size, steps, rounds):
    """Medians of images per second, in wall and CPU time, measured in turn."""
    rates, work = {name: [] for name in loops}, {name: [] for name in loops}
    for run in loops.values():
        run(2)  # compile and warm up
    for _ in range(rounds):
        for name, run in loops.items():
            start, processor = time.perf_counter(), time.process_time()
            run(steps)
            work[name].append(batch_size * steps / (time.process_time() - processor))
            rates[name].append(batch_size * steps / (time.perf_counter() - start))
    median = {name: statistics.median(x) for name, x in rates.items()}
    busy = {name: statistics.median(x) for name, x in work.items()}
    return median, busy


def show(case, median, busy, rounds):
    print(
        json.dumps(
            {
                "case": case,
                "images_per_second": {name: round(x, 1) for name, x in median.items()},
                "jdl_over": {
                    n: round(median["jdl"] / x, 3) for n, x in median.items() if n != "jdl"
                },
                "jdl_over_by_processor": {
                    n: round(busy["jdl"] / x, 3) for n, x in busy.items() if n != "jdl"
                },
                "rounds": rounds,
            }
        ),
        flush=True,
    )


def against_peers(rounds, steps):
    make, shape, batch_size = LARGE
    images, labels = arrays(shape, batch_size)
    # In memory: a call of `train` ends with a checkpoint, whose cost is a line of its own.
    loops = {
        "jdl": our_loop(make(), images, labels, batch_size),
        "bare": bare_loop(jdl.from_linen(make()), images, labels, batch_size),
    }
    if importlib.util.find_spec("torch"):
        loops["torch"] = torch_loop(images, labels, batch_size, channels_last=False)
        loops["torch_channels_last"] = torch_loop(images, labels, batch_size, channels_last=True)
    else:
        print("torch is not installed: .venv/bin/pip install torch", flush=True)
    if importlib.util.find_spec("keras"):
        loops["keras_on_jax"] = keras_loop(images, labels, batch_size)
    else:
        print("keras is not installed: .venv/bin/pip install keras", flush=True)
    show("default CNN, 128x128x1, batch 64", *measure(loops, batch_size, steps, rounds), rounds)


def overhead(rounds, steps):
    make, shape, batch_size = SMALL
    images, labels = arrays(shape, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "jdl": our_loop(make(), images, labels, batch_size, folder, save_every=1000),
            "jdl_in_memory": our_loop(make(), images, labels, batch_size),
            "bare": bare_loop(jdl.from_linen(make()), images, labels, batch_size),
        }
        show("MLP 784-256-10, batch 128", *measure(loops, batch_size, steps, rounds), rounds)


def checkpoint_cost(name, case, every, rounds):
    """The cost of one checkpoint, as a fraction of 100 steps.

    Two runs of 4 · `every` steps: one saves at its end, the other three times more on the way.
    """
    make, shape, batch_size = case
    images, labels = arrays(shape, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            save: our_loop(make(), images, labels, batch_size, f"{folder}/{save}", save_every=save)
            for save in (every, None)
        }
        times = {save: [] for save in loops}
        for run in loops.values():
            run(4 * every)
        for _ in range(rounds):
            for save, run in loops.items():
                clock, processor = time.perf_counter(), time.process_time()
                run(4 * every)
                times[save].append((time.perf_counter() - clock, time.process_time() - processor))
    more, less = (np.median(times[save], axis=0) for save in (every, None))
    one, hundred = (more - less) / 3, 25 * less / every
    found = {"case": f"a checkpoint every 100 steps, {name}"}
    for i, clock in enumerate(("clock", "processor")):
        found[f"{clock}_ms"] = round(1e3 * float(one[i]), 2)
        found[f"{clock}_share"] = round(float(one[i] / hundred[i]), 4)
    print(json.dumps({**found, "rounds": rounds}), flush=True)


def compilations():
    """Programs compiled after the first step of a run with logging and saving."""
    counted = []

    def on_duration(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(seconds)

    make, shape, batch_size = SMALL
    images, labels = arrays(shape, batch_size)
    run = our_loop(make(), images, labels, batch_size)
    run(1)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    run(200)
    print(json.dumps({"case": "compiled after the first step", "programs": len(counted)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of the CNN, a round")
    parser.add_argument("--parts", nargs="+", choices=("small", "cnn"), default=("small", "cnn"))
    args = parser.parse_args()
    if "small" in args.parts:
        compilations()
        overhead(args.rounds, 2000 if args.rounds > 1 else 20)
        checkpoint_cost("MLP 784-256-10, batch 128", SMALL, 100, args.rounds)
    if "cnn" in args.parts:
        against_peers(args.rounds, args.steps)
        checkpoint_cost("default CNN, 128x128x1, batch 64", LARGE, 1, 3)


if __name__ == "__main__":
    main()
