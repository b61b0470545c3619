"""Reading photographs as float32 [H, W, 3] in [0, 1]; writing PNGs, JPEGs and animations.

`jdl.data.decode` limits the size of untrusted photographs. Gray becomes RGB, pictures with alpha
are laid on white, EXIF's orientation is applied. Files appear only when they are complete.
"""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.core.files import atomic_file
from jdl.recipes.pictures import eight_bits
from jdl.recipes.pictures import sheet as sheet

LARGEST_FILE = 1 << 29  # bytes
WRITTEN = (".png", ".jpg", ".jpeg")
ANIMATED = (".gif", ".webp")


def read(path: str | Path, *, longest: int | None = None) -> np.ndarray:
    """A photograph as float32 [H, W, 3] in [0, 1], reduced if its longer side is above `longest`.

    Raises:
      DataError: if the file cannot be read as an image, or has more than 8192 × 8192 pixels.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = write(Path(folder) / "gray.png", np.full((2, 5, 3), 0.2))
    ...     image = read(written)
    >>> image.shape, round(float(image[0, 0, 0]), 3)
    ((2, 5, 3), 0.2)
    """
    from jdl.data.images import BadImage, decode

    path = Path(path)
    if not path.is_file():
        raise check.DataError(f"{path}: there is no such image file.")
    if path.stat().st_size > LARGEST_FILE:
        raise check.DataError(f"{path} is larger than the {LARGEST_FILE} bytes allowed.")
    try:
        data = path.read_bytes()
        pixels = decode(data)
        height, width = pixels.shape[:2]
        if longest is not None and max(height, width) > check.positive_int("longest", longest):
            by = longest / max(height, width)
            size = max(1, round(height * by)), max(1, round(width * by))
            pixels = decode(data, size=size, exact=True)
    except BadImage as error:
        raise check.DataError(f"{path} is not an image: {str(error).rstrip('.')}.") from error
    except OSError as error:
        raise check.DataError(f"{path} cannot be read: {error.strerror}.") from error
    if 0 in pixels.shape:
        raise check.DataError(f"{path} is an image without pixels.")
    return np.repeat(pixels, 3 // pixels.shape[2], axis=2).astype(np.float32) / 255


def as_image(image: ArrayLike, name: str = "image") -> np.ndarray:
    """An array as float32 [H, W, 3] in [0, 1]: uint8 is scaled, gray repeated, alpha laid on white.

    >>> as_image(np.full((2, 2), 255, np.uint8))[0, 0].tolist()
    [1.0, 1.0, 1.0]
    """
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    ok = array.ndim == 3 and array.shape[2] in (1, 3, 4) and 0 not in array.shape
    check.argument(ok, name, "of shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]", array.shape)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255
    floating = np.issubdtype(array.dtype, np.floating)
    check.argument(floating, name, "uint8 or floating", str(array.dtype))
    inside = bool(np.all((array >= 0) & (array <= 1)))
    check.argument(inside, name, "finite and in [0, 1]", "values outside")
    array = array.astype(np.float32)
    if array.shape[2] == 4:
        array = 1 - (1 - array[:, :, :3]) * array[:, :, 3:]
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def check_out(path: str | Path, suffixes: Sequence[str] = WRITTEN) -> Path:
    """The path; raises, before any work is done, if a picture cannot be written there."""
    path = Path(path)
    ok = path.suffix.lower() in suffixes and not path.is_dir()
    *others, last = suffixes
    check.argument(ok, "out", f"a file ending in {', '.join(others)} or {last}", str(path))
    near = path.parent
    while not near.exists():
        near = near.parent
    ok = near.is_dir() and os.access(near, os.W_OK)
    check.argument(ok, "out", "in a folder that can be written", str(path))
    return path


def write(path: str | Path, image: ArrayLike) -> Path:
    """Writes values in [0, 1], [H, W, 3] or [H, W], as a PNG or JPEG."""
    from PIL import Image

    path = check_out(path)
    picture = Image.fromarray(eight_bits(image))
    with atomic_file(path) as file:
        picture.save(file, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=95)
    return path


def write_frames(
    path: str | Path, frames: Iterable[ArrayLike], *, per_second: float = 15.0
) -> list[Path]:
    """Writes frames [H, W, 3] in [0, 1] as a .gif or .webp, or as PNGs for "zoom-%04d.png"."""
    from PIL import Image

    path = check_frames_out(path)
    check.in_range("per_second", per_second, 0.0, 100.0, open_low=True)
    if "%" in path.name:
        return [write(path.with_name(path.name % i), frame) for i, frame in enumerate(frames, 1)]
    pictures = [Image.fromarray(eight_bits(frame)) for frame in frames]
    check.argument(bool(pictures), "frames", "at least one", 0)
    packed, kind = io.BytesIO(), path.suffix[1:].upper()
    how: dict[str, Any] = {"quality": 90} if kind == "WEBP" else {}
    how |= {"append_images": pictures[1:], "duration": round(1000 / per_second), "loop": 0}
    pictures[0].save(packed, kind, save_all=True, **how)
    with atomic_file(path) as file:
        file.write(packed.getvalue())
    return [path]


def check_frames_out(path: str | Path) -> Path:
    """The path; raises if frames cannot be written there."""
    path = Path(path)
    if "%" not in path.name:
        return check_out(path, ANIMATED)
    try:
        ok = path.name % 1 != path.name % 2
    except (TypeError, ValueError):
        ok = False
    check.argument(ok, "out", "a name with one number in it, such as zoom-%04d.png", str(path))
    return check_out(path)


def resized(image: ArrayLike, size: tuple[int, int]) -> np.ndarray:
    """An image at another size, float32, by bicubic interpolation with antialiasing.

    Args:
      image: [H, W, C].
      size: (height, width).

    >>> resized(np.ones((8, 6, 3)), (4, 3)).shape
    (4, 3, 3)
    """
    from PIL import Image

    array = np.asarray(image, np.float32)
    if array.shape[:2] == tuple(size):
        return array
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(array, 2, 0)]
    small = [plane.resize((size[1], size[0]), Image.Resampling.BICUBIC) for plane in planes]
    return np.stack([np.asarray(plane) for plane in small], axis=2)


def colored(values: ArrayLike, colors: str = "inferno") -> np.ndarray:
    """Values in [0, 1], of any shape, as RGB by a colour map of matplotlib."""
    import matplotlib

    found = matplotlib.colormaps[colors](np.clip(np.asarray(values), 0, 1))
    return found[..., :3].astype(np.float32)
