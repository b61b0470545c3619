"""Data: images streamed from tar archives, and arrays, as resumable batches.

Names are imported when first used: grain, JAX and Pillow only where a name needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdl.data.arrays import from_arrays as from_arrays
    from jdl.data.augment import color_jitter as color_jitter
    from jdl.data.augment import rand_augment as rand_augment
    from jdl.data.batches import Batches as Batches
    from jdl.data.batches import Dataset as Dataset
    from jdl.data.bundled_digits import digits as digits
    from jdl.data.bundled_digits import digits_path as digits_path
    from jdl.data.bundled_digits import resolve as resolve
    from jdl.data.choice import LITTER as LITTER
    from jdl.data.description import Description as Description
    from jdl.data.description import describe as describe
    from jdl.data.description import splits as splits
    from jdl.data.holdout import Holdout as Holdout
    from jdl.data.images import BadImage as BadImage
    from jdl.data.images import decode as decode
    from jdl.data.mixing import cutmix as cutmix
    from jdl.data.mixing import mixup as mixup
    from jdl.data.mixing import one_of as one_of
    from jdl.data.pipeline import from_tar as from_tar
    from jdl.data.stdin import standard_input as standard_input
    from jdl.data.tar.source import Record as Record
    from jdl.data.tar.source import TarSource as TarSource

# module -> its public names
_MODULES = {
    "arrays": "from_arrays",
    "augment": "color_jitter rand_augment",
    "batches": "Batches Dataset",
    "bundled_digits": "digits digits_path resolve",
    "choice": "LITTER",
    "description": "Description describe splits",
    "holdout": "Holdout",
    "images": "BadImage decode",
    "mixing": "cutmix mixup one_of",
    "pipeline": "from_tar",
    "stdin": "standard_input",
    "tar.source": "Record TarSource",
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"jdl.data.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'jdl.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
