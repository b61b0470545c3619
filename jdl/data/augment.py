"""Random crops, flips and changes of images: a function of (seed, epoch, record) alone."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jdl.core import check
from jdl.data.images import CENTER, Crop, ResizedCrop
from jdl.data.order import key, mix

Augment: TypeAlias = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_DRAWS = 4  # numbers drawn for each record: scale, down, across, flip
_ATTEMPTS = 10  # at a crop of random area and aspect ratio, with four numbers each


class Augmentation(NamedTuple):
    """How images are cropped, flipped and changed; the fields are `from_tar`'s arguments.

    Attributes:
      crop: None, "center", "random" or "random_resized".
      crop_area: the least area of a random crop, relative to the largest crop; None for 0.35, and
        for 0.08 of the image with "random_resized".
      crop_ratio: the least and the largest width / height of a crop with "random_resized".
      flip: whether half of the images are flipped left to right.
      functions: `function(pixels, rng) -> pixels`, uint8 [H, W, C] to the same, applied in order.
      seed: for the random draws.
    """

    crop: str | None = None
    crop_area: float | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    functions: tuple[Augment, ...] = ()
    seed: int = 0

    def check(self, resize: bool) -> None:
        """Refuses invalid values; `resize` says whether images are resized."""
        check.one_of("crop", self.crop, (None, "center", "random", "random_resized"))
        check.argument(self.crop is None or resize, "size", "(height, width) with `crop`", None)
        if self.crop_area is not None:
            check.in_range("crop_area", self.crop_area, 0.0, 1.0, open_low=True)
        check_range("crop_ratio", self.crop_ratio, 1e-3, 1e3)

    @property
    def random_crops(self) -> bool:
        """Whether an image is decoded differently each epoch."""
        return self.crop in ("random", "random_resized")

    def draws(self, epoch: int, records: np.ndarray) -> np.ndarray:
        """Random numbers in [0, 1) for each record, float64 [n, 4 or more]."""
        count = _DRAWS + (4 * _ATTEMPTS if self.crop == "random_resized" else 0)
        base = mix(records.astype(np.uint64) + np.uint64(key(self.seed, epoch, -4)))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mix(base[:, None] + steps) >> np.uint64(11)) * 2.0**-53

    def crop_of(self, draws: np.ndarray) -> Crop | ResizedCrop | None:
        """The crop of one image; None for the whole image."""
        if self.crop == "random_resized":
            least = 0.08 if self.crop_area is None else self.crop_area
            return ResizedCrop(least, self.crop_ratio, draws[_DRAWS:].reshape(_ATTEMPTS, 4))
        if self.crop != "random":
            return CENTER if self.crop == "center" else None
        least = 0.35 if self.crop_area is None else self.crop_area
        area = least + (1.0 - least) * float(draws[0])
        return Crop(area**0.5, float(draws[1]), float(draws[2]))

    def apply(self, pixels: np.ndarray, epoch: int, records: np.ndarray, draws: np.ndarray) -> None:
        """Flips and changes the images of a batch in place, uint8 [n, H, W, C]."""
        if self.flip:
            flipped = draws[:, 3] < 0.5
            pixels[flipped] = pixels[flipped, :, ::-1]
        if self.functions:
            for row, record in enumerate(records.tolist()):
                rng = np.random.Generator(np.random.Philox(key=key(self.seed, epoch, record, -5)))
                pixels[row] = self._changed(pixels[row], rng)

    def _changed(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for function in self.functions:
            changed: Any = np.asarray(function(pixels.copy(), rng))
            check.argument(
                changed.shape == pixels.shape and changed.dtype == np.uint8,
                "augment",
                f"a function that returns uint8 {list(pixels.shape)}, as it gets",
                f"{changed.dtype} {list(changed.shape)}",
            )
            pixels = changed
        return pixels


NONE = Augmentation()


def check_range(name: str, given: Any, low: float, high: float) -> tuple[float, float]:
    """`given` as (least, largest) within these bounds, or an error."""
    ok = isinstance(given, list | tuple) and len(given) == 2
    ok = ok and all(isinstance(x, int | float) for x in given)
    ok = ok and low <= given[0] <= given[1] <= high
    check.argument(ok, name, f"(least, largest) within {low} and {high}", given)
    return float(given[0]), float(given[1])
