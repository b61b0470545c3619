"""A trained run's predictions for a tar of images, one row for each image: .npz, .jsonl or .csv.

A classifier's rows hold name, class and probability; an autoencoder's name, squared_error and
reconstruction; an RBM's name, positive (free energy), hidden (features), visible (reconstruction);
a GAN's name and score (the discriminator's logit). `--samples` writes samples of an RBM or a GAN.
Memory does not grow with the number of images. In a run with `--on-error skip`
images that cannot be read are left out.

Examples:
  jdl predict --workdir runs/cnn-digits-adam --out predictions.jsonl
  jdl predict --workdir runs/photos --data new.tar --out new.csv --probabilities
  jdl predict --workdir runs/gan-digits-adam --out samples.npz --samples 16
"""

import math
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
    samples: int | None = None
    """of a gan or an rbm: this many samples, instead of rows for images"""


def run(args: Args) -> None:
    """Writes the predictions; the file appears only when it is complete."""
    from jdl.recipes.registry import LABELLED
    from jdl.train.predict import write_predictions
    from jdl.train.tables import open_table

    options.check_positive(args, "samples")
    config, _, _, images = options.open_run(args, "test", labelled=False)
    kind = config.kind
    ok = kind in LABELLED or not args.probabilities
    must = "left out for a model that predicts no classes"
    check.argument(ok, "--probabilities", must, config.model)
    columns = {
        **dict.fromkeys(LABELLED, lambda _, z: _classes(z, config.classes, args.probabilities)),
        "autoencoder": _reconstructions,
        "gan": lambda _, of: {"score": of.real},
    }
    estimator = config.estimator(args.workdir)
    if args.samples is not None:
        check.argument(kind in ("gan", "rbm"), "--samples", "left out: it has none", config.model)
        next(iter(estimator.predict_batches(images)))  # restores the run
        found = _samples(config, estimator, args.samples)
        with open_table(args.out) as table:
            table.write({"name": [str(i) for i in range(len(found))], "sample": found})
        print(f"{len(found)} samples: {args.out}")
        return
    count = write_predictions(args.out, estimator, images, columns.get(kind))
    print(f"{count} predictions: {args.out}")
    options.print_skipped(images)


def _samples(config: Any, estimator: Any, count: int) -> "np.ndarray":
    """Samples of a GAN; of an RBM means after 1,000 Gibbs steps from noise."""
    import jax
    import numpy as np

    from jdl.recipes.gan_pictures import draw_from

    net: Any = config.build_model()
    if config.model == "gan":
        return draw_from(net, estimator, count, config.seed)
    params, (start, steps) = estimator.evaluation_params, jax.random.split(jax.random.key(0))
    v = jax.random.bernoulli(start, shape=(count, math.prod(config.image_shape)))
    v = net.sample(params, steps, v.astype("float32"), 1000)
    return np.asarray(net.mean_field(params, v, 1)).reshape(count, *config.image_shape)


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
