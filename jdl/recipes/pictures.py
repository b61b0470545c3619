"""Pictures drawn at the end of a run: filters, reconstructions, Gibbs chains, codes."""

import math
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


def tiles(
    images: ArrayLike | Sequence[ArrayLike],
    path: Path,
    title: str,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Path:
    """Writes images [R, K, H, W, C] in [0, 1] as a PNG of R rows and K columns, with their names.

    Small images are enlarged by a whole factor, to a side of 96 pixels or more where there is room.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = np.asarray(images, np.float32)
    down, across, height, width, channels = images.shape
    room = LARGEST_SIDE // max(down * height, across * width)
    by = max(1, min(-(-96 // max(height, width)), room))
    pixels = np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*images.shape[:4], 3)) if channels == 1 else pixels
    pixels = pixels.repeat(by, axis=2).repeat(by, axis=3)
    font = ImageFont.load_default(15)
    left = max((math.ceil(font.getlength(name)) + 12 for name in rows), default=0)
    top, cell = 28 + 20 * bool(columns), np.array([height * by + 2, width * by + 2])
    widest = max(left + across * cell[1], math.ceil(font.getlength(title)) + 12)
    sheet = Image.new("RGB", (int(widest), int(top + down * cell[0])), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 14), title, fill="black", anchor="lm", font=font)
    for i, name in enumerate(rows):
        pen.text((4, top + (i + 0.5) * cell[0]), name, fill="black", anchor="lm", font=font)
    for j, name in enumerate(columns):
        at = (left + (j + 0.5) * cell[1], top - 10)
        pen.text(at, name, fill="black", anchor="mm", font=font)
    for i, j in np.ndindex(down, across):
        place = (int(left + j * cell[1]), int(top + i * cell[0]))
        sheet.paste(Image.fromarray(pixels[i, j]), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def filters(kernel: ArrayLike, shape: tuple[int, ...], path: Path) -> Path:
    """Draws the weights [V, H] of the 100 units of largest norm as images."""
    kernel = np.asarray(kernel, np.float32)
    kernel = kernel[:, np.argsort(-np.linalg.norm(kernel, axis=0))[:100]]
    scale = np.abs(kernel).max(axis=0) + 1e-12
    images = (0.5 + 0.5 * kernel / scale).T.reshape(-1, *shape)
    columns = min(10, len(images))
    images = images[: len(images) // columns * columns]
    title = f"weights of the {len(images)} units of largest norm, each to its own scale: gray is 0"
    return tiles(images.reshape(-1, columns, *shape), path, title)


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
    counts = (1, 10, 100, 300, 1000)
    for before, steps in zip((0, *counts), counts, strict=False):
        key = jax.random.fold_in(jax.random.key(0), steps)
        v = rbm.sample(params, key, v, steps - before)
        chains.append(np.asarray(rbm.mean_field(params, v, 1)).reshape(x.shape))
    after = ["image", *(f"{steps:,} step{'s' * (steps > 1)}" for steps in counts)]
    return [
        filters(params["kernel"], x.shape[1:], workdir / "filters.png"),
        tiles(
            rows,
            workdir / "reconstructions.png",
            "held-out images, and their means after one step to the hidden units and back",
            rows=("image", "reconstruction"),
        ),
        tiles(
            chains,
            workdir / "chains.png",
            "Gibbs chains that start from held-out images: means after some steps",
            rows=after,
        ),
    ]


def reconstructions(estimator: Estimator, data: Batches, workdir: Path) -> Path:
    """Draws an autoencoder's inputs, its corrupted inputs if there are any, and its outputs."""
    x, _ = some_images(data, 12)
    outputs, _ = estimator.model.apply(
        estimator.evaluation_params, estimator.model_state, jnp.asarray(x)
    )
    found = as_reconstruction(outputs)
    shown = {"image": x, "corrupted": found.corrupted, "output": jax.nn.sigmoid(found.outputs)}
    shown = {name: np.asarray(row) for name, row in shown.items() if row is not None}
    path, title = (
        workdir / "reconstructions.png",
        "held-out images, and what the network makes of them",
    )
    return tiles(list(shown.values()), path, title, rows=list(shown))


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
