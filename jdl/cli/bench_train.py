"""An Estimator's speed against a bare jit loop of the same model, optimizer and batch."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdl
from jdl.cli import output
from jdl.core import check
from jdl.core.model import Model
from jdl.data import from_arrays
from jdl.recipes.datasets import parse_size
from jdl.recipes.registry import recipe

MODELS = ("cnn", "mlp", "rnn")
_SLICES = 5  # turns of each loop, whose median counts
_FIRST = 3  # steps that compile and warm up


def measure(
    target: str, *, size: str | None, channels: int, batch_size: int, seconds: float
) -> output.Report:
    """Images per second of an Estimator and of a bare loop, in turns."""
    name = check.one_of("MODEL", target or "cnn", MODELS)
    shape = (*parse_size(size, "a tar"), channels)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4 * batch_size, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, 4 * batch_size).astype(np.int32)
    model = jdl.from_linen(recipe(name).build(shape, 10))
    estimator = jdl.classifier(model, optax.sgd(0.01))
    data = from_arrays(images, labels, batch_size=batch_size, shuffle=False, seed=0)
    loops: dict[str, Callable[[int], Any]] = {
        "jdl": lambda steps: estimator.train(data, steps=steps),
        "bare jit loop": bare_loop(model, images, labels, batch_size),
    }
    step = {}
    for how, loop in loops.items():
        loop(_FIRST)
        start = time.perf_counter()
        loop(_FIRST)
        step[how] = (time.perf_counter() - start) / _FIRST
    steps = max(int(seconds / _SLICES / max(step.values())), 1)
    rates: dict[str, list[float]] = {how: [] for how in loops}
    for _ in range(_SLICES):
        for how, loop in loops.items():
            start = time.perf_counter()
            loop(steps)
            rates[how].append(steps * batch_size / (time.perf_counter() - start))
    medians = {how: statistics.median(r) for how, r in rates.items()}
    ratio = medians["jdl"] / medians["bare jit loop"]
    device = jax.devices()[0].device_kind
    return output.Report(
        {"model": name, "device": device, "images_per_second": medians, "ratio": ratio},
        ["", "images/s"],
        [[how, f"{rate:.1f}"] for how, rate in medians.items()],
        f"{name} on {'×'.join(map(str, shape))}, batch {batch_size}, SGD, one {device}",
        f"jdl runs at {ratio:.3f} of the bare loop's speed.",
    )


def bare_loop(
    model: Model, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> Callable[[int], Any]:
    """`run(steps)` of a loop that only calls the step."""
    optimizer = optax.sgd(0.01)

    def scaled(image: Any) -> Any:
        return jnp.asarray(image, jnp.float32) / 255.0

    params, state = model.init(jax.random.key(0), scaled(images[:1]))
    carry = (params, state, optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, image: Any, label: Any, i: Any) -> Any:
        params, state, opt_state = carry

        def loss(params: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(1), i)
            logits, new = model.apply(params, state, scaled(image), key=key, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return jnp.mean(losses), (new, jnp.mean(jnp.argmax(logits, -1) == label))

        (value, (new, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), new, opt_state), value

    count = 0

    def run(steps: int) -> None:
        nonlocal carry, count
        for _ in range(steps):
            start = count * batch_size % len(images)
            rows = slice(start, start + batch_size)
            carry, value = step(carry, images[rows], labels[rows], count)
            count += 1
        jax.block_until_ready(value)

    return run
