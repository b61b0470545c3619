r"""Training a style network, which paints any photograph in one forward pass.

    min over θ of  E [ a · content(y, x) + b · style(y, s) + c · variation(y) ],   y = net_θ(x, s)

over photographs x and styles s, with the terms of `jdl.vision.style` measured by a fixed trunk.
The run's settings are a `jdl.recipes.style_config.StyleConfig`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.core.model import Model
from jdl.core.types import Batch, Key, Loss, ModelState, Outputs, Params
from jdl.metrics import direction
from jdl.optim import registry
from jdl.recipes.style_config import StyleConfig
from jdl.train.estimator import Estimator
from jdl.train.step import Metrics
from jdl.vision import style as st
from jdl.vision.images import as_image
from jdl.vision.painter_net import StyleNet
from jdl.vision.trunk import Trunk

EMA = 0.99  # decay of the parameters' average, which paints


def build_net(config: StyleConfig) -> StyleNet:
    """The network of a run."""
    return StyleNet(config.filters, config.blocks, len(config.styles))


def build_estimator(
    config: StyleConfig,
    trunk: Trunk,
    paintings: Sequence[ArrayLike],
    workdir: Path | None = None,
    **options: Any,
) -> Estimator:
    """An Estimator that trains on batches {"image": [B, H, W, 3]} of photographs.

    The trunk measures content and style. The paintings [h, w, 3], one for each style, set the size
    of the strokes by their own.
    """
    given = tuple(digest(painting) for painting in paintings)
    check.argument(given == config.paintings, "paintings", "those of this run", given)
    layers = st.Layers(config.content_layers, config.style_layers)
    weights = st.Weights(config.content, config.style, config.variation)
    loss, metrics = losses(trunk, st.palette(trunk, paintings, layers), layers, weights)
    return _estimator(config, loss, workdir, metrics=metrics, **options)


def trained_params(config: StyleConfig, workdir: Path) -> Params:
    """The averaged parameters at the last checkpoint; needs neither trunk nor paintings."""

    def no_loss(outputs: Outputs, batch: Batch) -> jax.Array:
        return outputs["mixture"][:, 0]

    estimator = _estimator(config, no_loss, workdir, devices=jax.devices()[:1])
    smallest = {"image": np.zeros((1, 16, 16, 3), np.uint8)}
    next(estimator.predict_batches([smallest]))  # restores the checkpoint
    return jax.device_get(estimator.evaluation_params)


def _estimator(config: StyleConfig, loss: Loss, workdir: Path | None, **options: Any) -> Estimator:
    return Estimator(
        taking_turns(build_net(config)),
        loss,
        registry.by_name("adam", config.learning_rate),
        workdir=workdir,
        seed=config.seed,
        ema=EMA,
        **options,
    )


def digest(painting: ArrayLike) -> str:
    """A hash of a painting's pixels, [h, w, 3]."""
    pixels = np.rint(as_image(painting, "painting") * 255).astype(np.uint8)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]


def taking_turns(net: StyleNet) -> Model:
    """A model whose only inputs are photographs: example i is painted in style i + r modulo S.

    Its outputs are {"painting": [B, H, W, 3], "mixture": [B, S]}. r is random in training, else 0.
    """

    def turns(count: int, first: jax.Array | int) -> jax.Array:
        return jax.nn.one_hot((jnp.arange(count) + first) % net.styles, net.styles)

    def init(key: Key, images: jax.Array) -> tuple[Params, ModelState]:
        return net.init(key, images[:1], turns(1, 0))["params"], {}

    def apply(
        params: Params,
        state: ModelState,
        images: jax.Array,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[Outputs, ModelState]:
        first = 0 if key is None else jax.random.randint(key, (), 0, net.styles)
        mixture = turns(len(images), first)
        painting, _ = net.apply({"params": params}, images, mixture)
        return {"painting": painting, "mixture": mixture}, state

    return Model(init, apply)


def losses(
    trunk: Trunk, palette: st.Palette, layers: st.Layers, weights: st.Weights
) -> tuple[Loss, Metrics]:
    """The loss of a batch of photographs, and its terms as metrics, [B] each."""
    weights.checked()
    everything, content = trunk.known(layers.all), trunk.known(layers.content)

    def terms(outputs: Outputs, batch: Batch) -> st.Terms:
        photographs = trunk.apply(trunk.params, batch["image"], content)
        painting = outputs["painting"]
        wanted = st.target(palette, outputs["mixture"], photographs)
        return st.terms(painting, trunk.apply(trunk.params, painting, everything), wanted)

    def loss(outputs: Outputs, batch: Batch) -> jax.Array:
        return terms(outputs, batch).total(weights)

    @direction(dict.fromkeys(st.Terms._fields, "min"))
    def metrics(outputs: Outputs, batch: Batch) -> Mapping[str, jax.Array]:
        return terms(outputs, batch)._asdict()

    return loss, metrics
