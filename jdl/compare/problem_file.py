"""Problems from Python files that define `model`, `loss` and `data`.

    model   a Linen module or a `jdl.Model`, or a function that makes one
    loss    `loss(outputs, batch) -> float[B]`, or a name of `jdl.losses`
    data    entry of the batch -> array [n, …], such as {"image": x, "label": y}

Optional: `test`, as `data`; `target`, (metric, "at least" or "at most", threshold); `metrics`,
name -> function, or one function that returns a dict of them; `inputs`, the entry that the model
takes ("image"); `name`; `version`; `validation`, the share of the data on which settings are
chosen. When the file or its data changes, its trials are run again; when code that it imports
changes, give it another `version`, an integer.

The file is checked before anything is trained: model, loss and metrics are run on a few hundred
examples, those with the smallest and largest values among them, and a training step is traced.
"""

import ast
import contextlib
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdl import losses, metrics
from jdl.compare.identity import as_label
from jdl.compare.problems import VALIDATION, Problem, arrays_problem
from jdl.compare.results import Target
from jdl.core import check
from jdl.core.model import as_model
from jdl.core.objective import asked
from jdl.core.types import Batch, Loss, Metric, Outputs
from jdl.train import step

LOSSES = ("softmax_cross_entropy", "sigmoid_cross_entropy", "squared_error", "gaussian_nll")

TEXT = "US"  # kinds of arrays
NUMBERS = "np.unique(text, return_inverse=True)[1]"
SOME = 256  # examples on which a file is checked

Arrays = dict[str, np.ndarray]


def load_problem(path: str | Path) -> Problem:
    """The problem defined by a Python file, which is executed.

    Raises:
      DataError: it is missing, raises an error, lacks a definition or has one that cannot be
        trained; the message has the line.
    """
    file = _run(Path(path))
    missing = [name for name in ("model", "loss", "data") if not hasattr(file.module, name)]
    if missing:
        raise check.DataError(
            f"{path} must define `model`, `loss` and `data`; it lacks {', '.join(missing)}."
        )
    parts = {"train": _arrays(file, "data")}
    if file.get("test") is not None:
        parts["test"] = _arrays(file, "test")
    inputs = file.get("inputs", "image")
    inputs = inputs if isinstance(inputs, str) else tuple(inputs)
    for entry in (inputs,) if isinstance(inputs, str) else inputs:
        file.check(entry in parts["train"], "inputs", f"among {[*parts['train']]}", entry)

    def model() -> Any:
        own = file.module.model
        return own if hasattr(own, "apply") or not callable(own) else own()

    tried = _tried(file, model, inputs, parts)
    loss, first = _loss(file, tried)
    measures = _metrics(file, tried, parts["train"].get("label"))
    validation, version = file.get("validation", VALIDATION), file.get("version", 1)
    with file.doing("validation"):
        check.in_range("validation", validation, 0.0, 0.9)
    file.check(isinstance(version, int), "version", "an integer", version)
    name = file.get("name", as_label(file.path.stem).lstrip("._+=-"))
    ok = isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name))
    file.check(ok, "name", "letters, digits and . _ + = -", name)
    problem = arrays_problem(
        name,
        model,
        loss,
        parts["train"],
        parts.get("test"),
        validation=validation,
        metrics=measures,
        inputs=inputs,
        target=_target(file, [f"{p}_{m}" for p in parts for m in ("loss", *measures)], first),
        about={
            "file": file.path.name,
            "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest()[:16],
        },
        version=version,
    )
    with file.doing("metrics"):
        net, sgd = as_model(model()), optax.sgd(0.1)
        program = step.build(net, loss, sgd, metrics=measures, inputs=inputs)
    with file.doing("loss"):
        state = jax.eval_shape(program.init, jax.random.key(0), tried["train"].batch)
        jax.eval_shape(program.train, state, tried["train"].batch)
    return problem


class _File(NamedTuple):
    """A problem file that has run; its errors are one line, and name the line of the file."""

    path: Path
    module: ModuleType
    texts: set[str]  # entries of the data that are text

    def get(self, name: str, default: Any = None) -> Any:
        found = getattr(self.module, name, None)
        return default if found is None else found

    def check(self, ok: bool, name: str, must: str, got: Any, hint: str = "") -> None:
        with self.doing(name):
            check.argument(ok, name, must, got, hint)

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Errors within name the line of the file that was running, or else defines `name`."""
        try:
            yield
        except Exception as error:
            words = _failure(self.path, error, name)
            for text in self.texts:
                if repr(text) in words:
                    words += f" {text!r} is text; class numbers are {NUMBERS}."
            raise check.DataError(words) from error


def _run(path: Path) -> _File:
    if not path.is_file():
        raise check.DataError(f"There is no problem file {path}.")
    spec = importlib.util.spec_from_file_location(f"jdl_problem_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Linen modules, being dataclasses, look there for types
    sys.path.insert(0, str(path.parent.absolute()))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise check.DataError(_failure(path, error)) from error
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return _File(path, module, set())


def _failure(path: Path, error: BaseException, name: str = "") -> str:
    """The error in one line, with the line of the file."""
    lines = [
        frame.lineno
        for one in (error.__cause__, error)
        for frame in traceback.extract_tb(one.__traceback__ if one else None)
        if Path(frame.filename).absolute() == path.absolute()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or _lines(path, name))[-1]
    words = " ".join(str(error).split("\n\n")[0].split())
    words = words if isinstance(error, check.UserError) else f"{type(error).__name__}: {words}"
    where = "" if line is None else f", line {line}"
    return f"{path}{where}: {words}"


def _lines(path: Path, name: str) -> list[int | None]:
    """The lines that define this name outside of functions; None before the first."""
    found: list[int | None] = [None]
    if not name:
        return found
    for node in ast.parse(path.read_bytes()).body:
        is_def = isinstance(node, ast.FunctionDef | ast.ClassDef)
        for inner in [node] if is_def else ast.walk(node):
            stored = isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store) and inner.id
            if name in (stored, getattr(inner, "name", None), getattr(inner, "asname", None)):
                found.append(getattr(inner, "lineno", node.lineno))
    return found


# ------------------------------------------------------------------ what the file defines


def _arrays(file: _File, name: str) -> Arrays:
    """The arrays of `data` or `test`, without those of text, which no program can take."""
    given = file.get(name)
    if callable(given):
        with file.doing(name):
            given = given()
    ok = isinstance(given, Mapping) and bool(given)
    must = 'a dict of arrays such as {"image": x, "label": y}'
    file.check(ok, name, must, type(given).__name__)
    with file.doing(name):
        arrays = {key: np.asarray(x) for key, x in given.items()}
    shapes = {key: x.shape for key, x in arrays.items()}
    same = all(s and s[0] and s[0] == next(iter(shapes.values()))[0] for s in shapes.values())
    file.check(same, name, "arrays of equal length, at least 1", shapes)
    file.texts.update(key for key, x in arrays.items() if x.dtype.kind in TEXT)
    with file.doing(name):
        return {key: _plain(key, x) for key, x in arrays.items() if key not in file.texts}


def _plain(key: str, x: np.ndarray) -> np.ndarray:
    """As float32 or int32 instead of 64 bits."""
    ok = x.dtype == bool or jnp.issubdtype(x.dtype, np.number)
    check.argument(ok, key, "an array of numbers", f"one of {x.dtype}")
    if x.dtype == np.float64:
        return x.astype(np.float32)
    if x.dtype.kind not in "iu" or x.dtype.itemsize < 8:
        return x
    ends = int(x.min()), int(x.max())
    check.argument(ends[0] >= -(2**31) and ends[1] < 2**31, key, "integers of 32 bits", ends)
    return x.astype(np.int32)


class _Tried(NamedTuple):
    """A few hundred examples and the outputs of the initial model for them."""

    batch: Batch
    outputs: Outputs


def _tried(file: _File, model: Any, inputs: Any, parts: Mapping[str, Arrays]) -> dict[str, _Tried]:
    """Random examples, then those with the smallest and largest values, or NaN, of each entry."""
    names, variables, tried = (inputs,) if isinstance(inputs, str) else inputs, None, {}
    for part, arrays in parts.items():
        size = len(next(iter(arrays.values())))
        rows = [*np.random.default_rng(0).permutation(size)[:SOME]]
        for each in [x.reshape(size, -1) for x in arrays.values() if x.size]:
            rows += [int(np.argmin(each.min(axis=1))), int(np.argmax(each.max(axis=1)))]
        with file.doing("model" if part == "train" else "test"):
            some = {key: jnp.asarray(x[rows]) for key, x in arrays.items()}
            batch = step.scale_images(some, inputs)
            given, net = [batch[name] for name in names], as_model(model())
            variables = variables or net.init(jax.random.key(0), *given)
            outputs, _ = net.apply(*variables, *given, key=None, train=False)
        tried[part] = _Tried(batch, outputs)
    return tried


def _values(file: _File, name: str, what: str, function: Any, part: str, tried: _Tried) -> Any:
    """What a loss or a metric gives for the examples: one value each."""
    with file.doing("data" if part == "train" else part):
        found = asked(function, what, tried.outputs, tried.batch)
    size = len(next(iter(tried.batch.values())))
    for key, x in found.items() if isinstance(found, Mapping) else [(what, found)]:
        shape = np.shape(x)
        ok = shape == (size,)
        file.check(ok, name, f"a value an example, shape ({size},)", shape, f"It is {key}.")
    return found


def _loss(file: _File, tried: Mapping[str, _Tried]) -> tuple[Loss, float]:
    """The loss, and its mean over training examples."""
    loss = file.module.loss
    if isinstance(loss, str):
        with file.doing("loss"):
            loss = getattr(losses, check.one_of("loss", loss, LOSSES))
    file.check(callable(loss), "loss", "a function or a name", loss)
    values = {
        part: np.asarray(_values(file, "loss", "loss", loss, part, some))
        for part, some in tried.items()
    }
    for part, found in values.items():
        if len(at := np.flatnonzero(~np.isfinite(found))):
            batch = {k: np.asarray(x[at[0]]) for k, x in tried[part].batch.items()}
            seen = ", ".join(f"{k} from {x.min():.4g} to {x.max():.4g}" for k, x in batch.items())
            must = "finite for the initial parameters"
            hint = f"The example has {seen}."
            file.check(False, "loss", must, float(found[at[0]]), hint)
    return loss, float(values["train"][:SOME].mean())


def _metrics(file: _File, tried: Mapping[str, _Tried], label: Any) -> dict[str, Metric]:
    """name -> metric; by default the accuracy, where labels are class numbers."""
    given = file.get("metrics")
    if given is None:
        classes = label is not None and label.ndim == 1 and label.dtype.kind in "iu"
        given = {"accuracy": metrics.accuracy} if classes else {}
    must = "a dict of functions, or a function that returns a dict of values"
    if callable(given):
        found = _values(file, "metrics", "metrics", given, "train", tried["train"])
        file.check(isinstance(found, Mapping), "metrics", must, f"one that returns {type(found)}")
        given = {name: _one(given, name) for name in found}
    ok = isinstance(given, Mapping) and all(callable(metric) for metric in given.values())
    file.check(ok, "metrics", must, given)
    for name, metric in given.items():
        for part, some in tried.items():
            _values(file, "metrics", f"metrics[{name!r}]", metric, part, some)
    return dict(given)


def _one(function: Metric, name: str) -> Metric:
    """One of the metrics that a function returns together."""
    metric = lambda outputs, batch: function(outputs, batch)[name]  # noqa: E731
    best = getattr(function, "direction", {})
    return metrics.direction(best[name])(metric) if name in best else metric


def _target(file: _File, names: list[str], first: float) -> Target:
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
