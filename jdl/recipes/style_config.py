"""The settings of a run of `jdl style train`."""

import dataclasses
from pathlib import Path

from jdl.core import check
from jdl.recipes import config_toml
from jdl.train.checkpoint import begun


@dataclasses.dataclass(frozen=True)
class StyleConfig:
    """All settings that a run depends on, except its photographs and its number of steps."""

    styles: tuple[str, ...]  # names, in the order of the paintings
    paintings: tuple[str, ...]  # `jdl.vision.style_training.digest` of each
    trunk: str  # the network that measures content and style, as `jdl.vision.load_trunk`
    content_layers: tuple[str, ...]  # of the trunk
    style_layers: tuple[str, ...]  # likewise
    content: float  # the weight of this term of the loss
    style: float  # likewise
    variation: float  # likewise
    filters: tuple[int, ...]  # of the trained network, as `jdl.vision.painter_net.StyleNet`
    blocks: int  # likewise
    learning_rate: float  # Adam's
    batch_size: int  # photographs in a batch
    size: int  # the side of a crop in pixels
    seed: int  # for the initial parameters, the crops and the order of styles

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
