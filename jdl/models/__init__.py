"""Networks as Flax Linen modules, one architecture a file; `jdl.from_linen` makes each a Model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdl.models.autoencoder import Autoencoder as Autoencoder
    from jdl.models.autoencoder import ConvAutoencoder as ConvAutoencoder
    from jdl.models.autoencoder import Variational as Variational
    from jdl.models.cnn import CNN as CNN
    from jdl.models.dbn import DBN as DBN
    from jdl.models.function import Function as Function
    from jdl.models.function import param as param
    from jdl.models.gan import GAN as GAN
    from jdl.models.layers import RandomShift as RandomShift
    from jdl.models.mlp import MLP as MLP
    from jdl.models.rbm import RBM as RBM
    from jdl.models.recursive import RecursiveNet as RecursiveNet
    from jdl.models.recursive import TreeLSTM as TreeLSTM
    from jdl.models.rnn import RNN as RNN

_NAMES = {
    "CNN": "jdl.models.cnn",
    "GAN": "jdl.models.gan",
    "MLP": "jdl.models.mlp",
    "RNN": "jdl.models.rnn",
    "RandomShift": "jdl.models.layers",
    "RecursiveNet": "jdl.models.recursive",
    "TreeLSTM": "jdl.models.recursive",
    "Autoencoder": "jdl.models.autoencoder",
    "Function": "jdl.models.function",
    "param": "jdl.models.function",
    "ConvAutoencoder": "jdl.models.autoencoder",
    "Variational": "jdl.models.autoencoder",
    "RBM": "jdl.models.rbm",
    "DBN": "jdl.models.dbn",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'jdl.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
