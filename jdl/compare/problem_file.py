"""Problems from Python files that define `model`, `loss` and `data`.

    model   a Linen module or a `jdl.Model`, or a function that makes one
    loss    `loss(outputs, batch) -> float[B]`, or a name of `jdl.losses`
    data    entry of the batch -> array [n, …], such as {"image": x, "label": y}

Optional: `test`, as `data`; `target`, (metric, "at least" or "at most", threshold); `metrics`,
name -> function; `inputs`, the entry that the model takes ("image"); `name`; `version`;
`validation`, the share of the data on which settings are chosen. When the file changes, its trials
are run again; when data that it reads changes, give it another `version`, an integer.
"""

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdl import losses, metrics
from jdl.compare.problems import VALIDATION, Problem, arrays_problem
from jdl.compare.results import Target
from jdl.core import check
from jdl.core.model import as_model
from jdl.train import step


def load_problem(path: str | Path) -> Problem:
    """The problem defined by a Python file, which is executed.

    Raises:
      DataError: it is missing, raises an error, or lacks a definition; the message has the line.
    """
    path = Path(path)
    module = _run(path)
    missing = [name for name in ("model", "loss", "data") if not hasattr(module, name)]
    if missing:
        raise check.DataError(
            f"{path} must define `model`, `loss` and `data`; it lacks {', '.join(missing)}."
        )
    loss = module.loss
    if isinstance(loss, str):
        known = ("softmax_cross_entropy", "sigmoid_cross_entropy", "squared_error", "gaussian_nll")
        loss = getattr(losses, check.one_of(f"loss in {path}", loss, known))
    check.argument(callable(loss), f"loss in {path}", "a function or a name", loss)
    train = _arrays(path, "data", module.data)
    test = getattr(module, "test", None)
    test = None if test is None else _arrays(path, "test", test)
    found = getattr(module, "metrics", None)
    if found is None:
        labels = train.get("label")
        classes = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu"
        found = {"accuracy": metrics.accuracy} if classes else {}
    name = getattr(module, "name", None) or re.sub(r"[^A-Za-z0-9._+=-]+", "_", path.stem)
    inputs = getattr(module, "inputs", "image")
    for entry in (inputs,) if isinstance(inputs, str) else inputs:
        check.argument(entry in train, f"inputs in {path}", f"among {sorted(train)}", entry)

    def model() -> Any:
        own = module.model
        is_made = hasattr(own, "apply")
        return own if is_made or not callable(own) else own()

    problem = arrays_problem(
        name,
        model,
        loss,
        train,
        test,
        validation=float(getattr(module, "validation", VALIDATION)),
        metrics=found,
        inputs=inputs if isinstance(inputs, str) else tuple(inputs),
        target=Target("train_loss", "at most", 0.0),
        about={"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]},
        version=int(getattr(module, "version", 1)),
    )
    first = _first_loss(path, problem)
    return problem._replace(target=_target(path, getattr(module, "target", None), problem, first))


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise check.DataError(f"There is no problem file {path}.")
    spec = importlib.util.spec_from_file_location(f"jdl_problem_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.absolute()))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise check.DataError(_failure(path, error)) from error
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return module


def _failure(path: Path, error: BaseException) -> str:
    """The error in one line, with the line of the file."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path or Path(frame.filename).absolute() == path.absolute()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    words = (str(error).strip().splitlines() or [""])[0]
    where = "" if line is None else f", line {line}"
    return f"The problem file {path} fails{where}: {type(error).__name__}: {words}"


def _arrays(path: Path, name: str, given: Any) -> dict[str, np.ndarray]:
    given = given() if callable(given) else given
    ok = isinstance(given, Mapping) and bool(given)
    must = 'a dict of arrays such as {"image": x, "label": y}'
    check.argument(ok, f"{name} in {path}", must, type(given).__name__)
    arrays = {key: _plain(np.asarray(x)) for key, x in given.items()}
    shapes = {key: x.shape for key, x in arrays.items()}
    same = all(s and s[0] and s[0] == next(iter(shapes.values()))[0] for s in shapes.values())
    check.argument(same, f"{name} in {path}", "arrays of equal length, at least 1", shapes)
    return arrays


def _plain(x: np.ndarray) -> np.ndarray:
    """As float32 or int32 instead of 64 bits."""
    if x.dtype == np.float64:
        return x.astype(np.float32)
    return x.astype(np.int32) if x.dtype == np.int64 else x


def _first_loss(path: Path, problem: Problem) -> float:
    """The loss of initial parameters on a few examples; raises before a study starts."""
    batch = next(iter(problem.train(min(problem.size, 256), 0, 1)))
    try:
        model = as_model(problem.model())
        batch = jax.tree.map(jnp.asarray, step.scale_images(dict(batch), problem.inputs))
        names = (problem.inputs,) if isinstance(problem.inputs, str) else problem.inputs
        given = [batch[name] for name in names]
        params, state = model.init(jax.random.key(0), *given)
        outputs, _ = model.apply(params, state, *given, key=None, train=False)
        values = np.asarray(problem.loss(outputs, batch))
    except check.UserError:
        raise
    except Exception as error:
        raise check.DataError(_failure(path, error)) from error
    rows = (len(next(iter(batch.values()))),)
    check.argument(
        values.shape == rows, f"loss in {path}", f"a value an example, shape {rows}", values.shape
    )
    return float(values.mean())


def _target(path: Path, given: Any, problem: Problem, first: float) -> Target:
    """The file's target; by default an accuracy of 90 %, or a tenth of the first loss."""
    held = "test" if problem.test is not None else "train"
    if given is None and "accuracy" in problem.metrics:
        return Target(f"{held}_accuracy", "at least", 0.9)
    if given is None:
        return Target("train_loss", "at most", float(f"{first / 10:.3g}"))
    ok = isinstance(given, tuple | list) and len(given) == 3
    must = 'such as ("train_loss", "at most", 0.1)'
    check.argument(ok, f"target in {path}", must, given)
    names = [f"{s}_{m}" for s in problem.evaluated() for m in ("loss", *problem.metrics)]
    check.one_of(f"target's metric in {path}", given[0], names)
    check.one_of(f"target's goal in {path}", given[1], ("at least", "at most"))
    return Target(given[0], given[1], float(given[2]))
