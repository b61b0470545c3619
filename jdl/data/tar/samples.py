"""WebDataset samples: images, and the sidecars beside them that hold their labels.

As for the webdataset library, a sample is a run of adjacent members with one key (the name up to
the first dot of its last part), in which no extension comes twice; equal keys apart are different
samples. But where at most one run of a key has both images and sidecars, all are one sample, of
which the newest of each name counts, unless it is unclear to which images the sidecars belong.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from jdl.data.tar import scan
from jdl.data.tar.index import TarIndex

_Key = TypeVar("_Key", bound=Hashable)
_Member = TypeVar("_Member")

_FILES = (scan.IMAGE, scan.OTHER, scan.OLDER)


class Sample(NamedTuple):
    """The rows of images and, by extension, of their sidecars."""

    images: list[int]
    sidecars: dict[bytes, int]
    problem: str = ""  # why it is unclear whether these are their sidecars
    twice: str = ""  # why it is unclear whether the sample, which comes again, is meant to


def samples(index: TarIndex, endings: Collection[bytes]) -> Iterator[Sample]:
    """The samples of an archive in its order; `endings` are sidecars' last extensions."""

    def split(run: dict[bytes, int]) -> Sample:
        images, sidecars = [], {}
        for extension, row in run.items():
            ending = extension.rpartition(b".")[2]
            if ending in scan.IMAGE_EXTENSIONS:
                images.append(row)
            elif ending in endings:
                sidecars[extension] = row
        return Sample(images, sidecars)

    keys = np.fromiter((hash(key) for key, _ in runs(_files(index))), np.int64)  # 8 bytes each
    values, counts = np.unique(keys, return_counts=True)
    again = set(values[counts > 1].tolist())
    if again:  # only those that have sidecars
        named = ((hash(key), run) for key, run in runs(_files(index)))
        again = {key for key, run in named if key in again and split(run).sidecars}
    apart: dict[tuple[int, bytes], list[Sample]] = {}
    for key, run in runs(_files(index)) if again else ():
        if hash(key) in again:
            apart.setdefault(key, []).append(split(run))
    joined = {key: iter(_join(index, found)) for key, found in apart.items()}
    older = set(np.flatnonzero(index.columns.kinds == scan.OLDER).tolist())
    for key, run in runs(_files(index)):
        sample = next(joined[key]) if key in joined else split(run)
        if older and key not in joined:
            sample = Sample([row for row in sample.images if row not in older], sample.sidecars)
        yield sample


def runs(
    members: Iterable[tuple[_Key, bytes, _Member]], most: int = 4096
) -> Iterator[tuple[tuple[_Key, bytes], dict[bytes, _Member]]]:
    """Adjacent members of one key, by extension; without macOS's `._` and names without a dot.

    `members` are (folder, base name, what is to be returned), `most` of them in a run.
    """
    key, run = None, dict[bytes, _Member]()
    for folder, base, member in members:
        stem, dot, extension = base.partition(b".")
        extension = extension.lower()
        if not dot or (not stem and extension.startswith(b"_")):
            continue
        if (folder, stem) != key or extension in run or len(run) == most:
            if key is not None:
                yield key, run
            key, run = (folder, stem), {}
        run[extension] = member
    if key is not None:
        yield key, run


def _files(index: TarIndex) -> Iterator[tuple[int, bytes, int]]:
    """The folder's number, the base name and the row of each regular file."""
    columns, text = index.columns, index.columns.bases.tobytes()
    wanted = np.isin(columns.kinds, _FILES).data
    spans = itertools.pairwise(itertools.chain([0], columns.base_ends.data))
    for row, folder, (start, end) in zip(itertools.count(), columns.folder_ids.data, spans):
        if wanted[row]:
            yield folder, text[start:end], row


def _join(index: TarIndex, found: list[Sample]) -> list[Sample]:
    """The runs of one key, with sidecars that are apart moved to their images."""
    rows = (row for run in found for row in (*run.images, *run.sidecars.values()))
    newest = set({index.name(row): row for row in rows}.values())
    several = sum(bool(run.images and run.sidecars) for run in found) > 1
    for n, (images, sidecars, *_) in enumerate(found):
        if not (several and images and sidecars):
            mine = {extension: row for extension, row in sidecars.items() if row in newest}
            found[n] = Sample([row for row in images if row in newest], mine)
    holding = [run.images[0] for run in found if run.images]
    if len(holding) == 1:
        every = {extension: row for run in found for extension, row in run.sidecars.items()}
        return [Sample(run.images, every if run.images else {}) for run in found]
    if not holding or all(bool(run.images) == bool(run.sidecars) for run in found):
        names = Counter(index.name(row) for run in found for row in run.images)
        again = [name for name, times in names.items() if times > 1]
        twice = f"{again[0]!r} comes again, each time with sidecars" if again else ""
        return [run._replace(twice=twice) for run in found]
    two = [f"{index.name(row)!r} at byte {index.columns.offsets[row]}" for row in holding[:2]]
    problem = f"it is unclear which sidecars are those of {two[0]}: {two[1]} has the same key"
    return [run._replace(problem=problem) for run in found]
