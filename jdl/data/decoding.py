"""From an image file's bytes to one image of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data.augment import NONE, Augmentation


@dataclass(frozen=True)
class Decoder:
    """How images are decoded and scaled; its fields are arguments of `from_tar`, checked here."""

    size: Sequence[int] | None  # None while it is not known
    grayscale: bool
    dtype: str
    normalize: tuple[Any, Any] | None = None
    exact: bool = False
    max_pixels: int = images.MAX_PIXELS
    augmentation: Augmentation = NONE  # what depends on chance
    resize: bool = True  # to `size`; otherwise images must have it

    def __post_init__(self) -> None:
        check.one_of("dtype", self.dtype, ("uint8", "float32"))
        check.positive_int("max_pixels", self.max_pixels)
        if self.size is not None and self.resize:  # otherwise it is the images' own
            ok = isinstance(self.size, tuple | list) and len(self.size) == 2
            ok = ok and all(type(x) is int and 0 < x <= 2**15 for x in self.size)
            check.argument(ok, "size", "(height, width) of positive integers, or None", self.size)
        self.augmentation.check(self.size is not None)
        if self.normalize is not None:
            must = "(mean, std > 0), each a number or one number for each channel"
            check.argument(self._can_normalize(), "normalize", must, self.normalize)
            float32 = self.dtype == "float32"
            check.argument(float32, "dtype", '"float32" with `normalize`', self.dtype)

    def _can_normalize(self) -> bool:
        try:
            mean, std = self._mean_std()
        except (TypeError, ValueError):
            return False
        shapes: set[tuple[int, ...]] = {(), (1 if self.grayscale else 3,)}
        return {mean.shape, std.shape} <= shapes and bool(np.all(std > 0))

    def _mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.normalize is not None
        mean, std = (np.asarray(x, np.float32) for x in self.normalize)
        return mean, std

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        assert self.size is not None
        return self.size[0], self.size[1], 1 if self.grayscale else 3

    def decode(self, data: bytes, crop: images.AnyCrop | None = None) -> np.ndarray:
        """The image, uint8 [H, W, C], resized if it is to be; may raise `BadImage`."""
        return images.decode(
            data,
            size=(self.shape[0], self.shape[1]) if self.size and self.resize else None,
            grayscale=self.grayscale,
            exact=self.exact,
            max_pixels=self.max_pixels,
            crop=crop,
        )

    def scale(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 values as `dtype`: x, x / 255, or (x / 255 − mean) / std."""
        if self.dtype == "uint8":
            return pixels
        scaled = pixels.astype(np.float32)
        if self.normalize is None:
            scaled *= np.float32(1 / 255)
        else:
            mean, std = self._mean_std()
            scaled *= 1 / (255 * std)
            scaled -= mean / std
        return scaled
