"""A loss that is not finite: where it came from, and the way back."""

import logging

import jax.numpy as jnp
import optax

from jdl.core import check
from jdl.train.clock import Finished
from jdl.train.feed import Data, Feed, record_names
from jdl.train.run import Run
from jdl.train.run_directory import NonFiniteError

logger = logging.getLogger("jdl.train")


def error(run: Run, data: Data, finished: Finished) -> NonFiniteError:
    """What to raise about the first such step; names the records it was made of in the log."""
    run.keeper.close()  # what is being written counts
    kept = run.keeper.latest_step()
    assert finished.nonfinite is not None
    step, loss = finished.nonfinite
    names = record_names(data, dict(run.trail).get(step - 1))
    if names:
        logger.warning("the records of step %d: %s", step, ", ".join(names))
    return NonFiniteError(
        f"The loss is {loss} at step {step}. "
        + ("" if kept is None else f"The checkpoint of step {kept} is intact. ")
        + "Try a smaller learning rate, and see that the labels are class numbers "
        "below the model's number of outputs."
    )


def roll_back(run: Run, feed: Feed, error: NonFiniteError, last_rate: float) -> float:
    """Takes up the last checkpoint again, with half the learning rate or half of the last half.

    Args:
      run: where the training stands.
      feed: of the data.
      error: raised again where there is no checkpoint.
      last_rate: the learning rate of the last such way back; infinity before the first.

    Returns:
      The learning rate.

    Raises:
      TrainingError: the optimizer's state holds no learning rate.
    """
    batch = feed.prefetch()
    if batch is None or not run.restore(run.placement.whole_batch(batch)):
        raise error
    state = run.current()
    rate = optax.tree.get(state.opt_state, "learning_rate", None)
    if rate is None:
        raise check.TrainingError(
            f"{error} There is no learning rate in the optimizer's state to make smaller: take "
            "the optimizer by name, or wrap it in optax.inject_hyperparams."
        ) from error
    smaller = min(float(rate), last_rate) / 2
    opt_state = optax.tree.set(
        state.opt_state, learning_rate=jnp.full(rate.shape, smaller, rate.dtype)
    )
    run.state = run.placement.put_state(state._replace(opt_state=opt_state))
    logger.warning("%s Back to step %d, learning rate %g.", error, run.step, smaller)
    return smaller
