"""Networks as Flax Linen modules, one architecture a file; `jdl.from_linen` makes each a Model."""

from jdl.models.autoencoder import Autoencoder, ConvAutoencoder, Variational
from jdl.models.cnn import CNN
from jdl.models.dbn import DBN
from jdl.models.function import Function, param
from jdl.models.gan import GAN
from jdl.models.layers import RandomShift
from jdl.models.mlp import MLP
from jdl.models.rbm import RBM
from jdl.models.recursive import RecursiveNet, TreeLSTM
from jdl.models.resnet import ResNet
from jdl.models.rnn import RNN
from jdl.models.transformer import LanguageModel, ViT

__all__ = [
    "CNN",
    "DBN",
    "GAN",
    "MLP",
    "RBM",
    "RNN",
    "Autoencoder",
    "ConvAutoencoder",
    "Function",
    "LanguageModel",
    "RandomShift",
    "RecursiveNet",
    "ResNet",
    "TreeLSTM",
    "Variational",
    "ViT",
    "param",
]
