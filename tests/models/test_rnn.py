"""Recurrent nets: masks, streaming, initialization, text, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import losses
from jdl.core import check
from jdl.data import from_arrays
from jdl.models import RNN, LanguageModel, sequences
from jdl.models.rnn import CELLS, echo_init, generate, next_step_loss, spectral_radius


def net_and_inputs(**options):
    net = RNN(**{"num_outputs": 3, "hidden": 4, **options})
    x = jax.random.normal(jax.random.key(0), (3, 6, 2))
    return net, net.init(jax.random.key(1), x), x


def by_hand(cell, p, x):
    """One sequence's states, from the papers' equations."""
    dot = lambda name, v: v @ p[name]["kernel"] + p[name].get("bias", jnp.zeros(()))  # noqa: E731
    h = c = jnp.zeros(4)
    states = []
    for row in x:
        if cell == "vanilla":
            h = jnp.tanh(dot("i", row) + dot("h", h))
        elif cell == "gru":
            r = jax.nn.sigmoid(dot("ir", row) + dot("hr", h))
            z = jax.nn.sigmoid(dot("iz", row) + dot("hz", h))
            n = jnp.tanh(dot("in", row) + r * dot("hn", h))
            h = (1 - z) * n + z * h
        else:
            i, f, o = (jax.nn.sigmoid(dot("i" + g, row) + dot("h" + g, h)) for g in "ifo")
            c = f * c + i * jnp.tanh(dot("ig", row) + dot("hg", h))
            h = o * jnp.tanh(c)
        states.append(h)
    return jnp.stack(states)


@pytest.mark.parametrize("cell", CELLS)
def test_equals_its_equations(cell):
    with jax.numpy_rank_promotion("allow"):
        net, variables, x = net_and_inputs(cell=cell)
        p = variables["params"]
        cells = p["layer_0"]
        states = jnp.stack([by_hand(cell, cells, row) for row in x])
        expected = states[:, -1] @ p["outputs"]["kernel"] + p["outputs"]["bias"]
    np.testing.assert_allclose(net.apply(variables, x), expected, atol=1e-5)
    np.testing.assert_allclose(net.apply(variables, x, method="states"), states, atol=1e-5)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("vanilla", {}),
        ("gru", {"every_step": True}),
        ("lstm", {"layers": 2, "bidirectional": True}),
        ("gru", {"bidirectional": True, "every_step": True}),
    ],
)
def test_padding_changes_neither_outputs_nor_gradients(cell, options):
    net, variables, x = net_and_inputs(cell=cell, **options)
    lengths = np.array([6, 3, 1])
    junk = jnp.where(jnp.arange(6)[None, :, None] < lengths[:, None, None], x, 1e3)
    kept = np.arange(6)[None, :, None] < lengths[:, None, None]

    def value(variables, x):
        outputs = net.apply(variables, x, lengths)
        return jnp.sum(jnp.where(kept, outputs**2, 0.0) if net.every_step else outputs**2), outputs

    step = jax.jit(jax.value_and_grad(value, has_aux=True))
    (_, outputs), grads = step(variables, x)
    (_, others), other_grads = step(variables, junk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, other_grads)
    for i, length in enumerate(lengths):  # and each is what it is alone
        alone = jax.jit(net.apply)(variables, x[i : i + 1, :length])[0]
        found, other = outputs[i], others[i]
        if net.every_step:
            found, other = found[:length], other[:length]
        np.testing.assert_allclose(found, alone, atol=1e-6)
        np.testing.assert_allclose(other, alone, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_pieces_equal_the_whole(cell):
    net, variables, x = net_and_inputs(cell=cell, layers=2, every_step=True)
    carry, pieces = None, []
    stream = jax.jit(lambda x, carry: net.apply(variables, x, carry, method="stream"))
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        piece, carry = stream(x[:, start:stop], carry)
        pieces.append(piece)
    whole = jax.jit(net.apply)(variables, x)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-6)


def test_a_bidirectional_net_sees_both_ends():
    net, variables, x = net_and_inputs(bidirectional=True, every_step=True)
    changed = net.apply(variables, x.at[:, -1].add(1.0))
    assert np.all(np.abs(changed[:, 0] - net.apply(variables, x)[:, 0]).max(axis=-1) > 1e-5)
    with pytest.raises(check.ArgumentError, match="bidirectional"):
        net.apply(variables, x, method="stream")


@pytest.mark.parametrize("size", [5, 40])
def test_spectral_radius_equals_numpy(size):
    kernel = jax.random.normal(jax.random.key(size), (size, size))
    expected = np.abs(np.linalg.eigvals(np.asarray(kernel, np.float64))).max()
    np.testing.assert_allclose(jax.jit(spectral_radius)(kernel), expected, rtol=2e-3)


def test_the_echo_initializer_is_sparse_and_of_its_radius():
    kernel = echo_init(6, 1.2)(jax.random.key(0), (50, 50))
    assert ((kernel != 0).sum(axis=0) == 6).all()
    largest = np.abs(np.linalg.eigvals(np.asarray(kernel, np.float64))).max()
    assert largest == pytest.approx(1.2, rel=5e-3)
    _, variables, _ = net_and_inputs(cell="vanilla", recurrent_init=echo_init(2, 1.2))
    assert ((variables["params"]["layer_0"]["h"]["kernel"] != 0).sum(axis=0) == 2).all()


@pytest.mark.slow
def test_learns_a_text_and_says_it():
    tokens, alphabet = sequences.windows("the rain in spain. " * 40, 24, stride=5)
    net = RNN(
        num_outputs=len(alphabet),
        vocabulary=len(alphabet),
        hidden=32,
        cell="gru",
        every_step=True,
    )
    data = from_arrays(tokens, batch_size=32, shuffle=True, seed=0)
    estimator = jdl.Estimator(net, next_step_loss, optax.adam(1e-2)).train(data, steps=120)
    prompt = np.array([[alphabet.index(c) for c in "the ra"]])
    said = generate(net, estimator.params, prompt, 13, jax.random.key(0), temperature=0.0)
    assert "".join(alphabet[i] for i in said[0]) == "in in spain. "
    drawn = generate(net, estimator.params, prompt, 5, jax.random.key(0))
    np.testing.assert_array_equal(
        drawn, generate(net, estimator.params, prompt, 5, jax.random.key(0))
    )


def test_next_step_loss_leaves_padding_out():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 3))
    tokens = np.array([[0, 1, 2, 1, 0], [2, 2, 0, 0, 0]])
    found = next_step_loss(logits, {"tokens": tokens, "lengths": np.array([5, 3])})
    logp = np.asarray(jax.nn.log_softmax(logits))
    expected = [
        -np.mean([logp[i, t, tokens[i, t + 1]] for t in range(length - 1)])
        for i, length in enumerate([5, 3])
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    tokens[1, 2] = -1  # no token
    found = jax.jit(next_step_loss)(logits, {"tokens": tokens, "lengths": np.array([5, 3])})
    assert np.isnan(found).tolist() == [False, True]


@pytest.mark.parametrize("junk", [np.nan, -1])
def test_what_lies_behind_a_sequences_end_has_no_part_in_its_gradient(junk):
    tokens = np.array([[0, 1, 2, 1], [2, 2, 0, 0]])
    lengths = np.array([4, 2])
    if np.isnan(junk):
        net, x = RNN(num_outputs=3, hidden=4, every_step=True), np.eye(3, dtype=np.float32)[tokens]
    else:
        net, x = RNN(num_outputs=3, hidden=4, every_step=True, vocabulary=3), tokens
    variables = net.init(jax.random.key(0), x)

    def value(variables, x, tokens):
        outputs = net.apply(variables, x, lengths)
        return jnp.mean(next_step_loss(outputs, {"tokens": tokens, "lengths": lengths}))

    dirty, other = x.copy(), tokens.copy()
    dirty[1, 2:], other[1, 2:] = junk, -7
    step = jax.jit(jax.value_and_grad(value))
    expected, found = step(variables, x, tokens), step(variables, dirty, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_outputs_behind_a_sequences_end_have_no_gradient():
    logits = jax.random.normal(jax.random.key(0), (1, 3, 4)).at[0, 2].set(jnp.nan)
    batch = {"tokens": np.array([[0, 1, -1]])}
    for options, more in (({"ignore": -1}, {}), ({}, {"lengths": np.array([2])})):
        loss = lambda z, o=options, m=more: next_step_loss(z, batch | m, **o)[0]  # noqa: E731
        value, slope = jax.value_and_grad(loss)(logits.at[0, 1].set(jnp.nan))
        assert float(value) == pytest.approx(-float(jax.nn.log_softmax(logits[0, 0])[1]))
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("lengths", [[0, 2], [2, 9]])
def test_lengths_that_are_none_are_an_error_and_nan_under_jit(lengths):
    wrong = np.array([1 <= n <= 3 for n in lengths]) == 0
    tokens, lengths = np.array([[0, 1, 2], [2, 1, 0]]), np.array(lengths)
    net = RNN(num_outputs=3, hidden=4, vocabulary=3, every_step=True)
    variables = net.init(jax.random.key(0), tokens)
    batch = {"tokens": tokens, "lengths": lengths}
    with pytest.raises(check.ArgumentError, match="`lengths` must be from 1 to 3"):
        next_step_loss(jnp.zeros((2, 3, 3)), batch)
    found = jax.jit(net.apply)(variables, tokens, lengths)
    np.testing.assert_array_equal(np.isnan(found).all((1, 2)), wrong)
    np.testing.assert_array_equal(np.isnan(jax.jit(next_step_loss)(found * 0, batch)), wrong)
    np.testing.assert_array_equal(
        np.isnan(jax.jit(next_step_loss)(jnp.zeros((2, 3, 3)), batch)), wrong
    )


@pytest.mark.parametrize("stray", [-1, 3])
def test_a_number_outside_the_vocabulary_is_an_error_and_nan_under_jit(stray):
    tokens = np.array([[0, 1, 2], [2, stray, 0]])
    for net in (
        RNN(num_outputs=3, hidden=4, vocabulary=3),
        LanguageModel(vocabulary=3, width=4, depth=1, heads=1),
    ):
        variables = net.init(jax.random.key(0), jnp.asarray(tokens * 0))
        with pytest.raises(check.ArgumentError, match=r"must be numbers in \[0, 3\), got values"):
            net.apply(variables, jnp.asarray(tokens))
        found = jax.jit(net.apply)(variables, tokens).reshape(2, -1)
        assert np.isnan(found).any(1).tolist() == [False, True]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_learns_to_add(cell):
    x, y = sequences.adding(4000, 12, np.random.default_rng(0))
    net = RNN(num_outputs=1, hidden=24, cell=cell)
    data = from_arrays(x, y, batch_size=50, shuffle=True, seed=0)
    estimator = jdl.Estimator(net, losses.squared_error, optax.adam(1e-2)).train(data, steps=300)
    held, sums = sequences.adding(200, 12, np.random.default_rng(1))
    outputs = estimator.predict(from_arrays(held, batch_size=200, epochs=1))
    assert np.mean((outputs - sums) ** 2) < 0.02  # 1/6 for one that knows nothing


def test_the_problems_are_what_they_say():
    rng = np.random.default_rng(0)
    x, y = sequences.adding(500, 20, rng)
    np.testing.assert_allclose((x[..., 0] * x[..., 1]).sum(1), y[:, 0], rtol=1e-6)
    assert np.mean((y - 1) ** 2) == pytest.approx(1 / 6, rel=0.15)
    x, y = sequences.temporal_order(50, 30, rng)
    symbols = x.argmax(-1)
    for row, label in zip(symbols, y, strict=True):
        first, second = row[row < 2]
        assert label == 2 * first + second


@pytest.mark.parametrize(
    "pair",
    [
        ([3, 1], [3.7]),
        (np.array([1], np.uint8), np.array([300, 2])),
        (np.array([1.5], np.float32), np.array([1, 2])),
    ],
)
def test_padding_keeps_every_number(pair):
    found = sequences.pad(pair)["image"]
    for row, sequence in zip(found, pair, strict=True):
        np.testing.assert_array_equal(row[: len(sequence)], sequence)


def test_padding_refuses_what_makes_no_array():
    with pytest.raises(check.ArgumentError, match=r"sequences\[1\]. must be of shape"):
        sequences.pad([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(check.ArgumentError, match=r"sequences\[1\]. must be of numbers"):
        sequences.pad([[1, 2], ["a"]])


def test_refuses_empty_and_overlong_sequences():
    net, variables, x = net_and_inputs()
    with pytest.raises(check.ArgumentError, match="at least one step"):
        sequences.pad([np.ones((2, 3)), np.ones((0, 3))])
    with pytest.raises(check.ArgumentError, match="at least one step"):
        net.apply(variables, x[:, :0])
    with pytest.raises(check.ArgumentError, match="lengths"):
        net.apply(variables, x, np.array([6, 0, 1]))
    with pytest.raises(check.ArgumentError, match="lengths"):
        net.apply(variables, x, np.array([6, 7, 1]))
    with pytest.raises(check.ArgumentError, match="vocabulary"):
        RNN(vocabulary=3).init(jax.random.key(0), x)
    with pytest.raises(check.ArgumentError, match="as many outputs"):
        generate(net, variables["params"], np.zeros((1, 1), int), 1, jax.random.key(0))
