r"""Feature visualization: the picture that maximizes a class's logit or a channel's activation.

    maxₛ  E_T [ mean F_c(T(x)) ] / γ − τ TV(x),      x = sigmoid(C · F⁻¹(s / |ω|))

Adam optimizes the spectrum s of the picture x. Dividing by the frequency |ω| and mixing the colours
by C, the root of the covariance of photographs' colours, gives the directions in s the scale they
have in photographs. γ is the mean absolute gradient of the first term, so that τ means the same for
any network. T is a random shift and scaling, so that the result does not depend on single pixels.
There are no other priors: no other network and no photograph is used.

References:
  Erhan, Bengio, Courville and Vincent, Visualizing higher-layer features of a deep network, 2009.
  Simonyan, Vedaldi and Zisserman, Deep inside convolutional networks, ICLR workshop 2014, sec. 2.
  Olah, Mordvintsev and Schubert, Feature visualization, Distill 2017, doi:10.23915/distill.00007.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl.core import check
from jdl.core.types import Params
from jdl.vision.dream import COLORS, total_variation
from jdl.vision.trunk import LUMA, Features, Trunk

_MIXING = COLORS / np.max(np.linalg.norm(COLORS, axis=0))


class PictureSearch(NamedTuple):
    """Parameters of the search.

    Attributes:
      size: height and width of the pictures in pixels.
      steps: number of Adam steps.
      learning_rate: of Adam on the spectrum.
      shift: largest shift, as a share of the picture's side.
      stretch: largest enlargement or reduction, as a share.
      variation: τ, the weight of the total-variation prior.

    >>> PictureSearch(size=64).checked().steps
    128
    """

    size: int = 128
    steps: int = 128
    learning_rate: float = 0.05
    shift: float = 0.1
    stretch: float = 0.2
    variation: float = 0.3

    def checked(self) -> "PictureSearch":
        """This search; raises unless all parameters are in range."""
        check.argument(16 <= self.size <= 1024, "size", "from 16 to 1024", self.size)
        check.positive_int("steps", self.steps)
        check.in_range("learning_rate", float(self.learning_rate), 0.0, open_low=True)
        check.in_range("shift", float(self.shift), 0.0, 0.5)
        check.in_range("stretch", float(self.stretch), 0.0, 0.5)
        check.in_range("variation", float(self.variation), 0.0)
        return self


def of_class(
    trunk: Trunk, wanted: int | str, search: PictureSearch | None = None, **options: Any
) -> np.ndarray:
    """The picture [S, S, 3] that maximizes a class's logit.

    Args:
      trunk: a classifier.
      wanted: the class's name or number.
      search: parameters; by default a larger picture and more steps than for channels.
      **options: `seed` and `on_step` of `preferred`.
    """
    number = trunk.class_number(wanted)
    layer = trunk.scores or trunk.with_head()
    search = search or PictureSearch(size=224, steps=256)
    return preferred(trunk, layer, [number], search, **options)[0]


def preferred(
    trunk: Trunk,
    layer: str,
    channels: Sequence[int],
    search: PictureSearch | None = None,
    *,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The pictures [N, S, S, 3] in [0, 1] that maximize N channels of a layer.

    They are gray if the network answers to gray ones as to coloured ones.

    Args:
      trunk: the network.
      layer: with activations [N, h, w, C] or [N, C].
      channels: their numbers, one for each picture.
      search: parameters.
      seed: for the first spectrum, shifts and scales.
      on_step: called with (steps done, steps in all).

    >>> bright = Trunk("bright", ("sum",), 1.0, lambda p, x, layers: {"sum": p * x})
    >>> red = preferred(bright, "sum", [0], PictureSearch(size=16, steps=40))[0]
    >>> bool(red[:, :, 0].mean() > 0.55)
    True
    """
    how = (search or PictureSearch()).checked()
    names = trunk.known(layer)
    check.argument(len(channels) > 0, "channels", "at least one", tuple(channels))
    trunk.check_channels(names, channels)
    key, start = jax.random.split(jax.random.key(seed))
    shape = (len(channels), how.size, how.size // 2 + 1, 3, 2)
    spectrum = 0.01 * jax.random.normal(start, shape)
    state = optax.adam(how.learning_rate).init(spectrum)
    wanted = jnp.asarray(channels, jnp.int32)
    one_step = how._replace(steps=1)  # one program for any number
    program = {"apply": trunk.apply, "layer": names[0], "how": one_step}
    for i in range(how.steps):
        step_key = jax.random.fold_in(key, i)
        spectrum, state = _search(trunk.params, spectrum, state, wanted, step_key, **program)
        if on_step is not None:
            on_step(i + 1, how.steps)
    pictures = np.asarray(picture(spectrum, how.size))
    if not np.isfinite(pictures).all():
        raise check.TrainingError("The pictures are not finite; try a smaller learning_rate.")
    gray = (pictures @ np.asarray(LUMA, np.float32))[..., None].repeat(3, axis=-1)
    seen, seen_gray = (trunk.features(x, names)[names[0]] for x in (pictures, gray))
    sees_no_color = np.allclose(seen, seen_gray, rtol=1e-4, atol=1e-4 * float(jnp.abs(seen).max()))
    return gray if sees_no_color else pictures


def picture(spectrum: jax.Array, size: int) -> jax.Array:
    """Pictures x, [N, S, S, 3] in [0, 1], of spectra s, [N, S, S/2 + 1, 3, 2].

    >>> picture(jnp.zeros((1, 8, 5, 3, 2)), 8).mean().item()
    0.5
    """
    down, across = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    frequency = np.maximum(np.hypot(down, across), 1 / size)
    scale = jnp.asarray(size / (4 * frequency), jnp.float32)[None, :, :, None]
    values = jax.lax.complex(scale * spectrum[..., 0], scale * spectrum[..., 1])
    waves = jnp.fft.irfft2(values, s=(size, size), axes=(1, 2))
    return jax.nn.sigmoid(waves @ jnp.asarray(_MIXING.T))


@partial(jax.jit, static_argnames=("apply", "layer", "how"))
def _search(
    params: Params,
    spectrum: jax.Array,
    state: Any,
    channels: jax.Array,
    key: jax.Array,
    *,
    apply: Callable[..., Features],
    layer: str,
    how: PictureSearch,
) -> tuple[jax.Array, Any]:
    def value(x: jax.Array) -> jax.Array:
        found = apply(params, _moved(x, key, how), (layer,))[layer]
        means = found.reshape(found.shape[0], -1, found.shape[-1]).mean(axis=1)
        return jnp.sum(jnp.take_along_axis(means, channels[:, None], axis=1))

    x, pull = jax.vjp(lambda s: picture(s, how.size), spectrum)
    uphill = jax.grad(value)(x)
    uphill /= jnp.mean(jnp.abs(uphill), axis=(1, 2, 3), keepdims=True) + 1e-12
    rough = jax.grad(lambda x: jnp.sum(jax.vmap(total_variation)(x)))(x)
    (gradient,) = pull(how.variation * rough - uphill)
    with jax.numpy_dtype_promotion("standard"):  # optax's powers of the step number
        updates, state = optax.adam(how.learning_rate).update(gradient, state)
    return spectrum + updates, state


def _moved(x: jax.Array, key: jax.Array, how: PictureSearch) -> jax.Array:
    """T: x shifted and scaled about the middle, with gray beyond the edges."""
    shift_key, scale_key = jax.random.split(key)
    shift = jax.random.uniform(shift_key, (2,), minval=-1.0, maxval=1.0) * how.shift * how.size
    by = 1 + how.stretch * jax.random.uniform(scale_key, (), minval=-1.0, maxval=1.0)
    middle = how.size * (1 - by) / 2
    moved = jax.image.scale_and_translate(
        x - 0.5, x.shape, (1, 2), jnp.stack([by, by]), shift + middle, "linear", antialias=False
    )
    return moved + 0.5
