r"""How far the loss rises within a small distance of the parameters.

    sharpness = max over ‖δ‖ ≤ ρ of f(θ + δ) − f(θ)

found by projected gradient ascent from the gradient's direction or a given one. Like any ascent, it
gives a lower bound of the maximum.
"""

from typing import NamedTuple

import numpy as np

from jdl.core import check
from jdl.curvature.landscape import Landscape


class Sharpness(NamedTuple):
    """The rise of a loss near given parameters.

    Attributes:
      rise: the largest found.
      first_step: that of δ = ρ ∇f / ‖∇f‖, which SAM uses.
    """

    rise: float
    first_step: float


def sharpness(
    landscape: Landscape, *, rho: float = 0.05, steps: int = 5, direction: np.ndarray | None = None
) -> Sharpness:
    """The largest rise found within ‖δ‖ ≤ ρ.

    Args:
      landscape: the loss and the parameters.
      rho: ρ > 0, in the parameters' units.
      steps: number of ascent steps, ≥ 1.
      direction: a vector [n] to try first, in both directions, such as the top eigenvector.

    >>> import jax.numpy as jnp
    >>> from jdl.core.objective import Objective
    >>> loss = lambda outputs, batch: (outputs - batch["x"][:, 0] - 1.0) ** 2
    >>> make = lambda batch: Objective.from_fns(lambda w, batch: batch["x"] @ w, loss, batch)
    >>> x = np.random.default_rng(0).normal(size=(8, 16, 2)).astype(np.float32)
    >>> landscape = Landscape(make, [{"x": each} for each in x], jnp.zeros(2))
    >>> found = sharpness(landscape, rho=0.1)
    >>> found.rise >= found.first_step > 0
    True

    References:
      Foret et al., Sharpness-aware minimization (2021), section 2.
      Keskar et al., On large-batch training for deep learning (2017), section 2.2.2.
    """
    check.in_range("rho", rho, 0.0, open_low=True)
    check.positive_int("steps", steps)
    value, start = landscape.value(), landscape.gradient()

    def rise_at(delta: np.ndarray) -> float:
        return landscape.value(landscape.unravel(landscape.flat + delta)) - value

    def on_sphere(v: np.ndarray) -> np.ndarray:
        length = float(np.linalg.norm(v))
        return (rho / length) * v if length > 0 else v

    tried = [on_sphere(start)]
    if direction is not None:
        both = on_sphere(np.asarray(direction, start.dtype))
        tried += [both, -both]
    rises = [rise_at(delta) for delta in tried]
    best = int(np.argmax(rises))
    delta, rise = tried[best], rises[best]
    for _ in range(steps):
        gradient = landscape.gradient(landscape.unravel(landscape.flat + delta))
        # On the sphere the gradient's direction maximizes the linear model.
        new = on_sphere(gradient)
        new_rise = rise_at(new)
        if not new_rise > rise:
            break
        delta, rise = new, new_rise
    return Sharpness(max(rise, 0.0), rises[0])
