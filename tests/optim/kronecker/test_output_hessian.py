"""Draws and columns of output Hessians against dense ones by `jax.hessian`, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import losses
from jdl.core import tree
from jdl.core.objective import Objective, fisher_loss
from jdl.models import rnn
from jdl.optim import kronecker
from jdl.optim.kronecker import output_hessian
from tests.optim.loops import run

B = 6


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def integers(*shape, high=4, low=0):
    return jnp.asarray(np.random.default_rng(3).integers(low, high, shape), jnp.int32)


def flattened(outputs):
    return jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(outputs)], axis=1)


def dense_hessian(loss, outputs, batch):
    """[B, N, N], by brute force."""
    leaves, structure = jax.tree.flatten(outputs)
    ends = np.cumsum([math.prod(x.shape[1:]) for x in leaves])[:-1]

    def one(flat, row):
        parts = [
            p.reshape(1, *x.shape[1:]) for p, x in zip(jnp.split(flat, ends), leaves, strict=True)
        ]
        row = jax.tree.map(lambda x: x[None], row)
        return loss(jax.tree.unflatten(structure, parts), row)[0]

    return jax.jit(jax.vmap(jax.hessian(one)))(flattened(outputs), batch)


def gram_of_columns(kind, loss, outputs, batch):
    count, column = output_hessian.columns(kind, loss, outputs, batch)
    u = jax.jit(lambda: jax.lax.map(lambda k: flattened(column(k)), jnp.arange(count)))()
    u = np.asarray(u, np.float64)
    return np.einsum("kbi,kbj->bij", u, u)


def mean_of_draws(kind, loss, outputs, batch, count=3000):
    @jax.jit
    def mean(keys):
        def gram(key):
            keys = jax.random.split(key, B)
            u = flattened(output_hessian.draw(kind, loss, outputs, batch, keys))
            return jnp.einsum("bi,bj->bij", u, u)

        return jnp.mean(jax.lax.map(gram, keys), axis=0)

    return mean(jax.random.split(jax.random.key(0), count))


def huber(outputs, batch):
    return jnp.sum(optax.huber_loss(outputs, batch["y"], delta=0.7), axis=1)


def distance(outputs, batch):
    return jnp.sqrt(1.0 + jnp.sum(jnp.square(outputs - batch["y"]), axis=1))


def weighted_softmax(outputs, batch):
    # [B, T, K] with a weight for each position
    each = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
    return jnp.sum(batch["weight"] * each, axis=1)


ours = losses.softmax_cross_entropy
softmax = functools.partial(functools.partial, ours)
gaussian = functools.partial(losses.gaussian_nll, target="y")
CASES = {
    "softmax": (ours, (4,), "softmax"),
    "one output": (functools.partial(losses.squared_error, target="y"), (1,), "diagonal"),
    "sigmoid": (functools.partial(losses.sigmoid_cross_entropy, target="y"), (4,), "diagonal"),
    "huber": (huber, (4,), "diagonal"),
    "distance": (distance, (4,), "dense"),
    "positions": (weighted_softmax, (3, 4), "softmax"),
    "two classes": (softmax(ignore=1), (3, 2), "softmax"),
    "images": (softmax(ignore=0, label_smoothing=0.1), (2, 3, 4), "softmax"),
    "probabilities": (softmax(target="p", label_smoothing=0.3), (3, 4), "softmax"),
    "small z-loss": (softmax(z_loss=1e-4), (4,), "softmax with z-loss"),
    "z-loss": (softmax(z_loss=0.3, ignore=2), (3, 4), "softmax with z-loss"),
}


def batch_for(shape):
    each = (B, *shape[:-1])
    return {
        "y": jax.nn.sigmoid(numbers(B, *shape, seed=1)),
        "p": jax.nn.softmax(numbers(B, *shape, seed=1)),
        "weight": jnp.abs(numbers(B, 3)),
        "label": integers(*each, high=shape[-1]),
        "mask": jnp.abs(numbers(B)),
    }


def as_float64(x):
    wide = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float64) if wide else x


@pytest.mark.parametrize("name", CASES)
def test_columns_are_a_root_of_the_hessian(name):
    loss, shape, want = CASES[name]
    with jax.enable_x64(True):
        outputs = as_float64(1.0 + numbers(B, *shape))
        batch = jax.tree.map(as_float64, batch_for(shape))
        kind = output_hessian.route(loss, outputs, batch)
        assert kind == want
        truth = dense_hessian(loss, outputs, batch)
        found = gram_of_columns(kind, loss, outputs, batch)
        np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["distance", "z-loss"])
def test_draws_average_to_the_hessian(name):
    loss, shape, kind = CASES[name]
    outputs, batch = numbers(B, *shape), batch_for(shape)
    assert output_hessian.route(loss, outputs, batch) == kind
    truth = dense_hessian(loss, outputs, batch)
    mean = mean_of_draws(kind, loss, outputs, batch)
    np.testing.assert_allclose(mean, truth, atol=0.07 * float(jnp.max(truth)))


def test_a_large_coupled_loss_falls_back_on_its_gradient_and_says_so():
    outputs, batch = numbers(3, 100), {"y": numbers(3, 100, seed=1)}
    kind = output_hessian.route(distance, outputs, batch)
    assert kind == "gradient"
    u = output_hessian.draw(kind, distance, outputs, batch, jax.random.split(jax.random.key(0), 3))
    g = jax.grad(lambda z: jnp.sum(distance(z, batch)))(outputs)
    np.testing.assert_allclose(jnp.abs(u), jnp.abs(g), rtol=1e-6)


def cauchy(outputs, batch):
    return jnp.sum(jnp.log1p(jnp.square(outputs - batch["y"])), axis=1)


def own_gaussian(outputs, batch):
    mean, log_variance = outputs[:, 0], outputs[:, 1]
    return 0.5 * (jnp.square(mean - batch["y"][:, 0]) * jnp.exp(-log_variance) + log_variance)


@pytest.mark.parametrize(("loss", "kind"), [(cauchy, "diagonal"), (own_gaussian, "dense")])
def test_of_a_loss_that_is_not_convex_the_positive_part_is_taken_and_named(loss, kind):
    outputs, batch = 2.0 * numbers(B, 2), {"y": numbers(B, 2, seed=1)}
    route = output_hessian.route(loss, outputs, batch)
    assert route == f"{kind}; not convex: its positive part"
    values, vectors = np.linalg.eigh(dense_hessian(loss, outputs, batch))
    assert np.min(values) < -0.1
    truth = np.einsum("bij,bj,bkj->bik", vectors, np.maximum(values, 0.0), vectors)
    found = gram_of_columns(route, loss, outputs, batch)
    np.testing.assert_allclose(found, truth, atol=1e-5)
    objective = Objective.from_fns(lambda p, b: p + 0.0 * b["y"], loss, batch)
    account = kronecker.describe(objective, outputs)
    assert account.endswith(f"the loss's output Hessian ({route})")


def test_padded_sequences_take_the_softmaxs_route():
    outputs = numbers(B, 7, 30)
    batch = {"tokens": integers(B, 7, high=30), "lengths": jnp.array([2, 7, 3, 1, 5, 2])}
    kind = output_hessian.route(rnn.next_step_loss, outputs, batch)
    assert kind == "softmax"
    truth = dense_hessian(rnn.next_step_loss, outputs, batch)
    found = gram_of_columns(kind, rnn.next_step_loss, outputs, batch)
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-6)


def test_bfloat16_outputs_have_the_hessian_of_the_same_float32():
    loss, shape, _ = CASES["z-loss"]
    outputs, batch = numbers(B, *shape).astype(jnp.bfloat16), batch_for(shape)
    kind = output_hessian.route(loss, outputs, batch)
    assert kind == "softmax with z-loss"
    truth = dense_hessian(loss, outputs.astype(jnp.float32), batch)
    found = gram_of_columns(kind, loss, outputs, batch)
    np.testing.assert_allclose(found, truth, atol=0.01 * float(jnp.max(truth)))


# ------------------------------------------------------------------ heads

HEADS = {
    "box": numbers(B, 4),
    "class": numbers(B, 30),
    "text": {"logits": numbers(B, 3, 12), "scale": numbers(B)},
}
TARGETS = {
    "box": numbers(B, 4, seed=1),
    "class": integers(B, high=30),
    "tokens": integers(B, 3, high=12, low=-1),
    "scale": numbers(B, seed=2),
}


def of_heads(outputs, batch, softmax=ours):
    distance = jnp.sum(jnp.square(outputs["box"] - batch["box"]), axis=1)
    text = softmax(outputs["text"]["logits"], batch, target="tokens", ignore=-1, z_loss=0.01)
    scale = jnp.log(jnp.cosh(outputs["text"]["scale"] - batch["scale"]))
    boxes = jnp.sqrt(1.0 + distance)
    return 2.0 * boxes + 0.5 * softmax(outputs["class"], batch, target="class") + text + scale


@pytest.mark.slow
def test_heads_have_a_route_each():
    with jax.enable_x64(True):
        outputs, batch = jax.tree.map(as_float64, (HEADS, TARGETS))
        kind = output_hessian.route(of_heads, outputs, batch)
        assert kind == (
            "box: dense, class: softmax, text/logits: softmax with z-loss, text/scale: diagonal"
        )
        truth = np.asarray(dense_hessian(of_heads, outputs, batch))
        found = gram_of_columns(kind, of_heads, outputs, batch)
        np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-9)
    mean = mean_of_draws(kind, of_heads, HEADS, TARGETS, count=1000)
    np.testing.assert_allclose(mean, truth, atol=0.12 * np.max(truth))


def test_a_head_that_no_route_fits_has_its_own_gradient_and_one_without_loss_none():
    def loss(outputs, batch):
        return distance(outputs["a"], batch) + losses.squared_error(outputs["b"], batch, "z")

    outputs = {"a": numbers(B, 70), "b": numbers(B, 3), "features": numbers(B, 80)}
    batch = {"y": numbers(B, 70, seed=1), "z": numbers(B, 3, seed=1)}
    kind = output_hessian.route(loss, outputs, batch)
    assert kind == "a: gradient, b: diagonal, features: gradient"
    u = output_hessian.draw(kind, loss, outputs, batch, jax.random.split(jax.random.key(0), B))
    g = jax.grad(lambda z: jnp.sum(distance(z, batch)))(outputs["a"])
    np.testing.assert_allclose(jnp.abs(u["a"]), jnp.abs(g), rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(u["b"]), 1.0, rtol=1e-6)
    assert not jnp.any(u["features"])
    count, _ = output_hessian.columns(kind, loss, outputs, batch)
    assert count == 1 + 3 + 1


@pytest.mark.parametrize(("size", "want"), [(3, "dense"), (60, "gradient")])
def test_coupled_heads_share_a_route(size, want):
    def loss(outputs, batch):
        a, b = outputs["a"], outputs["b"].reshape(B if len(outputs["b"]) == B else -1, size)
        return 0.5 * jnp.sum(jnp.square(a - b) + jnp.square(a), axis=1) + ours(a, batch)

    outputs = {"a": numbers(B, size), "b": numbers(B, size, 1, seed=1)}
    batch = {"label": integers(B, high=3)}
    kind = output_hessian.route(loss, outputs, batch)
    assert kind == want
    found = gram_of_columns(kind, loss, outputs, batch)
    if want == "gradient":
        g = flattened(jax.grad(lambda z: jnp.sum(loss(z, batch)))(outputs))
        truth = np.einsum("bi,bj->bij", g, g)
    else:
        truth = dense_hessian(loss, outputs, batch)
    np.testing.assert_allclose(found, truth, atol=2e-5)


# ------------------------------------------------------------------ a Gaussian with its variance


def gaussian_problem(**options):
    """A linear net with two outputs for mean and log-variance, and their Fisher matrix."""
    batch = {"x": as_float64(numbers(B, 3)), "y": as_float64(numbers(B, 2, seed=1))}
    params = {"m": as_float64(numbers(3, 2)), "s": as_float64(numbers(3, 2, seed=2))}

    def predict(p, b):
        return {"mean": b["x"] @ p["m"], "log_variance": b["x"] @ p["s"]}

    return Objective.from_fns(predict, gaussian, batch, **options), params


def test_a_gaussians_columns_are_a_root_of_its_fisher_matrix():
    with jax.enable_x64(True):
        objective, params = gaussian_problem()
        outputs, batch = objective.model.apply(params, {}, objective.batch)[0], objective.batch
        kind = output_hessian.route(gaussian, outputs, batch)
        assert kind == "log_variance: diagonal, mean: diagonal"
        fisher = np.concatenate([np.full((B, 2), 0.5), np.exp(-outputs["log_variance"])], axis=1)
        found = gram_of_columns(kind, gaussian, outputs, batch)
        np.testing.assert_allclose(found, fisher[:, None] * np.eye(4), rtol=1e-12)
        # The Hessian's mean over targets drawn from the model.
        noise = jax.random.normal(jax.random.key(0), (4000, B, 2))
        drawn = outputs["mean"][None] + jnp.exp(outputs["log_variance"] / 2)[None] * noise
        hessians = jax.vmap(lambda y: dense_hessian(gaussian, outputs, {"y": y}))(drawn)
        np.testing.assert_allclose(hessians.mean(axis=0), found, atol=0.25)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_gauss_newton_products_of_a_gaussian_take_the_fisher_matrix(microbatches):
    with jax.enable_x64(True):
        objective, params = gaussian_problem(microbatches=microbatches)
        x, s = (np.asarray(v) for v in (objective.batch["x"], objective.batch["x"] @ params["s"]))
        v = jax.tree.map(lambda p: jnp.cos(p), params)
        found = jax.jit(objective.gnvp)(params, v)
        precision = np.exp(-s)
        np.testing.assert_allclose(found["m"], x.T @ (precision * (x @ v["m"])) / B, rtol=1e-10)
        np.testing.assert_allclose(found["s"], x.T @ (0.5 * (x @ v["s"])) / B, rtol=1e-10)
        model = jdl.optim.quadratic.quadratic(objective, params, [v])
        np.testing.assert_allclose(model.curvature[0, 0], tree.vdot(v, found), rtol=1e-10)
        np.testing.assert_allclose(model.value, objective.value(params), rtol=1e-12)
        np.testing.assert_allclose(
            model.slopes[0], tree.vdot(objective.grad(params), v), rtol=1e-12
        )
        h = 1e-5  # the Hessian stays the loss's own
        grads = [objective.grad(tree.add_scaled(params, t, v)) for t in (h, -h)]
        want = jax.tree.map(lambda a, b: (a - b) / (2 * h), *grads)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
            objective.hvp(params, v),
            want,
        )


def test_a_sum_with_a_gaussian_has_the_routes_of_its_parts_once_it_has_a_fisher():
    def loss(outputs, batch, nll=losses.gaussian_nll):
        return nll(outputs["value"], batch, target="y") + ours(outputs["class"], batch)

    value = {"mean": numbers(B, 40), "log_variance": numbers(B, 40, seed=1)}
    outputs = {"class": numbers(B, 30), "value": value}
    batch = {"label": integers(B, high=30), "y": numbers(B, 40, seed=2)}
    assert output_hessian.route(loss, outputs, batch) == "gradient"
    loss.fisher = functools.partial(loss, nll=losses.gaussian_nll.fisher)
    assert output_hessian.route(loss, outputs, batch) == (
        "class: softmax, value/log_variance: diagonal, value/mean: diagonal"
    )


def test_the_fisher_is_found_through_partials_and_model_functions():
    def nll(outputs, labels):
        return losses.gaussian_nll(outputs, {"label": labels})

    nll.fisher = lambda outputs, labels: losses.gaussian_nll.fisher(outputs, {"label": labels})

    def fn(x, y, mode):
        w = jdl.models.param("w", jax.nn.initializers.zeros, (3, 4))
        mean, log_variance = jnp.split(x @ w, 2, axis=-1)
        outputs = {"mean": mean, "log_variance": log_variance}
        return jdl.Spec(outputs=outputs, loss=nll, optimizer="kfac")

    x, y = np.asarray(numbers(8, 3)), np.asarray(numbers(8, 2, seed=1))
    batch = {"image": x, "label": y}
    estimator = jdl.from_model_fn(fn).initialize([batch])
    of = jax.jit(lambda o, b: fisher_loss(estimator.loss)(o, b))
    outputs = {"outputs": {"mean": numbers(8, 2), "log_variance": numbers(8, 2, seed=2)}}
    found = dense_hessian(of, outputs, batch)
    diagonal = jnp.concatenate(
        [jnp.full((8, 2), 0.5), jnp.exp(-outputs["outputs"]["log_variance"])], axis=1
    )
    np.testing.assert_allclose(found, np.asarray(diagonal)[:, None] * np.eye(4), rtol=1e-6)
    assert fisher_loss(ours) is ours


@pytest.mark.slow
def test_kfac_learns_a_variance():
    x = np.asarray(numbers(256, 3))
    noise = np.asarray(numbers(256, 1, seed=1)) * np.exp(x[:, :1])
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(x[:, 1:2] + noise)}

    def predict(p, b):
        return {"mean": b["x"] @ p["m"], "log_variance": b["x"] @ p["s"] + p["b"][None]}

    objective = Objective.from_fns(predict, gaussian, batch)
    params = {"m": jnp.zeros((3, 1)), "s": jnp.zeros((3, 1)), "b": jnp.zeros(1)}
    params, _, _ = run(jdl.optim.kfac(gradient_decay=0.0), objective, params, 40)
    assert kronecker.describe(objective, params).endswith(
        "(log_variance: diagonal, mean: diagonal)"
    )
    np.testing.assert_allclose(params["s"][:, 0], [2.0, 0.0, 0.0], atol=0.3)
    np.testing.assert_allclose(params["m"][:, 0], [0.0, 1.0, 0.0], atol=0.15)
    assert float(tree.norm(objective.grad(params))) < 1e-3
