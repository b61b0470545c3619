"""The weights that evaluation uses, where an optimizer's state holds an average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jdl
from jdl import losses
from jdl.compare import Budget, Study, named
from jdl.compare.problems import arrays_problem
from jdl.compare.results import Target
from jdl.data import from_arrays
from jdl.optim import registry
from jdl.train.ema import averaging, weights_of
from jdl.train.export import load_exported

FREE = optax.contrib.schedule_free_sgd(0.5, b1=0.6)
PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.zeros(())}


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def differ(a, b):
    assert all(not np.allclose(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def after(optimizer, steps=4):
    """Parameters and state after some steps, and the parameters of each."""
    params, state, seen = PARAMS, optimizer.init(PARAMS), []
    for k in range(steps):
        grads = jax.tree.map(lambda p, k=k: p - k, params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return params, state, seen


def free_x(steps=4):
    y, state, seen = after(FREE, steps)
    x = optax.contrib.schedule_free_eval_params(state, y)
    differ(x, y)
    return x, seen


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rate: optax.contrib.schedule_free_sgd(rate, b1=0.6),
        lambda rate: registry.by_name("schedule_free_sgd", rate, b1=0.6, warmup_steps=None),
        lambda rate: optax.chain(optax.clip(1e3), optax.contrib.schedule_free_sgd(rate, b1=0.6)),
        lambda rate: optax.masked(optax.contrib.schedule_free_sgd(rate, b1=0.6), True),
        lambda rate: optax.partition(
            {k: optax.contrib.schedule_free_sgd(rate, b1=0.6) for k in "pq"}, {"w": "p", "b": "q"}
        ),
    ],
    ids=["alone", "by name", "chain", "masked", "partition"],
)
def test_a_schedule_free_method_is_evaluated_at_x_wherever_its_state_is(wrap):
    y, state, _ = after(wrap(0.5))
    close(weights_of(state, y), free_x()[0])


def test_of_a_part_that_is_schedule_free_only_that_part_is_averaged():
    parts = {"p": FREE, "q": optax.sgd(0.1)}
    y, state, _ = after(optax.partition(parts, {"w": "p", "b": "q"}))
    found = weights_of(state, y)
    close(found["w"], free_x()[0]["w"])
    np.testing.assert_array_equal(found["b"], y["b"])


def test_without_an_average_the_weights_are_the_parameters():
    params, state, _ = after(optax.chain(optax.clip(1.0), optax.adam(0.1)))
    assert weights_of(state, params) is params


def test_the_moving_average_of_a_schedule_free_method_is_that_of_x():
    _, seen = free_x()
    expected = PARAMS
    for t, (y, state) in enumerate(seen, 1):
        d = min(0.9, (1 + t) / (10 + t))
        x = optax.contrib.schedule_free_eval_params(state, y)
        expected = jax.tree.map(lambda a, x, d=d: d * a + (1 - d) * x, expected, x)
    params, state, _ = after(averaging(FREE, 0.9))
    close(weights_of(state, params), expected)
    close(weights_of(optax.chain(averaging(FREE, 0.9)).init(PARAMS), params), PARAMS)


def test_parameters_keep_their_types():
    mixed = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1)}
    with jax.numpy_dtype_promotion("standard"):
        state = optax.contrib.schedule_free_sgd(0.5).init(mixed)
    found = weights_of(state, mixed)
    assert [x.dtype for x in jax.tree.leaves(found)] == [jnp.float32, jnp.bfloat16]


def test_an_estimator_evaluates_predicts_and_exports_x(tmp_path):
    x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    data = from_arrays(x, 3 * x, batch_size=16, shuffle=True, seed=0)
    net = jdl.from_fns(lambda key, x: jnp.zeros((1, 1)), lambda slope, x: x @ slope)

    def estimator():
        return jdl.Estimator(net, losses.squared_error, FREE, workdir=tmp_path / "run")

    trained = estimator().train(data, steps=6, validation=data, validate_every=3)
    slope = optax.contrib.schedule_free_eval_params(trained.state.opt_state, trained.params)
    differ(slope, trained.params)
    close(trained.evaluation_params, slope)
    once = from_arrays(x, 3 * x, batch_size=16, epochs=1)
    restored = estimator()
    np.testing.assert_allclose(restored.predict(once), x @ slope, rtol=1e-6)
    loss = np.mean(0.5 * (x @ slope - 3 * x) ** 2)
    assert restored.evaluate(once)["loss"] == pytest.approx(float(loss), rel=1e-5)
    path = restored.export(tmp_path / "model", once)
    np.testing.assert_allclose(load_exported(path)({"image": x}), x @ slope, rtol=1e-5)


def test_a_study_evaluates_x(tmp_path):
    roots, start = jnp.array([1.0, 0.5]), {"x": jnp.array([2.0, -1.0])}

    def value(params):
        return 0.5 * jnp.sum(jnp.square(roots * (params["x"] - 1.0)))

    problem = arrays_problem(
        "small",
        lambda: jdl.from_fns(lambda key, x: start, lambda p, x: x * (p["x"] - 1.0)[None]),
        losses.squared_error,
        {"image": np.asarray(roots)[None], "label": np.zeros((1, 2), np.float32)},
        target=Target("train_loss", "at most", 1e-6),
        validation=0.0,
        metrics={},
    )
    entry = named("schedule_free_sgd", batch_size="full", warmup_steps=None, b1=0.5)
    options = {"budget": Budget(3, "steps"), "evaluations": 1, "workdir": tmp_path}
    trial = Study(problem, [entry], **options).run().trials[0]
    y, optimizer = start, optax.contrib.schedule_free_sgd(1.0, b1=0.5)
    state = optimizer.init(y)
    for _ in range(3):
        updates, state = optimizer.update(jax.grad(value)(y), state, y)
        y = optax.apply_updates(y, updates)
    x = optax.contrib.schedule_free_eval_params(state, y)
    assert float(value(x)) != pytest.approx(float(value(y)), rel=1e-2)
    assert trial.evaluations[-1]["train_loss"] == pytest.approx(float(value(x)), rel=1e-5)
