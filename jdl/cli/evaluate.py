"""Loss and metrics of a trained run on a tar of images.

Examples:
  jdl evaluate --workdir runs/cnn-digits-adam
  jdl evaluate --workdir runs/photos --data held-out.tar --json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """Which run, on what."""

    workdir: Path
    """the run directory of `jdl train`"""
    data: str | None = None
    """a tar, a glob, a brace range, or digits; by default what the run was trained on"""
    split: str | None = None
    """first folder of the members; by default test where there is one; all for all"""
    batch_size: int = 256
    """images at a time"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print one flat JSON object"""


def run(args: Args) -> None:
    """Prints the numbers."""
    from jdl.cli import progress
    from jdl.cli.run_config import RunConfig, default_split, use_compilation_cache
    from jdl.core import check

    check.argument(args.batch_size >= 1, "--batch-size", "at least 1", args.batch_size)
    config = RunConfig.load(args.workdir)
    data = args.data or config.data
    split = default_split(data, args.split, "test")
    use_compilation_cache()
    images = config.images(data, split, batch_size=args.batch_size)
    estimator = config.estimator(args.workdir)
    values = estimator.evaluate(images, name=split or "evaluate")
    if args.as_json:
        print(json.dumps(values))
        return
    progress.table(
        ["", *values],
        [[split or "all images", *(f"{v:.4f}" for v in values.values())]],
        f"{args.workdir} at step {estimator.step}, {images.num_records} images of {data}",
    )
