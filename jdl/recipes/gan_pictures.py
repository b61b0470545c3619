"""Pictures of a GAN's samples: during training, at its end, interpolated, beside nearest images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
                images = draw_from(gan, row.estimator, COLUMNS, seed=1)
                path = workdir / "samples" / f"{row['step']:08d}.png"
                tiles(images[None], path, f"samples of one noise after {row['step']:,} steps")

        for row in earlier:
            is_due(row)
        return hook

    return StatefulHook(make, "train")


def draw_samples(gan: GAN, estimator: Estimator, data: Batches, workdir: Path) -> list[Path]:
    """Writes `samples.png`, `samples_over_time.png`, `walk.png` and `nearest.png`."""
    images = draw_from(gan, estimator, 10 * COLUMNS, seed=2)
    shape = images.shape[1:]
    title = "samples of the averaged generator"
    written = [tiles(images.reshape(10, COLUMNS, *shape), workdir / "samples.png", title)]
    moments = sorted((workdir / "samples").glob("*.png"))
    if moments:
        written.append(_stack(moments, workdir / "samples_over_time.png"))
    z = walk(jax.random.key(3), 8, COLUMNS, gan.latent)
    between = _sample(gan, estimator, z.reshape(-1, gan.latent))
    title = "each row: the generator's images on the way from one noise to another"
    written.append(tiles(between.reshape(8, COLUMNS, *shape), workdir / "walk.png", title))
    table = np.concatenate([np.asarray(b["image"])[kept(b)] for b in data.once()])
    table = table / np.float32(255) if table.dtype == np.uint8 else table
    some = images[:COLUMNS]
    found = nearest(some, table)
    pairs, title = np.stack([some, table[found.place]]), "samples beside what they were trained on"
    rows = ("sample", "nearest image")
    written.append(tiles(pairs, workdir / "nearest.png", title, rows=rows))
    return written


def draw_from(gan: GAN, estimator: Estimator, count: int, seed: int) -> np.ndarray:
    """Samples of the averaged generator, float32[count, H, W, C]."""
    return _sample(gan, estimator, jax.random.normal(jax.random.key(seed), (count, gan.latent)))


def _sample(gan: GAN, estimator: Estimator, z: jax.Array) -> np.ndarray:
    return np.asarray(gan.sample(estimator.evaluation_params, estimator.model_state, z))


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
