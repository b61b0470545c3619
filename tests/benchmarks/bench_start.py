"""Seconds from `jdl train` to its first step: cold, and with JAX's persistent compilation cache.

    make bench-start

Each run is a fresh process that ends after one step of the default CNN on 128×128×1 images, written
to a tar for the purpose. The cold runs get an empty cache directory each, the warm ones share one.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
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


def seconds_to_first_step(tar, cache, workdir):
    command = [sys.executable, "-m", "jdl", "train", "cnn", "--data", str(tar)]
    command += ["--steps", "1", "--batch-size", "64", "--workdir", str(workdir)]
    start = time.perf_counter()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics = Path(workdir) / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write_tar(scratch / "images.tar")
        times = {"cold": [], "warm": []}
        seconds_to_first_step(scratch / "images.tar", scratch / "cache", scratch / "first")
        for i in range(rounds):
            for kind, cache in (("cold", f"cache-{i}"), ("warm", "cache")):
                workdir = scratch / f"{kind}-{i}"
                tar = scratch / "images.tar"
                times[kind].append(seconds_to_first_step(tar, scratch / cache, workdir))
    medians = {f"{kind}_seconds": round(statistics.median(t), 2) for kind, t in times.items()}
    ratio = round(medians["warm_seconds"] / medians["cold_seconds"], 3)
    print(json.dumps({**medians, "warm_over_cold": ratio, "rounds": rounds}))


if __name__ == "__main__":
    main()
