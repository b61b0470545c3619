"""Every method to the published minima of Moré, Garbow & Hillstrom's 35 problems, in float64.

The problems are the branches of one function, so that each method compiles once.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl import optim

_here = pathlib.Path(__file__).with_name("more_garbow_hillstrom.py")
_spec = importlib.util.spec_from_file_location("more_garbow_hillstrom", _here)
collection = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(collection)

WIDEST, LONGEST = 11, 99  # parameters, residuals
QUICK = ("rosenbrock", "helical_valley", "wood", "brown_badly_scaled", "beale", "powell_singular")

# method -> (how, updates at most, problems it is not known to solve)
METHODS = {
    "levenberg_marquardt": (optim.levenberg_marquardt, {}, 1000, ()),
    "levenberg_marquardt_region": (optim.levenberg_marquardt, {"trust_region": 1.0}, 1000, ()),
    "newton": (optim.newton, {}, 1000, ("meyer",)),
    "lbfgs": (optim.lbfgs, {}, 5000, ("meyer",)),
    "nonlinear_cg": (optim.nonlinear_cg, {}, 20000, ("meyer",)),
    # 2.25015e-5 for 2.24997e-5 on Penalty I: one part in 10⁴
    "hessian_free": (optim.hessian_free, {"damping": 1e-3}, 3000, ("penalty_1",)),
    # a plateau, and a valley along infinity
    "hessian_free_region": (
        optim.hessian_free, {"trust_region": 1.0}, 3000, ("osborne_1", "biggs_exp6")
    ),
    # Undamped, it is stopped wherever J is nearly singular.
    "gauss_newton": (
        optim.gauss_newton, {}, 1000,
        ("freudenstein_roth", "jennrich_sampson", "gulf", "biggs_exp6", "chebyquad"),
    ),
}  # fmt: skip


def solver(optimizer, problems, steps):
    """`solve(x, i) -> (Σ r², updates, failures)` of the i-th problem, compiled once."""

    def padded(problem):
        def residuals(x):
            r = problem.residuals(x[: len(problem.start)])
            return jnp.pad(r, (0, LONGEST - r.size))

        return residuals

    branches = [padded(p) for p in problems]

    @jax.jit
    def solve(x, i):
        def residuals(x):
            return jax.lax.switch(i, branches, x)

        def f(x):
            return 0.5 * jnp.sum(jnp.square(residuals(x)))

        def body(carry):
            x, state, k, _, failures = carry
            value, grad = jax.value_and_grad(f)(x)
            updates, state = optimizer.update(
                grad, state, x, value=value, grad=grad, value_fn=f, residual_fn=residuals
            )
            stuck = state.diagnostics.step_size == 0
            failures = jnp.where(stuck, failures + 1, 0)
            return optax.apply_updates(x, updates), state, k + 1, optax.tree.norm(grad), failures

        start = (x, optimizer.init(x), 0, jnp.inf, 0)
        x, _, k, _, failures = jax.lax.while_loop(
            lambda c: (c[2] < steps) & (c[3] > 1e-14) & (c[4] < 5), body, start
        )
        return 2 * f(x), k, failures

    return solve


def check_all(method, problems):
    make, options, steps, hard = METHODS[method]
    with jax.enable_x64(True):
        solve = solver(make(**options), problems, steps)
        for i, problem in enumerate(problems):
            start = np.zeros(WIDEST)
            start[: len(problem.start)] = problem.start
            found, updates, _ = solve(jnp.asarray(start), jnp.asarray(i))
            near = [abs(found - m) <= 1e-5 * abs(m) + 1e-10 for m in problem.minima]
            assert np.isfinite(found)
            assert any(near) or problem.name in hard, (problem.name, float(found), int(updates))


@pytest.mark.parametrize("method", ["levenberg_marquardt", "lbfgs", "newton"])
def test_some_problems(method):
    check_all(method, [p for p in collection.PROBLEMS if p.name in QUICK])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all_problems(method):
    check_all(method, collection.PROBLEMS)
