"""Checks a gradient against finite differences of its function along random directions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check, tree
from jdl.core.objective import Objective
from jdl.core.types import Params
from jdl.solvers.problem import Problem, as_arrays, check_problem, make_problem


def check_gradient(
    fun: Callable[..., Any] | Objective,
    params: Params,
    *args: Any,
    value_and_grad: bool | Callable[..., Any] = False,
    has_aux: bool = False,
    directions: int = 3,
    tolerance: float = 0.03,
    seed: int = 0,
    **kwargs: Any,
) -> float:
    """The relative error of ⟨∇f, d⟩ against (f(x + h d) − f(x − h d)) / 2h.

    Several step lengths h are tried and the best counts: long ones err by f's third derivative,
    short ones by rounding.

    Args:
      fun: see `jdl.solvers.LBFGS`.
      params: where to check.
      *args: passed to `fun`.
      value_and_grad: True where `fun` returns (value, gradient); a function that does; or False.
      has_aux: whether values come as `(value, aux)`.
      directions: how many directions d; the first is the gradient's own.
      tolerance: the largest relative error accepted.
      seed: for the directions.
      **kwargs: passed to `fun`.

    Returns:
      The largest relative error found.

    Raises:
      ArgumentError: it exceeds the tolerance.

    >>> check_gradient(lambda x: jnp.sum(x**3), jnp.ones(4)) < 0.01
    True
    >>> check_gradient(lambda x: (jnp.sum(x**3), 3 * x), jnp.full(4, 2.0), value_and_grad=True)
    Traceback (most recent call last):
        ...
    jdl.core.check.ArgumentError: `the gradient` must be the function's own within 3 %, got \
'50.0 % off'. Differences of values along random directions disagree with it.
    """
    params = as_arrays(params)
    problem = make_problem(fun, value_and_grad, has_aux, args, kwargs)
    return check_problem_gradient(problem, params, directions, tolerance, seed)


def check_problem_gradient(
    problem: Problem, params: Params, directions: int = 3, tolerance: float = 0.03, seed: int = 0
) -> float:
    """`check_gradient` for a `Problem`, such as ½ ‖r‖² of residuals."""
    check_problem(problem, params, "check_gradient")
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
    lengths = [eps**power for power in (0.25, 0.33, 0.4)]
    scale = 1.0 + float(tree.norm(params))
    value = jax.jit(problem.value)
    grad = jax.jit(lambda p: problem.evaluate(p)[1])(params)
    size = float(tree.norm(grad))
    worst = 0.0
    for i in range(directions):
        d = _direction(params, jax.random.fold_in(jax.random.key(seed), i), grad, i == 0)
        given = float(tree.vdot(grad, d))
        errors = []
        for h in lengths:
            up, down = (value(tree.add_scaled(params, sign * h * scale, d)) for sign in (1, -1))
            found = (float(up) - float(down)) / (2 * h * scale)
            noise = 10 * eps * max(abs(float(up)), abs(float(down))) / (h * scale)
            gap = max(abs(found - given) - noise, 0.0)
            errors.append(gap / max(abs(found), abs(given), 1e-3 * size, 1e-30))
        finite = [e for e in errors if np.isfinite(e)]
        worst = max(worst, min(finite)) if finite else np.inf
    ok = worst <= tolerance
    must = f"the function's own within {100 * tolerance:.3g} %"
    hint = "Differences of values along random directions disagree with it."
    check.argument(ok, "the gradient", must, f"{100 * worst:.1f} % off", hint)
    return worst


def _direction(params: Params, key: jax.Array, grad: Params, along: bool) -> Params:
    """A unit vector: the gradient's own, or a random one."""
    if along and float(tree.norm(grad)) > 0:
        return tree.scale(1.0 / tree.norm(grad), grad)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    d = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    random = jax.tree.unflatten(structure, d)
    return tree.scale(1.0 / tree.norm(random), random)
