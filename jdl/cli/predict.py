"""A trained run's predictions for a tar of images, one JSON object a line.

Examples:
  jdl predict --workdir runs/cnn-digits-adam --out predictions.jsonl
  jdl predict --workdir runs/photos --data new.tar --out new.jsonl
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Args:
    """Which run, on what, to where."""

    workdir: Path
    """the run directory of `jdl train`"""
    out: Path
    """the file to write: name, class and probability of each image"""
    data: str | None = None
    """a tar, a glob, a brace range, or digits; by default what the run was trained on"""
    split: str | None = None
    """first folder of the members; by default test where there is one; all for all"""
    batch_size: int = 256
    """images at a time"""


def run(args: Args) -> None:
    """Writes the predictions; the file appears when it is whole."""
