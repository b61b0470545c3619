"""Metrics against scikit-learn's."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from jdl import metrics
from jdl.core import check


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(200, 5)).astype(np.float32)
    outputs[:, 4] -= 9.0  # a class that is never predicted
    return outputs, rng.integers(0, 5, 200).astype(np.int32)


def test_top_k_accuracy(case):
    outputs, labels = case
    for k in (1, 3, 5, 9):
        found = metrics.top_k_accuracy(k)(jnp.asarray(outputs), {"label": jnp.asarray(labels)})
        k = min(k, 5)
        expected = 1.0 if k == 5 else sk.top_k_accuracy_score(labels, outputs, k=k, labels=range(5))
        assert float(found.mean()) == pytest.approx(expected, abs=1e-6)


def test_confusion_matrix_leaves_out_what_the_mask_does(case):
    outputs, labels = case
    mask = (np.arange(200) % 3 > 0).astype(np.float32)
    batch = {"label": jnp.asarray(labels), "mask": jnp.asarray(mask)}
    found = metrics.confusion_matrix(jnp.asarray(outputs), batch)
    kept = mask > 0
    expected = sk.confusion_matrix(labels[kept], outputs[kept].argmax(1), labels=range(5))
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("stray", [-1, 5])
def test_labels_beyond_the_classes_are_left_out(case, stray):
    outputs, labels = case
    strays = np.where(np.arange(200) < 7, stray, labels).astype(np.int32)
    found = metrics.confusion_matrix(jnp.asarray(outputs), {"label": jnp.asarray(strays)})
    expected = sk.confusion_matrix(labels[7:], outputs[7:].argmax(1), labels=range(5))
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_scores_of_each_class(case):
    outputs, labels = case
    predicted = outputs.argmax(1)
    found = metrics.class_scores(sk.confusion_matrix(labels, predicted, labels=range(5)))
    precision, recall, f1, count = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(5), zero_division=np.nan
    )
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.f1, f1)
    np.testing.assert_array_equal(found.examples, count)


def test_squared_errors_of_other_shapes_are_refused():
    with pytest.raises(check.ArgumentError, match=r"`outputs` must be of the shape of .* \(3,\)"):
        metrics.sum_squared_error(jnp.zeros((3, 1)), {"label": jnp.zeros(3)})
