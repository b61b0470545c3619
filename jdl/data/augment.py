"""What happens to an image by chance: the same for a (seed, epoch, record), whoever decodes it."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jdl.core import check
from jdl.data.images import CENTER, Crop
from jdl.data.order import key, mix

Augment: TypeAlias = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_DRAWS = 4  # numbers drawn for each record: scale, down, across, flip


class Augmentation(NamedTuple):
    """How images are cropped, mirrored and changed.

    Attributes:
      crop: None, "center" or "random".
      crop_area: the least share of the largest window that a random one has.
      flip: whether half of the images are mirrored left to right.
      function: `function(pixels, rng) -> pixels`, uint8 [H, W, C] to the same; or None.
      seed: names the draws.
    """

    crop: str | None = None
    crop_area: float = 0.35
    flip: bool = False
    function: Augment | None = None
    seed: int = 0

    def checked(self, resize: bool) -> "Augmentation":
        """Itself, if its values are sound."""
        check.one_of("crop", self.crop, (None, "center", "random"))
        check.argument(
            self.crop is None or resize, "size", "(height, width) where images are cropped", None
        )
        check.in_range("crop_area", self.crop_area, 0.0, 1.0, open_low=True)
        ok = self.function is None or callable(self.function)
        check.argument(ok, "augment", "a function of pixels and a generator", self.function)
        return self

    @property
    def random_windows(self) -> bool:
        """Whether an image is decoded otherwise each epoch."""
        return self.crop == "random"

    def draws(self, epoch: int, records: np.ndarray) -> np.ndarray:
        """Numbers in [0, 1) for each record, float64 [n, 4]."""
        base = mix(records.astype(np.uint64) + np.uint64(key(self.seed, epoch, -4)))
        steps = np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mix(base[:, None] + steps) >> np.uint64(11)) * 2.0**-53

    def window(self, draws: np.ndarray) -> Crop | None:
        """The window of one image."""
        if self.crop != "random":
            return CENTER if self.crop == "center" else None
        area = self.crop_area + (1.0 - self.crop_area) * float(draws[0])
        return Crop(area**0.5, float(draws[1]), float(draws[2]))

    def apply(self, pixels: np.ndarray, epoch: int, records: np.ndarray, draws: np.ndarray) -> None:
        """Mirrors and changes the images of a batch in place, uint8 [n, H, W, C]."""
        if self.flip:
            mirrored = draws[:, 3] < 0.5
            pixels[mirrored] = pixels[mirrored, :, ::-1]
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
            f"a function that gives uint8 {list(pixels.shape)}, as it is given",
            f"{changed.dtype} {list(changed.shape)}",
        )
        return changed
