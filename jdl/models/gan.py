r"""Generative adversarial nets: two groups of parameters, one loss, one step.

    f(θ_G, θ_D) = ℓ_D(θ_D; sg(θ_G)) + ℓ_G(θ_G; sg(θ_D))

sg is stop_gradient, so that ∂f/∂θ_D is the discriminator's gradient and ∂f/∂θ_G the generator's: an
optimizer for each group (`optimizers`) trains both in parallel. The value of f does not measure
progress, so that line searches do not apply.

With r = D(x), s = D(G(z)):

    game               ℓ_D                                        ℓ_G
    non_saturating     softplus(−r) + softplus(s)                 softplus(−s)
    hinge              max(0, 1 − r) + max(0, 1 + s)              −s
    wasserstein        s − r                                      −s

    penalty            added to ℓ_D
    r1                 ½ weight · |∇ₓ D(x)|²                      at images
    gradient           weight · (|∇ₓ D(x̂)| − 1)²                  between images and samples

`wasserstein` with `gradient` is WGAN-GP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jdl.core import check
from jdl.core.model import Model
from jdl.core.types import Batch, Key, ModelState, Params
from jdl.models.layers import embedded, example_keys, one_hot

GAMES = ("non_saturating", "hinge", "wasserstein")
PENALTIES = {"r1": 1.0, "gradient": 10.0}  # and their usual weights
_WEIGHTS = nn.initializers.normal(0.02)


class Generator(nn.Module):
    """From noise to images: a dense layer, then transposed convolutions of stride 2.

    Its maps have the sizes of the `Discriminator`'s, in reverse: where a side is odd, the doubled
    map loses its last row or column.

    References:
      Radford, Metz and Chintala, Unsupervised representation learning with deep convolutional
      generative adversarial networks, ICLR 2016, section 3.
    """

    # (height, width, channels) of the images
    shape: tuple[int, int, int]
    # channels of the smallest map and after each doubling but the last
    widths: Sequence[int] = (64, 32)
    # number of classes to condition on; None for an unconditional one
    num_classes: int | None = None
    normalize: bool = True  # whether batch normalization follows every layer but the last

    @nn.compact
    def __call__(
        self, z: jax.Array, label: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Images [B, H, W, C], values in (0, 1), of noise [B, Z] and int[B] labels."""
        height, width, channels = self.shape
        depth = len(self.widths)
        sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in reversed(range(depth + 1))]

        def finished(x: jax.Array) -> jax.Array:
            if self.normalize:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return nn.relu(x)

        if self.num_classes is not None:
            z = jnp.concatenate([z, one_hot("label", label, self.num_classes, z.dtype)], axis=1)
        small = (*sizes[0], self.widths[0])
        x = nn.Dense(math.prod(small), kernel_init=_WEIGHTS)(z)
        x = finished(x.reshape(x.shape[0], *small))
        for i, (filters, size) in enumerate(
            zip([*self.widths[1:], channels], sizes[1:], strict=True)
        ):
            x = nn.ConvTranspose(filters, (4, 4), (2, 2), kernel_init=_WEIGHTS)(x)
            x = x[:, : size[0], : size[1]]
            x = finished(x) if i < depth - 1 else x
        return nn.sigmoid(x)


class Discriminator(nn.Module):
    """From images to a logit, larger for real ones: convolutions of stride 2, then a dense layer.

    There is no batch normalization, so that logits and penalties of images are independent. With
    labels it adds ⟨v_label, features⟩, Miyato and Koyama's projection.

    References:
      Miyato, Kataoka, Koyama and Yoshida, Spectral normalization for generative adversarial
      networks, ICLR 2018; Miyato and Koyama, cGANs with projection discriminator, ICLR 2018.
    """

    # (height, width, channels) of the images
    shape: tuple[int, int, int]
    widths: Sequence[int] = (32, 64)  # channels after each halving
    # number of classes to condition on; None for an unconditional one
    num_classes: int | None = None
    spectral_norm: bool = False  # whether every layer is divided by its largest singular value

    @nn.compact
    def __call__(
        self, image: jax.Array, label: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Logits [B] of images [B, H, W, C], values in [0, 1], and int[B] labels."""
        check.argument(image.shape[1:] == self.shape, "image", f"{self.shape}", image.shape[1:])
        check.values("image", image, -0.01, 1.01, "in [0, 1], as samples are", "Scale them.")

        def applied(layer: Any, x: jax.Array) -> jax.Array:
            if self.spectral_norm:
                return nn.SpectralNorm(layer)(x, update_stats=train)
            return layer(x)

        x = 2.0 * image - 1.0
        for filters in self.widths:
            x = nn.leaky_relu(applied(nn.Conv(filters, (4, 4), (2, 2)), x), 0.2)
        features = x.reshape(x.shape[0], -1)
        logits = applied(nn.Dense(1), features)[:, 0]
        if self.num_classes is None:
            return logits
        table = nn.Embed(self.num_classes, features.shape[1], embedding_init=_WEIGHTS)
        return logits + jnp.sum(embedded(table, "label", label) * features, axis=1)


class Judged(NamedTuple):
    """The outputs of one evaluation, float[B] each."""

    real: jax.Array  # D(x), for the discriminator
    fake: jax.Array  # D(sg(G(z))), for the discriminator
    fooled: jax.Array  # D(G(z)) with θ_D held fixed, for the generator; the same values as `fake`
    penalty: jax.Array  # for the discriminator


@dataclass(frozen=True)
class GAN:
    """A generator against a discriminator.

    Train `GAN.model` with `GAN.loss` in an Estimator, with `inputs="image"`, or
    `("image", "label")` if conditioned on classes; the parameters are
    `{"generator", "discriminator"}`.

    Attributes:
      generator: a `Generator`, or a Linen module with the same signature.
      discriminator: a `Discriminator`, likewise.
      latent: units of the noise, from N(0, I).
      game: "non_saturating", "hinge" or "wasserstein".
      penalty: "r1", "gradient" or None.
      weight: weight of the penalty; None for 1 (r1) or 10 (gradient).
      smoothing: ε of one-sided label smoothing: the discriminator's target for images is 1 − ε, in
        [0, 0.5); for "non_saturating" only.

    >>> gan = GAN.of_shape((8, 8, 1), latent=4)
    >>> params, state = gan.model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
    >>> sorted(params)
    ['discriminator', 'generator']
    >>> gan.sample(params, state, jnp.zeros((3, 4))).shape
    (3, 8, 8, 1)

    References:
      Goodfellow et al., Generative adversarial nets, NeurIPS 2014; Lim and Ye, Geometric GAN, 2017
      (hinge); Gulrajani et al., Improved training of Wasserstein GANs, NeurIPS 2017 (gradient);
      Mescheder, Geiger and Nowozin, Which training methods for GANs do actually converge?, ICML
      2018 (r1); Salimans et al., Improved techniques for training GANs, NeurIPS 2016 (smoothing).
    """

    generator: Any
    discriminator: Any
    latent: int = 64
    game: str = "non_saturating"
    penalty: str | None = "r1"
    weight: float | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check.one_of("game", self.game, GAMES)
        check.one_of("penalty", self.penalty, [None, *PENALTIES])
        check.positive_int("latent", self.latent)
        check.in_range("smoothing", self.smoothing, 0.0, 0.5)
        ok = self.smoothing == 0 or self.game == "non_saturating"
        check.argument(ok, "smoothing", 'zero for all games but "non_saturating"', self.smoothing)
        if self.weight is not None:
            check.in_range("weight", self.weight, 0.0)

    @classmethod
    def of_shape(
        cls,
        shape: tuple[int, int, int],
        *,
        width: int = 32,
        num_classes: int | None = None,
        spectral_norm: bool = False,
        **options: Any,
    ) -> "GAN":
        """A DCGAN for images of (height, width, channels), with a smallest map of about 8×8.

        Args:
          shape: (height, width, channels) of the images.
          width: channels of the largest maps; they double with each halving, up to 8·width.
          num_classes: for a GAN conditioned on classes.
          spectral_norm: as for `Discriminator`.
          **options: attributes of `GAN`.
        """
        halvings = max(2, math.ceil(math.log2(max(min(shape[:2]), 1) / 8)))
        widths = [width * 2 ** min(i, 3) for i in range(halvings)]
        return cls(
            Generator(shape, widths[::-1], num_classes),
            Discriminator(shape, widths, num_classes, spectral_norm),
            **options,
        )

    @property
    def model(self) -> Model:
        """Both nets as one model, from images (and labels) to a `Judged`."""
        return Model(self._init, self._apply)

    def _init(
        self, key: Key, image: jax.Array, label: jax.Array | None = None
    ) -> tuple[Params, ModelState]:
        one, other = jax.random.split(key)
        noise = jnp.zeros((image.shape[0], self.latent), image.dtype)
        variables = {
            "generator": dict(self.generator.init(one, noise, label)),
            "discriminator": dict(self.discriminator.init(other, image, label)),
        }
        return {name: v.pop("params") for name, v in variables.items()}, variables

    def _apply(
        self,
        params: Params,
        state: ModelState,
        image: jax.Array,
        label: jax.Array | None = None,
        *,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Judged, ModelState]:

        def normal(key: Key, *shape: int) -> jax.Array:
            return jax.random.normal(key, shape, image.dtype)

        noise_key, mix_key = jax.random.split(jax.random.key(0) if key is None else key)
        if key is None:
            noise = jax.vmap(lambda own: normal(own, self.latent))(example_keys(image))
        else:
            noise = normal(noise_key, image.shape[0], self.latent)

        def run(net: Any, params: Params, name: str, x: jax.Array) -> Any:
            variables = {"params": params, **state[name]}
            return net.apply(variables, x, label, train=train, mutable=list(state[name]))

        def judge(params: Params, x: jax.Array) -> Any:
            return run(self.discriminator, params, "discriminator", x)

        judging = params["discriminator"]
        samples, generator_state = run(self.generator, params["generator"], "generator", noise)
        seen = jax.lax.stop_gradient(samples)
        real, discriminator_state = judge(judging, image)
        fake, _ = judge(judging, seen)
        fooled, _ = judge(jax.lax.stop_gradient(judging), samples)
        penalty = jnp.zeros_like(real)
        if train and self.penalty is not None:
            at = image
            if self.penalty == "gradient":
                mix = jax.random.uniform(mix_key, (image.shape[0], 1, 1, 1), image.dtype)
                at = mix * image + (1.0 - mix) * seen
            slopes = jax.grad(lambda x: jnp.sum(judge(judging, x)[0]))(at)
            squares = jnp.sum(jnp.square(slopes), axis=(1, 2, 3))
            weight = PENALTIES[self.penalty] if self.weight is None else self.weight
            if self.penalty == "r1":
                penalty = 0.5 * weight * squares
            else:
                penalty = weight * jnp.square(jnp.sqrt(squares + 1e-12) - 1.0)
        new_state = {"generator": generator_state, "discriminator": discriminator_state}
        return Judged(real, fake, fooled, penalty), new_state if train else state

    def loss(self, outputs: Judged, batch: Batch) -> jax.Array:
        """ℓ_D + ℓ_G, float[B]."""
        return self.discriminator_loss(outputs, batch) + self.generator_loss(outputs, batch)

    cast(
        Any, loss
    ).gradient_only = "A GAN has two losses, one for each network, and a value that is neither's."

    def discriminator_loss(self, outputs: Judged, batch: Batch) -> jax.Array:
        """ℓ_D with its penalty, float[B]."""
        real, fake = outputs.real, outputs.fake
        if self.game == "hinge":
            return nn.relu(1.0 - real) + nn.relu(1.0 + fake) + outputs.penalty
        if self.game == "wasserstein":
            return fake - real + outputs.penalty
        right = (1.0 - self.smoothing) * nn.softplus(-real) + self.smoothing * nn.softplus(real)
        return right + nn.softplus(fake) + outputs.penalty

    def generator_loss(self, outputs: Judged, batch: Batch) -> jax.Array:
        """ℓ_G, float[B]."""
        if self.game == "non_saturating":
            return nn.softplus(-outputs.fooled)
        return -outputs.fooled

    def sample(
        self, params: Params, state: ModelState, z: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Images [B, H, W, C], values in (0, 1), of noise [B, latent] and int[B] labels.

        Args:
          params: of the model; an Estimator's `evaluation_params` for the averaged generator.
          state: of the model.
          z: from N(0, I).
          label: for a conditional generator.
        """
        variables = {"params": params["generator"], **state["generator"]}
        return self.generator.apply(variables, z, label)


def optimizers(
    generator: optax.GradientTransformation, discriminator: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for each of the two groups of parameters, as one transformation.

    >>> both = optimizers(optax.sgd(1.0), optax.sgd(0.1))
    >>> params = {"generator": jnp.zeros(()), "discriminator": jnp.zeros(())}
    >>> ones = {"generator": jnp.ones(()), "discriminator": jnp.ones(())}
    >>> updates, _ = both.update(ones, both.init(params), params)
    >>> {name: round(float(x), 1) for name, x in updates.items()}
    {'discriminator': -0.1, 'generator': -1.0}
    """
    transforms = {"generator": generator, "discriminator": discriminator}
    return optax.partition(transforms, {name: name for name in transforms})


def walk(key: Key, rows: int, steps: int, latent: int) -> jax.Array:
    """Noise along great circles between random points: float[rows, steps, latent].

    Unlike on straight lines, the points have the norms of the noise used in training.

    >>> z = walk(jax.random.key(0), 2, 5, 64)
    >>> z.shape, bool(jnp.allclose(jnp.linalg.norm(z, axis=-1).min(axis=1) > 6, True))
    ((2, 5, 64), True)
    """
    check.positive_ints(rows=rows, steps=steps, latent=latent)
    a, b = jax.random.normal(key, (2, rows, latent))
    lengths = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b)]
    cosine = jnp.sum(a / lengths[0] * b / lengths[1], axis=-1)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))[:, None, None]
    t = jnp.linspace(0.0, 1.0, steps)[None, :, None]
    blend = jnp.sin((1.0 - t) * angle) * a[:, None] + jnp.sin(t * angle) * b[:, None]
    return blend / jnp.sin(angle)
