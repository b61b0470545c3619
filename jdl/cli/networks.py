"""The network and layers that the arguments of `jdl activations` and `jdl dream` name."""

from jdl.vision import pretrained
from jdl.vision.trunk import Trunk, usual_layer


def open_network(model: str, layer: str | None) -> tuple[Trunk, tuple[str, ...]]:
    """The network, and the layers named, separated by commas; by default its usual one."""
    trunk = pretrained.load_trunk(model)
    names = (usual_layer(trunk),) if layer is None else layer.replace(" ", "").split(",")
    return trunk, trunk.known(names)
