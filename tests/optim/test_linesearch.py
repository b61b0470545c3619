import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.optim.linesearch import backtracking, strong_wolfe
from jdl.optim.result import ResultCode


def search(f, x, d, **options):
    both = jax.value_and_grad(f)
    value, grad = both(x)
    return jax.jit(lambda: strong_wolfe(both, x, d, value, grad, **options))()


def phi_more_thuente_1(a):
    return -a / (a * a + 2.0)


def phi_more_thuente_2(a):
    return (a + 0.004) ** 5 - 2.0 * (a + 0.004) ** 4


def phi_more_thuente_4(a, b1=0.001, b2=0.001):
    def gamma(b):
        return (1.0 + b * b) ** 0.5 - b

    return gamma(b1) * jnp.sqrt((1.0 - a) ** 2 + b2**2) + gamma(b2) * jnp.sqrt(a**2 + b1**2)


@pytest.mark.parametrize("first", [1e-3, 1e-1, 1e1, 1e3])
@pytest.mark.parametrize(
    ("phi", "c1", "c2"),
    [
        (phi_more_thuente_1, 1e-3, 0.1),
        (phi_more_thuente_2, 1e-1, 0.1),
        (phi_more_thuente_4, 1e-3, 1e-3),
    ],
)
def test_more_thuente_functions_reach_the_strong_wolfe_conditions(phi, c1, c2, first):
    # The second has its minimum where float32 does not resolve the slopes it asks for.
    with jax.enable_x64(True):
        f = lambda x: phi(x[0])  # noqa: E731
        x, d = jnp.zeros(1), jnp.ones(1)
        found = search(f, x, d, initial_step=first, c1=c1, c2=c2, max_evaluations=25)
        assert int(found.termination) == ResultCode.ACCEPTED
        start = float(jax.grad(f)(x)[0])
        assert float(found.value) <= float(f(x)) + c1 * float(found.step) * start
        assert abs(float(found.slope)) <= -c2 * start
        assert int(found.evaluations) <= 18
        np.testing.assert_allclose(found.grad, jax.grad(f)(x + found.step * d), 1e-6, 1e-12)


def test_a_step_that_is_good_at_once_costs_one_evaluation():
    f = lambda x: jnp.sum(jnp.square(x))  # noqa: E731
    found = search(f, jnp.ones(3), -jnp.ones(3))
    assert (float(found.step), int(found.evaluations)) == (1.0, 1)


def test_in_the_noise_slopes_decide():
    # Around 1e6 a float32 resolves 1/16: the whole descent is invisible in values.
    f = lambda x: 1e6 + jnp.sum(jnp.square(x))  # noqa: E731
    x = jnp.array([0.1])
    found = search(f, x, -x, initial_step=0.01, noise=10 * 1.2e-7 * 1e6, c2=0.1)
    assert int(found.termination) == ResultCode.ACCEPTED
    assert float(found.step) == pytest.approx(1.0, abs=0.1)
    assert int(found.evaluations) <= 5


@pytest.mark.parametrize(
    ("f", "x", "d"),
    [
        (lambda x: jnp.sum(jnp.where(x > 2.99, x, jnp.nan)), 3.0, -3.0),  # NaN nearby
        (lambda x: jnp.sum(-jnp.log(1.0 - x) - 3.0 * x), 0.1, 1e3),  # NaN beyond a barrier
        (lambda x: jnp.sum(jnp.exp(jnp.square(x))), 3.0, -3e4),  # overflow
        (lambda x: jnp.sum(jnp.abs(x)), 3.0, -3.0),  # a kink
        (lambda x: jnp.sum(-x), 3.0, 3.0),  # no minimum at all
        (lambda x: jnp.sum(jnp.floor(x)) - 1e-3 * jnp.sum(x), 3.0, 1.0),  # gradient misleads
    ],
)
def test_hard_lines_end_within_the_budget_and_never_uphill(f, x, d):
    x, d = jnp.array([x]), jnp.array([d])
    found = search(f, x, d, max_evaluations=20)
    assert int(found.evaluations) <= 20
    assert bool(jnp.isfinite(found.step) & jnp.isfinite(found.value))
    assert float(found.value) <= float(f(x))


def test_no_descent_no_step():
    f = lambda x: jnp.sum(jnp.square(x))  # noqa: E731
    found = search(f, jnp.ones(1), jnp.ones(1))
    assert (float(found.step), int(found.evaluations)) == (0.0, 0)
    assert int(found.termination) == ResultCode.NO_DECREASE


def test_the_gradient_is_compiled_once():
    f = lambda x: jnp.sum(jnp.sin(x))  # noqa: E731
    both = jax.value_and_grad(f)
    x = jnp.ones(2)
    text = str(jax.make_jaxpr(lambda: strong_wolfe(both, x, -x, *both(x)))())
    assert text.count("cos") == 2  # the one handed over, and the one in the loop's body


def test_backtracking_takes_the_first_step_that_decreases_enough():
    f = lambda x: jnp.sum(jnp.square(x))  # noqa: E731
    x = jnp.array([1.0])
    d, slope = -4.0 * x, jnp.asarray(-8.0)
    found = backtracking(f, x, d, f(x), slope, shrink=0.5)
    assert (float(found.step), int(found.evaluations)) == (0.25, 3)
    known = backtracking(f, x, d, f(x), slope, first_value=f(x + d), shrink=0.5)
    assert (float(known.step), int(known.evaluations)) == (0.25, 2)


def test_backtracking_gives_up_in_time():
    f = lambda x: jnp.sum(x) * jnp.nan  # noqa: E731
    x = jnp.ones(1)
    found = backtracking(f, x, -x, jnp.asarray(1.0), jnp.asarray(-1.0), max_evaluations=7)
    assert (float(found.step), int(found.evaluations)) == (0.0, 7)
    assert float(found.value) == 1.0
