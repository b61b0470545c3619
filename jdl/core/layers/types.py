"""What is known of a model's layers, and the second moments they gather."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from jdl.core.types import PyTree


class Layer(NamedTuple):
    """A kernel whose uses are all known.

    Attributes:
      kernel: the leaf's number, of shape (inputs..., outputs).
      bias: the number of the leaf that is added to its outputs, of shape (outputs,); or None.
      kind: "dense" or "conv".
      transposed: whether it is used as x Wᵀ.
      tagged: whether `tag_dense` or `tag_conv` told so.
      rows: how often it is used for the traced batch: examples × positions × steps × reuses.
    """

    kernel: int
    bias: int | None
    kind: str
    transposed: bool
    tagged: bool
    rows: int


class Layers(NamedTuple):
    """What a model does with its parameters.

    Attributes:
      known: kernel's leaf number -> layer.
      unknown: number of any other leaf that joins no layer -> why.
    """

    known: Mapping[int, Layer]
    unknown: Mapping[int, str]

    @property
    def biases(self) -> set[int]:
        """The leaves that belong to a layer as its bias."""
        return {layer.bias for layer in self.known.values() if layer.bias is not None}


class Probe(NamedTuple):
    """The second moments of a kernel of D inputs and K outputs, summed over rows.

    Attributes:
      first: of the side of its leading axes, [D+1, D+1], the last coordinate being the bias's 1
        (zero where no bias joins); or [D+1], the diagonal alone.
      last: of the side of its last axis, [K, K] or [K].
      rows: the number of rows, weighed by the mask.
      squares: of the gradients in the eigenbases, [D+1, K]; () where not asked for.
    """

    first: jax.Array
    last: jax.Array
    rows: jax.Array
    squares: PyTree = ()


class Bases(NamedTuple):
    """Orthogonal bases for `Probe.squares`; () stands for the identity."""

    first: PyTree
    last: PyTree
