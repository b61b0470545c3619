r"""A network's activations on pictures, and which parts of a picture a class depends on.

    Grad-CAM     relu(Σ_c α_c F_c),   α_c = mean over places of ∂y/∂F_c
    saliency     mean over noise ε and shifts of  max over colours of |∂y/∂x|(x + ε)

F are a layer's activations [h, w, C], x is the picture and y a class's logit.

References:
  Zeiler and Fergus, Visualizing and understanding convolutional networks, ECCV 2014, section 4.
  Selvaraju et al., Grad-CAM: visual explanations from deep networks, ICCV 2017, section 3.
  Simonyan, Vedaldi and Zisserman, Deep inside convolutional networks, ICLR workshop 2014, sec. 3.
  Smilkov et al., SmoothGrad: removing noise by adding noise, arXiv:1706.03825.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.core.types import Batch, Params
from jdl.data.images import CENTER
from jdl.train.feed import one_pass
from jdl.vision import images
from jdl.vision.trunk import Features, Trunk


class Maps(NamedTuple):
    """Activations of n channels on one picture: the channels' numbers, and values [n, h, w]."""

    channels: tuple[int, ...]
    values: np.ndarray


class Exciting(NamedTuple):
    """The n images of a data set on which a channel has its largest activations, largest first."""

    channel: int  # its number
    scores: np.ndarray  # its largest activation on each image
    positions: np.ndarray  # positions among the images of the data, from 0
    images: np.ndarray  # float32 [n, H, W, 3] in [0, 1]


class Explained(NamedTuple):
    """A class's number, and how much each place of a picture matters to it, [H, W] in [0, 1]."""

    number: int
    heat: np.ndarray


def maps(
    trunk: Trunk,
    image: ArrayLike,
    layer: str,
    *,
    channels: Sequence[int] | None = None,
    count: int = 16,
) -> Maps:
    """The activations of a layer's channels on one picture.

    Args:
      trunk: the network.
      image: [H, W, 3] in [0, 1] or uint8; may be gray or have alpha.
      layer: its name; a dense layer's units are drawn as one square map, row by row.
      channels: their numbers; by default the `count` of the largest mean, largest first.
      count: number of channels.

    >>> twice = Trunk("twice", ("twice",), 2.0, lambda p, x, layers: {"twice": p * x})
    >>> found = maps(twice, np.full((4, 6, 3), 0.25), "twice", channels=[1])
    >>> found.values.shape, float(found.values.max())
    ((1, 4, 6), 0.5)
    """
    check.positive_int("count", count)
    found = np.asarray(trunk.features(images.as_image(image)[None], layer)[layer][0])
    if found.ndim == 1:
        ok, must = channels is None, "left out for a dense layer, which is drawn whole"
        check.argument(ok, "channels", must, channels)
        side = math.ceil(math.sqrt(found.size))
        square = np.zeros(side * side, np.float32)
        square[: found.size] = found
        return Maps((0,), square.reshape(1, side, side))
    check.argument(found.ndim == 3, "layer", "one of images or vectors", found.shape)
    if channels is None:
        channels = np.argsort(-found.mean(axis=(0, 1)), kind="stable")[:count].tolist()
    else:
        trunk.check_channels((layer,), channels)
    chosen = tuple(int(c) for c in channels or ())
    return Maps(chosen, found[:, :, list(chosen)].transpose(2, 0, 1))


def drawn(found: Maps, *, side: int = 160, columns: int | None = None) -> np.ndarray:
    """The maps on one sheet, each scaled to its maximum; activations below 0 are black."""
    tiles, captions = [], []
    for channel, values in zip(found.channels, found.values, strict=True):
        positive = np.maximum(values, 0)
        tiles.append(images.colored(positive / max(float(positive.max()), 1e-12)))
        captions.append(f"channel {channel}, max {values.max():.3g}")
    return images.sheet(tiles, columns=columns, captions=captions, side=side)


def exciting(
    trunk: Trunk, data: Iterable[Batch], layer: str, channels: Sequence[int], *, count: int = 9
) -> list[Exciting]:
    """For each channel, the images with its largest activation at any place.

    One batch and the best images so far are kept in memory.

    Args:
      trunk: the network.
      data: batches with "image" [B, H, W, 1 or 3], uint8 or floating in [0, 1]; a data set of
        `jdl.data` is read once.
      layer: its name.
      channels: their numbers.
      count: number of images for each channel.

    >>> twice = Trunk("twice", ("twice",), 2.0, lambda p, x, layers: {"twice": p * x})
    >>> data = [{"image": np.linspace(0, 1, 8).reshape(2, 2, 2, 1)}]
    >>> exciting(twice, data, "twice", [0], count=1)[0].positions.tolist()
    [1]
    """
    check.positive_int("count", count)
    check.argument(len(channels) > 0, "channels", "at least one", tuple(channels))
    (name,) = trunk.known(layer)
    trunk.check_channels((name,), channels)
    best: list[list[tuple[float, int, np.ndarray]]] = [[] for _ in channels]
    seen = 0
    for batch in one_pass(data):
        x = np.asarray(batch["image"])
        mask = np.asarray(batch.get("mask", np.ones(len(x)))) > 0  # padding is scored with the rest
        x = x.astype(np.float32) / 255 if x.dtype == np.uint8 else x.astype(np.float32)
        x = np.repeat(x, 3, axis=3) if x.shape[3] == 1 else x
        largest = np.asarray(_largest(trunk.params, x, apply=trunk.apply, layer=name))[mask]
        x = x[mask]
        for kept, channel in zip(best, channels, strict=True):
            for i in np.argsort(-largest[:, channel], kind="stable")[:count]:
                kept.append((float(largest[i, channel]), seen + int(i), x[i]))
            kept.sort(key=lambda each: (-each[0], each[1]))
            del kept[count:]
        seen += len(x)
    if not seen:
        raise check.DataError("`data` must hold at least one image.")
    found = []
    for channel, kept in zip(channels, best, strict=True):
        scores, positions, pictures = zip(*kept, strict=True)
        best_of = np.array(scores), np.array(positions), np.stack(pictures)
        found.append(Exciting(int(channel), *best_of))
    return found


@partial(jax.jit, static_argnames=("apply", "layer"))
def _largest(
    params: Params, x: jax.Array, *, apply: Callable[..., Features], layer: str
) -> jax.Array:
    found = apply(params, x, (layer,))[layer]
    return found.reshape(found.shape[0], -1, found.shape[-1]).max(axis=1)


def classify(trunk: Trunk, image: ArrayLike, *, count: int = 5) -> list[tuple[str, float]]:
    """The most probable classes of a picture with their probabilities.

    The picture's middle, a square for square training images, is resized to their size; all of the
    picture is stretched to it for a trunk that is `stretched`.

    Args:
      trunk: a classifier.
      image: [H, W, 3] in [0, 1] or uint8; may be gray or have alpha.
      count: number of classes.

    >>> from jdl.vision.layers import addressable
    >>> apply = addressable(lambda p, x, note: note("logits", jnp.mean(x, axis=(1, 2))))
    >>> names = ("red", "green", "blue")
    >>> trunk = Trunk("colours", ("logits",), (), apply, head="logits", classes=names)
    >>> picture = np.zeros((4, 4, 3))
    >>> picture[:, :2, 0] = 1.0
    >>> classify(trunk, picture, count=1)[0][0]
    'red'
    """
    check.positive_int("count", count)
    head = trunk.with_head()
    logits = trunk.features(_seen(trunk, image)[0], head)[head][0]
    shares = np.asarray(jax.nn.softmax(logits))
    order = np.argsort(-shares, kind="stable")[:count]
    return [(trunk.class_name(int(i)), float(shares[i])) for i in order]


def grad_cam(
    trunk: Trunk, image: ArrayLike, layer: str, *, wanted: int | str | None = None
) -> Explained:
    """Where in a picture a layer finds evidence for a class (Grad-CAM).

    Args:
      trunk: a classifier.
      image: [H, W, 3] in [0, 1] or uint8; the network sees what it does in `classify`, and the
        heat is 0 elsewhere.
      layer: with activations [N, h, w, C]; late layers respond to objects, early ones to textures.
      wanted: the class's name or number; by default the most probable.

    >>> from jdl.vision.layers import addressable
    >>> def forward(params, x, note):
    ...     note("logits", jnp.mean(note("pixels", x), axis=(1, 2)))
    >>> trunk = Trunk("colours", ("pixels", "logits"), (), addressable(forward), head="logits")
    >>> picture = np.zeros((4, 4, 3))
    >>> picture[:, :2, 0] = 1.0
    >>> grad_cam(trunk, picture, "pixels").heat[0].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    (name,) = trunk.known(layer)
    x, number, placed = _seen(trunk, image, wanted)
    shape = trunk.shapes((name,))[name]
    check.argument(len(shape) == 4, "layer", "one of activations [N, h, w, C]", shape)
    program = {"apply": trunk.apply, "head": trunk.head, "layer": name}
    heat = _cam(trunk.params, x, jnp.asarray(number), **program)
    return Explained(number, placed(heat, 1.0))


@partial(jax.jit, static_argnames=("apply", "head", "layer"))
def _cam(
    params: Params,
    x: jax.Array,
    number: jax.Array,
    *,
    apply: Callable[..., Features],
    head: str,
    layer: str,
) -> jax.Array:
    def logit(edit: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = apply(params, x, (layer, head), {layer: edit})
        return found[head][0, number], found[layer]

    shape = jax.eval_shape(partial(apply, layers=(layer,)), params, x)[layer]
    slope, activations = jax.grad(logit, has_aux=True)(jnp.zeros(shape.shape, shape.dtype))
    weights = jnp.mean(slope, axis=(1, 2), keepdims=True)
    return jax.nn.relu(jnp.sum(weights * activations, axis=3))[0]


def saliency(
    trunk: Trunk,
    image: ArrayLike,
    *,
    wanted: int | str | None = None,
    samples: int = 16,
    noise: float = 0.1,
    seed: int = 0,
) -> Explained:
    """How much each pixel of a picture changes a class's logit.

    Args:
      trunk: a classifier.
      image: as for `grad_cam`.
      wanted: as for `grad_cam`.
      samples: number of noisy copies whose gradients are averaged; all but the first are shifted by
        some pixels, which averages out the grid of the network's strides.
      noise: standard deviation of the noise, in [0, 1].
      seed: for the noise.

    >>> from jdl.vision.layers import addressable
    >>> apply = addressable(lambda p, x, note: note("logits", jnp.mean(x, axis=(1, 2))))
    >>> trunk = Trunk("colours", ("logits",), (), apply, head="logits")
    >>> saliency(trunk, np.full((4, 4, 3), 0.5), samples=1, noise=0.0).heat[0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    check.positive_int("samples", samples)
    check.in_range("noise", float(noise), 0.0, 1.0)
    x, number, placed = _seen(trunk, image, wanted)
    program = {"apply": trunk.apply, "head": trunk.head}
    total, rng = np.zeros(x.shape[1:3], np.float32), np.random.default_rng(seed)
    for i in range(samples):
        shift = rng.integers(-8, 9, 2) if i else (0, 0)
        noisy = x + (noise * rng.standard_normal(x.shape)).astype(np.float32)
        shifted = jnp.roll(noisy, shift, axis=(1, 2))
        slope = np.asarray(_slope(trunk.params, shifted, jnp.asarray(number), **program))
        total += np.roll(slope, np.negative(shift), axis=(0, 1))
    return Explained(number, placed(total / samples, 0.995))


@partial(jax.jit, static_argnames=("apply", "head"))
def _slope(
    params: Params, x: jax.Array, number: jax.Array, *, apply: Callable[..., Features], head: str
) -> jax.Array:
    slope = jax.grad(lambda x: apply(params, x, (head,))[head][0, number])(x)
    return jnp.max(jnp.abs(slope), axis=3)[0]


def overlaid(image: ArrayLike, heat: np.ndarray, *, strength: float = 0.6) -> np.ndarray:
    """A gray picture with the heat [H, W] in colours over it."""
    x = images.as_image(image)
    gray = np.repeat(x.mean(axis=2, keepdims=True), 3, axis=2)
    share = strength * heat[:, :, None]
    return (1 - share) * (0.3 * x + 0.7 * gray) + share * images.colored(heat, "inferno")


def _seen(
    trunk: Trunk, image: ArrayLike, wanted: int | str | None = None
) -> tuple[jax.Array, int, Callable[..., np.ndarray]]:
    """What a classifier sees of a picture, [1, h, w, 3]; the class wanted, or the most probable.

    And the function that places heat [h, w] on the picture, [H, W], with its quantile q as 1.
    """
    x, head = images.as_image(image), trunk.with_head()
    shape = (x.shape[0], x.shape[1])
    box = (0, 0, *shape) if trunk.stretched else CENTER.box(*shape, trunk.size or (1, 1))
    top, left, high, wide = (max(int(n), i // 2) for i, n in enumerate(box))
    window = (slice(top, top + high), slice(left, left + wide))

    def placed(heat: ArrayLike, q: float) -> np.ndarray:
        inside = images.resized(np.asarray(heat)[:, :, None], (high, wide))[:, :, 0]
        whole = np.zeros(shape, np.float32)
        whole[window] = np.clip(inside / max(float(np.quantile(inside, q)), 1e-12), 0, 1)
        return whole

    pixels = jnp.asarray(np.clip(images.resized(x[window], trunk.size or (high, wide)), 0, 1))[None]
    if wanted is not None:
        return pixels, trunk.class_number(wanted), placed
    return pixels, int(np.argmax(np.asarray(trunk.features(pixels, head)[head][0]))), placed
