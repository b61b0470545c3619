"""Compile: seconds for each optimizer's step, on one convolutional net; Lanczos beside it.

No compilation cache takes part; four are compiled at a time. Lanczos finds the largest eigenvalues
of the Gauss-Newton matrix of a deep autoencoder with 2.8 million parameters and of a perceptron
with 100 million, of which a few products show what one costs.
"""

import functools
import time

import jax
import numpy as np

import jdl
from jdl import curvature, losses
from jdl.core.check import ArgumentError
from jdl.models import CNN, MLP, Autoencoder
from jdl.optim import by_name
from jdl.optim.registry import REGISTRY
from jdl.train.step import build

FIRST = ("kfac", "momentum", "hf", "lbfgs", "adam", "muon", "lm", "newton", "cg")


def run(results, *, tiny, data):
    del data
    names = FIRST[:3] if tiny else [*FIRST, *(n for n in REGISTRY if n not in FIRST)]
    with results.guard("Lanczos, 2.8 M"):
        lanczos(results, "Lanczos, deep autoencoder", *deep_autoencoder(tiny), k=3, products=60)
    with results.guard("Lanczos, 100 M"):
        lanczos(results, "Lanczos, perceptron", *perceptron(tiny), k=1, products=8)
    jobs = {f"compile {n}": functools.partial(compile_step, results, n, tiny) for n in names}
    results.together(jobs, threads=1 if tiny else 4)


def compile_step(results, name, tiny):
    """Seconds to trace, lower and compile the Estimator's step."""
    side, batch_size = (8, 16) if tiny else (32, 128)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(size=(batch_size, side, side, 3)).astype(np.float32),
        "label": rng.integers(0, 10, batch_size).astype(np.int32),
    }
    net = CNN(units=16 if tiny else 256)
    program = build(jdl.from_linen(net), losses.softmax_cross_entropy, by_name(name))
    try:
        state = jax.eval_shape(program.init, jax.random.key(0), batch)
    except ArgumentError as error:  # a dense matrix of so many parameters
        results.add(f"compile {name}", skipped=str(error))
        return
    marks = [time.perf_counter()]
    traced = jax.jit(program.train, donate_argnums=0).trace(state, batch)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    compiled = lowered.compile()
    marks.append(time.perf_counter())
    trace, lower, compile_ = np.diff(marks)
    code = compiled.memory_analysis()
    results.add(
        f"compile {name}",
        seconds=marks[-1] - marks[0],
        trace=trace,
        lower=lower,
        compile=compile_,
        temporary_bytes=getattr(code, "temp_size_in_bytes", None),
    )


# ---------------------------------------------------------------------- Lanczos


def deep_autoencoder(tiny):
    """Model, loss and batch: 2.8 million parameters."""
    net = Autoencoder(widths=(16, 4) if tiny else (1000, 500, 250, 30))
    images = np.random.default_rng(0).uniform(size=(64 if tiny else 1000, 784))

    def loss(outputs, batch):
        return losses.sigmoid_cross_entropy(outputs, batch, target="image")

    return net, loss, {"image": images.astype(np.float32)}


def perceptron(tiny):
    """Model, loss and batch: 100 million parameters."""
    net = MLP(widths=(16, 16) if tiny else (9600, 9600))
    rng = np.random.default_rng(0)
    count = 64 if tiny else 1000
    images = rng.uniform(size=(count, 784)).astype(np.float32)
    labels = rng.integers(0, 10, count).astype(np.int32)
    return net, losses.softmax_cross_entropy, {"image": images, "label": labels}


def lanczos(results, name, net, loss, batch, *, k, products):
    """Eigenvalues, products and seconds."""
    model = jdl.from_linen(net)
    batch = jax.device_put(batch, jax.devices()[0])
    params, state = jax.jit(model.init)(jax.random.key(0), batch["image"][:1])
    objective = jdl.Objective(model, loss, state, batch)
    operator = curvature.operator(objective, params, "gauss_newton")
    vector = np.ones(operator.size, np.float32)
    start = time.perf_counter()
    operator.product(vector)
    first = time.perf_counter()
    operator.product(vector)
    second = time.perf_counter()
    begun = time.perf_counter()
    found = curvature.top_eigenpairs(operator, k, max_products=products, memory=2**33)
    seconds = time.perf_counter() - begun
    stats = jax.devices()[0].memory_stats() or {}
    results.add(
        f"{name}, {operator.size / 1e6:.3g} M",
        seconds=seconds,
        products=found.products,
        converged=found.converged,
        eigenvalues=list(found.values),
        residuals=list(found.residuals),
        product_ms=1e3 * (second - first),
        first_product_seconds=first - start,
        basis_bytes=found.memory,
        device_peak_bytes=stats.get("peak_bytes_in_use"),
    )
