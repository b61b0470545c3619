"""How an update of an optimizer, or a run of a solver, ended: one set of codes for both."""

import enum
from typing import Any

from jdl.core import check


class ResultCode(enum.IntEnum):
    """How an update or a run ended; `words` describes it in a sentence.

    Optimizers record how their last update ended in `Diagnostics.termination`, solvers how the run
    ended in `SolverState.status`.

    >>> ResultCode.CONVERGED.words
    'converged: the error is within the tolerance'
    """

    # Updates.
    NOT_STARTED = 0
    ACCEPTED = 1
    DECREASE_ONLY = 2
    STEEPEST_DESCENT = 3
    NO_DECREASE = 4
    STATIONARY = 5
    NOT_FINITE = 6  # runs too
    NEGATIVE_CURVATURE = 7
    # Runs.
    RUNNING = 8
    CONVERGED = 9
    MAX_ITERATIONS = 10
    LINE_SEARCH_FAILED = 11
    NO_PROGRESS = 12

    @property
    def words(self) -> str:
        """The code in a sentence."""
        return _WORDS[self]


_WORDS = {
    ResultCode.NOT_STARTED: "no update yet",
    ResultCode.ACCEPTED: "step accepted",
    ResultCode.DECREASE_ONLY: "step accepted for its decrease; the line search ran out of trials",
    ResultCode.STEEPEST_DESCENT: "not a descent direction; stepped along -gradient",
    ResultCode.NO_DECREASE: "no step: no trial decreased the objective",
    ResultCode.STATIONARY: "no step: the gradient is zero",
    ResultCode.NOT_FINITE: "value or gradient is not finite",
    ResultCode.NEGATIVE_CURVATURE: "step accepted; it follows a direction of negative curvature",
    ResultCode.RUNNING: "running: no stopping rule is met yet",
    ResultCode.CONVERGED: "converged: the error is within the tolerance",
    ResultCode.MAX_ITERATIONS: "stopped at the maximum number of iterations, above the tolerance",
    ResultCode.LINE_SEARCH_FAILED: (
        "stopped: the line search found no decrease, not even along -gradient; the gradient may be "
        "wrong (use check_gradient) or the function not smooth"
    ),
    ResultCode.NO_PROGRESS: (
        "stopped: value and error no longer decrease; the tolerance may be below the precision of "
        "the dtype, the steps too small, or the gradient wrong (use check_gradient)"
    ),
}


def words(code: Any) -> str:
    """A `ResultCode` in words.

    Raises:
      ArgumentError: there is no such code.

    >>> words(5)
    'no step: the gradient is zero'
    """
    check.one_of("code", int(code), [int(known) for known in ResultCode])
    return ResultCode(int(code)).words
