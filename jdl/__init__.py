"""Train JAX models with any optimizer, first or second order, on data streamed from tar archives.

Names are imported when first used, so that `import jdl` and `jdl --help` stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from jdl import compare as compare
    from jdl import curvature as curvature
    from jdl import data as data
    from jdl import losses as losses
    from jdl import metrics as metrics
    from jdl import models as models
    from jdl import optim as optim
    from jdl import solvers as solvers
    from jdl import train as train
    from jdl import vision as vision
    from jdl.core.adapters import from_equinox as from_equinox
    from jdl.core.adapters import from_haiku as from_haiku
    from jdl.core.adapters import from_keras as from_keras
    from jdl.core.model import Model as Model
    from jdl.core.model import from_fns as from_fns
    from jdl.core.model import from_linen as from_linen
    from jdl.core.model import from_nnx as from_nnx
    from jdl.core.objective import Objective as Objective
    from jdl.core.types import Mode as Mode
    from jdl.solvers.minimize import minimize as minimize
    from jdl.train.estimator import Estimator as Estimator
    from jdl.train.model_fn import Spec as Spec
    from jdl.train.model_fn import from_model_fn as from_model_fn
    from jdl.train.premade import autoencoder as autoencoder
    from jdl.train.premade import classifier as classifier

# public name -> the module that defines it
_NAMES = {
    "Model": "jdl.core.model",
    "from_linen": "jdl.core.model",
    "from_nnx": "jdl.core.model",
    "from_fns": "jdl.core.model",
    "from_equinox": "jdl.core.adapters",
    "from_haiku": "jdl.core.adapters",
    "from_keras": "jdl.core.adapters",
    "Objective": "jdl.core.objective",
    "Mode": "jdl.core.types",
    "minimize": "jdl.solvers",
    "Estimator": "jdl.train.estimator",
    "classifier": "jdl.train.premade",
    "from_model_fn": "jdl.train.model_fn",
    "Spec": "jdl.train.model_fn",
    "autoencoder": "jdl.train.premade",
}
_ROOMS = (
    "losses",
    "metrics",
    "models",
    "optim",
    "solvers",
    "curvature",
    "data",
    "train",
    "vision",
    "compare",
)

__all__ = ["__version__", *_NAMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"jdl.{name}")
    raise AttributeError(f"module 'jdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
