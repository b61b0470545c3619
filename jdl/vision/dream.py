r"""Inceptionism: gradient ascent on a picture that increases a layer's activations.

    x ← clip(x + α (g / mean|g| − τ ∇TV(x))),      g = S ∗ ∇f P,      f(x) = Σ_layers mean(F²) / 2

F are a layer's activations at x. Other goals are mean(F_c), for one channel, and the mean over
places i of maxⱼ Fᵢ·Gⱼ, where G are the activations of a guide, another picture whose features are
to appear. S is a sum of blurs of three widths, which favours low frequencies; P, the covariance of
the colours of photographs, favours such colours. The picture is optimized at several sizes, called
octaves, from small to large, each starting with the details added at the one before. It is shifted
at random at every step, which averages out the grid of the network's strides.

Gradients are computed in tiles of at most `tile` × `tile` pixels, so that only a few copies of the
picture itself grow with its size.

References:
  Mordvintsev, Olah and Tyka, Inceptionism: going deeper into neural networks, Google Research,
  2015; and their published notebook, for octaves, jitter and guides.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.core.types import Params
from jdl.vision import images
from jdl.vision.trunk import Features, Trunk

# The root of the covariance of RGB in photographs: lightness, blue to yellow, green to red.
COLORS = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], np.float32)
GUIDE_PLACES = 1024  # places of a guide that are used
SMALLEST = 32  # pixels of an octave's shorter side


class Goal(NamedTuple):
    """The function that is maximized."""

    layers: tuple[str, ...]  # names of layers
    channels: tuple[int, ...] = ()  # channels of every layer; () for all
    # another picture's activations, [M, C] for each layer; None for no guide
    guide: Features | None = None


class Settings(NamedTuple):
    """Parameters of the gradient ascent.

    Attributes:
      octaves: largest number of sizes.
      scale: ratio of one octave's size to the size before, above 1.
      steps: steps at each octave.
      step_size: α, the mean change of a pixel in a step; pixels are in [0, 1].
      jitter: largest shift of the picture in a step, in pixels.
      smoothing: standard deviation of the narrowest blur in S, in pixels; 0 for none.
      natural: whether to favour the colours of photographs.
      variation: τ, the weight of the total-variation prior.
      blur: standard deviation of a blur of the picture after each step, in pixels; 0 for none.
      tile: largest height and width of a tile in pixels.

    >>> Settings(octaves=2).checked().scale
    1.4
    """

    octaves: int = 4
    scale: float = 1.4
    steps: int = 12
    step_size: float = 0.01
    jitter: int = 16
    smoothing: float = 0.5
    natural: bool = True
    variation: float = 0.0
    blur: float = 0.0
    tile: int = 512

    def checked(self) -> "Settings":
        """These settings; raises unless all are in range."""
        check.positive_ints(octaves=self.octaves, steps=self.steps, tile=self.tile)
        check.argument(self.tile >= SMALLEST, "tile", f"at least {SMALLEST}", self.tile)
        check.in_range("scale", float(self.scale), 1.0, 4.0, open_low=True)
        check.in_range("step_size", float(self.step_size), 0.0, 1.0, open_low=True)
        check.in_range("jitter", float(self.jitter), 0.0, 512.0)
        check.in_range("smoothing", float(self.smoothing), 0.0, 16.0)
        check.in_range("variation", float(self.variation), 0.0)
        check.in_range("blur", float(self.blur), 0.0, 16.0)
        return self


def goal(
    trunk: Trunk,
    layers: str | Sequence[str],
    *,
    channels: int | Sequence[int] = (),
    guide: ArrayLike | None = None,
) -> Goal:
    """A goal for a trunk.

    Args:
      trunk: the network.
      layers: names of its layers.
      channels: channels to increase; by default whole layers.
      guide: an image [H, W, 3] in [0, 1] whose features are to appear.

    Raises:
      ArgumentError: for unknown layers or channels.

    >>> doubled = Trunk("twice", ("twice",), 2.0, lambda p, x, layers: {"twice": p * x})
    >>> goal(doubled, "twice", channels=2).channels
    (2,)
    """
    names = trunk.known(layers)
    wanted = (channels,) if isinstance(channels, int) else tuple(channels)
    ok = guide is None or not wanted
    check.argument(ok, "guide", "left out where channels are given", wanted)
    if wanted:
        trunk.check_channels(names, wanted)
    if guide is None:
        return Goal(names, wanted)
    found = {}
    for name, x in trunk.features(images.as_image(guide, "guide")[None], names).items():
        flat = x.reshape(-1, x.shape[-1])
        found[name] = flat[:: -(-flat.shape[0] // GUIDE_PLACES)]
    return Goal(names, wanted, found)


def score(goal: Goal, features: Features) -> jax.Array:
    """f of the activations [1, h, w, C] or [1, C] of the goal's layers."""
    total = jnp.zeros((), jnp.float32)
    for name in goal.layers:
        x = features[name]
        if goal.guide is not None:
            alike = x.reshape(-1, x.shape[-1]) @ goal.guide[name].T
            total += jnp.mean(jnp.max(alike, axis=1)) / x.shape[-1]
        elif goal.channels:
            total += jnp.mean(x[..., jnp.asarray(goal.channels)])
        else:
            total += 0.5 * jnp.mean(jnp.square(x))
    return total


def dream(
    trunk: Trunk,
    image: ArrayLike,
    goal: Goal,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The optimized picture, float32 [H, W, 3] in [0, 1], of the image's size.

    Args:
      trunk: the network.
      image: [H, W, 3] in [0, 1] or uint8; may be gray or have alpha.
      goal: the function to maximize.
      settings: parameters of the gradient ascent.
      seed: for the shifts.
      on_step: called with (steps done, steps in all).

    Raises:
      ArgumentError: for a picture too small for the layer.
      UserError: where no step changes the picture.

    >>> doubled = Trunk("twice", ("twice",), 2.0, lambda p, x, layers: {"twice": p * x})
    >>> gray = np.full((40, 50, 3), 0.5, np.float32)
    >>> seen = dream(doubled, gray, goal(doubled, "twice"), Settings(octaves=2, steps=3))
    >>> seen.shape, bool(seen.mean() > 0.5)
    ((40, 50, 3), True)
    """
    how = (settings or Settings()).checked()
    base = images.as_image(image)
    sizes = octave_sizes(base.shape[:2], how)
    rng = np.random.default_rng(seed)
    detail = np.zeros((*sizes[0], 3), np.float32)
    for i, size in enumerate(sizes):
        start = np.clip(images.resized(base, size), 0, 1)
        x = jnp.asarray(np.clip(start + images.resized(detail, size), 0, 1))
        for j in range(how.steps):
            x = step(trunk, x, goal, how, rng)
            if on_step is not None:
                on_step(i * how.steps + j + 1, len(sizes) * how.steps)
        dreamt = np.asarray(x)
        detail = dreamt - start
    if not np.isfinite(dreamt).all():
        raise check.TrainingError("The dream is not finite; check the trunk's weights.")
    if not detail.any():
        layers = " and ".join(goal.layers)
        raise check.UserError(f"No step changes the picture: {layers} has no gradient there.")
    return np.clip(dreamt, 0, 1)


def octave_sizes(size: tuple[int, ...], how: Settings) -> list[tuple[int, int]]:
    """(height, width) of the octaves, from the smallest to the picture's own.

    >>> octave_sizes((100, 200), Settings(octaves=3, scale=2.0))
    [(50, 100), (100, 200)]
    """
    sizes = []
    for k in range(how.octaves):
        by = how.scale**-k
        height, width = round(size[0] * by), round(size[1] * by)
        if k and min(height, width) < SMALLEST:
            break
        sizes.append((height, width))
    return sizes[::-1]


def zoom(
    trunk: Trunk,
    image: ArrayLike,
    goal: Goal,
    settings: Settings | None = None,
    *,
    frames: int,
    zoom: float = 1.04,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Frames of a zoom: each is the enlarged middle of the one before, optimized again.

    From the second frame on the contrast is not increased, since increases would accumulate, and
    there are a quarter of the steps. `zoom` is the enlargement from frame to frame, above 1; other
    arguments are as for `dream`.
    """
    check.positive_int("frames", frames)
    check.in_range("zoom", float(zoom), 1.0, 2.0, open_low=True)
    how = (settings or Settings()).checked()
    after = how._replace(octaves=min(how.octaves, 2), steps=max(1, how.steps // 4))
    x = images.as_image(image)
    for i in range(frames):
        contrast = x.std()
        x = dream(trunk, x, goal, after if i else how, seed=seed + i, on_step=on_step)
        if i and x.std() > contrast:
            x = x.mean() + (x - x.mean()) * (contrast / x.std())
        yield x
        x = np.clip(enlarged(x, zoom), 0, 1)


def enlarged(image: np.ndarray, by: float) -> np.ndarray:
    """The middle of a picture [H, W, 3], enlarged to the picture's size."""
    height, width = image.shape[:2]
    scale = jnp.asarray([by, by], jnp.float32)
    shift = jnp.asarray([height * (1 - by) / 2, width * (1 - by) / 2], jnp.float32)
    picture = jnp.asarray(image)
    moved = jax.image.scale_and_translate(picture, image.shape, (0, 1), scale, shift, "cubic")
    return np.asarray(moved)


# ---------------------------------------------------------------------- one step


def step(
    trunk: Trunk, x: jax.Array, goal: Goal, how: Settings, rng: np.random.Generator
) -> jax.Array:
    """One step of gradient ascent on a picture [H, W, 3], shifted at random, tile by tile."""
    shift = jnp.asarray(rng.integers(-how.jitter, how.jitter + 1, 2), jnp.int32)
    shape = tuple(min(n, how.tile) for n in x.shape[:2])
    program: dict[str, Any] = {"apply": trunk.apply, "layers": goal.layers}
    program |= {"channels": goal.channels, "smoothing": how.smoothing, "shape": shape}
    if shape == x.shape[:2]:
        gradient = _shifted_gradient(trunk.params, x, goal.guide, shift, **program)
    else:
        gradient, covered = jnp.zeros_like(x), jnp.zeros((*x.shape[:2], 1), x.dtype)
        for corner in _corners(x.shape[:2], shape, rng):
            gradient, covered = _add_tile(
                trunk.params, x, goal.guide, jnp.asarray(corner), gradient, covered, **program
            )
        gradient = gradient / covered
    return ascend(x, gradient, how.step_size, how.variation, natural=how.natural, blur=how.blur)


def _corners(
    size: tuple[int, ...], shape: tuple[int, ...], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Corners of tiles inside the picture that cover it, with a random offset."""
    starts = []
    for n, t in zip(size, shape, strict=True):
        first = -int(rng.integers(0, t)) if n > t else 0
        starts.append(sorted({min(max(s, 0), n - t) for s in range(first, n, t)}))
    return [(down, across) for down in starts[0] for across in starts[1]]


def _gradient(
    params: Params,
    x: jax.Array,
    guide: Features | None,
    *,
    apply: Callable[..., Features],
    layers: tuple[str, ...],
    channels: tuple[int, ...],
    smoothing: float,
) -> jax.Array:
    """S ∗ ∇f at a picture or tile [H, W, 3]."""

    def value(x: jax.Array) -> jax.Array:
        return score(Goal(layers, channels, guide), apply(params, x[None], layers))

    gradient = jax.grad(value)(x)
    if not smoothing:
        return gradient
    narrow, middle, wide = (blurred(gradient, smoothing * 2**k) for k in (0, 1, 2))
    return narrow + middle + wide


_STATIC = ("apply", "layers", "channels", "smoothing", "shape")


@partial(jax.jit, static_argnames=_STATIC)
def _shifted_gradient(
    params: Params, x: jax.Array, guide: Any, shift: jax.Array, *, shape: Any, **program: Any
) -> jax.Array:
    rolled = jnp.roll(x, shift, axis=(0, 1))
    return jnp.roll(_gradient(params, rolled, guide, **program), -shift, axis=(0, 1))


@partial(jax.jit, static_argnames=_STATIC, donate_argnums=(4, 5))
def _add_tile(
    params: Params,
    x: jax.Array,
    guide: Features | None,
    corner: jax.Array,
    gradient: jax.Array,
    covered: jax.Array,
    *,
    shape: tuple[int, int],
    **program: Any,
) -> tuple[jax.Array, jax.Array]:
    at = (corner[0], corner[1], jnp.zeros_like(corner[0]))
    here = _gradient(params, lax.dynamic_slice(x, at, (*shape, 3)), guide, **program)
    here += lax.dynamic_slice(gradient, at, (*shape, 3))
    count = 1 + lax.dynamic_slice(covered, at, (*shape, 1))
    update = lax.dynamic_update_slice
    return update(gradient, here, at), update(covered, count, at)


@partial(jax.jit, static_argnames=("natural", "blur"))
def ascend(
    x: jax.Array,
    gradient: jax.Array,
    step_size: float | jax.Array,
    variation: float | jax.Array,
    *,
    natural: bool,
    blur: float,
) -> jax.Array:
    """One step with the priors; x and its gradient are [H, W, 3]."""
    if natural:
        gradient = gradient @ jnp.asarray(COLORS @ COLORS.T)
    gradient = gradient / (jnp.mean(jnp.abs(gradient)) + 1e-12)
    rough = jax.grad(total_variation)(x)
    x = jnp.clip(x + step_size * (gradient - variation * rough), 0, 1)
    return jnp.clip(blurred(x, blur), 0, 1) if blur else x


def total_variation(x: jax.Array) -> jax.Array:
    """Σ √(∂₁x² + ∂₂x²) over a picture [H, W, C], smoothed at 0.

    >>> edge = jnp.array([[0.0, 1.0], [0.0, 1.0]])[:, :, None]
    >>> round(float(total_variation(edge)), 1)
    2.0
    """
    down = jnp.pad(jnp.diff(x, axis=0), ((0, 1), (0, 0), (0, 0)))
    across = jnp.pad(jnp.diff(x, axis=1), ((0, 0), (0, 1), (0, 0)))
    return jnp.sum(jnp.sqrt(jnp.square(down) + jnp.square(across) + 1e-6) - 1e-3)


def blurred(x: jax.Array, width: float) -> jax.Array:
    """A picture [H, W, C] convolved with a Gaussian of this standard deviation; edges are repeated.

    >>> blurred(jnp.ones((4, 4, 1)), 1.0).round(3).min().item()
    1.0
    """
    reach = max(1, math.ceil(3 * width))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * np.square(offsets / width))
    weights /= weights.sum()
    for axis in (0, 1):
        around = [(0, 0)] * x.ndim
        around[axis] = (reach, reach)
        padded, n = jnp.pad(x, around, mode="edge"), x.shape[axis]
        x = jnp.zeros_like(x)
        for i, w in enumerate(weights):
            x += float(w) * lax.slice_in_dim(padded, i, i + n, axis=axis)
    return x
