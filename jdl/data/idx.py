"""IDX files: the format of MNIST, one array per file, plain or compressed."""

import struct
from pathlib import Path

import numpy as np

from jdl.core import check
from jdl.data.tar import inflate

_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_MAX_BYTES = 1 << 34


def is_idx(path: Path) -> bool:
    """Whether a file begins as an IDX file does."""
    head = b""
    with open(path, "rb") as file:
        for piece in inflate.pieces(file, 1 << 12):
            head += piece.data
            if len(head) >= 4:
                break
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in _TYPES and 1 <= head[3] <= 4


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, plain or compressed; a `DataError` if it is none, or cut short."""
    data = bytearray()
    with open(path, "rb") as file:
        for piece in inflate.pieces(file, 1 << 20):
            if piece.problem:
                raise check.DataError(f"{str(path)!r}: {piece.problem}.")
            data += piece.data
            if len(data) > _MAX_BYTES:
                raise check.DataError(f"{str(path)!r} has more than {_MAX_BYTES} bytes.")
    kind, axes = (data[2], data[3]) if len(data) >= 4 and data[:2] == b"\0\0" else (0, 0)
    if kind not in _TYPES or len(data) < 4 + 4 * axes:
        raise check.DataError(f"{str(path)!r} is not an IDX file.")
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    dtype = np.dtype(_TYPES[kind])
    expected = 4 + 4 * axes + dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise check.DataError(
            f"{str(path)!r} has {len(data)} bytes, its header says {expected} (shape {shape})."
        )
    return np.frombuffer(data, dtype, offset=4 + 4 * axes).reshape(shape)
