"""The bundled data set: 1,797 handwritten digits, 8 × 8, in a tar (see DIGITS.md)."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdl.core import check
from jdl.data.tar.paths import Paths

if TYPE_CHECKING:
    from jdl.data.image_batches import ImageBatches

_PATH = Path(__file__).with_name("digits.tar")


def digits_path() -> str:
    """The path of the bundled archive.

    >>> Path(digits_path()).name
    'digits.tar'
    """
    return str(_PATH)


def resolve(data: Paths) -> Paths:
    """`data`, or the bundled archive's path for the word `digits` (unless there is such a file).

    >>> resolve("digits") == digits_path(), resolve("photos.tar")
    (True, 'photos.tar')
    """
    return digits_path() if data == "digits" and not os.path.exists("digits") else data


def digits(
    split: str | None = "train",
    *,
    batch_size: int,
    epochs: int | None = 1,
    shuffle: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> "ImageBatches":
    """Batches `{"image": uint8[B, 8, 8, 1], "label": int32[B]}` of handwritten digits.

    Args:
      split: `"train"` (1,438 images), `"test"` (359), or None for both.
      batch_size: examples in every batch, B.
      epochs: how many passes over the data; None for no end.
      shuffle: a new order each epoch; by default only with `epochs=None`.
      seed: for the orders.
      **options: further arguments of `from_tar`.

    >>> data = digits("train", batch_size=64, epochs=None)
    >>> data.num_records, data.classes[-1], data.element_spec["image"].shape
    (1438, '9', (64, 8, 8, 1))
    """
    from jdl.data.pipeline import from_tar

    check.one_of("split", split, ("train", "test", None))
    return from_tar(
        digits_path(),
        split=split,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=shuffle,
        seed=seed,
        **{"grayscale": True, "keep_index": False, **options},
    )
