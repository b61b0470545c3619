"""Loss and metrics of a trained run on a tar of images; confusions and scores of each class.

Examples:
  jdl evaluate --workdir runs/cnn-digits-adam
  jdl evaluate --workdir runs/photos --data held-out.tar --top-k 5 --per-class
  jdl evaluate --workdir runs/photos --confusion --json
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jdl.cli import options, output
from jdl.core import check

if TYPE_CHECKING:
    import numpy as np

    from jdl.metrics import ClassScores

MOST_CLASSES = 16  # of a confusion matrix that is printed whole


@dataclass
class Args:
    """The options of `jdl evaluate`."""

    workdir: options.Workdir
    data: options.RunData = None
    split: options.TestSplit = None
    label: options.Label = None
    include: options.Include = None
    exclude: options.Exclude = None
    batch_size: options.BatchSize = 256
    top_k: int | None = None
    """also the share of images whose class is among the K most likely"""
    confusion: bool = False
    """also how many images of each class were classified as each class"""
    per_class: bool = False
    """also number, precision, recall and F1 of each class"""
    as_json: options.Json = False


def run(args: Args) -> None:
    """Prints the numbers."""
    from jdl import metrics
    from jdl.recipes.datasets import told

    opened = options.open_run(args, "test")
    config, images = opened.config, opened.images
    more: dict[str, Any] = {}
    names = ("top_k", "confusion", "per_class")
    asked = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if asked and config.kind != "classifier":
        held = f"{args.workdir} holds a {config.model}"
        raise check.UserError(f"{asked[0]} is for classifiers; {held}.")
    if args.top_k is not None:
        classes = len(config.classes)
        check.argument(1 <= args.top_k <= classes, "--top-k", f"1 to {classes}", args.top_k)
        top = metrics.top_k_accuracy(args.top_k)
        more["metrics"] = {"accuracy": metrics.accuracy, f"top_{args.top_k}_accuracy": top}
    estimator = config.estimator(args.workdir, **more)
    counted = args.confusion or args.per_class
    sums = {"confusion": metrics.confusion_matrix} if counted else None
    values = estimator.evaluate(images, name=opened.split or "evaluate", sums=sums)
    confusion = values.pop("confusion", None)
    scores = metrics.class_scores(confusion) if args.per_class else None
    if args.as_json:
        if args.confusion:
            values["classes"] = list(config.classes)
            values["confusion"] = confusion.astype(int).tolist()
        if scores is not None:
            values["per_class"] = []
            for name, n, *row in _by_class(config.classes, scores):
                known = [None if math.isnan(x) else x for x in row]
                of_class = dict(zip(("precision", "recall", "f1"), known, strict=True))
                values["per_class"].append({"class": name, "examples": int(n)} | of_class)
        print(json.dumps(values))
        return
    output.table(
        ["", *values],
        [[opened.split or "all images", *(f"{v:.4f}" for v in values.values())]],
        f"{args.workdir} at step {estimator.step}, {told(opened.data, images.num_records)}",
    )
    options.print_skipped(images)
    if scores is not None:
        rows = [
            [name, f"{n:.0f}", *("–" if math.isnan(x) else f"{x:.4f}" for x in row)]
            for name, n, *row in _by_class(config.classes, scores)
        ]
        output.table(["class", "images", "precision", "recall", "F1"], rows)
    if args.confusion:
        _print_confusion(confusion.astype(int), config.classes)


def _by_class(classes: tuple[str, ...], scores: "ClassScores") -> list[tuple[Any, ...]]:
    """For each class its name and scores."""
    return list(zip(classes, *(score.tolist() for score in scores), strict=True))


def _print_confusion(counts: "np.ndarray", classes: tuple[str, ...]) -> None:
    import numpy as np

    if len(classes) <= MOST_CLASSES:
        rows = [[name, *map(str, row)] for name, row in zip(classes, counts, strict=True)]
        output.table(["", *classes], rows, "images of each class (rows) classified as (columns)")
        return
    wrong = counts - np.diag(np.diag(counts))
    most = [divmod(int(i), len(classes)) for i in np.argsort(-wrong, axis=None)[:20]]
    rows = [[classes[i], classes[j], str(wrong[i, j])] for i, j in most if wrong[i, j]]
    output.table(["class", "classified as", "images"], rows, "the most frequent confusions")
