"""Pictures that a run ends with: filters, reconstructions, Gibbs chains, codes."""

from pathlib import Path
from typing import Any

import numpy as np

LARGEST_SIDE = 2000  # pixels of a picture


def tiles(images: Any, path: Path) -> Path:
    """Writes rows and columns of images [R, K, H, W, C], values in [0, 1], as one PNG.

    Small images are enlarged by a whole factor, and parted by a line.
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


def filters(kernel: Any, shape: tuple[int, ...], path: Path, *, most: int = 100) -> Path:
    """Draws what the first units look at, of a kernel [V, H] over images of `shape`.

    The units of the largest norm; gray is zero, each scaled to its own range.
    """
    kernel = np.asarray(kernel, np.float32)
    kernel = kernel[:, np.argsort(-np.linalg.norm(kernel, axis=0))[:most]]
    scale = np.abs(kernel).max(axis=0) + 1e-12
    images = (0.5 + 0.5 * kernel / scale).T.reshape(-1, *shape)
    columns = min(10, len(images))
    images = images[: len(images) // columns * columns]
    return tiles(images.reshape(-1, columns, *shape), path)


def some_images(data: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, float32 in [0, 1], and labels, evenly out of a data set's first 2,000."""
    images, labels, number = [], [], 0
    for batch in data.once():
        kept = np.asarray(batch.get("mask", np.ones(len(batch["image"])))) > 0
        images.append(np.asarray(batch["image"])[kept])
        labels.append(np.asarray(batch["label"])[kept])
        number += len(images[-1])
        if number >= 2000:
            break
    chosen = np.linspace(0, number, min(count, number), endpoint=False).astype(int)
    x = np.concatenate(images)[chosen]
    x = x.astype(np.float32) / 255 if x.dtype == np.uint8 else x
    return x, np.concatenate(labels)[chosen]


def of_rbm(rbm: Any, estimator: Any, data: Any, workdir: Path) -> list[Path]:
    """Filters, mean-field reconstructions, and Gibbs chains that start from images."""
    import jax

    x, _ = some_images(data, 12)
    params, shape = estimator.params, x.shape[1:]
    v = rbm.joined(x)
    rows = [x, np.asarray(rbm.mean_field(params, v, 1)).reshape(x.shape)]
    chains: list[np.ndarray] = [x]
    now = v
    for i, steps in enumerate((1, 10, 100, 300, 1000)):
        now = rbm.sample(params, jax.random.fold_in(jax.random.key(0), i), now, steps)
        hidden = rbm.hidden_mean(rbm.hidden_input(params, now))
        means = rbm.visible_mean(rbm.visible_input(params, hidden))
        chains.append(np.asarray(means).reshape(x.shape))
    return [
        filters(params["kernel"], shape, workdir / "filters.png"),
        tiles(rows, workdir / "reconstructions.png"),
        tiles(chains, workdir / "chains.png"),
    ]


def of_autoencoder(estimator: Any, data: Any, workdir: Path) -> list[Path]:
    """Images, what a denoiser is given, and what comes out; a map of the codes by class."""
    import jax
    import jax.numpy as jnp

    from jdl.models.autoencoder import Reconstruction

    x, _ = some_images(data, 12)
    outputs, _ = estimator.model.apply(estimator.params, estimator.model_state, jnp.asarray(x))
    rows: list[Any] = [x]
    if isinstance(outputs, Reconstruction):
        if outputs.corrupted is not None:
            rows.append(outputs.corrupted)
        outputs = outputs.outputs
    rows.append(np.asarray(jax.nn.sigmoid(outputs)))
    return [tiles(rows, workdir / "reconstructions.png")]


def codes(encode: Any, data: Any, workdir: Path, classes: tuple[str, ...] = ()) -> Path:
    """Draws codes [N, F] of up to 1,000 images on their two principal axes, coloured by class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, labels = some_images(data, 1000)
    code = np.asarray(encode(x), np.float64)
    code -= code.mean(0)
    axes_of = np.linalg.svd(code, full_matrices=False)[2][:2]
    points = code @ axes_of.T
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label in np.unique(labels):
        named = classes[label] if label < len(classes) else str(label)
        own = points[labels == label]
        axes.plot(own[:, 0], own[:, -1], ".", markersize=4, label=named, color=f"C{label % 10}")
    axes.set_title("codes on their two principal axes", loc="left", fontsize=11)
    if len(np.unique(labels)) <= 12:
        axes.legend(markerscale=2.5, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path = workdir / "codes.png"
    figure.savefig(path, dpi=130)
    return path
