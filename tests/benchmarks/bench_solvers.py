"""Our solvers against jaxopt, optax, optimistix and SciPy, and Lanczos against ARPACK.

    make bench-solvers

One process, compiled beforehand, contestants in turn. A time is the process's CPU seconds divided
by the number of cores, because wall time on a shared machine depends on other processes; medians
over rounds, as ratios to jdl's. Every run continues until the gradient's norm is 1e-5 of the
initial norm, 1e-3 for the Rosenbrock problems (optimistix tests steps and values; it gets an rtol
and atol with which it reaches that norm if it can). `error` is the final gradient norm, computed
with the same gradient for all; `arrived` says whether the run converged, or which fraction of its
problems did. In float32 two L-BFGS methods of the same merit differ by a tenth in iterations on a
single problem, hence five data sets for logistic regression, a thousand Rosenbrock problems, and
means over many starts where iterations are counted.
"""

import argparse
import json
import os
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse.linalg

from jdl import curvature, solvers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jaxopt
    import optimistix

warnings.simplefilter("ignore")
CORES = os.cpu_count() or 1


def optax_lbfgs(fun, tolerance, steps, counts=False):
    """The loop of optax's documentation; with `counts` its iterations and evaluations."""
    optimizer = optax.lbfgs()

    def run(x, *args):
        f = lambda x: fun(x, *args)  # noqa: E731
        value_and_grad = optax.value_and_grad_from_state(f)

        def body(carry):
            x, state, evaluations = carry
            value, grad = value_and_grad(x, state=state)
            updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
            evaluations += optax.tree.get(state, "num_linesearch_steps")
            return optax.apply_updates(x, updates), state, evaluations

        def going(carry):
            count, grad = (optax.tree.get(carry[1], name) for name in ("count", "grad"))
            return (count == 0) | ((count < steps) & (optax.tree.norm(grad) > tolerance))

        x, state, evaluations = jax.lax.while_loop(going, body, (x, optimizer.init(x), 1))
        return (optax.tree.get(state, "count"), evaluations) if counts else x

    return run


def minimise(make, fun, steps):
    """An optimistix minimiser."""

    def run(x, *args):
        f = lambda x, _: fun(x, *args)  # noqa: E731
        return optimistix.minimise(f, make, x, max_steps=steps, throw=False).value

    return run


def least_squares(make, residuals, steps):
    def run(x):
        f = lambda x, _: residuals(x)  # noqa: E731
        return optimistix.least_squares(f, make, x, max_steps=steps, throw=False).value

    return run


def scipy_minimize(fun, x0, tolerance, method="L-BFGS-B", counts=False):
    shape = x0.shape
    compiled = jax.jit(jax.value_and_grad(lambda x, *args: fun(x.reshape(shape), *args)))

    def run(x, *args):
        def both(x):
            value, grad = compiled(jnp.asarray(x, jnp.float32), *args)
            return float(value), np.asarray(grad, np.float64)

        # Its test is on the largest entry of the gradient; SciPy's own on f's change is turned off.
        options = {"gtol": tolerance / np.sqrt(x.size), "ftol": 0.0, "maxiter": 5000}
        options |= {"maxfun": 10000} if method == "L-BFGS-B" else {}
        if method != "L-BFGS-B":
            options.pop("ftol")
        found = scipy.optimize.minimize(
            both, np.asarray(x, np.float64).ravel(), jac=True, method=method, options=options
        )
        return (
            (found.nit, found.nfev) if counts else jnp.asarray(found.x.reshape(shape), jnp.float32)
        )

    return run


def race(case, contestants, problems, error, rounds):
    """Times the contestants in turn on the same problems, and prints a line for each."""
    times, walls, errors = ({name: [] for name in contestants} for _ in range(3))
    ready = {}
    for name, (run, compiled) in contestants.items():
        ready[name] = jax.jit(run) if compiled else run
        start = time.process_time()
        jax.block_until_ready(ready[name](*problems[0]))
        spent = (time.process_time() - start) / CORES
        ready[name] = (ready[name], 1 if spent > 5 else rounds)
    for turn in range(rounds):
        for name, (run, turns) in ready.items():
            if turn >= turns:
                continue
            start, wall = time.process_time(), time.perf_counter()
            found = jax.block_until_ready([run(*each) for each in problems])
            times[name].append((time.process_time() - start) / CORES)
            walls[name].append(time.perf_counter() - wall)
            ends = [error(x, *rest) for x, (_, *rest) in zip(found, problems, strict=True)]
            errors[name].append((min(share for share, _ in ends), max(worst for _, worst in ends)))
    base = statistics.median(times["jdl"])
    for name in sorted(contestants, key=lambda name: statistics.median(times[name])):
        arrived = all(share == 1.0 for share, _ in errors[name])
        row = {
            "case": case,
            "contestant": name,
            "cpu_seconds_per_core": float(f"{statistics.median(times[name]):.3g}"),
            "over_jdl": round(statistics.median(times[name]) / base, 3),
            "wall_seconds": float(f"{statistics.median(walls[name]):.3g}"),
            "arrived": arrived if arrived else round(errors[name][-1][0], 3),
            "error": float(f"{max(worst for _, worst in errors[name]):.2g}"),
        }
        print(json.dumps(row), flush=True)


def logistic_data(seed):
    rng = np.random.default_rng(seed)
    # Pixels as digits have them: a third lit, in patches of their own brightness.
    prototypes = rng.random((10, 784)) * (rng.random((10, 784)) < 0.3)
    labels = rng.integers(0, 10, 5000).astype(np.int32)
    images = prototypes[labels] + 0.3 * rng.random((5000, 784)) * (rng.random((5000, 784)) < 0.3)
    images = jnp.asarray(np.clip(images * rng.uniform(0.2, 1.0, (5000, 1)), 0, 1), jnp.float32)
    labels = jnp.asarray(np.where(rng.random(5000) < 0.1, rng.integers(0, 10, 5000), labels))
    return images, labels.astype(jnp.int32)


def logistic_regression(rounds):
    def fun(w, x, y):
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
        return jnp.mean(losses) + 0.5e-3 * jnp.sum(jnp.square(w))

    x0 = jnp.zeros((784, 10))
    problems = [(x0, *logistic_data(seed)) for seed in range(5)]
    slope = jax.jit(lambda w, *data: jnp.linalg.norm(jax.grad(fun)(w, *data)))
    tolerance = 1e-5 * float(slope(*problems[0]))
    ours = solvers.LBFGS(fun, tol=tolerance, maxiter=2000)
    cg = solvers.NonlinearCG(fun, method="polak-ribiere", tol=tolerance, maxiter=2000)
    newton = solvers.HessianFree(fun, tol=tolerance, maxiter=200)
    theirs = jaxopt.LBFGS(fun, tol=tolerance, maxiter=2000)
    tight = {"rtol": 1e-6, "atol": 1e-6}
    contestants = {
        "jdl": (lambda *a: ours.run(*a).params, True),
        "jdl NonlinearCG": (lambda *a: cg.run(*a).params, True),
        "jdl HessianFree": (lambda *a: newton.run(*a).params, True),
        "jaxopt LBFGS": (lambda *a: theirs.run(*a).params, True),
        "optax lbfgs": (optax_lbfgs(fun, tolerance, 2000), True),
        "optimistix LBFGS": (minimise(optimistix.LBFGS(**tight), fun, 2000), True),
        "optimistix NonlinearCG": (minimise(optimistix.NonlinearCG(**tight), fun, 2000), True),
        "scipy L-BFGS-B": (scipy_minimize(fun, x0, tolerance), False),
    }

    def error(w, *data):
        norm = float(slope(w, *data))
        return float(norm <= 1.01 * tolerance), norm

    race("five logistic regressions, 5000x784x10", contestants, problems, error, rounds)


def rosenbrock(x):
    return jnp.sum(100.0 * jnp.square(x[1:] - jnp.square(x[:-1])) + jnp.square(1.0 - x[:-1]))


def many_rosenbrocks(rounds):
    fun = rosenbrock
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, (1000, 20)), jnp.float32)
    slopes = jax.jit(jax.vmap(lambda x: jnp.linalg.norm(jax.grad(fun)(x))))
    tolerance = 1e-3  # of gradients of some thousands at the start
    ours = solvers.LBFGS(fun, tol=tolerance, maxiter=2000)
    theirs = jaxopt.LBFGS(fun, tol=tolerance, maxiter=2000)
    tight = {"rtol": 1e-7, "atol": 1e-7}
    contestants = {
        "jdl": (jax.vmap(lambda x: ours.run(x).params), True),
        "jaxopt LBFGS": (jax.vmap(lambda x: theirs.run(x).params), True),
        "optax lbfgs": (jax.vmap(optax_lbfgs(fun, tolerance, 2000)), True),
        "optimistix LBFGS": (jax.vmap(minimise(optimistix.LBFGS(**tight), fun, 2000)), True),
        "optimistix BFGS": (jax.vmap(minimise(optimistix.BFGS(**tight), fun, 2000)), True),
        "optimistix NonlinearCG": (
            jax.vmap(minimise(optimistix.NonlinearCG(**tight), fun, 2000)),
            True,
        ),
    }
    one = scipy_minimize(fun, x0[0], tolerance)
    contestants["scipy L-BFGS-B"] = (lambda xs: jnp.stack([one(x) for x in xs]), False)

    def error(xs):
        found = np.asarray(slopes(xs))
        return float(np.mean(found <= 1.01 * tolerance)), float(np.max(found))

    race("1000 Rosenbrocks of 20 dimensions", contestants, [(x0,)], error, rounds)


def nonlinear_least_squares(rounds):
    rng = np.random.default_rng(0)
    t = jnp.linspace(0.0, 10.0, 10_000)

    def model(p):
        height, centre, width = p.reshape(5, 3).T
        z = (t[:, None] - centre[None]) / width[None]
        return jnp.sum(height[None] * jnp.exp(-0.5 * z * z), axis=1)

    true = np.stack([rng.uniform(1, 3, 5), np.arange(1, 10, 2), rng.uniform(0.4, 0.8, 5)], axis=1)
    y = model(jnp.asarray(true.ravel(), jnp.float32)) + 0.05 * jnp.asarray(
        rng.normal(size=10_000), jnp.float32
    )
    x0 = jnp.asarray(1.03 * true.ravel(), jnp.float32)
    residuals = lambda p: model(p) - y  # noqa: E731
    fun = lambda p: 0.5 * jnp.sum(jnp.square(residuals(p)))  # noqa: E731
    slope = jax.jit(lambda p: jnp.linalg.norm(jax.grad(fun)(p)))
    start = float(slope(x0))
    tolerance = 1e-5 * start
    ours = solvers.LevenbergMarquardt(residuals, tol=tolerance)
    newton = solvers.GaussNewton(residuals, tol=tolerance)
    lbfgs = solvers.LBFGS(fun, tol=tolerance)
    theirs = jaxopt.LevenbergMarquardt(residuals, tol=tolerance)
    dense = {"materialize_jac": True, "solver": "cholesky"}
    theirs_dense = jaxopt.LevenbergMarquardt(residuals, tol=tolerance, **dense)
    tight = {"rtol": 1e-4, "atol": 1e-4}

    def scipy_run(x):
        found = scipy.optimize.least_squares(
            lambda x: np.asarray(jit_residuals(jnp.asarray(x, jnp.float32)), np.float64),
            np.asarray(x, np.float64),
            jac=lambda x: np.asarray(jit_jacobian(jnp.asarray(x, jnp.float32)), np.float64),
            method="lm",
        )
        return jnp.asarray(found.x, jnp.float32)

    jit_residuals, jit_jacobian = jax.jit(residuals), jax.jit(jax.jacfwd(residuals))
    contestants = {
        "jdl": (lambda x: ours.run(x).params, True),
        "jdl GaussNewton": (lambda x: newton.run(x).params, True),
        "jdl LBFGS": (lambda x: lbfgs.run(x).params, True),
        "jaxopt LevenbergMarquardt": (lambda x: theirs.run(x).params, True),
        "jaxopt LevenbergMarquardt, dense": (lambda x: theirs_dense.run(x).params, True),
        "optimistix LevenbergMarquardt": (
            least_squares(optimistix.LevenbergMarquardt(**tight), residuals, 500),
            True,
        ),
        "scipy least_squares lm": (scipy_run, False),
    }

    def error(p):
        ratio = float(slope(p)) / start
        return float(ratio <= 1.01e-5), ratio

    race("least squares, 10000 residuals", contestants, [(x0,)], error, rounds)


def counted(solver):
    def run(*arguments):
        state = solver.run(*arguments).state
        return state.iter_num, state.num_fun_eval

    return run


def iterations(_):
    """Iterations and evaluations, means over starts, of Rosenbrock's chain and of quadratics."""
    rng = np.random.default_rng(0)
    near = np.tile([-1.2, 1.0], 50)
    turns = [np.linalg.qr(rng.normal(size=(50, 50)))[0] for _ in range(3)]
    quadratics = [
        jnp.asarray(q @ np.diag(np.logspace(-2, 2, 50)) @ q.T, jnp.float32) for q in turns
    ]
    starts = {
        "chain of 10": rng.uniform(-2, 2, (12, 10)),
        "chain of 10 from (-1.2, 1)": [near[:10] + 0.01 * i for i in range(6)],
        "chain of 100": rng.uniform(-2, 2, (12, 100)),
        "chain of 100 from (-1.2, 1)": [near + 0.01 * i for i in range(6)],
        "rotated quadratic of 50, condition 1e4": rng.normal(size=(18, 50)),
    }
    limits = {"tol": 1e-3, "maxiter": 5000}
    for case, points in starts.items():
        quadratic = "quadratic" in case
        fun = (lambda x, h: 0.5 * x @ (h @ x)) if quadratic else rosenbrock
        ours, theirs = solvers.LBFGS(fun, **limits), jaxopt.LBFGS(fun, **limits)
        contestants = {
            "jdl": counted(ours),
            "jaxopt": counted(theirs),
            "optax": jax.jit(optax_lbfgs(fun, 1e-3, 5000, counts=True)),
            "scipy": scipy_minimize(fun, points[0], 1e-3, counts=True),
        }
        found = {name: [] for name in contestants}
        for i, point in enumerate(points):
            args = (quadratics[i % 3],) if quadratic else ()
            for name, run in contestants.items():
                found[name].append(run(jnp.asarray(point, jnp.float32), *args))
        means = {name: np.mean(np.asarray(x, float), 0).round(1) for name, x in found.items()}
        row = {name: {"iterations": i, "evaluations": e} for name, (i, e) in means.items()}
        print(json.dumps({"case": case} | row), flush=True)


def eigenvalues(_):
    """Products for the ten largest eigenvalues of a small net's Hessian, to the same accuracy."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1000, 20)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, 1000).astype(np.int32))
    w = jnp.asarray(rng.normal(size=20 * 60 + 60 * 10) / 4, jnp.float32)

    def fun(w):
        logits = jnp.tanh(x @ w[:1200].reshape(20, 60)) @ w[1200:].reshape(60, 10)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    op = curvature.operator(fun, w)
    exact = np.linalg.eigvalsh(curvature.hessian(fun, w).astype(np.float64))[::-1][:10]
    for tolerance in (1e-2, 1e-3, 1e-4):
        count = 0

        def product(v):
            nonlocal count
            count += 1
            return op.product(np.asarray(v, np.float32).ravel())

        linear = scipy.sparse.linalg.LinearOperator((w.size, w.size), product, dtype=np.float32)
        arpack = scipy.sparse.linalg.eigsh(
            linear,
            10,
            which="LA",
            tol=tolerance,
            v0=np.random.default_rng(0).standard_normal(w.size).astype(np.float32),
            return_eigenvectors=False,
        )
        theirs = np.abs(np.sort(arpack)[::-1] - exact).max()
        for own in (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5):  # the same accuracy, or better
            ours = curvature.top_eigenpairs(op, 10, tolerance=own)
            if np.abs(ours.values - exact).max() <= max(theirs, 1e-6 * exact[0]):
                break
        row = {
            "case": f"ten eigenvalues of {w.size}, eigsh's tolerance {tolerance:g}",
            "products": ours.products,
            "eigsh_products": count,
            "ratio": round(ours.products / count, 3),
            "error": float(f"{np.abs(ours.values - exact).max() / exact[0]:.2g}"),
            "eigsh_error": float(f"{theirs / exact[0]:.2g}"),
        }
        print(json.dumps(row), flush=True)


CASES = {
    "logistic": logistic_regression,
    "rosenbrock": many_rosenbrocks,
    "least_squares": nonlinear_least_squares,
    "iterations": iterations,
    "eigen": eigenvalues,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(CASES))
    arguments = parser.parse_args()
    for name, run in CASES.items():
        if arguments.only in (None, name):
            run(arguments.rounds)


if __name__ == "__main__":
    main()
