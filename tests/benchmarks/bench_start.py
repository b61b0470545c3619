"""Seconds from `jdl train` to its first step: cold, hand-written, with a filled compilation cache.

    make bench-start

Each run is a fresh process that ends after one step of the default CNN, by Adam or Hessian-free, on
128×128×1 images from a temporary tar. Each cold run gets an empty cache directory, the warm runs
share one. The hand-written process imports the same network and makes one jitted step on random
bytes.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image


def write_tar(path):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in range(128):
            data = io.BytesIO()
            image = Image.fromarray(rng.integers(0, 256, (128, 128), dtype=np.uint8))
            image.save(data, "PNG")
            info = tarfile.TarInfo(f"train/{i % 10}/{i}.png")
            info.size = data.tell()
            data.seek(0)
            archive.addfile(info, data)


def bare():
    """The same first step, hand-written: only the network, the optimizer and a batch of bytes."""
    import jax
    import optax

    from jdl.models import CNN

    images = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 1), dtype=np.uint8)
    labels = np.arange(64, dtype=np.int32) % 10
    net, optimizer = CNN(), optax.adam(1e-3)

    @jax.jit
    def init(key):
        params = net.init(key, jax.numpy.ones((1, 128, 128, 1)))["params"]
        return params, optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, image, label, key):
        params, opt_state = state

        def loss(params):
            x = image.astype(jax.numpy.float32) / 255.0
            logits = net.apply({"params": params}, x, train=True, rngs={"dropout": key})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), (logits.argmax(-1) == label).mean()

        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value, accuracy

    _, value, _ = step(init(jax.random.key(0)), images, labels, jax.random.key(1))
    print(float(value))


def to_first_step(command, cache, done):
    """(wall seconds, CPU seconds) until `done()` of a fresh process."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    busy = 0.0
    while not done() and process.poll() is None:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            busy = max(busy, times.user + times.system)
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, busy


def ours(tar, cache, workdir, optimizer="adam"):
    command = [sys.executable, "-m", "jdl", "train", "cnn", "--data", str(tar)]
    command += ["--steps", "1", "--batch-size", "64", "--workdir", str(workdir)]
    command += ["--optimizer", optimizer]
    metrics = Path(workdir) / "metrics.jsonl"
    return to_first_step(command, cache, lambda: metrics.exists() and metrics.stat().st_size)


def by_hand(cache):
    return to_first_step([sys.executable, __file__, "--bare"], cache, lambda: False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizers", default="adam,hf")
    parser.add_argument("--bare", action="store_true", help="one bare first step, not timed")
    args = parser.parse_args()
    if args.bare:
        return bare()
    times = {"cold": [], "warm": [], "bare_cold": []}
    others = [name for name in args.optimizers.split(",") if name != "adam"]
    times |= {f"{name}_{state}": [] for name in others for state in ("cold", "warm")}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        tar = scratch / "images.tar"
        write_tar(tar)
        for name in ("adam", *others):
            ours(tar, scratch / "cache", scratch / f"first-{name}", name)
        for i in range(args.rounds):
            times["cold"].append(ours(tar, scratch / f"cache-{i}", scratch / f"cold-{i}"))
            times["bare_cold"].append(by_hand(scratch / f"bare-{i}"))
            times["warm"].append(ours(tar, scratch / "cache", scratch / f"warm-{i}"))
            for name in others:
                cold, warm = (scratch / f"{name}-{state}-{i}" for state in ("cold", "warm"))
                times[f"{name}_cold"].append(ours(tar, scratch / f"{name}-cache-{i}", cold, name))
                times[f"{name}_warm"].append(ours(tar, scratch / "cache", warm, name))
    medians = {kind: np.median(found, axis=0) for kind, found in times.items()}
    report = {}
    for i, clock in enumerate(("seconds", "processor_seconds")):
        report |= {f"{kind}_{clock}": round(float(m[i]), 2) for kind, m in medians.items()}
        for a, b in (("warm", "cold"), ("cold", "bare_cold")):
            report[f"{a}_over_{b}_{clock}"] = round(float(medians[a][i] / medians[b][i]), 3)
    print(json.dumps({**report, "rounds": args.rounds}))
    return None


if __name__ == "__main__":
    main()
