"""Painting with a trained style network: any size, any mixture of its styles.

A picture larger than a tile is painted tile by tile in constant memory. Means and variances of the
whole picture are those of a reduced copy (Chen et al. 2022, thumbnail instance normalization).
Tiles overlap, and only outputs that do not depend on pixels outside their tile are kept, so that
there are no seams.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.recipes.style_config import StyleConfig
from jdl.vision import style_training
from jdl.vision.images import as_image, resized
from jdl.vision.painter_net import STRIDE, StyleNet
from jdl.vision.style import mixed

TILE = 1024
SMALLEST = 2 * STRIDE  # pixels, for the network's reflected edges

_KIND = "style network"


class Painter(NamedTuple):
    """A style network with its parameters."""

    # `apply(params, images, mixture, statistics) -> (paintings, statistics)`, as `StyleNet`
    apply: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    params: Any  # its first argument
    styles: tuple[str, ...]  # names of the S styles
    reach: int  # largest distance in pixels at which an output depends on an input
    statistics_size: int  # the size of a picture's statistics

    def __call__(
        self,
        picture: ArrayLike,
        shares: Mapping[str, float | int] | None = None,
        *,
        tile: int = TILE,
    ) -> np.ndarray:
        """The painting, float32 [H, W, 3] in [0, 1], of a picture that `as_image` takes.

        It has these shares of styles, by default the first alone; at most `tile` × `tile` pixels
        are painted at once.

        Raises:
          ArgumentError: for an unknown style, with the nearest name, or a tile that is too small.
        """
        least = 4 * self.margin
        ok = isinstance(tile, int) and tile % STRIDE == 0 and tile >= least
        check.argument(ok, "tile", f"a multiple of {STRIDE}, at least {least}", tile)
        mixture = np.asarray(self.mixture(shares))
        picture = as_image(picture, "picture")
        height, width = picture.shape[:2]
        whole = padded(picture)
        if max(whole.shape[:2]) <= tile:
            return self._paint(whole, mixture)[0][:height, :width]
        by = tile / max(whole.shape[:2])
        small = resized(picture, (max(int(height * by), 1), max(int(width * by), 1)))
        statistics = self._paint(padded(np.clip(small, 0.0, 1.0)), mixture)[1]
        painting = np.empty_like(whole)
        for rows, kept_rows in spans(whole.shape[0], tile, self.margin):
            for columns, kept_columns in spans(whole.shape[1], tile, self.margin):
                part = self._paint(whole[rows, columns], mixture, statistics)[0]
                inside = tuple(
                    slice(kept.start - at.start, kept.stop - at.start)
                    for kept, at in ((kept_rows, rows), (kept_columns, columns))
                )
                painting[kept_rows, kept_columns] = part[inside]
        return painting[:height, :width]

    @property
    def margin(self) -> int:
        """`reach` rounded up to whole coarse pixels."""
        return -(-self.reach // STRIDE) * STRIDE

    def mixture(self, shares: Mapping[str, float | int] | None) -> jax.Array:
        """Shares by name as [1, S] with sum 1."""
        shares = {self.styles[0]: 1.0} if shares is None else shares
        for name in shares:
            check.one_of("style", name, self.styles)
        return mixed([shares.get(name, 0.0) for name in self.styles], len(self.styles))

    def export(self, path: str | Path) -> Path:
        """Writes function and parameters, for any size, to one file that `load_painter` reads."""
        from jdl.train import export

        def predict(params: Any, state: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
            inputs = (batch[name] for name in ("image", "mixture", "statistics"))
            return dict(zip(("image", "statistics"), self.apply(params, *inputs), strict=True))

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.float32)

        inputs = {
            "image": zeros(1, SMALLEST, SMALLEST, 3),
            "mixture": zeros(1, len(self.styles)),
            "statistics": zeros(1, self.statistics_size),
        }
        return export.save(
            path,
            predict,
            jax.device_get(self.params),
            {},
            inputs,
            shapes={"image": f"b, {STRIDE}*h, {STRIDE}*w, 3"},
            constraints=("h >= 2", "w >= 2"),
            notes={"kind": _KIND, "styles": list(self.styles), "reach": self.reach},
        )

    def _paint(
        self, image: np.ndarray, mixture: np.ndarray, statistics: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The painting and its statistics, which are the picture's own unless given."""
        if statistics is None:
            statistics = np.full((1, self.statistics_size), np.nan, np.float32)
        found = jax.device_get(self.apply(self.params, image[None], mixture, statistics))
        return found[0][0], found[1]


def of_net(net: StyleNet, params: Any, styles: tuple[str, ...]) -> Painter:
    """The painter of a network and its parameters."""
    check.argument(len(styles) == net.styles, "styles", f"{net.styles} names", styles)

    @jax.jit
    def apply(params: Any, images: Any, mixture: Any, statistics: Any) -> tuple[Any, Any]:
        return net.apply({"params": params}, images, mixture, statistics)

    return Painter(apply, params, styles, net.reach, net.statistics_size)


def load_painter(path: str | Path) -> Painter:
    """The painter of a run directory of `jdl style train`, or of an exported file.

    Args:
      path: the directory or the file.

    Raises:
      UserError: if it is neither.
    """
    from jdl.train import export

    path = Path(path)
    if path.is_dir():
        config = StyleConfig.load(path)
        net, params = style_training.build_net(config), style_training.trained_params(config, path)
        return of_net(net, params, config.styles)
    predict = export.load_exported(path)
    notes = predict.notes
    if notes.get("kind") != _KIND or "statistics" not in predict.inputs:
        raise check.DataError(f"{str(path)!r} is an exported function, but not a style network.")

    def apply(params: Any, images: Any, mixture: Any, statistics: Any) -> tuple[Any, Any]:
        out = predict({"image": images, "mixture": mixture, "statistics": statistics})
        return out["image"], out["statistics"]

    size = predict.inputs["statistics"][0][1]
    return Painter(apply, None, tuple(notes["styles"]), int(notes["reach"]), int(size))


def padded(picture: np.ndarray) -> np.ndarray:
    """[H, W, 3] with its lower and right edges repeated up to a size that the network accepts.

    >>> padded(np.zeros((5, 13, 3))).shape
    (8, 16, 3)
    """
    around = [(0, max(-(-n // STRIDE) * STRIDE, SMALLEST) - n) for n in picture.shape[:2]]
    return np.pad(picture, [*around, (0, 0)], mode="edge")


def spans(size: int, tile: int, margin: int) -> Iterator[tuple[slice, slice]]:
    """Positions of the tiles along one side, and the part kept of each.

    >>> [(s.start, s.stop, k.start, k.stop) for s, k in spans(20, 12, 2)]
    [(0, 12, 0, 10), (8, 20, 10, 20)]
    """
    if size <= tile:
        yield slice(0, size), slice(0, size)
        return
    done = 0
    while done < size:
        start = min(max(done - margin, 0), size - tile)
        end = size if start + tile == size else start + tile - margin
        yield slice(start, start + tile), slice(done, end)
        done = end
