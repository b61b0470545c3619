"""What a model or a loss would take for something else is refused before the first step."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

import jdl
from jdl import losses
from jdl.core import check
from jdl.data import mixup
from jdl.models import MLP, RBM, RNN, Autoencoder, LanguageModel
from jdl.models.autoencoder import denoising
from jdl.models.dbn import DBN
from jdl.models.gan import GAN, optimizers
from jdl.models.rbm import contrastive_divergence, sparse_divergence
from jdl.models.rnn import next_step_loss
from jdl.train import boltzmann, premade

PIXELS = np.linspace(0, 1, 4 * 64, dtype=np.float32).reshape(4, 8, 8, 1)
TOKENS = np.array([[0, 1, 2, 0]] * 4)
GAN8 = GAN.of_shape((8, 8, 1))
NEXT = RNN(num_outputs=3, vocabulary=3, hidden=4, every_step=True)


def gan():
    return jdl.Estimator(GAN8.model, GAN8.loss, optimizers(optax.sgd(0.1), optax.sgd(0.1)))


def classes(**options):
    return jdl.classifier(MLP(num_outputs=3, widths=(4,)), "sgd", **options)


CASES = {
    "gan": (gan, {"image": 2 * PIXELS - 1}, r"`image` must be in \[0, 1\]"),
    "rbm": (lambda: boltzmann.rbm(RBM(hidden=3)), {"image": 16 * PIXELS}, r"`x` must be in"),
    "dbn": (
        lambda: boltzmann.rbm(DBN(widths=(3, 2)).layer(0, [])),
        {"image": 16 * PIXELS},
        r"`x` must be in",
    ),
    "label": (
        classes,
        {"image": PIXELS, "label": np.array([0, 1, 2, -1])},
        r"\[0, 3\), got \[-1\]",
    ),
    "mixed": (
        lambda: classes(batch_transform=mixup(num_classes=3)),
        {"image": PIXELS, "label": np.array([0, 1, 2, 3])},
        r"probabilities, in \[0, 1\], got values from nan",
    ),
    "ignored": (
        lambda: jdl.Estimator(
            NEXT, partial(losses.softmax_cross_entropy, ignore=-1), "sgd", inputs="x"
        ),
        {"x": TOKENS, "label": np.where(TOKENS == 2, -1, 0)},
        None,
    ),
    "autoencoder": (
        lambda: premade.autoencoder(denoising(Autoencoder(widths=(4,))), "sgd"),
        {"image": 2 * PIXELS - 1},
        r"probabilities, in \[0, 1\], got values from -1 to 1",
    ),
    "tokens": (
        lambda: jdl.Estimator(NEXT, next_step_loss, "sgd", inputs="tokens"),
        {"tokens": TOKENS - 1},
        r"numbers in \[0, 3\)",
    ),
    "lengths": (
        lambda: jdl.Estimator(NEXT, next_step_loss, "sgd", inputs=("tokens", "lengths")),
        {"tokens": TOKENS, "lengths": np.array([1, 2, 3, 0])},
        "`lengths` must be from 1 to 4",
    ),
    "transformer": (
        lambda: jdl.Estimator(
            LanguageModel(vocabulary=3, width=4, depth=1, heads=1),
            next_step_loss,
            "sgd",
            inputs="tokens",
        ),
        {"tokens": TOKENS + 1},
        r"numbers in \[0, 3\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_batch_is_checked(case):
    make, batch, said = CASES[case]
    estimator = make()
    if said is None:
        estimator.train([batch], steps=1)
        return
    with pytest.raises(check.ArgumentError, match=said):
        estimator.train([batch], steps=1)
    assert estimator.step == 0


def test_data_are_checked_once():
    seen = []

    def loss(outputs, batch):
        if check.known(batch["label"]):
            seen.append(outputs.shape)
        return losses.softmax_cross_entropy(outputs, batch)

    batch = {"image": PIXELS, "label": np.array([0, 1, 2, 0])}
    estimator = jdl.Estimator(MLP(num_outputs=3, widths=(4,)), loss, "sgd")
    data = [batch] * 4
    for _ in range(2):
        estimator.train(data, steps=2)
    assert seen == [(4, 3)]


@pytest.mark.parametrize("optimizer", ["lbfgs", "hf", "kfac", optax.lbfgs()])
@pytest.mark.parametrize("loss", [contrastive_divergence, sparse_divergence(0.1, 1.0)])
def test_what_has_a_gradient_alone_refuses_optimizers_that_ask_for_more(optimizer, loss):
    estimator = jdl.Estimator(RBM(hidden=3), loss, optimizer)
    with pytest.raises(check.UserError, match="Contrastive divergence has a gradient, but no val"):
        estimator.train([{"image": PIXELS}], steps=1)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_what_has_a_gradient_alone_takes_optimizers_of_gradients(optimizer):
    estimator = boltzmann.rbm(RBM(hidden=3), optimizer).train([{"image": PIXELS}] * 2, steps=2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(estimator.params))


@pytest.mark.parametrize("asked", [None, 2])
def test_random_keys_in_batches_are_left_alone(asked):
    keys = jax.random.split(jax.random.key(1), 4)
    batch = {"image": PIXELS, "label": np.arange(4) % 3, "key": keys}

    def loss(outputs, batch):
        noise = jax.vmap(lambda key: jax.random.uniform(key))(batch["key"])
        return noise * losses.softmax_cross_entropy(outputs, batch)

    estimator = jdl.Estimator(
        MLP(num_outputs=3, widths=()),
        loss,
        "sgd",
        steps_per_dispatch=asked,
        devices=jax.devices()[:1],
        log_every=1,
    )
    if asked:
        with pytest.raises(check.ArgumentError, match="random keys"):
            estimator.train([batch] * 2, steps=2)
        return
    assert estimator.train([batch] * 2, steps=2).step == 2
