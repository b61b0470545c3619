"""Pictures drawn at the end of a run: filters, reconstructions, Gibbs chains, codes."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.core.types import Batch, Params
from jdl.data import Batches
from jdl.models.autoencoder import as_reconstruction
from jdl.models.rbm import RBM
from jdl.train.estimator import Estimator

LARGEST_SIDE = 16384  # pixels of a sheet
_GAP = 4  # pixels between pictures on a sheet


def eight_bits(image: ArrayLike) -> np.ndarray:
    """Values in [0, 1] as uint8, clipped; raises unless they are finite."""
    array = np.asarray(image, np.float32)
    if not np.isfinite(array).all():
        raise check.TrainingError("The picture has values that are not finite; nothing is written.")
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def sheet(
    images: Sequence[ArrayLike],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    side: int | None = None,
    title: str = "",
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> np.ndarray:
    """Pictures [H, W, 3] or [H, W, 1] in [0, 1] on one sheet, in rows, with captions below them.

    Each is scaled to the size of the first, or to a longer side of `side` pixels; by default a
    small first is enlarged by a whole factor, to a side of 96 pixels or more. By default there are
    as many columns as make the sheet about square and its last row nearly full.

    >>> sheet([np.zeros((100, 120, 3))] * 5, columns=3).shape
    (204, 368, 3)
    """
    from PIL import Image, ImageDraw, ImageFont

    number = len(images)
    check.argument(number > 0, "images", "at least one", 0)
    ok = captions is None or len(captions) == number
    check.argument(ok, "captions", f"{number} of them", captions)
    height, width = np.asarray(images[0]).shape[:2]
    longer = max(height, width)
    by = side / longer if side is not None else -(-96 // longer)
    height, width = max(1, round(height * by)), max(1, round(width * by))
    below = 0 if captions is None else max(14, width // 14)
    if columns is None:
        square = math.sqrt(number * (height + below) / width)
        cost = lambda n: abs(math.log(n / square)) + (-number % n) / number  # noqa: E731
        columns = min(range(1, number + 1), key=cost)
    columns = min(check.positive_int("columns", columns), number)
    font = ImageFont.load_default(15)
    left = max((math.ceil(font.getlength(name)) + 12 for name in row_names), default=0)
    top = 28 * bool(title) + 20 * bool(column_names)
    down, across = height + below + _GAP, width + _GAP  # from one picture to the next
    wide = max(left + columns * across - _GAP, math.ceil(font.getlength(title)) + 8 * bool(title))
    total = (top + -(-number // columns) * down - _GAP, wide)
    check.argument(max(total) <= LARGEST_SIDE, "images", "fewer or smaller", total)
    canvas = Image.new("RGB", total[::-1], "white")
    pen, small = ImageDraw.Draw(canvas), ImageFont.load_default(max(10, 0.8 * below))

    def text(x: Any, y: Any, words: str, anchor: str = "mm", font: Any = font) -> None:
        pen.text((x, y), words, fill="black", anchor=anchor, font=font)

    text(4, 14, title, "lm")
    for i, name in enumerate(row_names):
        text(4, top + i * down + height / 2, name, "lm")
    for i, name in enumerate(column_names):
        text(left + i * across + width / 2, top - 10, name)
    for i, image in enumerate(images):
        y, x = top + i // columns * down, left + i % columns * across
        pixels = eight_bits(image)
        tile = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        enlarged = tile.width < width and tile.height < height
        how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        canvas.paste(tile.resize((width, height), how), (x, y))
        if captions is not None:
            text(x + width // 2, y + height + below // 2, captions[i], font=small)
    return np.asarray(canvas).astype(np.float32) / 255


def tiles(
    images: ArrayLike | Sequence[ArrayLike],
    path: Path,
    title: str,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Path:
    """Writes images [R, K, H, W, C] in [0, 1] as a PNG of R rows and K columns."""
    from PIL import Image

    images = np.nan_to_num(np.asarray(images, np.float32))
    across, one = images.shape[1], images.shape[2:]
    names: Any = {"title": title, "row_names": rows, "column_names": columns}
    found = sheet(list(images.reshape(-1, *one)), columns=across, **names)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(eight_bits(found)).save(path)
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
