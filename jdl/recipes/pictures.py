"""Pictures drawn at the end of a run: filters, reconstructions, Gibbs chains, codes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jdl.core.types import Batch, Params
from jdl.data import Batches
from jdl.models.autoencoder import as_reconstruction
from jdl.models.rbm import RBM
from jdl.train.estimator import Estimator

LARGEST_SIDE = 2000  # pixels of a picture


def tiles(images: ArrayLike | Sequence[ArrayLike], path: Path) -> Path:
    """Writes images [R, K, H, W, C] in [0, 1] as one PNG of R rows and K columns.

    Small images are enlarged by a whole factor; a white line separates neighbours.
    """
    from PIL import Image

    images = np.asarray(images, np.float32)
    rows, columns, height, width, channels = images.shape
    by = max(1, min(64 // max(height, width), LARGEST_SIDE // max(rows * height, columns * width)))
    images = images.repeat(by, axis=2).repeat(by, axis=3)
    around = [(0, 0), (0, 0), (0, 2), (0, 2), (0, 0)]
    images = np.pad(images, around, constant_values=1.0)
    whole = images.transpose(0, 2, 1, 3, 4).reshape(rows * (height * by + 2), -1, channels)
    pixels = np.rint(np.clip(np.nan_to_num(whole), 0, 1) * 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return path


def filters(kernel: ArrayLike, shape: tuple[int, ...], path: Path) -> Path:
    """Draws the weights [V, H] of the 100 units of largest norm as images; gray is zero."""
    kernel = np.asarray(kernel, np.float32)
    kernel = kernel[:, np.argsort(-np.linalg.norm(kernel, axis=0))[:100]]
    scale = np.abs(kernel).max(axis=0) + 1e-12
    images = (0.5 + 0.5 * kernel / scale).T.reshape(-1, *shape)
    columns = min(10, len(images))
    images = images[: len(images) // columns * columns]
    return tiles(images.reshape(-1, columns, *shape), path)


def some_images(data: Batches, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced among the first 2,000: images, float32 in [0, 1], and their labels or 0."""
    images, labels, number = [], [], 0
    for batch in data.once():
        images.append(np.asarray(batch["image"])[kept(batch)])
        label = batch.get("label", np.zeros(len(batch["image"]), np.int32))
        labels.append(np.asarray(label)[kept(batch)])
        number += len(images[-1])
        if number >= 2000:
            break
    number = min(number, 2000)  # whatever the batch size
    chosen = np.linspace(0, number, min(count, number), endpoint=False).astype(int)
    x = np.concatenate(images)[chosen]
    x = x.astype(np.float32) / 255 if x.dtype == np.uint8 else x
    return x, np.concatenate(labels)[chosen]


def kept(batch: Batch) -> np.ndarray | slice:
    """The rows of a batch that count."""
    return np.asarray(batch["mask"]) > 0 if "mask" in batch else slice(None)


def of_rbm(rbm: RBM, params: Params, data: Batches, workdir: Path) -> list[Path]:
    """Filters, mean-field reconstructions, and Gibbs chains that start from images."""
    x, _ = some_images(data, 12)
    v = rbm.joined(x)
    rows = [x, np.asarray(rbm.mean_field(params, v, 1)).reshape(x.shape)]
    chains = [x]
    for i, steps in enumerate((1, 10, 100, 300, 1000)):
        v = rbm.sample(params, jax.random.fold_in(jax.random.key(0), i), v, steps)
        chains.append(np.asarray(rbm.mean_field(params, v, 1)).reshape(x.shape))
    return [
        filters(params["kernel"], x.shape[1:], workdir / "filters.png"),
        tiles(rows, workdir / "reconstructions.png"),
        tiles(chains, workdir / "chains.png"),
    ]


def reconstructions(estimator: Estimator, data: Batches, workdir: Path) -> Path:
    """Draws an autoencoder's inputs, its corrupted inputs if there are any, and its outputs."""
    x, _ = some_images(data, 12)
    outputs, _ = estimator.model.apply(
        estimator.evaluation_params, estimator.model_state, jnp.asarray(x)
    )
    found = as_reconstruction(outputs)
    corrupted = [] if found.corrupted is None else [found.corrupted]
    rows = [x, *corrupted, jax.nn.sigmoid(found.outputs)]
    return tiles([np.asarray(row) for row in rows], workdir / "reconstructions.png")


def codes(encode: Callable[[np.ndarray], ArrayLike], data: Batches, path: Path) -> Path:
    """Draws the codes [N, F] of up to 1,000 images on their two principal axes, by class."""
    from matplotlib.figure import Figure

    x, labels = some_images(data, 1000)
    code = np.asarray(encode(x), np.float64)
    code -= code.mean(0)
    points = code @ np.linalg.svd(code, full_matrices=False)[2][:2].T
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    names = data.classes or ()
    for label in np.unique(labels):
        own = points[labels == label]
        name, color = names[label] if label < len(names) else str(label), f"C{label % 10}"
        axes.plot(own[:, 0], own[:, -1], ".", markersize=4, label=name, color=color)
    axes.set_title("codes on their two principal axes", loc="left", fontsize=11)
    if 1 < len(np.unique(labels)) <= 12:
        axes.legend(markerscale=2.5, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    return path
