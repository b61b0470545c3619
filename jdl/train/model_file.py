"""A Python file that defines a model, its loss and its data, and is checked before it is used.

    model    a Linen module or a `jdl.Model`; or a function that makes one, of nothing or of any of
             `image_shape`, the shape of one input, and `num_classes`
    loss     `loss(outputs, batch) -> float[B]`, or a name of `jdl.losses`
    data     entry of the batch -> array [n, …], such as {"image": x, "label": y}

Optional: `test`, as `data`; `metrics`, name -> function, or one function that returns a dict of
them; `inputs`, the entry that the model takes ("image"); `classes`, the names of the class numbers.

Model, loss and metrics are run on a few hundred examples, those with the smallest and largest
values among them, and a training step is traced.
"""

import ast
import contextlib
import importlib.util
import inspect
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
from jdl.core import check
from jdl.core.model import as_model
from jdl.core.objective import asked
from jdl.core.types import Batch, Loss, Metric, Outputs
from jdl.train import step

LOSSES = ("softmax_cross_entropy", "sigmoid_cross_entropy", "squared_error", "gaussian_nll")

TEXT = "US"  # kinds of arrays
NUMBERS = "np.unique(text, return_inverse=True)[1]"
SOME = 256  # examples on which a file is checked
MOST_CLASSES = 10_000  # larger integers are no class numbers
MODULE = "jdl_file_"  # begins the names of such files' modules

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]


class ModelFile(NamedTuple):
    """A file that has run; its errors are one line, and name the line of the file."""

    path: Path
    module: ModuleType
    texts: set[str]  # entries of the data that are text

    def get(self, name: str, default: Any = None) -> Any:
        """What the file defines under this name."""
        found = getattr(self.module, name, None)
        return default if found is None else found

    def check(self, ok: bool, name: str, must: str, got: Any, hint: str = "") -> None:
        """Raises unless `ok`, with the line of this name."""
        with self.doing(name):
            check.argument(ok, name, must, got, hint)

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Errors within name the line of the file that was running, or else defines `name`."""
        try:
            yield
        except Exception as error:
            words = failure(self.path, error, name)
            for text in self.texts:
                if repr(text) in words:
                    words += f" {text!r} is text; class numbers are {NUMBERS}."
            raise check.SourceError(words) from error

    @property
    def inputs(self) -> str | tuple[str, ...]:
        """The entry that the model takes, or several."""
        inputs = self.get("inputs", "image")
        return inputs if isinstance(inputs, str) else tuple(inputs)

    def must_define(self, *names: str) -> None:
        """Raises unless the file defines these."""
        if missing := [name for name in names if self.get(name) is None]:
            all_ = " and ".join(", ".join(f"`{name}`" for name in names).rsplit(", ", 1))
            lacks = f"; it lacks {', '.join(missing)}" * (len(names) > 1)
            raise check.SourceError(f"{self.path} must define {all_}{lacks}.")

    def parts(self) -> dict[str, Arrays]:
        """The arrays of "train", and of "test" where the file defines them."""
        names = {"train": "data"} | ({} if self.get("test") is None else {"test": "test"})
        return {part: self._arrays(name) for part, name in names.items()}

    def _arrays(self, name: str) -> Arrays:
        """The arrays of `data` or `test`, without those of text, which no program can take."""
        given = self.get(name)
        if callable(given):
            with self.doing(name):
                given = given()
        ok = isinstance(given, Mapping) and bool(given)
        must = 'a dict of arrays such as {"image": x, "label": y}'
        self.check(ok, name, must, type(given).__name__)
        with self.doing(name):
            arrays = {key: np.asarray(x) for key, x in given.items()}
        shapes = {key: x.shape for key, x in arrays.items()}
        same = all(s and s[0] and s[0] == next(iter(shapes.values()))[0] for s in shapes.values())
        self.check(same, name, "arrays of equal length, at least 1", shapes)
        self.texts.update(key for key, x in arrays.items() if x.dtype.kind in TEXT)
        with self.doing(name):
            return {key: _plain(key, x) for key, x in arrays.items() if key not in self.texts}

    def metrics(self, num_classes: int) -> Any:
        """The file's metrics; by default the accuracy, where labels are class numbers."""
        return self.get("metrics", {"accuracy": metrics.accuracy} if num_classes else {})

    def model(self, image_shape: Shape, num_classes: int) -> Any:
        """The model for inputs of this shape and this number of classes."""
        own = self.module.model
        if hasattr(own, "apply") or not callable(own):
            return own
        offered = {"image_shape": image_shape, "num_classes": num_classes}
        with self.doing("model"):
            takes = inspect.signature(own).parameters.values()
            needs = [p.name for p in takes if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
            strange = [name for name in needs if name not in offered]
            must = "a function of image_shape and num_classes, of one of them or of nothing"
            check.argument(not strange, "model", must, strange)
            return own(**{p.name: offered[p.name] for p in takes if p.name in offered})

    def class_names(self, arrays: Arrays) -> tuple[str, ...]:
        """The file's `classes`; or the class numbers in the entry "label"; or none."""
        label, given = arrays.get("label"), self.get("classes")
        if given is None:
            if label is None or label.ndim != 1 or label.dtype.kind not in "iu" or label.min() < 0:
                return ()
            count = int(label.max()) + 1
            return tuple(map(str, range(count))) if 2 <= count <= MOST_CLASSES else ()
        ok = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
        self.check(ok, "classes", "a list of names, in the order of their numbers", given)
        return tuple(given)

    @property
    def loss(self) -> Loss:
        """The loss, whose name may stand for it."""
        loss = self.module.loss
        if isinstance(loss, str):
            with self.doing("loss"):
                loss = getattr(losses, check.one_of("loss", loss, LOSSES))
        self.check(callable(loss), "loss", "a function or a name", loss)
        return loss


def load(path: str | Path, what: str = "model file") -> ModelFile:
    """The file, executed.

    Args:
      path: of the file.
      what: it is, for the error where there is none.

    Raises:
      SourceError: it is missing or raises an error; the message has the line.
    """
    path = Path(path)
    if not path.is_file():
        raise check.SourceError(f"There is no {what} {path}.")
    spec = importlib.util.spec_from_file_location(f"{MODULE}{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Linen modules, being dataclasses, look there for types
    sys.path.insert(0, str(path.parent.absolute()))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise check.SourceError(failure(path, error)) from error
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return ModelFile(path, module, set())


def blamed(error: BaseException) -> str | None:
    """The error in one line, if code of such a file raised it or called what did; else None."""
    names = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    for key, module in list(sys.modules.items()):
        if key.startswith(MODULE) and (path := getattr(module, "__file__", None)) in names:
            return failure(Path(path), error)
    return None


def failure(path: Path, error: BaseException, name: str = "") -> str:
    """The error in one line, with the line of the file.

    Args:
      path: of the file.
      error: that was raised.
      name: the definition at fault, where no line of the file was running.
    """
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


class Checked(NamedTuple):
    """What a file defines, after it has run on some examples.

    Attributes:
      loss: `loss(outputs, batch) -> float[B]`.
      metrics: name -> `metric(outputs, batch) -> float[B]`; the accuracy, where labels are class
        numbers, unless the file has others.
      outputs: of the initial model, for some training examples.
      first: their mean loss.
      image_shape: the shape of one input, the first.
    """

    loss: Loss
    metrics: dict[str, Metric]
    outputs: Outputs
    first: float
    image_shape: Shape


def checked(file: ModelFile, parts: Mapping[str, Arrays], num_classes: int) -> Checked:
    """What the file defines, if it can be trained on these data.

    Args:
      file: from `load`.
      parts: "train", and "test" if there is any -> entry -> array.
      num_classes: 0 where labels are no class numbers.

    Raises:
      SourceError: in one line, with the line of the file.
    """
    inputs = file.inputs
    names = (inputs,) if isinstance(inputs, str) else inputs
    for entry in names:
        file.check(entry in parts["train"], "inputs", f"among {[*parts['train']]}", entry)
    shape = parts["train"][names[0]].shape[1:] if names else ()
    model = file.model(shape, num_classes)
    tried = _tried(file, model, inputs, parts)
    loss, first = _loss(file, tried)
    measures = _metrics(file, tried, num_classes)
    with file.doing("metrics"):
        net, sgd = as_model(model), optax.sgd(0.1)
        program = step.build(net, loss, sgd, metrics=measures, inputs=inputs)
    with file.doing("loss"):
        state = jax.eval_shape(program.init, jax.random.key(0), tried["train"].batch)
        jax.eval_shape(program.train, state, tried["train"].batch)
    return Checked(loss, measures, tried["train"].outputs, first, shape)


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


def _tried(
    file: ModelFile, model: Any, inputs: Any, parts: Mapping[str, Arrays]
) -> dict[str, _Tried]:
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
            given, net = [batch[name] for name in names], as_model(model)
            variables = variables or net.init(jax.random.key(0), *given)
            outputs, _ = net.apply(*variables, *given, key=None, train=False)
        tried[part] = _Tried(batch, outputs)
    return tried


def _values(file: ModelFile, name: str, what: str, function: Any, part: str, tried: _Tried) -> Any:
    """What a loss or a metric gives for the examples: one value each."""
    with file.doing("data" if part == "train" else part):
        found = asked(function, what, tried.outputs, tried.batch)
    size = len(next(iter(tried.batch.values())))
    for key, x in found.items() if isinstance(found, Mapping) else [(what, found)]:
        shape = np.shape(x)
        ok = shape == (size,)
        file.check(ok, name, f"a value an example, shape ({size},)", shape, f"It is {key}.")
    return found


def _loss(file: ModelFile, tried: Mapping[str, _Tried]) -> tuple[Loss, float]:
    """The loss, and its mean over training examples."""
    loss = file.loss
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


def _metrics(file: ModelFile, tried: Mapping[str, _Tried], num_classes: int) -> dict[str, Metric]:
    """name -> metric."""
    given = file.metrics(num_classes)
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
