"""What `pack` reads: folders of images, tars, IDX files and `.npz` arrays, as named image files."""

import contextlib
import io
import itertools
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jdl.core import check
from jdl.data.choice import Patterns
from jdl.data.idx import is_idx, read_idx
from jdl.data.labels import composed, sidecar_key
from jdl.data.tar import scan
from jdl.data.tar.archive import STDIN, changed
from jdl.data.tar.index import TarIndex, open_index
from jdl.data.tar.open import open_archive
from jdl.data.tar.paths import expand, tars_in
from jdl.data.tar.samples import runs, samples
from jdl.data.tar.stream import MAX_MEMBER, Member, MemberStream

Members: TypeAlias = list[tuple[str, bytes]]  # (name, contents) of an image and its sidecars
Skip: TypeAlias = Callable[[str, str], None]  # called with what cannot be used, and why

_SIDECARS = frozenset((b"cls", b"json", b"txt"))
_AT_ONCE = 256  # samples whose members are requested at once from an archive
_SPLITS = ("train", "test", "val", "valid")
_IMAGE_KEYS = ("images", "image", "x", "data", "features")
_LABEL_KEYS = ("labels", "label", "y", "targets", "target")


def is_image(name: str) -> bool:
    """Whether a file has an image's extension."""
    return _ending(name) in scan.IMAGE_EXTENSIONS


def is_sidecar(name: str) -> bool:
    """Whether a file has the extension of a label beside an image."""
    return _ending(name) in _SIDECARS


def _ending(name: str) -> bytes:
    return name.rpartition(".")[2].lower().encode("utf-8", "surrogateescape")


def read(source: str, skip: Skip, note: Skip) -> Iterator[Members]:
    """The images that `source` holds, encoded, each with its labels' sidecars.

    `skip` gets what cannot be used, and may raise; `note` gets what is left out on purpose.
    """
    path = Path(source)
    folder = source != STDIN and path.is_dir()
    if folder and (idx := sorted(p for p in path.iterdir() if p.is_file() and is_idx(p))):
        yield from _from_idx_folder(idx)
    elif folder and not (tars := tars_in(path)):
        yield from _from_folder(path, skip, note)
    elif folder and (picture := next(_from_folder(path, note, note), None)):
        raise check.DataError(
            f"The folder {source!r} holds both tars and images, such as {tars[0]!r} and "
            f"{str(path / picture[0][0])!r}. Pack one kind at a time: from two folders, or "
            f"the tars by a pattern such as {str(path / '*.tar')!r}."
        )
    elif source == STDIN:
        yield from _from_pipe(skip, note)
    elif path.is_file() and source.endswith(".npz"):
        yield from _from_npz(path)
    elif path.is_file() and is_idx(path):
        yield from _from_idx(path)
    else:
        yield from _from_tars(source, skip, note)


def _from_folder(root: Path, skip: Skip, note: Skip) -> Iterator[Members]:
    for folder, files in _folders(root, skip, note):
        names = sorted(f for f in files if (is_image(f) or is_sidecar(f)) and f[:2] != "._")
        for _, run in itertools.groupby(names, lambda name: sidecar_key(name)[0]):
            some = list(run)
            if not any(map(is_image, some)):
                continue
            for unit in _units(some, any(map(is_sidecar, some))):
                paths = [Path(folder, name) for name in unit]
                try:
                    yield [(p.relative_to(root).as_posix(), p.read_bytes()) for p in paths]
                except OSError as error:
                    skip(repr(str(error.filename)), f"it cannot be read: {error.strerror}")


def _folders(root: Path, skip: Skip, note: Skip) -> Iterator[tuple[str, list[str]]]:
    """Each folder and the files in it, as ImageFolder finds them, but never outside of `root`."""
    top = os.path.realpath(root)
    waiting: list[tuple[str, tuple[str, ...]]] = [(str(root), (top,))]
    while waiting:
        folder, above = waiting.pop()
        files, inside = [], []
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            skip(repr(folder), f"it cannot be read: {error.strerror}")
            continue
        for entry in entries:
            link, real = entry.is_symlink(), os.path.join(above[-1], entry.name)
            if link and not Path(real := os.path.realpath(entry.path)).is_relative_to(top):
                note(repr(entry.path), f"a link out of the folder, to {real!r}")
            elif os.path.isfile(real) if link else entry.is_file():
                files.append(entry.name)
            elif real in above:
                note(repr(entry.path), "a link to a folder that it is in")
            elif os.path.isdir(real):
                inside.append((entry.path, (*above, real)))
            elif link:
                note(repr(entry.path), "a link to no file or folder")
        yield folder, files
        waiting += inside


def _units(members: list[Any], whole: bool) -> Iterator[list[Any]]:
    """What stays in one shard: a whole sample, or each image without sidecars by itself."""
    yield from [members] if whole else ([member] for member in members)


def _from_tars(source: str, skip: Skip, note: Skip) -> Iterator[Members]:
    """The samples of these archives, in their order."""
    for path in expand(source):
        index = open_index(path, keep=False)
        _report(path, index.damage, skip, note)
        coming = _rows(index, skip, note)
        with contextlib.closing(open_archive(path)) as archive:
            while some := list(itertools.islice(coming, _AT_ONCE)):
                rows = list(itertools.chain(*some))
                offsets, sizes = index.columns.offsets[rows], index.columns.sizes[rows].tolist()
                if archive.mode == "stream" and (np.diff(offsets) < 0).any():
                    raise check.DataError(
                        f"{path!r} holds samples whose members are apart. Decompress it first."
                    )
                contents = archive.pread_many(list(zip(sizes, offsets.tolist(), strict=True)))
                for unit in some:
                    found = [(index.name(row), next(contents)) for row in unit]
                    if [len(data) for _, data in found] != index.columns.sizes[unit].tolist():
                        raise changed(path)
                    yield found


def _rows(index: TarIndex, skip: Skip, note: Skip) -> Iterator[list[int]]:
    """The rows of each sample, and of each image without sidecars."""
    older = set(np.flatnonzero(index.columns.kinds == scan.OLDER).tolist())
    for sample in samples(index, _SIDECARS):
        if sample.problem:
            skip(repr(index.path), sample.problem)
            continue
        rows = sorted([*sample.images, *sample.sidecars.values()])
        for unit in _units(rows, bool(sample.sidecars)):
            size = int(index.columns.sizes[unit].sum())
            if size > MAX_MEMBER:
                what = f"{index.path!r}, member {index.name(unit[0])!r}"
                skip(what, f"with its sidecars it has {size} bytes, more than {MAX_MEMBER}")
            else:
                yield unit
            older.difference_update(unit)
    for row in sorted(older):
        where = f"{index.path!r}, member {index.name(row)!r}"
        note(where, "a later member of the same name replaces it")


def _report(path: str, damages: Sequence[scan.Damage], skip: Skip, note: Skip) -> None:
    for damage in damages:
        if damage.lost:
            skip(f"{path!r} at byte {damage.offset}", f"{damage.word}: {damage.detail}")
        elif damage.word == "link":
            note(f"{path!r}, member {damage.name!r}", damage.detail)


def _from_pipe(skip: Skip, note: Skip) -> Iterator[Members]:
    """The samples on standard input, from runs of adjacent members."""
    stream = MemberStream(open_archive(STDIN))

    def members() -> Iterator[tuple[str, bytes, Member]]:
        reported = 0
        for member in itertools.chain(stream, [None]):
            _report(STDIN, stream.damage[reported:], skip, note)
            reported = len(stream.damage)
            if member:
                folder, _, base = member.name.rpartition("/")
                yield folder, base.encode(), member

    for _, run in runs(members(), most=64):  # held in memory
        named = [(m.name, m.data) for m in run.values() if is_image(m.name) or is_sidecar(m.name)]
        yield from _units(named, any(is_sidecar(name) for name, _ in named))


def _from_idx_folder(files: list[Path]) -> Iterator[Members]:
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


def _from_idx(path: Path) -> Iterator[Members]:
    """The images of one IDX file, labelled by the file of labels beside it."""
    pixels = read_idx(path)
    label_name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = path.with_name(label_name)
    other = beside.with_suffix("") if beside.suffix == ".gz" else Path(f"{beside}.gz")
    found = [p for p in (beside, other) if p.exists() and p != path]
    labels = read_idx(found[0]) if found else None
    yield from _from_arrays(pixels, labels, _idx_split(path), str(path))


def _from_npz(path: Path) -> Iterator[Members]:
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


def _from_arrays(
    pixels: np.ndarray, labels: np.ndarray | None, split: str, where: str
) -> Iterator[Members]:
    """[split/][label/]number.png of each image, uint8 [n, H, W] or [n, H, W, 1 or 3]."""
    from PIL import Image

    gray = pixels.ndim == 4 and pixels.shape[3] == 1
    pixels = pixels[..., 0] if gray else pixels
    rgb = pixels.ndim == 4 and pixels.shape[3] == 3
    if pixels.dtype != np.uint8 or not (pixels.ndim == 3 or rgb):
        raise check.DataError(
            f"{where!r} must hold uint8 [n, H, W] or [n, H, W, 3], got {pixels.dtype} "
            f"{list(pixels.shape)}."
        )
    names = None if labels is None else _class_names(labels, len(pixels), where)
    digits = max(5, len(str(len(pixels) - 1)))
    for i, image in enumerate(pixels):
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG")
        parts = (split, names[i] if names else "", f"{i:0{digits}d}.png")
        yield [("/".join(part for part in parts if part), out.getvalue())]


def _class_names(labels: np.ndarray, n: int, where: str) -> list[str]:
    """The labels, [n] or [n, 1], as folders' names, from which they are read again."""
    flat = labels[:, 0] if labels.shape == (n, 1) else labels
    if flat.shape != (n,) or flat.dtype.kind not in "iuSU":
        raise check.DataError(
            f"{where!r} must have a label for each of its {n} images, a number or a text, got "
            f"{labels.dtype} {list(labels.shape)}."
        )
    texts = np.char.decode(flat, "utf-8", "surrogateescape") if flat.dtype.kind == "S" else flat
    names = [str(each) for each in texts.tolist()]
    of: dict[str, str] = {}
    for name in sorted({*names}):
        odd = name in ("", ".", "..") or any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
        odd |= "/" in name or Patterns.checked(None, None).refuses(f"{name}/0.png") is not None
        other = of.setdefault(composed(name), name)
        if odd or other is not name:
            also = "" if other is name else f" and {other!r}, which differs from it in form alone,"
            raise check.DataError(
                f"{where!r} has the label {name!r}{also} which cannot be the name of a folder, as "
                "a class is. Use numbers, or other texts."
            )
    return names
