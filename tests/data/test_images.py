"""Decoding, against Pillow's full decode."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from jdl.data import images
from jdl.data.images import BadImage, decode

PHOTO = Image.fromarray(load_sample_images().images[0])  # 427 × 640


def encode(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def reference(data, size=None, mode="RGB"):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode)
    if size is not None:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def deviation(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "GIF", "PPM", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [None, (60, 100), (500, 700)])
def test_formats_as_pillow_decodes_them(format, mode, size):
    data = encode(PHOTO.resize((320, 214)), format)
    ours = decode(data, size=size, grayscale=mode == "L", exact=True)
    assert deviation(ours, reference(data, size, mode)) == 0


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [None, (128, 128), (200, 300), (40, 40)])
def test_fast_jpegs_come_near_pillows_full_decode(without, mode, size, monkeypatch):
    if without:
        monkeypatch.setattr(images, "simplejpeg", None)
    data = encode(PHOTO, "JPEG", quality=90)
    ours = decode(data, size=size, grayscale=mode == "L")
    assert deviation(ours, reference(data, size, mode)) < 5


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation(turn, without, monkeypatch):
    if without:
        monkeypatch.setattr(images, "simplejpeg", None)
    exif = Image.Exif()
    exif[0x0112] = turn
    for size in (None, (40, 100)):
        for format in ("JPEG", "PNG", "WEBP"):
            data = encode(PHOTO, format, exif=exif)
            ours = decode(data, size=size)
            assert deviation(ours, reference(data, size)) < 4
            assert deviation(decode(data, size=size, exact=True), reference(data, size)) == 0


def test_invalid_exif_data_are_ignored():
    data = encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 20)
    assert decode(data).shape == (427, 640, 3)


def test_modes():
    rng = np.random.default_rng(0)
    gray = rng.integers(256, size=(9, 7), dtype=np.uint8)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    for data in (encode(deep), encode(deep, "PPM")):
        np.testing.assert_array_equal(decode(data, grayscale=True)[:, :, 0], gray)
        assert decode(data).shape == (9, 7, 3)
    photo = PHOTO.resize((70, 50))
    for mode in ("P", "1", "LA", "RGBA", "L"):
        data = encode(photo.convert(mode))
        assert deviation(decode(data), reference(data)) == 0
    cmyk = encode(photo.convert("CMYK"), "JPEG", quality=95)
    assert deviation(decode(cmyk), reference(cmyk)) == 0
    seen_through = photo.convert("P")
    data = encode(seen_through, transparency=bytes(range(256)))
    through_alpha = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB"))
    assert deviation(decode(data), through_alpha) == 0
    assert decode(encode(photo.convert("L"), "JPEG")).shape == (50, 70, 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_bytes_that_are_no_image_are_refused():
    whole = encode(PHOTO, "JPEG")
    png = encode(PHOTO)
    tiff = encode(PHOTO, "TIFF")
    for data in (b"", b"hello", whole[:100], whole[: len(whole) // 2], png[:2000], tiff):
        with pytest.raises(BadImage, match="cannot be decoded"):
            decode(data, size=(8, 8))
    for data in (whole, png):
        with pytest.raises(BadImage, match="640 × 427 pixels, more than the 100000"):
            decode(data, max_pixels=100_000)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_an_image_bomb_is_refused_before_memory_is_spent():
    header = encode(Image.new("L", (1, 1)))
    for side in (12_000, 60_000):
        bomb = bytearray(header)
        bomb[16:24] = side.to_bytes(4, "big") * 2
        import zlib

        bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
        with pytest.raises(BadImage):
            decode(bytes(bomb), size=(8, 8))
