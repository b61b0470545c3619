"""Two devices give the numbers of one, however the work is spread over them."""

import jax
import numpy as np
import optax
import pytest

import jdl
from jdl.core import check
from jdl.data import from_arrays
from jdl.models import MLP
from jdl.optim import registry
from jdl.train.parallel import placement, split_largest_axis

OPTIMIZERS = ["sgd", "adam", "optax_lbfgs", "lbfgs", "cg", "newton", "hf"]


def data(n=64, batch_size=32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    labels = np.argmax(x[:, :3], axis=1).astype(np.int32)
    return from_arrays(x, labels, batch_size=batch_size, seed=0)


def make(optimizer, parallel, devices=None, width=8, **options):
    if optimizer == "optax_lbfgs":  # its line search differentiates the objective itself
        optimizer = optax.lbfgs()
    elif isinstance(optimizer, str):
        optimizer = registry.by_name(optimizer)
    net = MLP(widths=(width,), num_outputs=3)
    return jdl.classifier(net, optimizer, parallel=parallel, devices=devices, **options)


def assert_close(one, two, atol=2e-5):
    """Sums are made in another order, and nothing else differs."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), one, two)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pmap_gives_the_numbers_of_one_device(optimizer):
    one = make(optimizer, "jit", jax.devices()[:1]).train(data(), steps=4)
    two = make(optimizer, "pmap").train(data(), steps=4)
    # Newton's system is nearly singular here, and magnifies rounding.
    assert_close(one.params, two.params, atol=5e-4 if optimizer == "newton" else 2e-5)
    rel = 5e-3 if optimizer == "newton" else 1e-4
    assert one.evaluate(data())["loss"] == pytest.approx(two.evaluate(data())["loss"], rel=rel)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", pytest.param("hf", marks=pytest.mark.slow)])
def test_fsdp_splits_large_arrays_and_gives_the_numbers_of_one_device(optimizer):
    rule = lambda path, shape, n: split_largest_axis(path, shape, n) if len(shape) > 1 else None  # noqa: E731
    if optimizer == "hf":  # many CG iterations would magnify rounding
        optimizer = registry.by_name("hf", max_cg_iterations=5)
    one = make(optimizer, "jit", jax.devices()[:1], width=4096).train(data(), steps=3)
    two = make(optimizer, "fsdp", width=4096, split_rule=rule).train(data(), steps=3)
    kernel = two.params["Dense_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (6, 2048)
    moments = [x for x in jax.tree.leaves(two.state.opt_state) if x.shape[-2:] == (6, 4096)]
    assert moments
    assert all(x.addressable_shards[0].data.shape[-1] == 2048 for x in moments)
    assert_close(one.params, two.params)


@pytest.mark.parametrize("parallel", ["pmap", "fsdp"])
def test_a_checkpoint_moves_to_another_number_of_devices(parallel, tmp_path):
    whole = make("adam", parallel, width=4096).train(data(), steps=6)
    make("adam", parallel, width=4096, workdir=tmp_path).train(data(), steps=3)
    moved = make("adam", "jit", jax.devices()[:1], width=4096, workdir=tmp_path)
    moved.train(data(), max_steps=6)
    assert_close(whole.params, moved.params)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(check.ArgumentError, match="`batch_size` must be a multiple of the 2"):
        make("sgd", "pmap").train(data(batch_size=31), steps=1)


def test_curvature_batches_are_shared_under_pmap():
    estimator = make("hf", "pmap", curvature_batch_size=16).train(data(), steps=2)
    assert estimator.step == 2
    with pytest.raises(check.ArgumentError, match="curvature_batch_size"):
        make("hf", "pmap", curvature_batch_size=7)


def test_an_axis_that_devices_do_not_divide_is_refused():
    split_first = lambda path, shape, n: 0 if shape else None  # noqa: E731
    with pytest.raises(check.ArgumentError, match="split_rule"):
        placement(jax.devices(), "fsdp", split_first).shardings({"x": np.zeros((3, 2))})
