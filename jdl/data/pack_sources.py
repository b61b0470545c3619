"""What `pack` reads: folders of images, tars, IDX files and `.npz` arrays, as named image files."""

import io
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from jdl.core import check
from jdl.data.idx import is_idx, read_idx
from jdl.data.tar import scan
from jdl.data.tar.archive import STDIN, is_url
from jdl.data.tar.open import open_archive
from jdl.data.tar.paths import expand, tars_in
from jdl.data.tar.stream import MemberStream

Members: TypeAlias = Iterator[tuple[str, bytes]]  # (name, contents)
Skip: TypeAlias = Callable[[str, str], None]  # called with what cannot be used, and why

SIDECARS = ("cls", "json", "txt")
_SPLITS = ("train", "test", "val", "valid")
_IMAGE_KEYS = ("images", "image", "x", "data", "features")
_LABEL_KEYS = ("labels", "label", "y", "targets", "target")


def is_image(name: str) -> bool:
    """Whether a file has an image's extension."""
    return extension(name).encode() in scan.IMAGE_EXTENSIONS


def extension(name: str) -> str:
    """What follows the last dot of a name, in lower case."""
    return name.rpartition(".")[2].lower()


def read(source: str, skip: Skip) -> Members:
    """The images that `source` holds, as (name, encoded bytes), with their labels' sidecars."""
    path = Path(source)
    if source == STDIN or is_url(source) or not path.exists():
        yield from _from_tars(source, skip)
    elif path.is_dir():
        idx = sorted(p for p in path.iterdir() if p.is_file() and is_idx(p))
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
    elif is_idx(path):
        yield from _from_idx(path)
    else:
        yield from _from_tars(source, skip)


def _pictures(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders.sort()  # in place, which sets the order of os.walk
        for file in sorted(files):
            path = Path(folder) / file
            if is_image(file) and not file.startswith("._") and path.is_file():
                yield path


def _from_tars(source: str, skip: Skip) -> Members:
    """Images and their sidecars, in the order of the archives."""
    for path in expand(source):
        archive = open_archive(path)
        stream = MemberStream(archive)
        reported = 0
        for member in itertools.chain(stream, [None]):
            for damage in stream.damage[reported:]:
                if damage.lost:
                    skip(f"{path!r} at byte {damage.offset}", f"{damage.word}: {damage.detail}")
            reported = len(stream.damage)
            if member and (member.image or extension(member.name) in SIDECARS):
                yield member.name, member.data
        archive.close()


def _from_idx_folder(files: list[Path]) -> Members:
    """The images of all these IDX files, each file's in a folder of its own."""
    once = [p for p in files if not (p.suffix == ".gz" and p.with_suffix("") in files)]
    of: dict[str, Path] = {}
    for path in (p for p in once if "images" in p.name or "idx3" in p.name):
        split = _idx_split(path)
        other = of.setdefault(split, path)
        if other is not path:
            raise check.DataError(
                f"{str(other)!r} and {str(path)!r} would both be packed as {split!r}. Pack each "
                "from a folder of its own."
            )
    for path in of.values():
        yield from _from_idx(path)


def _idx_split(path: Path) -> str:
    """The split in a file's name, else what distinguishes the file from others."""
    parts = re.split(r"[-_.]", path.name.lower())
    split = next((p for p in parts if p in (*_SPLITS, "t10k")), "")
    own = [p for p in parts if p not in ("images", "ubyte", "gz") and not p.startswith("idx")]
    return {"t10k": "test"}.get(split, split) or "-".join(own) or "images"


def _from_idx(path: Path) -> Members:
    """The images of one IDX file, labelled by the file of labels beside it."""
    pixels = read_idx(path)
    label_name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = path.with_name(label_name)
    other = beside.with_suffix("") if beside.suffix == ".gz" else Path(f"{beside}.gz")
    found = [p for p in (beside, other) if p.exists() and p != path]
    labels = read_idx(found[0]) if found else None
    yield from _from_arrays(pixels, labels, _idx_split(path), str(path))


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
        label = "" if labels is None else str(labels[i]).replace("/", "_")
        parts = (split, label, f"{i:0{digits}d}.png")
        yield "/".join(part for part in parts if part), out.getvalue()
