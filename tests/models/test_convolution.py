import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.models.convolution import conv_general_dilated

NUMBERS = ("NHWC", "HWIO", "NHWC")
PADDINGS = ["SAME", "VALID", ((1, 0), (2, 1))]


@pytest.fixture
def arrays():
    key, other = jax.random.split(jax.random.key(0))
    return jax.random.normal(key, (3, 6, 7, 2)), jax.random.normal(other, (4, 3, 2, 5))


def energy(conv, padding):
    def f(x, kernel):
        return jnp.sum(jnp.tanh(conv(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS)) ** 2)

    return f


@pytest.mark.parametrize("padding", PADDINGS)
def test_derivatives_of_every_order_equal_jax_own(arrays, padding):
    def orders(f):
        grad = jax.grad(f, (0, 1))
        squared = lambda *a: sum(jnp.sum(g * g) for g in grad(*a))  # noqa: E731
        return f(*arrays), grad(*arrays), jax.jvp(grad, arrays, arrays), jax.grad(squared)(*arrays)

    ours = orders(energy(conv_general_dilated, padding))
    theirs = orders(energy(jax.lax.conv_general_dilated, padding))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_mapped_over_examples(arrays, axes):
    stacked = [
        jnp.stack([a, 2 * a]) if axis == 0 else a for a, axis in zip(arrays, axes, strict=True)
    ]
    ours = jax.vmap(jax.grad(energy(conv_general_dilated, "SAME"), 1), axes)(*stacked)
    theirs = jax.vmap(jax.grad(energy(jax.lax.conv_general_dilated, "SAME"), 1), axes)(*stacked)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_convolution_of_a_gradient_is_canonical(arrays):
    """What is not stays slow in loops: the compiler mends its order only outside of them."""
    grad = jax.grad(energy(conv_general_dilated, "SAME"), (0, 1))
    text = jax.jit(grad).lower(*arrays).as_text()
    found = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(found) == 3
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in found)


@pytest.mark.parametrize(
    "options", [{"window_strides": (2, 2)}, {"rhs_dilation": (2, 2)}, {"feature_group_count": 2}]
)
def test_other_convolutions_go_jax_own_way(arrays, options):
    x, kernel = arrays
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NUMBERS} | options
    if "feature_group_count" in options:
        kernel = kernel[:, :, :1, :4]
    expected = jax.lax.conv_general_dilated(x, kernel, **options)
    strides, padding = options.pop("window_strides"), options.pop("padding")
    found = conv_general_dilated(x, kernel, strides, padding, **options)
    np.testing.assert_array_equal(found, expected)
