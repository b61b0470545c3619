"""WebDataset samples: images, and the sidecars beside them that hold their labels.

As for the webdataset library, a sample is a run of adjacent members with one key (the name up to
the first dot of its last part), in which no extension comes twice. Equal keys apart are different
samples. Only where one run of a key holds images do its sidecars elsewhere belong to them, and
replace earlier ones of the same name (`tar -r`); where there are several, they are a `problem`, as
are images that have no sidecar while others of their key have one.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from jdl.data.tar import scan
from jdl.data.tar.index import TarIndex

_Key: TypeAlias = tuple[int, bytes]  # folder id, base name up to its first dot
_Run: TypeAlias = dict[bytes, int]  # extension -> row

_ROWS = 1 << 16  # rows taken from the index at once
_MAX_RUN = 4096  # members


class Sample(NamedTuple):
    """Members that belong together.

    Attributes:
      images: their rows in the index.
      sidecars: extension -> row.
      problem: why it is unclear which sidecars belong to the images, or "".
    """

    images: list[int]
    sidecars: _Run
    problem: str = ""


def samples(index: TarIndex, endings: Collection[bytes]) -> Iterator[Sample]:
    """The samples of an archive in its order; some are sidecars alone.

    Args:
      index: of the archive.
      endings: what follows the last dot of a sidecar's name, such as b"cls".
    """

    def split(run: _Run) -> Sample:
        last = {extension: extension.rpartition(b".")[2] for extension in run}
        images = [run[each] for each in run if last[each] in scan.IMAGE_EXTENSIONS]
        return Sample(images, {each: run[each] for each in run if last[each] in endings})

    keys = np.fromiter((hash(key) for key, _ in _runs(index)), np.int64)  # 8 bytes each
    values, counts = np.unique(keys, return_counts=True)
    again = set(values[counts > 1].tolist())
    if again:  # only those that have sidecars
        runs = ((hash(key), run) for key, run in _runs(index))
        again = {key for key, run in runs if key in again and split(run).sidecars}
    apart: dict[_Key, list[Sample]] = {}
    for key, run in _runs(index) if again else ():
        if hash(key) in again:
            apart.setdefault(key, []).append(split(run))
    joined = {key: iter(_join(index, runs)) for key, runs in apart.items()}
    for key, run in _runs(index):
        yield next(joined[key]) if key in joined else split(run)


def _runs(index: TarIndex) -> Iterator[tuple[_Key, _Run]]:
    """Adjacent regular files with one key and different extensions, without macOS's `._`."""
    columns, run = index.columns, _Run()
    key: _Key = (-1, b"")
    for start in range(0, len(index), _ROWS):
        begin = int(columns.base_ends[start - 1]) if start else 0
        kinds, folders, ends = (
            column[start : start + _ROWS]
            for column in (columns.kinds, columns.folder_ids, columns.base_ends)
        )
        text, stops = columns.bases[begin : ends[-1]].tobytes(), (ends - begin).tolist()
        files = np.isin(kinds, (scan.IMAGE, scan.OTHER)).tolist()
        named = zip(files, folders.tolist(), [0, *stops], stops, strict=False)
        for row, (is_file, folder, at, stop) in enumerate(named, start):
            stem, dot, extension = text[at:stop].partition(b".")
            extension = extension.lower()
            if not is_file or not dot or (not stem and extension[:1] == b"_"):
                continue
            if (folder, stem) != key or extension in run or len(run) == _MAX_RUN:
                if run:
                    yield key, run
                key, run = (folder, stem), {}
            run[extension] = row
    if run:
        yield key, run


def _join(index: TarIndex, runs: list[Sample]) -> list[Sample]:
    """What each run of one key holds once sidecars apart are with their images."""
    rows = [[*run.images, *run.sidecars.values()] for run in runs]
    newest = {index.name(row): n for n, run in enumerate(rows) for row in run}
    last = {row: newest[index.name(row)] for run in rows for row in run}
    # Of images of one name the last counts, unless each has sidecars and is a sample by itself.
    images = [
        [row for row in run.images if last[row] == n or (run.sidecars and runs[last[row]].sidecars)]
        for n, run in enumerate(runs)
    ]
    alone = {
        extension: row
        for n, run in enumerate(runs)
        for extension, row in run.sidecars.items()
        if not images[n] and last[row] == n
    }
    found, count = [], sum(map(bool, images))
    for n, run in enumerate(runs):
        own, problem = run.sidecars, ""
        if not count:
            own = {extension: row for extension, row in own.items() if last[row] == n}
        elif not images[n]:
            own = {}
        elif count == 1:
            own = own | alone
        elif alone or not own:
            image = images[n][0]
            other = next(row for k, r in enumerate(runs) if k != n for row in rows[k])
            at = index.columns.offsets[[image, other]].tolist()
            problem = (
                f"which sidecar is that of {index.name(image)!r} at byte {at[0]} is unclear: its "
                f"key comes again with {index.name(other)!r} at byte {at[1]}"
            )
        found.append(Sample(images[n], own, problem))
    return found
