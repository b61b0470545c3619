"""What curvature costs on this machine: products and whole steps, as multiples of a gradient."""

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
from jdl.core import check, tree
from jdl.losses import softmax_cross_entropy
from jdl.optim import by_name, diagnostics
from jdl.recipes.datasets import parse_size
from jdl.recipes.registry import recipe

MODELS = ("mlp", "cnn", "rnn")
OPTIMIZERS = ("sgd", "adam", "lbfgs", "cg", "hf", "kfac")


def measure(
    target: str, *, size: str | None, channels: int, batch_size: int, seconds: float
) -> output.Report:
    """Times of products and steps, as multiples of a gradient's."""
    name = check.one_of("MODEL", target or "mlp", MODELS)
    shape = (*parse_size(size, "digits"), channels)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.random((batch_size, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32),
    }
    model = jdl.from_linen(recipe(name).build(shape, 10))
    params, state = model.init(jax.random.key(0), batch["image"][:1])
    objective = jdl.Objective(model, softmax_cross_entropy, state, batch)
    seconds = seconds / (3 + len(OPTIMIZERS))

    gradient = jax.jit(lambda p: objective.value_and_grad(p)[:2])
    vector = gradient(params)[1]
    one, _ = _time(lambda: gradient(params), seconds)
    rows: list[Any] = [["gradient", one, 1.0, None]]
    products = {"Gauss-Newton product": objective.gnvp, "Hessian product": objective.hvp}
    for what, product in products.items():
        compiled = jax.jit(product)
        spent, _ = _time(lambda f=compiled: f(params, vector), seconds)  # type: ignore[misc]
        rows.append([what, spent, spent / one, None])
    for which in OPTIMIZERS:
        optimizer = optax.with_extra_args_support(by_name(which))

        def step(carry: Any, optimizer: Any = optimizer) -> Any:
            params, opt_state = carry
            value, grad, _ = objective.value_and_grad(params)
            extra = {"value_fn": objective.value, "objective": objective}
            with jax.numpy_dtype_promotion("standard"):  # optax itself is not strict
                extra |= {"value": value, "grad": grad}
                updates, opt_state = optimizer.update(grad, opt_state, params, **extra)
            return tree.add_scaled(params, 1.0, updates), opt_state

        compiled = jax.jit(step)
        carry = (params, jax.jit(optimizer.init)(params))

        def go(compiled: Any = compiled) -> Any:
            nonlocal carry
            carry = compiled(carry)
            return carry

        spent, steps = _time(go, seconds)
        found = diagnostics.read(carry[1])
        counted = None if found is None else float(found.gradient_equivalents) / steps
        rows.append([f"step of {which}", spent, spent / one, counted])
    device = jax.devices()[0].device_kind
    names = ("what", "seconds", "gradients", "counted")
    costs = [dict(zip(names, row, strict=True)) for row in rows]
    return output.Report(
        {"model": name, "device": device, "costs": costs},
        ["", "ms", "gradients", "as counted"],
        [[w, f"{1e3 * s:.3g}", f"{g:.2f}", "" if c is None else f"{c:.2f}"] for w, s, g, c in rows],
        f"{name} on {'×'.join(map(str, shape))}, {tree.size(params):,} parameters, "
        f"batch {batch_size}, one {device}",
        "As counted: the optimizer's own count of gradient-equivalents in a step, by FLOPs.",
    )


def _time(f: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """The median time of a call, without the first, which compiles; and the number of calls."""
    jax.block_until_ready(f())
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times), len(times) + 1
