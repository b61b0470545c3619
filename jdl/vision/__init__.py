"""Vision: what a trained network sees, what it dreams, and how it paints.

Names are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdl.vision.pretrained import load_trunk as load_trunk
    from jdl.vision.trunk import Trunk as Trunk

# public name -> the module that defines it
_NAMES = {"Trunk": "trunk", "load_trunk": "pretrained"}
_MODULES = (
    *("activations", "dream", "images", "painter", "painter_net", "pretrained"),
    *("reverse", "style", "style_training", "trunk"),
)

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"jdl.vision.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"jdl.vision.{name}")
    raise AttributeError(f"module 'jdl.vision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
