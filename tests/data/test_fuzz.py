"""Damaged archives, images and index files: clean errors, bounded memory, nothing invented.

Every mutation follows from its number. `make test` runs some hundred, `make test-release` ten
thousand in a process whose memory is limited.
"""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from jdl.core.check import UserError
from jdl.data import TarSource, decode, describe, from_tar
from jdl.data.images import BadImage
from jdl.data.tar import index as tar_index
from jdl.data.tar import scan
from jdl.data.tar.open import open_archive
from jdl.data.tar.stream import MemberStream

QUICK, MANY = 200, 10_000
MEMORY = 1 << 30  # bytes that all mutations together may need beyond what imports take
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"]
IMAGE_FORMATS += ["JPEG2000"] if features.check("jpg_2000") else []
IMAGE_FORMATS += ["AVIF"] if "avif" in features.modules and features.check("avif") else []


def encode(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photo(seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize((40, 30), Image.Resampling.BICUBIC)


def archive(format):
    """A tar with a name too long for a header, a folder, links, an image twice, and images."""
    out = io.BytesIO()
    long = format != tarfile.USTAR_FORMAT
    with tarfile.open(fileobj=out, mode="w", format=format, pax_headers={"comment": "x"}) as tar:
        for i in range(8):
            data = encode(photo(i), "PNG" if i % 2 else "JPEG")
            name = f"train/{i % 3}/{'n' * (120 if long and i == 3 else 5)}{i}.{'jpg', 'png'}"
            info = tarfile.TarInfo(name.replace("('jpg', 'png')", "png" if i % 2 else "jpg"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind, name, target in (
            (tarfile.DIRTYPE, "train/9", ""),
            (tarfile.SYMTYPE, "train/link.png", "0/nnnnn0.jpg"),
            (tarfile.LNKTYPE, "train/hard.jpg", "train/1/nnnnn1.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("./train/2/nnnnn2.jpg")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def header_places(whole):
    """Where the headers of an archive stand."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        return [info.offset for info in tar] + [info.offset_data - 512 for info in tar]


def mutate(rng, whole, places=None):
    """A few bytes changed, preferably at `places`; a cut, a piece gone, doubled or zeroed."""
    data = bytearray(whole)
    kind = rng.integers(8)
    if kind < 4 or len(data) < 8:
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data)))
            if places is not None and rng.random() < 0.7:
                at = min(places[rng.integers(len(places))] + int(rng.integers(512)), len(data) - 1)
            data[at] = rng.integers(256)
    elif kind == 4:
        del data[int(rng.integers(len(data))) :]
    else:
        start = int(rng.integers(len(data)))
        stop = min(start + int(rng.integers(1, 2000)), len(data))
        piece = bytes(data[start:stop])
        data[start:stop] = {5: b"", 6: piece * 2, 7: bytes(len(piece))}[int(kind)]
    return bytes(data)


def number_fields(rng, whole, places):
    """A header's size, type or checksum replaced by a hostile one, its checksum made right."""
    data = bytearray(whole)
    at = places[rng.integers(len(places))]
    sizes = [b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"99999999999\0"]
    sizes += [b"%011o\0" % int(rng.integers(1 << 34)), b"\xff" * 12, bytes(12), b"0x1234567  \0"]
    data[at + 124 : at + 136] = sizes[rng.integers(len(sizes))]
    if rng.random() < 0.5:
        data[at + 156] = int(rng.choice(list(b"0125gxLKSXVM7\0\xff")))
    if rng.random() < 0.8:
        block = bytes(data[at : at + 512])
        total = sum(block[:148]) + sum(block[156:]) + 256
        data[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(data)


def plain(name):
    """The form in which we have a member's name."""
    parts = unicodedata.normalize("NFC", name).split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def read_by_tarfile(data):
    """Python's own reading of the same bytes, up to its first error.

    Returns offset -> (name, contents), and if there is no error the links' name -> contents.
    """
    found, links = {}, {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            while (info := tar.next()) is not None:
                if info.islnk() or info.issym():
                    links[plain(info.name)] = info
                if info.isreg() and not info.sparse and info.offset_data + info.size <= len(data):
                    name = info.name.encode("utf-8", "surrogateescape")
                    contents = tar.extractfile(info).read()
                    name = plain(name.decode("utf-8", "backslashreplace"))
                    found[info.offset_data] = name, contents
            links = {name: tar.extractfile(info).read() for name, info in links.items()}
    except Exception:  # hostile bytes make tarfile raise anything
        links = {}
    return found, links


def read_by_pillow(data, size):
    """Pillow's own decoding, upright and resized; None if it has none."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.mode not in ("RGB", "L") or "transparency" in image.info:
                return None
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(upright.resize(size[::-1], Image.Resampling.BILINEAR))
    except Exception:
        return None


class Mutations:
    """Valid archives, images and an index, and what is done to them.

    `read` counts the records that were read, `confirmed` those that Python or Pillow read likewise.
    """

    def __init__(self, folder):
        self.path = str(folder / "a.tar")
        self.tars = [archive(format) for format in FORMATS]
        self.places = [header_places(tar) for tar in self.tars]
        self.images = [encode(photo(), format) for format in IMAGE_FORMATS]
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
            self.images.append(encode(photo(), "TIFF", compression=compression))
        Path(self.path).write_bytes(self.tars[0])
        self.index = self.path + tar_index.SUFFIX
        tar_index.open_index(self.path)
        self.whole_index = Path(self.index).read_bytes()
        self.refused = self.used = self.read = self.confirmed = self.links = 0

    def run(self, number):
        rng = np.random.default_rng(number)
        (self.tar, self.tar, self.image, self.index_file, self.stream)[number % 5](rng)

    def tar(self, rng):
        which = rng.integers(len(self.tars))
        spoil = number_fields if rng.random() < 0.5 else mutate
        data = spoil(rng, self.tars[which], self.places[which])
        Path(self.path).write_bytes(data)
        about = describe(self.path, keep_index=False)
        json.dumps(about._asdict())
        assert all(d["word"] in WORDS and d["detail"] for d in about.damage)
        try:
            source = TarSource(self.path, keep_index=False)
        except UserError:
            self.refused += 1
            return
        self.compare(source, data)
        self.used += 1
        lost = any(d["lost"] for d in about.damage)
        options = {"size": (8, 8), "batch_size": 4, "threads": 0, "keep_index": False}
        if lost:
            with pytest.raises(UserError):
                from_tar(self.path, **options)
        try:
            skipping = from_tar(self.path, on_error="skip", max_skipped=1.0, **options)
            assert sum(b["mask"].sum() for b in skipping) + skipping.skipped == len(source)
        except UserError:
            self.refused += 1

    def compare(self, source, data):
        """Each record against the bytes at its place, and against tarfile where that reads it."""
        reference, links = read_by_tarfile(data)
        (index,) = source.indexes
        rows = np.flatnonzero(index.columns.kinds == scan.IMAGE).tolist()
        for record, row in zip(source, rows, strict=True):
            place = int(index.columns.offsets[row])
            assert record.name == index.name(row)
            assert record.data == data[place : place + index.columns.sizes[row]]
            self.read += 1
            if place in reference and record.name == reference[place][0]:
                assert record.data == reference[place][1]
                self.confirmed += 1
            elif place in reference:
                assert record.data == links.get(record.name, record.data)
                self.links += record.name in links

    def image(self, rng):
        data = mutate(rng, self.images[rng.integers(len(self.images))])
        try:
            pixels = decode(data, size=(8, 8), max_pixels=1 << 22)
        except BadImage:
            self.refused += 1
        else:
            assert pixels.shape == (8, 8, 3)
            self.used += 1
            exact = decode(data, size=(8, 8), max_pixels=1 << 22, exact=True)
            reference = read_by_pillow(data, (8, 8))
            if reference is not None:
                np.testing.assert_array_equal(exact, reference)
                self.confirmed += 1
            self.read += 1

    def index_file(self, rng):
        Path(self.path).write_bytes(self.tars[0])
        os.utime(self.path, ns=(0, json.loads(self.header())["stamp"]["mtime_ns"]))
        data = bytearray(mutate(rng, self.whole_index))
        if rng.random() < 0.5:  # a change that the header does not give away
            start = 18 + len(self.header())
            at = int(rng.integers(start, len(self.whole_index)))
            data = bytearray(self.whole_index)
            data[at] ^= 1 << int(rng.integers(8))
        Path(self.index).write_bytes(data)
        source = TarSource(self.path)
        for i in range(len(source)):
            assert source[i].data in self.tars[0]
        self.used += 1

    def header(self):
        length = int.from_bytes(self.whole_index[10:18], "little")
        return self.whole_index[18 : 18 + length]

    def stream(self, rng):
        which = rng.integers(len(self.tars))
        data = self.tars[which]
        if rng.random() < 0.5:
            data = gzip.compress(mutate(rng, data, self.places[which]), 1)
        else:
            data = mutate(rng, gzip.compress(data, 1))
        path = self.path + ".gz"
        Path(path).write_bytes(data)
        about = describe(path, keep_index=False)
        assert all(d["word"] in WORDS and d["detail"] for d in about.damage)
        opened = open_archive(path)
        streamed = [(m.name, m.data) for m in MemberStream(opened) if m.image]
        index = tar_index.open_index(path, keep=False)
        offsets, sizes, kinds, *_ = index.columns
        rows = np.flatnonzero(np.isin(kinds, (scan.IMAGE, scan.OLDER))).tolist()
        indexed = [(index.name(i), opened.pread(int(sizes[i]), int(offsets[i]))) for i in rows]
        opened.close()
        assert np.sum(kinds == scan.IMAGE) == about.images
        assert set(streamed) <= set(indexed)  # it cannot go back behind a bad header
        assert len(streamed) <= len(indexed)
        self.used += 1


WORDS = {"damaged", "checksum", "truncated", "sparse", "concatenated", "link", "duplicate"}


def run_all(folder, numbers):
    warnings.simplefilter("ignore")  # of Pillow's, about sizes
    mutations = Mutations(folder)
    for number in numbers:
        try:
            mutations.run(number)
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {error!r}") from error
    return mutations


def test_mutations_are_read_as_tarfile_does_or_refused(tmp_path):
    done = run_all(tmp_path, range(QUICK))
    assert done.refused > QUICK // 20
    assert done.used > QUICK // 4
    assert done.confirmed > done.read // 2
    assert done.links > QUICK // 20


def peak_memory():
    """The most bytes this process ever held; `ru_maxrss` would begin with its parent's."""
    (line,) = (a for a in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in a)
    return int(line.split()[1]) * 1024


@pytest.mark.release
def test_ten_thousand_mutations_in_bounded_memory(tmp_path):
    code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_fuzz
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
before = test_fuzz.peak_memory()
done = test_fuzz.run_all(Path({str(tmp_path)!r}), range({MANY}))
print(done.used, done.refused, before, test_fuzz.peak_memory())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    used, refused, before, peak = map(int, ran.stdout.split())
    print(f"{used} read, {refused} refused, {(peak - before) / 2**20:.0f} MiB")
    assert used + refused >= MANY
    assert peak - before < MEMORY
    assert peak < 3 << 30


# ---------------------------------------------------------------------- round trips


PARTS = (
    st.text(
        st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs",)),
        min_size=1,
        max_size=40,
    )
    .map(plain)
    .filter(lambda s: s not in (".", "..") and len(s.encode()) <= 120)
)


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
@given(
    files=st.dictionaries(
        st.tuples(st.sampled_from("abc"), PARTS), st.binary(max_size=1500), min_size=1, max_size=6
    )
)
@settings(max_examples=12, deadline=None)
def test_what_gnu_tar_writes_is_read_member_by_member(format, files, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    short = format in ("v7", "ustar")
    expected = {}
    for i, ((folder, base), data) in enumerate(files.items()):
        base = base if not short or len(base.encode()) < 80 else f"{i}"
        (root / folder).mkdir(exist_ok=True)
        (root / folder / base).write_bytes(data)
        expected[plain(f"{folder}/{base}")] = data
    path = root.with_suffix(".tar")
    command = ["tar", f"--format={format}", "-cf", str(path), "-C", str(root), *os.listdir(root)]
    subprocess.run(command, check=True)
    index = tar_index.open_index(str(path), keep=False)
    assert index.damage == ()
    found = {}
    with open(path, "rb") as file:
        for i in range(len(index)):
            file.seek(index.columns.offsets[i])
            found[index.name(i)] = file.read(index.columns.sizes[i])
    assert {name: data for name, data in found.items() if "/" in name} == expected
    with tarfile.open(path) as tar:
        names = [plain(info.name) for info in tar]
    assert names == [index.name(i) for i in range(len(index))]


def test_an_archive_inside_an_archive_is_one_member(tmp_path):
    """A header inside a member that is no image does not make its size wrong."""
    inner = archive(tarfile.GNU_FORMAT)
    path = tmp_path / "outer.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("inner.tar", inner), ("a/0.png", encode(photo(), "PNG"))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = bytearray(path.read_bytes())
    assert describe(path, keep_index=False).images == 1
    del whole[-10240:]
    path.write_bytes(whole[:4096])  # a cut in the inner archive
    assert describe(path, keep_index=False).images == 0


def test_a_member_that_claims_more_than_the_archive_holds(tmp_path):
    whole = bytearray(archive(tarfile.USTAR_FORMAT))
    places = sorted(set(header_places(whole)))
    at = places[2]
    name = bytes(whole[at : at + 100]).rstrip(b"\0").decode()
    whole[at + 124 : at + 136] = b"%011o\0" % (len(whole) * 3)
    block = bytes(whole[at : at + 512])
    total = sum(block[:148]) + sum(block[156:]) + 256
    whole[at + 148 : at + 156] = b"%06o\0 " % total
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    about = describe(path, keep_index=False)
    assert about.images == 10  # a later one has the name of the one with the wrong size
    (only,) = about.damage
    assert (only["word"], only["name"]) == ("truncated", name)
