"""The networks, the data and the rates to try of `bench_matrix.py`."""

import functools
import gzip
import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdl
from jdl import losses
from jdl.models import RNN, Autoencoder, LanguageModel, ResNet, ViT
from jdl.models.layers import sparse_init

FOLDERS = {"mnist": ("mnist",), "fashion": ("fashion", "fashion-mnist")}
VOCABULARY = 128


def idx_images(data, name, part="train"):
    """Images of an IDX data set, [N, 784] in [0, 1], and labels [N]; None where they are missing.

    `part` is "train" or "t10k".
    """
    for folder in FOLDERS[name]:
        images = Path(data) / folder / f"{part}-images-idx3-ubyte.gz"
        labels = Path(data) / folder / f"{part}-labels-idx1-ubyte.gz"
        if images.exists():
            with gzip.open(images) as file:
                pixels = np.frombuffer(file.read(), np.uint8, offset=16)
            with gzip.open(labels) as file:
                classes = np.frombuffer(file.read(), np.uint8, offset=8)
            return (pixels.reshape(-1, 784) / 255.0).astype(np.float32), classes.astype(np.int32)
    return None


def text(size=4_000_000):
    """The sources of Python's standard library as bytes below 128."""
    found, total = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.append(np.frombuffer(path.read_bytes(), np.uint8))
        total += len(found[-1])
        if total > size:
            break
    return np.minimum(np.concatenate(found), VOCABULARY - 1).astype(np.int32)


class Square(nn.Module):
    """A network on flat images of 28 × 28."""

    net: nn.Module

    def __call__(self, x, train=False):
        x = x.reshape(-1, 28, 28, 1)
        return self.net(x, train=train) if isinstance(self.net, ResNet) else self.net(x)


class Rows(nn.Module):
    """An LSTM that reads an image row by row."""

    @nn.compact
    def __call__(self, x):
        return RNN(num_outputs=10, hidden=128)(x.reshape(-1, 28, 28))


def token_loss(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean(axis=1)


class Net:
    """A model, a loss, training and held-out data, and the rates to try for the others.

    Attributes:
      batches: examples in a batch of K-FAC and of the others.
      steps: the length of the others' schedule.
      rates: the peak rates tried for an opponent.
    """

    def __init__(self, module, loss, train, held, batches, steps, rates):
        self.model, self.loss = jdl.from_linen(module), loss
        self.train, self.held = jax.tree.map(jnp.asarray, (train, held))
        self.batches, self.steps, self.rates = batches, steps, rates
        self.size = next(iter(self.train.values())).shape[0]

        @jax.jit
        def evaluate(params, state):
            def part(batch):
                outputs, _ = self.model.apply(params, state, batch["image"])
                return jnp.mean(self.loss(outputs, batch))

            slices = jax.tree.map(lambda x: x.reshape(-1, len(x) // 8, *x.shape[1:]), self.held)
            return jnp.mean(jax.lax.map(part, slices))

        self.evaluate = evaluate

    def batch(self, rows):
        """The examples of these numbers."""
        return jax.tree.map(lambda x: x[rows], self.train)

    def start(self, seed):
        """The parameters and the model's state at the start."""
        return self.model.init(jax.random.key(seed), self.batch(np.arange(1))["image"])


class Text(Net):
    """Windows of a text at any position."""

    length: int = 128

    def windows(self, text, starts):
        rows = text[starts[:, None] + np.arange(self.length + 1)]
        return {"image": rows[:, :-1], "label": rows[:, 1:]}

    def __init__(self, module, share, batches, steps, rates):
        letters = text(max(200_000, int(share * 4_000_000)))
        held = letters[-100_000:]
        held = self.windows(held, np.arange(0, 99_000, 1500)[:64])
        super().__init__(
            module, token_loss, {"text": letters[:-100_000]}, held, batches, steps, rates
        )
        self.size -= self.length + 1

    def batch(self, rows):
        return self.windows(self.train["text"], rows)


def nets(data, share=1.0):
    """name -> a function that makes its `Net`, or None without data; and the images' source.

    Args:
      data: folder of the images.
      share: of steps and training examples, in (0, 1].
    """
    source = next((n for n in ("fashion", "mnist") if idx_images(data, n, "t10k")), None)

    def images(module, loss, batches, steps, rates, name=source):
        def some(part, count):
            pixels, classes = idx_images(data, name, part)
            count = min(count, len(pixels)) // 8 * 8
            return {"image": pixels[:count], "label": classes[:count]}

        train, held = some("train", int(share * 60000)), some("t10k", int(share * 2000) + 8)
        return Net(module, loss, train, held, batches, max(4, int(share * steps)), rates)

    softmax = losses.softmax_cross_entropy
    pixels = functools.partial(losses.sigmoid_cross_entropy, target="image")
    both = {
        "adamw": (1e-3, 3e-3),
        "schedule_free_adamw": (3e-3, 1e-2),
        "muon": (1e-2, 2e-2),
        "shampoo": (1e-3, 3e-3),
        "soap": (1e-3, 3e-3),
    }
    of_adam = ("adamw", "shampoo", "soap")
    text_rates = both | dict.fromkeys(of_adam, (3e-3, 6e-3))
    lstm_rates = both | {"adamw": (3e-3, 1e-2)}
    made = {
        "transformer": lambda: Text(
            LanguageModel(VOCABULARY), share, (32, 32), max(4, int(share * 300)), text_rates
        ),
        "vit": lambda: images(
            Square(ViT(10, patch=4, width=128, depth=5, heads=4, class_token=False)),
            softmax,
            (128, 128),
            300,
            both,
        ),
        "resnet": lambda: images(
            Square(ResNet(10, (2, 2, 2), (40, 80, 160), stem=(3, 2), pool=False)),
            softmax,
            (128, 128),
            300,
            both,
        ),
        "lstm": lambda: images(Rows(), softmax, (128, 128), 600, lstm_rates),
        "autoencoder": lambda: images(
            Autoencoder(widths=(1000, 500, 250, 30), kernel_init=sparse_init(15)),
            pixels,
            (1000, 200),
            3000,
            both,
            "mnist",
        ),
    }
    return {n: make if source or n == "transformer" else None for n, make in made.items()}, source
