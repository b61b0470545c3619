"""Problems from Python files that define `model`, `loss` and `data`, see `jdl.train.model_file`.

Optional besides: `target`, (metric, "at least" or "at most", threshold); `name`; `version`;
`validation`, the share of the data on which settings are chosen. When the file or its data changes,
its trials are run again; when code that it imports changes, give it another `version`, an integer.
"""

import hashlib
import re
from pathlib import Path

from jdl.compare.identity import as_label
from jdl.compare.problems import VALIDATION, Problem, arrays_problem
from jdl.compare.results import Target
from jdl.core import check
from jdl.train.model_file import ModelFile, checked, load


def load_problem(path: str | Path) -> Problem:
    """The problem defined by a Python file, which is executed.

    Raises:
      SourceError: it is missing, raises an error, lacks a definition or has one that cannot be
        trained; the message has the line.
    """
    file = load(path, "problem file")
    file.must_define("model", "loss", "data")
    parts = file.parts()
    classes = len(file.class_names(parts["train"]))
    found = checked(file, parts, classes)
    validation, version = file.get("validation", VALIDATION), file.get("version", 1)
    with file.doing("validation"):
        check.in_range("validation", validation, 0.0, 0.9)
    file.check(isinstance(version, int), "version", "an integer", version)
    name = file.get("name", as_label(file.path.stem).lstrip("._+=-"))
    ok = isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name))
    file.check(ok, "name", "letters, digits and . _ + = -", name)
    names = [f"{part}_{metric}" for part in parts for metric in ("loss", *found.metrics)]
    return arrays_problem(
        name,
        lambda: file.model(found.image_shape, classes),
        found.loss,
        parts["train"],
        parts.get("test"),
        validation=validation,
        metrics=found.metrics,
        inputs=file.inputs,
        target=_target(file, names, found.first),
        about={
            "file": file.path.name,
            "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest()[:16],
        },
        version=version,
    )


def _target(file: ModelFile, names: list[str], first: float) -> Target:
    """The file's target; by default an accuracy of 90 %, or a tenth of the first loss."""
    given = file.get("target")
    if given is None:
        accuracy = [name for name in names if name.endswith("_accuracy")]
        low = Target("train_loss", "at most", float(f"{first / 10:.3g}"))
        return Target(accuracy[-1], "at least", 0.9) if accuracy else low
    with file.doing("target"):
        ok = isinstance(given, tuple | list) and len(given) == 3
        check.argument(ok, "target", 'such as ("train_loss", "at most", 0.1)', given)
        check.one_of("target's metric", given[0], names)
        check.one_of("target's goal", given[1], ("at least", "at most"))
        return Target(given[0], given[1], float(given[2]))
