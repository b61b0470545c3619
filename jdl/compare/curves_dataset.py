"""CURVES: images of random smooth curves, generated from the description in the literature.

The papers' own files are not public, and the width of their pen is not described: errors on these
images are of the same size as in the papers, but not equal to the digit.
"""

from typing import Any

import numpy as np

SIDE, POINTS = 28, 60
LOW, HIGH, APART = 2.0, 26.0, 2.0


def curves(n: int, seed: int = 0) -> np.ndarray:
    """Images uint8 [n, 28, 28, 1] of one curve each, with six degrees of freedom.

    A curve is the natural cubic spline through three points with coordinates in [2, 26], each at
    least 2 to the right of the last. It is drawn at 60 points with bilinear weights, blurred twice
    and clipped at 1.

    Args:
      n: the number of images.
      seed: for the curves; a larger n has the same first images.

    >>> images = curves(3)
    >>> images.shape, bool((images.max(axis=(1, 2, 3)) > 100).all())
    ((3, 28, 28, 1), True)

    References:
      Hinton & Salakhutdinov, Reducing the dimensionality of data with neural networks (2006),
      supporting material; Martens, Deep learning via Hessian-free optimization (2010), section 6.
    """
    pieces = [_some(1000, [seed, i]) for i in range(-(-n // 1000))]
    return np.concatenate(pieces)[:n] if pieces else np.zeros((0, SIDE, SIDE, 1), np.uint8)


def spline(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Natural cubic splines through three points each, evaluated at `at`.

    Args:
      x: float[n, 3], ascending.
      y: float[n, 3].
      at: float[n, m], between x's first and last.

    >>> spline(np.array([[0.0, 1.0, 2.0]]), np.array([[0.0, 1.0, 2.0]]), np.array([[0.5]])).tolist()
    [[0.5]]
    """
    h, slope = np.diff(x), np.diff(y) / np.diff(x)
    # The second derivative at the middle point.
    curvature = 3.0 * (slope[:, 1] - slope[:, 0]) / (x[:, 2] - x[:, 0])
    right = at >= x[:, 1:2]

    def of_piece(values: np.ndarray) -> np.ndarray:
        return np.where(right, values[:, 1:2], values[:, 0:1])

    width, start, low, high = of_piece(h), of_piece(x), of_piece(y), of_piece(y[:, 1:])
    a, b = (np.where(c, curvature[:, None], 0.0) for c in (right, ~right))
    t = at - start
    first = (high - low) / width - width * (2 * a + b) / 6
    return low + t * (first + t * (a / 2 + t * (b - a) / (6 * width)))


def _some(n: int, seed: Any) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(LOW, HIGH - 2 * APART, (n, 3)), axis=1) + APART * np.arange(3)
    y = rng.uniform(LOW, HIGH, (n, 3))
    at = x[:, :1] + (x[:, 2:] - x[:, :1]) * np.linspace(0.0, 1.0, POINTS)
    ink = np.zeros((n, SIDE, SIDE))
    height = spline(x, y, at)
    rows, columns = np.floor(height).astype(int), np.floor(at).astype(int)
    for down in (0, 1):
        for across in (0, 1):
            weight = 1.0 - np.abs(height - rows - down)
            weight *= 1.0 - np.abs(at - columns - across)
            r, c = rows + down, columns + across
            inside = (r >= 0) & (r < SIDE) & (c >= 0) & (c < SIDE)  # a spline may leave the image
            which = np.broadcast_to(np.arange(n)[:, None], r.shape)[inside]
            np.add.at(ink, (which, r[inside], c[inside]), weight[inside])
    for _ in range(2):
        ink = _blurred(ink)
    return np.round(255.0 * np.minimum(ink, 1.0)).astype(np.uint8)[..., None]


def _blurred(x: np.ndarray) -> np.ndarray:
    """A blur with weights ¼ ½ ¼ along both axes."""
    for axis in (1, 2):
        wide = np.pad(x, [(0, 0)] + [(1, 1) if a == axis else (0, 0) for a in (1, 2)])
        cut = [np.take(wide, range(k, k + SIDE), axis=axis) for k in range(3)]
        x = 0.25 * cut[0] + 0.5 * cut[1] + 0.25 * cut[2]
    return x
