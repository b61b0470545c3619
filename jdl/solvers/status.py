"""How a run ended, in a code and in words."""

import enum
from typing import Any

import numpy as np


class Status(enum.IntEnum):
    """How a run ended; `RUNNING` while it has not.

    >>> Status.CONVERGED.words
    'converged: the error is within the tolerance'
    """

    RUNNING = 0
    CONVERGED = 1
    MAX_ITERATIONS = 2
    LINE_SEARCH_FAILED = 3
    NOT_FINITE = 4
    NO_PROGRESS = 5

    @property
    def words(self) -> str:
        """The code in a sentence."""
        return _WORDS[self]


_WORDS = {
    Status.RUNNING: "running: no rule to stop has been met yet",
    Status.CONVERGED: "converged: the error is within the tolerance",
    Status.MAX_ITERATIONS: "stopped after the iterations allowed, short of the tolerance",
    Status.LINE_SEARCH_FAILED: (
        "stopped: the line search found no decrease, along -gradient either; the gradient may "
        "disagree with the function (check_gradient tells), or the function be rough"
    ),
    Status.NOT_FINITE: "stopped: value or gradient is not finite",
    Status.NO_PROGRESS: (
        "stopped: value and error fall no more; the tolerance is below what the numbers' type "
        "resolves here, or steps are too small, or the gradient is wrong (check_gradient tells)"
    ),
}


def message(status: Any, error: Any, tol: float, dtype: Any) -> str:
    """The status in words, with the figures that led to it.

    >>> message(Status.CONVERGED, 5e-4, 1e-3, "float32")
    'converged: the error is within the tolerance (error 0.0005, tol 0.001, float32)'
    """
    words = Status(int(np.asarray(status))).words
    return f"{words} (error {float(np.asarray(error)):.3g}, tol {tol:.3g}, {dtype})"
