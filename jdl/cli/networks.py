"""The network, layers and photograph that the arguments of `jdl activations` and `dream` name."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jdl.vision import images, pretrained
from jdl.vision.trunk import Trunk, usual_layer


class Opened(NamedTuple):
    """A network, names of its layers, and a photograph [H, W, 3] in [0, 1] or None."""

    trunk: Trunk
    layers: tuple[str, ...]
    photograph: np.ndarray | None


def open_network(
    model: str, layer: str | None = None, image: Path | None = None, longest: int | None = None
) -> Opened:
    """Loads what the arguments name; the network, which takes longest, comes last.

    Args:
      model: as `jdl.vision.load_trunk`.
      layer: names separated by commas; None for the network's usual layer.
      image: the photograph's file; None for no photograph.
      longest: pixels that a photograph's longer side is reduced to; None to keep its size.
    """
    photograph = None if image is None else images.read(image, longest=longest)
    trunk = pretrained.load_trunk(model)
    names = tuple(layer.replace(" ", "").split(",")) if layer else (usual_layer(trunk),)
    return Opened(trunk, trunk.known(names), photograph)
