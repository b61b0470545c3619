"""Loader: images a second out of a tar of JPEGs of about 500 × 375, brought to 224 × 224 RGB.

By threads and by worker processes, against the decoder alone: simplejpeg where it is installed,
Pillow otherwise, in as many threads, on bytes in memory. Then ResNet-50 trained from the tar and
from batches in memory: what the step waits for the data is the idle share.

The pictures are made here: smooth noise at several scales, shapes with edges, grain; some hundreds
of them, again and again under other names.
"""

import concurrent.futures
import importlib.util
import io
import itertools
import os
import tarfile
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from loop_part import estimator_of, resnet
from PIL import Image, ImageDraw
from results import timed

from jdl.data import from_tar

HEIGHT, WIDTH = 375, 500


def run(results, *, tiny, data):
    del data
    distinct, members, side = (8, 64, 32) if tiny else (300, 6000, 224)
    with tempfile.TemporaryDirectory(prefix="jdl-loader-") as folder:
        path = Path(folder) / "pictures.tar"
        pictures, seconds = timed(lambda: write_tar(path, distinct, members))
        mean = sum(map(len, pictures)) / len(pictures)
        facts = {"images": members, "mean_bytes": mean, "seconds_to_make": seconds}
        results.add("tar", cores=os.cpu_count(), usable_cores=usable_cores(), **facts)
        numbers, seconds = ((2,), 0.5) if tiny else ((4, 8, 16), 2.0)
        alone = thread_rates(results, path, pictures, side, numbers, seconds)
        with results.guard("training from the tar"):
            training(results, path, tiny)
        worker_rates(results, path, side, numbers, seconds, alone)


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------------- the tar


def picture(number):
    """A JPEG of quality 90."""
    rng = np.random.default_rng(number)
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for scale in (4, 16, 64):
        noise = rng.uniform(0, 255, (HEIGHT // scale + 2, WIDTH // scale + 2, 3)).astype(np.uint8)
        image += np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), 3)) * (scale / 84)
    shapes = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(shapes)
    for _ in range(12):
        corners = [(int(rng.integers(WIDTH)), int(rng.integers(HEIGHT))) for _ in range(4)]
        draw.polygon(corners, fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    grain = np.asarray(shapes) + rng.normal(0, 4, image.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_tar(path, distinct, members):
    """Ten folders, the classes; gives the distinct pictures."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pictures = list(pool.map(picture, range(distinct)))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(members):
            info = tarfile.TarInfo(f"{i % 10}/{i:06d}.jpg")
            info.size = len(pictures[i % distinct])
            tar.addfile(info, io.BytesIO(pictures[i % distinct]))
    return pictures


# ---------------------------------------------------------------------- images a second


def thread_rates(results, path, pictures, side, numbers, seconds):
    """A row for each number of threads; gives the decoder's rates."""
    alone = {}
    for n in numbers:
        with results.guard(f"{n} threads"):
            alone[n] = decoder_alone(pictures, side, n, seconds)
            rate = loader(path, side, seconds, threads=n)
            rates = {"images_per_second": rate, "decoder_alone": alone[n], "decoder": DECODER}
            results.add(f"{n} threads", **rates, ratio=rate / alone[n])
    return alone


def worker_rates(results, path, side, numbers, seconds, alone):
    """A row for each number of worker processes, while there is time to start them."""
    for n in reversed(numbers):
        if results.left() > 8:
            with results.guard(f"{n} workers"):
                rate, spent = timed(lambda n=n: loader(path, side, seconds, workers=n))
                ratio = rate / alone[n] if n in alone else None
                figures = {"images_per_second": rate, "ratio": ratio}
                results.add(f"{n} workers", **figures, seconds_to_start=spent - seconds)


def loader(path, side, seconds, **options):
    """Images a second of `from_tar`, once it runs."""
    batches = iter(open_tar(path, side, 32, **options))
    try:
        for _ in range(8):
            next(batches)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            count += len(next(batches)["image"])
        return count / (time.perf_counter() - start)
    finally:
        batches.close()


def open_tar(path, side, batch_size, **options):
    shape = {"size": (side, side), "batch_size": batch_size}
    return from_tar(str(path), epochs=None, shuffle=True, cache_bytes=0, **shape, **options)


DECODER = "simplejpeg" if importlib.util.find_spec("simplejpeg") else "Pillow"


def decode(data, side):
    """What the fastest decoder at hand needs at least: as small as it gives, then resized."""
    if DECODER == "simplejpeg":
        import simplejpeg

        image = Image.fromarray(simplejpeg.decode_jpeg(data, min_height=side, min_width=side))
    else:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (side, side))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def decoder_alone(pictures, side, threads, seconds):
    """Images a second of nothing but decoding, in threads."""
    end = time.perf_counter() + seconds

    def work(first):
        count = 0
        for i in itertools.count(first):
            if time.perf_counter() >= end:
                return count
            decode(pictures[i % len(pictures)], side)
            count += 1
        return count

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        count = sum(pool.map(work, range(0, threads * 7, 7)))
    return count / (time.perf_counter() - start)


# ---------------------------------------------------------------------- training


def training(results, path, tiny):
    """ResNet-50 from the tar, in threads and in processes, against the same batches in memory."""
    case = resnet(tiny)
    side = case.shape[0]
    estimator = estimator_of(case)
    tar = open_tar(path, side, case.batch_size)
    first = list(itertools.islice(iter(tar), 4))
    host = itertools.cycle(first)
    device = itertools.cycle(jax.device_put(first, jax.devices()[0]))
    workers = open_tar(path, side, case.batch_size, workers=1 if tiny else usable_cores())
    sources = {
        "memory of the device": device,
        "memory of the host": host,
        "tar": tar,
        "tar, worker processes": iter(workers),  # they start once
    }
    steps = 4 if tiny else 40
    ms = {}
    for source, batches in sources.items():
        estimator.train(batches, steps=3 if tiny else 20)  # until nothing made ahead is left
        _, seconds = timed(lambda batches=batches: estimator.train(batches, steps=steps))
        ms[source] = 1e3 * seconds / steps
    results.add(
        "ResNet-50 trained from the tar",
        ms=ms,
        images_per_second={s: 1e3 * case.batch_size / x for s, x in ms.items()},
        idle_from_tar=max(0.0, 1 - ms["memory of the device"] / ms["tar"]),
        idle_from_workers=max(0.0, 1 - ms["memory of the device"] / ms["tar, worker processes"]),
        idle_from_host=max(0.0, 1 - ms["memory of the device"] / ms["memory of the host"]),
        compile_seconds=estimator.compile_seconds,
        threads=tar.num_threads,
        workers=workers.num_workers,
        steps=steps,
    )
