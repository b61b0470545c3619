"""The run directory: a run's checkpoints and its log; nothing is kept without one."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jdl.core import check, tree
from jdl.core.types import PyTree
from jdl.train.checkpoint import Checkpoints, Restored
from jdl.train.lock import run_lock
from jdl.train.step import TrainState
from jdl.train.writers import READ_ONLY, Row, Writers

logger = logging.getLogger("jdl.train")

_all_finite = jax.jit(tree.all_finite)


class NonFiniteError(check.TrainingError):
    """A loss or parameters are not finite."""


class RunDirectory:
    """Saves and restores a run, and writes its log.

    Where several processes train together, all save and restore, and process 0 writes the log.

    Args:
      workdir: the run directory; None keeps nothing.
      logs, keep, keep_every, keep_best: as for `jdl.Estimator`.
      directions: whether "max" or "min" of each logged value is best, see `writers.declare`.
    """

    def __init__(
        self,
        workdir: Path | None,
        logs: Iterable[str],
        keep: int,
        keep_every: int | None,
        keep_best: tuple[str, str] | None,
        directions: Callable[[], Mapping[str, str]] = dict,
    ):
        check.positive_int("keep", keep)
        if keep_every is not None:
            check.positive_int("keep_every", keep_every)
        if keep_best is not None:
            pair = isinstance(keep_best, tuple) and len(keep_best) == 2
            check.argument(
                pair and keep_best[1] in ("min", "max"),
                "keep_best",
                'a metric and "min" or "max", such as ("accuracy", "max")',
                keep_best,
            )
            hint = "The best checkpoint is kept there."
            check.argument(workdir is not None, "workdir", "given with keep_best", workdir, hint)
        self.workdir, self._keep_best = workdir, keep_best
        self._leads = jax.process_index() == 0
        self._training = False
        self._rewind_to: int | None = None  # step the log goes back to before training
        if workdir is not None:
            self._writers = Writers(workdir, logs, directions)
            self._checkpoints = Checkpoints(workdir / "checkpoints", keep, keep_every)
            self._best = Checkpoints(workdir / "best", keep=1)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps others from training in the directory; at its end, all that was saved is on disk.

        Raises:
          UserError: another process, or Estimator, is training there.
          TrainingError: a checkpoint could not be written.
        """
        locks = self.workdir is not None and self._leads
        with run_lock(str(self.workdir)) if locks else nullcontext():
            self._training = True
            try:
                yield
            except BaseException:
                if jax.process_count() == 1:  # several would have to wait for each other
                    with suppress(check.TrainingError):
                        self.close()
                raise
            finally:
                self._training = False
            self.close()

    # ------------------------------------------------------------------ the log

    def write(self, row: Row) -> None:
        """Appends a row to the log; an evaluation in a read-only directory is not logged."""
        if self.workdir is None or not self._leads:
            return
        try:
            self._writers.write(row)
        except OSError as error:
            if self._training or error.errno not in READ_ONLY:
                raise
            logger.warning("the evaluation is not logged: %s", error)

    def rewind_log(self) -> None:
        """Before training: drops the log's rows after the checkpoint that has been restored.

        Not done at the restore, since an evaluation must not change the log of a running training.
        """
        if self._rewind_to is not None and self._leads:
            self._writers.rewind(self._rewind_to)
        self._rewind_to = None

    # ------------------------------------------------------------------ checkpoints

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return None if self.workdir is None else self._checkpoints.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves the state after this step.

        Raises:
          NonFiniteError: its parameters are not finite; the last checkpoint stays. This is checked
            without a directory too.
          TrainingError: it cannot be written.
        """
        if not bool(_all_finite(state.params)):
            self.close()
            kept = self.latest_step()
            raise NonFiniteError(
                f"The parameters are not finite after step {int(state.step)}; they are not saved. "
                + ("" if kept is None else f"The checkpoint of step {kept} is the last good one. ")
                + "Try a smaller learning rate."
            )
        if self.workdir is not None:
            self._checkpoints.save(int(state.step), state, meta)

    def close(self) -> None:
        """Returns when everything saved is on disk."""
        if self.workdir is not None:
            self._checkpoints.close()
            self._best.close()

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints."""
        return [] if self.workdir is None else self._checkpoints.steps()

    def restore(
        self, expected: PyTree, shardings: PyTree, *, best: bool = False, step: int | None = None
    ) -> Restored | None:
        """The newest checkpoint, or the best one; None where there is none.

        Args:
          expected: the shapes of the state.
          shardings: those of its arrays.
          best: whether to restore the one in `best/`.
          step: that of `steps` to restore instead of the newest.
        """
        if self.workdir is None:
            return None
        found = (self._best if best else self._checkpoints).restore(expected, shardings, step)
        if jax.process_count() > 1:  # a damaged one may be readable to another process
            step = -1 if found is None else int(found.state.step)
            multihost_utils.assert_equal(np.int32(step), "the processes read different checkpoints")
        if best and found is not None and self._keep_best is not None:
            by = found.meta["keep_best"]
            if tuple(by) != self._keep_best:
                raise check.UserError(
                    f"best/ holds the best step by {by[0]} ({by[1]}), and keep_best asks for "
                    f"{self._keep_best}: no validation has been compared by that yet."
                )
        if found is not None or not best:
            self._rewind_to = 0 if found is None else int(found.state.step)
        return found

    def save_if_best(
        self, state: TrainState, meta: dict[str, Any], values: Mapping[str, float]
    ) -> None:
        """Saves the state in `best/` if the metric of `keep_best` has never been as good."""
        if self._keep_best is None:
            return
        name, mode = self._keep_best
        check.one_of("keep_best", name, values)
        if not math.isfinite(values[name]):
            return
        sign = 1.0 if mode == "max" else -1.0
        if sign * values[name] > sign * self._best_value(name, mode):
            step, found = int(state.step), {"values": dict(values), "keep_best": [name, mode]}
            # There may be one of this step, from before a rollback or by another metric.
            self._best.replace(step, state, meta | found)

    def _best_value(self, name: str, mode: str) -> float:
        """The metric's value of the checkpoint in `best/`; the worst value where there is none."""
        worst = -math.inf if mode == "max" else math.inf
        try:
            before = self._best.meta()
        except check.DataError as error:
            logger.warning("%s This validation is taken for the best so far.", error)
            return worst
        if before is None:
            return worst
        if (by := before["keep_best"]) != [name, mode]:
            logger.warning(
                "best/ holds the best step by %s (%s), %s; from here on it is that by %s (%s)",
                *(*by, self._best.latest_step(), name, mode),
            )
            return worst
        return float(before["values"][name])
