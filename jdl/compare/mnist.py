"""MNIST, or a data set of the same format, from the user's folder or tar."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdl.core import check
from jdl.data import from_tar, splits
from jdl.data.idx import read_idx
from jdl.data.tar.paths import Paths

LIMIT = 1 << 32  # bytes of pixels at most


class Mnist(NamedTuple):
    """Images uint8 [n, 28, 28, 1] and labels int32 [n]."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def read(data: Paths | None, needed_for: str) -> Mnist:
    """Reads MNIST.

    Args:
      data: a folder with the four IDX files (plain or .gz), or tars of its images, as `jdl pack`
        makes them: `train/<digit>/….png` and `test/<digit>/….png`.
      needed_for: the problem's name, for the error.

    Raises:
      DataError: the files are missing or hold something else.
    """
    where = (
        "--data: a folder with train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
        "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz (plain or .gz), or a tar that "
        "`jdl pack` made of them."
    )
    if data is None:
        raise check.DataError(f"{needed_for} needs MNIST. Give {where}")
    folder = Path(data) if isinstance(data, str | Path) else None
    if folder is not None and any(folder.glob("*-ubyte*")):
        return Mnist(*_idx(folder, "train", where), *_idx(folder, "t10k", where))
    if set(splits(data)) != {"train", "test"}:
        raise check.DataError(
            f"{data} holds neither MNIST's files nor train/ and test/. Give {where}"
        )
    train = images(data, split="train", size=(28, 28))
    return Mnist(*train[:2], *images(data, split="test", size=(28, 28), classes=train[2])[:2])


def _idx(folder: Path, part: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        names = [f"{part}-{kind}-ubyte", f"{part}-{kind}-ubyte.gz"]
        there = [folder / name for name in names if (folder / name).exists()]
        if not there:
            raise check.DataError(f"{folder} has no {names[0]}, plain or .gz. Give {where}")
        found.append(read_idx(there[0]))
    x, y = found
    if x.dtype != np.uint8 or x.ndim != 3 or y.shape != x.shape[:1]:
        raise check.DataError(
            f"{folder}'s {part} files hold {x.dtype} {list(x.shape)} and {y.dtype} "
            f"{list(y.shape)}, not bytes [n, height, width] with a label each."
        )
    return x[..., None], y.astype(np.int32)


def images(data: Paths, **options: Any) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """All images of tars in memory, uint8 [n, H, W, 1], with their labels and the class names.

    Args:
      data: as for `jdl.data.from_tar`.
      **options: its further arguments.
    """
    batches = from_tar(data, batch_size=256, epochs=1, grayscale=True, **options)
    shape = batches.element_spec["image"].shape[1:]
    if batches.num_records * int(np.prod(shape)) > LIMIT:
        raise check.DataError(
            f"{data} has {batches.num_records} images, more than fit into {LIMIT >> 30} GiB of "
            "memory. Give fewer."
        )
    x, y = [], []
    for batch in batches:
        kept = np.asarray(batch.get("mask", np.ones(len(batch["image"])))) > 0
        x.append(np.asarray(batch["image"])[kept])
        y.append(np.asarray(batch.get("label", np.zeros(len(kept), np.int32)))[kept])
    return np.concatenate(x), np.concatenate(y), batches.classes
