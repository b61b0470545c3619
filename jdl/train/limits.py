"""How far a call of `train` goes."""

from typing import NamedTuple

import jax

from jdl.core import check
from jdl.train.feed import Data, batches_per_epoch


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

    def check(self, *, endless: bool) -> None:
        """Refuses limits out of range, that contradict each other, and none for endless data.

        Args:
          endless: whether the data has no end of its own.
        """
        check.argument(
            self.given or not endless,
            "steps",
            "given for data without an end (epochs=None)",
            None,
            "Or give max_steps, epochs or seconds.",
        )
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
            return done + self.epochs * batches_per_epoch(data)
        return self.max_steps
