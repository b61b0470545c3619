r"""Scores of a generator's samples: distance of feature distributions, modes, memorization.

The Fréchet distance compares Gaussians fitted to a net's features of two sets of images,

    d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½)

Published FIDs use the features of an Inception net trained on ImageNet. Here the features are those
of a CNN trained on your own classes: the distances compare with each other under the same CNN, not
with published ones. `calibration` gives their scale.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.models.cnn import CNN


class Features(NamedTuple):
    """A CNN's features and predictions of images."""

    features: np.ndarray  # the dense layer's activations, float[n, units]
    classes: np.ndarray  # the most likely class of each, int[n]


def features(cnn: CNN, params: Any, images: Any, batch_size: int = 500) -> Features:
    """The features and predictions of a trained CNN.

    The features are the inputs of the logits: the last dense layer's activations.

    Args:
      cnn: a classifier of the images.
      params: its parameters.
      images: [n, H, W, C]: floats in [0, 1], or uint8, which is scaled to it.
      batch_size: images at a time.

    >>> eye, images = CNN(units=6), jnp.zeros((3, 8, 8, 1))
    >>> params = eye.init(jax.random.key(0), images)["params"]
    >>> features(eye, params, images).features.shape
    (3, 6)
    """
    check.argument(len(images) > 0, "images", "at least one image", len(images))

    @jax.jit
    def see(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept = lambda module, _: module.name == "Dropout_0"  # noqa: E731
        logits, caught = cnn.apply(
            {"params": params}, images, capture_intermediates=kept, mutable=["intermediates"]
        )
        return caught["intermediates"]["Dropout_0"]["__call__"][0], jnp.argmax(logits, axis=1)

    found = []
    for at in range(0, len(images), batch_size):
        piece = _pixels("images", images[at : at + batch_size])
        check.values("images", piece, -0.01, 1.01, "in [0, 1], or uint8")
        found.append(jax.device_get(see(params, piece)))
    return Features(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _pixels(name: str, images: Any) -> np.ndarray:
    """Images as finite float32; uint8 is scaled to [0, 1]."""
    found = _finite(name, images).astype(np.float32)
    return found / np.float32(255) if getattr(images, "dtype", None) == np.uint8 else found


def _finite(name: str, x: Any) -> np.ndarray:
    try:
        found = np.asarray(x)
        ok = bool(np.isfinite(found).all())
    except (TypeError, ValueError) as error:  # text, or rows of several lengths
        raise check.ArgumentError(f"`{name}` must be an array of numbers: {error}") from error
    check.argument(ok, name, "of finite numbers", f"{found.dtype}{[*found.shape]} with others")
    return found


def frechet_distance(a: Any, b: Any) -> float:
    """d² between Gaussians fitted to two sets of features.

    Args:
      a: [n, F], n ≥ 2.
      b: [m, F], m ≥ 2.

    >>> x = np.random.default_rng(0).normal(size=(1000, 3))
    >>> round(frechet_distance(x, x + np.array([3.0, 0.0, 4.0])), 6)
    25.0

    References:
      Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash
      equilibrium, NeurIPS 2017; Dowson and Landau, The Fréchet distance between multivariate normal
      distributions, Journal of Multivariate Analysis 12, 1982.
    """
    a, b = (_finite(name, x).astype(np.float64) for name, x in (("a", a), ("b", b)))
    for name, x in (("a", a), ("b", b)):
        check.argument(x.ndim == 2 and len(x) >= 2, name, "of shape [n, F], n ≥ 2", x.shape)
    check.argument(a.shape[1] == b.shape[1], "b", f"of {a.shape[1]} features", b.shape)
    one, other = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ other @ root)
    shared = np.sum(np.sqrt(np.maximum(cross, 0.0)))
    apart = np.sum(np.square(a.mean(0) - b.mean(0)))
    return float(max(apart + np.trace(one) + np.trace(other) - 2.0 * shared, 0.0))


class Calibration(NamedTuple):
    """The Fréchet distance on images with known faults."""

    floor: float  # between two sets of real images
    missing_class: float  # of real images without the first class
    noise: float  # of uniform noise


def calibration(cnn: CNN, params: Any, images: Any, others: Any, seed: int = 0) -> Calibration:
    """The scale of distances to a set of images, from sets known to be near or far.

    Args:
      cnn: a classifier of the images.
      params: its parameters.
      images: the set to which distances are measured, as for `features`.
      others: real images that are not in it.
      seed: for the noise.
    """
    true, second = features(cnn, params, images), features(cnn, params, others)
    noise = np.random.default_rng(seed).uniform(size=np.shape(others)).astype(np.float32)
    return Calibration(
        frechet_distance(true.features, second.features),
        frechet_distance(true.features, second.features[second.classes != second.classes.min()]),
        frechet_distance(true.features, features(cnn, params, noise).features),
    )


class Coverage(NamedTuple):
    """The distribution of samples over classes."""

    shares: np.ndarray  # the share of each class, float[K], with sum 1
    modes: int  # the number of classes with at least a fifth of an equal share
    # Σ p log(p · K), from equal shares, in nats; 0 is best, log K is total collapse
    divergence: float


def mode_coverage(classes: Any, num_classes: int) -> Coverage:
    """How evenly samples are distributed over classes.

    Args:
      classes: int[n] in [0, num_classes).
      num_classes: K.

    >>> mode_coverage(np.array([0, 0, 1, 1]), 4).modes
    2
    """
    classes = _finite("classes", classes)
    check.argument(classes.size > 0, "classes", "of at least one sample", classes.shape)
    strays = classes[(classes < 0) | (classes >= num_classes)]
    ok = classes.ndim == 1 and classes.dtype.kind in "iu" and not strays.size
    got = (strays if strays.size else classes).ravel()[:1].tolist()
    check.argument(ok, "classes", f"int[n] in [0, {num_classes})", got)
    shares = np.bincount(classes, minlength=num_classes) / len(classes)
    there = shares[shares > 0]
    divergence = float(np.sum(there * np.log(there * num_classes)))
    return Coverage(shares, int(np.sum(shares >= 0.2 / num_classes)), max(divergence, 0.0))


class Nearest(NamedTuple):
    """The nearest image of each sample."""

    place: np.ndarray  # its index, int[n]
    distance: np.ndarray  # Euclidean, over all pixels, float[n]


def nearest(samples: Any, images: Any, batch_size: int = 100) -> Nearest:
    """The image of `images` [m, …] nearest to each of `samples` [n, …].

    The samples of a generator that memorizes are much nearer to its training images than other real
    images are: compare the median distance with that of a test set.

    Args:
      samples: of any shape each; uint8 is scaled to [0, 1].
      images: of the same shape each, likewise.
      batch_size: samples at a time.

    >>> nearest(np.array([[0.9]]), np.array([[0.0], [1.0]])).place.tolist()
    [1]
    """
    samples, images = _pixels("samples", samples), _pixels("images", images)
    check.argument(len(images) > 0, "images", "at least one image", len(images))
    ok = images.shape[1:] == samples.shape[1:]
    check.argument(ok, "samples", "of the images' shape", samples.shape)
    table, flat = images.reshape(len(images), -1), samples.reshape(len(samples), -1)
    norms = np.square(table).sum(1)
    index = np.empty(len(flat), np.int64)
    for at in range(0, len(flat), batch_size):
        part = flat[at : at + batch_size]
        index[at : at + batch_size] = np.argmin(norms[None] - 2.0 * part @ table.T, axis=1)
    return Nearest(index, np.linalg.norm(flat - table[index], axis=1))
