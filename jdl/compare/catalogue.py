"""Named problems, each with a version and a fixed target."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl import losses, metrics
from jdl.compare import mnist, problem_file
from jdl.compare.curves_dataset import curves
from jdl.compare.equations import curve_fit, pinn_burgers, pinn_poisson
from jdl.compare.identity import as_label
from jdl.compare.problems import Problem, arrays_problem, tar_problem
from jdl.compare.results import Target
from jdl.compare.texts import gpt_bytes, lstm_bytes
from jdl.core import check
from jdl.core.model import from_fns
from jdl.core.types import Batch
from jdl.data import digits, digits_path, splits
from jdl.data.tar.paths import Paths, expand
from jdl.models.autoencoder import Autoencoder
from jdl.models.cnn import CNN, Block
from jdl.models.layers import sparse_init
from jdl.models.mlp import MLP
from jdl.models.resnet import ResNet
from jdl.models.rnn import RNN
from jdl.models.sequences import adding
from jdl.models.transformer import ViT


class Named(NamedTuple):
    """One problem of the catalogue.

    Attributes:
      make: `make(data)`, or `make()` for one with its own data.
      needs: the data that the user must give; empty for none.
      about: a description in one line.
      takes: the data that the user may give instead of the problem's own.
    """

    make: Callable[..., Problem]
    needs: str
    about: str
    takes: str = ""


def by_name(name: str, data: Paths | None = None) -> Problem:
    """The problem of that name.

    Args:
      name: one of `CATALOGUE`, or the path of a Python file, see `jdl.compare.problem_file`.
      data: the value of `--data`, for those that need or take it; they are named after it.

    Raises:
      ArgumentError: there is no such problem; the message names the nearest.
      DataError: it needs data that is not given or does not exist.

    >>> by_name("quadratic").name
    'quadratic'
    """
    if name.endswith(".py"):
        return problem_file.load_problem(name)
    named = CATALOGUE[check.one_of("problem", name, CATALOGUE)]
    return named.make(data) if named.needs or named.takes else named.make()


# ------------------------------------------------------------------ classifiers


def digits_cnn(target: Target | None = None) -> Problem:
    """The bundled 8×8 handwritten digits and a small CNN, which every method solves in seconds.

    There is no dropout, so that full-batch methods minimize a fixed function.

    >>> problem = digits_cnn()
    >>> problem.size, str(problem.target)
    (1438, 'test accuracy ≥ 95 %')
    """

    def build(image_shape: tuple[int, ...], num_classes: int) -> Any:
        del image_shape
        blocks = (Block(filters=16, kernel_size=(3, 3)), Block(filters=32, kernel_size=(3, 3)))
        return CNN(num_classes=num_classes, blocks=blocks, units=64, dropout=0.0)

    return _images("digits-cnn", build, target or Target("test_accuracy", "at least", 0.95))


def vit_images(data: Paths | None = None) -> Problem:
    """A vision transformer of 64 patches on the images of any tar; on the digits of 16 without.

    Images of a tar are scaled to 64×64. The target is an accuracy of 90 %, on the digits 95 %.
    """

    def build(image_shape: tuple[int, ...], num_classes: int) -> Any:
        patch = max(2, image_shape[0] // 8)
        return ViT(num_classes, patch=patch, width=64, depth=3, heads=4)

    return _images("vit-images-digits", build, Target("test_accuracy", "at least", 0.95), data)


def resnet_images(data: Paths | None = None) -> Problem:
    """A ResNet of three groups with batch norm; data as of `vit_images`, the digits to 98 %."""

    def build(image_shape: tuple[int, ...], num_classes: int) -> Any:
        large = image_shape[0] >= 64
        stem = (3, 2) if large else (3, 1)
        return ResNet(num_classes, (2, 2, 2), (24, 48, 96), stem=stem, pool=large)

    return _images("resnet-images-digits", build, Target("test_accuracy", "at least", 0.98), data)


def _images(name: str, build: Any, target: Target, data: Paths | None = None) -> Problem:
    """A classifier of the images of a tar, or of the bundled digits, where it has this name."""
    if data is not None:
        label = as_label(name.removesuffix("digits") + Path(str(expand(data)[0])).stem)
        return tar_problem(data, build, name=label, size=(64, 64))
    about = {"data": "the 1,797 bundled handwritten digits (UCI / scikit-learn, CC BY 4.0)"}
    options: dict[str, Any] = {"grayscale": True, "keep_index": False}
    return tar_problem(digits_path(), build, name=name, target=target, about=about, **options)


def mnist_mlp(data: Paths | None) -> Problem:
    """MNIST and 784-500-300-10 rectified units; target: test accuracy ≥ 98 %."""
    return _mnist(data, "mnist-mlp", MLP(widths=(500, 300), num_outputs=10), 0.98)


def mnist_cnn(data: Paths | None) -> Problem:
    """MNIST and the classic CNN; target: test accuracy ≥ 99 %."""
    return _mnist(data, "mnist-cnn", CNN(num_classes=10, units=128, dropout=0.0), 0.99)


def _mnist(data: Paths | None, name: str, model: Any, accuracy: float) -> Problem:
    found = mnist.read(data, name)
    return arrays_problem(
        name,
        lambda: model,
        losses.softmax_cross_entropy,
        {"image": found.x, "label": found.y},
        {"image": found.test_x, "label": found.test_y},
        target=Target("test_accuracy", "at least", accuracy),
    )


DECAY = 1e-3
# The minimum of the logistic problem's training loss, by SciPy in float64.
LOGISTIC_OPTIMUM = 0.26068042792


def logistic() -> Problem:
    """L2-regularized logistic regression on the bundled digits: convex, 650 parameters.

        f(W, b) = mean of −log softmax(Wᵀx + b)[label] + ½ λ ‖W‖²,   λ = 10⁻³

    The target is f ≤ 1.001 f*, where the minimum f* is known.

    >>> str(logistic().target)[:12]
    'train loss ≤'
    """

    def regularizer(params: Any) -> jax.Array:
        return 0.5 * DECAY * jnp.sum(jnp.square(params["outputs"]["kernel"]))

    train, test = _digits("train"), _digits("test")
    return arrays_problem(
        "logistic",
        lambda: MLP(widths=(), num_outputs=10),
        losses.softmax_cross_entropy,
        train,
        test,
        target=Target("train_loss", "at most", 1.001 * LOGISTIC_OPTIMUM),
        regularizer=regularizer,
        about={
            "data": "the 1,797 bundled handwritten digits (UCI / scikit-learn, CC BY 4.0)",
            "regularization": f"½ · {DECAY:g} · ‖W‖², part of the training loss",
            "smallest training loss": LOGISTIC_OPTIMUM,
        },
    )


@functools.cache
def _digits(split: str) -> dict[str, np.ndarray]:
    batch = next(iter(digits(split, batch_size=2048, epochs=1)))
    kept = np.asarray(batch["mask"]) > 0
    return {name: np.asarray(batch[name])[kept] for name in ("image", "label")}


# ------------------------------------------------------------------ deep autoencoders

# Squared error summed over pixels, mean over images.
CURVES_TARGET, MNIST_TARGET = 1.44, 3.0
CURVES_TRAIN, CURVES_TEST = 20_000, 10_000


def autoencoder_curves(
    *, examples: int = CURVES_TRAIN, validation: float = 0.1, target: float = CURVES_TARGET
) -> Problem:
    """The deep autoencoder 784-400-200-100-50-25-6 on CURVES, which is generated.

    Args:
      examples: the number of training images, ≤ 20,000.
      validation: the share of them on which settings are chosen.
      target: a training error, squared and summed over pixels.
    """
    images = curves(CURVES_TRAIN + CURVES_TEST)
    return autoencoder(
        "autoencoder-curves",
        (400, 200, 100, 50, 25, 6),
        images[: _at_most(examples, CURVES_TRAIN)],
        images[CURVES_TRAIN:],
        Target("train_squared_error", "at most", target),
        validation=validation,
        about={
            "data": "CURVES, generated from its description (jdl/compare/curves_dataset.py), not "
            "the papers' files: errors are of the same size as theirs, not equal to the digit"
        },
    )


def autoencoder_mnist(
    data: Paths | None,
    *,
    examples: int | None = None,
    validation: float = 0.1,
    target: float = MNIST_TARGET,
) -> Problem:
    """The deep autoencoder 784-1000-500-250-30 on MNIST.

    Args:
      data: as for `jdl.compare.mnist.read`.
      examples: the number of training images, the first ones; None for all.
      validation: the share of them on which settings are chosen.
      target: a training error, squared and summed over pixels.
    """
    found = mnist.read(data, "autoencoder-mnist")
    return autoencoder(
        "autoencoder-mnist",
        (1000, 500, 250, 30),
        found.x if examples is None else found.x[: _at_most(examples, len(found.x))],
        found.test_x,
        Target("train_squared_error", "at most", target),
        validation=validation,
    )


def autoencoder_faces(data: Paths | None) -> Problem:
    """The deep autoencoder 625-2000-1000-500-30 with linear outputs, on the faces of any tar.

    Images are scaled to 25×25 gray values in [0, 1]; without `train/` and `test/`, a tenth is the
    test data. The target is a quarter of the error of the mean face.
    """
    if data is None:
        raise check.DataError("autoencoder-faces needs images of faces: give a tar with --data.")
    halves = set(splits(data)) == {"train", "test"}
    parts = ("train", "test") if halves else ("train:0.1", "test:0.1")
    train, test = (mnist.images(data, split=part, size=(25, 25), label=None)[0] for part in parts)
    error = float(np.var(train / 255.0, axis=0).sum())
    return autoencoder(
        "autoencoder-faces",
        (2000, 1000, 500, 30),
        train,
        test,
        Target("train_squared_error", "at most", float(f"{error / 4:.3g}")),
        linear=True,
        about={"archives": [Path(str(data)).name], "error of the mean face": error},
    )


def autoencoder(
    name: str,
    widths: tuple[int, ...],
    train: np.ndarray,
    test: np.ndarray,
    target: Target,
    *,
    linear: bool = False,
    **fields: Any,
) -> Problem:
    """A deep autoencoder of sigmoids with a linear code and Martens' sparse initialization.

    Args:
      name: its label.
      widths: of the encoder; the decoder mirrors them.
      train: images uint8 [n, H, W, 1].
      test: likewise.
      target: what counts as solved.
      linear: whether outputs are real values with half the squared error as the loss, rather than
        probabilities of pixels with their cross entropy.
      **fields: as for `arrays_problem`.
    """
    net = Autoencoder(widths=widths, kernel_init=sparse_init(15))
    loss = losses.squared_error if linear else losses.sigmoid_cross_entropy

    @metrics.direction("min")
    def squared_error(outputs: jax.Array, batch: Batch) -> jax.Array:
        seen = outputs if linear else jax.nn.sigmoid(outputs)
        return metrics.sum_squared_error(seen, batch, target="image")

    return arrays_problem(
        name,
        lambda: net,
        functools.partial(loss, target="image"),
        {"image": train},
        {"image": test},
        target=target,
        metrics={"squared_error": squared_error},
        **fields,
    )


def _at_most(examples: int, there: int) -> int:
    check.positive_int("examples", examples)
    check.argument(examples <= there, "examples", f"at most {there:,}", examples)
    return examples


# ------------------------------------------------------------------ a long memory


def adding_rnn() -> Problem:
    """The adding problem over 50 steps and an LSTM of 64 units; target: test error ≤ 0.01.

    Always answering 1 has a mean squared error of 0.167.
    """
    x, y = adding(12_000, 50, np.random.default_rng(0))
    y = y.astype(np.float32)
    net = RNN(num_outputs=1, hidden=64)
    return arrays_problem(
        "adding-rnn",
        lambda: net,
        losses.squared_error,
        {"image": x[:10_000], "label": y[:10_000]},
        {"image": x[10_000:], "label": y[10_000:]},
        target=Target("test_squared_error", "at most", 0.01),
        metrics={"squared_error": metrics.sum_squared_error},
        about={"data": "generated: 50 pairs of number and mark; the sum of the two marked numbers"},
    )


# ------------------------------------------------------------------ for sanity


def quadratic(dimension: int = 100, condition: float = 1e4) -> Problem:
    """½ Σ λᵢ (xᵢ − 1)², eigenvalues λ from 1 down to 1 / condition; target: ≤ 10⁻⁶."""
    roots = np.geomspace(1.0, condition**-0.5, dimension).astype(np.float32)

    def init(key: Any, x: Any) -> Any:
        del x
        return {"x": jax.random.normal(key, (dimension,))}

    def residuals(params: Any, x: jax.Array) -> jax.Array:
        return x * (params["x"] - 1.0)[None]

    about = {"dimension": dimension, "condition": condition}
    return _residuals("quadratic", init, residuals, roots, about)


def noisy_quadratic(dimension: int = 100, examples: int = 8192, noise: float = 1e-3) -> Problem:
    """½ Σ hᵢ (xᵢ − 1 − aᵢ)², hᵢ = 1 / i, the mean over examples with random offsets a.

    Offsets have mean 0 and variance `noise` / hᵢ over the examples, so that the noise of a gradient
    has the variance `noise` · hᵢ and the smallest mean loss is ½ · dimension · noise. The target
    is 1.1 times that. What SGD reaches is known: `sgd_excess`.

    References:
      Zhang et al., Which algorithmic choices matter at which batch sizes? Insights from a noisy
      quadratic model, NeurIPS 2019.
    """
    roots = (np.arange(1, dimension + 1) ** -0.5).astype(np.float32)
    offsets = np.random.default_rng(0).normal(size=(examples, dimension))
    offsets = (offsets - offsets.mean(0)) / offsets.std(0) * noise**0.5
    least = 0.5 * dimension * noise

    def init(key: Any, x: Any) -> Any:
        del x
        return {"x": jax.random.normal(key, (dimension,))}

    return arrays_problem(
        "noisy-quadratic",
        lambda: from_fns(init, lambda params, x: x * (params["x"] - 1.0)[None]),
        losses.squared_error,
        {
            "image": np.broadcast_to(roots, offsets.shape),
            "label": offsets.astype(np.float32),
        },
        target=Target("train_loss", "at most", 1.1 * least),
        metrics={},
        about={"dimension": dimension, "noise": noise, "smallest training loss": least},
    )


def sgd_excess(
    start: np.ndarray, rate: float, batch_size: int, steps: int, noise: float = 1e-3
) -> float:
    """The expected loss of SGD on the noisy quadratic after some steps, above the smallest.

        E[eᵢ²] ← (1 − η hᵢ)² E[eᵢ²] + η² hᵢ · noise / B,  excess = ½ Σ hᵢ E[eᵢ²]

    for batches drawn with replacement, eᵢ = xᵢ − 1.

    Args:
      start: e at step 0, [d].
      rate: η.
      batch_size: B.
      steps: of SGD.
      noise: as for `noisy_quadratic`.

    >>> round(sgd_excess(np.ones(2), 1.0, 1, 10**4, noise=0.03), 4)  # ½ Σ η hᵢ noise / (2 − η hᵢ)
    0.02
    """
    h = 1.0 / np.arange(1, len(start) + 1)
    shrink, added = (1.0 - rate * h) ** 2, rate**2 * h * noise / batch_size
    power = shrink**steps
    square = power * start**2 + added * (1.0 - power) / (1.0 - shrink)
    return float(0.5 * (h * square).sum())


def rosenbrock() -> Problem:
    """½ [100 (y − x²)² + (1 − x)²] from near (−1.2, 1), the classic start; target: ≤ 10⁻⁶."""

    def init(key: Any, x: Any) -> Any:
        del x
        return {"x": jnp.array([-1.2, 1.0]) + 0.1 * jax.random.normal(key, (2,))}

    def residuals(params: Any, x: jax.Array) -> jax.Array:
        a, b = params["x"]
        return x * jnp.stack([10.0 * (b - a * a), 1.0 - a])[None]

    return _residuals("rosenbrock", init, residuals, np.ones(2, np.float32), {"dimension": 2})


def _residuals(
    name: str, init: Any, residuals: Any, scale: np.ndarray, about: dict[str, Any]
) -> Problem:
    """Least squares with one example; the model's outputs are the residuals."""
    return arrays_problem(
        name,
        lambda: from_fns(init, residuals),
        losses.squared_error,
        {"image": scale[None], "label": np.zeros((1, len(scale)), np.float32)},
        target=Target("train_loss", "at most", 1e-6),
        validation=0.0,
        metrics={},
        about=about,
    )


CATALOGUE = {
    "digits-cnn": Named(digits_cnn, "", "the bundled 8×8 digits, a small CNN"),
    "logistic": Named(logistic, "", "L2-regularized logistic regression on the bundled digits"),
    "mnist-mlp": Named(mnist_mlp, "MNIST", "MNIST, 784-500-300-10"),
    "mnist-cnn": Named(mnist_cnn, "MNIST", "MNIST, the classic CNN"),
    "autoencoder-curves": Named(
        autoencoder_curves, "", "784-400-200-100-50-25-6 on CURVES, generated"
    ),
    "autoencoder-mnist": Named(autoencoder_mnist, "MNIST", "784-1000-500-250-30 on MNIST"),
    "autoencoder-faces": Named(
        autoencoder_faces, "faces", "625-2000-1000-500-30 on any tar of faces"
    ),
    "adding-rnn": Named(adding_rnn, "", "the adding problem over 50 steps, an LSTM"),
    "gpt-bytes": Named(gpt_bytes, "", "a causal transformer on sums modulo 31, or a text", "text"),
    "lstm-bytes": Named(lstm_bytes, "", "an LSTM on a Markov chain, or a text", "text"),
    "vit-images": Named(vit_images, "", "a vision transformer on the digits, or a tar", "images"),
    "resnet-images": Named(resnet_images, "", "a ResNet on the digits, or a tar", "images"),
    "pinn-poisson": Named(pinn_poisson, "", "Poisson's equation solved by 2-32-32-1"),
    "pinn-burgers": Named(pinn_burgers, "", "Burgers' equation, a front, solved by 2-32-32-1"),
    "curve-fit": Named(curve_fit, "", "a sum of three exponentials, ill-conditioned"),
    "noisy-quadratic": Named(noisy_quadratic, "", "100 dimensions, known noise"),
    "quadratic": Named(quadratic, "", "100 dimensions, condition 10⁴"),
    "rosenbrock": Named(rosenbrock, "", "the banana-shaped valley"),
}
