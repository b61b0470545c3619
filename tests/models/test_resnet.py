"""Residual networks: sizes as published, the start of a block, statistics of padded batches."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core import check
from jdl.core.model import from_linen
from jdl.models.resnet import ResNet, ResNetBlock

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (ResNet(), 11_689_512),
        (ResNet(depths=(3, 4, 6, 3)), 21_797_672),
        (ResNet(depths=(3, 4, 6, 3), bottleneck=True), 25_557_032),
    ],
    ids=["ResNet-18", "ResNet-34", "ResNet-50"],
)
def test_sizes_are_those_published(net, size):
    shapes = jax.eval_shape(net.init, KEY, jnp.ones((1, 224, 224, 3)))["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == size


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_block_begins_as_its_shortcut(bottleneck):
    block = ResNetBlock(width=2, bottleneck=bottleneck)
    x = jax.random.normal(KEY, (3, 5, 5, 8 if bottleneck else 2))
    found, _ = jax.jit(block.init_with_output)(KEY, x)
    np.testing.assert_array_equal(found, np.maximum(x, 0))


def small(**options):
    return ResNet(3, (1, 1), (4, 8), stem=(3, 1), pool=False, **options)


def test_the_average_of_the_statistics_is_a_batch_s():
    model = from_linen(small())
    x = jax.random.normal(KEY, (6, 4, 4, 1))
    params, state = jax.jit(model.init)(KEY, x)
    seen = nn.Conv(4, (3, 3), use_bias=False).apply({"params": params["Conv_0"]}, x)
    _, state = jax.jit(partial(model.apply, train=True))(params, state, x)
    average = state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(average["mean"], 0.1 * seen.mean((0, 1, 2)), atol=1e-6)
    expected = 0.9 + 0.1 * np.asarray(seen).var((0, 1, 2))
    np.testing.assert_allclose(average["var"], expected, rtol=1e-4)


def test_padding_is_no_part_of_the_statistics_with_the_mask():
    model = from_linen(small())
    x = jax.random.normal(KEY, (6, 4, 4, 1))
    padded, mask = jnp.concatenate([x, jnp.zeros((2, 4, 4, 1))]), jnp.arange(8) < 6
    params, state = jax.jit(model.init)(KEY, x)
    train = jax.jit(partial(model.apply, train=True))
    expected = train(params, state, x)
    found = train(params, state, padded, mask.astype(jnp.float32))
    np.testing.assert_allclose(found[0][:6], expected[0], atol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_another_norm_has_no_state():
    net = small(norm=lambda train, **options: nn.GroupNorm(2, **options))
    variables = jax.eval_shape(net.init, KEY, jnp.ones((1, 8, 8, 1)))
    assert sorted(variables) == ["params"]
    assert "GroupNorm_0" in variables["params"]


def test_errors_say_what_to_give():
    with pytest.raises(check.ArgumentError, match=r"depths.*as many as widths, 4"):
        ResNet(depths=(1, 1)).init(KEY, jnp.ones((1, 8, 8, 1)))
    with pytest.raises(check.ArgumentError, match=r"\[B, H, W, C\]"):
        ResNet().init(KEY, jnp.ones((1, 4)))
