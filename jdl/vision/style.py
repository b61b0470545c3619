r"""Neural style transfer by optimizing an image (Gatys, Ecker and Bethge).

    f(x) = a · content(x) + b · style(x) + c · variation(x)

    content    mean over its layers of  ‖F(x) − F(photograph)‖² / ‖F(painting)‖²   (per value)
    style      mean over its layers of  ‖G(x) − G(painting)‖² / ‖G(painting)‖²,   G = Fᵀ F / (h w)
    variation  mean squared difference of neighbouring pixels, and of the excess over [0, 1]

F are a trunk's activations and G their Gram matrices: which features appear together, at any place
of the picture. Every layer is measured relative to the painting, so that weights mean the same with
any trunk, layers and size. (The paper does not divide by the painting's values; the weight of a
layer then depends on its number of channels and the size of its values.)

The training of style networks uses `Target` and `terms` too, with a batch of photographs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.optim.lbfgs import lbfgs
from jdl.vision.images import as_image, resized
from jdl.vision.trunk import Features, Trunk

STARTS = ("photograph", "noise")


class Layers(NamedTuple):
    """The layers that compare content and style.

    Attributes:
      content: layers whose activations should equal the photograph's.
      style: layers whose Gram matrices should equal the painting's.

    >>> Layers(content=("relu4_2",), style=("relu1_1", "relu4_2")).all
    ('relu4_2', 'relu1_1')
    """

    content: tuple[str, ...]
    style: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """The layers of both, without duplicates."""
        return tuple(dict.fromkeys(self.content + self.style))


class Weights(NamedTuple):
    """The weights of the objective's terms.

    Attributes:
      content: a, the weight of the photograph's content.
      style: b, the weight of the painting's style.
      variation: c, the weight of smoothness.

    >>> Weights(style=100.0).checked().content
    1.0
    """

    content: float = 1.0
    style: float = 30.0
    variation: float = 5.0

    def checked(self) -> "Weights":
        """These weights; raises if one is negative, or content and style are both 0."""
        for name, value in self._asdict().items():
            check.in_range(f"weights.{name}", value, 0.0)
        ok = self.content + self.style > 0
        check.argument(ok, "weights", "above 0 for content, style or both", tuple(self))
        return self


class Palette(NamedTuple):
    """Statistics of S paintings."""

    grams: dict[str, jax.Array]  # style layer -> Gram matrices [S, C, C]
    energy: dict[str, jax.Array]  # content layer -> mean square of its activations


class Target(NamedTuple):
    """What B images are compared with."""

    content: Features  # content layer -> the photographs' activations, [B, h, w, C]
    energy: dict[str, jax.Array]  # content layer -> divisor of their squared difference
    grams: dict[str, jax.Array]  # style layer -> Gram matrices [B, C, C]


class Terms(NamedTuple):
    """The three terms without their weights, float32[B] each."""

    content: jax.Array
    style: jax.Array
    variation: jax.Array

    def total(self, weights: Weights) -> jax.Array:
        """The objective, [B]."""
        a, b, c = (float(w) for w in weights)
        return a * self.content + b * self.style + c * self.variation


class Painted(NamedTuple):
    """The result of a style transfer."""

    image: np.ndarray  # float32 [H, W, 3] in [0, 1]
    losses: np.ndarray  # the objective before each step and after the last, at the final scale
    terms: Terms  # the terms of the final image before it is clipped


def usual_layers(trunk: Trunk) -> Layers:
    """The usual choice: style at the first rectified layer of the five finest resolutions.

    Content is compared one rectified layer after the second coarsest of these. For VGG-16 that is
    the paper's choice: relu1_1, relu2_1, … relu5_1, and relu4_2.
    """
    heights = {n: s[1] for n, s in trunk.shapes(trunk.layers).items() if len(s) == 4 and s[1] > 1}
    maps = [n for n in heights if "relu" in n]
    if len({heights[n] for n in maps}) < min(4, len({*heights.values()})):  # as in SqueezeNet,
        inner = ("conv", "pool", "/")  # whose rectified layers are inside of blocks
        maps = [n for n in heights if not any(word in n for word in inner)]
    maps = maps or list(heights)
    if not maps:
        raise check.UserError(f"{trunk.name} has no layer with activations [N, h, w, C].")
    firsts = {heights[n]: n for n in reversed(maps)}  # height -> its first layer
    style = tuple(sorted(firsts.values(), key=maps.index))[:5]
    content = maps.index(style[max(0, len(style) - 2)]) + 1
    return Layers((maps[min(content, len(maps) - 1)],), style)


def gram(features: jax.Array) -> jax.Array:
    """Fᵀ F / (h w) of activations [B, h, w, C], as [B, C, C].

    >>> gram(jnp.arange(4.0).reshape(1, 2, 1, 2)).tolist()
    [[[2.0, 3.0], [3.0, 5.0]]]
    """
    check.argument(features.ndim == 4, "layer", "one with rows and columns", features.shape)
    flat = features.reshape(features.shape[0], -1, features.shape[3])
    return jnp.einsum("bpc,bpd->bcd", flat, flat) / jnp.asarray(flat.shape[1], flat.dtype)


def variation(images: jax.Array) -> jax.Array:
    """Mean squared difference of neighbours, and mean squared excess over [0, 1]: [B].

    >>> variation(jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1).repeat(2, 1)).tolist()
    [1.0]
    """

    def mean_square(x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(x), axis=(1, 2, 3)) if x.size else jnp.zeros(len(x), x.dtype)

    down, across = jnp.diff(images, axis=1), jnp.diff(images, axis=2)
    return mean_square(down) + mean_square(across) + mean_square(images - jnp.clip(images, 0, 1))


def palette(trunk: Trunk, pictures: Sequence[ArrayLike], layers: Layers) -> Palette:
    """Statistics of pictures [H, W, 3] in [0, 1], of any sizes."""
    check.argument(len(pictures) > 0, "pictures", "at least one", len(pictures))
    features = _compiled_features(trunk.apply, trunk.known(layers.all))
    grams: dict[str, list[jax.Array]] = {name: [] for name in layers.style}
    energies: dict[str, list[jax.Array]] = {name: [] for name in layers.content}
    for picture in pictures:
        found = features(trunk.params, _batch(picture, "painting"))
        for name in layers.style:
            grams[name].append(gram(found[name])[0])
        for name in layers.content:
            energies[name].append(jnp.mean(jnp.square(found[name])))
    return Palette(
        {name: jnp.stack(x) for name, x in grams.items()},
        {name: jnp.mean(jnp.stack(x)) for name, x in energies.items()},
    )


@functools.lru_cache(maxsize=16)
def _compiled_features(
    apply: Callable[..., Features], layers: tuple[str, ...]
) -> Callable[..., Features]:
    return jax.jit(lambda params, images: apply(params, images, layers))


def target(palette: Palette, mixture: jax.Array, photographs: Features) -> Target:
    """The target with the content of photographs' activations and a mixture [B, S] of styles."""
    grams = {n: jnp.einsum("bs,scd->bcd", mixture, g) for n, g in palette.grams.items()}
    return Target({n: photographs[n] for n in palette.energy}, palette.energy, grams)


def terms(images: jax.Array, found: Features, target: Target) -> Terms:
    """The terms for images [B, H, W, 3] with the activations `found`."""

    def mean(values: list[jax.Array]) -> jax.Array:
        return jnp.mean(jnp.stack(values), axis=0) if values else jnp.zeros(len(images))

    content = [
        jnp.mean(jnp.square(found[n] - wanted), axis=(1, 2, 3)) / target.energy[n]
        for n, wanted in target.content.items()
    ]
    square = lambda g: jnp.sum(jnp.square(g), axis=(1, 2))  # noqa: E731
    style = [square(gram(found[n]) - g) / square(g) for n, g in target.grams.items()]
    return Terms(mean(content), mean(style), variation(images))


def objective(
    apply: Callable[..., Features], layers: Layers, weights: Weights
) -> Callable[[jax.Array, Any, Target], jax.Array]:
    """f(image [1, H, W, 3], params, target), a scalar; `apply` and `params` are a trunk's."""

    def f(image: jax.Array, params: Any, target: Target) -> jax.Array:
        return terms(image, apply(params, image, layers.all), target).total(weights)[0]

    return f


def transfer(
    trunk: Trunk,
    photograph: ArrayLike,
    paintings: Sequence[ArrayLike],
    *,
    shares: Sequence[float | int] | None = None,
    weights: Weights = Weights(),  # noqa: B008  it is immutable
    layers: Layers | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 100,
    scales: int = 1,
    start: str = "photograph",
    seed: int = 0,
    hook: Callable[[int, float], None] | None = None,
) -> Painted:
    """The photograph painted in the style of the paintings.

    Args:
      trunk: the network whose activations are compared.
      photograph: [H, W, 3] in [0, 1].
      paintings: one or several [h, w, 3] in [0, 1]; their size in pixels sets that of the strokes.
      shares: share of each style; by default equal shares.
      weights: weights of content, style and variation.
      layers: the layers that compare content and style; by default `usual_layers`.
      optimizer: any optax transformation of the image, first or second order; by default L-BFGS.
      steps: optimizer steps at each scale, ≥ 1.
      scales: number of sizes, each twice the one before, the last the photograph's.
      start: the initial image, "photograph" or "noise".
      seed: for the noise.
      hook: called with (step, loss before it).

    Raises:
      ArgumentError: for an argument out of range, an unknown layer, or a wrong array.
      TrainingError: if the loss is not finite.

    References:
      Gatys, Ecker and Bethge, Image style transfer using convolutional neural networks, CVPR 2016.
    """
    check.positive_int("steps", steps)
    check.positive_int("scales", scales)
    check.one_of("start", start, STARTS)
    weights.checked()
    layers = usual_layers(trunk) if layers is None else layers
    trunk.known(layers.all)
    mixture = mixed(shares, len(paintings))
    run = _compiled(trunk.apply, layers, weights, optimizer or _usual_optimizer())

    whole = _batch(photograph, "photograph")
    pictures = [_batch(p, "painting") for p in paintings]
    least = min(whole.shape[1:3]) // 2 ** (scales - 1)
    must = "smaller, so that the first scale has at least 16 pixels"
    check.argument(least >= 16, "scales", must, scales)
    image = None
    for i in reversed(range(scales)):
        here = _resized(whole, tuple(n // 2**i for n in whole.shape[1:3]))
        sizes = [tuple(max(n // 2**i, 1) for n in p.shape[1:3]) for p in pictures]
        styles = [_resized(p, n)[0] for p, n in zip(pictures, sizes, strict=True)]
        wanted = target(palette(trunk, styles, layers), mixture, run.features(trunk.params, here))
        if image is not None:
            image = _resized(image, here.shape[1:3])
        else:
            noise = jax.random.uniform(jax.random.key(seed), here.shape)
            image = here if start == "photograph" else noise
        state, losses = run.init(image), []
        for step in range(steps):
            image, state, value = run.step(image, state, (trunk.params, wanted))
            losses.append(float(value))
            if not np.isfinite(losses[-1]):
                hint = "Use a smaller learning rate."
                raise check.TrainingError(f"The loss is {losses[-1]} at step {step}. {hint}")
            if hook is not None:
                hook(step, losses[-1])
    assert image is not None
    found = run.terms(image, trunk.params, wanted)
    losses.append(float(found.total(weights)[0]))
    return Painted(np.clip(np.asarray(image[0]), 0.0, 1.0), np.asarray(losses), found)


def mixed(shares: Sequence[float | int] | None, count: int) -> jax.Array:
    """Shares of `count` styles as [1, count] with sum 1; equal shares for None.

    >>> mixed([3, 1], 2).tolist()
    [[0.75, 0.25]]
    """
    given = [1.0] * count if shares is None else [float(s) for s in shares]
    check.argument(len(given) == count, "shares", f"{count} numbers, one for each style", shares)
    ok = all(0 <= s < np.inf for s in given) and sum(given) > 0
    check.argument(ok, "shares", "not negative, and not all 0", shares)
    return jnp.asarray([given], jnp.float32) / jnp.asarray(sum(given), jnp.float32)


def with_colors_of(photograph: ArrayLike, painted: ArrayLike) -> np.ndarray:
    """The painting's brightness with the photograph's colours, both [H, W, 3] in [0, 1].

    >>> gray, red = np.full((1, 1, 3), 0.4), np.array([[[0.5, 0.0, 0.0]]])
    >>> with_colors_of(red, gray).round(2).tolist()
    [[[0.75, 0.25, 0.25]]]

    References:
      Gatys et al., Controlling perceptual factors in neural style transfer, CVPR 2017, section 5.1.
    """
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    photograph, painted = (np.asarray(x, np.float32) for x in (photograph, painted))
    change = (painted - photograph) @ luma
    return np.clip(photograph + change[..., None], 0.0, 1.0)


class _Compiled(NamedTuple):
    """The compiled functions of a transfer."""

    features: Callable[..., Features]
    terms: Callable[..., Terms]
    init: Callable[[jax.Array], Any]
    step: Callable[..., tuple[jax.Array, Any, jax.Array]]


@functools.lru_cache(maxsize=16)  # a picture of a size seen before needs no compilation
def _compiled(
    apply: Callable[..., Features],
    layers: Layers,
    weights: Weights,
    optimizer: optax.GradientTransformation,
) -> _Compiled:
    f = objective(apply, layers, weights)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(image: jax.Array, state: Any, fixed: Any) -> tuple[jax.Array, Any, jax.Array]:
        """One optimizer step on an image; also returns f before it."""

        def value_fn(image: jax.Array, **_: Any) -> jax.Array:
            return f(image, *fixed)

        # Some states hold value and gradient at the point where their line search ended.
        if optax.tree.get(state, "grad", None) is not None:
            value, grad = optax.value_and_grad_from_state(value_fn)(image, state=state)
        else:
            value, grad = jax.value_and_grad(value_fn)(image)
        with jax.numpy_dtype_promotion("standard"):
            more = {"value": value, "grad": grad, "value_fn": value_fn}
            updates, state = optimizer.update(grad, state, image, **more)
        return optax.apply_updates(image, updates), state, value

    return _Compiled(
        features=_compiled_features(apply, layers.all),
        terms=jax.jit(lambda x, params, target: terms(x, apply(params, x, layers.all), target)),
        init=jax.jit(optimizer.init),
        step=jax.jit(step),
    )


_usual_optimizer = functools.cache(lbfgs)


def _batch(picture: ArrayLike, name: str) -> jax.Array:
    return jnp.asarray(as_image(picture, name))[None]


def _resized(images: jax.Array, size: tuple[int, ...]) -> jax.Array:
    if images.shape[1:3] == tuple(size):
        return images
    return jnp.asarray(np.clip(resized(images[0], (size[0], size[1])), 0.0, 1.0))[None]
