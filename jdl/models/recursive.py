r"""Recursive nets: a cell applied at every node of a tree, children before parents.

Trees are packed by height (`jdl.models.trees.pack`): one step of a scan computes all nodes of one
height of all trees, and every shape is static, so that new trees need no compilation.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jdl.core import check
from jdl.core.types import Batch, PyTree
from jdl.losses import softmax_cross_entropy
from jdl.models.layers import Activation, activation, embedded

# cell(inputs [B, W, ·], children's states [B, W, K, ·], which exist [B, W, K]) -> states [B, W, ·]
Cell = Callable[[jax.Array, PyTree, jax.Array], PyTree]
MOST_NARY = 8192  # children · hidden units, at most


def by_level(
    cell: Cell, inputs: jax.Array, zeros: PyTree, children: jax.Array, schedule: jax.Array
) -> PyTree:
    """The state of every node, [B, N, ·] in the structure of `zeros`; meaningless for padding.

    Args:
      cell: nodes' states from their inputs and their children's states, 0 for absent ones; it is
        first called with K = 0, for leaves.
      inputs: float[B, N, ·], of each node.
      zeros: a state of zeros, [·] each.
      children: int[B, I, K] of the first I nodes, N for none; later ones are leaves.
      schedule: int[B, L, W], the nodes of each height from 1 on, N for none.
    """
    size, nodes = inputs.shape[:2]
    leaf = jax.tree.map(lambda z: jnp.zeros((size, nodes, 0, *z.shape), z.dtype), zeros)
    states = cell(inputs, leaf, jnp.zeros((size, nodes, 0), bool))

    def level(states: PyTree, at: jax.Array) -> tuple[PyTree, None]:
        below = _rows(children, at, nodes)
        of_children = jax.tree.map(lambda s: _rows(s, below, 0), states)
        new = cell(_rows(inputs, at, 0), of_children, below < nodes)
        put = jax.vmap(lambda s, i, x: s.at[i].set(x, mode="drop"))
        return jax.tree.map(lambda s, x: put(s, at, x), states, new), None

    return jax.lax.scan(level, states, jnp.moveaxis(schedule, 1, 0))[0]


def _rows(x: jax.Array, at: jax.Array, absent: int) -> jax.Array:
    """x[b, at[b]] for each b, and `absent` if out of range."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=absent))(x, at)


def tree_cross_entropy(outputs: jax.Array, batch: Batch) -> jax.Array:
    """−Σ log softmax(outputs)[label] over a tree's labelled nodes, in nats, float[B].

    Args:
      outputs: logits [B, N, C] of a net with `every_node=True`.
      batch: `batch["labels"]` holds int[B, N], −1 where there is no label.

    >>> tree_cross_entropy(jnp.zeros((1, 2, 4)), {"labels": jnp.array([[3, -1]])}).round(4)
    Array([1.3863], dtype=float32)
    """
    counts = jnp.sum(jnp.asarray(batch["labels"]) != -1, axis=1)
    means = softmax_cross_entropy(outputs, batch, "labels", ignore=-1)
    return means * counts.astype(means.dtype)


def root_accuracy(outputs: jax.Array, batch: Batch) -> jax.Array:
    """1 where the root's largest logit is its label, else 0, float[B]; NaN where it has none.

    Args:
      outputs: logits [B, N, C] of a net with `every_node=True`.
      batch: `batch["label"]` holds int[B].

    >>> root_accuracy(jnp.zeros((1, 2, 4)), {"label": jnp.array([0])}).tolist()
    [1.0]
    """
    hit = (jnp.argmax(outputs[:, 0], axis=-1) == batch["label"]).astype(jnp.float32)
    return jnp.where(batch["label"] >= 0, hit, jnp.nan)


class TreeLSTM(nn.Module):
    r"""The Tree-LSTM: memory passes from children to their parent through gates.

        i, o = σ(W x + U h̃ + b),  u = tanh(W x + U h̃ + b),  f_k = σ(W x + U h_k + b)
        c = i ⊙ u + Σ_k f_k ⊙ c_k,   h = o ⊙ tanh(c)

    with h̃ = Σ_k h_k ("child_sum": any number of children, order ignored); or with a separate U for
    each position among the children, where f_k depends on all of them ("nary": at most `children`).

    Attributes:
      num_outputs: the number of classes.
      vocabulary: the number of word numbers: 2 + known words.
      hidden: units of h and of c.
      kind: "child_sum" or "nary".
      embedding: dimension of word embeddings; None for `hidden`.
      every_node: whether to return logits [B, N, num_outputs] of all nodes, for
        `tree_cross_entropy`, or [B, num_outputs] of the roots.

    >>> from jdl.models.trees import pack, parse
    >>> packed = pack([parse("(1 (0 no) (1 way))")], {"no": 2, "way": 3}, ["0", "1"])
    >>> inputs = [packed[name] for name in ("word", "children", "schedule")]
    >>> net = TreeLSTM(num_outputs=2, vocabulary=4, hidden=8)
    >>> net.apply(net.init(jax.random.key(0), *inputs), *inputs).shape
    (1, 2)

    References:
      Tai, Socher and Manning, Improved semantic representations from tree-structured long
      short-term memory networks, ACL 2015, sections 3.1 and 3.2.
    """

    num_outputs: int
    vocabulary: int
    hidden: int = 64
    kind: str = "child_sum"
    embedding: int | None = None
    every_node: bool = False

    @nn.compact
    def __call__(self, word: ArrayLike, children: ArrayLike, schedule: ArrayLike) -> jax.Array:
        """Logits for packed trees."""
        check.one_of("kind", self.kind, ("child_sum", "nary"))
        children, schedule = _arrays(word, children, schedule)
        width, most = self.hidden, children.shape[-1]
        nary = self.kind == "nary"
        ok = not nary or most * width <= MOST_NARY
        must = f'"child_sum" for {most} children: those of "nary" have (children · hidden)² weights'
        check.argument(ok, "kind", must, self.kind)
        x = _embedded(self, word, self.embedding or width)
        inputs = nn.Dense(4 * width, name="input")(x)  # i, o, u and f
        init = nn.initializers.lecun_normal()
        fan = most if nary else 1
        gates = self.param("gates", init, (fan * width, 3 * width), jnp.float32)
        forget = self.param("forget", init, (fan * width, fan * width), jnp.float32)

        def cell(x: jax.Array, states: tuple[jax.Array, jax.Array], there: jax.Array) -> Any:
            h, c = states  # [B, W, K, D]
            a, f = x[..., : 3 * width], x[..., None, 3 * width :]
            if h.shape[2]:
                joined = h.reshape(*h.shape[:2], -1) if nary else jnp.sum(h, axis=2)
                a = a + joined @ gates
                f = f + ((joined @ forget).reshape(h.shape) if nary else h @ forget)
            i, o, u = jnp.split(a, 3, axis=-1)
            f = nn.sigmoid(f) * there[..., None].astype(c.dtype)
            memory = nn.sigmoid(i) * jnp.tanh(u) + jnp.sum(f * c, axis=2)
            return nn.sigmoid(o) * jnp.tanh(memory), memory

        zero = jnp.zeros(width, inputs.dtype)
        h, _ = by_level(cell, inputs, (zero, zero), children, schedule)
        return _logits(self, h)


class RecursiveNet(nn.Module):
    r"""The plain recursive net: a parent's state is one layer on its children's states.

        leaf: h = x,    inner node: h = φ(x + Σ_k U_k h_k + b)

    x is the word's embedding, 0 for a node without one.

    Attributes:
      num_outputs: the number of classes.
      vocabulary: the number of word numbers: 2 + known words.
      hidden: units of h, and of the words' embeddings.
      activation: φ.
      every_node: as for `TreeLSTM`.

    References:
      Socher, Lin, Ng and Manning, Parsing natural scenes and natural language with recursive neural
      networks, ICML 2011; Socher et al., Recursive deep models for semantic compositionality over a
      sentiment treebank, EMNLP 2013, section 4.1.
    """

    num_outputs: int
    vocabulary: int
    hidden: int = 64
    activation: Activation = "tanh"
    every_node: bool = False

    @nn.compact
    def __call__(self, word: ArrayLike, children: ArrayLike, schedule: ArrayLike) -> jax.Array:
        """Logits for packed trees."""
        children, schedule = _arrays(word, children, schedule)
        width, most = self.hidden, children.shape[-1]
        x = _embedded(self, word, width)
        init = nn.initializers.lecun_normal()
        kernel = self.param("composition", init, (most * width, width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        phi = activation(self.activation)

        def cell(x: jax.Array, h: jax.Array, there: jax.Array) -> jax.Array:
            if not h.shape[2]:
                return x
            joined = h.reshape(*h.shape[:2], -1) @ kernel
            inner = phi(x + joined + jnp.broadcast_to(bias, joined.shape))
            return jnp.where(jnp.any(there, axis=2)[..., None], inner, x)

        return _logits(self, by_level(cell, x, jnp.zeros(width, x.dtype), children, schedule))


def _arrays(word: ArrayLike, children: ArrayLike, schedule: ArrayLike) -> tuple[jax.Array, ...]:
    check.argument(jnp.ndim(word) == 2, "word", "of shape [B, N]", jnp.shape(word))
    nodes = jnp.shape(word)[1]
    for name, x in (("children", children), ("schedule", schedule)):
        check.values(name, x, 0, nodes, f"nodes in [0, {nodes}), {nodes} for none")
    return jnp.asarray(children), jnp.asarray(schedule)


def _embedded(net: Any, word: ArrayLike, width: int) -> jax.Array:
    """Word embeddings [B, N, width]; zeros for nodes without a word."""
    init = nn.initializers.normal(0.5)
    table = nn.Embed(net.vocabulary, width, embedding_init=init, name="embedding")
    rows = embedded(table, "word", word)
    return rows * (jnp.asarray(word) != 0)[..., None].astype(rows.dtype)


def _logits(net: Any, h: jax.Array) -> jax.Array:
    return nn.Dense(net.num_outputs, name="outputs")(h if net.every_node else h[:, 0])
