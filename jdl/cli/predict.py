"""A trained run's predictions for a tar of images, one row for each image: .npz, .jsonl or .csv.

A classifier's rows hold name, class and probability; an autoencoder's name, squared_error and
reconstruction; an RBM's name, positive (free energy), hidden (features), visible (reconstruction);
a GAN's name and score (the discriminator's logit).
Memory does not grow with the number of images. In a run with `--on-error skip`
images that cannot be read are left out.

Examples:
  jdl predict --workdir runs/cnn-digits-adam --out predictions.jsonl
  jdl predict --workdir runs/photos --data new.tar --out new.csv --probabilities
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdl.cli import options
from jdl.core import check

if TYPE_CHECKING:
    import numpy as np

    from jdl.core.types import Batch
    from jdl.models.autoencoder import Reconstruction


@dataclass
class Args:
    """The options of `jdl predict`."""

    workdir: options.Workdir
    out: Path
    """the file to write; its suffix .npz, .jsonl or .csv chooses the format"""
    data: options.RunData = None
    split: options.TestSplit = None
    include: options.Include = None
    exclude: options.Exclude = None
    batch_size: options.BatchSize = 256
    probabilities: bool = False
    """also the probability of every class, in the order of the run's classes"""


def run(args: Args) -> None:
    """Writes the predictions; the file appears only when it is complete."""
    from jdl.recipes.registry import LABELLED
    from jdl.recipes.run_config import RunConfig
    from jdl.train.predict import write_predictions

    held = RunConfig.load(args.workdir)
    if held.kind == "text":
        why = f"holds a {held.model}, whose predictions are texts: see `jdl sample`."
        raise check.UserError(f"{args.workdir} {why}")
    labelled = held.kind == "cgan"
    config, _, _, images = options.open_run(args, "test", labelled=labelled)
    kind = config.kind
    ok = (kind in LABELLED and not labelled) or not args.probabilities
    must = "left out for a model that predicts no classes"
    check.argument(ok, "--probabilities", must, config.model)
    columns = {
        **dict.fromkeys(LABELLED, lambda _, z: _classes(z, config.classes, args.probabilities)),
        "autoencoder": _reconstructions,
        **dict.fromkeys(("gan", "cgan"), lambda _, of: {"score": of.real}),
    }
    estimator = config.estimator(args.workdir)
    count = write_predictions(args.out, estimator, images, columns.get(kind))
    print(f"{count} predictions: {args.out}")
    options.print_skipped(images)


def _classes(logits: "np.ndarray", classes: tuple[str, ...], probabilities: bool) -> dict[str, Any]:
    import numpy as np

    logits = logits[:, 0] if logits.ndim == 3 else logits  # of a tree's nodes, the root's
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    rows = {"class": [classes[i] for i in best], "probability": shares.max(axis=1)}
    return rows | ({"probabilities": shares} if probabilities else {})


def _reconstructions(
    batch: "Batch", outputs: "np.ndarray | Reconstruction"
) -> dict[str, "np.ndarray"]:
    """Pixels in [0, 1], and their squared error summed over an image."""
    import numpy as np

    from jdl.models.autoencoder import Reconstruction

    if isinstance(outputs, Reconstruction):  # of the uncorrupted images, if it has them
        outputs = np.asarray(outputs.outputs if outputs.of_clean is None else outputs.of_clean)
    found = (0.5 * (1.0 + np.tanh(0.5 * outputs))).astype(np.float32)
    difference = found - batch["image"].astype(np.float32) / 255.0
    error = np.square(difference).reshape(len(found), -1).sum(axis=1)
    return {"squared_error": error, "reconstruction": found}
