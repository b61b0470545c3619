"""What curvature costs on this machine: products and whole steps, in gradients of one batch."""

import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdl.cli.bench import Args

MODELS = ("mlp", "cnn", "rnn")
OPTIMIZERS = ("sgd", "adam", "lbfgs", "cg", "hf", "kfac")


def run(args: "Args") -> None:
    """Measures and prints."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jdl
    from jdl.cli import progress
    from jdl.cli.recipes import recipe
    from jdl.cli.run_config import parse_size
    from jdl.core import check, tree
    from jdl.losses import softmax_cross_entropy
    from jdl.optim import by_name, diagnostics

    name = check.one_of("MODEL", args.target or "mlp", MODELS)
    shape = (*parse_size(args.size, "digits"), 3 if args.color else 1)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.random((args.batch_size, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, args.batch_size), jnp.int32),
    }
    model = jdl.from_linen(recipe(name).build(shape, 10))
    params, state = model.init(jax.random.key(0), batch["image"][:1])
    objective = jdl.Objective(model, softmax_cross_entropy, state, batch)
    seconds = args.seconds / (3 + len(OPTIMIZERS))

    gradient = jax.jit(lambda p: objective.value_and_grad(p)[:2])
    vector = gradient(params)[1]
    one, _ = _time(lambda: gradient(params), seconds)
    rows: list[Any] = [["gradient", one, 1.0, None]]
    for what, product in (
        ("Gauss-Newton product", objective.gnvp),
        ("Hessian product", objective.hvp),
    ):
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
                updates, opt_state = optimizer.update(
                    grad, opt_state, params, value=value, grad=grad, **extra
                )
            return tree.add_scaled(params, 1.0, updates), opt_state

        compiled = jax.jit(step)
        carry = (params, jax.jit(optimizer.init)(params))

        def go(compiled: Any = compiled) -> Any:
            nonlocal carry
            carry = compiled(carry)
            return carry

        spent, steps = _time(go, seconds)
        told = diagnostics.read(carry[1])
        counted = None if told is None else float(told.gradient_equivalents) / steps
        rows.append([f"step of {which}", spent, spent / one, counted])
    device = jax.devices()[0].device_kind
    if args.as_json:
        names = ("what", "seconds", "gradients", "counted")
        found = [dict(zip(names, row, strict=True)) for row in rows]
        print(json.dumps({"model": name, "device": device, "costs": found}))
        return
    progress.table(
        ["", "ms", "gradients", "as counted"],
        [
            [what, f"{1e3 * s:.3g}", f"{g:.2f}", "" if c is None else f"{c:.2f}"]
            for what, s, g, c in rows
        ],
        f"{name} on {'×'.join(map(str, shape))}, {tree.size(params):,} parameters, "
        f"batch {args.batch_size}, one {device}",
    )
    print("As counted: gradient-equivalents that the optimizer itself tells, by a step's FLOPs.")


def _time(f: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """The median time of a call, the first (which compiles) left out; and how many calls."""
    import jax

    jax.block_until_ready(f())
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times), len(times) + 1
