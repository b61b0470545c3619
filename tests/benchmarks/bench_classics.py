"""The classic models at full size on MNIST: a table of targets, results and seconds.

    make bench-classics DATA=folder [ARGS="--only rbm-cd1,autoencoder --seeds 3 --json out.json"]

The folder contains MNIST's four .gz files. Seconds are process CPU time / 2 (for two cores), which
other processes affect less than wall time; wall time is shown too. They include training and its
compilation, but not evaluation. A case is a function `case(mnist, seed) -> list[Row]`; to add one,
decorate it with `@case(name)`.
"""

import argparse
import gzip
import json
import pathlib
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdl
from jdl.models import rbm_likelihood, scores, sequences, trees
from jdl.models.autoencoder import Autoencoder, denoising
from jdl.models.cnn import CNN, Block
from jdl.models.dbn import DBN, starting_at
from jdl.models.gan import GAN, optimizers
from jdl.models.layers import RandomShift
from jdl.models.mlp import MLP
from jdl.models.rbm import RBM, log_odds
from jdl.models.recursive import TreeLSTM
from jdl.models.rnn import RNN, echo_init
from jdl.train.boltzmann import momentum_switch, pretrain, slower_layers
from jdl.train.boltzmann import rbm as rbm_estimator

CASES: dict[str, Any] = {}
SHARE = 1.0  # of the steps; less only tries whether a case runs


class Row(NamedTuple):
    """A figure and its target: `goal` is "≤", "≥", or "" for a figure shown for comparison."""

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


def steps_of(full):
    return max(2, round(SHARE * full))


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
    """(test error in %, clock) of a classifier after `steps` steps."""
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
    steps = steps_of(18_000)
    rate = optax.cosine_decay_schedule(1e-3, steps)
    net = MLP(widths=(1000, 1000), dropout=0.5)
    error, clock = classified(data, net, optax.adam(rate), steps, seed)
    return [Row("MLP, test error %", "≤", 1.3, error, clock.cpu, clock.wall, "30 epochs")]


@case("cnn")
def cnn(data, seed):
    steps = steps_of(3600)
    rate = optax.cosine_onecycle_schedule(steps, 3e-3, pct_start=0.2)
    net = CNN(blocks=(Block(filters=16), Block(filters=32)), units=128)
    error, clock = classified(data, net, optax.adam(rate), steps, seed)
    return [Row("CNN, test error %", "≤", 0.8, error, clock.cpu, clock.wall, "6 epochs")]


@case("cnn-shift")
def cnn_shift(data, seed):
    """The same network trained longer, on images shifted by up to two pixels in each direction."""
    steps = steps_of(12_000)
    rate = optax.cosine_onecycle_schedule(steps, 3e-3, pct_start=0.2)
    net = RandomShift(CNN(blocks=(Block(filters=16), Block(filters=32)), units=128), by=2)
    error, clock = classified(data, net, optax.adam(rate), steps, seed)
    name = "CNN, images shifted, test error %"
    return [Row(name, "≤", 0.6, error, clock.cpu, clock.wall, "20 epochs")]


# ------------------------------------------------------------------ Boltzmann machines


def binary(x):
    return (x.reshape(len(x), -1) > 0.5).astype(np.float32)


def likelihood_rows(name, target, data, rbm, params, clock, note):
    """Test log-likelihood by annealing from the data's log odds; an error if too uncertain."""
    base = log_odds(binary(data.x).mean(0))(None, (784,))
    found = rbm_likelihood.annealed_log_z(
        rbm, params, jax.random.key(7), chains=1000, base_bias=base
    )
    note += f", s.e. {found.relative_error:.2g}"
    try:
        reached = rbm_likelihood.log_likelihood(rbm, params, binary(data.test_x), found)
    except jdl.core.check.TrainingError:
        reached, note = None, note + ": refused"
    return [Row(name, "≥", target, reached, clock.cpu, clock.wall, note)]


def trained_rbm(data, seed, optimizer, epochs, batch_size=100, cost=2e-4, **options):
    x = binary(data.x)
    rbm = RBM(hidden=500, visible_bias_init=log_odds(x.mean(0)), **options)
    clock = Clock()
    with clock:
        estimator = rbm_estimator(rbm, optimizer, cost=cost, seed=seed, log_every=1000)
        steps = steps_of(epochs * len(x) // batch_size)
        estimator.train(batches(x, batch_size=batch_size, seed=seed), steps=steps)
    return rbm, estimator.params, clock


@case("rbm-exact")
def rbm_exact(data, seed):
    x = binary(data.x[:10_000])
    rbm = RBM(hidden=20, visible_bias_init=log_odds(x.mean(0)))
    clock = Clock()
    with clock:
        estimator = rbm_estimator(rbm, momentum_switch(0.5, after=300), seed=seed, log_every=1000)
        estimator.train(batches(x, seed=seed), steps=steps_of(1000))
    base = log_odds(x.mean(0))(None, (784,))
    found = rbm_likelihood.annealed_log_z(
        rbm, estimator.params, jax.random.key(seed), base_bias=base
    )
    gap = abs(found.log_z - rbm_likelihood.exact_log_z(rbm, estimator.params))
    note = f"s.e. {found.relative_error:.2g}"
    return [Row("RBM, 20 hidden: |AIS − exact log Z|", "≤", 0.1, gap, clock.cpu, clock.wall, note)]


@case("rbm-cd1")
def rbm_cd1(data, seed):
    """With mean reconstructions: sampled ones ended at −176 to −229 nats at rates 0.05 to 0.5."""
    rbm, params, clock = trained_rbm(data, seed, momentum_switch(0.05), 20, sample_visible=False)
    name = "RBM-500, CD-1: test log-likelihood"
    return likelihood_rows(name, -123.0, data, rbm, params, clock, "20 epochs")


@case("rbm-pcd")
def rbm_pcd(data, seed):
    """With a small learning rate and weight cost: annealing is too uncertain for larger weights."""
    epochs = 10
    rate = optax.linear_schedule(0.1, 0.0, epochs * 600)
    rbm, params, clock = trained_rbm(
        data, seed, momentum_switch(rate, late=0.5), epochs, chains=100, k=5, cost=1e-3
    )
    name = "RBM-500, PCD-5: test log-likelihood"
    return likelihood_rows(name, -98.0, data, rbm, params, clock, f"{epochs} epochs")


@case("rbm-sklearn")
def rbm_sklearn(data, seed):
    """Epochs in turn, with the same batches, rate and chains; then pseudo-likelihoods.

    Theirs is held to one thread: BLAS's threads burn CPU time as they wait. On two cores it could
    at best be twice as fast as its CPU time, which is what the clock takes it for.
    """
    from sklearn.neural_network import BernoulliRBM
    from threadpoolctl import threadpool_limits

    x, batch_size, rounds = binary(data.x[:10_000]), 100, 5
    theirs = BernoulliRBM(500, learning_rate=0.05, batch_size=batch_size, random_state=seed)
    rbm = RBM(hidden=500, chains=batch_size, visible_bias_init=log_odds(x.mean(0)))
    ours = rbm_estimator(rbm, optax.sgd(0.05), cost=0.0, metrics={}, seed=seed, log_every=1000)
    feed = batches(x, batch_size=batch_size, seed=seed)
    ours.train(feed, steps=1)  # compiles
    clocks: tuple[list[float], list[float]] = ([], [])
    both = Clock()
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        with both, Clock() as clock:
            ours.train(feed, epochs=1)
            jax.block_until_ready(ours.params)
        clocks[0].append(clock.cpu)
        with threadpool_limits(1), both, Clock() as clock:
            order = rng.permutation(len(x))
            for i in range(0, len(x), batch_size):
                theirs.partial_fit(x[order[i : i + batch_size]])
        clocks[1].append(clock.cpu)
    ratio = statistics.median(b / a for a, b in zip(*clocks, strict=True))
    test = jnp.asarray(binary(data.test_x[::10]))
    params = {
        "kernel": jnp.asarray(theirs.components_.T, jnp.float32),
        "visible_bias": jnp.asarray(theirs.intercept_visible_, jnp.float32),
        "hidden_bias": jnp.asarray(theirs.intercept_hidden_, jnp.float32),
    }
    score = jax.jit(lambda p: rbm_likelihood.pseudo_log_likelihood(rbm, p, test).mean())
    scores = [float(score(p)) for p in (ours.params, params)]
    told = f"exact, {scores[0]:.1f} and {scores[1]:.1f}, 1,000 test images"
    note = f"medians {statistics.median(clocks[0]):.1f} and {statistics.median(clocks[1]):.1f} s"
    return [
        Row(
            "RBM-500: sklearn's seconds an epoch / ours", "≥", 3.0, ratio, both.cpu, both.wall, note
        ),
        Row(
            "the same: pseudo-likelihood less sklearn's",
            "≥",
            0.0,
            scores[0] - scores[1],
            0,
            0,
            told,
        ),
    ]


# ------------------------------------------------------------------ autoencoders


@case("autoencoder")
def autoencoder(data, seed):
    from sklearn.decomposition import PCA

    steps = steps_of(9000)
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
    steps = steps_of(6000)
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
            steps=tuple(map(steps_of, steps)),
            optimizer=lambda i: momentum_switch(0.1, after=600),
            seed=seed,
            log_every=1000,
        )
    return dbn, params, clock


@case("dbn")
def dbn(data, seed):
    dbn, params, before = stacked(data.x, (500, 500, 2000), (18_000, 14_400, 9000), seed)
    net, start = dbn.unrolled_mlp(params, 10)
    steps = steps_of(12_000)
    adam = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    tuned = optax.chain(adam, slower_layers(GENTLE))
    error, clock = classified(data, starting_at(net, start), tuned, steps, seed)
    note = f"pretraining {before.cpu:.0f} s + fine-tuning {clock.cpu:.0f} s"
    cpu, wall = before.cpu + clock.cpu, before.wall + clock.wall
    return [Row("DBN 500-500-2000: test error %", "≤", 1.35, error, cpu, wall, note)]


@case("dbn-1000")
def dbn_few_labels(data, seed):
    """Pretrained on all images, 1,000 labels; compared with random initializations."""
    some = np.random.default_rng(seed).permutation(len(data.x))[:1000]
    x, y = data.x[some], data.y[some]
    dbn, params, before = stacked(data.x, (500, 500, 500), (4800, 3000, 3000), seed)
    net, start = dbn.unrolled_mlp(params, 10)
    net, steps = net.clone(dropout=0.3), steps_of(2000)

    def error(model, optimizer):
        return classified(data, model, optimizer, steps, seed, batch_size=50, x=x, y=y)

    adam = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    reached, clock = error(starting_at(net, start), optax.chain(adam, slower_layers(GENTLE)))
    controls = {
        "sigmoid": net,
        "sigmoid, sparse": net.clone(kernel_init="sparse"),
        "tanh": net.clone(activation="tanh"),
    }
    errors = {name: error(control, adam)[0] for name, control in controls.items()}
    relu, _ = error(net.clone(activation="relu"), adam)
    best = min(errors, key=errors.get)  # type: ignore[arg-type]
    note = ", ".join(f"{name} {e:.1f} %" for name, e in errors.items())
    cpu, wall = before.cpu + clock.cpu, before.wall + clock.wall
    gain = errors[best] - reached
    return [
        Row("DBN, 1,000 labels: test error %", "", 0.0, reached, cpu, wall),
        Row(f"the best random start ({best}) less that", "≥", 3.0, gain, 0, 0, note),
        Row("a ReLU net without pretraining less that", "", 0.0, relu - reached, 0, 0),
    ]


# ------------------------------------------------------------------ sequences and trees


@case("adding")
def adding(data, seed):
    """Hochreiter and Schmidhuber's problem at T = 100; always answering 1 costs 0.167."""
    del data
    steps = steps_of(1500)
    x, y = sequences.adding(50 * steps, 100, np.random.default_rng(seed))
    held, sums = sequences.adding(2000, 100, np.random.default_rng(1000 + seed))
    net = RNN(num_outputs=1, hidden=128, cell="gru")
    clock = Clock()
    with clock:
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
        estimator = jdl.Estimator(net, jdl.losses.squared_error, adam, seed=seed, log_every=1000)
        estimator.train(batches(x, y, batch_size=50, seed=seed), steps=steps)
    error = float(np.mean(np.square(estimator.predict(once(held)) - sums)))
    note = "GRU-128, 1,500 steps of 50"
    return [Row("adding problem, T = 100: test MSE", "≤", 0.01, error, clock.cpu, clock.wall, note)]


def solving(problem, make_optimizer, batch_size, seed, steps_of=100):
    """`train(steps) -> (fraction of test sequences solved, clock)`; each call continues.

    With `until`, training ends when that fraction of other sequences is solved, checked every ten
    steps. An answer is right if the class is, or if its error is below 0.2 (Martens and
    Sutskever).
    """
    make = {"adding": sequences.adding, "order": sequences.temporal_order}[problem]
    x, y = make(20_000, steps_of, np.random.default_rng(seed))
    test, others = (make(2000, steps_of, np.random.default_rng(n + seed)) for n in (1000, 2000))
    net = RNN(
        num_outputs=1 if problem == "adding" else 4,
        hidden=100,
        cell="vanilla",
        kernel_init=jax.nn.initializers.normal(0.1),
        recurrent_init=echo_init(15, 1.1),
    )
    losses = jdl.losses
    loss = losses.squared_error if problem == "adding" else losses.softmax_cross_entropy

    def hidden(params, batch):
        return net.apply({"params": params}, batch["image"], method="states")

    estimator = jdl.Estimator(net, loss, make_optimizer(hidden), seed=seed, log_every=1000)
    feed, clock = batches(x, y, batch_size=batch_size, seed=seed), Clock()

    def solved(x, answers):
        outputs = estimator.predict(once(x))
        if problem == "adding":
            right = np.abs(outputs - answers)[:, 0] < 0.2
        else:
            right = outputs.argmax(1) == answers
        return float(right.mean())

    def train(steps, until=None):
        try:
            for _ in range(1 if until is None else steps // 10):
                with clock:
                    estimator.train(feed, steps=steps if until is None else 10)
                if until is not None and solved(*others) >= until:
                    break
        except jdl.core.check.TrainingError:
            return 0.0, clock  # diverged
        return solved(*test), clock

    return train


@case("hf-rnn")
def hf_rnn(data, seed):
    """Long-term dependencies with vanilla RNNs: Hessian-free against first-order methods.

    Hessian-free for at most 100 steps. Plain SGD and momentum with clipped gradients, each with
    several learning rates for 12,000 steps, of which the best continues to 36,000.
    """
    del data
    rows = []

    def hf(hidden):
        return jdl.optim.hessian_free(structural_damping=0.03, hidden=hidden, max_cg_iterations=60)

    def sgd(rate, _):
        return optax.sgd(rate)

    def momentum(rate, _):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, 0.9))

    for problem in ("adding", "order"):
        reached, clock = solving(problem, hf, 1000, seed)(steps_of(100), until=0.995)
        told = []
        for name, make, rates in (
            ("SGD", sgd, (1e-1, 1e-2, 1e-3)),
            ("momentum, clipped", momentum, (1e-2, 1e-3)),
        ):
            trains = [solving(problem, partial(make, rate), 100, seed) for rate in rates]
            shares = [train(steps_of(12_000))[0] for train in trains]
            best = int(np.argmax(shares))
            share, long = trains[best](steps_of(24_000))
            told.append(
                f"{name} {shares[best]:.3f}, after 36,000 steps {share:.3f} in {long.cpu:.0f} s"
            )
        name = f"vanilla RNN, {problem}, T = 100, Hessian-free: solved"
        rows.append(Row(name, "≥", 0.99, reached, clock.cpu, clock.wall, "; ".join(told)))
    return rows


@case("recursive")
def recursive(data, seed):
    """Logical formulas: trained on depths 1 to 4, tested on 6 to 8, labels only at the roots."""
    del data
    rng = np.random.default_rng(seed)
    train = [trees.grow(trees.LOGIC, 1 + i % 4, rng) for i in range(8000)]
    test = [trees.grow(trees.LOGIC, 6 + i % 3, rng) for i in range(1000)]
    words, classes = trees.vocabulary(train), ("0", "1")
    inputs = ("word", "children", "schedule")
    packed, held = (trees.pack(some, words, classes) for some in (train, test))
    steps, rows = steps_of(3000), []
    for kind in ("nary", "child_sum"):
        net = TreeLSTM(num_outputs=2, vocabulary=len(words) + 2, hidden=48, kind=kind)
        clock = Clock()
        with clock:
            rate = optax.cosine_decay_schedule(3e-3, steps)
            estimator = jdl.classifier(
                net, optax.adam(rate), inputs=inputs, seed=seed, log_every=1000
            )
            estimator.train(batches(packed, batch_size=64, seed=seed), steps=steps)
        accuracy = 100 * estimator.evaluate(once(held))["accuracy"]
        name, cpu, wall = f"Tree-LSTM ({kind}), deeper trees: accuracy %", clock.cpu, clock.wall
        rows.append(Row(name, "≥", 98.0, accuracy, cpu, wall, "depth 1–4 → 6–8"))
    tokens = [trees.expression(tree) for tree in (*train, *test)]
    numbers = {word: i for i, word in enumerate(sorted({t for row in tokens for t in row}))}
    flat = sequences.pad([np.array([numbers[t] for t in row], np.int32) for row in tokens])
    labels = {"label": np.concatenate([packed["label"], held["label"]])}
    own = max(len(row) for row in tokens[: len(train)])
    part = {k: v[: len(train)] for k, v in (flat | labels).items()}
    part["image"] = part["image"][:, :own]
    net = RNN(num_outputs=2, hidden=96, vocabulary=len(numbers))
    clock = Clock()
    with clock:
        rate = optax.cosine_decay_schedule(3e-3, steps)
        estimator = jdl.classifier(
            net, optax.adam(rate), inputs=("image", "lengths"), seed=seed, log_every=1000
        )
        estimator.train(batches(part, batch_size=64, seed=seed), steps=steps)
    deeper = estimator.evaluate(once({k: v[len(train) :] for k, v in (flat | labels).items()}))
    shallow = estimator.evaluate(once(part))
    note = f"on its own training depths {100 * shallow['accuracy']:.1f}"
    accuracy = 100 * deeper["accuracy"]
    name = "LSTM on the flat string, deeper trees: accuracy %"
    return [*rows, Row(name, "", 0.0, accuracy, clock.cpu, clock.wall, note)]


# ------------------------------------------------------------------ the adversarial net


JUDGES: list[Any] = []


def judge(data):
    """The CNN whose features the Fréchet distance uses (not Inception), the same for all seeds."""
    if not JUDGES:
        net = CNN(blocks=(Block(filters=16), Block(filters=32)), units=128)
        estimator = jdl.classifier(net, "adam", seed=0, log_every=1000)
        estimator.train(batches(data.x, data.y), steps=steps_of(1800))
        scale = scores.calibration(net, estimator.params, data.x[:10_000], data.test_x)
        JUDGES.append((net, estimator.params, scale))
    return JUDGES[0]


@case("gan")
def gan(data, seed):
    """10,000 samples of the averaged generator, without labels, against 10,000 test images."""
    cnn, params, scale = judge(data)
    steps = steps_of(6000)
    net = GAN.of_shape((28, 28, 1))
    clock = Clock()
    with clock:
        adam = optax.adam(optax.linear_schedule(1e-3, 1e-4, steps), b1=0.5)
        estimator = jdl.Estimator(
            net.model, net.loss, optimizers(adam, adam), ema=0.995, seed=seed, log_every=1000
        )
        estimator.train(batches(data.x, batch_size=64, seed=seed), steps=steps)
    weights, state = estimator.evaluation_params, estimator.model_state
    sample = jax.jit(lambda z: net.sample(weights, state, z))
    z = jax.random.normal(jax.random.key(1000 + seed), (20, 500, net.latent))
    samples = np.concatenate([np.asarray(sample(part)) for part in z])
    seen = scores.features(cnn, params, samples)
    true = scores.features(cnn, params, data.test_x)
    distance = scores.frechet_distance(seen.features, true.features)
    coverage = scores.mode_coverage(seen.classes, 10)
    few = [
        np.median(scores.nearest(some[:500], data.x).distance) for some in (samples, data.test_x)
    ]
    note = (
        f"{steps} steps; floor {scale.floor:.1f}, one digit missing {scale.missing_class:.1f}, "
        f"noise {scale.noise:.0f}"
    )
    shares = f"rarest digit {100 * coverage.shares.min():.1f} %, KL {coverage.divergence:.3f}"
    near = "distance to the nearest training image, a test image's = 1: memorized is near 0"
    return [
        Row("GAN: Fréchet distance by our CNN", "≤", 40.0, distance, clock.cpu, clock.wall, note),
        Row("the same: seconds", "≤", 600.0, clock.cpu, clock.cpu, clock.wall),
        Row("the same: digits covered", "≥", 10, coverage.modes, 0, 0, shares),
        Row("the same: nearest neighbours", "", 0.0, float(few[0] / few[1]), 0, 0, near),
    ]


# ------------------------------------------------------------------ the table


def shown(rows_of_seeds):
    """One line per figure: the first seed's value, and the range over all seeds."""
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
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try the script")
    args = parser.parse_args()
    global SHARE
    SHARE = args.share
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
