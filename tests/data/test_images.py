"""Decoding, against Pillow's full decode."""

import importlib
import io
import itertools
import json
import logging
import struct
import tarfile
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from sklearn.datasets import load_sample_images

from jdl.cli.main import main
from jdl.data import from_tar, images
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


def on_white(data, size=None, mode="RGB"):
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return reference(encode(Image.alpha_composite(white, image).convert("RGB")), size, mode)


def deviation(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b.astype(int)).mean()


FORMATS = ["PNG", "BMP", "WEBP", "GIF", "PPM", "JPEG", "TIFF"]
FORMATS += ["JPEG2000"] if features.check("jpg_2000") else []
FORMATS += ["AVIF"] if "avif" in features.modules and features.check("avif") else []


@pytest.mark.parametrize("format", FORMATS)
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
    exif, photo = Image.Exif(), PHOTO.resize((160, 107))
    exif[0x0112] = turn
    for size in (None, (40, 100)):
        for format in {"JPEG", "PNG", "WEBP", "TIFF", "AVIF"} & {*FORMATS}:
            data = encode(photo, format, exif=exif)
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
    for mode in ("P", "1", "L"):
        data = encode(photo.convert(mode))
        assert deviation(decode(data), reference(data)) == 0
    cmyk = encode(photo.convert("CMYK"), "JPEG", quality=95)
    assert deviation(decode(cmyk), reference(cmyk)) == 0
    seen_through = photo.convert("P")
    data = encode(seen_through, transparency=bytes(range(256)))
    assert deviation(decode(data), on_white(data)) == 0
    assert decode(encode(photo.convert("L"), "JPEG")).shape == (50, 70, 3)


@pytest.mark.parametrize("size", [None, (20, 30)])
@pytest.mark.parametrize("channels", ["L", "RGB"])
@pytest.mark.parametrize(
    ("mode", "format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG")]
)
def test_alpha_is_laid_on_white_as_pillow_composes_it(mode, format, channels, size):
    photo = PHOTO.resize((70, 50)).convert(mode)
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    how = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = encode(photo, format, **how)
    expected = on_white(data, size, channels)
    assert deviation(decode(data, size=size, grayscale=channels == "L"), expected) == 0
    seen = np.asarray(photo.convert("RGBA"), float)
    share = seen[:, :, 3:] / 255
    by_hand = share * seen[:, :, :3] + (1 - share) * 255
    np.testing.assert_allclose(on_white(data), by_hand, atol=1)


def test_the_value_that_is_seen_through_is_white():
    """PNG's tRNS of gray images of 8 and 16 bits and of colour."""
    pixels = np.array([[0, 40, 200]], np.uint8)
    for image, clear in (
        (Image.fromarray(pixels), 40),
        (Image.fromarray(pixels.astype(np.uint16) * 257), 40 * 257),
        (Image.fromarray(np.stack([pixels] * 3, axis=2)), (40, 40, 40)),
    ):
        found = decode(encode(image, transparency=clear), grayscale=True)
        assert found[:, :, 0].tolist() == [[0, 255, 200]]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


# ---------------------------------------------------------------------- EXIF's orientation


def segment(marker, data):
    return b"\xff" + bytes([marker]) + (len(data) + 2).to_bytes(2, "big") + data


def exif(order, *entries):
    """An APP1 segment of these entries (tag, type, count, four bytes of value)."""
    head = {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}[order]
    table = b"".join(struct.pack(order + "HHL", *entry[:3]) + entry[3] for entry in entries)
    count = struct.pack(order + "H", len(entries))
    return segment(0xE1, b"Exif\0\0" + head + count + table + bytes(4))


def orientation(order, turn, type=3):
    return 0x0112, type, 1, struct.pack(order + {3: "Hxx", 4: "L"}[type], turn)


WHERE = {
    "first": lambda app1: app1,
    "fill bytes": lambda app1: b"\xff\xff\xff" + app1,
    "fill bytes behind another segment": lambda app1: segment(0xFE, b"text") + b"\xff" * 9 + app1,
    "a marker that stands alone": lambda app1: b"\xff\x01" + app1,
    "a restart marker": lambda app1: b"\xff\xd3\xff\xff\xd0" + app1,
    "stray bytes": lambda app1: segment(0xFE, b"\xff\xe1") + b"stray" + app1,
    "XMP first": lambda app1: segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>") + app1,
    "two": lambda app1: app1 + exif("<", orientation("<", 2)),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("type", [3, 4])
def test_the_fast_path_finds_the_orientation_wherever_jpeg_allows_it(
    where, order, type, monkeypatch
):
    whole = encode(PHOTO.resize((160, 107)), "JPEG", quality=90)
    make = (0x010F, 2, 4, b"jdl\0")
    app1 = exif(order, make, orientation(order, 6, type))
    data = whole[:2] + WHERE[where](app1) + whole[2:]
    expected = decode(whole[:2] + app1 + whole[2:], exact=True)
    if where != "a marker that stands alone":  # with which Pillow refuses it
        np.testing.assert_array_equal(decode(data, exact=True), expected)
    assert expected.shape == (160, 107, 3)  # turned
    assert images.jpeg_orientation(data) == 6
    if images.simplejpeg is not None and where != "stray bytes":  # which it refuses
        monkeypatch.setattr(images, "_with_pillow", None)
    assert deviation(decode(data), expected) < 4


def pillows_orientation(data):
    with Image.open(io.BytesIO(data)) as image:
        return images._orientation(image)


@pytest.mark.filterwarnings("ignore")
def test_the_orientation_is_pillows_in_unusual_and_damaged_exif_data():
    jpeg = encode(PHOTO.resize((16, 16)), "JPEG")
    xmp = b'http://ns.adobe.com/xap/1.0/\0<rdf tiff:Orientation="3"/>'
    cases = [exif(o, orientation(o, turn, t)) for o in "<>" for t in (3, 4) for turn in range(12)]
    cases += [
        exif(o, (0x0112, t, n, b"\6\0\0\6")) for o in "<>" for t in range(14) for n in (0, 1, 2)
    ]
    cases += [segment(0xE1, xmp), segment(0xE1, xmp) + cases[3], cases[20] + segment(0xE1, xmp)]
    cases += [b"", segment(0xE1, b"Exif\0\0"), segment(0xE1, b"Exif\0\0MM"), cases[7] + cases[9]]
    found = [images.jpeg_orientation(jpeg[:2] + case + jpeg[2:]) for case in cases]
    assert found == [pillows_orientation(jpeg[:2] + case + jpeg[2:]) for case in cases]
    assert {*found} == {*range(1, 9)}
    assert found[-7] in (1, 3)  # from XMP, which not all versions of Pillow read
    rng = np.random.default_rng(0)
    compared = 0
    for case in itertools.islice(itertools.cycle(cases), 4000):
        data = bytearray(jpeg[:2] + case + jpeg[2:])
        for at in rng.integers(2, len(case) + 24, rng.integers(1, 4)):
            data[at] = rng.choice([0, 1, 2, 6, 0xFF, 0xE1, 0x12, rng.integers(256)])
        try:
            expected = pillows_orientation(bytes(data))
        except Exception:  # it is no JPEG for Pillow
            continue
        compared += 1
        assert images.jpeg_orientation(bytes(data)) == expected, bytes(data[: len(case) + 30])
    assert compared > 3000


def test_many_pieces_of_exif_data_take_no_quadratic_time():
    pieces = segment(0xE1, b"Exif\0\0x") * 400_000
    start = time.process_time()
    assert images.jpeg_orientation(b"\xff\xd8" + pieces + b"\xff\xd9") == 1
    assert time.process_time() - start < 20  # a second or so; quadratic: minutes


# ---------------------------------------------------------------------- depths and pages


def tiff(values, order="<", **tags):
    """An uncompressed TIFF of one strip, written by hand: Pillow does not write all kinds."""
    height, width = values.shape[:2]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    fields = {
        256: width,
        257: height,
        258: 8 * values.itemsize,
        259: 1,
        262: 1,
        277: 1,
        278: height,
    }
    fields |= {273: 8, 279: len(data)} | {int(tag[1:]): value for tag, value in tags.items()}
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8 + len(data))
    table = b"".join(struct.pack(order + "HHLL", tag, 4, 1, fields[tag]) for tag in sorted(fields))
    return head + data + struct.pack(order + "H", len(fields)) + table + bytes(4)


@pytest.mark.parametrize("order", "<>")
def test_deep_tiffs_are_scaled_and_numbers_of_unknown_range_refused(order):
    gray = np.random.default_rng(0).integers(256, size=(9, 8), dtype=np.uint8)
    deep = gray.astype(np.uint16) * 257
    for values in (gray, deep):
        found = decode(tiff(values, order), grayscale=True)[:, :, 0]
        np.testing.assert_array_equal(found, gray)
    if order == "<":  # Pillow reads the opposite of 16 bits in this byte order alone
        found = decode(tiff(deep, order, _262=0), grayscale=True)[:, :, 0]
        np.testing.assert_array_equal(found, 255 - gray)
        pairs = (gray.astype(np.uint16) * 16 + gray // 16).reshape(-1, 2)  # of 12 bits
        twelve = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
        packed = np.stack(twelve, 1).astype(np.uint8).reshape(9, 12)
        found = decode(tiff(packed, order, _256=8, _258=12), grayscale=True)[:, :, 0]
        np.testing.assert_array_equal(found, gray)
    for values, kind, what in (
        (gray / np.float32(255), 3, "32-bit floating-point"),
        (deep.astype(np.int16), 2, "16-bit signed"),
        (deep.astype(np.int32), 2, "32-bit signed"),
        (gray.astype(np.int8), 2, "8-bit signed"),
    ):
        with pytest.raises(BadImage, match=f"it holds {what} numbers, whose range is not known"):
            decode(tiff(values, order, _339=kind))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_compressed_tiffs_and_the_first_of_several_pages(compression):
    pages = [PHOTO, ImageOps.invert(PHOTO)]
    for turn in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = turn
        options = {"save_all": True, "append_images": pages[1:], "exif": exif}
        data = encode(pages[0], "TIFF", compression=compression, **options)
        assert deviation(decode(data, size=(50, 70)), reference(data, (50, 70))) == 0


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_window_of_a_tiff_is_that_of_the_picture_upright(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    size, crop = (20, 20), images.Crop(0.7, 0.2, 0.9)
    stored = encode(PHOTO, "TIFF", exif=exif)
    upright = encode(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))))
    found = decode(stored, size=size, crop=crop)
    np.testing.assert_array_equal(found, decode(upright, size=size, crop=crop))


def test_a_hostile_tiff_spends_no_memory():
    gray = np.zeros((4, 4), np.uint8)
    with pytest.raises(BadImage, match="90000 × 90000 pixels, more than"):
        decode(tiff(gray, _256=90_000, _257=90_000))
    with pytest.raises(BadImage, match="tiles of 90000 × 90000 pixels, more than"):
        decode(tiff(gray, _322=90_000, _323=90_000, _324=8, _325=16))
    for tags in ({"_258": 0}, {"_258": 1 << 31}, {"_277": 60_000}, {"_273": 1 << 31}, {"_259": 8}):
        with pytest.raises(BadImage):
            decode(tiff(gray, **tags))


# ---------------------------------------------------------------------- what is refused


def test_bytes_that_are_no_image_are_refused():
    whole = encode(PHOTO, "JPEG")
    png = encode(PHOTO)
    for data in (whole[:100], whole[: len(whole) // 2], png[:2000], encode(PHOTO, "TIFF")[:300]):
        with pytest.raises(BadImage, match="cannot be decoded"):
            decode(data, size=(8, 8))
    for data in (whole, png):
        with pytest.raises(BadImage, match="640 × 427 pixels, more than the 100000"):
            decode(data, max_pixels=100_000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^it is empty \(0 bytes\)$"),
        (b"<!DOCTYPE html><title>404", "but HTML or XML: it begins with b'<!DOCTYPE html><'"),
        (b"\n <HTML><body>", "but HTML or XML"),
        (b"<?xml version='1.0'?><Error>", "but HTML or XML"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "but gzip"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "but HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "but a pointer of Git LFS"),
        (b"hello", "of an unknown kind: it begins with b'hello'"),
        (bytes(600), r"of an unknown kind: it begins with b'(\\x00){16}'"),
    ],
)
def test_what_is_no_image_is_named(data, message):
    with pytest.raises(BadImage, match=message) as caught:
        decode(data, size=(8, 8))
    assert "0x7f" not in str(caught.value)


def test_a_format_that_pillow_was_built_without_is_named(monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(BadImage, match="the Pillow installed reads no Avif"):
        decode(b"\0\0\0\x20ftypavif\0\0\0\0")


def png_bomb(width, height):
    bomb = bytearray(encode(Image.new("L", (1, 1))))
    bomb[16:24] = struct.pack(">LL", width, height)
    bomb[29:33] = struct.pack(">L", zlib.crc32(bytes(bomb[12:29])))
    return bytes(bomb)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_an_image_bomb_is_refused_before_memory_is_spent(side):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as with `python -W error`
        with pytest.raises(
            BadImage, match=f"it has {side} × {side} pixels, more than the 67108864"
        ):
            decode(png_bomb(side, side), size=(8, 8))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "PPM", "TIFF"])
@pytest.mark.parametrize("limit", [100, None])
def test_max_pixels_holds_alone_whatever_pillows_own_limit(format, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(images, "simplejpeg", None)
    data = encode(PHOTO, format)
    if format == "TIFF" and limit is not None:  # whose plugin applies it to its parts
        with pytest.raises(BadImage, match="Pillow refuses it by its MAX_IMAGE_PIXELS"):
            decode(data)
    else:
        assert decode(data, max_pixels=427 * 640).shape == (427, 640, 3)
    with pytest.raises(BadImage, match="640 × 427 pixels, more than the 273279"):
        decode(data, max_pixels=427 * 640 - 1)
    assert limit == Image.MAX_IMAGE_PIXELS


# ---------------------------------------------------------------------- members' names


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_images_of_all_formats_are_found_by_name_and_those_not_read_are_reported(
    tmp_path, caplog, capsys
):
    small = PHOTO.resize((30, 20))
    names = {"TIFF": "tif TIFF", "JPEG2000": "jp2 j2k", "AVIF": "avif", "PNG": "png"}
    found = {k: encode(small, f) for f in {*names} & {*FORMATS} for k in names[f].split()}
    members = [(f"a/1.{kind}", data) for kind, data in found.items()]
    others = ["2.HEIC", "3.heic", "4.svg", "heic", "5.heic.txt", "._2.heic", "6.hei", "7.txt"]
    path = write_tar(tmp_path / "a.tar", members + [(f"a/{name}", b"") for name in others])
    with caplog.at_level(logging.WARNING, "jdl.data"):
        data = from_tar(path, size=(20, 30), batch_size=len(members), exact=True)
        told = "images of these formats are not read: 2 × .heic, 1 × .svg"
        assert caplog.text.count(told) == 1
        from_tar(path, size=(20, 30), batch_size=1)  # opened again, it is not told again
    assert caplog.text.count(told) == 1
    (batch,) = data
    expected = [reference(each, (20, 30)) for each in found.values()]
    np.testing.assert_array_equal(batch["image"], expected)
    assert main(["index", path]) == 0
    assert "images of a format that is not read: 2 × .heic, 1 × .svg" in capsys.readouterr().out
    assert main(["index", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unread"] == {"heic": 2, "svg": 1}
