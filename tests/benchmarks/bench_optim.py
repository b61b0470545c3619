"""Our second-order optimizers against other libraries, in one run, on 5,000 MNIST digits.

    make bench-optim [ARGS="--only logistic,products,autoencoder --seconds 120 --json out.json"]

Training is timed in process CPU time / 2 (for two cores), which other processes affect less than
wall time; wall time is shown too. Compilation and evaluation are not counted. Compare ratios within
one run.
"""

import argparse
import functools
import gzip
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl import losses
from jdl.core.model import from_linen
from jdl.core.objective import Objective
from jdl.models import Autoencoder
from jdl.models.layers import sparse_init
from jdl.optim import diagnostics, hessian_free, kronecker, lbfgs, nonlinear_cg

COUNT, DECAY, TARGET = 5000, 1e-3, 1e-5
SEARCH = ("data/mnist", "../shared/data/mnist")


class Clock:
    """Seconds of CPU time / 2 and of wall time within `with`."""

    cpu = wall = 0.0

    def __enter__(self):
        self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu += (time.process_time() - self._start[0]) / 2
        self.wall += time.perf_counter() - self._start[1]


def digits(folder):
    """Images [5000, 784] in [0, 1] and labels."""
    folders = [pathlib.Path(folder)] if folder else [pathlib.Path(s) for s in SEARCH]
    for path in folders:
        if (path / "train-images-idx3-ubyte.gz").exists():
            pixels = gzip.decompress((path / "train-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((path / "train-labels-idx1-ubyte.gz").read_bytes())
            x = np.frombuffer(pixels, np.uint8, COUNT * 784, 16).reshape(COUNT, 784)
            return x.astype(np.float32) / 255, np.frombuffer(labels, np.uint8, COUNT, 8).astype(int)
    print("skipped: no MNIST (four .gz files) in " + ", ".join(map(str, folders)))
    sys.exit(0)


# ------------------------------------------------------------------ logistic regression


def logistic_contestants(x, y):
    """Name -> a function that solves once and returns its result."""
    x, onehot = jnp.asarray(x), jax.nn.one_hot(y, 10)
    start = {"w": jnp.zeros((784, 10)), "b": jnp.zeros(10)}

    def regularizer(p):
        return 0.5 * DECAY * jnp.sum(jnp.square(p["w"]))

    def value(p, x):
        z = x @ p["w"] + p["b"]
        return jnp.mean(jax.nn.logsumexp(z, 1) - jnp.sum(onehot * z, 1)) + regularizer(p)

    f = functools.partial(value, x=x)
    value_and_grad = jax.jit(jax.value_and_grad(f))
    first = optax.tree.norm(value_and_grad(start)[1])

    def ours(optimizer):
        keeps = hasattr(optimizer.init(start), "grad")

        @jax.jit
        def run(params, x):  # not a constant: XLA would fold what factors take of it
            f = functools.partial(value, x=x)
            objective = Objective.from_fns(
                lambda p, batch: batch["x"] @ p["w"] + p["b"],
                losses.softmax_cross_entropy,
                {"x": x, "label": onehot},
                regularizer=regularizer,
            )
            first_value, grad = jax.value_and_grad(f)(params)

            def body(carry):
                params, state, value, grad, i = carry
                updates, state = optimizer.update(
                    grad, state, params, value=value, grad=grad, value_fn=f,
                    objective=objective, reused=keeps & (i > 0),
                )  # fmt: skip
                params = optax.apply_updates(params, updates)
                if keeps:
                    value, grad = state.value, state.grad
                else:
                    value, grad = jax.value_and_grad(f)(params)
                return params, state, value, grad, i + 1

            return jax.lax.while_loop(
                lambda c: (optax.tree.norm(c[3]) > TARGET * first) & (c[4] < 2000),
                body,
                (params, optimizer.init(params), first_value, grad, 0),
            )

        def solve():
            params, state, *_ = jax.block_until_ready(run(start, x))
            told = diagnostics.read(state)
            return params, {
                "iterations": int(told.iterations),
                "evaluations": int(told.evaluations),
                "linear_iterations": int(told.linear_iterations),
            }

        return solve

    def optax_lbfgs():
        optimizer = optax.lbfgs()
        from_state = optax.value_and_grad_from_state(f)

        @jax.jit
        def run(params):
            def body(carry):
                params, state, _, i, evaluations = carry
                value, grad = from_state(params, state=state)
                updates, state = optimizer.update(
                    grad, state, params, value=value, grad=grad, value_fn=f
                )
                params = optax.apply_updates(params, updates)
                steps = optax.tree.get(state, "info").num_linesearch_steps
                norm = optax.tree.norm(optax.tree.get(state, "grad"))
                return params, state, norm, i + 1, evaluations + steps

            return jax.lax.while_loop(
                lambda c: (c[2] > TARGET * first) & (c[3] < 2000),
                body,
                (params, optimizer.init(params), first, 0, 1),
            )

        def solve():
            params, _, _, i, evaluations = jax.block_until_ready(run(start))
            return params, {"iterations": int(i), "evaluations": int(evaluations)}

        return solve

    def jaxopt_lbfgs():
        import jaxopt

        solver = jaxopt.LBFGS(f, maxiter=2000, tol=float(TARGET * first))
        run = jax.jit(solver.run)

        def solve():
            found = jax.block_until_ready(run(start))
            return found.params, {
                "iterations": int(found.state.iter_num),
                "evaluations": int(found.state.num_fun_eval),
            }

        return solve

    def sklearn_newton_cg():
        from sklearn.linear_model import LogisticRegression

        data, labels = np.asarray(x), np.asarray(jnp.argmax(onehot, 1))

        def solve():
            # Its own criterion is the largest entry of the gradient.
            model = LogisticRegression(
                C=1 / (DECAY * COUNT),
                solver="newton-cg",
                tol=float(TARGET * first) / 2,
                max_iter=30,
            ).fit(data, labels)
            w, b = jnp.asarray(model.coef_.T, jnp.float32), model.intercept_
            # Its intercepts are free up to a constant.
            params = {"w": w, "b": jnp.asarray(b, jnp.float32)}
            return params, {"iterations": int(model.n_iter_[0])}

        return solve

    def scipy_newton_cg():
        from scipy.optimize import minimize

        data, target = np.asarray(x, np.float64), np.asarray(onehot, np.float64)

        def value(p):
            w, b = p[:-10].reshape(784, 10), p[-10:]
            z = data @ w + b
            top = z.max(1, keepdims=True)
            logsum = (top + np.log(np.exp(z - top).sum(1, keepdims=True)))[:, 0]
            r = np.exp(z - logsum[:, None]) - target
            grad = np.append((data.T @ r / COUNT + DECAY * w).ravel(), r.mean(0))
            return np.mean(logsum - (target * z).sum(1)) + DECAY / 2 * (w**2).sum(), grad

        def product(p, v):
            w, b = p[:-10].reshape(784, 10), p[-10:]
            z = data @ w + b
            s = np.exp(z - z.max(1, keepdims=True))
            s /= s.sum(1, keepdims=True)
            u = data @ v[:-10].reshape(784, 10) + v[-10:]
            h = s * (u - (s * u).sum(1, keepdims=True)) / COUNT
            return np.append((data.T @ h).ravel() + DECAY * v[:-10], h.sum(0))

        def solve():
            goal = float(TARGET * first)

            def stop(intermediate_result):
                if np.linalg.norm(value(intermediate_result.x)[1]) <= goal:
                    raise StopIteration

            found = minimize(
                value, np.zeros(7850), jac=True, hessp=product, method="Newton-CG",
                callback=stop, options={"xtol": 1e-12, "maxiter": 200},
            )  # fmt: skip
            p = jnp.asarray(found.x, jnp.float32)
            params = {"w": p[:-10].reshape(784, 10), "b": p[-10:]}
            return params, {"iterations": int(found.nit), "evaluations": int(found.nfev)}

        return solve

    plain = {"damping": 1e-3, "progress": 0.0, "warm_start": 0.0, "num_candidates": 1}
    newton_cg = hessian_free(tolerance=0.1, **plain)
    # Factors of the first step serve to the end.
    factored = hessian_free(
        tolerance=0.3, preconditioner=kronecker.preconditioner(every=2000), **plain
    )
    contestants = {
        "jdl lbfgs": ours(lbfgs()),
        "jdl nonlinear_cg": ours(nonlinear_cg()),
        "jdl hessian_free (Newton-CG)": ours(newton_cg),
        "jdl hessian_free, Kronecker": ours(factored),
        "optax.lbfgs": optax_lbfgs(),
    }
    for name, make in (
        ("jaxopt.LBFGS", jaxopt_lbfgs),
        ("scikit-learn newton-cg", sklearn_newton_cg),
        ("scipy Newton-CG (float64)", scipy_newton_cg),
    ):
        try:
            contestants[name] = make()
        except ImportError as missing:
            print(f"left out: {name} ({missing})")

    def reached(params):
        return float(optax.tree.norm(value_and_grad(params)[1]) / first)

    return contestants, reached


def logistic(x, y, rounds):
    contestants, reached = logistic_contestants(x, y)
    rows = []
    clocks = {name: [] for name in contestants}
    told = {}
    for solve in contestants.values():
        solve()  # compile
    for _ in range(rounds):
        for name, solve in contestants.items():
            with Clock() as clock:
                params, told[name] = solve()
            told[name]["relative_gradient"] = reached(params)
            clocks[name].append((clock.cpu, clock.wall))
    for name in contestants:
        cpu, wall = (statistics.median(c) for c in zip(*clocks[name], strict=True))
        rows.append({"name": name, "seconds": cpu, "wall": wall, **told[name]})
    return rows


# ------------------------------------------------------------------ the deep autoencoder


def net():
    model = from_linen(Autoencoder(kernel_init=sparse_init(15)))
    loss = functools.partial(losses.sigmoid_cross_entropy, target="image")
    return model, loss


def momentum(step):
    """Sutskever's schedule: min(1 − 2^(−1 − log₂(⌊t/250⌋ + 1)), 0.99)."""
    return jnp.minimum(1.0 - 0.5 / (jnp.floor(step / 250.0) + 1.0), 0.99)


def nesterov():
    return optax.chain(
        optax.inject_hyperparams(lambda decay: optax.trace(decay, nesterov=True))(decay=momentum),
        optax.scale(-0.01),
    )


# name -> optimizer, ((from this second on, batch, curvature batch), …)
AUTOENCODER = {
    "jdl hessian_free": (
        lambda: hessian_free(
            damping=1.0,
            damping_increase=1.15,
            damping_decrease=0.87,
            damping_minimum=1e-4,
            preconditioner=kronecker.preconditioner(every=20),
            max_cg_iterations=2,
            warm_start=0.5,
            num_candidates=1,
        ),
        ((0, 500, 250), (15, 1000, 500)),
    ),
    "jdl hessian_free, diagonal": (
        lambda: hessian_free(
            damping=1.0, preconditioner="diagonal", max_cg_iterations=8, num_candidates=2
        ),
        ((0, 500, 125), (8, 1000, 250), (30, 2500, 500), (70, 5000, 1000)),
    ),
    "jdl lbfgs, Kronecker, all data": (lambda: lbfgs(scaling="kronecker"), ((0, 5000, None),)),
    "jdl lbfgs (multi-batch)": (lambda: lbfgs(), ((0, 1000, None), (30, 2500, None))),
    "jdl nonlinear_cg": (lambda: nonlinear_cg(), ((0, 1000, None), (30, 2500, None))),
    "optax Nesterov, tuned": (nesterov, ((0, 200, None),)),
    "optax Adam, tuned": (lambda: optax.adam(3e-3), ((0, 200, None),)),
}


def autoencoder(x, seconds, only):
    model, loss = net()
    start, state = model.init(jax.random.key(0), x[:2])
    blocks = jnp.asarray(x).reshape(5, 1000, 784)

    @jax.jit
    def error(params):
        def block(images):
            outputs, _ = model.apply(params, state, images, key=None, train=False)
            return jnp.sum(jnp.square(jax.nn.sigmoid(outputs) - images))

        return jnp.sum(jax.lax.map(block, blocks)) / COUNT

    rows = []
    for name, (make, schedule) in AUTOENCODER.items():
        if only and only not in name:
            continue
        optimizer = optax.with_extra_args_support(make())

        @functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
        def step(params, opt_state, images, curvature, optimizer=optimizer):
            some = None if curvature is None else {"image": images[:curvature]}
            objective = Objective(model, loss, state, {"image": images}, curvature_batch=some)
            value, grad, _ = objective.value_and_grad(params)
            updates, opt_state = optimizer.update(
                grad, opt_state, params, value=value, grad=grad,
                value_fn=objective.value, objective=objective,
            )  # fmt: skip
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = jax.tree.map(jnp.copy, (start, jax.jit(optimizer.init)(start)))
        rng, order, clock, compiling = np.random.default_rng(0), np.zeros(0, int), Clock(), Clock()
        seen, errors, steps = set(), {}, 0
        while clock.cpu < seconds:
            _, size, curvature = [s for s in schedule if s[0] <= clock.cpu][-1]
            if len(order) < size:
                order = rng.permutation(COUNT)
            rows_now, order = order[:size], order[size:]
            images = jnp.asarray(x[rows_now])
            if size not in seen:
                seen.add(size)
                copies = jax.tree.map(jnp.copy, (params, opt_state))
                with compiling:
                    jax.block_until_ready(step(*copies, images, curvature))
            with clock:
                params, opt_state = jax.block_until_ready(
                    step(params, opt_state, images, curvature)
                )
            steps += 1
            for mark in (15, 30, 60, 120):
                if mark not in errors and clock.cpu >= mark:
                    errors[mark] = round(float(error(params)), 3)
        row = {"name": name, "steps": steps, **{f"at_{m}s": e for m, e in errors.items()}}
        rows.append({**row, "wall": clock.wall, "compile_a_size": compiling.cpu / len(seen)})
        show("", rows[-1:])
    return rows


# ------------------------------------------------------------------ products and a step's compile


def products(x):
    model, loss = net()
    params, state = model.init(jax.random.key(0), x[:2])
    objective = Objective(model, loss, state, {"image": jnp.asarray(x[:1000])})

    def looped(product):
        def run(params, vector):
            def body(_, v):
                w = product(params, v)
                return jax.tree.map(lambda a: a / (1e-6 + optax.tree.norm(w)), w)

            return jax.lax.fori_loop(0, 8, body, vector)

        return jax.jit(run)

    contestants = {
        "gradient": looped(lambda p, v: objective.grad(jax.tree.map(jnp.add, p, v))),
        "Gauss-Newton product": looped(objective.gnvp),
        "Hessian product": looped(objective.hvp),
        "CG's vector algebra": looped(
            lambda p, v: jax.tree.map(
                lambda a, b: 0.9 * a + 1e-3 * b, jax.tree.map(jnp.add, v, p), v
            )
        ),
    }
    vector = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    clocks = {name: [] for name in contestants}
    for run in contestants.values():
        jax.block_until_ready(run(params, vector))
    for _ in range(5):
        for name, run in contestants.items():
            with Clock() as clock:
                jax.block_until_ready(run(params, vector))
            clocks[name].append(clock.cpu / 8)
    seconds = {name: statistics.median(c) for name, c in clocks.items()}
    rows = [
        {"name": name, "seconds": s, "gradients": s / seconds["gradient"]}
        for name, s in seconds.items()
    ]
    optimizer = hessian_free(preconditioner="diagonal", max_cg_iterations=8)

    def step(params, opt_state):
        value, grad, _ = objective.value_and_grad(params)
        return optimizer.update(
            grad, opt_state, params, value=value, grad=grad, objective=objective
        )

    lowered = jax.jit(step).lower(params, optimizer.init(params))
    with Clock() as clock:
        lowered.compile()
    rows.append({"name": "compiling a hessian_free step", "seconds": clock.cpu * 2})
    return rows


def show(title, rows):
    """A table, one line per contestant."""
    if title:
        print(f"\n{title}")
    for row in rows:
        cells = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        print("  " + f"{row['name']:30s} " + "  ".join(cells[1:]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="logistic,products,autoencoder")
    parser.add_argument("--method", default="", help="autoencoder: contestants of this name only")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="", help="the folder of MNIST's four .gz files")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    x, y = digits(args.data)
    results = {}
    if "logistic" in args.only:
        rows = results["logistic"] = logistic(x, y, args.rounds)
        show(f"Logistic regression to |g| = {TARGET:g} |g0|, seconds of CPU / 2", rows)
    if "products" in args.only:
        rows = results["products"] = products(x)
        show("Products at batch 1,000, in a loop, in gradients", rows)
    if "autoencoder" in args.only:
        print("\nDeep autoencoder, squared error an image after seconds of CPU / 2")
        results["autoencoder"] = autoencoder(x, args.seconds, args.method)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
