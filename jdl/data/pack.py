"""Rewrites images as plain, sharded tars: the same source always gives the same bytes.

Members are in their source's order (folders by name), headers have no owner or time, and shards
depend on sizes alone. Each shard appears when it is complete. Encoded images are copied as they are
unless they are resized; arrays become PNGs.
"""

import contextlib
import glob
import io
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jdl.core import check
from jdl.data import images
from jdl.data.labels import sidecar_key
from jdl.data.pack_sources import SIDECARS, Members, Skip, is_image, read
from jdl.data.tar.archive import STDIN, is_url
from jdl.data.tar.index import SUFFIX
from jdl.data.tar.paths import expand, tars_in

SHARD_BYTES = 1 << 30
_QUALITY = 95
_MAX_SAMPLE = 64  # members
_PATTERN = re.compile(r"%0(\d+)d")


class Packed(NamedTuple):
    """What `pack` has written.

    Attributes:
      shards: the tars.
      members: how many they hold.
      bytes: their size.
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
        images, an `.npz` of arrays, a tar, plain or compressed, a URL, a glob, or "-".
      out: the tars' path, with `%05d` where a shard's number goes; without it there is one tar.
      shard_bytes: a shard ends before it would be larger.
      shard_images: or before it would hold more images; the members of a WebDataset sample stay
        together.
      size: (height, width) to resize to; JPEGs stay JPEGs, of quality 95, and others become PNGs.
      on_error: at an image that cannot be decoded (when resizing), or a damaged archive, `"raise"`
        an error or `"skip"` it.
      overwrite: replace existing shards, and remove further ones of an earlier run.
      progress: called with the number of members so far.

    Raises:
      DataError: if something cannot be packed, naming it and why.
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
            count = sum(is_image(name) for name, _ in sample)
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
    """Raises if a shard would replace a tar that is to be read."""
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


def _samples(members: Members) -> Iterator[list[tuple[str, bytes]]]:
    """Members that stay together: an image and its sidecars."""
    for _, run in itertools.groupby(members, lambda member: sidecar_key(member[0])[0]):
        while some := list(itertools.islice(run, _MAX_SAMPLE)):
            whole = any(sidecar_key(name)[1] in SIDECARS for name, _ in some)
            yield from [some] if whole else ([member] for member in some)


def header(name: str, size: int) -> bytes:
    """The header of a regular member, with only its name and size."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:  # too long a name, or too large a file
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


class _Shards:
    """Tars written one after the other, each under its final name once it is complete."""

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
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "_Shards":
        return self

    def write(self, blocks: bytes) -> None:
        self._file = self._file or self._open()
        self._file.write(blocks)
        self.bytes += len(blocks)

    def _open(self) -> IO[bytes]:
        path = self._out % len(self.shards) if self._numbered else self._out
        if os.path.exists(path) and not self._overwrite:
            raise check.DataError(f"{path!r} is there already. Pass overwrite to replace it.")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._path = path
        return open(f"{path}.{os.getpid()}.tmp", "wb")

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
                    os.unlink(path + SUFFIX)


def _resized(members: Members, size: tuple[int, int], skip: Skip) -> Members:
    from PIL import Image

    for name, data in members:
        if not is_image(name):
            yield name, data
            continue
        try:
            pixels = images.decode(data, size=size, grayscale=images.is_gray(data), exact=True)
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
