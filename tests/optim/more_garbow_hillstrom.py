"""The 35 problems of Moré, Garbow & Hillstrom, Testing unconstrained optimization software (1981).

f(x) = Σ rᵢ(x)². Each has its standard start and its published minimum; where the paper gives local
minima too, those are listed behind it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    name: str
    residuals: object  # x[n] -> r[m]
    start: tuple
    minima: tuple


def _i(count):
    return jnp.arange(1.0, count + 1.0)


def rosenbrock(x):
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x):
    a, b = x
    return jnp.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x):
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x):
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x):
    return jnp.array([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** _i(3))


def jennrich_sampson(x):
    i = _i(10)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


def helical_valley(x):
    theta = jnp.arctan2(x[1], x[0]) / (2 * jnp.pi)
    return jnp.stack([10 * (x[2] - 10 * theta), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]


def bard(x):
    u = _i(15)
    v = 16 - u
    return jnp.array(BARD) - (x[0] + u / (v * x[1] + jnp.minimum(u, v) * x[2]))


GAUSSIAN = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989]


def gaussian(x):
    t = (8 - _i(15)) / 2
    y = jnp.array(GAUSSIAN + GAUSSIAN[-2::-1])
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


MEYER = [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427]
MEYER += [3820, 3307, 2872]


def meyer(x):
    t = 45 + 5 * _i(16)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - jnp.array(MEYER, float)


def gulf(x):
    t = _i(99) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x):
    t = 0.1 * _i(10)
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def powell_singular(x):
    a, b, c, d = x
    return jnp.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def wood(x):
    a, b, c, d = x
    return jnp.stack(
        [
            10 * (b - a**2),
            1 - a,
            90**0.5 * (d - c**2),
            1 - c,
            10**0.5 * (b + d - 2),
            10**-0.5 * (b - d),
        ]
    )


KOWALIK = [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]


def kowalik_osborne(x):
    u = jnp.array([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])
    return jnp.array(KOWALIK) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x):
    t = _i(20) / 5
    return (x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


OSBORNE_1 = """.844 .908 .932 .936 .925 .908 .881 .850 .818 .784 .751 .718 .685 .658 .628 .603 .580
.558 .538 .522 .506 .490 .478 .467 .457 .448 .438 .431 .424 .420 .414 .411 .406"""


def osborne_1(x):
    t = 10 * (_i(33) - 1)
    y = jnp.array([float(s) for s in OSBORNE_1.split()])
    return y - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs_exp6(x):
    t = 0.1 * _i(13)
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    model = x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4])
    return model - y


OSBORNE_2 = """1.366 1.191 1.112 1.013 .991 .885 .831 .847 .786 .725 .746 .679 .608 .655 .616 .606
.602 .626 .651 .724 .649 .649 .694 .644 .624 .661 .612 .558 .533 .495 .500 .423 .395 .375 .372 .391
.396 .405 .428 .429 .523 .562 .607 .653 .672 .708 .633 .668 .645 .632 .591 .559 .597 .625 .739 .710
.729 .720 .636 .581 .428 .292 .162 .098 .054"""


def osborne_2(x):
    t = (_i(65) - 1) / 10
    y = jnp.array([float(s) for s in OSBORNE_2.split()])
    peaks = sum(x[1 + k] * jnp.exp(-((t - x[8 + k]) ** 2) * x[5 + k]) for k in range(3))
    return y - (x[0] * jnp.exp(-t * x[4]) + peaks)


def watson(x):
    n, t = len(x), _i(29) / 29
    j = jnp.arange(float(n))
    powers = t[:, None] ** j[None]
    slope = jnp.sum(j[None, 1:] * x[None, 1:] * powers[:, :-1], axis=1)
    inner = slope - jnp.sum(x[None] * powers, axis=1) ** 2 - 1
    return jnp.concatenate([inner, jnp.stack([x[0], x[1] - x[0] ** 2 - 1])])


def extended_rosenbrock(x):
    return jnp.concatenate([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


def extended_powell(x):
    a, b, c, d = x.reshape(-1, 4).T
    return jnp.concatenate([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def penalty_1(x):
    return jnp.append(1e-5**0.5 * (x - 1), jnp.sum(x**2) - 0.25)


def penalty_2(x):
    n, a = len(x), 1e-5**0.5
    e = jnp.exp(x / 10)
    i = _i(n)[1:]
    y = jnp.exp(i / 10) + jnp.exp((i - 1) / 10)
    last = jnp.sum((n - _i(n) + 1) * x**2) - 1
    return jnp.concatenate(
        [
            jnp.stack([x[0] - 0.2, last]),
            a * (e[1:] + e[:-1] - y),
            a * (e[1:] - jnp.exp(-0.1)),
        ]
    )


def variably_dimensioned(x):
    s = jnp.sum(_i(len(x)) * (x - 1))
    return jnp.append(x - 1, jnp.stack([s, s**2]))


def trigonometric(x):
    n = len(x)
    return n - jnp.sum(jnp.cos(x)) + _i(n) * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear(x):
    return jnp.append(x[:-1] + jnp.sum(x) - (len(x) + 1), jnp.prod(x) - 1)


def boundary_value(x):
    n = len(x)
    h = 1 / (n + 1)
    p = jnp.pad(x, 1)
    return 2 * x - p[:-2] - p[2:] + h**2 * (x + _i(n) * h + 1) ** 3 / 2


def integral_equation(x):
    n = len(x)
    h = 1 / (n + 1)
    t = _i(n) * h
    cube = (x + t + 1) ** 3
    below = jnp.cumsum(t * cube)
    above = jnp.sum((1 - t) * cube) - jnp.cumsum((1 - t) * cube)
    return x + h * ((1 - t) * below + t * above) / 2


def broyden_tridiagonal(x):
    p = jnp.pad(x, 1)
    return (3 - 2 * x) * x - p[:-2] - 2 * p[2:] + 1


def broyden_banded(x):
    n = len(x)
    i = np.arange(n)
    near = (i[None] >= i[:, None] - 5) & (i[None] <= i[:, None] + 1) & (i[None] != i[:, None])
    return x * (2 + 5 * x**2) + 1 - jnp.asarray(near, x.dtype) @ (x * (1 + x))


def linear_full_rank(x):
    m = 15
    mean = 2 * jnp.sum(x) / m
    return jnp.append(x - mean - 1, jnp.full(m - len(x), -mean - 1))


def linear_rank_1(x):
    return _i(15) * jnp.sum(_i(len(x)) * x) - 1


def linear_rank_1_with_zeros(x):
    m, s = 15, jnp.sum(_i(len(x))[1:-1] * x[1:-1])
    return jnp.concatenate([jnp.stack([-1.0 + 0 * s]), (_i(m)[1:-1] - 1) * s - 1, -1 + 0 * s[None]])


def chebyquad(x):
    n = len(x)
    z = 2 * x - 1
    t = [jnp.ones_like(z), z]
    for _ in range(n - 1):
        t.append(2 * z * t[-1] - t[-2])
    i = np.arange(1, n + 1)
    integral = np.where(i % 2 == 0, -1 / np.where(i == 1, np.inf, i.astype(float) ** 2 - 1), 0)
    return jnp.stack([jnp.mean(t[k]) for k in i]) - jnp.asarray(integral, x.dtype)


def _grid(n):
    return tuple(j * (j - n - 1) / (n + 1) ** 2 for j in range(1, n + 1))


PROBLEMS = (
    Problem("rosenbrock", rosenbrock, (-1.2, 1), (0,)),
    Problem("freudenstein_roth", freudenstein_roth, (0.5, -2), (0, 48.9842)),
    Problem("powell_badly_scaled", powell_badly_scaled, (0, 1), (0,)),
    Problem("brown_badly_scaled", brown_badly_scaled, (1, 1), (0,)),
    Problem("beale", beale, (1, 1), (0,)),
    Problem("jennrich_sampson", jennrich_sampson, (0.3, 0.4), (124.362,)),
    Problem("helical_valley", helical_valley, (-1, 0, 0), (0,)),
    Problem("bard", bard, (1, 1, 1), (8.21487e-3, 17.4286)),
    Problem("gaussian", gaussian, (0.4, 1, 0), (1.12793e-8,)),
    Problem("meyer", meyer, (0.02, 4000, 250), (87.9458,)),
    Problem("gulf", gulf, (5, 2.5, 0.15), (0,)),
    Problem("box", box, (0, 10, 20), (0,)),
    Problem("powell_singular", powell_singular, (3, -1, 0, 1), (0,)),
    Problem("wood", wood, (-3, -1, -3, -1), (0,)),
    Problem(
        "kowalik_osborne", kowalik_osborne, (0.25, 0.39, 0.415, 0.39), (3.07505e-4, 1.02734e-3)
    ),
    Problem("brown_dennis", brown_dennis, (25, 5, -5, -1), (85822.2,)),
    Problem("osborne_1", osborne_1, (0.5, 1.5, -1, 0.01, 0.02), (5.46489e-5,)),
    Problem("biggs_exp6", biggs_exp6, (1, 2, 1, 1, 1, 1), (0, 5.65565e-3)),
    Problem(
        "osborne_2", osborne_2, (1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), (4.01377e-2,)
    ),
    Problem("watson", watson, (0,) * 6, (2.28767e-3,)),
    Problem("extended_rosenbrock", extended_rosenbrock, (-1.2, 1) * 5, (0,)),
    Problem("extended_powell", extended_powell, (3, -1, 0, 1) * 2, (0,)),
    Problem("penalty_1", penalty_1, (1, 2, 3, 4), (2.24997e-5,)),
    Problem("penalty_2", penalty_2, (0.5,) * 4, (9.37629e-6,)),
    Problem(
        "variably_dimensioned", variably_dimensioned, tuple(1 - j / 10 for j in range(1, 11)), (0,)
    ),
    Problem("trigonometric", trigonometric, (0.1,) * 10, (0, 2.79506e-5)),
    Problem("brown_almost_linear", brown_almost_linear, (0.5,) * 10, (0, 1)),
    Problem("boundary_value", boundary_value, _grid(10), (0,)),
    Problem("integral_equation", integral_equation, _grid(10), (0,)),
    Problem("broyden_tridiagonal", broyden_tridiagonal, (-1,) * 10, (0,)),
    Problem("broyden_banded", broyden_banded, (-1,) * 10, (0,)),
    Problem("linear_full_rank", linear_full_rank, (1,) * 10, (5,)),
    Problem("linear_rank_1", linear_rank_1, (1,) * 10, (15 * 14 / (2 * 31),)),
    Problem(
        "linear_rank_1_with_zeros",
        linear_rank_1_with_zeros,
        (1,) * 10,
        ((225 + 45 - 6) / (2 * 27),),
    ),
    Problem("chebyquad", chebyquad, tuple(j / 9 for j in range(1, 9)), (3.51687e-3,)),
)
