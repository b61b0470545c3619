import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl.core import check
from jdl.core.objective import Objective
from jdl.models.dbn import DBN, as_loss, merged, starting_at, up_down
from jdl.models.mlp import MLP
from jdl.train.boltzmann import momentum_switch, pretrain, slower_layers

KEY = jax.random.key(0)
ONE = {"devices": jax.devices()[:1]}


def random_stack(dbn, sizes):
    """Parameters of a stack with that many visible units in each layer."""
    made = []
    for i, n in enumerate(sizes):
        keys = jax.random.split(jax.random.fold_in(KEY, i), 3)
        shapes = {
            "kernel": (n, dbn.widths[i]),
            "visible_bias": (n,),
            "hidden_bias": (dbn.widths[i],),
        }
        pairs = zip(keys, shapes.items(), strict=True)
        made.append({name: jax.random.normal(key, shape) for key, (name, shape) in pairs})
    return made


def sigmoid(a):
    return 1 / (1 + np.exp(-np.asarray(a, np.float64)))


def in_numpy(params):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params)


def naive_up(params, x):
    h = np.asarray(x, np.float64).reshape(len(x), -1)
    for p in in_numpy(params):
        h = sigmoid(p["hidden_bias"] + h @ p["kernel"][: h.shape[1]])
    return h


def test_features_and_unrolled_nets_are_the_stack_s():
    dbn = DBN(widths=(5, 4))
    params = random_stack(dbn, (9, 5))
    x = jax.random.uniform(KEY, (6, 3, 3))
    expected = naive_up(params, x)
    np.testing.assert_allclose(dbn.features(params, x), expected, rtol=2e-5, atol=1e-6)
    net, unrolled = dbn.unrolled_mlp(params, 3)
    assert not np.any(net.apply({"params": unrolled}, x))  # the last layer is zero as yet
    unrolled["outputs"]["kernel"] = jnp.eye(4)[:, :3]
    np.testing.assert_allclose(net.apply({"params": unrolled}, x), expected[:, :3], rtol=2e-5)
    coder, unrolled = dbn.unrolled_autoencoder(params)
    h = expected
    for p in reversed(in_numpy(params)):
        logits = p["visible_bias"] + h @ p["kernel"].T
        h = sigmoid(logits)
    found = coder.apply({"params": unrolled}, x).reshape(6, -1)
    np.testing.assert_allclose(found, logits, rtol=2e-5, atol=2e-6)


def test_label_weights_become_the_classifier_s_last_layer():
    dbn = DBN(widths=(5, 4), num_classes=3)
    params = random_stack(dbn, (9, 8))
    x = jax.random.uniform(KEY, (6, 3, 3))
    net, unrolled = dbn.unrolled_mlp(params, 3)
    h, top = naive_up(params, x), in_numpy(params[1])
    expected = h @ top["kernel"][5:].T + top["visible_bias"][5:]
    found = net.apply({"params": unrolled}, x)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_a_layer_trains_on_the_features_of_those_below_and_leaves_them():
    dbn = DBN(widths=(5, 4))
    params = random_stack(dbn, (9, 5))
    x = jax.random.uniform(KEY, (6, 3, 3))
    model, alone = dbn.layer(1, params[:1]), dbn.layer(0, [])
    own, state = model.init(KEY, x)
    features = jnp.asarray(naive_up(params[:1], x), jnp.float32)
    stacked = model.apply(params[1], state, x)[0]
    machine = dbn.rbm(1)
    np.testing.assert_allclose(
        stacked.positive, machine.free_energy(params[1], features), rtol=1e-4, atol=1e-4
    )
    assert own["kernel"].shape == (5, 4)
    new_state = model.apply(own, state, x, key=KEY, train=True)[1]
    jax.tree.map(np.testing.assert_array_equal, new_state["below"], params[:1])
    assert alone.init(KEY, x)[0]["kernel"].shape == (9, 5)


@pytest.mark.parametrize(("temperature", "guidance"), [(1.0, 1.0), (0.5, 1.0), (1.0, 3.0)])
def test_generation_has_the_exact_distribution_of_a_single_machine(temperature, guidance):
    dbn = DBN(widths=(2,), num_classes=2)
    params = random_stack(dbn, (4,))  # two pixels, two label units
    p = params[0]
    label = jnp.zeros(4000, int)
    how = {"temperature": temperature, "guidance": guidance}
    found = dbn.generate(params, KEY, 4000, steps=40, label=label, **how).mean(0)
    w, b, c = (np.asarray(p[n], np.float64) for n in ("kernel", "visible_bias", "hidden_bias"))
    weights, total = np.zeros(2), 0.0
    for x in itertools.product((0, 1), repeat=2):
        v = np.array([*x, 1, 0])
        inputs = (c + (v * [1, 1, guidance, guidance]) @ w) / temperature
        chance = np.exp(b @ v / temperature) * np.prod(1 + np.exp(inputs))
        weights, total = weights + chance * np.array(x), total + chance
    np.testing.assert_allclose(found, weights / total, atol=0.03)


def test_generation_has_the_exact_distribution_of_a_stack():
    """Means taken on the way down, in place of samples, would be the means of no model."""
    dbn = DBN(widths=(3, 2))
    params = random_stack(dbn, (4, 3))
    low, top = (jax.tree.map(lambda x: 2 * np.asarray(x, np.float64), p) for p in params)
    doubled = [jax.tree.map(lambda x: 2 * x, p) for p in params]
    found = dbn.generate(doubled, KEY, 20000, steps=60).mean(0)
    expected, total = np.zeros(4), 0.0
    for h in itertools.product((0, 1), repeat=3):
        h = np.array(h)
        chance = np.exp(top["visible_bias"] @ h)
        chance *= np.prod(1 + np.exp(top["hidden_bias"] + h @ top["kernel"]))
        expected += chance * sigmoid(low["visible_bias"] + low["kernel"] @ h)
        total += chance
    np.testing.assert_allclose(found, expected / total, atol=0.015)


def test_machines_of_a_generative_stack_learn_samples_of_the_features_below():
    """Their mean, the feature itself, is what other stacks learn."""
    x = jax.random.uniform(KEY, (6, 3, 3))
    below = random_stack(DBN(widths=(5, 4)), (9, 5))
    apply = DBN(widths=(5, 4), samples=True).layer(1, below[:1]).apply
    state = {"own": {}, "below": below[:1]}
    linear = below[1] | {"kernel": 0 * below[1]["kernel"]}  # whose energy is linear in the features
    energy = jax.vmap(lambda key: apply(linear, state, x, key=key, train=True)[0].positive)
    drawn = energy(jax.random.split(KEY, 4000))
    mean = apply(linear, state, x)[0].positive
    assert np.all(np.asarray(drawn.std(0)) > 0.1)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.06)


def test_wake_and_sleep_losses_are_those_of_a_naive_pass():
    dbn = DBN(widths=(3, 2))
    params = random_stack(dbn, (4, 3))
    # Logits that are odd multiples of 30: every sample is certain, whatever the random numbers.
    params = [
        {name: (60 if name == "kernel" else 30) * jnp.sign(p) for name, p in layer.items()}
        for layer in params
    ]
    x = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=4)))
    model = up_down(dbn, params, k=2)
    start, state = model.init(KEY, x)
    losses = model.apply(start, state, x, key=KEY, train=True)[0]
    lower, top = ({n: np.asarray(v, np.float64) for n, v in p.items()} for p in params)

    def certain(logits):
        assert (np.abs(logits) > 10).all()
        return (logits > 0).astype(float)

    def cost(logits, target):
        return np.logaddexp(0, logits).sum(1) - (target * logits).sum(1)

    def free(v):
        return -v @ top["visible_bias"] - np.logaddexp(
            0, top["hidden_bias"] + v @ top["kernel"]
        ).sum(1)

    v = np.asarray(x, np.float64)
    wake = certain(lower["hidden_bias"] + v @ lower["kernel"])
    asleep = wake
    for _ in range(2):
        h = certain(top["hidden_bias"] + asleep @ top["kernel"])
        asleep = certain(top["visible_bias"] + h @ top["kernel"].T)
    seen = certain(lower["visible_bias"] + asleep @ lower["kernel"].T)
    expected = free(wake) - free(asleep)
    expected += cost(lower["visible_bias"] + wake @ lower["kernel"].T, v)
    expected += cost(lower["hidden_bias"] + seen @ lower["kernel"], asleep)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, merged(start), params)


def test_each_of_the_three_losses_moves_its_own_weights_only():
    dbn = DBN(widths=(3, 2))
    params = random_stack(dbn, (4, 3))
    model = up_down(dbn, params)
    x = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=4)))
    start, state = model.init(KEY, x)
    objective = Objective(model, as_loss, state, {"image": x}, key=KEY)
    grads = objective.grad(start)
    # Generative weights: wake-phase delta rule, from the same samples.
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    other = jax.tree.map(jnp.copy, start)
    other["up"][0]["bias"] = other["up"][0]["bias"] + 1e-4
    again = objective.grad(other)
    np.testing.assert_allclose(again["down"][0]["kernel"], grads["down"][0]["kernel"], atol=1e-3)


def digits(split, count=None):
    batch = next(iter(jdl.data.digits(split, batch_size=1438 if split == "train" else 359)))
    return batch["image"][:count].astype(np.float32) / 255, batch["label"][:count]


@pytest.mark.slow
def test_pretraining_gentle_fine_tuning_and_both_unrolled_nets(tmp_path):
    x, y = digits("train")
    data = jdl.data.from_arrays(x, y, batch_size=64, seed=0)
    dbn = DBN(widths=(64, 32))
    options = {"optimizer": lambda i: momentum_switch(0.5, after=100), "log_every": 500} | ONE
    params = pretrain(dbn, data, steps=600, workdir=tmp_path, **options)
    again = pretrain(dbn, data, steps=600, workdir=tmp_path, **options)  # goes on, so does nothing
    jax.tree.map(np.testing.assert_array_equal, again, params)

    held, labels = digits("test")
    test = jdl.data.from_arrays(held, labels, batch_size=359, epochs=1)
    net, start = dbn.unrolled_autoencoder(params)
    before = jdl.autoencoder(starting_at(net, start), "adam", **ONE).initialize(data).evaluate(test)
    blank = jdl.autoencoder(net, "adam", **ONE).initialize(data).evaluate(test)
    assert before["squared_error"] < 0.6 * blank["squared_error"]
    mean_image = np.square(held - x.mean(0)).sum((1, 2, 3)).mean()
    assert before["squared_error"] < mean_image

    net, start = dbn.unrolled_mlp(params, 10)
    gentle = optax.chain(optax.adam(1e-2), slower_layers({"Dense_0": 0.1, "Dense_1": 0.3}))
    tuned = jdl.classifier(starting_at(net, start), gentle, log_every=500, **ONE).train(
        data, steps=600
    )
    assert tuned.evaluate(test)["accuracy"] > 0.9
    dreams = dbn.generate(params, KEY, 5, steps=50)
    assert dreams.shape == (5, 64)
    assert 0 <= float(dreams.min()) <= float(dreams.max()) <= 1


@pytest.mark.slow
def test_up_down_is_trained_by_the_estimator():
    x, _ = digits("train")
    data = jdl.data.from_arrays((x > 0.5).astype(np.float32), batch_size=64, seed=0)
    dbn = DBN(widths=(32, 16))
    params = pretrain(dbn, data, steps=30, log_every=100, **ONE)
    model = up_down(dbn, params)
    estimator = jdl.Estimator(model, as_loss, optax.adam(1e-2), log_every=400, **ONE)
    estimator.initialize(data)

    def misfit(params):
        """Cross-entropy of the images, up by R and down by G."""
        p, h = in_numpy(params), (x > 0.5).reshape(len(x), -1).astype(float)
        seen = h
        for r in p["up"]:
            h = sigmoid(r["bias"] + h @ r["kernel"])
        for g in reversed(p["down"]):
            h = sigmoid(g["bias"] + h @ g["kernel"].T)
        return -np.mean(np.log(np.where(seen > 0, h, 1 - h)).sum(1))

    before = misfit(estimator.params)
    after = misfit(estimator.train(data, steps=400).params)
    assert after < 0.9 * before
    assert dbn.features(merged(estimator.params), jnp.asarray(x[:3])).shape == (3, 16)


def test_mistakes_are_reported():
    dbn = DBN(widths=(5, 4))
    params = random_stack(dbn, (9, 5))
    with pytest.raises(check.ArgumentError, match="of 2 layers"):
        dbn.features(params[:1], jnp.ones((1, 9)))
    with pytest.raises(check.ArgumentError, match="of 8 visible units"):
        dbn.features(params, jnp.ones((1, 8)))
    with pytest.raises(check.ArgumentError, match="widths"):
        DBN(widths=())
    with pytest.raises(check.ArgumentError, match="of the model's shapes"):
        starting_at(MLP((3,)), {"Dense_0": 1.0}).init(KEY, jnp.ones((1, 4)))
    with pytest.raises(check.ArgumentError, match="label"):
        dbn.generate(params, KEY, 2, label=jnp.zeros(2, int))
    with pytest.raises(check.ArgumentError, match="binary"):
        up_down(DBN(widths=(5,), visible="gaussian"), params[:1])
    for wrong in ({"temperature": 0.0}, {"guidance": -1.0}):
        with pytest.raises(check.ArgumentError, match=next(iter(wrong))):
            dbn.generate(params, KEY, 2, **wrong)
    with pytest.raises(check.ArgumentError, match="temperature"):
        DBN(widths=(5,), visible="gaussian").generate(params[:1], KEY, 2, temperature=0.5)
    with pytest.raises(check.ArgumentError, match="layer"):
        slower_layers({"Dense_9": 0.1}).init({"Dense_0": 1.0})
