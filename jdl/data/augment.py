"""Random crops, flips and user functions of images: a function of (seed, epoch, record) alone."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jdl.core import check
from jdl.data.images import CENTER, Crop
from jdl.data.order import key, mix

Augment: TypeAlias = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_DRAWS = 4  # numbers drawn for each record: scale, down, across, flip


class Augmentation(NamedTuple):
    """How images are cropped, flipped and changed; the fields are `from_tar`'s arguments.

    Attributes:
      crop: None, "center" or "random".
      crop_area: the least area of a random crop, relative to the largest crop.
      flip: whether half of the images are flipped left to right.
      function: `function(pixels, rng) -> pixels`, uint8 [H, W, C] to the same; or None.
      seed: for the random draws.
    """

    crop: str | None = None
    crop_area: float = 0.35
    flip: bool = False
    function: Augment | None = None
    seed: int = 0

    def check(self, resize: bool) -> None:
        """Refuses invalid values; `resize` says whether images are resized."""
        check.one_of("crop", self.crop, (None, "center", "random"))
        check.argument(self.crop is None or resize, "size", "(height, width) with `crop`", None)
        check.in_range("crop_area", self.crop_area, 0.0, 1.0, open_low=True)
        ok = self.function is None or callable(self.function)
        check.argument(ok, "augment", "a function of pixels and a generator", self.function)

    @property
    def random_crops(self) -> bool:
        """Whether an image is decoded differently each epoch."""
        return self.crop == "random"

    def draws(self, epoch: int, records: np.ndarray) -> np.ndarray:
        """Random numbers in [0, 1) for each record, float64 [n, 4]."""
        base = mix(records.astype(np.uint64) + np.uint64(key(self.seed, epoch, -4)))
        steps = np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mix(base[:, None] + steps) >> np.uint64(11)) * 2.0**-53

    def crop_of(self, draws: np.ndarray) -> Crop | None:
        """The crop of one image; None for the whole image."""
        if self.crop != "random":
            return CENTER if self.crop == "center" else None
        area = self.crop_area + (1.0 - self.crop_area) * float(draws[0])
        return Crop(area**0.5, float(draws[1]), float(draws[2]))

    def apply(self, pixels: np.ndarray, epoch: int, records: np.ndarray, draws: np.ndarray) -> None:
        """Flips and changes the images of a batch in place, uint8 [n, H, W, C]."""
        if self.flip:
            flipped = draws[:, 3] < 0.5
            pixels[flipped] = pixels[flipped, :, ::-1]
        if self.function is not None:
            for row, record in enumerate(records.tolist()):
                rng = np.random.Generator(np.random.Philox(key=key(self.seed, epoch, record, -5)))
                pixels[row] = self._changed(pixels[row], rng)

    def _changed(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        assert self.function is not None
        changed: Any = np.asarray(self.function(pixels.copy(), rng))
        check.argument(
            changed.shape == pixels.shape and changed.dtype == np.uint8,
            "augment",
            f"a function that returns uint8 {list(pixels.shape)}, as it gets",
            f"{changed.dtype} {list(changed.shape)}",
        )
        return changed


NONE = Augmentation()
