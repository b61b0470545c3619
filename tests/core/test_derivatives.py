"""Products through `jax.custom_vjp` against the same nets without it, and what its rules say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from jax.interpreters import mlir

import jdl
from jdl.core import check
from jdl.core.derivatives import hvp, linearize


@jax.custom_vjp
def dense(x, w):
    return x @ w


dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


@jax.custom_vjp
def cosine(x):
    return jnp.cos(x)


sine.defvjp(lambda x: (sine(x), x), lambda x, g: (cosine(x) * g,))
cosine.defvjp(lambda x: (cosine(x), x), lambda x, g: (-sine(x) * g,))


@jax.custom_vjp
def rounded(w):
    return jnp.round(w)


rounded.defvjp(lambda w: (jnp.round(w), ()), lambda _, g: (g,))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, ()), lambda _, g: (jnp.clip(g, -0.01, 0.01),))


@jax.custom_vjp
def clipped_norm(x):
    return x


def _shorten(_, g):
    return (g * jnp.minimum(1.0, 0.01 / jnp.linalg.norm(g)),)


clipped_norm.defvjp(lambda x: (x, ()), _shorten)

opaque_p = jex.Primitive("opaque_backward")  # as a kernel of cuDNN: no derivative
opaque_p.def_abstract_eval(lambda x, g: x)
opaque_p.def_impl(lambda x, g: jnp.cos(x) * g)
mlir.register_lowering(
    opaque_p, mlir.lower_fun(lambda x, g: jnp.cos(x) * g, multiple_results=False)
)


@jax.custom_vjp
def opaque(x):
    return jnp.sin(x)


opaque.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (opaque_p.bind(x, g),))

CALLS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda f: lambda x, w: jax.lax.cond(w.sum() < 1e9, f, lambda x, w: x @ w, x, w),
    "scan": lambda f: lambda x, w: jax.lax.scan(lambda c, r: (c, f(r[None], w)[0]), 0.0, x)[1],
    "vmap": lambda f: lambda x, w: jax.vmap(lambda r: f(r[None], w)[0])(x),
}


def objective_of(net, **options):
    batch = {
        "x": jax.random.normal(jax.random.key(0), (8, 3)),
        "y": jax.random.normal(jax.random.key(1), (8, 2)),
    }

    def loss(outputs, batch):
        return jnp.sum((outputs - batch["y"]) ** 4, axis=-1)

    params = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((3, 4), (4, 2)), 2)]
    vector = [jax.random.normal(jax.random.key(i), w.shape) for i, w in enumerate(params, 4)]
    predict = lambda p, batch: net(p, batch["x"])  # noqa: E731
    return jdl.Objective.from_fns(predict, loss, batch, **options), params, vector


def plain_net(w, x):
    return jnp.sin(x @ w[0]) @ w[1]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("method", ["gnvp", "hvp", "efvp"])
def test_a_true_rule_gives_the_plain_nets_products(name, method):
    layer = CALLS[name](dense)
    with jax.enable_x64(True):
        net = lambda w, x: layer(sine(layer(x, w[0])), w[1])  # noqa: E731
        found, expected = (
            jax.jit(getattr(objective, method))(params, vector)
            for objective, params, vector in map(objective_of, (net, plain_net))
        )
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-9)


def test_products_are_of_the_same_matrix_with_microbatches_and_for_residuals():
    with jax.enable_x64(True):
        net = lambda w, x: dense(sine(dense(x, w[0])), w[1])  # noqa: E731
        (mine, params, vector), (theirs, *_) = (
            objective_of(f, microbatches=n) for f, n in ((net, 4), (plain_net, 1))
        )
        x = mine.batch["x"]
        for method, arguments in (("gnvp", ()), ("gram_product", (lambda p, b: net(p, b["x"]),))):
            found = getattr(mine, method)(*arguments, params, vector)
            of = (lambda p, b: plain_net(p, b["x"]),) if arguments else ()
            expected = getattr(theirs, method)(*of, params, vector)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9)
        found = linearize(lambda w: net(w, x), params)
        outputs, tangents = jax.jvp(lambda w: plain_net(w, x), (params,), (vector,))
        np.testing.assert_allclose(found[0], outputs, rtol=1e-12)
        np.testing.assert_allclose(found[1](vector), tangents, rtol=1e-9)


def test_a_straight_through_rounding_has_the_curvature_of_its_rule():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (5, 3))
        w, v = jax.random.normal(jax.random.key(1), (2, 3, 2))
        outputs, push, pull = linearize(lambda w: x @ rounded(w), w)
        np.testing.assert_allclose(outputs, x @ jnp.round(w), rtol=1e-12)
        np.testing.assert_allclose(push(v), x @ v, rtol=1e-12)
        np.testing.assert_allclose(pull(x @ v), x.T @ x @ v, rtol=1e-9)


@pytest.mark.parametrize("clip", [clipped, clipped_norm])
def test_a_rule_that_clips_counts_as_the_identity(clip):
    with jax.enable_x64(True):

        def centred(y):  # equal gradients of all outputs are nothing further back
            return y - y.mean(axis=-1, keepdims=True)

        def net(w, x):
            return centred(clip(jnp.sin(x @ w[0]) @ w[1]))

        def plain(w, x):
            return centred(plain_net(w, x))

        found, expected = (
            objective.gnvp(params, vector)
            for objective, params, vector in map(objective_of, (net, plain))
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_hessians_of_rules_that_use_rules_are_those_of_the_plain_function():
    x, v = jnp.array([0.3, 0.7]), jnp.array([1.0, -2.0])
    expected = -jnp.sin(x) * v
    np.testing.assert_allclose(hvp(lambda x: sine(x).sum(), x, v), expected, rtol=1e-5)
    rows = jax.jit(jax.vmap(lambda v: hvp(lambda x: sine(x).sum(), x, v)))(jnp.eye(2))
    np.testing.assert_allclose(rows, jnp.diag(-jnp.sin(x)), rtol=1e-5)


@pytest.mark.parametrize("method", ["gnvp", "hvp", "efvp"])
def test_a_rule_without_a_derivative_is_named_with_what_works(method):
    objective, params, vector = objective_of(lambda w, x: clipped(opaque(x @ w[0]) @ w[1]))
    with pytest.raises(check.ArgumentError) as raised:
        jax.jit(getattr(objective, method))(params, vector)
    message = str(raised.value)
    assert "opaque at " in message
    assert "clipped" not in message
    assert "opaque_backward" in message
    assert "adam, lbfgs, cg" in message


def test_errors_of_a_users_own_function_stay_as_they_are():
    def broken(x):
        raise KeyError("mine")

    for product in (lambda: linearize(broken, 1.0), lambda: hvp(broken, 1.0, 1.0)):
        with pytest.raises(KeyError, match="mine"):
            product()
