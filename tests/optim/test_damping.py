import jax
import jax.numpy as jnp
import pytest

from jdl.optim.damping import reduction_ratio, trust_radius, update_damping


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(0.9, 2 / 3), (0.5, 1.0), (0.1, 1.5), (-3.0, 1.5), (-jnp.inf, 1.5), (jnp.nan, 1.5)],
)
def test_damping_follows_the_ratio(ratio, factor):
    assert float(update_damping(jnp.asarray(3.0), jnp.asarray(ratio))) == pytest.approx(
        3.0 * factor
    )


def test_damping_keeps_within_its_limits():
    low = update_damping(jnp.asarray(1e-3), jnp.asarray(1.0), minimum=1e-3)
    high = update_damping(jnp.asarray(1e3), jnp.asarray(-1.0), maximum=1e3)
    assert (float(low), float(high)) == (pytest.approx(1e-3), pytest.approx(1e3))


@pytest.mark.parametrize(
    ("old", "new", "model", "noise", "expected"),
    [
        (3.0, 1.0, -4.0, 0.0, 0.5),
        (3.0, 4.0, -1.0, 0.0, -1.0),
        (3.0, jnp.nan, -1.0, 0.0, -jnp.inf),
        (3.0, jnp.inf, -1.0, 0.0, -jnp.inf),
        (3.0, 1.0, 0.5, 0.0, -jnp.inf),  # a rise was predicted
        (3.0, 3.00001, -1e-5, 1e-4, 1.0),  # both lost in rounding
        (3.0, 3.00001, -1.0, 1e-4, -1e-5),  # a real prediction that failed
    ],
)
def test_reduction_ratio(old, new, model, noise, expected):
    with jax.enable_x64(True):
        found = reduction_ratio(jnp.asarray(old), jnp.asarray(new), jnp.asarray(model), noise)
        assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("ratio", "edge", "expected"),
    [
        (0.9, True, 2.0),
        (0.9, False, 1.0),
        (0.5, True, 1.0),
        (0.1, True, 0.25),
        (jnp.nan, True, 0.25),
    ],
)
def test_trust_radius(ratio, edge, expected):
    found = trust_radius(jnp.asarray(1.0), jnp.asarray(ratio), jnp.asarray(edge))
    assert float(found) == pytest.approx(expected)
