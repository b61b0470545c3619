"""K-FAC with its defaults against tuned Nesterov and tuned Adam, for the same time.

    make bench-kfac DATA=folder       the deep autoencoder on MNIST, 120 s each
    make bench-kfac DATA=folder ARGS="--problems fashion,narrow,cnn,lstm --seconds 60"

Time is process CPU time ÷ 2 (the cores are shared), with wall time next to it; compilation and
evaluation are not counted. The contestants take turns of a few seconds. Nesterov and Adam are tuned
beforehand for the autoencoder on MNIST, and for other problems with a grid of learning rates
(`--tune` seconds each); K-FAC has its defaults everywhere. The score of an autoencoder is the
squared error per image, of a classifier the training loss.

If kfac-jax can be imported, it runs on the autoencoders, with the settings of its README and
K-FAC's batch size. Its newest source works with current JAX, its last release does not: put a clone
of it and tfp-nightly on the path.

MNIST's and Fashion-MNIST's gzipped IDX files are read from --data, as `mnist/` and `fashion/` (the
latter is Debian's package dataset-fashion-mnist). Missing problems are reported and skipped.
"""

import argparse
import functools
import importlib.util
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matrix_nets import idx_images

import jdl
from jdl import losses
from jdl.core.objective import Objective
from jdl.data import digits
from jdl.models import CNN, RNN, Autoencoder
from jdl.models.layers import sparse_init
from jdl.optim import diagnostics, kfac_for, kronecker, quadratic
from jdl.optim.kronecker import factors, moments

SLICE = 5.0  # seconds of a contestant's turn
KFAC_JAX_DAMPING = 1.0  # its README's; its docstring's 150 takes half of the time to come down from
AUTOENCODERS = ("autoencoder", "mnist", "narrow", "fashion")
RATES = {"nesterov": (0.003, 0.01, 0.03, 0.1), "adam": (3e-4, 1e-3, 3e-3)}


def digit_images():
    """The bundled digits, to classify."""
    batch = next(iter(digits(batch_size=1024, epochs=1, shuffle=False)))
    return {"image": jnp.asarray(batch["image"], jnp.float32) / 255.0, "label": batch["label"]}


def squared_error(outputs, batch):
    return jnp.sum(jnp.square(jax.nn.sigmoid(outputs) - batch["image"]), axis=1)


class Problem:
    """A model, a loss, data, and the score to report."""

    def __init__(self, module, loss, batch, score, rates=None, batches=(1000, 200)):
        self.model, self.loss, self.score, self.rates = jdl.from_linen(module), loss, score, rates
        self.batch = {name: jnp.asarray(x) for name, x in batch.items()}
        self.size = len(self.batch["image"])
        self.kfac_batch, self.first_batch = batches
        self.params, _ = self.model.init(jax.random.key(0), self.batch["image"][:1])

        @jax.jit
        def evaluate(params):
            outputs = self.model.apply(params, {}, self.batch["image"])[0]
            return jnp.mean(self.score(outputs, self.batch))

        self.evaluate = evaluate


def autoencoder(images, widths=(1000, 500, 250, 30), rates=None, examples=5000):
    loss = functools.partial(losses.sigmoid_cross_entropy, target="image")
    module = Autoencoder(widths=widths, kernel_init=sparse_init(15))
    return Problem(module, loss, {"image": images[:examples]}, squared_error, rates)


def problems(data):
    """name -> a function that makes it, or None where its data is missing."""
    mnist, fashion = (
        None if (found := idx_images(data, name)) is None else found[0]
        for name in ("mnist", "fashion")
    )
    tuned = {"nesterov": 0.01, "adam": 3e-3}
    softmax = losses.softmax_cross_entropy
    cnn = CNN(num_classes=10, units=128, dropout=0.0)
    given = {
        "autoencoder": mnist is not None and (lambda: autoencoder(mnist, rates=tuned)),
        "mnist": mnist is not None and (lambda: autoencoder(mnist, rates=tuned, examples=60000)),
        "narrow": mnist is not None and (lambda: autoencoder(mnist, (400, 200, 100, 20))),
        "fashion": fashion is not None and (lambda: autoencoder(fashion)),
        "cnn": lambda: Problem(cnn, softmax, digit_images(), softmax, batches=(256, 64)),
        "lstm": lambda: Problem(
            RNN(num_outputs=10, hidden=64), softmax, digit_images(), softmax, batches=(256, 64)
        ),
    }
    return {name: make or None for name, make in given.items()}


def nesterov(rate):
    """Sutskever's schedule: μ = min(1 − 2^(−1 − log₂(⌊t/250⌋ + 1)), 0.99)."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None, **_):
        count, velocity = state
        mu = jnp.minimum(1 - 0.5 / (jnp.floor(count / 250) + 1), 0.99)
        velocity = jax.tree.map(lambda v, g: mu * v - rate * g, velocity, grads)
        steps = jax.tree.map(lambda v, g: mu * v - rate * g, velocity, grads)
        return steps, (count + 1, velocity)

    return optax.GradientTransformationExtraArgs(init, update)


MAKE = {"nesterov": nesterov, "adam": optax.adam}


class Contestant:
    """One optimizer's run on a problem, which can be continued for some seconds at a time."""

    def __init__(self, problem, optimizer, batch_size):
        self.problem, self.optimizer = problem, optax.with_extra_args_support(optimizer)
        self.order = self._order(min(batch_size, problem.size))
        self.seconds = self.wall = 0.0
        self.steps = 0

        @functools.partial(jax.jit, donate_argnums=0)
        def step(carry, rows):
            params, state = carry
            batch = jax.tree.map(lambda x: x[rows], problem.batch)
            objective = Objective(problem.model, problem.loss, {}, batch)
            value, grad, _ = objective.value_and_grad(params)
            updates, state = self.optimizer.update(
                grad, state, params, value=value, grad=grad, objective=objective
            )
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, problem.params)
        self.carry = (params, jax.jit(self.optimizer.init)(params))
        self.rows = jnp.asarray(next(self.order))
        self.step = step.lower(self.carry, self.rows).compile()
        self.score = float(problem.evaluate(self.carry[0]))

    def _order(self, size):
        rng = np.random.default_rng(0)
        while True:
            order = rng.permutation(self.problem.size).astype(np.int32)
            for i in range(0, self.problem.size - size + 1, size):
                yield order[i : i + size]

    def run(self, until):
        """Continues until the clock shows `until` seconds."""
        while self.seconds < until:
            rows = jnp.asarray(next(self.order))
            start, wall = time.process_time(), time.perf_counter()
            self.carry = jax.block_until_ready(self.step(self.carry, rows))
            self.seconds += (time.process_time() - start) / 2
            self.wall += time.perf_counter() - wall
            self.steps += 1
        self.score = float(self.problem.evaluate(self.carry[0]))
        return self.score


class KfacJax:
    """kfac-jax's own loop on an autoencoder, with the same clock as a `Contestant`."""

    def __init__(self, problem, batch_size):
        import kfac_jax

        def loss(params, images):
            logits = problem.model.apply(params, {}, images)[0]
            logits = logits.reshape(len(images), -1)
            kfac_jax.register_multi_bernoulli_predictive_distribution(logits, images)
            return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, images), axis=-1))

        self.problem = problem
        self.optimizer = kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(loss),
            l2_reg=0.0,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            initial_damping=KFAC_JAX_DAMPING,
            num_burnin_steps=0,
        )
        self.order = Contestant._order(self, min(batch_size, problem.size))
        for warm in (True, False):  # its functions are compiled in its first steps
            self.params, self.key = jax.tree.map(jnp.copy, problem.params), jax.random.key(0)
            self.seconds = self.wall = 0.0
            self.steps = 0
            self.state = self.optimizer.init(self.params, self.key, problem.batch["image"][:1000])
            while warm and self.steps < 12:
                self.run(self.seconds + 1e-6)
        self.score = float(problem.evaluate(self.params))

    def run(self, until):
        while self.seconds < until:
            batch = self.problem.batch["image"][jnp.asarray(next(self.order))]
            self.key, key = jax.random.split(self.key)
            start, wall = time.process_time(), time.perf_counter()
            self.params, self.state, _ = self.optimizer.step(
                self.params, self.state, key, batch=batch, global_step_int=self.steps
            )
            jax.block_until_ready(self.params)
            self.seconds += (time.process_time() - start) / 2
            self.wall += time.perf_counter() - wall
            self.steps += 1
        self.score = float(self.problem.evaluate(self.params))
        return self.score


def tuned_rate(problem, name, seconds):
    """The best value of a grid, by the score after `seconds` each."""
    if problem.rates:
        return problem.rates[name]
    scores = {}
    for rate in RATES[name]:
        score = Contestant(problem, MAKE[name](rate), problem.first_batch).run(seconds)
        scores[rate] = score if np.isfinite(score) else np.inf
    return min(scores, key=scores.get)


def profile(problem, repeats=5):
    """Seconds of the parts of a step, and of a gradient, at K-FAC's batch size."""
    batch = jax.tree.map(lambda x: x[: problem.kfac_batch], problem.batch)
    objective, params = Objective(problem.model, problem.loss, {}, batch), problem.params
    found = moments.find_layers(objective, params)
    key, lam = jax.random.key(0), jnp.float32(0.1)
    some = quadratic.subset(objective, 256)

    def timed(f, *args):
        f = jax.jit(f)
        out = jax.block_until_ready(f(*args))
        start = time.process_time()
        for _ in range(repeats):
            jax.block_until_ready(f(*args))
        return (time.process_time() - start) / 2 / repeats, out

    options = factors.Options()
    state = factors.init(params, options, found)
    times = {}
    times["gradient"], (_, grad, _) = timed(lambda o, p: o.value_and_grad(p), objective, params)
    times["factors"], state = timed(
        lambda o, p, s: factors.refresh_moments(o, p, found, s, key, options),
        objective,
        params,
        state,
    )
    times["inverses"], (state, _) = timed(lambda s: factors.refresh_inverses(found, s, lam), state)
    times["products"], step = timed(lambda s, g: factors.apply(found, s, g, lam), state, grad)
    times["model"], _ = timed(
        lambda o, p, v: (quadratic.quadratic(o, p, [v, v]), o.value(p)), some, params, step
    )
    return {name: round(1e3 * t, 1) for name, t in times.items()}


def race(name, problem, args):
    rates = {n: tuned_rate(problem, n, args.tune) for n in args.optimizers.split(",")}
    runs = {n: Contestant(problem, MAKE[n](r), problem.first_batch) for n, r in rates.items()}
    rows = jax.tree.map(lambda x: x[: problem.kfac_batch], problem.batch)
    objective = Objective(problem.model, problem.loss, {}, rows)
    runs["kfac"] = Contestant(problem, kfac_for(objective, problem.params), problem.kfac_batch)
    if importlib.util.find_spec("kfac_jax") and name in AUTOENCODERS:
        runs["kfac-jax"] = KfacJax(problem, problem.kfac_batch)
    if args.verbose:
        print(kronecker.describe(objective, problem.params))
    marks = sorted({m for m in (15, 30, 60, 120) if m < args.seconds} | {args.seconds})
    curves = {n: [(0.0, run.score)] for n, run in runs.items()}
    clock = 0.0
    while clock < args.seconds:
        clock = min([m for m in marks if m > clock] + [clock + SLICE, args.seconds])
        for n, run in runs.items():
            curves[n].append((clock, run.run(clock)))
        if clock in marks:
            scores = {n: round(run.score, 4) for n, run in runs.items()}
            print(json.dumps({"problem": name, "seconds": clock, **scores}), flush=True)
    for n, run in runs.items():
        figures = {
            "problem": name,
            "optimizer": n,
            "learning_rate": rates.get(n, "default"),
            "steps": run.steps,
            "ms_per_step": round(1e3 * run.seconds / run.steps, 1),
            "wall_seconds": round(run.wall, 1),
        }
        if args.target is not None and name in AUTOENCODERS:
            reached = [t for t, score in curves[n] if score <= args.target]
            figures[f"seconds_to_{args.target}"] = reached[0] if reached else None
        if n == "kfac":
            account = diagnostics.read(run.carry[1])
            figures["damping"] = float(account.damping)
            share = float(account.factor_work / account.gradient_equivalents)
            figures["factors_share_of_work"] = round(share, 4)
        print(json.dumps(figures), flush=True)
    parts = profile(problem)
    per_step = runs["kfac"].seconds / runs["kfac"].steps * 1e3
    gradients = round(per_step / parts["gradient"], 2)
    print(json.dumps({"problem": name, "ms": parts, "kfac_step_in_gradients": gradients}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", default="autoencoder")
    parser.add_argument("--optimizers", default="nesterov,adam", help="that K-FAC meets")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument(
        "--tune", type=float, default=10.0, help="seconds for each rate of the grid"
    )
    parser.add_argument("--target", type=float, default=1.0, help="autoencoders' error to time")
    parser.add_argument("--data", default="data", help="folder of mnist/ and fashion/")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    known = problems(args.data)
    for name in filter(None, args.problems.split(",")):
        if known.get(name) is None:
            print(json.dumps({"problem": name, "skipped": f"no data for it under {args.data}"}))
            continue
        race(name, known[name](), args)


if __name__ == "__main__":
    main()
