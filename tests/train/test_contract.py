"""One contract over {Linen, NNX, plain functions} × optimizers, with dropout and batch norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jdl
from jdl import losses, metrics, optim
from jdl.core.model import Model
from jdl.train import parallel
from jdl.train.step import build

B, F, K = 32, 6, 3


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(16)(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(K)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(F, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.outputs = nnx.Linear(16, K, rngs=rngs)

    def __call__(self, x):
        return self.outputs(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def plain_init(key, x):
    first, second = jax.random.split(key)
    return {
        "w": 0.4 * jax.random.normal(first, (F, 16)),
        "v": 0.4 * jax.random.normal(second, (16, K)),
    }


def plain_apply(params, x, key=None, train=False):
    """Batch norm on the batch's own statistics, and dropout."""
    h = x @ params["w"]
    h = (h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 1e-3)
    h = jnp.tanh(h)
    if train:
        h = jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h / 0.9, 0.0)
    return h @ params["v"]


MODELS = {
    "linen": lambda: jdl.from_linen(LinenNet()),
    "nnx": lambda: jdl.from_nnx(lambda rngs: NnxNet(rngs)),
    "functions": lambda: jdl.from_fns(plain_init, plain_apply),
}
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.2),
    "adam": lambda: optax.adam(0.03),
    "optax_lbfgs": lambda: optax.lbfgs(),
    "sophia": lambda: optax.contrib.sophia(0.01),
    "lbfgs": lambda: optim.lbfgs(),
    "bfgs": lambda: optim.bfgs(),
    "ssbroyden": lambda: optim.bfgs(update="ssbroyden"),
    "nonlinear_cg": lambda: optim.nonlinear_cg(),
    "hessian_free": lambda: optim.hessian_free(),
    "newton": lambda: optim.newton(),
}


def a_batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, F)).astype(np.float32)
    label = np.argmax(x[:, :K] + 0.3 * rng.normal(size=(B, K)), axis=1).astype(np.int32)
    return {"image": x, "label": label}


def program_of(model: Model, optimizer, **options):
    return build(
        model,
        losses.softmax_cross_entropy,
        optimizer,
        metrics={"accuracy": metrics.accuracy},
        **options,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_learns_compiles_once_and_repeats(model, optimizer):
    program = program_of(MODELS[model](), OPTIMIZERS[optimizer]())
    batch = a_batch()
    step = jax.jit(program.train)
    evaluate = jax.jit(program.evaluate)
    finals = []
    for _ in range(2):
        state = jax.jit(program.init)(jax.random.key(1), batch)
        before = evaluate(state.params, state.model_state, batch)[0]["loss"] / B
        for _ in range(12):
            state, logs = step(state, batch)
        finals.append(state)
    after = evaluate(state.params, state.model_state, batch)[0]["loss"] / B
    assert step._cache_size() == 1
    assert int(state.step) == 12
    assert np.isfinite(float(logs["loss"]))
    # batch norm's running averages lag behind, so evaluation is compared loosely
    assert float(after) < 0.9 * float(before)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, [s.params for s in finals]))
    if model != "functions":
        assert jax.tree.leaves(state.model_state)  # batch statistics are kept
        moved = jax.tree.leaves(state.model_state)[0]
        fresh = jax.tree.leaves(program.init(jax.random.key(1), batch).model_state)[0]
        assert not np.allclose(moved, fresh)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("optax_lbfgs", "bfgs") else ())
        for name in OPTIMIZERS
        if name != "sophia"
    ],
)
def test_a_mesh_of_two_gives_the_numbers_of_one(optimizer):
    # Without dropout: a step on a mesh draws the same masks only with the same sharding of bits.
    model = jdl.from_linen(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(K)]))
    finals = []
    for devices in (jax.devices()[:1], jax.devices()[:2]):
        program = program_of(model, OPTIMIZERS[optimizer]())
        placed = parallel.placement(devices)
        batch = placed.put_batch(a_batch())
        state = placed.put_state(program.init(jax.random.key(1), a_batch()))
        step = jax.jit(program.train, out_shardings=placed.state)
        for _ in range(4):
            state, _ = step(state, batch)
        finals.append(state.params)
    atol = 5e-4 if optimizer == "newton" else 2e-5  # Newton divides by small eigenvalues
    for one, two in zip(*map(jax.tree.leaves, finals), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=atol)


def test_second_order_steps_log_their_diagnostics():
    program = program_of(MODELS["linen"](), optim.hessian_free(), curvature_batch_size=8)
    state = jax.jit(program.init)(jax.random.key(0), a_batch())
    _, logs = jax.jit(program.train)(state, a_batch())
    assert {"damping", "reduction_ratio", "linear_iterations", "termination"} <= logs.keys()
    assert float(logs["gradient_equivalents"]) > 1.0
    assert int(logs["linear_iterations"]) >= 1


def test_a_part_of_the_parameters_is_trained_by_each_method():
    """The last layer by L-BFGS, everything else by Adam."""

    def labels(params):
        return {name: "last" if name == "Dense_1" else "rest" for name in params}

    optimizer = optax.partition({"last": optim.lbfgs(), "rest": optax.adam(0.01)}, labels)
    program = program_of(MODELS["linen"](), optimizer)
    state = jax.jit(program.init)(jax.random.key(0), a_batch())
    step = jax.jit(program.train)
    losses_seen = []
    for _ in range(8):
        state, logs = step(state, a_batch())
        losses_seen.append(float(logs["loss"]))
    assert losses_seen[-1] < 0.7 * losses_seen[0]
    assert float(logs["evaluations"]) >= 8  # L-BFGS gave its account
