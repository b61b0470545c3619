"""What `jdl activations` and `jdl dream` begin with: a network, its layers, and a photograph."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jdl.vision.trunk import Trunk


class Opened(NamedTuple):
    """What the arguments name.

    Attributes:
      trunk: the network.
      layers: one or several of it.
      photograph: [H, W, 3] in [0, 1], or None.
    """

    trunk: "Trunk"
    layers: tuple[str, ...]
    photograph: Any


def opened(
    model: str, layer: str | None = None, image: Path | None = None, longest: int | None = None
) -> Opened:
    """The network, its layers and the photograph; what takes longest to load comes last.

    Args:
      model: as for `jdl.vision.load_trunk`.
      layer: names with commas between them; None for one that sees parts of things.
      image: the photograph's file; None for none.
      longest: pixels that its longer side is reduced to; None for as it is.
    """
    from jdl.cli.run_config import use_compilation_cache
    from jdl.vision import images, pretrained
    from jdl.vision.trunk import usual_layer

    photograph = None if image is None else images.read(image, longest=longest)
    use_compilation_cache()
    trunk = pretrained.load_trunk(model)
    names = tuple(layer.replace(" ", "").split(",")) if layer else (usual_layer(trunk),)
    return Opened(trunk, trunk.known(names), photograph)


def told(done: int, of: int) -> None:
    """A line on stderr, ten times."""
    if done * 10 // of != (done - 1) * 10 // of:
        print(f"step {done}/{of}", file=sys.stderr, flush=True)
