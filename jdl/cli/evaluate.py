"""Loss and metrics of a trained run on a tar of images; confusions and scores of each class.

Examples:
  jdl evaluate --workdir runs/cnn-digits-adam
  jdl evaluate --workdir runs/photos --data held-out.tar --top-k 5 --per-class
  jdl evaluate --workdir runs/photos --confusion --json
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

MOST_CLASSES = 16  # a larger matrix is no table any more


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
    top_k: int | None = None
    """also the share of images whose class is among the K likeliest"""
    confusion: bool = False
    """also how many images of each class were taken for each"""
    per_class: bool = False
    """also number, precision, recall and F1 of each class"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print one JSON object, flat but for what --confusion and --per-class add"""


def run(args: Args) -> None:
    """Prints the numbers."""
    from jdl import metrics
    from jdl.cli import output
    from jdl.core import check
    from jdl.recipes.datasets import default_split
    from jdl.recipes.registry import recipe
    from jdl.recipes.run_config import RunConfig

    check.argument(args.batch_size >= 1, "--batch-size", "at least 1", args.batch_size)
    config = RunConfig.load(args.workdir)
    options: dict[str, Any] = {}
    of_classes = {"--top-k": args.top_k, "--confusion": args.confusion}
    asked = [name for name, x in (of_classes | {"--per-class": args.per_class}).items() if x]
    if asked and recipe(config.model).kind != "classifier":
        raise check.UserError(
            f"{asked[0]} is for classifiers; {args.workdir} holds a {config.model}."
        )
    if args.top_k is not None:
        classes = len(config.classes)
        check.argument(1 <= args.top_k <= classes, "--top-k", f"1 to {classes}", args.top_k)
        top = metrics.top_k_accuracy(args.top_k)
        options["metrics"] = {"accuracy": metrics.accuracy, f"top_{args.top_k}_accuracy": top}
    data = args.data or config.data
    split = default_split(data, args.split, "test")
    images = config.images(data, split, batch_size=args.batch_size)
    estimator = config.estimator(args.workdir, **options)
    counted = args.confusion or args.per_class
    sums = {"confusion": metrics.confusion_matrix} if counted else None
    values = estimator.evaluate(images, name=split or "evaluate", sums=sums)
    confusion = values.pop("confusion", None)
    scores = None if confusion is None else metrics.class_scores(confusion)
    if args.as_json:
        if args.confusion:
            values["classes"] = list(config.classes)
            values["confusion"] = confusion.astype(int).tolist()
        if args.per_class and scores is not None:
            values["per_class"] = [
                {
                    "class": name,
                    "examples": int(n),
                    **{
                        k: None if math.isnan(x) else float(x)
                        for k, x in zip(scores._fields[1:], row, strict=True)
                    },
                }
                for name, n, *row in zip(config.classes, *scores, strict=True)
            ]
        print(json.dumps(values))
        return
    output.table(
        ["", *values],
        [[split or "all images", *(f"{v:.4f}" for v in values.values())]],
        f"{args.workdir} at step {estimator.step}, {images.num_records} images of {data}",
    )
    if images.skipped:
        print(f"skipped: {images.skipped} images that could not be read")
    if args.per_class and scores is not None:
        rows = [
            [name, f"{n:.0f}", *("–" if math.isnan(x) else f"{x:.4f}" for x in row)]
            for name, n, *row in zip(config.classes, *scores, strict=True)
        ]
        output.table(["class", "images", "precision", "recall", "F1"], rows)
    if args.confusion:
        _show_confusion(confusion, config.classes)


def _show_confusion(confusion: Any, classes: tuple[str, ...]) -> None:
    import numpy as np

    from jdl.cli import output

    counts = confusion.astype(int)
    if len(classes) <= MOST_CLASSES:
        rows = [[name, *map(str, row)] for name, row in zip(classes, counts, strict=True)]
        output.table(["", *classes], rows, "images of each class (rows) taken for each (columns)")
        return
    wrong = counts - np.diag(np.diag(counts))
    most = [divmod(int(i), len(classes)) for i in np.argsort(-wrong, axis=None)[:20]]
    rows = [[classes[i], classes[j], str(wrong[i, j])] for i, j in most if wrong[i, j]]
    output.table(["class", "taken for", "images"], rows, "the most frequent confusions")
