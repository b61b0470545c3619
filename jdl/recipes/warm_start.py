"""A model that starts from another run's parameters, where path and shape agree: fine-tuning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdl.core import check
from jdl.core.model import Model, ModelLike, as_model
from jdl.train.checkpoint import Checkpoints, begun

# Where a checkpoint has the weights to evaluate with, and the model's state.
_AVERAGE, _PARAMS, _STATE = ".opt_state.average", ".params", ".model_state"


def starting_from(model: ModelLike, workdir: Path) -> tuple[Model, list[str]]:
    """The model with the arrays of a run that have its paths and shapes, and its own elsewhere.

    The run's are those it evaluates with: a moving average of the parameters, where it has one.

    Args:
      model: to start.
      workdir: the run directory, of `jdl train` or an Estimator.

    Returns:
      The model, and two lines, filled when it is initialized: what it took, and what it did not.

    Raises:
      DataError: there is no checkpoint; when the model is initialized, if nothing fits.
    """
    saved = Checkpoints(workdir / "checkpoints").arrays()
    if saved is None:
        raise check.DataError(f"--init-from {workdir}: there is no checkpoint of a run.")
    params = _under(saved, _AVERAGE) or _under(saved, _PARAMS)
    state, base = _under(saved, _STATE), as_model(model)
    told: list[str] = []

    def init(key: Any, *inputs: Any) -> Any:
        own = base.init(key, *inputs)
        taken: list[str] = []
        left: list[str] = []
        made = tuple(_filled(*pair, taken, left) for pair in zip(own, (params, state), strict=True))
        if not taken:
            raise check.DataError(f"--init-from {workdir}: nothing fits. {'; '.join(left)}.")
        told[:] = [f"taken from {workdir}: {', '.join(taken)}"]
        told.append(f"not taken: {'; '.join(left) or 'nothing'}")
        return made

    return Model(init, base.apply), told


def first_model(config: Any, workdir: Path) -> tuple[Any, list[str]]:
    """The model that a run begins with, and, after it is initialized, the lines to tell of it.

    Args:
      config: the run's `RunConfig`.
      workdir: the run directory; if it has a checkpoint, that counts.
    """
    model = config.build_model()
    if config.init_from is None or begun(workdir):
        return model, []
    return starting_from(model, Path(config.init_from))


def _under(saved: Mapping[str, Any], start: str) -> dict[str, Any]:
    """The arrays below that part of the state, by the path within it."""
    return {path.removeprefix(start): x for path, x in saved.items() if path.startswith(start)}


def _filled(own: Any, saved: Mapping[str, Any], taken: list[str], left: list[str]) -> Any:
    """The tree with the saved arrays that fit, which are listed, as are the others."""

    def chosen(path: Any, x: Any) -> Any:
        key = jax.tree_util.keystr(path)
        name = _words(key)
        if key not in saved:
            left.append(f"{name} is new")
        elif saved[key].shape != x.shape:
            left.append(f"{name} is {list(saved[key].shape)} there, {list(x.shape)} here")
        else:
            taken.append(name)
            return np.asarray(saved[key]).astype(x.dtype)
        return x

    found = jax.tree.map_with_path(chosen, own)
    here = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(own)}
    left += [f"{_words(path)} is only there" for path in saved if path not in here]
    return found


def _words(path: str) -> str:
    """The names of a path such as "['Dense_0']['kernel']"."""
    return path.strip("[']").replace("']['", "/")
