"""One function for three modes: its Spec is what is trained, measured and predicted."""

import importlib
import inspect
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import Mode, Spec, from_model_fn
from jdl.core import check
from jdl.data import from_arrays
from jdl.models import MLP, param
from jdl.train.writers import read_directions

ONE = jax.devices()[:1]


def data(n=70, batch_size=16, dtype=np.int32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    return from_arrays(x, np.argmax(x[:, :3], 1).astype(dtype), batch_size=batch_size)


def classify(optimizer, split=True):
    def fn(features, labels, mode):
        net = MLP(widths=(8,), num_outputs=3, dropout=0.1)
        logits = net(features, train=mode == Mode.TRAIN)
        if mode == Mode.PREDICT:
            assert labels is None
            return Spec(predictions={"class": jnp.argmax(logits, -1), "logits": logits})
        right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        if split:
            return Spec(
                outputs=logits, loss=cross_entropy, optimizer=optimizer, metrics={"accuracy": right}
            )
        loss = cross_entropy(logits, labels)
        return Spec(loss=loss, optimizer=optimizer, metrics={"accuracy": right})

    return fn


def test_a_line_of_plain_arrays_reaches_least_squares():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    y = (x @ rng.normal(size=(3, 1)) + 0.5).astype(np.float32)

    def fn(features, labels, mode):
        weights = param("weights", nn.initializers.zeros, (3, 1))
        predicted = features @ weights + param("shift", nn.initializers.zeros, (1,))[None]
        if mode == Mode.PREDICT:
            return Spec(predictions=predicted)
        return Spec(loss=jnp.square(predicted - labels)[:, 0], optimizer="lbfgs")

    steps = from_model_fn(fn, devices=ONE).train(from_arrays(x, y, batch_size=64), steps=30)
    ones = np.concatenate([x, np.ones((64, 1), np.float32)], 1)
    expected = np.linalg.lstsq(ones, y)[0]
    found = [steps.params["weights"]["value"][:, 0], steps.params["shift"]["value"]]
    np.testing.assert_allclose(np.concatenate(found), expected[:, 0], atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "hf", "newton", "natural_gradient"])
def test_optimizers_of_either_order_learn(optimizer):
    estimator = from_model_fn(classify(optimizer), devices=ONE)
    before = estimator.initialize(data()).evaluate(data())
    after = estimator.train(data(batch_size=35), steps=12).evaluate(data())
    assert after["loss"] < before["loss"]
    predicted = estimator.predict(data(batch_size=32))
    assert predicted["class"].shape == (70,)
    (batch,) = data(batch_size=70).once()
    right = np.mean(predicted["class"] == batch["label"])
    assert after["accuracy"] == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("split", [True, False])
def test_it_is_the_classifier_of_the_same_parameters(split):
    mine = from_model_fn(classify(optax.sgd(0.1), split), devices=ONE).initialize(data())
    theirs = jdl.classifier(
        MLP(widths=(8,), num_outputs=3, dropout=0.1), optax.sgd(0.1), devices=ONE
    ).initialize(data())
    theirs._run.state = theirs.state._replace(params=mine.params["MLP_0"], key=mine.state.key)
    assert mine.evaluate(data()) == pytest.approx(theirs.evaluate(data()), rel=1e-6)


@pytest.mark.slow
def test_values_of_a_loss_are_refused_where_its_curvature_is_needed():
    for optimizer in ("hf", "lm"):
        estimator = from_model_fn(classify(optimizer, split=False), devices=ONE)
        with pytest.raises(check.ArgumentError, match=r"Spec\(outputs="):
            estimator.train(data(), steps=1)
    estimator = from_model_fn(classify("newton", split=False), devices=ONE)
    assert estimator.train(data(), steps=1).step == 1


def test_resumed_equals_uninterrupted(tmp_path):
    whole = from_model_fn(classify("adam"), devices=ONE).train(data(), steps=7)
    for steps in (3, 7):
        resumed = from_model_fn(classify("adam"), devices=ONE, workdir=tmp_path)
        resumed.train(data(), max_steps=steps)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


def test_bytes_are_images_as_features_but_numbers_as_labels():
    seen = {}

    def fn(features, labels, mode):
        seen[mode] = (sorted(features), features["image"].dtype, getattr(labels, "dtype", None))
        logits = nn.Dense(3)(features["image"].reshape(features["image"].shape[0], -1))
        if mode == Mode.PREDICT:
            return Spec(predictions=logits)
        return Spec(
            outputs=logits,
            loss=lambda outputs, y: optax.softmax_cross_entropy_with_integer_labels(
                outputs, y.astype(jnp.int32)
            ),
            optimizer="sgd",
        )

    def inputs():
        rng = np.random.default_rng(0)
        for _ in range(3):
            image = rng.integers(0, 256, (4, 2, 2, 1), dtype=np.uint8)
            yield {"image": image, "id": np.arange(4), "label": np.array([0, 1, 2, 0], np.uint8)}

    estimator = from_model_fn(fn, features=("image", "id"), devices=ONE)
    estimator.train(inputs, steps=2)
    estimator.evaluate(inputs)
    assert estimator.predict(inputs).shape == (12, 3)
    both = ["id", "image"]
    assert seen[Mode.TRAIN] == seen[Mode.EVALUATE] == (both, jnp.float32, jnp.uint8)
    assert seen[Mode.PREDICT] == (both, jnp.float32, None)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_features_alone_are_computed_with_in_another_dtype(kind):
    seen = {}

    def fn(features, labels, mode):
        logits = nn.Dense(1)(features.reshape(features.shape[0], -1))
        seen[mode] = (features.dtype, logits.dtype, getattr(labels, "dtype", None))
        if mode == Mode.PREDICT:
            return Spec(predictions=logits)
        return Spec(loss=jnp.square(logits[:, 0] - labels), optimizer="sgd")

    image, label = np.ones((4, 2, 2, 1), kind), np.ones(4, np.float32)
    batch = {"image": image, "label": label}
    estimator = from_model_fn(fn, compute_dtype="bfloat16", devices=ONE).train([batch], steps=1)
    assert estimator.predict([batch]).dtype == np.float32
    assert estimator.params["Dense_0"]["kernel"].dtype == jnp.float32
    assert seen[Mode.TRAIN] == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert seen[Mode.PREDICT] == (jnp.bfloat16, jnp.bfloat16, None)
    with pytest.raises(check.ArgumentError, match="`compute_dtype` must be a floating type"):
        from_model_fn(fn, compute_dtype="int8")


def test_batch_statistics_move_in_training_only():
    def fn(features, labels, mode):
        x = nn.BatchNorm(use_running_average=mode != Mode.TRAIN)(features)
        logits = nn.Dense(3)(x)
        return Spec(logits, optax.softmax_cross_entropy_with_integer_labels, "sgd", outputs=logits)

    estimator = from_model_fn(fn, devices=ONE).initialize(data())
    before = estimator.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    estimator.evaluate(data())
    np.testing.assert_array_equal(
        before, estimator.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    )
    estimator.train(data(), steps=1)
    after = estimator.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0


def spec_of(**fields):
    def fn(features, labels, mode):
        logits = nn.Dense(3)(features)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        closure = fields.pop("closure", None)
        if closure:
            return Spec(outputs=logits, loss=lambda _, y: jnp.sum(logits, 1) * y, optimizer="sgd")
        given = {"loss": losses, "optimizer": "sgd"} | fields
        return Spec(
            **{k: v(losses) if k == "loss" and callable(v) else v for k, v in given.items()}
        )

    return fn


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda x, y, mode: nn.Dense(3)(x), "returns a Spec"),
        (spec_of(optimizer=None), "`optimizer` must be in the Spec of mode train"),
        (spec_of(loss=jnp.mean), "Leave out the mean"),
        (spec_of(metrics={"loss": jnp.ones(16)}), "named other than 'loss'"),
        (spec_of(closure=True), "pass it in `outputs`"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(fn, said):
    with pytest.raises(check.ArgumentError, match=said):
        from_model_fn(fn, devices=ONE).train(data(), steps=1)


def test_prediction_in_a_new_process_needs_labels_once(tmp_path):
    first = from_model_fn(classify("adam"), devices=ONE, workdir=tmp_path).train(data(), steps=2)
    expected = first.predict(data())["logits"]
    (batch,) = data(batch_size=70).once()
    unlabelled = from_arrays(batch["image"], batch_size=16)
    again = from_model_fn(classify("adam"), devices=ONE, workdir=tmp_path)
    with pytest.raises(check.DataError, match="initialize"):
        again.predict(unlabelled)
    again.initialize(data())
    np.testing.assert_array_equal(again.predict(unlabelled)["logits"], expected)


def test_the_names_that_old_ones_are_led_to_exist():
    page = (Path(__file__).parents[2] / "notebooks/migration/estimator.md").read_text()
    names = set(re.findall(r"\bjdl(?:\.\w+)+", page))
    assert len(names) > 8
    for name in names:
        found = jdl
        for part in name.split(".")[1:]:
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(f"{found.__name__}.{part}")
    options = inspect.signature(jdl.Estimator).parameters
    assert {"save_every", "keep", "seed", "log_every", "keep_best", "hooks", "logs"} <= set(options)
    assert {"validation", "validate_every"} <= set(
        inspect.signature(jdl.Estimator.train).parameters
    )


def test_a_metric_that_is_a_function_declares_its_direction(tmp_path):
    @jdl.metrics.direction("max")
    def right(outputs, labels):
        return (jnp.argmax(outputs, -1) == labels).astype(jnp.float32)

    def fn(features, labels, mode):
        spec = classify("sgd")(features, labels, mode)
        return spec if mode == Mode.PREDICT else spec._replace(metrics={"right": right})

    from_model_fn(fn, devices=ONE, workdir=tmp_path).train(data(), steps=1)
    assert read_directions(tmp_path) == {"loss": "min", "right": "max"}
