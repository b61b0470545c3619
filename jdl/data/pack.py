"""Rewrites images as plain, sharded tars: the same bytes from the same source, every time.

Members are sorted as their source has them (folders by name), headers say nothing of who packed
them or when, and shards are cut by size alone. Each shard appears when it is whole. What is already
an encoded image is copied as it is unless it is resized; arrays become PNGs.
"""

import contextlib
import glob
import io
import itertools
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdl.core import check
from jdl.data import images
from jdl.data.labels import sidecar_key
from jdl.data.tar import index, inflate, scan
from jdl.data.tar.archive import STDIN, is_url
from jdl.data.tar.open import open_archive
from jdl.data.tar.paths import expand, tars_in
from jdl.data.tar.stream import MemberStream

SHARD_BYTES = 1 << 30
_QUALITY = 95
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_MAX_IDX = 1 << 34
_SIDECARS = ("cls", "json", "txt")
_MAX_SAMPLE = 64  # members
_PATTERN = re.compile(r"%0(\d+)d")

Members = Iterator[tuple[str, bytes]]


class Packed(NamedTuple):
    """What has been written.

    Attributes:
      shards: the tars.
      members: how many they hold.
      bytes: how large they are.
      skipped: what could not be used: (name, why).
    """

    shards: list[str]
    members: int
    bytes: int
    skipped: list[tuple[str, str]]


def pack(
    source: str,
    out: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_images: int | None = None,
    size: tuple[int, int] | None = None,
    on_error: str = "raise",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda members: None,
) -> Packed:
    """Writes the images of `source` to the tars `out`.

    Args:
      source: a folder of images or of IDX files (MNIST's format, plain or .gz), one IDX file of
        images, an `.npz` of arrays, a tar, plain or compressed, an URL, a glob, or "-".
      out: the tars' path, with `%05d` where a shard's number goes; without it there is one tar.
      shard_bytes: a shard ends before it would be larger.
      shard_images: or before it would hold more images; what a WebDataset sample has beside its
        image stays with it.
      size: (height, width) to resize to; JPEGs stay JPEGs, of quality 95, and others become PNGs.
      on_error: at an image that cannot be decoded (when resizing), or a damaged archive, `"raise"`
        an error or `"skip"` it.
      overwrite: replace shards that are there; of more that an earlier run wrote, none is left.
      progress: called with the number of members so far.

    Raises:
      DataError: naming what cannot be packed and why.
    """
    check.positive_int("shard_bytes", shard_bytes)
    if shard_images is not None:
        check.positive_int("shard_images", shard_images)
    check.one_of("on_error", on_error, ("raise", "skip"))
    skipped: list[tuple[str, str]] = []

    def skip(name: str, why: str) -> None:
        if on_error == "raise":
            raise check.DataError(f'{name}: {why}. To leave such out, pass on_error="skip".')
        skipped.append((name, why))

    _check_apart(source, out)
    members = read(source, skip)
    if size is not None:
        members = _resized(members, size, skip)
    total = pictures = 0
    with _Shards(out, overwrite) as sink:
        for sample in _samples(members):
            blocks = [header(n, len(data)) + data + bytes(-len(data) % 512) for n, data in sample]
            count = sum(_is_image(name) for name, _ in sample)
            full = sink.bytes + sum(map(len, blocks)) + 1024 > shard_bytes
            full |= shard_images is not None and sink.images + count > shard_images
            if full and sink.bytes:
                sink.next_shard()
            for block in blocks:
                sink.write(block)
                total += 1
                progress(total)
            sink.images += count
            pictures += count
        if not pictures:
            raise check.DataError(_nothing(source, skipped))
    return Packed(sink.shards, total, sink.total, skipped)


def _check_apart(source: str, out: str) -> None:
    """Raises where a shard would replace a tar that is to be read."""
    if source == STDIN or is_url(source):
        return
    folder = Path(source)
    shard = _PATTERN.sub("[0-9]+", re.escape(os.path.abspath(out)))
    for path in tars_in(folder) if folder.is_dir() else expand(source):
        check.argument(
            not re.fullmatch(shard, os.path.abspath(path)),
            "OUT",
            "apart from the tars that are packed",
            out,
            f"It would replace {path!r}.",
        )


def _nothing(source: str, skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return f"{source!r} holds no images."
    name, why = skipped[0]
    return f"{source!r}: none of the {len(skipped)} images could be used. The first: {name}: {why}."


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower().encode() in scan.IMAGE_EXTENSIONS


def _samples(members: Members) -> Iterator[list[tuple[str, bytes]]]:
    """Members not to be parted: an image and what stands beside it under its key."""
    for _, run in itertools.groupby(members, lambda member: sidecar_key(member[0])[0]):
        while some := list(itertools.islice(run, _MAX_SAMPLE)):
            whole = any(sidecar_key(name)[1] in _SIDECARS for name, _ in some)
            yield from [some] if whole else ([member] for member in some)


def header(name: str, size: int) -> bytes:
    """The header of a regular member, with nothing in it but its name and size."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:  # too long a name, or too large a file
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


class _Shards:
    """Tars written one after the other, each under its name when it is whole."""

    def __init__(self, out: str, overwrite: bool):
        self._out, self._overwrite = out, overwrite
        marks = _PATTERN.findall(out)
        check.argument(
            len(marks) <= 1 and out.endswith(".tar") and "%" not in _PATTERN.sub("", out),
            "OUT",
            "a path that ends in .tar, with one %05d for a shard's number or none",
            out,
        )
        self._numbered = bool(marks)
        self.shards: list[str] = []
        self.bytes = self.images = self.total = 0
        self._file: Any = None

    def __enter__(self) -> "_Shards":
        return self

    def write(self, blocks: bytes) -> None:
        if self._file is None:
            self._open()
        self._file.write(blocks)
        self.bytes += len(blocks)

    def _open(self) -> None:
        path = self._out % len(self.shards) if self._numbered else self._out
        if os.path.exists(path) and not self._overwrite:
            raise check.DataError(f"{path!r} is there already. Pass overwrite to replace it.")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._path = path
        self._file = open(f"{path}.{os.getpid()}.tmp", "wb")  # noqa: SIM115

    def next_shard(self) -> None:
        """Ends the shard; the next member begins another."""
        if not self._numbered:
            raise check.ArgumentError(
                "`OUT` must have a %05d for the shard's number, as OUT-%05d.tar: the images fill "
                f"more than one shard; got {self._out!r}."
            )
        self._finish()

    def _finish(self) -> None:
        if self._file is None:
            return
        self._file.write(bytes(1024))
        self._file.close()
        os.replace(self._file.name, self._path)
        self.shards.append(self._path)
        self.total += self.bytes + 1024
        self._file, self.bytes, self.images = None, 0, 0

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self._finish()
            if self._numbered and self._overwrite:
                self._remove_later()
        elif self._file is not None:
            self._file.close()
            os.unlink(self._file.name)

    def _remove_later(self) -> None:
        """Removes an earlier run's shards with higher numbers than this one's last."""
        head, _, tail = _PATTERN.split(self._out)
        for path in glob.glob(f"{glob.escape(head)}*{glob.escape(tail)}"):
            number = path[len(head) : -len(tail)]
            if not re.fullmatch("[0-9]+", number) or self._out % int(number) != path:
                continue
            if int(number) >= len(self.shards) and os.path.isfile(path):
                os.unlink(path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + index.SUFFIX)


# ---------------------------------------------------------------------- sources


def read(source: str, skip: Callable[[str, str], None]) -> Members:
    """The images that `source` holds, as (name, encoded bytes), with their labels' sidecars."""
    path = Path(source)
    if source == STDIN or is_url(source) or not path.exists():
        yield from _from_tars(source, skip)
    elif path.is_dir():
        idx = sorted(p for p in path.iterdir() if p.is_file() and _is_idx(p))
        if idx:
            yield from _from_idx_folder(idx)
        elif tars := tars_in(path):
            if pictures := next(_pictures(path), None):
                raise check.DataError(
                    f"The folder {source!r} holds both tars and images, such as {tars[0]!r} and "
                    f"{str(pictures)!r}. Pack one kind at a time: from two folders, or the tars "
                    f"by a pattern such as {str(path / '*.tar')!r}."
                )
            for tar in tars:
                yield from _from_tars(tar, skip)
        else:
            for picture in _pictures(path):
                yield picture.relative_to(path).as_posix(), picture.read_bytes()
    elif source.endswith(".npz"):
        yield from _from_npz(path)
    elif _is_idx(path):
        yield from _from_idx(path)
    else:
        yield from _from_tars(source, skip)


def _pictures(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders.sort()  # in place: how os.walk is told the order
        for file in sorted(files):
            path = Path(folder) / file
            if _is_image(file) and not file.startswith("._") and path.is_file():
                yield path


def _from_tars(source: str, skip: Callable[[str, str], None]) -> Members:
    """Images and what stands beside them under their keys, in the order of the archives."""
    for path in expand(source):
        archive = open_archive(path)
        stream = MemberStream(archive)
        known = 0
        for member in stream:
            yield from _told(stream, known, path, skip)
            known = len(stream.damage)
            ending = member.name.rpartition(".")[2].lower()
            if member.image or ending in _SIDECARS:
                yield member.name, member.data
        yield from _told(stream, known, path, skip)
        archive.close()


def _told(stream: MemberStream, known: int, path: str, skip: Callable[[str, str], None]) -> Members:
    for damage in stream.damage[known:]:
        if damage.lost:
            skip(f"{path!r} at byte {damage.offset}", f"{damage.word}: {damage.detail}")
    return iter(())


def _is_idx(path: Path) -> bool:
    head = _start(path, 4)
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in _IDX_TYPES and 1 <= head[3] <= 4


def _start(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        found = b""
        for piece in inflate.pieces(file, 1 << 12):
            found += piece.data
            if len(found) >= size or piece.problem:
                break
    return found[:size]


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, plain or compressed.

    Raises:
      DataError: if it is cut short, too long, or no such file.
    """
    data = bytearray()
    with open(path, "rb") as file:
        for piece in inflate.pieces(file, 1 << 20):
            if piece.problem:
                raise check.DataError(f"{str(path)!r}: {piece.problem}.")
            data += piece.data
            if len(data) > _MAX_IDX:
                raise check.DataError(f"{str(path)!r} has more than {_MAX_IDX} bytes.")
    kind, axes = (data[2], data[3]) if len(data) >= 4 and data[:2] == b"\0\0" else (0, 0)
    if kind not in _IDX_TYPES or len(data) < 4 + 4 * axes:
        raise check.DataError(f"{str(path)!r} is no IDX file.")
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    dtype = np.dtype(_IDX_TYPES[kind])
    expected = 4 + 4 * axes + dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise check.DataError(
            f"{str(path)!r} has {len(data)} bytes, its header says {expected} (shape {shape})."
        )
    return np.frombuffer(data, dtype, offset=4 + 4 * axes).reshape(shape)


def _from_idx_folder(files: list[Path]) -> Members:
    """The images of all these IDX files, each file's in a folder of its own."""
    once = [p for p in files if not (p.suffix == ".gz" and p.with_suffix("") in files)]
    of: dict[str, Path] = {}
    for path in (p for p in once if "images" in p.name or "idx3" in p.name):
        other = of.setdefault(_idx_split(path), path)
        if other is not path:
            raise check.DataError(
                f"{str(other)!r} and {str(path)!r} would both be packed as "
                f"{_idx_split(path)!r}. Pack each from a folder of its own."
            )
    for path in of.values():
        yield from _from_idx(path)


def _idx_split(path: Path) -> str:
    """The split that a file's name tells, else what tells the file from others."""
    parts = re.split(r"[-_.]", path.name.lower())
    split = next((p for p in parts if p in (*_SPLITS, "t10k")), "")
    own = [p for p in parts if p not in ("images", "ubyte", "gz") and not p.startswith("idx")]
    return {"t10k": "test"}.get(split, split) or "-".join(own) or "images"


def _from_idx(path: Path) -> Members:
    """The images of one IDX file, labelled by the file of labels beside it."""
    pixels = read_idx(path)
    label_name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = [p for p in _variants(path.with_name(label_name)) if p.exists() and p != path]
    labels = read_idx(beside[0]) if beside else None
    yield from _from_arrays(pixels, labels, _idx_split(path), str(path))


def _variants(path: Path) -> list[Path]:
    other = path.with_suffix("") if path.suffix == ".gz" else Path(f"{path}.gz")
    return [path, other]


_SPLITS = ("train", "test", "val", "valid")
_IMAGE_KEYS = ("images", "image", "x", "data", "features")
_LABEL_KEYS = ("labels", "label", "y", "targets", "target")


def _from_npz(path: Path) -> Members:
    """Arrays `images` and `labels`, or `x` and `y`; also `x_train`, `train_images` and the like."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zlib.error, KeyError, SyntaxError) as error:
        raise check.DataError(f"{str(path)!r} cannot be read as .npz: {error}.") from error
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        parts = name.lower().split("_")
        split = next((p for p in parts if p in _SPLITS), "")
        rest = "_".join(p for p in parts if p != split)
        for role, keys in (("images", _IMAGE_KEYS), ("labels", _LABEL_KEYS)):
            if rest in keys:
                found.setdefault(split, {})[role] = array
    found = {split: roles for split, roles in found.items() if "images" in roles}
    if not found:
        raise check.DataError(
            f"{str(path)!r} holds no images: it has {', '.join(arrays) or 'no arrays'}, none of "
            f"{', '.join(_IMAGE_KEYS)}, with or without train_ or test_."
        )
    for split, roles in found.items():
        yield from _from_arrays(roles["images"], roles.get("labels"), split, str(path))


def _from_arrays(pixels: np.ndarray, labels: np.ndarray | None, split: str, where: str) -> Members:
    """[split/][label/]number.png of each image, uint8 [n, H, W] or [n, H, W, 1 or 3]."""
    from PIL import Image

    gray = pixels.ndim == 4 and pixels.shape[3] == 1
    pixels = pixels[..., 0] if gray else pixels
    if pixels.dtype != np.uint8 or not (
        pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] == 3)
    ):
        raise check.DataError(
            f"{where!r} must hold uint8 [n, H, W] or [n, H, W, 3], got {pixels.dtype} "
            f"{list(pixels.shape)}."
        )
    if labels is not None and (labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iuSU"):
        raise check.DataError(
            f"{where!r} must have a label for each of its {len(pixels)} images, got "
            f"{labels.dtype} {list(labels.shape)}."
        )
    digits = max(5, len(str(len(pixels) - 1)))
    for i, image in enumerate(pixels):
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG")
        folder = [] if labels is None else [str(labels[i]).replace("/", "_")]
        yield (
            "/".join([*([split] if split else []), *folder, f"{i:0{digits}d}.png"]),
            out.getvalue(),
        )


def _resized(members: Members, size: tuple[int, int], skip: Callable[[str, str], None]) -> Members:
    from PIL import Image

    for name, data in members:
        if not _is_image(name):
            yield name, data
            continue
        try:
            pixels = images.decode(data, size=size, grayscale=_is_gray(data), exact=True)
        except images.BadImage as error:
            skip(repr(name), str(error))
            continue
        out = io.BytesIO()
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        stem = name.rpartition(".")[0]
        if data.startswith(b"\xff\xd8\xff"):
            image.save(out, "JPEG", quality=_QUALITY)
            yield f"{stem}.jpg", out.getvalue()
        else:
            image.save(out, "PNG")
            yield f"{stem}.png", out.getvalue()


def _is_gray(data: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            return image.mode in ("L", "1", "LA", "I", "I;16", "I;16B", "I;16L")
    except Exception as error:
        raise images.BadImage(f"cannot be decoded: {error}") from error
