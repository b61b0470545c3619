"""Makes `digits.tar` from scikit-learn's copy of the digits: `python tests/data/make_digits.py`.

The same bytes on every machine: fixed times, owners and order, and PNGs written here, since a new
version of a library may compress differently.
"""

import io
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

import jdl.data

FOLDER = Path(jdl.data.digits_path()).parent
TEST_SHARE = 5  # every fifth image of a digit, from the third on, is a test image


def png(pixels: np.ndarray) -> bytes:
    """A grayscale PNG of uint8 [H, W], stored rather than compressed: at 8 × 8 that is shorter."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 0)),
        (b"IEND", b""),
    )
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        out += struct.pack(">I", len(data)) + kind + data
        out += struct.pack(">I", zlib.crc32(kind + data))
    return out


def members() -> list[tuple[str, bytes]]:
    """The archive's members: (name, bytes), sorted by name."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # stored as counts of 0 … 16
    found = [("README.md", (FOLDER / "DIGITS.md").read_bytes())]
    for digit in range(10):
        # The data set is ordered by writer: every fifth image gives both splits a share of each.
        for i, n in enumerate(np.flatnonzero(bunch.target == digit)):
            split = "test" if i % TEST_SHARE == TEST_SHARE // 2 else "train"
            found.append((f"{split}/{digit}/{n:04d}.png", png(pixels[n])))
    return sorted(found)


def write(path: str | Path) -> None:
    """Writes the archive."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else FOLDER / "digits.tar"
    write(target)
    print(f"wrote {target}")
