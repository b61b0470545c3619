"""Mixup and cutmix: `transform(batch, key) -> batch`, pure, for `Estimator(batch_transform=)`.

As torchvision's: one λ for the batch, and each image is mixed with the one before it, which is
random where the data is shuffled. Rows that the mask leaves out are passed over and stay as they
are. With `parallel="pmap"` each device mixes its own part of the batch, with the same λ.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.types import Batch, Key

Transform = Callable[[Batch, Key], Batch]


def mixup(alpha: float = 0.2, *, num_classes: int) -> Transform:
    """λ of each image and its label, and 1 − λ of another's, λ from Beta(α, α) (Zhang 2018).

    Labels become probabilities [B, K], which jdl's losses take; metrics count the larger part.

    Args:
      alpha: α > 0; 0.2 and 1 are usual.
      num_classes: K.

    >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 1])}
    >>> mixup(num_classes=3)(batch, jax.random.key(0))["label"].sum(1).tolist()
    [1.0, 1.0]
    """
    return partial(_transform, _mixup, *_checked(alpha, num_classes))


def cutmix(alpha: float = 1.0, *, num_classes: int) -> Transform:
    """A box of another image's in each, and the label by its area: 1 − λ, cut at the edges.

    λ is from Beta(α, α), the center uniform (Yun 2019); otherwise as `mixup`.

    Args:
      alpha: α > 0.
      num_classes: K.

    >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 1])}
    >>> cutmix(num_classes=3)(batch, jax.random.key(0))["label"].sum(1).tolist()
    [1.0, 1.0]
    """
    return partial(_transform, _cutmix, *_checked(alpha, num_classes))


def one_of(*transforms: Transform) -> Transform:
    """One of these transforms at each step, all equally likely.

    Args:
      *transforms: such as `mixup(num_classes=10), cutmix(num_classes=10)`.

    >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 1])}
    >>> both = one_of(mixup(num_classes=3), cutmix(num_classes=3))
    >>> both(batch, jax.random.key(0))["image"].shape
    (2, 4, 4, 1)
    """
    ok = len(transforms) > 0 and all(map(callable, transforms))
    check.argument(ok, "transforms", "functions of (batch, key)", transforms)
    return partial(_one_of, transforms)


def _one_of(transforms: tuple[Transform, ...], batch: Batch, key: Key) -> Batch:
    chosen, key = jax.random.split(key)
    which = jax.random.randint(chosen, (), 0, len(transforms))
    mixed: Batch = jax.lax.switch(which, transforms, dict(batch), key)
    return mixed


def _checked(alpha: float, num_classes: int) -> tuple[float, int]:
    check.in_range("alpha", alpha, 0.0, 1e3, open_low=True)
    check.positive_int("num_classes", num_classes)
    return alpha, num_classes


def _transform(mix: Any, alpha: float, num_classes: int, batch: Batch, key: Key) -> Batch:
    for name in ("image", "label"):
        must = "left out for batches without an image and a label"
        check.argument(name in batch, "batch_transform", must, sorted(batch))
    image, label = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
    check.argument(
        image.ndim == 4 and jnp.issubdtype(image.dtype, jnp.floating),
        "batch['image']",
        "floating-point [B, H, W, C] for mixup and cutmix",
        f"{image.dtype} {list(image.shape)}",
        "Name it as `inputs`: uint8 images are scaled then.",
    )
    check.argument(
        label.shape == image.shape[:1] and jnp.issubdtype(label.dtype, jnp.integer),
        "batch['label']",
        "int [B] for mixup and cutmix",
        f"{label.dtype} {list(label.shape)}",
    )
    known = (label >= 0) & (label < num_classes)  # others make the loss NaN, as without mixing
    shares = jnp.where(known[:, None], jax.nn.one_hot(label, num_classes), jnp.nan)
    first, second = jax.random.split(key)
    share = jax.random.beta(first, alpha, alpha)
    before = _before(batch.get("mask"))
    image, share = mix(image, before(image), share, second)
    return {**batch, "image": image, "label": share * shares + (1.0 - share) * before(shares)}


def _before(mask: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
    """The function that gives, for each row that counts, the one before; others stay."""
    if mask is None:
        return lambda x: jnp.roll(x, 1, axis=0)
    rows = jnp.arange(len(mask))
    last = jax.lax.cummax(jnp.where(mask > 0, rows, -1))
    previous = jnp.roll(last, 1).at[0].set(-1)
    previous = jnp.where(previous < 0, last[-1], previous)
    return lambda x: x[jnp.where(mask > 0, previous, rows)]


def _mixup(
    image: jax.Array, other: jax.Array, share: jax.Array, key: Key
) -> tuple[jax.Array, jax.Array]:
    del key
    return share.astype(image.dtype) * image + (1.0 - share).astype(image.dtype) * other, share


def _cutmix(
    image: jax.Array, other: jax.Array, share: jax.Array, key: Key
) -> tuple[jax.Array, jax.Array]:
    keys, inside, area = jax.random.split(key), jnp.ones((), bool), jnp.ones(())
    for axis, own_key in zip((1, 2), keys, strict=True):
        length = image.shape[axis]
        center = jax.random.randint(own_key, (), 0, length)
        half = (0.5 * jnp.sqrt(1.0 - share) * length).astype(jnp.int32)
        start, stop = jnp.maximum(center - half, 0), jnp.minimum(center + half, length)
        places = jnp.expand_dims(jnp.arange(length), [i for i in range(4) if i != axis])
        inside = inside & (places >= start) & (places < stop)
        area = area * ((stop - start) / length)
    return jnp.where(inside, other, image), 1.0 - area
