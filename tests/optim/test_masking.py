"""Part of the parameters, and functions of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.optim import lbfgs
from jdl.optim.masking import Part, restricted

OUT = optax.MaskedNode()
WHOLE = {"a": {"x": jnp.ones(2), "y": jnp.ones(3)}, "b": 2 * jnp.ones(1), "c": [jnp.ones(1)] * 2}
SOME = {"a": OUT, "b": jnp.zeros(1), "c": [OUT, jnp.zeros(1)]}


def test_masked_nodes_cover_leaves_and_branches():
    part = Part(SOME, WHOLE)
    assert jax.tree.structure(part.of(WHOLE)) == jax.tree.structure(SOME)
    filled = part.filled(jax.tree.map(lambda x: x + 7.0, SOME))
    assert jax.tree.structure(filled) == jax.tree.structure(WHOLE)
    assert [float(x[0]) for x in jax.tree.leaves(filled)] == [1.0, 1.0, 7.0, 1.0, 7.0]


@pytest.mark.parametrize(
    "part",
    [
        {"a": jnp.ones(2), "b": OUT, "c": [OUT, OUT]},
        {"a": OUT, "b": OUT},
        {"a": OUT, "b": OUT, "c": [OUT]},
    ],
    ids=["an array for a branch", "no branch", "another length"],
)
def test_what_is_no_part_of_the_whole_is_refused(part):
    with pytest.raises(ArgumentError, match="`whole_params`"):
        Part(part, WHOLE)


def test_a_restricted_objective_has_the_parts_gradient_and_block():
    def predict(p, batch):
        return jnp.tanh(batch["x"] @ p["w"]) * p["s"]

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
        whole = {"w": jnp.asarray([0.5, -1.0, 2.0]), "s": jnp.asarray(1.5)}
        objective = Objective.from_fns(
            predict,
            lambda z, b: 0.5 * z**2,
            {"x": x},
            regularizer=lambda p: jnp.sum(p["w"] ** 2) * p["s"],
        )
        part = Part({"w": whole["w"], "s": OUT}, whole)
        mine = restricted(objective, part)
        params, v = part.of(whole), {"w": jnp.asarray([1.0, 2.0, -1.0]), "s": OUT}
        among_zeros = {"w": v["w"], "s": jnp.zeros(())}
        for name in ("gnvp", "hvp", "efvp"):
            want = getattr(objective, name)(whole, among_zeros)["w"]
            got = getattr(mine, name)(params, v)["w"]
            np.testing.assert_allclose(got, want, rtol=1e-12)
        value, grad, _ = mine.value_and_grad(params)
        np.testing.assert_allclose(value, objective.value(whole), rtol=1e-12)
        np.testing.assert_allclose(grad["w"], objective.grad(whole)["w"], rtol=1e-12)


def test_optax_flatten_makes_one_array_of_the_parameters():
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}

    def f(p):
        return jnp.sum(jnp.square(p["a"] - 2.0)) + jnp.sum(jnp.square(p["b"]))

    steps = []
    for optimizer in (lbfgs(), optax.flatten(lbfgs())):
        p, state = params, optimizer.init(params)
        for _ in range(3):
            value, grad = jax.value_and_grad(f)(p)
            updates, state = optimizer.update(grad, state, p, value=value, grad=grad, value_fn=f)
            p = optax.apply_updates(p, updates)
        steps.append(p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *steps)
