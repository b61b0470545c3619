import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core import check
from jdl.core.model import from_linen
from jdl.core.objective import Objective
from jdl.data import from_arrays
from jdl.models.rbm import RBM, Energies, contrastive_divergence, log_odds, sparse_divergence
from jdl.models.rbm_likelihood import (
    Annealed,
    annealed_log_z,
    exact_log_z,
    log_likelihood,
    pseudo_log_likelihood,
    temperatures,
)
from jdl.train.boltzmann import momentum_switch, weight_cost
from jdl.train.boltzmann import rbm as rbm_estimator

KEY = jax.random.key(0)
ONE = {"devices": jax.devices()[:1]}


def states(n):
    return np.array(list(itertools.product((0.0, 1.0), repeat=n)), np.float32)


def machine(visible=5, hidden=4, scale=1.0, **options):
    rbm = RBM(hidden=hidden, **options)
    keys = jax.random.split(KEY, 3)
    shapes = {
        "kernel": (visible, hidden),
        "visible_bias": (visible,),
        "hidden_bias": (hidden,),
    }
    return rbm, {
        name: scale * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def log_sum_of_energies(params, v):
    """log Σₕ exp(bᵀv + cᵀh + vᵀWh), by loops."""
    w, b, c = (np.asarray(params[n], np.float64) for n in ("kernel", "visible_bias", "hidden_bias"))
    return np.array(
        [np.logaddexp.reduce([b @ x + c @ h + x @ w @ h for h in states(len(c))]) for x in v]
    )


def test_free_energy_and_log_z_are_sums_over_all_states():
    rbm, params = machine()
    v = states(5)
    expected = log_sum_of_energies(params, v)
    np.testing.assert_allclose(-rbm.free_energy(params, jnp.asarray(v)), expected, rtol=1e-5)
    assert exact_log_z(rbm, params) == pytest.approx(np.logaddexp.reduce(expected), abs=1e-4)


def test_label_units_are_one_of_k():
    rbm, params = machine(visible=6, num_classes=3)
    x = states(3)
    joint = [np.concatenate([x, np.tile(np.eye(3)[y], (8, 1))], axis=1) for y in range(3)]
    log_p = np.stack([log_sum_of_energies(params, v) for v in joint], axis=1)
    logits = np.asarray(rbm.class_logits(params, jnp.asarray(x)), np.float64)
    posterior = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    np.testing.assert_allclose(
        logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), posterior, atol=1e-5
    )
    assert exact_log_z(rbm, params) == pytest.approx(np.logaddexp.reduce(log_p, None), abs=1e-4)


def test_gaussian_visible_units_by_quadrature():
    rbm = RBM(hidden=3, visible="gaussian", sigma=0.7)
    params = machine(visible=2, hidden=3)[1]
    line = np.arange(-12, 12, 0.05)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    density = -np.asarray(rbm.free_energy(params, jnp.asarray(grid)), np.float64)
    assert exact_log_z(rbm, params) == pytest.approx(
        np.logaddexp.reduce(density) + 2 * np.log(0.05), abs=1e-3
    )
    found = annealed_log_z(rbm, params, KEY, betas=np.linspace(0, 1, 400))
    assert found.log_z == pytest.approx(exact_log_z(rbm, params), abs=0.1)


def test_gaussian_hidden_units_by_summing_over_visible_ones():
    rbm, params = machine(visible=5, hidden=2, hidden_units="gaussian", scale=0.5)
    exact = np.logaddexp.reduce(-np.asarray(rbm.free_energy(params, jnp.asarray(states(5)))))
    found = annealed_log_z(rbm, params, KEY, betas=np.linspace(0, 1, 400))
    assert found.log_z == pytest.approx(exact, abs=0.1)


def test_annealing_finds_the_exact_log_z_of_twenty_hidden_units():
    rbm, params = machine(visible=30, hidden=20, scale=0.5)
    found = annealed_log_z(rbm, params, KEY, betas=temperatures(580))
    assert found.log_z == pytest.approx(exact_log_z(rbm, params), abs=0.1)
    assert found.low < found.log_z < found.high
    assert found.relative_error < 0.1
    labelled = RBM(hidden=20, num_classes=4)
    found = annealed_log_z(labelled, params, KEY, betas=temperatures(580))
    assert found.log_z == pytest.approx(exact_log_z(labelled, params), abs=0.1)


def test_an_uncertain_estimate_gives_no_likelihood():
    rbm, params = machine()
    v = states(5)
    sure = log_likelihood(rbm, params, v, exact_log_z(rbm, params), batch_size=7)
    assert sure == pytest.approx(
        np.mean(log_sum_of_energies(params, v)) - exact_log_z(rbm, params), abs=1e-4
    )
    with pytest.raises(check.TrainingError, match="relative standard error"):
        log_likelihood(rbm, params, v, Annealed(3.0, 0.2, 2.0, 4.0, np.zeros(2)))


def test_long_chains_have_the_exact_distribution():
    rbm, params = machine(visible=3, hidden=2)
    log_p = log_sum_of_energies(params, states(3))
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    v, _ = rbm.gibbs(params, jnp.zeros((20_000, 2)), KEY, 30)
    counts = np.bincount((np.asarray(v) @ [4, 2, 1]).astype(int), minlength=8)
    np.testing.assert_allclose(counts / 20_000, p, atol=0.015)


def test_conditional_samples_given_known_units():
    rbm, params = machine(visible=3, hidden=2)
    log_p = log_sum_of_energies(params, states(3))[4:]  # first unit 1
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    start = jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (20_000, 1))
    v = np.asarray(rbm.sample(params, KEY, start, 30, known=jnp.array([1, 0, 0])))
    assert (v[:, 0] == 1).all()
    counts = np.bincount((v @ [0, 2, 1]).astype(int), minlength=4)
    np.testing.assert_allclose(counts / 20_000, p, atol=0.015)


def test_mean_field_ends_at_a_fixed_point():
    rbm, params = machine(scale=0.5)
    v = rbm.mean_field(params, jnp.full((2, 5), 0.5), 200, known=jnp.array([1, 0, 0, 0, 0]))
    w, b, c = (np.asarray(params[n]) for n in ("kernel", "visible_bias", "hidden_bias"))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    again = sigmoid(b + sigmoid(c + np.asarray(v) @ w) @ w.T)
    np.testing.assert_allclose(v[:, 1:], again[:, 1:], atol=1e-5)
    assert (np.asarray(v)[:, 0] == 0.5).all()


def test_the_objective_s_gradient_is_the_difference_of_correlations():
    rbm, params = machine()
    batch = {"image": jnp.asarray(states(5)[3:11])}
    objective = Objective(from_linen(rbm), contrastive_divergence, {}, batch, train=False)
    grads = objective.grad(params)
    w, b, c = (np.asarray(params[n], np.float64) for n in ("kernel", "visible_bias", "hidden_bias"))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    v = np.asarray(batch["image"])
    h = sigmoid(c + v @ w)
    v_model = sigmoid(b + h @ w.T)
    h_model = sigmoid(c + v_model @ w)
    np.testing.assert_allclose(grads["kernel"], (v_model.T @ h_model - v.T @ h) / 8, atol=1e-5)
    np.testing.assert_allclose(grads["visible_bias"], (v_model - v).mean(0), atol=1e-5)
    np.testing.assert_allclose(grads["hidden_bias"], (h_model - h).mean(0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"k": 3}, {"k": 2, "sample_visible": False}, {"chains": 7}])
def test_in_training_samples_are_held_fixed_and_their_gradient_is_unbiased(options):
    rbm, params = machine(visible=4, hidden=3, **options)
    model = from_linen(rbm)
    batch = {"image": jnp.asarray(states(4))}
    state = model.init(KEY, batch["image"])[1]

    def grad(key):
        objective = Objective(model, contrastive_divergence, state, batch, key=key)
        return objective.grad(params)["visible_bias"]

    found = jax.vmap(grad)(jax.random.split(KEY, 400)).mean(0)
    # By numpy: the same chain, many times over.
    rng = np.random.default_rng(0)
    w, b, c = (np.asarray(params[n], np.float64) for n in ("kernel", "visible_bias", "hidden_bias"))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    v = np.tile(states(4), (400, 1))
    h = rng.random((len(v), 3)) < sigmoid(c + v @ w)
    if "chains" in options:
        h = np.tile(np.asarray(state["chains"]["hidden"]), (1000, 1))
    for _ in range(options.get("k", 1)):
        means = sigmoid(b + h @ w.T)
        v_model = rng.random(means.shape) < means
        h = rng.random((len(h), 3)) < sigmoid(c + v_model @ w)
    np.testing.assert_allclose(found, v_model.mean(0) - states(4).mean(0), atol=0.03)


def test_sparsity_and_weight_cost_have_the_stated_derivatives():
    rbm, params = machine()
    v = jnp.asarray(states(5)[:6])

    def f(bias, loss):
        outputs = rbm.apply({"params": params | {"hidden_bias": bias}}, v)
        return jnp.mean(loss(outputs, {}))

    bias = params["hidden_bias"]
    gap = jax.grad(f)(bias, sparse_divergence(0.1, 2.0)) - jax.grad(f)(bias, contrastive_divergence)
    activity = rbm.transform(params, v).mean(0)
    np.testing.assert_allclose(gap, 2.0 * (activity - 0.1), atol=1e-5)
    decay = jax.grad(weight_cost(0.3))(params)
    np.testing.assert_allclose(decay["kernel"], 0.3 * params["kernel"], rtol=1e-5)
    assert not np.any(decay["hidden_bias"])


def test_momentum_switch_equals_optax_before_and_after():
    import optax

    params = {"w": jnp.ones(3)}
    ours, theirs = momentum_switch(0.1, early=0.5, late=0.9, after=100), optax.sgd(0.05, 0.5)
    ours_state, theirs_state = ours.init(params), theirs.init(params)
    for i in range(5):
        grads = {"w": jnp.array([1.0, -2.0, 0.5]) * (i + 1)}
        mine, ours_state = ours.update(grads, ours_state, params)
        other, theirs_state = theirs.update(grads, theirs_state, params)
        np.testing.assert_allclose(mine["w"], other["w"], rtol=1e-5)
    late = momentum_switch(0.1, after=5)
    updates, _ = late.update(grads, ours_state, params)
    expected = -0.1 * (0.9 * ours_state.velocity["w"] + 0.1 * grads["w"])
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


def test_pseudo_likelihood_is_right_on_average():
    rbm, params = machine()
    v = states(5)[:9]
    own = log_sum_of_energies(params, v)
    expected = np.zeros(9)
    for i in range(5):
        flipped = v.copy()
        flipped[:, i] = 1 - flipped[:, i]
        expected += own - np.logaddexp(own, log_sum_of_energies(params, flipped))
    keys = jax.random.split(KEY, 3000)
    found = jax.vmap(lambda key: pseudo_log_likelihood(rbm, params, jnp.asarray(v), key))(keys)
    np.testing.assert_allclose(found.mean(0), expected, atol=0.25)
    exact = pseudo_log_likelihood(rbm, params, jnp.asarray(v))
    np.testing.assert_allclose(exact, expected, rtol=1e-4)


def bars():
    """All 3 × 3 images of whole rows, or of whole columns: 14 different ones."""
    rows = [np.tile(np.array(on)[:, None], (1, 3)) for on in states(3)]
    return np.unique(np.stack([r.ravel() for r in rows] + [r.T.ravel() for r in rows]), axis=0)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        pytest.param({"k": 5}, 0.1, id="cd5", marks=pytest.mark.slow),
        pytest.param({"chains": 50, "k": 5}, 0.05, id="pcd"),
        pytest.param({"chains": 50, "fast_rate": 0.05}, 0.1, id="fpcd", marks=pytest.mark.slow),
    ],
)
def test_it_learns_bars(options, rate):
    x = np.tile(bars(), (10, 1))
    start = {"kernel_init": nn.initializers.normal(0.3), "visible_bias_init": log_odds(x.mean(0))}
    rbm = RBM(hidden=12, **start, **options)
    data = from_arrays(x, batch_size=28, seed=0)
    estimator = rbm_estimator(rbm, momentum_switch(rate, late=0.5), cost=0.0, log_every=500, **ONE)
    estimator.train(data, steps=1)
    before = log_likelihood(rbm, estimator.params, bars(), exact_log_z(rbm, estimator.params))
    estimator.train(data, steps=4000)
    after = log_likelihood(rbm, estimator.params, bars(), exact_log_z(rbm, estimator.params))
    assert before < -5.5  # independent pixels: 9 log ½ = −6.2
    assert after > -3.8  # the best there is: −log 14 = −2.64
    if options.get("fast_rate"):
        assert float(jnp.abs(estimator.model_state["chains"]["fast"]["kernel"]).max()) > 0


def test_chains_are_saved_and_resumed(tmp_path):
    def made(workdir):
        rbm = RBM(hidden=4, chains=6, fast_rate=0.01)
        return rbm_estimator(rbm, workdir=workdir, seed=3, save_every=None, **ONE)

    data = from_arrays(bars(), batch_size=14, seed=0)
    whole = made(None).train(data, steps=8)
    made(tmp_path).train(from_arrays(bars(), batch_size=14, seed=0), steps=4)
    resumed = made(tmp_path).train(from_arrays(bars(), batch_size=14, seed=0), max_steps=8)
    jax.tree.map(np.testing.assert_array_equal, whole.model_state, resumed.model_state)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


def test_mistakes_are_reported():
    rbm, params = machine()
    with pytest.raises(check.ArgumentError, match=r"in \[0, 1\] for binary"):
        rbm.transform(params, np.full((2, 5), 2.0))
    outside = jax.jit(lambda x: rbm.apply({"params": params}, x))(jnp.full((2, 5), 2.0))
    assert np.isnan(outside.positive).all()
    with pytest.raises(check.ArgumentError, match="label"):
        rbm.joined(jnp.zeros((2, 5)), jnp.zeros(2, int))
    with pytest.raises(check.ArgumentError, match="label"):
        RBM(num_classes=3).joined(jnp.zeros((2, 5)))
    labelled = RBM(hidden=2, num_classes=3)
    with pytest.raises(check.ArgumentError, match=r"`label` must be numbers in \[0, 3\)"):
        labelled.joined(jnp.zeros((2, 5)), np.array([0, -1]))
    found = jax.jit(labelled.joined)(jnp.zeros((2, 5)), np.array([0, -1]))
    assert np.isnan(found).any(1).tolist() == [False, True]
    with pytest.raises(check.ArgumentError, match="chains"):
        RBM(fast_rate=0.1).init(KEY, jnp.zeros((2, 5)))
    with pytest.raises(check.ArgumentError, match="visible"):
        RBM(visible="binary").init(KEY, jnp.zeros((2, 5)))
    with pytest.raises(check.ArgumentError, match="at most 20"):
        exact_log_z(RBM(hidden=21), params)
    with pytest.raises(check.ArgumentError, match="betas"):
        annealed_log_z(rbm, params, KEY, betas=[0.0, 0.5])
    with pytest.raises(check.ArgumentError, match="target"):
        sparse_divergence(1.5, 1.0)


def test_divergence_is_reported():
    rbm = RBM(hidden=3, visible="gaussian")
    data = from_arrays(np.full((8, 2), 5.0, np.float32), batch_size=4, seed=0)
    with pytest.raises(check.TrainingError, match="The loss is"):
        rbm_estimator(rbm, momentum_switch(1e6), **ONE).train(data, steps=200)


def test_outputs_are_energies():
    rbm, params = machine()
    outputs = rbm.apply({"params": params}, jnp.zeros((2, 5)))
    assert isinstance(outputs, Energies)
    assert outputs.classes.shape == (2, 0)
