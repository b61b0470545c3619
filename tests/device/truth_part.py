"""Truth: the same numbers as on the CPU, after a kill, and however the step is placed.

Every optimizer makes 20 steps on a small net with batch norm and dropout, on the device and on the
CPU, from the same parameters, on the same batches, with the same keys. Compared is

    ‖θ_device − θ_cpu‖ / ‖θ_cpu − θ_0‖

with float32 matrix products ("highest"), and with the device's default (TF32 on recent GPUs), which
is reported alone.

Tolerance in "highest": 1e-4 after one step, as sums in another order change a gradient by about
1e-6 and no step should amplify that a hundredfold; 2e-2 after 20 steps. Where a method amplifies
rounding itself, no device can do better: `disturbed` is how far the CPU's own steps come apart when
every parameter begins 1e-7 off, and up to 50 times of it is within the tolerance too. Those that
need this are marked chaotic: `gauss_newton` solves a nearly singular system without damping; line
searches and inner iterations (`lbfgs`, `cg`, `hf`, `newton`) may end one trial earlier; `lion` and
the first steps of `adam` and its like take the sign of gradients near zero.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from nets import Small, size
from results import timed

import jdl
from jdl import losses
from jdl.data import from_arrays
from jdl.optim import by_name
from jdl.optim.kronecker import factors
from jdl.optim.kronecker.moments import find_layers
from jdl.optim.registry import REGISTRY
from jdl.train.step import build

STEPS, BATCH = 20, 64
TOLERANCE = {1: 1e-4, STEPS: 2e-2}
AMPLIFIED = 50.0  # of what a disturbance of 1e-7 makes of itself
DENSE = ("newton", "gauss_newton", "lm")  # their matrices are made whole: a smaller net
FAMILIES = ("momentum", "adam", "muon", "lbfgs", "hf", "kfac")  # one a family, for a dry run


def run(results, *, tiny, data):
    """All comparisons, several at a time: what takes long is to compile."""
    del data
    jobs = {RESUMED: functools.partial(kill_and_resume, results)}
    jobs |= {
        f"{kind} against float64": functools.partial(curvature_product, results, kind)
        for kind in ("gnvp", "hvp", "grad")
    }
    jobs["K-FAC factors against float64"] = functools.partial(kronecker_factors, results)
    batches = digit_batches()
    for name in FAMILIES:
        jobs[f"optimizer {name}"] = functools.partial(one_optimizer, results, name, batches)
    jobs["parallel on one device"] = functools.partial(placements, results)
    for name in () if tiny else REGISTRY:
        job = functools.partial(one_optimizer, results, name, batches)
        jobs.setdefault(f"optimizer {name}", job)
    results.together(jobs, threads=2 if tiny else 11)


# ---------------------------------------------------------------------- optimizers


def digits(count=STEPS * BATCH):
    """Digits as float32 [n, 8, 8, 1] in [0, 1] and their classes."""
    batch = next(iter(jdl.data.digits(batch_size=count, epochs=1, shuffle=True)))
    return np.asarray(batch["image"], np.float32) / 255.0, np.asarray(batch["label"])


def digit_batches():
    """A batch of digits for each step."""
    images, labels = digits()
    rows = [slice(i, i + BATCH) for i in range(0, STEPS * BATCH, BATCH)]
    return [{"image": images[r], "label": labels[r]} for r in rows]


def one_optimizer(results, name, batches):
    """A row: the distances of one optimizer's runs."""
    net = Small(features=2, hidden=4) if name in DENSE else Small()
    program = build(jdl.from_linen(net), losses.softmax_cross_entropy, by_name(name))
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        state = jax.jit(program.init)(jax.random.key(0), batches[0])
        beside = state._replace(params=disturbed(state.params))
    step = jax.jit(program.train)
    with jax.default_matmul_precision("highest"):
        reference, seconds = timed(lambda: trajectory(step, state, batches, cpu))
        rounding = distances(trajectory(step, beside, batches, cpu), reference)
        there, device_seconds = timed(lambda: trajectory(step, state, batches, device))
    exact = distances(there, reference)
    figures, chaotic = {"within": True}, False
    for n in (1, STEPS):
        allowed = max(TOLERANCE[n], AMPLIFIED * rounding[n])
        chaotic |= rounding[n] > TOLERANCE[n] / 10
        figures |= {f"after_{n}": exact[n], f"disturbed_{n}": rounding[n]}
        figures["within"] &= bool(exact[n] <= allowed)
    figures["chaotic"] = chaotic
    if device.platform != "cpu":
        default = distances(trajectory(step, state, batches, device), reference)
        figures |= {f"tf32_after_{n}": default[n] for n in (1, STEPS)}
    figures |= {"seconds_cpu": seconds, "seconds_device": device_seconds}
    results.add(f"optimizer {name}", **figures)


def disturbed(params):
    """Every parameter off by about 1e-7 of its size."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    off = [
        x * (1 + 1e-7 * jax.random.normal(k, x.shape)) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, off)


def trajectory(step, state, batches, device):
    """Flat parameters before, after one step and after all, on the host."""
    with jax.default_device(device):
        state = jax.device_put(state, device)
        found = {0: flat(state.params)}
        for i, batch in enumerate(batches, 1):
            state, _ = step(state, jax.device_put(batch, device))
            if i in (1, len(batches)):
                found[i] = flat(state.params)
    return found


def flat(tree):
    """All numbers of a tree, float64, in one row."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def distances(found, reference):
    """After how many steps -> how far the way from the start differs from the reference's."""
    ways = [{n: x[n] - x[0] for n in x if n > 0} for x in (found, reference)]
    return {n: relative(ways[0][n] - way, way) for n, way in ways[1].items()}


def relative(difference, whole):
    """The quotient of their norms."""
    return float(np.linalg.norm(difference) / max(np.linalg.norm(whole), 1e-30))


# ---------------------------------------------------------------------- curvature


def objective_of(dtype):
    """A small net's objective and parameters without randomness, its types as asked for."""
    images, labels = digits(256)
    model = jdl.from_linen(Small(dropout=0.0))
    with jax.default_device(jax.devices("cpu")[0]):
        params, state = jax.jit(model.init)(jax.random.key(1), images[:1])
    params, state, images = jax.tree.map(lambda x: np.asarray(x, dtype), (params, state, images))
    batch = {"image": images, "label": labels}
    objective = jdl.Objective(model, losses.softmax_cross_entropy, state, batch)
    return objective, params


def vector_like(params):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), params)


def on_each(function):
    """`function(dtype)` in float64 on the CPU, in float32 there and on the device, and by default.

    What it gives are trees; given are the relative distances to the first.
    """
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]

    def under(place, dtype, precision):
        chosen = contextlib.nullcontext() if precision is None else precision
        with jax.default_device(place), chosen:
            return flat(function(dtype))

    highest = jax.default_matmul_precision
    with jax.enable_x64(True):
        exact = under(cpu, np.float64, highest("highest"))
    found = {
        "cpu_float32": under(cpu, np.float32, highest("highest")),
        "device_highest": under(device, np.float32, highest("highest")),
        "device_default": under(device, np.float32, None),
    }
    return {name: relative(x - exact, exact) for name, x in found.items()}


def curvature_product(results, kind):
    """The Hessian's or the Gauss-Newton matrix's, which ask for full precision, or a gradient."""

    def product(dtype):
        objective, params = objective_of(dtype)
        if kind == "grad":
            return jax.jit(lambda o, p: o.grad(p))(objective, params)
        product = jax.jit(lambda o, p, v: getattr(o, kind)(p, v))
        return product(objective, params, vector_like(params))

    errors = on_each(product)
    within = errors["device_highest"] <= 1e-4  # a hundred times float32's rounding
    if kind != "grad":
        within &= errors["device_default"] <= 1e-4
    results.add(f"{kind} against float64", within=bool(within), **errors)


def kronecker_factors(results):
    """The second moments of every layer that K-FAC knows, of the loss's own gradients."""

    def layers(dtype):
        objective, params = objective_of(dtype)

        @jax.jit
        def second_moments(objective, params):
            found = find_layers(objective, params)
            options = factors.Options("empirical_fisher")  # float64 would draw other targets
            state, key = factors.init(params, options, found), jax.random.key(0)
            return factors.refresh_moments(objective, params, found, state, key, options).moments

        return second_moments(objective, params)

    errors = on_each(layers)
    within = bool(errors["device_highest"] <= 1e-4)
    results.add("K-FAC factors against float64", within=within, **errors)


# ---------------------------------------------------------------------- placement


def placements(results):
    """The Estimator's three ways to place a step, on one device, without randomness."""
    images, labels = digits(5 * BATCH)
    found, options = {}, {"devices": jax.devices()[:1], "seed": 0}
    for parallel in ("jit", "fsdp", "pmap"):
        data = from_arrays(images, labels, batch_size=BATCH, shuffle=False)
        net, optimizer = Small(dropout=0.0), optax.sgd(0.05, momentum=0.9)
        estimator = jdl.classifier(net, optimizer, parallel=parallel, **options)
        with jax.default_matmul_precision("highest"):
            estimator.initialize(data)
            start = flat(estimator.params)
            found[parallel] = flat(estimator.train(data, steps=5).params)
    for parallel in ("fsdp", "pmap"):
        distance = relative(found[parallel] - found["jit"], found["jit"] - start)
        results.add(f"parallel={parallel} against jit", within=distance <= 1e-5, after_5=distance)


# ---------------------------------------------------------------------- kill and resume

RESUMED = "kill and resume, kfac, deterministic"
LAST, KILLED_AT, SAVED_EVERY = 24, 17, 8


def kill_and_resume(results):
    """Two trainings at once, one of them killed; that one again, and both ends compared."""
    with tempfile.TemporaryDirectory(prefix="jdl-resume-") as folder:
        compare_resumed(results, folder)


def training(folder, name):
    """A training in a process of its own."""
    command = [sys.executable, __file__, folder, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def compare_resumed(results, folder):
    runs = [training(folder, name) for name in ("whole", "killed")]
    outputs = [run.communicate(timeout=max(results.left(), 1.0))[0] for run in runs]
    runs.append(training(folder, "resumed"))
    outputs.append(runs[-1].communicate(timeout=max(results.left(), 1.0))[0])
    codes = [run.returncode for run in runs]
    if codes != [0, -signal.SIGKILL, 0]:
        said = "\n".join(output[-400:] for output in outputs)
        raise RuntimeError(f"exit codes {codes}, expected [0, -9, 0]: {said}")
    whole, after = (np.load(Path(folder) / f"{name}.npy") for name in ("whole", "resumed"))
    results.add(
        RESUMED,
        within=bool(np.array_equal(whole, after)),
        steps=LAST,
        killed_at=KILLED_AT,
        resumed_from=KILLED_AT // SAVED_EVERY * SAVED_EVERY,
        largest_difference=float(np.max(np.abs(whole - after))),
    )


def train_to_the_end(folder, name):
    """The process: K-FAC on a net with batch norm and dropout, with reproducible kernels."""
    from jdl.train.parallel import make_deterministic

    make_deterministic()

    def kill(report):
        if name == "killed" and report["step"] == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    images, labels = digits(10 * BATCH)
    data = from_arrays(images, labels, batch_size=BATCH, shuffle=True, seed=0)
    workdir = Path(folder) / ("whole" if name == "whole" else "interrupted")
    options = {"save_every": SAVED_EVERY, "log_every": 1, "devices": jax.devices()[:1]}
    estimator = jdl.classifier(Small(), "kfac", workdir=workdir, hooks=[kill], **options)
    estimator.train(data, max_steps=LAST)
    np.save(Path(folder) / f"{name}.npy", flat(estimator.params).astype(np.float32))
    print(f"{name}: {size(estimator.params)} parameters, step {estimator.step}")


if __name__ == "__main__":
    train_to_the_end(*sys.argv[1:])
