"""A text as data: windows of a file's bytes, or of a generated chain of letters; its samples."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl import metrics
from jdl.core import check
from jdl.core.types import Batch, Key
from jdl.data import Batches, from_arrays
from jdl.models import rnn, transformer
from jdl.models.sequences import mapped, markov
from jdl.train.estimator import Estimator

WINDOW = 128  # bytes
MOST_EVALUATED, MOST_STARTS = 4096, 1 << 20  # windows


@functools.cache
def chain() -> np.ndarray:
    """The bytes of 4,096 lines of 64 letters, a to h: the Markov chain of `lstm-bytes`."""
    letters, _ = markov(4096, 64, np.random.default_rng(0))
    return np.pad(letters + ord("a"), [(0, 0), (0, 1)], constant_values=10).astype(np.uint8).ravel()


def batches_of(file: str | None, *, split: str | None, **options: Any) -> Batches:
    """Windows "tokens" int32[B, 128] of a file's bytes, or of `chain`; options as for images.

    "test" is the last eighth, "train" the rest. Shuffled, windows begin anywhere and passes have no
    end; else they are at most 4,096, spread evenly.
    """
    check.one_of("--split", split or "all", ("train", "test", "all"))
    text = chain() if file is None else mapped(file, 2 * WINDOW, "a model of texts")
    cut = len(text) - max(len(text) // 8, WINDOW)
    text = {"train": text[:cut], "test": text[cut:]}.get(split or "all", text)
    last = len(text) - WINDOW
    number = -(-last // (WINDOW - 1)) + 1  # windows that together predict every byte but the first
    shuffle = options.get("shuffle", False)
    number = max(number, min(last + 1, MOST_STARTS)) if shuffle else min(number, MOST_EVALUATED)
    starts = np.linspace(0, last, number).astype(np.int64)

    def window(batch: Batch) -> Batch:
        tokens = text[batch["tokens"][:, None] + np.arange(WINDOW)]
        return {**batch, "tokens": tokens.astype(np.int32)}

    return from_arrays(
        {"tokens": starts},
        batch_size=options["batch_size"],
        epochs=options.get("epochs", None if shuffle else 1),
        shuffle=shuffle,
        seed=options.get("seed", 0),
    ).map(window)


@metrics.direction("min")
def bits_per_byte(outputs: jax.Array, batch: Batch) -> jax.Array:
    """−log₂ p of a byte, given those before it in the window: the mean over the window."""
    return rnn.next_step_loss(outputs, batch) / math.log(2)


def estimator(net: Any, optimizer: optax.GradientTransformation, **options: Any) -> Estimator:
    """An Estimator of the next byte."""
    options = {"metrics": {"bits_per_byte": bits_per_byte}} | options
    return Estimator(net, rnn.next_step_loss, optimizer, inputs="tokens", **options)


def continued(
    net: Any, params: Any, prompt: bytes, number: int, length: int, key: Key, temperature: float
) -> jax.Array:
    """Continuations int32[number, length] of a text, by one compiled loop."""
    generate: Any = rnn.generate if isinstance(net, rnn.RNN) else transformer.generate
    prompts = jnp.tile(jnp.asarray([*prompt], jnp.int32)[None], (number, 1))
    found = jax.jit(lambda params: generate(net, params, prompts, length, key, temperature))
    return found(params)
