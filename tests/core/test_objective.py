"""Objective against finite differences in float64, dense matrices, and itself cut in pieces."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jdl
from jdl import losses
from jdl.core import check, tree
from jdl.core.objective import Objective


class Net(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Dense(5)(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(3)(x)


def make(rate=0.0, loss=losses.softmax_cross_entropy, dtype=jnp.float32, **options):
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(12, 4)), dtype),
        "label": jnp.asarray(rng.integers(0, 3, size=12), jnp.int32),
    }
    model = jdl.from_linen(Net(rate))
    params, state = model.init(jax.random.key(0), batch["image"].astype(jnp.float32))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return params, Objective(model, loss, state, batch, key=jax.random.key(1), **options)


def direction(params):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_gradient_and_hessian_product_against_finite_differences(rate):
    with jax.enable_x64(True):
        params, objective = make(rate, dtype=jnp.float64, regularizer=lambda p: tree.vdot(p, p))
        v, h = direction(params), 1e-5
        ahead, behind = tree.add_scaled(params, h, v), tree.add_scaled(params, -h, v)
        slope = (objective.value(ahead) - objective.value(behind)) / (2 * h)
        np.testing.assert_allclose(tree.vdot(objective.grad(params), v), slope, rtol=1e-7)
        numeric = jax.tree.map(
            lambda a, b: (a - b) / (2 * h), objective.grad(ahead), objective.grad(behind)
        )
        exact = objective.hvp(params, v)
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(numeric), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_gauss_newton_product_against_the_dense_matrix():
    params, objective = make()
    flat, unravel = ravel_pytree(params)
    batch = objective.batch

    def outputs(flat):
        return objective.model.apply(unravel(flat), {}, batch["image"])[0]

    J = jax.jacobian(outputs)(flat)  # [B, K, P]
    p = jax.nn.softmax(outputs(flat))
    H = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
    G = jnp.einsum("bkp,bkl,blq->pq", J, H, J) / 12
    v = direction(params)
    product = ravel_pytree(objective.gnvp(params, v))[0]
    np.testing.assert_allclose(product, G @ ravel_pytree(v)[0], rtol=1e-4, atol=1e-5)


def test_gauss_newton_equals_the_hessian_of_a_linear_model():
    def predict(w, batch):
        return batch["x"] @ w

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    batch = {"x": x, "label": jnp.ones((8, 2))}
    objective = Objective.from_fns(predict, losses.squared_error, batch)
    w = jnp.ones((3, 2))
    v = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(objective.gnvp(w, v), objective.hvp(w, v), rtol=1e-5)


@pytest.mark.parametrize("microbatches", [2, 3])
def test_microbatches_change_no_number(microbatches):
    params, whole = make()
    _, cut = make(microbatches=microbatches)
    v = direction(params)
    np.testing.assert_allclose(cut.value(params), whole.value(params), rtol=1e-6)
    pairs = [
        (cut.value_and_grad(params)[1], whole.value_and_grad(params)[1]),
        (cut.value_and_grad(params)[2].outputs, whole.value_and_grad(params)[2].outputs),
        (cut.hvp(params, v), whole.hvp(params, v)),
        (cut.gnvp(params, v), whole.gnvp(params, v)),
    ]
    for a, b in pairs:
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_masked_examples_do_not_count_even_when_not_finite():
    params, objective = make()
    batch = dict(objective.batch)
    kept = {k: v[:8] for k, v in batch.items()}
    mask = jnp.asarray([1.0] * 8 + [0.0] * 4)
    masked = batch | {"mask": mask}
    one = Objective(objective.model, objective.loss, {}, masked, train=False)
    two = Objective(objective.model, objective.loss, {}, kept, train=False)
    np.testing.assert_allclose(one.value(params), two.value(params), rtol=1e-6)
    a, b = jax.tree.leaves(one.grad(params)), jax.tree.leaves(two.grad(params))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_randomness_is_fixed_within_an_objective():
    params, objective = make(rate=0.5)
    assert float(objective.value(params)) == float(objective.value(params))
    _, other = make(rate=0.5)
    other = Objective(other.model, other.loss, {}, other.batch, key=jax.random.key(2))
    assert float(objective.value(params)) != float(other.value(params))


def test_curvature_products_use_the_curvature_batch():
    params, objective = make()
    small = {k: v[:3] for k, v in objective.batch.items()}
    sub = Objective(objective.model, objective.loss, {}, objective.batch, curvature_batch=small)
    alone = Objective(objective.model, objective.loss, {}, small)
    v = direction(params)
    for name in ("hvp", "gnvp"):
        a = ravel_pytree(getattr(sub, name)(params, v))[0]
        np.testing.assert_allclose(a, ravel_pytree(getattr(alone, name)(params, v))[0], rtol=1e-6)
    assert sub.curvature_share() == 0.25


def test_products_ask_for_the_highest_precision():
    params, objective = make()
    for name in ("hvp", "gnvp"):
        text = str(jax.make_jaxpr(getattr(objective, name))(params, params))
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products
        assert text.count("Precision.HIGHEST") + text.count("HIGHEST") >= len(products)


def test_it_crosses_jit_and_pmap():
    params, objective = make()
    expected = objective.grad(params)
    jitted = jax.jit(lambda p, o: o.grad(p))(params, objective)
    split = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), dict(objective.batch))

    def on_device(params, batch):
        return Objective(
            objective.model, objective.loss, {}, batch, key=objective.key, axis_name="d"
        ).value_and_grad(params)[:2]

    value, mapped = jax.pmap(on_device, axis_name="d", in_axes=(None, 0))(params, split)
    np.testing.assert_allclose(value, [objective.value(params)] * 2, rtol=1e-6)
    for a, b, c in zip(*map(jax.tree.leaves, (expected, jitted, mapped)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(a, c[1], rtol=1e-5, atol=1e-7)


def test_a_loss_without_example_axis_is_refused():
    params, objective = make(loss=lambda outputs, batch: jnp.mean(outputs))
    with pytest.raises(check.ArgumentError, match=r"one value an example, shape \(12,\)"):
        objective.value(params)


def test_unknown_keywords_of_line_searches_are_swallowed():
    params, objective = make()
    assert jnp.isfinite(objective.value(params, obj_fn=1, objective=2))


def examples_gradients(params, objective):
    """[B, n], one gradient an example."""
    flat, unravel = ravel_pytree(params)

    def losses_of(p):
        outputs, _ = objective.apply(unravel(p), objective.batch, objective.key)
        return objective.loss(outputs, objective.batch)

    return jax.jacobian(losses_of)(flat)


def test_the_empirical_fisher_diagonal_is_unbiased():
    params, objective = make()
    gradients = examples_gradients(params, objective)
    exact = jnp.mean(jnp.square(gradients), axis=0)
    keys = jax.random.split(jax.random.key(3), 4000)
    draws = jax.lax.map(
        lambda key: ravel_pytree(objective.empirical_fisher_diagonal(params, key))[0],
        keys,
        batch_size=500,
    )
    error = jnp.std(draws, axis=0) / 4000**0.5
    assert float(jnp.max(jnp.abs(draws.mean(0) - exact) / (error + 1e-7))) < 5.0
    assert float(jnp.min(draws)) >= 0.0


@pytest.mark.parametrize("microbatches", [1, 3])
def test_empirical_fisher_and_gram_products_are_their_matrices(microbatches):
    params, objective = make(microbatches=microbatches)
    flat, unravel = ravel_pytree(params)
    v = direction(params)
    gradients = examples_gradients(params, objective)
    wanted = gradients.T @ (gradients @ ravel_pytree(v)[0]) / 12
    np.testing.assert_allclose(
        ravel_pytree(objective.efvp(params, v))[0], wanted, rtol=1e-3, atol=1e-5
    )

    def hidden(p, batch):
        return jnp.tanh(batch["image"] @ p["Dense_0"]["kernel"])

    states = jax.jacobian(lambda p: hidden(unravel(p), objective.batch).ravel())(flat)
    wanted = states.T @ (states @ ravel_pytree(v)[0]) / 12
    found = objective.gram_product(hidden, params, v)
    np.testing.assert_allclose(ravel_pytree(found)[0], wanted, rtol=1e-3, atol=1e-5)
