"""A model's account against counts made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.models import CNN, MLP, RNN
from jdl.models.cnn import Block
from jdl.train.summary import flops, summarize


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_parameters_of_the_default_cnn_are_those_of_its_layers():
    found = summarize(CNN(), struct(2, 128, 128, 1))
    layers = [25 * 1 * 32 + 32, 25 * 32 * 32 + 32, 32**3 * 1024 + 1024, 1024 * 10 + 10]
    assert found.parameters == sum(layers)
    assert found.bytes == 4 * found.parameters
    shapes = {entry.name: entry.shape for entry in found.entries}
    assert shapes["Conv_0/kernel"] == (5, 5, 1, 32)
    assert shapes["logits/bias"] == (10,)


def test_flops_of_a_convolution_are_those_of_its_products():
    block = Block(
        filters=7, kernel_size=(3, 3), padding="valid", activation="linear", pool_size=None
    )
    net = CNN(num_classes=2, blocks=(block,), units=3, activation="linear")
    found = summarize(net, struct(4, 12, 10, 5))
    convolution = 2 * 10 * 8 * 9 * 5 * 7 + 10 * 8 * 7
    dense = 2 * 560 * 3 + 3 + 2 * 3 * 2 + 2
    assert found.forward_flops == convolution + dense


@pytest.mark.parametrize("length", [1, 8, 32])
def test_a_scan_counts_as_often_as_it_runs(length):
    found = summarize(RNN(hidden=16), struct(4, length, 8, 1))
    cell = 2 * (8 + 16) * 4 * 16  # the products of one step
    logits = 2 * 16 * 10
    assert found.forward_flops == pytest.approx(length * cell + logits, rel=0.2)


def test_nested_scans_multiply():
    def inner(x):
        return jax.lax.scan(lambda y, _: (x @ y, None), x, length=3)[0]

    def outer(x):
        return jax.lax.scan(lambda y, _: (inner(y), None), x, length=5)[0]

    x = np.ones((16, 16), np.float32)
    assert flops(outer, x) == pytest.approx(15 * 2 * 16**3, rel=0.05)
    assert flops(lambda x: x @ x, x) == 2 * 16**3


def test_a_gradient_costs_about_three_times_the_outputs():
    found = summarize(MLP(widths=(64,), dropout=0.0), struct(32, 784))
    assert 1.9 < found.gradient_flops / found.forward_flops < 3.1
