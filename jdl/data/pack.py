"""Rewrites images as plain, sharded tars: the same source always gives the same bytes.

Members are in their source's order (folders by name), headers have no owner or time, and shards
depend on sizes alone. Each shard appears when it is complete. Encoded images are copied as they are
unless they are resized; arrays become PNGs.
"""

import contextlib
import glob
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jdl.core import check
from jdl.data import images
from jdl.data.labels import sidecar_key
from jdl.data.pack_sources import Members, Skip, is_image, is_sidecar, read
from jdl.data.tar import format as fmt
from jdl.data.tar.archive import STDIN, is_url
from jdl.data.tar.index import SUFFIX
from jdl.data.tar.paths import expand, tars_in

SHARD_BYTES = 1 << 30
_QUALITY = 95
_WHOLE, _ALONE = "image and sidecars", "sidecars"  # kinds of samples
_PATTERN = re.compile(r"%0(\d+)d")


class Packed(NamedTuple):
    """What `pack` has written."""

    shards: list[str]  # the tars
    members: int  # how many they hold
    bytes: int  # their size
    skipped: list[tuple[str, str]]  # what was left out: (name, why)
    # samples that have got another key, since an earlier one had theirs: (old, new)
    renamed: list[tuple[str, str]]


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
    """Writes the images of `source`, with their `.cls`, `.json` and `.txt`, to the tars `out`.

    Samples are WebDataset's: a run of members with one key. Each is written in one piece; one whose
    key an earlier sample has gets another. Links in a folder are followed if they stay inside it.
    A compressed tar is read twice, first to index it; standard input is read once.

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
    samples = read(source, skip, lambda *left_out: skipped.append(left_out))
    if size is not None:
        samples = _resized(samples, size, skip)
    distinct = _Distinct(source == STDIN)
    total = pictures = 0
    with _Shards(out, overwrite) as sink:
        for sample in map(distinct.name, samples):
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
    return Packed(sink.shards, total, sink.total, skipped, distinct.renamed)


def _check_apart(source: str, out: str) -> None:
    """Raises if a shard would replace a tar that is to be read."""
    if source == STDIN or is_url(source):
        return
    folder = Path(source)
    shard = _PATTERN.sub("[0-9]+", re.escape(os.path.abspath(out)))
    for path in tars_in(folder) if folder.is_dir() else expand(source):
        ok = not re.fullmatch(shard, os.path.abspath(path))
        must = "apart from the tars that are packed"
        check.argument(ok, "OUT", must, out, f"It would replace {path!r}.")


def _nothing(source: str, skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return f"{source!r} holds no images."
    name, why = skipped[0]
    return f"{source!r}: no image is left, {len(skipped)} left out. The first: {name}: {why}."


class _Distinct:
    """Gives each sample a key of its own: `key-2`, `key-3`, … where an earlier one has its key.

    Images without sidecars may share a key if their names differ. Takes 100 bytes a sample.
    """

    def __init__(self, once: bool):
        self._once = once  # whether members that are apart cannot be known to be of one sample
        self._kinds: dict[int, str] = {}  # by a digest of the key, or of a further image's name
        self._next: dict[int, int] = {}
        self.renamed: list[tuple[str, str]] = []

    def name(self, members: Members) -> Members:
        """The members of one sample under a key that no earlier one has."""
        key, kind = sidecar_key(members[0][0])
        if any(is_sidecar(name) for name, _ in members):
            kind = _WHOLE if any(is_image(name) for name, _ in members) else _ALONE
        new, place = key, _digest(key)
        if self._taken(key, kind):
            if self._once and not kind == self._kinds[place] == _WHOLE:
                raise check.DataError(
                    f"The key {key!r} comes again apart, so which members belong together is known "
                    "only at the end. Write standard input to a file first."
                )
            while self._taken(new, kind):
                self._next[place] = self._next.get(place, 1) + 1
                new = f"{key}-{self._next[place]}"
            self.renamed.append((key, new))
        place = _digest(new)
        self._kinds[_digest(f"{new}\0{kind}") if place in self._kinds else place] = kind
        return [(new + name[len(key) :], data) for name, data in members]

    def _taken(self, key: str, kind: str) -> bool:
        before = self._kinds.get(_digest(key))
        if before in (None, _WHOLE, _ALONE) or kind in (_WHOLE, _ALONE, before):
            return before is not None
        return _digest(f"{key}\0{kind}") in self._kinds


def _digest(text: str) -> int:
    data = fmt.plain(text.encode("utf-8", "surrogateescape"))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


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
        ok = len(marks) <= 1 and out.endswith(".tar") and "%" not in _PATTERN.sub("", out)
        must = "a path that ends in .tar, with one %05d for a shard's number or none"
        check.argument(ok, "OUT", must, out)
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
            raise check.DataError(f"{path!r} is there already. Pass `overwrite` to replace it.")
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


def _resized(samples: Iterator[Members], size: tuple[int, int], skip: Skip) -> Iterator[Members]:
    """The samples with their images resized, without those of which none can be."""
    for members in samples:
        found: dict[str, bytes] = {}
        for name, data in members:
            try:
                new, data = _resize(name, data, size) if is_image(name) else (name, data)
                if new in found:
                    raise images.BadImage(f"resized, it has the name of another image, {new!r}")
                found[new] = data
            except images.BadImage as error:
                skip(repr(name), str(error))
        if any(map(is_image, found)) or not any(is_image(name) for name, _ in members):
            yield list(found.items())


def _resize(name: str, data: bytes, size: tuple[int, int]) -> tuple[str, bytes]:
    from PIL import Image

    pixels = images.decode(data, size=size, grayscale=images.is_gray(data), exact=True)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    out, stem = io.BytesIO(), name.rpartition(".")[0]
    if data.startswith(b"\xff\xd8\xff"):
        image.save(out, "JPEG", quality=_QUALITY)
        return f"{stem}.jpg", out.getvalue()
    image.save(out, "PNG")
    return f"{stem}.png", out.getvalue()
