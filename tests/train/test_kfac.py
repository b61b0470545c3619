"""K-FAC in training: its state is set up for the model's layers, saved, restored and split."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import jdl
from jdl.data import from_arrays
from jdl.optim import hessian_free, kfac


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(width)(x), None


class Net(nn.Module):
    """Embeddings, attention, and a stack that a scan runs over: shapes alone mislead `kfac`."""

    width: int = 8

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, self.width)(tokens)
        axes, keys = {"params": 0}, {"params": True}
        x, _ = nn.scan(Block, variable_axes=axes, split_rngs=keys, length=2)()(x, None)
        return nn.Dense(3)(x.mean(1))


def data(batch_size=16):
    tokens = np.random.default_rng(0).integers(0, 20, (64, 4)).astype(np.int32)
    return from_arrays(tokens, tokens[:, 0] % 3, batch_size=batch_size, seed=0)


def embeddings(params):
    name = lambda path: "rest" if "embedding" in jax.tree_util.keystr(path) else "kfac"  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, _: name(path), params)


OPTIMIZERS = {
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), kfac()),
    "partition": lambda: optax.partition({"kfac": kfac(), "rest": optax.sgd(0.1)}, embeddings),
    "hf": lambda: hessian_free(preconditioner="kronecker", max_cg_iterations=3),
}


def make(optimizer, **options):
    options = {"devices": jax.devices()[:1]} | options
    return jdl.classifier(Net(options.pop("width", 8)), optimizer, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_compiles_once_whatever_wraps_the_optimizer(name):
    found = []
    compiled = "/jax/core/compile/backend_compile_duration"
    train = data()
    estimator = make(OPTIMIZERS[name](), log_every=1).train(train, steps=1)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: found.append(seconds) if event == compiled else None
    )
    estimator.train(train, steps=6)
    assert found == []


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path):
    optimizer = OPTIMIZERS["clipped"]
    whole = make(optimizer(), ema=0.9).train(data(), steps=7)
    make(optimizer(), ema=0.9, workdir=tmp_path).train(data(), steps=3)
    resumed = make(optimizer(), ema=0.9, workdir=tmp_path)
    resumed.train(data(), max_steps=7)
    assert resumed.step == 7
    mine, theirs = ((s.params, s.opt_state) for s in (whole.state, resumed.state))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.slow
def test_under_fsdp_factors_are_split_and_the_numbers_are_those_of_one_device():
    optimizer = lambda: kfac(curvature="gauss_newton", factors_every=2, inverses_every=2)  # noqa: E731
    one = make(optimizer(), width=128).train(data(64), steps=4)
    two = make(optimizer(), width=128, parallel="fsdp", devices=jax.devices()).train(
        data(64), steps=4
    )
    large = [x for x in jax.tree.leaves(two.state.opt_state) if x.size >= 2**14]
    assert {x.shape for x in large} >= {(2, 136, 136), (2, 128, 128)}
    assert all(x.addressable_shards[0].data.size == x.size // 2 for x in large)
    assert one.evaluate(data())["loss"] < 0.9  # from about log 3
    assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(assert_close, one.params, two.params)
