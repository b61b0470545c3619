"""A trained run's predictions for a tar of images, a row each: .npz, .jsonl or .csv.

A classifier's rows hold name, class and probability; an autoencoder's name, squared_error and
reconstruction. Memory does not grow with the number of images. In a run with `--on-error skip`
images that cannot be read are left out.

Examples:
  jdl predict --workdir runs/cnn-digits-adam --out predictions.jsonl
  jdl predict --workdir runs/photos --data new.tar --out new.csv --probabilities
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Args:
    """Which run, on what, to where."""

    workdir: Path
    """the run directory of `jdl train`"""
    out: Path
    """the file to write; its suffix, .npz, .jsonl or .csv, says how"""
    data: str | None = None
    """a tar, a glob, a brace range, or digits; by default what the run was trained on"""
    split: str | None = None
    """first folder of the members; by default test where there is one; all for all"""
    batch_size: int = 256
    """images at a time"""
    probabilities: bool = False
    """also the probability of every class, in the order of the run's classes"""


def run(args: Args) -> None:
    """Writes the predictions; the file appears when it is whole."""
    from jdl.core import check
    from jdl.recipes.datasets import default_split
    from jdl.recipes.registry import recipe
    from jdl.recipes.run_config import RunConfig
    from jdl.train.predictions import write_predictions

    check.argument(args.batch_size >= 1, "--batch-size", "at least 1", args.batch_size)
    config = RunConfig.load(args.workdir)
    kind = recipe(config.model).kind
    check.argument(
        kind == "classifier" or not args.probabilities,
        "--probabilities",
        "left out for a model that predicts no classes",
        config.model,
    )
    data = args.data or config.data
    images = config.images(
        data,
        default_split(data, args.split, "test"),
        labelled=False,
        batch_size=args.batch_size,
    )
    columns = {
        "classifier": lambda batch, logits: _classes(logits, config.classes, args.probabilities),
        "autoencoder": _reconstructions,
    }
    count = write_predictions(args.out, config.estimator(args.workdir), images, columns.get(kind))
    print(f"{count} predictions: {args.out}")
    if images.skipped:
        print(f"skipped: {images.skipped} images that could not be read")


def _classes(logits: Any, classes: tuple[str, ...], probabilities: bool) -> dict[str, Any]:
    import numpy as np

    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    rows = {"class": [classes[i] for i in best], "probability": shares.max(axis=1)}
    return rows | ({"probabilities": shares} if probabilities else {})


def _reconstructions(batch: Any, logits: Any) -> dict[str, Any]:
    """Pixels in [0, 1], and their squared error summed over an image."""
    import numpy as np

    from jdl.models.autoencoder import Reconstruction

    if isinstance(logits, Reconstruction):  # of the images as they are
        logits = logits.outputs if logits.of_clean is None else logits.of_clean
    found = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    difference = found - batch["image"].astype(np.float32) / 255.0
    error = np.square(difference).reshape(len(found), -1).sum(axis=1)
    return {"squared_error": error, "reconstruction": found}
