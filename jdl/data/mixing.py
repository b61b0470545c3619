"""Mixup and cutmix: `transform(batch, key) -> batch`, pure, for `Estimator(batch_transform=)`.

As torchvision's: one λ for the batch, and each image is mixed with the one before it, which is
random where the data is shuffled. Rows that the mask leaves out are passed over and stay as they
are. With `parallel="pmap"` each device mixes its own part of the batch, with the same λ.
"""

from collections.abc import Callable
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

    def blend(image: jax.Array, other: jax.Array, share: jax.Array, key: Key) -> Any:
        of_image = share.astype(image.dtype)
        return of_image * image + (1.0 - of_image) * other, share

    return _mixing(blend, alpha, num_classes)


def cutmix(alpha: float = 1.0, *, num_classes: int) -> Transform:
    """A box of another image's in each, of area 1 − λ until cut at the edges (Yun 2019).

    λ is from Beta(α, α), the center uniform; labels are mixed by the area, as by `mixup`.

    Args:
      alpha: α > 0.
      num_classes: K.

    >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 1])}
    >>> cutmix(num_classes=3)(batch, jax.random.key(0))["label"].sum(1).tolist()
    [1.0, 1.0]
    """

    def paste(image: jax.Array, other: jax.Array, share: jax.Array, key: Key) -> Any:
        inside = []
        for own_key, length in zip(jax.random.split(key), image.shape[1:3], strict=True):
            center = jax.random.randint(own_key, (), 0, length)
            half = (0.5 * jnp.sqrt(1.0 - share) * length).astype(jnp.int32)
            places = jnp.arange(length)
            inside.append((places >= center - half) & (places < center + half))
        box = inside[0][:, None] & inside[1][None, :]
        return jnp.where(box[None, :, :, None], other, image), 1.0 - jnp.mean(box)

    return _mixing(paste, alpha, num_classes)


def one_of(*transforms: Transform) -> Transform:
    """One of these transforms at each step, all equally likely.

    >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 1])}
    >>> both = one_of(mixup(num_classes=3), cutmix(num_classes=3))
    >>> both(batch, jax.random.key(0))["image"].shape
    (2, 4, 4, 1)
    """
    check.argument(bool(transforms), "transforms", "functions of (batch, key)", transforms)

    def transform(batch: Batch, key: Key) -> Batch:
        chosen, key = jax.random.split(key)
        which = jax.random.randint(chosen, (), 0, len(transforms))
        mixed: Batch = jax.lax.switch(which, transforms, dict(batch), key)
        return mixed

    return transform


def _mixing(mix: Callable[..., Any], alpha: float, num_classes: int) -> Transform:
    check.in_range("alpha", alpha, 0.0, 1e3, open_low=True)
    check.positive_int("num_classes", num_classes)

    def transform(batch: Batch, key: Key) -> Batch:
        found = {name: f"{x.dtype}{list(x.shape)}" for name, x in batch.items()}
        image, label = (jnp.asarray(batch.get(name, 0)) for name in ("image", "label"))
        ok = image.ndim == 4 and jnp.issubdtype(image.dtype, jnp.floating)
        ok = ok and label.shape == image.shape[:1] and jnp.issubdtype(label.dtype, jnp.integer)
        must = "left out unless image is float [B, H, W, C] and label int [B]"
        check.argument(ok, "batch_transform", must, found, "uint8 is scaled if it is an input.")
        # Other class numbers make the loss NaN, as without mixing.
        known = (label >= 0) & (label < num_classes)
        labels = jnp.where(known[:, None], jax.nn.one_hot(label, num_classes), jnp.nan)
        of_share, of_mix = jax.random.split(key)
        share = jax.random.beta(of_share, alpha, alpha)
        before = _before(batch.get("mask"))
        image, share = mix(image, before(image), share, of_mix)
        labels = share * labels + (1.0 - share) * before(labels)
        return {**batch, "image": image, "label": labels}

    return transform


def _before(mask: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
    """The function that gives, for each row that counts, the one before; others stay."""
    if mask is None:
        return lambda x: jnp.roll(x, 1, axis=0)
    rows = jnp.arange(len(mask))
    last = jax.lax.cummax(jnp.where(mask > 0, rows, -1))
    previous = jnp.roll(last, 1)
    previous = jnp.where(previous < 0, last[-1], previous)
    return lambda x: x[jnp.where(mask > 0, previous, rows)]
