"""The clock: loss against seconds of training, compilation and evaluation left out.

    deep autoencoder 784-1000-500-250-30    K-FAC at its defaults, Nesterov, Adam
    language model of bytes, 10 M           AdamW, Muon, K-FAC, and SOAP where `jdl.optim` has it
    ResNet-18 on images of 32²              SGD with momentum, K-FAC

Settings are those found on CPUs; nothing is tuned here. All are compiled first, several at a time;
what is not ready at half of the part's time is left out, and a row says so. Each contestant trains
for the same seconds, by the Estimator's own clock, in slices with an evaluation after each.
"""

import functools
import gzip
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from nets import ResNet, Transformer, next_byte_loss, size

import jdl
from jdl import losses, metrics
from jdl.data import from_arrays
from jdl.models import Autoencoder
from jdl.models.layers import sparse_init
from jdl.optim import by_name
from jdl.optim.registry import REGISTRY

SLICES, TINY_SLICES = 12, 2


class Contest(NamedTuple):
    """A problem and who meets on it.

    Attributes:
      estimator: `estimator(optimizer)` makes a fresh one.
      train: arrays to train on.
      held: arrays to evaluate on.
      optimizers: name -> (the transformation or None for one that this version lacks, batch size).
    """

    estimator: Callable[[Any], Any]
    train: dict[str, np.ndarray]
    held: dict[str, np.ndarray]
    optimizers: dict[str, tuple[Any, int]]


def run(results, *, tiny, data):
    """Compiles all, several at a time, then lets each train alone."""
    jobs = preparations(tiny, data)
    missing = [name for name, job in jobs.items() if job is None]
    for name in missing:
        results.add(name, skipped="not in this version")
    jobs = {name: job for name, job in jobs.items() if job is not None}
    wait = None if tiny else 0.5 * results.left()
    runners = results.together(jobs, threads=2 if tiny else 8, seconds=wait)
    for i, name in enumerate(name for name in jobs if name in runners):
        seconds = 0.5 if tiny else min(20.0, 0.85 * results.left() / (len(runners) - i))
        with results.guard(name):
            race(results, name, runners[name], seconds, tiny)


def preparations(tiny, data):
    """name -> a function that prepares a contestant; None for an optimizer that is not there."""
    return {
        f"{name}: {which}": chosen[0] and functools.partial(prepared, contest, *chosen)
        for name, contest in contests(tiny, data).items()
        for which, chosen in contest.optimizers.items()
    }


def prepared(contest, optimizer, batch_size):
    """An Estimator whose step and evaluation are compiled, its data, and its evaluation."""
    estimator = contest.estimator(optimizer)
    batch_size = min(batch_size, len(next(iter(contest.train.values()))))
    data = from_arrays(contest.train, batch_size=batch_size, shuffle=True, seed=0)
    rows = len(next(iter(contest.held.values())))
    held = from_arrays(contest.held, batch_size=min(rows, 256), epochs=1)
    estimator.initialize(data)
    first = estimator.evaluate(held)
    estimator.train(data, steps=1)
    return estimator, data, held, first


def race(results, name, runner, seconds, tiny):
    """A row: the curve of the held examples' measures over seconds."""
    estimator, data, held, first = runner
    slices = TINY_SLICES if tiny else SLICES
    began, steps = estimator.seconds, estimator.step
    curve = [{"seconds": 0.0, "steps": 0, **first}]
    for _ in range(slices):
        estimator.train(data, seconds=seconds / slices)
        values = estimator.evaluate(held)
        at = {"seconds": estimator.seconds - began, "steps": estimator.step - steps}
        curve.append(at | values)
    last = curve[-1]
    results.add(
        name,
        **last,
        ms_per_step=1e3 * last["seconds"] / max(last["steps"], 1),
        compile_seconds=estimator.compile_seconds,
        parameters=size(estimator.params),
        batch_size=data.batch_size,
        bytes=dict(estimator.memory),
        curve=curve,
    )


# ---------------------------------------------------------------------- problems


def contests(tiny, data):
    """name -> contest, the most important first."""
    return {
        "deep autoencoder": autoencoder(tiny, data),
        "language model of bytes": language_model(tiny),
        "ResNet-18, 32²": resnet18(tiny, data),
    }


def named(name, learning_rate=None):
    """The optimizer of that name, None where this version has none."""
    return by_name(name, learning_rate) if name in REGISTRY else None


def autoencoder(tiny, data):
    images, _ = digits_of(data, 28)
    images = images.reshape(len(images), -1)
    widths = (16, 4) if tiny else (1000, 500, 250, 30)
    net = Autoencoder(widths=widths, kernel_init=sparse_init(15))
    arrays = {"image": images}
    batch = 64 if tiny else 1000
    return Contest(
        functools.partial(jdl.autoencoder, net, devices=jax.devices()[:1]),
        arrays,
        {"image": images[:1000]},
        {
            "kfac": (named("kfac"), batch),
            "nesterov": (optax.sgd(0.01, momentum=0.99, nesterov=True), batch // 5),
            "adam": (named("adam", 3e-3), batch // 5),
        },
    )


def language_model(tiny):
    length = 16 if tiny else 256
    net = Transformer(16, 1, 2) if tiny else Transformer()
    texts = stdlib_bytes(2**16 if tiny else 2**24, length + 1)
    texts = {"tokens": texts[:, :-1].astype(np.int32), "label": texts[:, 1:].astype(np.int32)}
    split = len(texts["label"]) * 19 // 20
    batch = 8 if tiny else 64
    return Contest(
        lambda optimizer: jdl.Estimator(
            net, next_byte_loss, optimizer, inputs="tokens", devices=jax.devices()[:1]
        ),
        {k: x[:split] for k, x in texts.items()},
        {k: x[split : split + 256] for k, x in texts.items()},
        {
            "adamw": (named("adamw", 1e-3), batch),
            "muon": (named("muon", 1e-2), batch),
            "kfac": (named("kfac"), batch),
            "soap": (named("soap"), batch),
        },
    )


def resnet18(tiny, data):
    images, labels = digits_of(data, 32)
    images = np.repeat(np.round(255 * images).astype(np.uint8)[..., None], 3, axis=-1)
    blocks, width = ((1, 1), 8) if tiny else ((2, 2, 2, 2), 64)
    net = ResNet(blocks, width, bottleneck=False, small_images=True, num_classes=10)
    held, batch = len(images) // 5, 32 if tiny else 256

    def estimator(optimizer):
        options = {"metrics": {"accuracy": metrics.accuracy}, "devices": jax.devices()[:1]}
        return jdl.Estimator(net, losses.softmax_cross_entropy, optimizer, **options)

    return Contest(
        estimator,
        {"image": images[held:], "label": labels[held:]},
        {"image": images[:held][:2000], "label": labels[:held][:2000]},
        {
            "momentum": (named("momentum", 0.05), batch),
            "kfac": (named("kfac"), batch),
        },
    )


# ---------------------------------------------------------------------- data


def digits_of(data, side):
    """MNIST's training images, or the bundled digits enlarged: [n, side, side] in [0, 1]."""
    found = mnist(data) if data else None
    if found is None:
        batch = next(iter(jdl.data.digits(batch_size=1438, epochs=1)))
        images, labels = np.asarray(batch["image"], np.float32)[..., 0], batch["label"]
        images = np.asarray(jax.image.resize(images / 255.0, (len(images), 24, 24), "linear"))
    else:
        images, labels = found
    images = np.clip(images, 0.0, 1.0).astype(np.float32)
    around = (side - images.shape[1]) // 2
    images = np.pad(images, [(0, 0), (around, around), (around, around)])
    order = np.random.default_rng(0).permutation(len(images))  # the bundled ones come by class
    return images[order], np.asarray(labels, np.int32)[order]


def mnist(folder):
    """Training images [60000, 28, 28] and labels; None where the files are not there."""
    for base in (Path(folder), Path(folder) / "mnist"):
        paths = [base / f"train-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
        if all(path.exists() for path in paths):
            pixels, labels = (gzip.decompress(path.read_bytes()) for path in paths)
            images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
            return images / np.float32(255.0), np.frombuffer(labels, np.uint8, offset=8)
    return None


def stdlib_bytes(count, length):
    """The sources of Python's own library, in order of their names, in rows of `length` bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text, total = [], 0
    for path in sorted(folder.glob("**/*.py")):
        inside = path.relative_to(folder).parts
        if total >= count or {"site-packages", "dist-packages", "test"} & {*inside}:
            continue
        text.append(path.read_bytes())
        total += len(text[-1])
    whole = np.frombuffer(b"".join(text)[:count], np.uint8)
    rows = whole[: len(whole) // length * length].reshape(-1, length)
    return np.random.default_rng(0).permutation(rows)
