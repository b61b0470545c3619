"""Problems of predicting the next symbol: a text of the user's, or generated symbols."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdl import losses, metrics
from jdl.compare.identity import as_label
from jdl.compare.problems import Problem, arrays_problem
from jdl.compare.results import Target
from jdl.core.types import Batch
from jdl.data.tar.paths import Paths
from jdl.models.rnn import RNN, next_step_loss
from jdl.models.sequences import SYMBOLS, entropy, mapped, markov
from jdl.models.transformer import LanguageModel

LENGTH, MOST = 64, 4096  # bytes of a piece of a text, and pieces
STEPS = 64  # of the Markov chain
PRIME, DECAY = 31, 1e-3  # of the sums


def gpt_bytes(data: Paths | None = None) -> Problem:
    """A causal transformer on a text, or without one on sums: (a + b) mod 31.

    Of all sums 70 % are for training. They are learned by heart first, and with them two thirds of
    the others, a + b being b + a; the rule is found later, with weight decay, which is part of the
    training loss: ½ · 10⁻³ · ‖W‖².

    Args:
      data: a text file; see `pieces`.

    References:
      Power, Burda, Edwards, Babuschkin and Misra, Grokking: generalization beyond overfitting on
      small algorithmic datasets, 2022.
    """
    if data is not None:
        return _text("gpt-bytes", LanguageModel(256, width=64, depth=2), data)
    net = LanguageModel(PRIME + 1, width=128, depth=1)
    a, b = np.divmod(np.random.default_rng(0).permutation(PRIME**2), PRIME)
    x = np.stack([a, b, np.full_like(a, PRIME)], axis=1).astype(np.int32)
    y, cut = ((a + b) % PRIME).astype(np.int32), PRIME**2 * 7 // 10

    def loss(outputs: jax.Array, batch: Batch) -> jax.Array:
        return losses.softmax_cross_entropy(outputs[:, -1], batch)

    @metrics.direction("max")
    def accuracy(outputs: jax.Array, batch: Batch) -> jax.Array:
        return metrics.accuracy(outputs[:, -1], batch)

    def regularizer(params: Any) -> Any:
        return 0.5 * DECAY * sum((w * w).sum() for w in jax.tree.leaves(params) if w.ndim > 1)

    return arrays_problem(
        "gpt-bytes-sums",
        lambda: net,
        loss,
        {"image": x[:cut], "label": y[:cut]},
        {"image": x[cut:], "label": y[cut:]},
        target=Target("test_accuracy", "at least", 0.97),
        metrics={"accuracy": accuracy},
        regularizer=regularizer,
        about={"data": f"all sums of two numbers modulo {PRIME}, generated"},
    )


def lstm_bytes(data: Paths | None = None) -> Problem:
    """An LSTM on a text, or without one on a Markov chain, whose entropy is known.

    The target is a loss of at most 1.03 times the smallest possible.

    Args:
      data: a text file; see `pieces`.
    """
    if data is not None:
        net = RNN(num_outputs=256, hidden=128, vocabulary=256, every_step=True)
        return _text("lstm-bytes", net, data)
    net = RNN(num_outputs=SYMBOLS, hidden=128, vocabulary=SYMBOLS, every_step=True)
    x, least = markov(MOST, STEPS, np.random.default_rng(0))
    return arrays_problem(
        "lstm-bytes-chain",
        lambda: net,
        next_step_loss,
        {"image": x[MOST // 8 :]},
        {"image": x[: MOST // 8]},
        target=Target("test_loss", "at most", float(f"{1.03 * least:.4g}")),
        metrics={},
        about={
            "data": f"a Markov chain of order two over {SYMBOLS} symbols, generated",
            "smallest expected loss": least,
        },
    )


def pieces(data: Paths, problem: str) -> np.ndarray:
    """Pieces int32[n, 64] of a text's bytes, at most 4,096, spread evenly over the file.

    Args:
      data: the path of a text file.
      problem: the problem's name, for the error.

    Raises:
      DataError: it is no file, not text, or of less than 64 pieces.
    """
    text = mapped(str(data), 64 * LENGTH, problem)
    rows = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(int)].astype(np.int32)


def _text(name: str, net: Any, data: Paths) -> Problem:
    """The last eighth of a text is the test data; the target, ¾ of the entropy of single bytes."""
    x = pieces(data, name)
    cut = len(x) - len(x) // 8
    single = entropy(np.bincount(x[:cut].ravel()) / x[:cut].size)
    return arrays_problem(
        as_label(f"{name}-{Path(str(data)).stem}"),
        lambda: net,
        next_step_loss,
        {"image": x[:cut]},
        {"image": x[cut:]},
        target=Target("test_loss", "at most", float(f"{0.75 * single:.3g}")),
        metrics={},
        about={"text": Path(str(data)).name, "entropy of single bytes": single},
    )
