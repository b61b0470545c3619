"""Optimizers by name, wherever a name is taken."""

import jax.numpy as jnp
import numpy as np
import pytest

import jdl
from jdl.compare import named
from jdl.core.check import ArgumentError
from jdl.optim import by_name
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
