"""The classics at full size on MNIST: one table of target, reached and seconds.

    make bench-classics DATA=folder [ARGS="--only rbm-cd1,autoencoder --seeds 3 --json out.json"]

The folder holds MNIST's four .gz files. Seconds are process CPU time / 2, which other work on a
machine of two cores disturbs less than the wall, shown beside it; they cover training with its
compilation, and no evaluation. A case is a function `case(mnist, seed) -> list[Row]`; to add one,
decorate it with `@case(name)`.
"""

import argparse
import gzip
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdl
from jdl.models import partition
from jdl.models.autoencoder import Autoencoder, denoising
from jdl.models.cnn import CNN, Block
from jdl.models.dbn import DBN, starting_at
from jdl.models.mlp import MLP
from jdl.models.rbm import RBM, log_odds
from jdl.train.boltzmann import momentum_switch, pretrain, slower_layers
from jdl.train.boltzmann import rbm as rbm_estimator

CASES: dict[str, Any] = {}


class Row(NamedTuple):
    """A figure and what it must be: `goal` is "≤", "≥" or "" for one shown for comparison."""

    figure: str
    goal: str
    target: float
    reached: float | None  # None where it was refused
    cpu: float
    wall: float
    note: str = ""


class Mnist(NamedTuple):
    """Images float32 [N, 28, 28, 1] in [0, 1] and labels int32 [N]."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Clock:
    """Seconds of CPU time / 2 and of wall time within `with`."""

    cpu = wall = 0.0

    def __enter__(self):
        self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu += (time.process_time() - self._start[0]) / 2
        self.wall += time.perf_counter() - self._start[1]


def case(name):
    def register(function):
        CASES[name] = function
        return function

    return register


def mnist(folder):
    def read(name, offset):
        path = pathlib.Path(folder) / f"{name}.gz"
        if not path.exists():
            raise SystemExit(f"{path} is missing: give MNIST's folder with --data.")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)

    def part(name):
        x = read(f"{name}-images-idx3-ubyte", 16).reshape(-1, 28, 28, 1)
        return x.astype(np.float32) / 255, read(f"{name}-labels-idx1-ubyte", 8).astype(np.int32)

    return Mnist(*part("train"), *part("t10k"))


def batches(x, y=None, *, batch_size=100, seed=0):
    return jdl.data.from_arrays(x, y, batch_size=batch_size, seed=seed)


def once(x, y=None):
    return jdl.data.from_arrays(x, y, batch_size=500, epochs=1)


def classified(data, model, optimizer, steps, seed, *, batch_size=100, x=None, y=None):
    """(test error in %, clock) of a classifier after so many steps."""
    x, y = (data.x, data.y) if x is None else (x, y)
    clock = Clock()
    with clock:
        estimator = jdl.classifier(model, optimizer, seed=seed, log_every=1000)
        estimator.train(batches(x, y, batch_size=batch_size, seed=seed), steps=steps)
    accuracy = estimator.evaluate(once(data.test_x, data.test_y))["accuracy"]
    return 100 * (1 - accuracy), clock


# ------------------------------------------------------------------ supervised nets


@case("mlp")
def mlp(data, seed):
    steps = 6000
    rate = optax.cosine_decay_schedule(1e-3, steps)
    net = MLP(widths=(500, 500, 2000), dropout=0.2)
    error, clock = classified(data, net, optax.adam(rate), steps, seed)
    return [Row("MLP, test error %", "≤", 1.3, error, clock.cpu, clock.wall, "10 epochs")]


@case("cnn")
def cnn(data, seed):
    steps = 3600
    rate = optax.cosine_onecycle_schedule(steps, 3e-3, pct_start=0.2)
    net = CNN(blocks=(Block(filters=16), Block(filters=32)), units=128)
    error, clock = classified(data, net, optax.adam(rate), steps, seed)
    return [Row("CNN, test error %", "≤", 0.8, error, clock.cpu, clock.wall, "6 epochs")]


# ------------------------------------------------------------------ Boltzmann machines


def binary(x):
    return (x.reshape(len(x), -1) > 0.5).astype(np.float32)


def likelihood_rows(name, target, data, rbm, params, clock, note):
    """Test log-likelihood by annealing from the data's log odds, refused where it is uncertain."""
    base = log_odds(binary(data.x).mean(0))(None, (784,))
    found = partition.annealed_log_z(rbm, params, jax.random.key(7), base_bias=base)
    note += f", s.e. {found.relative_error:.2g}"
    try:
        reached = partition.log_likelihood(rbm, params, binary(data.test_x), found)
    except jdl.core.check.TrainingError:
        reached, note = None, note + ": refused"
    return [Row(name, "≥", target, reached, clock.cpu, clock.wall, note)]


def trained_rbm(data, seed, optimizer, epochs, batch_size=100, cost=2e-4, **options):
    x = binary(data.x)
    rbm = RBM(hidden=500, visible_bias_init=log_odds(x.mean(0)), **options)
    clock = Clock()
    with clock:
        estimator = rbm_estimator(rbm, optimizer, cost=cost, seed=seed, log_every=1000)
        steps = epochs * len(x) // batch_size
        estimator.train(batches(x, batch_size=batch_size, seed=seed), steps=steps)
    return rbm, estimator.params, clock


@case("rbm-exact")
def rbm_exact(data, seed):
    x = binary(data.x[:10_000])
    rbm = RBM(hidden=20, visible_bias_init=log_odds(x.mean(0)))
    clock = Clock()
    with clock:
        estimator = rbm_estimator(rbm, momentum_switch(0.5, after=300), seed=seed, log_every=1000)
        estimator.train(batches(x, seed=seed), steps=1000)
    base = log_odds(x.mean(0))(None, (784,))
    found = partition.annealed_log_z(rbm, estimator.params, jax.random.key(seed), base_bias=base)
    gap = abs(found.log_z - partition.exact_log_z(rbm, estimator.params))
    note = f"s.e. {found.relative_error:.2g}"
    return [Row("RBM, 20 hidden: |AIS − exact log Z|", "≤", 0.1, gap, clock.cpu, clock.wall, note)]


@case("rbm-cd1")
def rbm_cd1(data, seed):
    rbm, params, clock = trained_rbm(data, seed, momentum_switch(0.5, after=3000), 20)
    name = "RBM-500, CD-1: test log-likelihood"
    return likelihood_rows(name, -123.0, data, rbm, params, clock, "20 epochs")


@case("rbm-pcd")
def rbm_pcd(data, seed):
    steps = 20 * 600
    rate = optax.linear_schedule(0.3, 0.0, steps)
    rbm, params, clock = trained_rbm(
        data, seed, momentum_switch(rate, late=0.5), 20, chains=100, k=5, cost=1e-4
    )
    name = "RBM-500, PCD-5: test log-likelihood"
    return likelihood_rows(name, -98.0, data, rbm, params, clock, "20 epochs")


@case("rbm-sklearn")
def rbm_sklearn(data, seed):
    """One epoch each, interleaved: the same batches, rate and chains; then pseudo-likelihoods."""
    from sklearn.neural_network import BernoulliRBM

    x, batch_size, rounds = binary(data.x[:20_000]), 100, 3
    theirs = BernoulliRBM(500, learning_rate=0.05, batch_size=batch_size, random_state=seed)
    rbm = RBM(hidden=500, chains=batch_size)
    ours = rbm_estimator(rbm, optax.sgd(0.05), cost=0.0, seed=seed, log_every=1000)
    feed = batches(x, batch_size=batch_size, seed=seed)
    ours.train(feed, steps=1)  # compiles
    clocks: tuple[list[float], list[float]] = ([], [])
    both = Clock()
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        with both, Clock() as clock:
            ours.train(feed, epochs=1)
        clocks[0].append(clock.cpu)
        with both, Clock() as clock:
            order = rng.permutation(len(x))
            for i in range(0, len(x), batch_size):
                theirs.partial_fit(x[order[i : i + batch_size]])
        clocks[1].append(clock.cpu)
    ratio = statistics.median(b / a for a, b in zip(*clocks, strict=True))
    test = jnp.asarray(binary(data.test_x))
    params = {
        "kernel": jnp.asarray(theirs.components_.T, jnp.float32),
        "visible_bias": jnp.asarray(theirs.intercept_visible_, jnp.float32),
        "hidden_bias": jnp.asarray(theirs.intercept_hidden_, jnp.float32),
    }
    key = jax.random.key(1)
    scores = [
        float(partition.pseudo_log_likelihood(rbm, p, test, key).mean())
        for p in (ours.params, params)
    ]
    note = f"medians {statistics.median(clocks[0]):.1f} and {statistics.median(clocks[1]):.1f} s"
    return [
        Row(
            "RBM-500: sklearn's seconds an epoch / ours", "≥", 3.0, ratio, both.cpu, both.wall, note
        ),
        Row("the same: pseudo-likelihood less sklearn's", "≥", 0.0, scores[0] - scores[1], 0, 0),
    ]


# ------------------------------------------------------------------ autoencoders


@case("autoencoder")
def autoencoder(data, seed):
    from sklearn.decomposition import PCA

    steps = 9000
    rate = optax.cosine_decay_schedule(1e-3, steps)
    net = Autoencoder(activation="relu", kernel_init=jax.nn.initializers.he_normal())
    clock = Clock()
    with clock:
        estimator = jdl.autoencoder(net, optax.adam(rate), seed=seed, log_every=1000)
        estimator.train(batches(data.x, seed=seed), steps=steps)
    error = estimator.evaluate(once(data.test_x))["squared_error"]
    flat, held = data.x.reshape(-1, 784), data.test_x.reshape(-1, 784)
    pca = PCA(30, svd_solver="covariance_eigh").fit(flat)
    linear = np.square(held - pca.inverse_transform(pca.transform(held))).sum(1).mean()
    return [
        Row("autoencoder, code of 30: squared error", "≤", 3.7, error, clock.cpu, clock.wall),
        Row("the same: seconds", "≤", 140.0, clock.cpu, clock.cpu, clock.wall),
        Row("PCA-30: squared error", "", 0.0, float(linear), 0, 0),
    ]


@case("denoising")
def denoiser(data, seed):
    steps = 6000
    rate = optax.cosine_decay_schedule(1e-3, steps)
    net = Autoencoder(widths=(1000, 500), activation="relu", code_activation="relu")
    clock = Clock()
    with clock:
        model = denoising(net, "gaussian", 0.5)
        estimator = jdl.autoencoder(model, optax.adam(rate), seed=seed, log_every=1000)
        estimator.train(batches(data.x, seed=seed), steps=steps)

    outputs = estimator.predict(once(data.test_x))
    noisy = np.square(outputs.corrupted - data.test_x).mean()
    cleaned = np.square(np.asarray(jax.nn.sigmoid(outputs.outputs)) - data.test_x).mean()
    gain = float(10 * np.log10(noisy / cleaned))
    note = f"{-10 * np.log10(noisy):.1f} → {-10 * np.log10(cleaned):.1f} dB"
    return [Row("denoiser, σ = 0.5: PSNR gain, dB", "≥", 12.0, gain, clock.cpu, clock.wall, note)]


# ------------------------------------------------------------------ deep belief nets

GENTLE = {"Dense_0": 0.3, "Dense_1": 0.5}


def stacked(x, widths, steps, seed):
    dbn = DBN(widths=widths)
    clock = Clock()
    with clock:
        params = pretrain(
            dbn,
            batches(x, seed=seed),
            steps=steps,
            optimizer=lambda i: momentum_switch(0.5, after=600),
            seed=seed,
            log_every=1000,
        )
    return dbn, params, clock


@case("dbn")
def dbn(data, seed):
    dbn, params, before = stacked(data.x, (500, 500, 2000), (6000, 4800, 3000), seed)
    net, start = dbn.unrolled_mlp(params, 10)
    steps = 12_000
    adam = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    tuned = optax.chain(adam, slower_layers(GENTLE))
    error, clock = classified(data, starting_at(net, start), tuned, steps, seed)
    note = f"pretraining {before.cpu:.0f} s + fine-tuning {clock.cpu:.0f} s"
    cpu, wall = before.cpu + clock.cpu, before.wall + clock.wall
    return [Row("DBN 500-500-2000: test error %", "≤", 1.35, error, cpu, wall, note)]


@case("dbn-1000")
def dbn_few_labels(data, seed):
    """Pretrained on all images, 1,000 labels; against random starts with the same labels."""
    some = np.random.default_rng(seed).permutation(len(data.x))[:1000]
    x, y = data.x[some], data.y[some]
    dbn, params, before = stacked(data.x, (500, 500, 500), (4800, 3000, 3000), seed)
    net, start = dbn.unrolled_mlp(params, 10)
    steps = 2000

    def error(model, optimizer):
        return classified(data, model, optimizer, steps, seed, batch_size=50, x=x, y=y)

    adam = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    reached, clock = error(starting_at(net, start), optax.chain(adam, slower_layers(GENTLE)))
    he = jax.nn.initializers.he_normal()
    controls = {
        "sigmoid": net,
        "tanh": MLP(widths=(500, 500, 500), activation="tanh"),
        "ReLU": MLP(widths=(500, 500, 500), kernel_init=he),
    }
    errors = {name: error(control, adam)[0] for name, control in controls.items()}
    best = min(errors, key=errors.get)  # type: ignore[arg-type]
    note = ", ".join(f"{name} {e:.1f} %" for name, e in errors.items())
    cpu, wall = before.cpu + clock.cpu, before.wall + clock.wall
    return [
        Row("DBN, 1,000 labels: test error %", "", 0.0, reached, cpu, wall),
        Row(
            f"the best random start ({best}) less that",
            "≥",
            3.0,
            errors[best] - reached,
            0,
            0,
            note,
        ),
    ]


# ------------------------------------------------------------------ the table


def shown(rows_of_seeds):
    """One line a figure: the first seed's, and the range over all of them."""
    lines = []
    for same in zip(*rows_of_seeds, strict=True):
        row, values = same[0], [r.reached for r in same]
        told = [v for v in values if v is not None]
        met = {
            "≤": lambda v, t=row.target: v <= t,
            "≥": lambda v, t=row.target: v >= t,
        }.get(row.goal)
        verdict = (
            ""
            if met is None
            else "yes"
            if len(told) == len(values) and all(map(met, told))
            else "no"
        )
        reached = "refused" if not told else f"{statistics.median(told):.4g}"
        if len(told) > 1:
            reached += f" ({min(told):.4g} … {max(told):.4g})"
        target = f"{row.goal} {row.target:g}" if row.goal else "—"
        seconds = f"{row.cpu:.0f} / {row.wall:.0f}" if row.cpu else ""
        lines.append([row.figure, target, reached, verdict, seconds, row.note])
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/mnist", help="folder of MNIST's four .gz files")
    parser.add_argument("--only", help=f"some of {','.join(CASES)}")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(CASES)
    for name in wanted:
        jdl.core.check.one_of("--only", name, CASES)
    data = mnist(args.data)
    lines, record = [["figure", "target", "reached", "met", "s (CPU/2 / wall)", "note"]], {}
    for name in wanted:
        rows = [CASES[name](data, seed) for seed in range(args.seeds)]
        record[name] = [[row._asdict() for row in of_seed] for of_seed in rows]
        new = shown(rows)
        for line in new:
            print(name + ":", " | ".join(line), flush=True)
        lines += new
        if args.json:
            args.json.write_text(json.dumps(record, indent=1))
    print()
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
