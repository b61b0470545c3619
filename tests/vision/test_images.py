"""Pictures in and out: what can be read, what is refused, and that nothing half-written stays."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jdl.core import check
from jdl.vision import images

RED = (200, 30, 40)


def saved(tmp_path, picture, name="photo.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_image_is_three_channels(tmp_path, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((5, 7), 51400, np.uint16))
    else:
        picture = Image.new("RGB", (7, 5), RED).convert(mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    x = images.read(saved(tmp_path, picture, f"photo.{suffix}"))
    assert x.shape == (5, 7, 3)
    assert x.dtype == np.float32
    if mode in ("RGB", "RGBA"):
        np.testing.assert_allclose(x[0, 0] * 255, RED, atol=0.01)
    if mode in ("L", "LA", "I;16"):
        assert np.ptp(x) == 0
    if mode == "I;16":
        assert x[0, 0, 0] == pytest.approx(51400 / 65535, abs=0.002)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PNG's colour"])
def test_what_is_seen_through_is_on_white(tmp_path, mode):
    """As Pillow composes it; a half transparent pixel, and one that hides red."""
    picture = Image.new("RGBA", (2, 1), (*RED, 128))
    picture.putpixel((1, 0), (*RED, 0))
    how = {}
    if mode == "P":
        picture = picture.quantize()
    elif mode == "LA":
        picture = picture.convert("LA")
    elif mode != "RGBA":
        picture, how = Image.new("RGB", (2, 1), RED), {"transparency": RED}
    path = saved(tmp_path, picture, **how)
    with Image.open(path) as opened:
        stored = opened.convert("RGBA")
    white = Image.new("RGBA", stored.size, "white")
    expected = np.asarray(Image.alpha_composite(white, stored).convert("RGB"))
    np.testing.assert_array_equal(np.rint(images.read(path) * 255), expected)
    assert expected[0, 1].tolist() == [255, 255, 255]
    array = np.asarray(stored)
    np.testing.assert_allclose(images.as_image(array) * 255, expected, atol=1.01)
    assert images.read(path, longest=1).shape == (1, 1, 3)


def test_tiff_is_read_and_jpeg_is_written(tmp_path):
    x = np.linspace(0, 1, 48, dtype=np.float32).reshape(4, 4, 3) * np.ones((1, 1, 3), np.float32)
    tiff = saved(tmp_path, Image.fromarray(np.uint8(np.rint(x * 255))), "photo.tiff")
    np.testing.assert_allclose(images.read(tiff), x, atol=0.003)
    for name in ("x.jpg", "x.JPEG"):
        path = images.write(tmp_path / name, np.full((8, 8, 3), 0.5))
        with Image.open(path) as written:
            assert written.format == "JPEG"
        np.testing.assert_allclose(images.read(path), 0.5, atol=0.01)


def test_large_photographs_are_reduced(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (300, 200), RED))
    assert images.read(path, longest=150).shape == (100, 150, 3)
    assert images.read(path, longest=1000).shape == (200, 300, 3)


def png_of(width, height):
    """A PNG that says it is so large, with next to nothing in it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not an image"),
        (b"GIF89a", "is not an image"),
        (b"not an image at all", "is not an image"),
        (png_of(60000, 60000), "pixels, more than"),
        (png_of(9000, 9000), "pixels, more than"),
        (png_of(0, 10), "is not an image"),
        (png_of(20, 20), "is not an image"),
    ],
    ids=["empty", "short", "text", "enormous", "large", "no-width", "hollow"],
)
def test_what_is_no_image_is_refused(tmp_path, data, why):
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    with pytest.raises(check.DataError, match=why):
        images.read(path)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(check.DataError, match="no such image file"):
            images.read(path)


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    x = np.linspace(0, 1, 60).reshape(4, 5, 3)
    path = images.write(tmp_path / "new" / "x.png", x)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.rint(x * 255))
    before = path.read_bytes()
    with pytest.raises(check.TrainingError, match="not finite"):
        images.write(path, x * np.nan)

    def fails(self, file, *_, **__):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="No space"):
        images.write(path, x)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for wrong in ("x.tiff", "x", "folder.png", "file/x.png"):
        with pytest.raises(check.ArgumentError, match="`out`"):
            images.check_out(tmp_path / wrong)
    for wrong in ("x.png", "x-%s-%d.png", "x-%z.png", "x-%%.png"):
        with pytest.raises(check.ArgumentError, match="`out`"):
            images.check_frames_out(tmp_path / wrong)


def test_frames(tmp_path):
    frames = [np.full((6, 8, 3), v, np.float32) for v in (0.0, 0.5, 1.0)]
    paths = images.write_frames(tmp_path / "f-%03d.png", frames)
    assert [p.name for p in paths] == ["f-001.png", "f-002.png", "f-003.png"]
    assert images.read(paths[1])[0, 0, 0] == pytest.approx(0.5, abs=0.002)
    for suffix in (".gif", ".webp"):
        (path,) = images.write_frames(tmp_path / f"f{suffix}", frames, per_second=10.0)
        moving = Image.open(io.BytesIO(path.read_bytes()))
        assert moving.n_frames == 3
        moving.seek(1)
        assert suffix == ".webp" or moving.info["duration"] == 100
        assert moving.size == (8, 6)
        value = np.asarray(moving.convert("RGB")).mean()
        assert value == pytest.approx(128, abs=3)


def test_sheets_hold_their_pictures():
    tiles = [np.full((10, 20, 3), v, np.float32) for v in (0.2, 0.4, 0.6)]
    sheet = images.sheet(tiles, columns=2, side=20)
    assert sheet.shape == (24, 44, 3)
    np.testing.assert_allclose(
        [sheet[5, 10, 0], sheet[5, 34, 0], sheet[19, 10, 0]], [0.2, 0.4, 0.6]
    )
    assert sheet[19, 34, 0] == 1
    for count, shape in ((16, (4, 4)), (10, (4, 3)), (7, (3, 3)), (1, (1, 1)), (20, (4, 5))):
        found = images.sheet([np.zeros((160, 160, 3))] * count, captions=["x"] * count)
        assert found.shape[:2] == (shape[0] * 178 - 4, shape[1] * 164 - 4)
    captioned = images.sheet(tiles, columns=3, captions=["a", "b", "c"], side=40)
    assert captioned[20:, :40].min() < 0.5  # there is writing
    with pytest.raises(check.ArgumentError, match="columns"):
        images.sheet(tiles, columns=0)
    with pytest.raises(check.ArgumentError, match="captions"):
        images.sheet(tiles, captions=["a"])
