r"""Training a style network: a painter's style goes into parameters, once, for all photographs.

    min over θ of  E [ a · content(y, x) + b · style(y, s) + c · variation(y) ],   y = net_θ(x, s)

over photographs x and styles s, with the terms of `jdl.vision.style` measured by a fixed trunk.
"""

import dataclasses
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.core.model import Model
from jdl.core.types import Batch, Key, Loss, ModelState, Outputs, Params
from jdl.metrics import direction
from jdl.optim import registry
from jdl.train.checkpoint import begun
from jdl.train.estimator import Estimator
from jdl.train.step import Metrics
from jdl.vision import style as st
from jdl.vision.images import as_image
from jdl.vision.painter import Painter, of_net
from jdl.vision.transformer import StyleNet
from jdl.vision.trunk import Trunk

FILE = "config.toml"
AVERAGE = 0.99  # decay of the parameters' average, which paints


@dataclasses.dataclass(frozen=True)
class StyleRun:
    """All that a run depends on, but for its photographs and its number of steps.

    Attributes:
      styles: names, in the order of the paintings.
      paintings: a digest of each painting's pixels.
      trunk: what content and style are measured by.
      content_layers, style_layers: of the trunk.
      content, style, variation: weights.
      filters, blocks: of the network.
      learning_rate: Adam's.
      batch_size, size: photographs a step, and the side of a crop in pixels.
      seed: of the initial parameters, the crops and the styles' turns.
    """

    styles: tuple[str, ...]
    paintings: tuple[str, ...]
    trunk: str
    content_layers: tuple[str, ...]
    style_layers: tuple[str, ...]
    content: float
    style: float
    variation: float
    filters: tuple[int, ...]
    blocks: int
    learning_rate: float
    batch_size: int
    size: int
    seed: int

    @property
    def layers(self) -> st.Layers:
        """Where content and style are compared."""
        return st.Layers(self.content_layers, self.style_layers)

    @property
    def weights(self) -> st.Weights:
        """Of the three terms."""
        return st.Weights(self.content, self.style, self.variation)

    def net(self) -> StyleNet:
        """The network."""
        return StyleNet(self.filters, self.blocks, len(self.styles))

    def estimator(
        self, trunk: Trunk, paintings: Sequence[Any], workdir: Path | None = None, **options: Any
    ) -> Estimator:
        """An Estimator that trains on batches {"image": [B, H, W, 3]} of photographs.

        Args:
          trunk: the network that content and style are measured by.
          paintings: one a style, [h, w, 3]; at the size that their strokes are to have.
          workdir: the run directory.
          **options: further ones of `Estimator`.
        """
        given = tuple(digest(p) for p in paintings)
        check.argument(given == self.paintings, "paintings", "those of this run", given)
        palette = st.palette(trunk, paintings, self.layers)
        loss, metrics = losses(trunk, palette, self.layers, self.weights)
        return self._estimator(loss, workdir, metrics=metrics, **options)

    def painter(self, workdir: Path) -> Painter:
        """What the run has learned by its last checkpoint; needs neither trunk nor paintings."""
        one = jax.devices()[:1]
        estimator = self._estimator(
            lambda outputs, batch: outputs["mixture"][:, 0], workdir, devices=one
        )
        smallest = {"image": np.zeros((1, 16, 16, 3), np.uint8)}
        next(estimator.predict_batches([smallest]))  # takes up the checkpoint
        return of_net(self.net(), jax.device_get(estimator.ema_params), self.styles)

    def _estimator(self, loss: Loss, workdir: Path | None, **options: Any) -> Estimator:
        return Estimator(
            taking_turns(self.net()),
            loss,
            registry.by_name("adam", self.learning_rate),
            workdir=workdir,
            seed=self.seed,
            ema=AVERAGE,
            **options,
        )

    def save(self, workdir: Path) -> None:
        """Writes the settings, or refuses where a run with others has been trained."""
        import tomli_w

        from jdl import __version__
        from jdl.train.writers import write_atomically

        if begun(workdir):
            before = StyleRun.load(workdir)
            differing = [
                f"{name}: {theirs!r} there, {mine!r} now"
                for name, mine in dataclasses.asdict(self).items()
                if (theirs := getattr(before, name)) != mine
            ]
            if differing:
                raise check.UserError(
                    f"{workdir} holds a run with other settings ({'; '.join(differing)}). Choose "
                    "another --workdir, or the same settings to go on with it."
                )
        table = {"jdl": __version__, "model": "style", **dataclasses.asdict(self)}
        write_atomically(workdir / FILE, tomli_w.dumps(table))

    @classmethod
    def load(cls, workdir: Path) -> "StyleRun":
        """The settings of the run in that directory."""
        path = workdir / FILE
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            table = {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise check.DataError(f"{path} is not readable as TOML: {error}.") from error
        if table.get("model") != "style":
            raise check.UserError(f"{workdir} is no run directory of `jdl style train`.")
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in table:
                raise check.DataError(f"{path} lacks {field.name}.")
            value = table[field.name]
            fields[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**fields)


def digest(painting: Any) -> str:
    """What names a painting's pixels."""
    pixels = np.rint(as_image(painting, "painting") * 255).astype(np.uint8)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]


def taking_turns(net: StyleNet) -> Model:
    """A model of photographs alone: each is painted in one style, all styles equally often.

    Its outputs are {"painting": [B, H, W, 3], "mixture": [B, S]}. In training the turn begins
    anywhere, elsewhere with the first style.
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
        del train
        first = 0 if key is None else jax.random.randint(key, (), 0, net.styles)
        mixture = turns(len(images), first)
        painting, _ = net.apply({"params": params}, images, mixture)
        return {"painting": painting, "mixture": mixture}, state

    return Model(init, apply)


def losses(
    trunk: Trunk, palette: st.Palette, layers: st.Layers, weights: st.Weights
) -> tuple[Loss, Metrics]:
    """The loss of a batch of photographs and its terms, [B] each."""
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
