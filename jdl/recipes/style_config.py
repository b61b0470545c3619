"""The settings of a run of `jdl style train`."""

import dataclasses
from pathlib import Path

from jdl.core import check
from jdl.recipes import config_toml
from jdl.train.checkpoint import begun


@dataclasses.dataclass(frozen=True)
class StyleConfig:
    """All settings that a run depends on, except its photographs and its number of steps.

    Attributes:
      styles: names, in the order of the paintings.
      paintings: a digest of each painting's pixels, as `jdl.vision.style_training.digest`.
      trunk: the network that measures content and style, as `jdl.vision.load_trunk`.
      content_layers, style_layers: layers of the trunk.
      content, style, variation: weights of the loss's three terms.
      filters, blocks: of the trained network, as `jdl.vision.transformer.StyleNet`.
      learning_rate: Adam's.
      batch_size: photographs in a batch.
      size: the side of a crop in pixels.
      seed: for the initial parameters, the crops and the order of styles.
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

    def save(self, workdir: Path) -> None:
        """Writes the settings; raises where the directory holds a run with other settings."""
        if begun(workdir):
            config_toml.check_same(workdir, self, StyleConfig.load(workdir))
        config_toml.write(workdir, self, model="style")

    @classmethod
    def load(cls, workdir: Path) -> "StyleConfig":
        """The settings of the run in that directory."""
        table = config_toml.read(workdir)
        if table is None or table.get("model") != "style":
            raise check.UserError(f"{workdir} is not a run directory of `jdl style train`.")
        return config_toml.parse(cls, table, workdir, "model")
