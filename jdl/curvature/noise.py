r"""The gradient noise scale: the batch size at which noise and gradient have equal norms.

    B_noise = tr Σ / |G|²

with G the gradient of the whole data and Σ the covariance of one example's gradient. Batches much
smaller waste steps, batches much larger waste examples. From the gradients g_b of K batches of B
examples and their mean Ḡ:

    |G|² ≈ (K |Ḡ|² − mean |g_b|²) / (K − 1)        tr Σ ≈ B (mean |g_b|² − |Ḡ|²) K / (K − 1)
"""

from typing import NamedTuple

import numpy as np

from jdl.core import check
from jdl.curvature.landscape import Landscape


class NoiseScale(NamedTuple):
    """The gradient noise scale of a data set at given parameters.

    Attributes:
      value: B_noise in examples; inf where the gradient is not distinguishable from zero.
      low: the value with 1 / B_noise one standard error higher, by the jackknife over batches.
      high: the value with 1 / B_noise one standard error lower; inf where that is not positive.
      gradient: |G|², an unbiased estimate, which may be negative.
      variance: tr Σ.
      batches: K.
      batch_size: B.
    """

    value: float
    low: float
    high: float
    gradient: float
    variance: float
    batches: int
    batch_size: float


def noise_scale(landscape: Landscape) -> NoiseScale:
    """The noise scale from at least 3 batches of one size; a smaller last one is left out.

    Args:
      landscape: the loss and the parameters.

    >>> import jax.numpy as jnp
    >>> from jdl.core.objective import Objective
    >>> loss = lambda outputs, batch: (outputs - batch["x"][:, 0] - 1.0) ** 2
    >>> make = lambda batch: Objective.from_fns(lambda w, batch: batch["x"] @ w, loss, batch)
    >>> x = np.random.default_rng(0).normal(size=(8, 16, 2)).astype(np.float32)
    >>> landscape = Landscape(make, [{"x": each} for each in x], jnp.zeros(2))
    >>> found = noise_scale(landscape)
    >>> found.batches, found.batch_size, found.low < found.value < found.high
    (8, 16.0, True)

    References:
      McCandlish et al., An empirical model of large-batch training (2018), section 2.2, appendix A.
    """
    first: float | None = None
    total = np.zeros(landscape.size)
    lengths: list[float] = []
    used: list[bool] = []
    for gradient, examples in landscape.gradients():
        first = examples if first is None else first
        used.append(examples == first)
        if used[-1]:
            total += gradient
            lengths.append(float(np.vdot(gradient.astype(np.float64), gradient)))
    k = len(lengths)
    hint = "Use smaller batches, or more data."
    check.argument(k >= 3, "landscape", "of at least 3 batches of one size", k, hint)
    along = [
        float(np.vdot(total, g.astype(np.float64))) / k
        for (g, _), use in zip(landscape.gradients(), used, strict=True)
        if use
    ]
    size = float(first or 0.0)
    whole = float(np.vdot(total, total)) / k**2
    square, variance = _unbiased(sum(lengths) / k, whole, k, size)
    inverses = []
    for length, inner in zip(lengths, along, strict=True):  # without this batch
        rest = (k * k * whole - 2 * k * inner + length) / (k - 1) ** 2
        g2, noise = _unbiased((sum(lengths) - length) / (k - 1), rest, k - 1, size)
        inverses.append(g2 / noise if noise > 0 else np.inf)
    # 1 / B_noise stays finite where |G|² is near zero.
    inverse = square / variance if variance > 0 else np.inf
    spread = float(np.sqrt((k - 1) * np.var(inverses)))
    ends = (inverse + spread, inverse, inverse - spread)
    low, value, high = (1.0 / x if x > 0 else np.inf for x in ends)
    return NoiseScale(value, low, high, square, variance, k, size)


def _unbiased(mean_square: float, whole: float, k: int, size: float) -> tuple[float, float]:
    """|G|² and tr Σ from the batches' mean |g_b|² and the |Ḡ|² of them all."""
    return (k * whole - mean_square) / (k - 1), size * (mean_square - whole) * k / (k - 1)
