"""One row of a run's log, and what a hook may do with it."""

from collections.abc import Callable
from typing import Any


class LogRow(dict[str, Any]):
    """A row of the log: step, seconds, epoch, split and the values; hooks may add entries.

    Attributes:
      estimator: the Estimator that made it.
      restores: how often its run has been restored from a checkpoint so far.
    """

    estimator: Any  # jdl.Estimator, which imports this file
    restores: int


Hook = Callable[[Any], None]


class StopTraining(Exception):
    """Raised by a hook: `train` saves and returns."""
