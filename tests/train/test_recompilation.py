"""Nothing is compiled after the first step, by JAX's own count."""

import contextlib

import jax
import numpy as np
import pytest

import jdl
from jdl.data import from_arrays
from jdl.models import MLP

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """The programs compiled meanwhile."""
    found, active = [], True

    def listen(event, seconds, **_):
        if active and event == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    active = False


def data(batch_size=16):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70, 6)).astype(np.float32)
    return from_arrays(x, np.argmax(x[:, :3], 1).astype(np.int32), batch_size=batch_size)


def test_the_count_counts():
    with compilations() as found:
        jax.jit(lambda x: x * 3.25)(np.ones(3))
    assert len(found) == 1


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", "cg", "hf", "newton"])
def test_the_second_step_compiles_nothing(optimizer):
    estimator = jdl.classifier(MLP(widths=(8,), num_outputs=3), optimizer, log_every=1)
    train = data()
    estimator.train(train, steps=1)
    with compilations() as found:
        estimator.train(train, steps=11)
    assert found == []


@pytest.mark.parametrize("optimizer", ["adam", "newton"])
def test_dispatches_of_any_length_compile_nothing(optimizer, tmp_path):
    estimator = jdl.classifier(
        MLP(widths=(8,), num_outputs=3),
        optimizer,
        devices=jax.devices()[:1],
        steps_per_dispatch=4,
        workdir=tmp_path,
        log_every=5,
        save_every=6,
    )
    train = data()
    estimator.train(train, steps=4)
    estimator.evaluate(train)
    with compilations() as found:
        estimator.train(train, steps=21, validation=train, validate_every=7)
    assert found == []


def test_saving_evaluating_and_predicting_again_compile_nothing(tmp_path):
    estimator = jdl.classifier(
        MLP(widths=(8,), num_outputs=3), "adam", workdir=tmp_path, save_every=2, log_every=1
    )
    train, held = data(), data(14)
    estimator.train(train, steps=2)
    estimator.evaluate(held)
    estimator.predict(held)
    with compilations() as found:
        estimator.train(train, steps=5)
        estimator.evaluate(held)
        estimator.predict(held)
    assert found == []
