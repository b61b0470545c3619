"""Schedules over steps, weight decay and clipping by name, and arguments in words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl.core.check import ArgumentError
from jdl.optim import arguments, by_name, schedules
from jdl.optim.registry import REGISTRY, parameters

PARAMS = {"w": jnp.array([2.0, -1.0]), "b": jnp.array(0.5)}
FIRST_ORDER = [name for name, spec in REGISTRY.items() if not spec.second_order]


def f(params):
    return 5.0 * jnp.sum(jnp.square(params["w"])) + jnp.square(params["b"] - 1.0)


def trained(optimizer, steps=5):
    optimizer = optax.with_extra_args_support(optimizer)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        value, grad = jax.value_and_grad(f)(params)
        given = {"value": value, "grad": grad, "value_fn": f}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grad, state, params, **given)
            params = optax.apply_updates(params, updates)
    return params


def assert_same(found, expected, rtol=1e-5):
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=rtol, err_msg=name)


def optax_schedule(kind, steps, warmup, end):
    up = optax.linear_schedule(0.0, 1.0, warmup)
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps, end)
    if kind == "linear":
        return optax.join_schedules([up, optax.linear_schedule(1.0, end, steps - warmup)], [warmup])
    flat = optax.constant_schedule(1.0)
    if kind == "constant":
        return optax.join_schedules([up, flat], [warmup])
    last = steps // 5
    down = optax.linear_schedule(1.0, end, last)
    return optax.join_schedules([up, flat, down], [warmup, steps - last])


@pytest.mark.parametrize("kind", schedules.SCHEDULES)
@pytest.mark.parametrize("by_rate", [True, False])
def test_a_schedule_over_steps_is_optax_s_in_the_middle_of_each_step(kind, by_rate):
    steps, warmup, end = 20, 4, 0.0 if kind == "constant" else 0.1
    ours = schedules.over_steps(
        by_name("sgd", 0.5), kind, steps, warmup=warmup, decay_to=end, by_rate=by_rate
    )
    state = ours.init(jnp.zeros(()))
    theirs = optax_schedule(kind, steps, warmup, end)
    for t in range(steps):
        update, state = ours.update(jnp.ones(()), state, jnp.zeros(()))
        assert float(-update) == pytest.approx(0.5 * float(theirs(t + 0.5)), rel=1e-5), t
    assert float(optax.tree.get(state, "learning_rate")) == 0.5
    after, _ = ours.update(jnp.ones(()), state, jnp.zeros(()))
    assert float(-after) == pytest.approx(0.5 * (1.0 if kind == "constant" else end), rel=1e-5)


@pytest.mark.parametrize(("plain", "decayed"), [("adam", optax.adamw), ("nadam", optax.nadamw)])
def test_weight_decay_by_name_is_decoupled(plain, decayed):
    assert_same(
        trained(by_name(plain, 0.1, weight_decay=0.3)), trained(decayed(0.1, weight_decay=0.3))
    )


def test_a_schedule_shrinks_the_decay_with_the_rate():
    rates = [0.1 * (1.0 - (t + 0.5) / 4) for t in range(4)]
    optimizer = by_name("sgd", 0.1, weight_decay=2.0)
    found = trained(schedules.over_steps(optimizer, "linear", 4), 4)
    expected = PARAMS
    for rate in rates:
        grad = jax.grad(f)(expected)
        expected = jax.tree.map(lambda p, g: p - rate * (g + 2.0 * p), expected, grad)  # noqa: B023
    assert_same(found, expected)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_every_first_order_method_decays_weights_and_clips(name):
    def moved(gradient, **options):
        optimizer = optax.with_extra_args_support(by_name(name, 0.01, **options))
        given = {"value": f(PARAMS), "grad": gradient, "value_fn": f}

        @jax.jit
        def two_updates():
            with jax.numpy_dtype_promotion("standard"):
                _, state = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS, **given)
                return optimizer.update(gradient, state, PARAMS, **given)[0]

        return two_updates()

    gradient = jax.grad(f)(PARAMS)
    with pytest.raises(AssertionError):
        assert_same(moved(gradient, weight_decay=5.0), moved(gradient, weight_decay=0.0))
    clipped, _ = optax.clip_by_global_norm(0.5).update(gradient, optax.EmptyState())
    assert_same(moved(gradient, clip=0.5), moved(clipped))


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in FIRST_ORDER])
def test_a_second_order_method_refuses_them_and_tells_what_it_has(name):
    with pytest.raises(ArgumentError, match=r"`weight_decay` must be left out.*l2_reg"):
        by_name(name, weight_decay=0.1)
    with pytest.raises(ArgumentError, match=f"`clip` must be left out: .* {name} needs"):
        by_name(name, clip=1.0)


def test_arguments_in_words_are_read_by_their_types():
    words = ["damping=1", "preconditioner=None", "max_cg_iterations=7", "trust_region=.5"]
    found = arguments.parsed("hf", words)
    assert found == {
        "damping": 1.0,
        "preconditioner": None,
        "max_cg_iterations": 7,
        "trust_region": 0.5,
    }
    assert type(found["damping"]) is float
    assert arguments.parsed("hf", arguments.written(found)) == found
    assert arguments.parsed("sgd", ["nesterov=true", "momentum=.8"])["nesterov"] is True
    assert arguments.parsed("prodigy", ["betas=.9,.99"]) == {"betas": (0.9, 0.99)}
    assert arguments.parsed("muon", ["adam_names=embed,head"]) == {"adam_names": ("embed", "head")}
    assert type(arguments.parsed("soap", ["precondition-every=5"])["precondition_every"]) is int
    assert arguments.parsed("kfac", ["damping=1", "damping=2"]) == {"damping": 2.0}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_default_can_be_said_in_words(name):
    """What an optimizer has by itself, other than functions, is of the type that is asked for."""
    own = {key: p.default for key, p in parameters(name).items() if key != "learning_rate"}
    plain = {
        key: value for key, value in own.items() if type(value) in (bool, int, float, str, tuple)
    }
    assert arguments.checked(name, plain, "--option") == plain
    by_name(name, **plain)


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("hf", "max_cg_iteration=7", "Did you mean 'max_cg_iterations'"),
        ("hf", "max_cg_iterations=7.5", "`--option max_cg_iterations` must be a whole number"),
        ("adam", "b1=high", "`--option b1` must be a number, got 'high'"),
        ("adam", "nesterov=1", "`--option nesterov` must be true or false, got 1"),
        ("hf", "trust_region=x", "must be a number or none"),
        ("adamw", "mask=x", "`--option mask` must be left out: it is a function"),
        ("lbfgs", "search=wolfe", "it is a function"),
        ("adam", "b1", "NAME=VALUE"),
        ("adam", "learning_rate=1", "other than learning_rate"),
    ],
)
def test_mistakes_in_words_are_told(name, word, message):
    with pytest.raises(ArgumentError, match=message):
        arguments.parsed(name, [word])


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"clip": -1.0}, {"weight_decay": -0.1}])
def test_a_clip_is_positive_and_a_decay_not_negative(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        by_name("adam", **options)
