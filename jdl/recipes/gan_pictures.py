"""Pictures of a GAN's samples: during training, at its end, interpolated, beside nearest images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jdl.core.types import Key
from jdl.data import Batches
from jdl.models.gan import GAN, walk
from jdl.models.scores import nearest
from jdl.recipes.pictures import kept, tiles
from jdl.train.estimator import Estimator
from jdl.train.hooks import Hook, StatefulHook
from jdl.train.writers import Row

COLUMNS = 12


def samples_over_time(gan: GAN, workdir: Path) -> StatefulHook:
    """A hook that draws samples of one fixed noise to `samples/` at steps that double."""

    def make(earlier: Sequence[Row]) -> Hook:
        due = 1

        def is_due(row: Row) -> bool:
            nonlocal due
            if row["split"] != "train" or row["step"] < due:
                return False
            due = 2 * row["step"]
            return True

        def hook(row: Any) -> None:
            if is_due(row):
                images = draw_from(gan, row.estimator, COLUMNS, jax.random.key(1))
                path = workdir / "samples" / f"{row['step']:08d}.png"
                tiles(images[None], path, f"samples of one noise after {row['step']:,} steps")

        for row in earlier:
            is_due(row)
        return hook

    return StatefulHook(make, "train")


def draw_samples(gan: GAN, estimator: Estimator, data: Batches, workdir: Path) -> list[Path]:
    """Writes `samples.png`, `samples_over_time.png`, `walk.png` and `nearest.png`.

    Of a GAN of classes each row of the first and the third has one.
    """
    label = _rows_of_classes(gan, 10)
    images = draw_from(gan, estimator, 10 * COLUMNS, jax.random.key(2), label)
    shape = images.shape[1:]
    title = "samples of the averaged generator"
    known = data.classes or ()
    names = [] if label is None else [known[i] for i in label[::COLUMNS]]
    rows = images.reshape(10, COLUMNS, *shape)
    written = [tiles(rows, workdir / "samples.png", title, rows=names)]
    moments = sorted((workdir / "samples").glob("*.png"))
    if moments:
        written.append(_stack(moments, workdir / "samples_over_time.png"))
    z = walk(jax.random.key(3), 8, COLUMNS, gan.latent)
    between = _sample(gan, estimator, z.reshape(-1, gan.latent), _rows_of_classes(gan, 8))
    title = "each row: the generator's images on the way from one noise to another"
    written.append(tiles(between.reshape(8, COLUMNS, *shape), workdir / "walk.png", title))
    table = np.concatenate([np.asarray(b["image"])[kept(b)] for b in data.once()])
    table = table / np.float32(255) if table.dtype == np.uint8 else table
    some = images[::10]
    found = nearest(some, table)
    pairs, title = np.stack([some, table[found.place]]), "samples beside what they were trained on"
    written.append(tiles(pairs, workdir / "nearest.png", title, rows=("sample", "nearest image")))
    return written


def _rows_of_classes(gan: GAN, rows: int) -> np.ndarray | None:
    """Labels of rows of samples, the classes in turn; None for a GAN without classes."""
    classes = gan.generator.num_classes
    return np.repeat(np.arange(rows) % classes, COLUMNS) if classes else None


def draw_from(
    gan: GAN,
    estimator: Estimator,
    count: int,
    key: Key,
    label: ArrayLike | None = None,
    temperature: float = 1.0,
) -> np.ndarray:
    """Samples of the averaged generator, float32[count, H, W, C]; by default classes in turn."""
    classes = gan.generator.num_classes
    if classes and label is None:
        label = np.arange(count) % classes
    z = temperature * jax.random.normal(key, (count, gan.latent))
    return _sample(gan, estimator, z, label)


def _sample(gan: GAN, estimator: Estimator, z: jax.Array, label: Any) -> np.ndarray:
    params, state = estimator.evaluation_params, estimator.model_state
    return np.asarray(gan.sample(params, state, z, None if label is None else jnp.asarray(label)))


def _stack(paths: list[Path], to: Path) -> Path:
    """The pictures below each other."""
    from PIL import Image

    pictures = []
    for path in paths:
        with Image.open(path) as file:
            pictures.append(file.convert("RGB"))
    size = (max(p.width for p in pictures), sum(p.height for p in pictures))
    whole, y = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height
    whole.save(to)
    return to
