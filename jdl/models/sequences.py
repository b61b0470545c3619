"""Sequences as data: padding, text as numbers, and problems with long-term dependencies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdl.core import check

SYMBOLS = 8  # of the Markov chain
Arrays = tuple[np.ndarray, np.ndarray]  # sequences float32[n, T, F], targets


def pad(sequences: Sequence[Any], steps: int | None = None) -> dict[str, np.ndarray]:
    """Sequences of different lengths as one array padded with zeros, and their lengths.

    Args:
      sequences: arrays [Tᵢ, …], Tᵢ ≥ 1; their types may differ, the result's holds them all.
      steps: T; None for the longest.

    Returns:
      `{"image": [n, T, …], "lengths": int32[n]}`.

    Raises:
      ArgumentError: a sequence of length zero or longer than `steps`, or of another shape per step.

    >>> pad([np.ones(2), np.ones(3)])["image"].tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    check.argument(bool(arrays), "sequences", "at least one sequence", sequences)
    for i, array in enumerate(arrays):
        ok = array.ndim >= 1 and len(array) > 0
        must = "of at least one step"
        check.argument(ok, f"sequences[{i}]", must, array.shape, "Leave empty sequences out.")
        check.argument(array.dtype.kind in "biufc", f"sequences[{i}]", "of numbers", sequences[i])
        each = arrays[0].shape[1:]
        ok, must = array.shape[1:] == each, f"of shape {('T', *each)}, as the first"
        check.argument(ok, f"sequences[{i}]", must, array.shape)
    lengths = np.array([len(array) for array in arrays], np.int32)
    longest = int(np.max(lengths))
    steps = longest if steps is None else steps
    check.argument(longest <= steps, "steps", f"at least {longest}", steps)
    padded = np.zeros((len(arrays), steps, *each), np.result_type(*{x.dtype for x in arrays}))
    for i, array in enumerate(arrays):
        padded[i, : len(array)] = array
    return {"image": padded, "lengths": lengths}


def windows(text: str, length: int, stride: int | None = None) -> tuple[np.ndarray, str]:
    """Pieces of a text as numbers int32[n, length], and the alphabet that these index.

    Args:
      text: the text.
      length: characters of a piece.
      stride: characters between the beginnings of two pieces; None for `length`.

    >>> windows("abcab", 2)
    (array([[0, 1],
           [2, 0]], dtype=int32), 'abc')
    """
    check.positive_int("length", length)
    check.argument(len(text) >= length, "text", f"of at least {length} characters", len(text))
    alphabet = "".join(sorted(set(text)))
    table = {c: number for number, c in enumerate(alphabet)}
    coded = np.array([table[c] for c in text], np.int32)
    starts = range(0, len(coded) - length + 1, stride or length)
    return np.stack([coded[start : start + length] for start in starts]), alphabet


def mapped(path: str, least: int, reader: str) -> np.ndarray:
    """The bytes of a text file, uint8[n], n ≥ `least`, on disk until they are used.

    Raises DataError, which names the `reader`, for what is no file, too short, or not text: with a
    byte of 0 at its beginning.

    >>> mapped(__file__, 8, "this example")[3:11].tobytes()
    b'Sequence'
    """
    if not Path(path).is_file():
        raise check.DataError(f"{path} is not a text file; {reader} needs one.")
    if (size := Path(path).stat().st_size) < least:
        must = f"must have at least {least:,} bytes for {reader}"
        raise check.DataError(f"{path} {must}; it has {size:,}.")
    found = np.asarray(np.memmap(path, np.uint8, "r"))
    if not found[: 1 << 16].all():
        raise check.DataError(f"{path} is not text: it has bytes of 0; {reader} needs text.")
    return found


def markov(n: int, steps: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Pieces int32[n, steps] of a random chain of order two, and the least expected loss.

        p(xₜ | xₜ₋₂, xₜ₋₁) ~ Dirichlet(⅓)
        least loss = [H(x₂ | x₁) + (T − 2) H(x₃ | x₁, x₂)] / (T − 1)

    in nats; the first two symbols are from the stationary distribution.

    >>> pieces, least = markov(2, 5, np.random.default_rng(0))
    >>> pieces.shape, bool(0 < least < np.log(8))
    ((2, 5), True)
    """
    p = rng.dirichlet(np.full(SYMBOLS, 1 / 3), (SYMBOLS, SYMBOLS))
    pairs = np.full((SYMBOLS, SYMBOLS), SYMBOLS**-2.0)
    for _ in range(1000):  # the power method
        pairs = np.einsum("ab,abc->bc", pairs, p)
    first, second = np.divmod(rng.choice(SYMBOLS**2, n, p=pairs.ravel() / pairs.sum()), SYMBOLS)
    x = [first, second]
    for _ in range(steps - 2):
        x.append((p[x[-2], x[-1]].cumsum(1) < rng.random((n, 1))).sum(1).clip(max=SYMBOLS - 1))
    of_pair = entropy(pairs) - entropy(pairs.sum(1))
    later = entropy(pairs[..., None] * p) - entropy(pairs)
    return np.stack(x, 1).astype(np.int32), (of_pair + (steps - 2) * later) / (steps - 1)


def entropy(p: np.ndarray) -> float:
    """−Σ p log p, in nats."""
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())


def adding(n: int, steps: int, rng: np.random.Generator) -> Arrays:
    """The adding problem: sequences [n, T, 2] of (number, mark), sums [n, 1] of the marked two.

    Numbers are uniform in [0, 1]; one mark is in the first half, one in the second. Always
    answering 1 has a mean squared error of 1/6.

    Args:
      n: the number of sequences.
      steps: T, the length of each.
      rng: the random generator.

    >>> sequences, sums = adding(2, 6, np.random.default_rng(0))
    >>> sequences.shape, sums.shape
    ((2, 6, 2), (2, 1))

    References:
      Hochreiter and Schmidhuber, Long short-term memory, Neural Computation 9, 1997, section 5.4.
    """
    check.argument(steps >= 2, "steps", "at least 2", steps)
    numbers = rng.uniform(size=(n, steps)).astype(np.float32)
    first = rng.integers(0, steps // 2, n)
    second = rng.integers(steps // 2, steps, n)
    rows, marks = np.arange(n), np.zeros((n, steps), np.float32)
    marks[rows, first] = marks[rows, second] = 1.0
    targets = numbers[rows, first] + numbers[rows, second]
    return np.stack([numbers, marks], axis=-1), targets[:, None]


def temporal_order(n: int, steps: int, rng: np.random.Generator) -> Arrays:
    """The order of two symbols A or B among distractors: [n, T, 6], classes int32[n].

    The two are at 10–20 % and 50–60 % of the sequence, all symbols one-hot; there are four classes.

    References:
      Hochreiter and Schmidhuber 1997, section 5.6; Martens and Sutskever 2011, section 6.
    """
    check.argument(steps >= 10, "steps", "at least 10", steps)
    symbols = rng.integers(2, 6, (n, steps))
    first = rng.integers(steps // 10, steps // 5, n)
    second = rng.integers(steps // 2, steps * 6 // 10, n)
    rows, which = np.arange(n), rng.integers(0, 2, (n, 2))
    symbols[rows, first], symbols[rows, second] = which[:, 0], which[:, 1]
    one_hot = np.eye(6, dtype=np.float32)[symbols]
    return one_hot, (2 * which[:, 0] + which[:, 1]).astype(np.int32)
