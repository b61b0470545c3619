"""How far a call of `train` goes."""

import logging
from typing import NamedTuple

import jax

from jdl.core import check
from jdl.train.feed import Data, steps_per_epoch

logger = logging.getLogger("jdl.train")


class Limits(NamedTuple):
    """The limits as `train` is given them: at most one of steps, and maybe a time.

    Attributes:
      steps: how many more steps.
      max_steps: steps in total.
      epochs: how many more passes over the data.
      seconds: how many more seconds on the training clock.
    """

    steps: int | None
    max_steps: int | None
    epochs: int | None
    seconds: float | None

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return any(limit is not None for limit in self)

    def check(self) -> None:
        """Refuses limits out of range, and that contradict each other."""
        of_steps = {"steps": self.steps, "max_steps": self.max_steps, "epochs": self.epochs}
        given = [name for name, value in of_steps.items() if value is not None]
        check.argument(len(given) <= 1, "steps, max_steps, epochs", "given one at a time", given)
        for name in given:
            check.positive_int(name, of_steps[name])
        if self.seconds is not None:
            check.in_range("seconds", self.seconds, 0.0, open_low=True)
            check.argument(
                jax.process_count() == 1,
                "seconds",
                "left out where several processes train together, whose clocks differ",
                self.seconds,
                "Give steps instead.",
            )

    def last_step(self, done: int, data: Data) -> int | None:
        """The number of the last step, `done` steps having been made; None for no limit."""
        if self.steps is not None:
            return done + self.steps
        if self.epochs is not None:
            return done + self.epochs * steps_per_epoch(data)
        return self.max_steps

    def tell_shortfall(self, step: int, last_step: int | None, began: int) -> None:
        """Warns of data that has ended before the limit.

        Args:
          step: the last that was made.
          last_step: as `last_step` told.
          began: the steps made before this call.
        """
        if not self.given or step == last_step:
            return
        limit = next(f"{k}={v}" for k, v in self._asdict().items() if v is not None)
        of = "" if last_step is None else f" of {last_step - began}"
        logger.warning(
            "the data ended before %s: %d%s steps were made. Only data sets of jdl.data are "
            "repeated by themselves; of a list, itertools.cycle(list) goes on.",
            limit,
            step - began,
            of,
        )
