"""A trained run's predictions for a tar of images, one JSON object a line.

Examples:
  jdl predict --workdir runs/cnn-digits-adam --out predictions.jsonl
  jdl predict --workdir runs/photos --data new.tar --out new.jsonl
"""

import json
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
    import numpy as np

    from jdl.cli.recipes import recipe
    from jdl.cli.run_config import RunConfig, default_split, use_compilation_cache
    from jdl.core import check
    from jdl.train.writers import write_atomically

    check.argument(args.batch_size >= 1, "--batch-size", "at least 1", args.batch_size)
    config = RunConfig.load(args.workdir)
    if recipe(config.model).kind != "classifier":
        raise check.UserError(f"{args.workdir} holds a {config.model}, which predicts no classes.")
    data = args.data or config.data
    use_compilation_cache()
    images = config.images(
        data,
        default_split(data, args.split, "test"),
        labelled=False,
        batch_size=args.batch_size,
    )
    estimator = config.estimator(args.workdir)
    lines, at = [], 0
    for _, logits in estimator.predict_batches(images):
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        for row in probabilities:
            best = int(row.argmax())
            name, at = images.source.name(at), at + 1
            row_of = {"name": name, "class": config.classes[best], "probability": float(row[best])}
            lines.append(json.dumps(row_of))
    write_atomically(args.out, "\n".join(lines) + "\n")
    print(f"{len(lines)} predictions: {args.out}")
