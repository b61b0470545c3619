"""What a user's own project may look like; `mypy --strict` must find nothing wrong in it.

It is also run, so that the types it claims are true.
"""

import tempfile
from collections.abc import Mapping
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]  # it has no types of its own

import jdl
from jdl import Estimator, Model, Objective, losses
from jdl.compare import Budget, Study, digits_cnn
from jdl.curvature import Eigenpairs, operator, top_eigenpairs
from jdl.data import TarSource, digits, digits_path, from_arrays
from jdl.models import MLP
from jdl.optim import diagnostics, hessian_free, lbfgs
from jdl.solvers import LBFGS, OptStep


def line() -> Model:
    """A model of plain functions."""

    def init(key: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[1], 1))

    def apply(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    return jdl.from_fns(init, apply)


def within(outputs: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
    """A metric of one's own."""
    return (jnp.abs(outputs - batch["label"])[:, 0] < 0.1).astype(jnp.float32)


def train() -> dict[str, Any]:
    """The Estimator."""
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    data = from_arrays(x, x @ np.ones((3, 1), np.float32), batch_size=64)
    estimator = Estimator(line(), losses.squared_error, lbfgs(), metrics={"within": within})
    assert_type(estimator.train(data, steps=5), Estimator)
    return estimator.evaluate(data)


def classify() -> Estimator:
    """Names reached through `jdl` itself."""
    estimator = jdl.classifier(MLP(widths=(8,)), hessian_free(max_cg_iterations=5))
    assert_type(estimator, Estimator)
    return estimator.train(digits(batch_size=512, epochs=None), steps=1)


def by_hand() -> float:
    """An optax loop."""
    objective = Objective.from_fns(
        lambda w, batch: batch["x"] @ w,
        losses.squared_error,
        {"x": jnp.eye(2), "label": jnp.ones((2, 1))},
    )
    optimizer: optax.GradientTransformationExtraArgs = lbfgs()
    params = jnp.zeros((2, 1))
    state = optimizer.init(params)
    value, grad, _ = objective.value_and_grad(params)
    assert_type(value, jax.Array)
    updates, state = optimizer.update(
        grad, state, params, value=value, grad=grad, value_fn=objective.value
    )
    assert jnp.all(optax.apply_updates(params, updates) > 0)
    account = diagnostics.read(state)
    assert account is not None
    return float(account.gradient_equivalents)


def solve() -> float:
    """A solver, and what it found, in words."""

    def f(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x - 1.0))

    assert_type(LBFGS(f).run(jnp.zeros(2)), OptStep)
    found = jdl.minimize(f, jnp.zeros(2))
    assert_type(found.message, str)
    pairs = top_eigenpairs(operator(f, jnp.zeros(2)), 1)
    assert_type(pairs, Eigenpairs)
    return float(pairs.values[0])


def look() -> str:
    """An archive and a study."""
    assert_type(len(TarSource(digits_path(), keep_index=False)), int)
    assert_type(jdl.data.digits_path(), str)
    problem = digits_cnn()
    with tempfile.TemporaryDirectory() as folder:
        study = Study(problem, ["sgd"], budget=Budget(1, "steps"), workdir=folder)
        assert len(study.trials) == 1
    return problem.name


if __name__ == "__main__":
    assert train()["within"] == 1.0
    assert classify().evaluate(digits("test", batch_size=359))["accuracy"] > 0.05
    assert by_hand() >= 1.0
    assert abs(solve() - 2.0) < 1e-3
    print(look())
