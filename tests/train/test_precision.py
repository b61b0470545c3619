"""Computing in bfloat16, and recomputing activations: what changes and what must not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdl
from jdl.data import from_arrays
from jdl.models import MLP


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    return from_arrays(x, np.argmax(x[:, :3], 1).astype(np.int32), batch_size=32, seed=0)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.tanh(x))


def train(module, optimizer="adam", steps=60, **options):
    estimator = jdl.classifier(module, optimizer, devices=jax.devices()[:1], **options)
    return estimator.train(data(), steps=steps)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", "hf"])
def test_bfloat16_learns_and_keeps_parameters_and_state_in_float32(optimizer):
    steps = 60 if optimizer == "adam" else 6
    half = train(Normed(), optimizer, steps, compute_dtype="bfloat16")
    held = (half.params, half.model_state, half.state.opt_state)
    assert not any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(held))
    assert half.predict(data()).dtype == np.float32
    assert half.evaluate(data())["accuracy"] > 0.7
    jaxpr = str(jax.make_jaxpr(half.model.apply)(half.params, half.model_state, jnp.ones((2, 6))))
    assert "bf16[2,16] = dot_general" in jaxpr


@pytest.mark.slow
def test_recomputing_changes_no_number_and_is_in_the_program():
    deep = MLP(widths=(64,) * 12, num_outputs=3)
    big = {"steps": 3}
    plain, spared = train(deep, **big), train(deep, remat=True, **big)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, plain.params, spared.params)
    program = jax.make_jaxpr(spared.model.apply)(spared.params, {}, jnp.ones((2, 6)))
    assert "prevent_cse" in str(program)
    assert plain.memory["peak"] > plain.memory["state"] > 0
