"""From an image file's bytes to an array of one size.

Pillow decodes all formats; simplejpeg decodes JPEGs where it is installed. By default a JPEG much
larger than asked for is decoded at a fraction of its size, which is cheap (scaled DCT), and resized
from there; `exact=True` decodes it whole, as Pillow does. Resizing is Pillow's bilinear filter,
whose support grows with the reduction (no aliasing).

Mean deviation from Pillow's full decode, of 255, over 400 photographs resized to 128 × 128 gray,
and the largest of one photograph (`make bench-data`):

    from          simplejpeg    Pillow alone    exact
    500 × 375     2.8, 8.9      1.4, 4.4        0, 0
    250 × 250     1.8, 4.7      1.8, 4.7        0, 0

The bytes are untrusted: only the formats below are read, and an image of more than `max_pixels` is
refused when its header is read, before memory is allocated.
"""

import contextlib
import importlib
import io
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jdl.core import check

if TYPE_CHECKING:
    import PIL.Image

try:
    import simplejpeg
except ImportError:  # Pillow is slower
    simplejpeg = None

# The formats that are read: the name of Pillow's plugin -> how their files begin.
_PLUGINS = {
    "Jpeg": rb"\xff\xd8\xff",
    "Png": rb"\x89PNG\r\n\x1a\n",
    "WebP": rb"RIFF....WEBP",
    "Gif": rb"GIF8[79]a",
    "Bmp": rb"BM",
    "Ppm": rb"P[1-6]\s",
    "Tiff": rb"II[*+]\0|MM\0[*+]",
    "Jpeg2K": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
    "Avif": rb"....ftypavi[fs]",
}
# What is often found instead.
_OTHERS = {
    "HTML or XML": rb"\s*<",
    "HEIC": rb"....ftyp(he|mif1|msf1)",
    "gzip": rb"\x1f\x8b",
    "a pointer of Git LFS": rb"version https://git-lfs",
}
MAX_PIXELS = 1 << 26  # 8192 × 8192

# The fractions of its size that a JPEG is decoded at; 5/8 to 7/8 cost more than the whole.
EIGHTHS = (1, 2, 3, 4, 8)
_ENOUGH = 31 / 32  # of a side: 125 pixels for 128, as a 250 × 250 image then takes half the time
_ORIENTATION = 0x0112  # the EXIF tag: how the camera was held
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _SAMPLE_FORMAT = 258, 262, 322, 339  # TIFF's tags
# A JPEG's next segment, after fill bytes and markers that stand alone (ITU-T T.81, B.1.1.2).
_SEGMENT = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_DEEP = ("I;16", "I;16B", "I;16L", "I")  # Pillow's names for 16 bits a pixel
_Window = tuple[float, float, float, float]  # top, left, height and width


class Crop(NamedTuple):
    """A window of an image, with the aspect ratio of the size it is resized to."""

    scale: float  # its side relative to that of the largest such window, in (0, 1]
    down: float  # its position between the image's edges, in [0, 1]; ½ is the middle
    across: float  # likewise

    def box(self, height: int, width: int, size: tuple[int, int]) -> _Window:
        """Top, left, height and width of the window in an image of that height and width.

        >>> Crop(1.0, 0.5, 0.5).box(100, 200, (64, 64))
        (0.0, 50.0, 100.0, 100.0)
        """
        high = self.scale * min(height, width * size[0] / size[1])
        wide = min(high * size[1] / size[0], float(width))  # larger only by rounding
        return (height - high) * self.down, (width - wide) * self.across, high, wide


CENTER = Crop(1.0, 0.5, 0.5)


class ResizedCrop(NamedTuple):
    """A window of random area and aspect ratio, as of torchvision's `RandomResizedCrop`."""

    area: float  # the least area, relative to the image's, in (0, 1]
    ratio: tuple[float, float]  # the least and the largest width / height
    draws: np.ndarray  # numbers in [0, 1) for area, ratio, down and across of each attempt, [n, 4]

    def box(self, height: int, width: int, size: tuple[int, int]) -> _Window:
        """Top, left, height and width of the window; the first attempt that fits inside."""
        low, high = self.ratio
        for area, ratio, down, across in self.draws.tolist():
            area = height * width * (self.area + (1.0 - self.area) * area)
            ratio = low * (high / low) ** ratio
            tall, wide = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < tall <= height and 0 < wide <= width:
                top, left = int(down * (height - tall + 1)), int(across * (width - wide + 1))
                return float(top), float(left), float(tall), float(wide)
        tall = min(height, max(round(width / low), 1))
        wide = min(width, max(round(height * high), 1))
        return float((height - tall) // 2), float((width - wide) // 2), float(tall), float(wide)


AnyCrop = Crop | ResizedCrop


class BadImage(check.DataError):
    """The bytes are not an image that can be decoded.

    >>> try:
    ...     decode(b"no image")
    ... except BadImage:
    ...     print("skipped")
    skipped
    """


def decode(
    data: bytes,
    *,
    size: tuple[int, int] | None = None,
    grayscale: bool = False,
    exact: bool = False,
    max_pixels: int = MAX_PIXELS,
    crop: AnyCrop | None = None,
) -> np.ndarray:
    """The image in `data`, upright, as uint8 [H, W, C] with C = 1 or 3.

    Palettes are applied, CMYK is converted, alpha is laid on white as viewers show it, 12- and
    16-bit values are scaled to 8 bits, and an animation or a file of several pages gives the first.

    Args:
      data: the bytes of a JPEG, PNG, WebP, BMP, GIF, PPM (PBM, PGM), TIFF, JPEG 2000 or AVIF file.
      size: (height, width) to resize to; None for the image's own.
      grayscale: one channel of luma (0.299 R + 0.587 G + 0.114 B) rather than three of RGB.
      exact: decode JPEGs at full size before resizing, with Pillow.
      max_pixels: the most that the image may have.
      crop: the window to keep, resized to `size`; None for all of the image, stretched.

    Raises:
      BadImage: if they cannot be decoded, saying why.

    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (30, 20), "red").save(file, "PNG")
    >>> decode(file.getvalue(), size=(4, 6)).shape
    (4, 6, 3)
    """
    how = _How(size, grayscale, exact, max_pixels, crop)
    if data[:3] == b"\xff\xd8\xff" and simplejpeg is not None and not exact:
        pixels = _fast_jpeg(data, how)
        if pixels is not None:
            return pixels
    return _with_pillow(data, how)


class _How(NamedTuple):
    """The arguments of `decode`."""

    size: tuple[int, int] | None
    grayscale: bool
    exact: bool
    max_pixels: int
    crop: AnyCrop | None

    def window(self, height: int, width: int, turn: int) -> _Window | None:
        """The crop of an image stored with this height, width and orientation; these are 1."""
        if self.size is None or self.crop is None:
            return None
        if turn >= 5:
            height, width = width, height
        top, left, high, wide = self.crop.box(height, width, self.size)
        return top / height, left / width, high / height, wide / width


def _with_pillow(data: bytes, how: _How) -> np.ndarray:
    mode = "L" if how.grayscale else "RGB"
    with _opened(data) as image:
        _check_pixels(image.width, image.height, how.max_pixels)
        turn = _orientation(image)
        if image.format == "TIFF":
            _check_tiff(image, how.max_pixels)
            image.load()
            turn = 1  # Pillow has turned it
        window = how.window(image.height, image.width, turn)
        if image.format == "JPEG" and how.size is not None and not how.exact:
            height, width = _needed(turn, how.size, window)
            image.draft(mode, (width, height))
        image.load()
        return _finished(np.asarray(_eight_bits(image, mode)), turn, how.size, window)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator["PIL.Image.Image"]:
    """The image, its header read, without the limit that `PIL.Image.open` has of its own."""
    from PIL import Image

    try:
        with _plugin(data)(io.BytesIO(data)) as image:
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # of the parts of a WebP, GIF or TIFF
        raise BadImage(f"Pillow refuses it by its MAX_IMAGE_PIXELS: {error}") from error
    except Exception as error:  # Pillow's parsers raise anything on hostile bytes
        raise BadImage(f"cannot be decoded: {error}" if str(error) else repr(error)) from error


def _plugin(data: bytes) -> Any:
    """Pillow's class for such a file."""
    for plugin, begins in _PLUGINS.items():
        if re.match(begins, data, re.DOTALL):
            try:
                module = importlib.import_module(f"PIL.{plugin}ImagePlugin")
            except ImportError as error:
                raise BadImage(f"the Pillow installed reads no {plugin}") from error
            return getattr(module, f"{plugin}ImageFile")
    if not data:
        raise BadImage("it is empty (0 bytes)")
    known = (kind for kind, begins in _OTHERS.items() if re.match(begins, data, re.DOTALL))
    kind = next(known, "of an unknown kind")
    raise BadImage(f"it is no image that can be read, but {kind}: it begins with {data[:16]!r}")


def _eight_bits(image: "PIL.Image.Image", mode: str) -> "PIL.Image.Image":
    """A Pillow image as 8-bit "L" or "RGB"."""
    from PIL import Image

    if image.mode in _DEEP:  # Pillow's own conversion would clip at 255
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        top = 2 ** tags.get(_BITS, (16,))[0] - 1
        values = np.asarray(image).astype(np.int64)
        if tags.get(_PHOTOMETRIC) == 0:  # white is 0
            values = top - values
        eight = np.clip((values * 255 + top // 2) // top, 0, 255).astype(np.uint8)
        if "transparency" in image.info:  # the value that is seen through
            eight[values == image.info["transparency"]] = 255
        image = Image.fromarray(eight)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def is_gray(data: bytes) -> bool:
    """Whether the image in `data` is stored in shades of gray; may raise `BadImage`."""
    with _opened(data) as image:
        return image.mode in ("L", "1", "LA", *_DEEP)


def _check_tiff(image: "PIL.Image.Image", max_pixels: int) -> None:
    """Refuses tiles larger than images may be, and numbers whose range the file does not tell."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    _check_pixels(tags.get(_TILE_WIDTH, 1), tags.get(_TILE_WIDTH + 1, 1), max_pixels, "tiles of ")
    kind, bits = max(tags.get(_SAMPLE_FORMAT, (1,))), max(tags.get(_BITS, (1,)))
    if kind != 1 or bits > 16:
        kind = {1: "unsigned", 2: "signed", 3: "floating-point"}.get(kind, "other")
        must = "whose range is not known; write it with 8 or 16 unsigned bits"
        raise BadImage(f"it holds {bits}-bit {kind} numbers, {must}")


def _orientation(image: "PIL.Image.Image") -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an image with invalid EXIF data is still an image
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _needed(turn: int, size: tuple[int, int], window: _Window | None) -> tuple[int, int]:
    """The smallest height and width, as stored, that a JPEG may be decoded at."""
    _, _, high, wide = window or (0.0, 0.0, 1.0, 1.0)
    down, across = math.ceil(size[0] / high * _ENOUGH), math.ceil(size[1] / wide * _ENOUGH)
    return (down, across) if turn < 5 else (across, down)


def _fast_jpeg(data: bytes, how: _How) -> np.ndarray | None:
    """The result of `decode`, or None if it takes Pillow."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray", "GRAY", "RGB"):
            return None
        _check_pixels(width, height, how.max_pixels)
        turn = jpeg_orientation(data)
        window, target = how.window(height, width, turn), (height, width)
        if how.size is not None:
            target = _needed(turn, how.size, window)
        for eighths in EIGHTHS:
            high, wide = -(-height * eighths // 8), -(-width * eighths // 8)
            if high >= target[0] and wide >= target[1]:
                break
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="GRAY" if how.grayscale else "RGB",
            fastdct=False,
            fastupsample=False,
            min_height=high,
            min_width=wide,
        )
    except ValueError as error:
        if isinstance(error, BadImage):
            raise
        return None
    return _finished(pixels, turn, how.size, window)


def _finished(
    pixels: np.ndarray, turn: int, size: tuple[int, int] | None, window: _Window | None
) -> np.ndarray:
    """Turns uint8 [H, W] or [H, W, C] upright, crops and resizes it, to [H, W, C]."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if size is not None and (pixels.shape[:2] != size or window is not None):
        from PIL import Image

        box = None
        if window is not None:
            height, width = pixels.shape[:2]
            top, left, high, wide = window
            # Rounding may put an edge slightly outside, which Pillow refuses.
            right, bottom = min((left + wide) * width, width), min((top + high) * height, height)
            box = (max(left * width, 0.0), max(top * height, 0.0), right, bottom)
        pixels = np.ascontiguousarray(pixels)
        mode = "L" if pixels.ndim == 2 else "RGB"
        # Equal to fromarray and asarray, which take 10 % longer for a small resize.
        image = Image.frombuffer(mode, pixels.shape[1::-1], pixels, "raw", mode, 0, 1)
        resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
        pixels = np.frombuffer(resized.tobytes(), np.uint8).reshape(*size, *pixels.shape[2:])
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def jpeg_orientation(data: bytes) -> int:
    """EXIF's orientation in a JPEG as Pillow reads it, 1 if it has none; opening takes longer."""
    exif, xmp, at = bytearray(b"Exif\0\0"), b"", 2
    while (marker := _SEGMENT.search(data, at)) and marker[1] not in (b"\xda", b"\xd9"):
        start = marker.end()
        at = start + max(int.from_bytes(data[start : start + 2], "big"), 2)
        if marker[1] == b"\xe1":
            if data.startswith(b"Exif\0\0", start + 2):
                exif += data[start + 8 : at]
            elif data.startswith(_XMP, start + 2):
                xmp = data[start + 2 + len(_XMP) : at]
    if b"\x01\x12" not in exif and b"\x12\x01" not in exif and b"Orientation" not in xmp:
        return 1  # the tag is nowhere
    from PIL import Image

    image = Image.Image()
    image.info = {"exif": bytes(exif), "xmp": xmp}
    return _orientation(image)


def _check_pixels(width: int, height: int, max_pixels: int, what: str = "") -> None:
    if width * height > max_pixels:
        side = math.isqrt(max_pixels)
        raise BadImage(
            f"it has {what}{width} × {height} pixels, more than the {max_pixels} (such as {side} × "
            f"{side}) allowed"
        )
