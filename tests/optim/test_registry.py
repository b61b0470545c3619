"""Optimizers by name, wherever a name is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jdl
from jdl.compare import named
from jdl.core.check import ArgumentError
from jdl.optim import by_name, kronecker
from jdl.optim.registry import LONG_NAMES, REGISTRY, short_name


def test_the_registry_knows_what_trainers_ask():
    named = {"sgd", "momentum", "nesterov", "adam", "adamw", "lbfgs", "cg", "newton", "hf"}
    assert named <= set(REGISTRY)
    for entry in REGISTRY.values():
        assert entry.batches in ("mini", "large")
        assert 0 < entry.search.low < entry.search.high
    with pytest.raises(ArgumentError, match="Did you mean 'adamw'"):
        by_name("adanw")
    with pytest.raises(ArgumentError, match="Did you mean 'damping'"):
        by_name("hf", dampin=1.0)
    with pytest.raises(ArgumentError, match="learning_rate"):
        by_name("sgd", -1.0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adam", {"lr": 0.1}, "option of adam"),
        ("nesterov", {"mumentum": 0.5}, "'momentum'"),
        ("hf", {"dampin": 1.0}, "'damping'"),
    ],
)
def test_an_option_that_does_not_exist_is_refused_at_once(name, options, words):
    with pytest.raises(ArgumentError, match=words):
        by_name(name, **options)


@pytest.mark.parametrize(("short", "long"), LONG_NAMES.items())
def test_short_and_long_names_are_taken_everywhere(short, long):
    for name in (short, long, long.replace("_", "-")):
        assert short_name(name) == short
        assert named(name).name == short
        assert type(by_name(name).init(jnp.zeros(2))) is type(by_name(short).init(jnp.zeros(2)))
        found = jdl.minimize(lambda x: x - 1.0 if short == "lm" else jnp.sum((x - 1.0) ** 2),
                             jnp.zeros(2), method=name)  # fmt: skip
        np.testing.assert_allclose(found.params, 1.0, atol=1e-3)
    assert long in jdl.optim.__all__


def test_minimize_runs_optimizers_without_a_solver_class():
    found = jdl.minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2), method="momentum")
    np.testing.assert_allclose(found.params, 1.0, atol=1e-3)


def test_unknown_names_suggest_the_nearest():
    for call in (short_name, by_name, named):
        with pytest.raises(ArgumentError, match="Did you mean 'hessian_free'"):
            call("hesian_free")
    with pytest.raises(ArgumentError, match="Did you mean 'nonlinear_cg'"):
        jdl.minimize(jnp.sum, jnp.zeros(2), method="nonlinear_gc")


OPTAX = {
    "nadamw": (optax.nadamw, {}),
    "adopt": (optax.contrib.adopt, {}),
    "ademamix": (optax.contrib.ademamix, {"alpha": lambda count: 5.0 * count / 10}),
    "prodigy": (optax.contrib.prodigy, {}),
    "schedule_free_sgd": (optax.contrib.schedule_free_sgd, {"warmup_steps": 3}),
    "schedule_free_adamw": (optax.contrib.schedule_free_adamw, {"warmup_steps": 3}),
}


@pytest.mark.parametrize("name", OPTAX)
@jax.numpy_dtype_promotion("standard")
def test_ten_steps_are_optax_s_at_any_rate_and_in_a_scan(name):
    make, options = OPTAX[name]
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "b": jnp.ones(2)}
    targets = jnp.asarray(rng.normal(size=(10, 2)), jnp.float32)

    def gradient(params, target):
        return jax.grad(lambda p: jnp.sum(jnp.square(p["w"].sum(0) + p["b"] ** 3 - target)))(params)

    def rate(count):
        return 0.1 / (1.0 + count)

    def run(optimizer_at, state):
        def body(carry, k):
            params, state = carry
            grads = gradient(params, targets[k])
            updates, state = optimizer_at(k).update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (start, state), jnp.arange(10))[0]

    constant, scheduled = by_name(name, 0.1, **options), by_name(name, rate, **options)
    for ours, theirs in (
        (constant, lambda k: make(0.1, **options)),
        (scheduled, lambda k: make(rate(k), **options)),
    ):
        found, state = run(lambda k, ours=ours: ours, ours.init(start))
        wanted, _ = run(theirs, make(0.1, **options).init(start))
        assert found["b"].tolist() != start["b"].tolist()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), found, wanted
        )
    np.testing.assert_allclose(state.hyperparams["learning_rate"], rate(9), rtol=1e-6)


@pytest.mark.parametrize("name", REGISTRY)
def test_map_params_maps_what_is_shaped_as_the_parameters(name):
    params = {"w": jnp.ones((3, 5)), "b": jnp.ones(7)}
    optimizer = by_name(name)
    state = optimizer.init(params)
    found = []
    optax.tree.map_params(
        optimizer,
        lambda x, leaf: found.append((leaf, getattr(x, "shape", None))),
        state,
        {"w": "w", "b": "b"},
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    shaped = [shape for leaf, shape in found if leaf == "w" and shape is not None]
    if name != "adafactor":  # whose squares have a row and a column
        shapes = [x.shape for x in jax.tree.leaves(state)]
        assert shaped == [(3, 5)] * shapes.count((3, 5))
    if name in ("lbfgs", "adamw", "soap"):
        assert len(shaped) == 2


def test_map_params_sees_through_factors_that_precondition():
    params = {"w": jnp.ones((3, 5)), "b": jnp.ones(7)}
    for optimizer, count in (
        (by_name("hf", preconditioner=kronecker.preconditioner()), 1),
        (by_name("lbfgs", scaling="kronecker"), 1),
    ):
        found = []
        optax.tree.map_params(optimizer, found.append, optimizer.init(params))
        assert [x.shape for x in found] == count * [(7,), (3, 5)]


DAMPED = ("hf", "newton", "lm", "natural_gradient", "kfac")


@pytest.mark.parametrize("name", DAMPED)
def test_optax_finds_and_sets_the_one_damping_of_a_state(name):
    state = by_name(name, damping=0.25).init({"w": jnp.ones((3, 2))})
    assert float(optax.tree.get(state, "damping")) == 0.25
    state = optax.tree.set(state, damping=jnp.asarray(0.5, jnp.float32))
    assert float(optax.tree.get(state, "damping")) == 0.5


@pytest.mark.parametrize("name", ["lbfgs", "cg", "newton", "hf", "lm", "gauss_newton"])
def test_python_s_numbers_are_parameters(name):
    optimizer, params = by_name(name), {"a": 3.0, "b": jnp.ones(2)}
    residuals = lambda p: jnp.append(p["b"], p["a"] - 1.0)  # noqa: E731
    f = lambda p: 0.5 * jnp.sum(jnp.square(residuals(p)))  # noqa: E731
    value, grad = jax.value_and_grad(f)(params)
    extras = {"value": value, "grad": grad, "value_fn": f, "residual_fn": residuals}
    updates, _ = optimizer.update(grad, optimizer.init(params), params, **extras)
    assert float(updates["a"]) < 0.0
