"""The evaluator of jaxprs against `jax.jit` on every kind of call, and who uses JAX's insides."""

import re
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jdl
from jdl.core import jaxpr
from jdl.core.jaxpr import Evaluator
from jdl.optim.kronecker import layers
from tests.core.rules import rounded, safe_root


@jax.custom_jvp
def straight(x):
    return jnp.round(x) + jnp.tanh(x)


straight.defjvp(lambda primals, tangents: (straight(*primals), 3.0 * tangents[0]))


@jax.custom_vjp
def reversed_gradient(x):
    return jnp.sin(x)


reversed_gradient.defvjp(lambda x: (jnp.sin(x), ()), lambda _, g: (-g,))


def scanned(x, inner=jnp.sin, **options):
    """A constant, a carry that stays as it is, one that moves, a slice and an output."""
    scale = jnp.cos(x)

    def step(carry, row):
        fixed, y = carry
        y = inner(y * scale + row) + fixed
        return (fixed, y), y - row

    rows = jnp.arange(12.0).reshape(4, 3) / 7 * x[None]
    (fixed, y), ys = jax.lax.scan(step, (x, jnp.ones(3)), rows, **options)
    return fixed + y + ys.sum(axis=0)


def looped(x, inner=jnp.sin):
    def more(carry):
        return jnp.logical_and(carry[0] < 4, x.sum() < 1e6)

    return jax.lax.while_loop(more, lambda c: (c[0] + 1, inner(c[1]) + x), (0, x))[1]


def chosen(x, inner=jnp.sin):
    return jax.lax.cond(x.sum() > 0, inner, lambda x: jnp.cos(x) - 1, x)


def switched(x, inner=jnp.sin):
    index = (jnp.abs(x.sum()) * 10).astype(jnp.int32) % 3
    return jax.lax.switch(index, [inner, jnp.cos, lambda x: x * 2], x)


KINDS = {
    "jit": lambda inner: jax.jit(lambda x: inner(x) + 1),
    "remat": lambda inner: jax.checkpoint(lambda x: jnp.exp(inner(x) / 10)),
    "policy": lambda inner: jax.checkpoint(
        inner, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    ),
    "scan": lambda inner: partial(scanned, inner=inner),
    "reverse": lambda inner: partial(scanned, inner=inner, reverse=True, unroll=2),
    "cond": lambda inner: partial(chosen, inner=inner),
    "switch": lambda inner: partial(switched, inner=inner),
    "while": lambda inner: partial(looped, inner=inner),
    "custom_jvp": lambda inner: lambda x: straight(inner(x)),
    "custom_vjp": lambda inner: lambda x: reversed_gradient(inner(x)),
    "vmap": lambda inner: lambda x: jax.vmap(inner)(jnp.stack([x, 2 * x])).sum(axis=0),
    "gradient": lambda inner: jax.grad(lambda x: scanned(straight(x)).sum() + inner(x).sum() * 0),
    "map": lambda inner: lambda x: jax.lax.map(inner, jnp.stack([x, -x])).sum(axis=0),
}


def seen_by_an_evaluator(f, x):
    """Its outputs, and how often it met each primitive, loops run through."""
    program = jax.make_jaxpr(f)(x)
    met = {}

    def visit(site, inputs, state):
        met[site.place] = site

    (y,) = jax.jit(lambda x: Evaluator(visit, custom=True).run(program, [x])[0])(x)
    count = Counter()
    for site in met.values():
        count[site.name] += site.times
    return y, count


@settings(max_examples=6, deadline=None)
@given(
    names=st.lists(st.sampled_from([k for k in KINDS if k != "gradient"]), min_size=1, max_size=3),
    x=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
)
def test_calls_in_calls_give_what_jit_gives(names, x):
    f = jnp.sin
    for name in names:
        f = KINDS[name](f)
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(seen_by_an_evaluator(f, x)[0], jax.jit(f)(x))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_call_is_looked_into(name):
    x = jnp.array([0.3, -0.2, 0.7])
    f = KINDS[name](jnp.arctan)
    y, met = seen_by_an_evaluator(f, x)
    np.testing.assert_array_equal(y, jax.jit(f)(x))
    assert met["atan"] == {"scan": 4, "reverse": 4, "map": 2}.get(name, 1)


@jax.custom_vjp
def clipped(x):
    return x * 1.0


clipped.defvjp(lambda x: (x * 1.0, ()), lambda _, g: (jnp.clip(g, -0.01, 0.01),))


@pytest.mark.parametrize("rule", [rounded, safe_root, clipped, reversed_gradient])
@pytest.mark.parametrize("name", [k for k in KINDS if k not in ("gradient", "while")])
def test_an_evaluated_program_keeps_its_rules_for_derivatives(name, rule):
    x = jnp.array([0.3, 0.0, 0.7])
    f = KINDS[name](lambda x: rule(jnp.abs(x)))
    program = jax.make_jaxpr(f)(x)

    def evaluated(x):
        return Evaluator(lambda site, inputs, state: None).run(program, [x])[0][0].sum()

    found, expected = (jax.jit(jax.grad(g))(x) for g in (evaluated, lambda x: f(x).sum()))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if rule is rounded and name == "jit":
        np.testing.assert_array_equal(found, 1.0)


def test_a_while_loop_with_a_condition_for_each_example_gives_what_jit_gives():
    def until(x):
        return jax.lax.while_loop(lambda y: y < 5, lambda y: y * 2 + 1, x)

    x = jnp.array([0.3, 2.0, 7.0])
    np.testing.assert_array_equal(seen_by_an_evaluator(jax.vmap(until), x)[0], jax.vmap(until)(x))


def test_outputs_are_replaced_and_state_goes_through_loops_and_branches():
    def f(x):
        return jax.checkpoint(lambda x: chosen(looped(scanned(x, jnp.arctan)), jnp.arctan))(x)

    def count(site, inputs, n):
        return ([jnp.sin(inputs[0])], n + 1) if site.name == "atan" else None

    def g(x):
        return chosen(looped(scanned(x)))

    x = jnp.array([0.3, -0.2, 0.7])
    program = jax.make_jaxpr(f)(x)
    (y,), n = jax.jit(lambda x: Evaluator(count).run(program, [x], jnp.int32(0)))(x)
    np.testing.assert_array_equal(y, jax.jit(g)(x))
    assert n == 4 + bool(looped(scanned(x)).sum() > 0)
    kept = jax.make_jaxpr(lambda x: Evaluator(count).run(program, [x], 0))(x)
    assert {eqn.primitive.name for eqn in kept.jaxpr.eqns} & {"remat", "remat2", "checkpoint"}


def test_scans_are_read_alike_by_every_release():
    def f(x, y):
        return jax.lax.scan(lambda c, r: ((c[0], c[1] * r + y), c[1]), (x, x), jnp.arange(5.0))

    (eqn,) = [eqn for eqn in jax.make_jaxpr(f)(1.0, 2.0).jaxpr.eqns if eqn.primitive.name == "scan"]
    assert jaxpr.scan_groups(eqn) == (2, 3)  # a carry that stays as it is has become a constant
    ((_, length),) = jaxpr.scans(jax.make_jaxpr(jax.jit(f))(1.0, 2.0))
    assert length == 5


# ------------------------------------------------------------------ what K-FAC follows


def found_in(predict, **params):
    found = layers.find(predict, params)
    names = sorted(params)
    known = {
        names[i]: (None if layer.bias is None else names[layer.bias], layer.rows)
        for i, layer in found.known.items()
    }
    return known, {names[i]: why for i, why in found.unknown.items()}


def test_a_rule_for_the_derivative_is_not_replaced_by_that_of_the_body():
    x, w = jnp.ones((5, 3)), jnp.ones((3, 2))

    @jax.custom_jvp
    def scaled(y, scale):
        return y @ scale

    scaled.defjvp(lambda p, t: (scaled(*p), 7.0 * (t[0] @ p[1] + p[0] @ t[1])))
    known, unknown = found_in(lambda p: scaled(x @ p["w"], p["scale"]), w=w, scale=jnp.ones((2, 2)))
    assert known == {"w": (None, 5)}
    assert unknown == {"scale": "used by custom_jvp_call"}


def test_a_bias_after_rematerialization_joins_its_kernel():
    x = jnp.ones((5, 3))
    known, unknown = found_in(
        lambda p: jax.checkpoint(jnp.dot)(x, p["w"]) + p["b"][None],
        w=jnp.ones((3, 2)),
        b=jnp.ones(2),
    )
    assert known == {"w": ("b", 5)}
    assert unknown == {}


def test_a_kernel_that_a_branch_hands_on_has_uses_nobody_knows():
    x = jnp.ones((5, 3))

    def predict(p):
        w = jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: 2.0 * p["v"])
        return x @ p["w"] + x @ w

    known, unknown = found_in(predict, w=jnp.ones((3, 2)), v=jnp.ones((3, 2)))
    assert known == {}
    assert unknown["w"] == "carried by a loop, or returned by a branch"


# ------------------------------------------------------------------ JAX's insides

INSIDES = {  # what is no public name of `jax` itself, by file
    "jax._src": {"train/distributed.py", "train/parallel.py"},
    "jax.extend": {"core/jaxpr.py", "optim/kronecker/tags.py", "models/convolution.py"},
    "jax.interpreters": {"optim/kronecker/tags.py", "models/convolution.py"},
}


@pytest.mark.parametrize("module", INSIDES)
def test_insides_of_jax_are_used_in_few_files(module):
    root = Path(jdl.__file__).parent
    pattern = re.compile(rf"^\s*(from|import) {re.escape(module)}\b", re.MULTILINE)
    using = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert using == INSIDES[module]
