"""Random crops, flips and changes of images: a function of (seed, epoch, record) alone."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jdl.core import check
from jdl.data.images import CENTER, AnyCrop, Crop, ResizedCrop
from jdl.data.order import key, mix

Augment: TypeAlias = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Augments: TypeAlias = str | Augment | Sequence[str | Augment]
_Operation = Callable[[Image.Image, float], Image.Image]

_DRAWS = 4  # numbers drawn for each record: scale, down, across, flip
_ATTEMPTS = 10  # at a crop of random area and aspect ratio, with four numbers each
_LEAST_AREA = {"random": 0.35, "random_resized": 0.08}


class Augmentation(NamedTuple):
    """How images are cropped, flipped and changed; the fields are `from_tar`'s arguments."""

    crop: str | None = None
    crop_area: float | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    functions: tuple[Augment, ...] = ()  # `augment`, applied in order
    seed: int = 0

    def check(self, resize: bool) -> None:
        """Refuses invalid values; `resize` says whether images are resized."""
        check.one_of("crop", self.crop, (None, "center", "random", "random_resized"))
        check.argument(self.crop is None or resize, "size", "(height, width) with `crop`", None)
        if self.crop_area is not None:
            check.in_range("crop_area", self.crop_area, 0.0, 1.0, open_low=True)
        _checked_range("crop_ratio", self.crop_ratio, 1e-3, 1e3)

    @property
    def random_crops(self) -> bool:
        """Whether an image is decoded differently each epoch."""
        return self.crop in _LEAST_AREA

    def draws(self, epoch: int, records: np.ndarray) -> np.ndarray:
        """Random numbers in [0, 1) for each record, float64 [n, 4 or more]."""
        count = _DRAWS + (4 * _ATTEMPTS if self.crop == "random_resized" else 0)
        base = mix(records.astype(np.uint64) + np.uint64(key(self.seed, epoch, -4)))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mix(base[:, None] + steps) >> np.uint64(11)) * 2.0**-53

    def crop_of(self, draws: np.ndarray) -> AnyCrop | None:
        """The crop of one image; None for the whole image."""
        if self.crop not in _LEAST_AREA:
            return CENTER if self.crop == "center" else None
        least = _LEAST_AREA[self.crop] if self.crop_area is None else self.crop_area
        if self.crop == "random_resized":
            return ResizedCrop(least, self.crop_ratio, draws[_DRAWS:].reshape(_ATTEMPTS, 4))
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
            ok = changed.shape == pixels.shape and changed.dtype == np.uint8
            must = f"a function that returns uint8 {list(pixels.shape)}, as it gets"
            check.argument(ok, "augment", must, f"{changed.dtype} {list(changed.shape)}")
            pixels = changed
        return pixels


NONE = Augmentation()


# ---------------------------------------------------------------------- torchvision's, by Pillow


def color_jitter(
    *, brightness: Any = 0.4, contrast: Any = 0.4, saturation: Any = 0.4, hue: Any = 0.1
) -> Augment:
    """Changes colors by random factors in a random order; a gray image's hue and saturation stay.

    Args:
      brightness: x for a factor of max(0, 1 − x) to 1 + x, or (least, largest).
      contrast: likewise.
      saturation: likewise.
      hue: x for a shift of −x to x, or (least, largest), within ±½ of the circle of hues.

    >>> from jdl.data import digits_path, from_tar
    >>> augment = color_jitter(brightness=(0.5, 0.9), contrast=0.0)
    >>> next(iter(from_tar(digits_path(), augment=augment, batch_size=2)))["image"].shape
    (2, 8, 8, 3)
    """
    ranges = []
    for name, x in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        factors = (max(0.0, 1.0 - x), 1.0 + x) if isinstance(x, int | float) else x
        ranges.append(_checked_range(name, factors, 0.0, 1e3))
    shifts = (-hue, hue) if isinstance(hue, int | float) else hue
    return partial(_jitter, (*ranges, _checked_range("hue", shifts, -0.5, 0.5)))


def rand_augment(*, num_ops: int = 2, magnitude: int = 9) -> Augment:
    """Applies random ones of RandAugment's fourteen operations.

    Args:
      num_ops: how many, one after the other.
      magnitude: how strong they are, 0 to 30.

    >>> rand_augment()(np.zeros((8, 8, 1), np.uint8), np.random.default_rng(0)).shape
    (8, 8, 1)
    """
    check.positive_int("num_ops", num_ops)
    ok = type(magnitude) is int and 0 <= magnitude <= 30
    check.argument(ok, "magnitude", "an integer of 0 to 30", magnitude)
    return partial(_rand_augment, num_ops, magnitude)


NAMED: dict[Any, Callable[[], Augment]] = {
    "color_jitter": color_jitter,
    "rand_augment": rand_augment,
}


def functions(augment: Augments | None) -> tuple[Augment, ...]:
    """The functions that `from_tar(augment=)` stands for: names, functions, or a list of them."""
    given: Any = augment if isinstance(augment, list | tuple) else (augment,)
    return tuple(each if callable(each) else _named(each) for each in given if each is not None)


def _named(name: Any) -> Augment:
    must = f"a function of pixels and a generator, or one of {', '.join(NAMED)}"
    hint = "Mixup and cutmix are given to the Estimator: batch_transform=jdl.data.mixup(…)."
    check.argument(isinstance(name, str) and name in NAMED, "augment", must, name, hint)
    return NAMED[name]()


def _jitter(ranges: Any, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drawn = [(jitter, rng.uniform(*x)) for jitter, x in zip(_JITTERS, ranges, strict=True)]
    return _operated(pixels, [drawn[i] for i in rng.permutation(4).tolist()])


def _rand_augment(
    num_ops: int, magnitude: int, pixels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    operations, signs = rng.integers(len(_OPERATIONS), size=num_ops), rng.choice([-1, 1], num_ops)
    shares = (signs * magnitude / 30).tolist()
    return _operated(pixels, [*zip((_OPERATIONS[i] for i in operations), shares, strict=True)])


def _operated(pixels: np.ndarray, changes: Sequence[tuple[_Operation, float]]) -> np.ndarray:
    """Pixels [H, W, C] after these operations with these factors."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    for change, factor in changes:
        image = change(image, factor)
    return np.asarray(image).reshape(pixels.shape)


def _hue(image: Image.Image, shift: float) -> Image.Image:
    if image.mode == "L" or shift == 0.0:
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(x + int(shift * 255)) % 256 for x in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert(image.mode)


def _affine(image: Image.Image, **changed: float) -> Image.Image:
    """The image at the points (ax + by + c, dx + ey + f)."""
    matrix = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 1.0, "f": 0.0, **changed}
    return image.transform(image.size, Image.Transform.AFFINE, [*matrix.values()])


def _pixels(length: int, x: float) -> float:
    return float(int(round(150 / 331 * length * x, 4)))


_JITTERS: tuple[_Operation, ...] = (
    lambda image, x: ImageEnhance.Brightness(image).enhance(x),
    lambda image, x: ImageEnhance.Contrast(image).enhance(x),
    lambda image, x: ImageEnhance.Color(image).enhance(x),
    _hue,
)

# RandAugment's operations by a share x of their largest magnitude, in [−1, 1].
_OPERATIONS: tuple[_Operation, ...] = (
    lambda image, x: image,
    lambda image, x: _affine(image, b=0.3 * x),
    lambda image, x: _affine(image, d=0.3 * x),
    lambda image, x: _affine(image, c=-_pixels(image.width, x)),
    lambda image, x: _affine(image, f=-_pixels(image.height, x)),
    lambda image, x: image.rotate(30 * x),
    lambda image, x: ImageEnhance.Brightness(image).enhance(1 + 0.9 * x),
    lambda image, x: ImageEnhance.Color(image).enhance(1 + 0.9 * x),
    lambda image, x: ImageEnhance.Contrast(image).enhance(1 + 0.9 * x),
    lambda image, x: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * x),
    lambda image, x: ImageOps.posterize(image, 8 - round(4 * abs(x))),
    lambda image, x: ImageOps.solarize(image, math.ceil(round(255 * (1 - abs(x)), 4))),
    lambda image, x: ImageOps.autocontrast(image),
    lambda image, x: ImageOps.equalize(image),
)


def _checked_range(name: str, given: Any, low: float, high: float) -> tuple[float, float]:
    """`given` as (least, largest) within these bounds, or an error."""
    ok = isinstance(given, list | tuple) and len(given) == 2
    ok = ok and all(isinstance(x, int | float) for x in given)
    ok = ok and low <= given[0] <= given[1] <= high
    check.argument(ok, name, f"(least, largest) within {low} and {high}", given)
    return float(given[0]), float(given[1])
