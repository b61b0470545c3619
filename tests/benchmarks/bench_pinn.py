"""Where curvature wins: Poisson's equation by a small network, error against seconds.

    make bench-pinn ARGS="--seconds 60 --seeds 3 --out folder"

A net 2-32-32-1 with tanh (1,185 parameters), float64; 900 residuals of −Δu = 2 π² sin πx sin πy
inside the unit square and 120 of u = 0 on its border, these with 100 times the weight. The error is
that of u, relative, in L2, at 4,000 random points; seconds are the process's CPU seconds divided by
the number of cores, without compilation and without these evaluations. Adam has a cosine to the end
of the time and the best of four rates; all others have their defaults. Writes `pinn.json` after
each seed, from which it goes on, then `pinn.png` and a table of medians and ranges. On a machine
that others use too, `taskset -c 0 make …` counts the seconds of one core: waiting threads spin.
"""

import argparse
import contextlib
import functools
import json
import os
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree

from jdl import optim
from jdl.compare import drawing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import equinox
    import optimistix

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BORDER = 100.0


def network(seed):
    """The starting parameters, raveled; and net(parameters, point)."""
    sizes = (2, 32, 32, 1)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    start = [
        (jax.random.normal(key, (a, b)) * (2 / (a + b)) ** 0.5, jnp.zeros(b))
        for key, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]
    flat, unravel = ravel_pytree(start)

    def net(flat, x):
        *hidden, (w, b) = unravel(flat)
        for w_, b_ in hidden:
            x = jnp.tanh(x @ w_ + b_)
        return (x @ w + b)[0]

    return flat, net


def problem(seed):
    """The start, the residuals, ½ ‖r‖² and the error."""
    start, net = network(seed)
    solution = lambda x: jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])  # noqa: E731

    def inside(flat, x):
        bend = jnp.trace(jax.hessian(lambda x: net(flat, x))(x))
        return bend + 2 * jnp.pi**2 * solution(x)

    axis, ends = (jnp.arange(30) + 0.5) / 30, jnp.array([0.0, 1.0])
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    sides = jnp.stack(jnp.meshgrid(axis, ends), -1).reshape(-1, 2)
    border = jnp.concatenate([sides, sides[:, ::-1]])
    residuals = optim.Residuals.of(inside, grid, 1 / len(grid)) + optim.Residuals.of(
        net, border, BORDER / len(border)
    )
    test = jnp.asarray(np.random.default_rng(1).random((4000, 2)))
    exact = jax.vmap(solution)(test)

    def error(flat):
        found = jax.vmap(functools.partial(net, flat))(test)
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

    return start, residuals, lambda flat: 0.5 * jnp.sum(jnp.square(residuals(flat))), jax.jit(error)


def optimizer_step(optimizer, value, residuals):
    """One step of any optax transformation."""

    def step(carry):
        x, state = carry
        f, grad = jax.value_and_grad(value)(x)
        extras = {"value": f, "grad": grad, "value_fn": value, "residual_fn": residuals}
        with jax.numpy_dtype_promotion("standard"):
            if not hasattr(state, "diagnostics"):
                extras.pop("residual_fn")
            updates, state = optax.with_extra_args_support(optimizer).update(
                grad, state, x, **extras
            )
        return optax.apply_updates(x, updates), state

    return step


def curve(step, carry, error, seconds, steps):
    """[(seconds, steps, error)] of some steps at a time, until the time is over."""
    some = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, lambda _, c: step(c), carry))
    some = some.lower(carry).compile()
    rows, spent, count = [(0.0, 0, float(error(carry[0])))], 0.0, 0
    while spent < seconds:
        begun = time.process_time()
        carry = jax.block_until_ready(some(carry))
        spent += (time.process_time() - begun) / CORES
        count += steps
        rows.append((spent, count, float(error(carry[0]))))
    return rows


def adam(seconds, start, value, error, residuals):
    """The curve of the best rate, which a tenth of the time each chooses by the error."""

    def run(rate, seconds, total):
        made = optax.adam(optax.cosine_decay_schedule(rate, total))
        step = optimizer_step(made, value, residuals)
        return curve(step, (start, made.init(start)), error, seconds, 100)

    trial = {rate: run(rate, seconds / 10, 10**9) for rate in RATES}
    rate = min(RATES, key=lambda rate: trial[rate][-1][2])
    each = trial[rate][-1][0] / trial[rate][-1][1]
    return f"Adam, rate {rate:g}, cosine", run(rate, seconds, int(seconds / each))


def scipy_curve(seconds, start, residuals, error):
    """Levenberg-Marquardt as a trust region (`trf`), which has no bounds here."""
    r = jax.jit(residuals.__call__)
    jacobian = jax.jit(residuals.jacobian)
    jax.block_until_ready((r(start), jacobian(start)))
    rows, begun, evaluating = [(0.0, 0, float(error(start)))], time.process_time(), 0.0

    def watched(x):
        nonlocal evaluating
        at = time.process_time()
        spent = (at - begun - evaluating) / CORES
        rows.append((spent, len(rows), float(error(jnp.asarray(x)))))
        evaluating += time.process_time() - at
        if spent > seconds:
            raise TimeoutError
        return np.asarray(jacobian(x))

    options = {"method": "trf", "x_scale": "jac", "ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    with contextlib.suppress(TimeoutError):
        scipy.optimize.least_squares(
            lambda x: np.asarray(r(x)), np.asarray(start), watched, **options
        )
    return rows


def optimistix_curve(seconds, start, residuals, error):
    """Its Levenberg-Marquardt, a step at a time, as its documentation shows."""
    solver = optimistix.LevenbergMarquardt(rtol=1e-15, atol=1e-15)
    fn = lambda x, _: (residuals(x), None)  # noqa: E731
    out, _ = jax.eval_shape(fn, start, None)
    state = solver.init(fn, start, None, {}, out, None, frozenset())
    step = equinox.filter_jit(lambda x, state: solver.step(fn, x, None, {}, state, frozenset()))
    step(start, state)
    x, rows, spent = start, [(0.0, 0, float(error(start)))], 0.0
    while spent < seconds:
        begun = time.process_time()
        x, state, _ = jax.block_until_ready(step(x, state))
        spent += (time.process_time() - begun) / CORES
        rows.append((spent, len(rows), float(error(x))))
    return rows


METHODS = {
    "optax L-BFGS": (lambda: optax.lbfgs(), 20),
    "L-BFGS": (lambda: optim.lbfgs(), 20),
    "BFGS": (lambda: optim.bfgs(), 20),
    "self-scaled Broyden": (lambda: optim.bfgs(update="ssbroyden"), 20),
    "Levenberg-Marquardt": (lambda: optim.levenberg_marquardt(), 2),
    "Gauss-Newton": (lambda: optim.gauss_newton(), 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/pinn"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    held = arguments.out / "pinn.json"
    found = json.loads(held.read_text()) if held.exists() else {}
    if found.setdefault("seconds", arguments.seconds) != arguments.seconds:
        parser.error(f"--out: {held} is of --seconds {found['seconds']:g}; give another folder")
    found = found.setdefault("curves", {})
    for seed in range(len(found.get("Adam", ())), arguments.seeds):
        start, residuals, value, error = problem(seed)
        curves = dict([adam(arguments.seconds, start, value, error, residuals)])
        for name, (make, steps) in METHODS.items():
            made = make()
            step = optimizer_step(made, value, residuals)
            carry = (start, made.init(start))
            curves[name] = curve(step, carry, error, arguments.seconds, steps)
        curves["SciPy least_squares"] = scipy_curve(arguments.seconds, start, residuals, error)
        curves["optimistix Levenberg-Marquardt"] = optimistix_curve(
            arguments.seconds, start, residuals, error
        )
        for name, rows in curves.items():
            found.setdefault(name.split(",")[0], []).append(rows)
            print(json.dumps(summary(name, seed, rows)), flush=True)
        held.write_text(json.dumps({"seconds": arguments.seconds, "curves": found}))
    picture(found, arguments.out / "pinn.png")
    print(table(found))
    print(f"written to {arguments.out}")


def summary(name, seed, rows):
    """The error at the end, and when it first was below 1e-4 and 1e-6."""
    first = {
        f"seconds_to_{goal:g}": next((round(s, 2) for s, _, e in rows if e <= goal), None)
        for goal in (1e-4, 1e-6)
    }
    seconds, steps, error = rows[-1]
    each = round(seconds / max(steps, 1), 4)
    return {
        "method": name,
        "seed": seed,
        "error": float(f"{error:.2g}"),
        **first,
        "steps": steps,
        "seconds_a_step": each,
    }


def table(found):
    """Medians of the seeds, with the least and the most; a goal missed counts as infinite."""

    def cell(values):
        ordered = sorted(np.inf if x is None else x for x in values)
        shown = (ordered[(len(ordered) - 1) // 2], ordered[0], ordered[-1])
        return "{} ({} to {})".format(*(f"{x:.3g}" if x < np.inf else "–" for x in shown))

    lines = ["| | error | seconds to 1e-4 | to 1e-6 | steps | ms a step |"]
    for name, runs in found.items():
        rows = [summary(name, seed, run) for seed, run in enumerate(runs)]
        keys = ("error", "seconds_to_0.0001", "seconds_to_1e-06", "steps")
        cells = [cell([row[key] for row in rows]) for key in keys]
        cells.append(cell([1e3 * row["seconds_a_step"] for row in rows]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found, path):
    """Error against seconds, a line a seed."""
    import matplotlib.pyplot as plt

    with plt.rc_context(drawing.STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.2))
        for color, (name, runs) in zip((*drawing.LINES, "black"), found.items(), strict=True):
            for i, rows in enumerate(runs):
                seconds, _, errors = zip(*rows, strict=True)
                label = name if i == 0 else "_"  # unnamed
                axes.semilogy(seconds, errors, color=color, label=label, linewidth=1.2)
        axes.set(xlabel="seconds", ylabel="relative L2 error")
        axes.set_title("Poisson's equation, net 2-32-32-1, float64: a line for each start")
        drawing.leave_room(axes)
        figure.tight_layout()
        drawing.name_lines(figure, axes)
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
