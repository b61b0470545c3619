"""Published laws of sharpness under full-batch training, with the published numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import curvature
from jdl.models import MLP

pytestmark = pytest.mark.slow


def squared(outputs, batch):
    return 0.5 * jnp.sum(jnp.square(outputs - jax.nn.one_hot(batch["label"], 10)), axis=1)


@functools.cache
def problem():
    """300 digits, a squared error and a tanh net."""
    batch = next(iter(jdl.data.digits("train", batch_size=300, dtype="float32")))
    batch = {name: jnp.asarray(batch[name]) for name in ("image", "label")}
    batch["image"] -= batch["image"].mean(axis=0, keepdims=True)
    net = MLP(widths=(32, 32), num_outputs=10, activation="tanh", kernel_init="lecun")
    model = jdl.from_linen(net)
    params, state = model.init(jax.random.key(0), batch["image"][:1])
    return jdl.Objective(model, squared, state, batch, train=False), params


@functools.partial(jax.jit, static_argnums=(3, 4))
def run(objective, params, opt_state, optimizer, steps):
    def step(carry, _):
        params, state = carry
        _, grads, _ = objective.value_and_grad(params)
        again = {"grad_fn": lambda p, _: objective.grad(p)}
        with jax.numpy_dtype_promotion("standard"):
            update = optax.with_extra_args_support(optimizer).update
            updates, state = update(grads, state, params, **again)
        return (optax.apply_updates(params, updates), state), ()

    return jax.lax.scan(step, (params, opt_state), length=steps)[0]


def end(optimizer, steps=2500, measured=10):
    """The mean largest eigenvalues of the last measurements, 50 steps apart."""
    objective, params = problem()
    state, found = optimizer.init(params), []
    params, state = run(objective, params, state, optimizer, steps)
    track = curvature.SharpnessTracker(tolerance=1e-2, max_products=60)
    for _ in range(measured):
        params, state = run(objective, params, state, optimizer, 50)
        found.append(track(objective, params, state))
    return {name: np.mean([each[name] for each in found]) for name in found[0]}


@pytest.mark.parametrize("rate", [0.3, 0.45, 0.6])
def test_gradient_descent_ends_at_two_over_its_rate(rate):
    """Cohen et al., Gradient descent … typically occurs at the edge of stability (2021)."""
    assert end(optax.sgd(rate))["sharpness"] == pytest.approx(2 / rate, rel=0.1)


@pytest.mark.parametrize("rate", [2e-3, 3e-3, 4e-3])
def test_adam_ends_at_38_over_its_rate(rate):
    """Cohen et al., Adaptive gradient methods at the edge of stability (2022): β₁ = 0.9."""
    found = end(optax.adam(rate, eps=1e-7))["preconditioned_sharpness"]
    assert found == pytest.approx(38 / rate, rel=0.15)


def test_sharpness_aware_minimization_ends_lower():
    """Foret et al. (2021); of the net above, gradient descent ends at 2/η."""
    rate = 0.3
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    sam = optax.contrib.sam(optax.sgd(rate), ascent, opaque_mode=True)
    assert end(sam)["sharpness"] < 0.5 * 2 / rate
