"""Layers found in jaxprs, their second moments, and draws from output Hessians."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdl
from jdl import losses
from jdl.core import tree
from jdl.core.objective import Objective
from jdl.models import CNN, RNN
from jdl.optim import kronecker, quadratic
from jdl.optim.kronecker import factors, layers, moments
from jdl.optim.kronecker.probes import Probe, probed


def names_of(params):
    return [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]


def found_in(model, x):
    """{kernel: its bias} and {leaf: why not} of a model, by name."""
    key = jax.random.key(0)
    params, state = jax.eval_shape(model.init, key, x)  # shapes are all it takes
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    found = layers.find(lambda p: model.apply(p, state, x, key=key, train=True)[0], params)
    names = names_of(params)
    known = {
        names[i]: None if layer.bias is None else names[layer.bias]
        for i, layer in found.known.items()
    }
    return known, {names[i]: why for i, why in found.unknown.items()}, names


def nnx_rnn(cell):
    return jdl.from_nnx(lambda rngs: nnx.RNN(cell(3, 4, rngs=rngs), rngs=rngs))


RECURRENT = {
    "SimpleCell": lambda: jdl.from_linen(nn.RNN(nn.SimpleCell(4))),
    "GRUCell": lambda: jdl.from_linen(nn.RNN(nn.GRUCell(4))),
    "LSTMCell": lambda: jdl.from_linen(nn.RNN(nn.LSTMCell(4))),
    "OptimizedLSTMCell": lambda: jdl.from_linen(nn.RNN(nn.OptimizedLSTMCell(4))),
    "stacked": lambda: jdl.from_linen(RNN(hidden=4, layers=2)),
    "nnx LSTM": lambda: nnx_rnn(nnx.LSTMCell),
    "nnx GRU": lambda: nnx_rnn(nnx.GRUCell),
    "nnx packed LSTM": lambda: nnx_rnn(nnx.OptimizedLSTMCell),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_kernels_and_biases_are_always_factored(name):
    known, unknown, names = found_in(RECURRENT[name](), jnp.ones((2, 5, 3)))
    assert unknown == {}
    assert {*known, *filter(None, known.values())} == set(names)
    assert {n for n in names if "bias" not in n} == set(known)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.remat(nn.Dense)(5, name="remat")(x)
        x = nn.Conv(5, (3, 3), feature_group_count=5, name="depthwise")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3, use_bias=False, name="outputs")(x)


def test_dense_and_convolution_are_found_and_the_rest_is_named_with_its_reason():
    known, unknown, _ = found_in(jdl.from_linen(Net()), jnp.ones((2, 8, 8, 3)))
    assert known == {
        "['conv']['kernel']": "['conv']['bias']",
        "['remat']['kernel']": "['remat']['bias']",
        "['depthwise']['kernel']": "['depthwise']['bias']",
        "['outputs']['kernel']": None,
    }
    assert unknown["['norm']['scale']"] == "used by mul"
    assert set(unknown) == {"['norm']['scale']", "['norm']['bias']"}
    known, unknown, _ = found_in(jdl.from_linen(CNN(units=8)), jnp.ones((2, 8, 8, 1)))
    assert len(known) == 4
    assert all(known.values())
    assert unknown == {}


def test_what_plain_functions_do_with_their_parameters():
    x, h = jnp.ones((5, 3)), jnp.ones((5, 2))

    def find(predict, **params):
        found = layers.find(predict, params)
        names = sorted(params)
        biases = {i: layer.bias for i, layer in found.known.items()}
        known = {names[i]: b if b is None else names[b] for i, b in biases.items()}
        return known, {names[i]: why for i, why in found.unknown.items()}

    w, u, b = jnp.ones((3, 4)), jnp.ones((2, 4)), jnp.ones(4)
    known, _ = find(lambda p: x @ p["w"] + h @ p["u"] + p["b"][None], w=w, u=u, b=b)
    assert set(known) == {"u", "w"}
    assert list(known.values()).count("b") == 1  # it joins one of the two
    known, _ = find(lambda p: jax.jit(lambda q: x @ q.T)(p["w"]), w=w.T)
    assert known == {"w": None}
    assert find(lambda p: jnp.tanh(x @ p["w"]) @ p["w"].T, w=w)[0] == {"w": None}
    square = find(lambda p: x @ p["w"] + jnp.sum(x.reshape(-1, 1) @ p["w"].reshape(1, -1)), w=w)
    assert square == ({}, {"w": "used in products of several shapes"})
    assert find(lambda p: x @ jnp.exp(p["w"]), w=w) == ({}, {"w": "used by exp"})
    assert find(lambda p: x @ (p["w"] @ p["v"]), w=w, v=w.T)[0] == {}
    assert find(lambda p: p["w"], w=w) == ({}, {"w": "an output of the model"})
    assert find(lambda p: x, w=w) == ({}, {"w": "not used by the model"})
    assert find(lambda p: x @ p["w"], w=w[:, 0]) == ({"w": None}, {})
    shared = find(lambda p: x @ p["w"] + x @ p["v"] @ p["w"] + p["b"][None], w=w, b=b, v=w @ w.T)
    assert shared[0]["w"] is None  # not added once for each use
    one_bias = find(lambda p: jnp.tanh(x @ p["w"] + p["b"][None]) * p["b"][None], w=w, b=b)
    assert one_bias == ({"w": None}, {"b": "used by mul"})
    branch = find(lambda p: jax.lax.cond(True, lambda q: x @ q, lambda q: 2 * x @ q, p["w"]), w=w)
    assert branch == ({"w": None}, {})
    assert find(lambda p: x @ p["w"] + jnp.tanh(x @ p["w"] + p["b"][None]), w=w, b=b)[0] == {
        "w": None
    }


# ------------------------------------------------------------------ second moments


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def zeros_for(found, **options):
    """Probes of zeros for the layers found, one a way."""
    probes = {}
    for i, layer in found.known.items():
        first, last = map(jnp.zeros, factors.sides(layer, factors.Options(**options)))
        probes[i] = (Probe(first, last, jnp.zeros(first.shape[:1])),) * len(layer.ways)
    return probes


def moments_of(predict, params, weights, mask=None, **options):
    """The raw probes of Σ ⟨weights, predict⟩, whose output gradients are `weights` themselves."""
    found = layers.find(predict, params)
    examples = None if mask is None else len(mask)

    def f(probes):
        outputs = probed(predict, params, found, probes, {}, mask, examples=examples, **options)
        return jnp.sum(weights * outputs)

    probes = zeros_for(found)
    np.testing.assert_allclose(  # the outputs themselves are untouched
        probed(predict, params, found, probes, {}), predict(params), rtol=1e-6
    )
    got = jax.jit(jax.grad(f))(probes)
    return {i: jax.tree.map(lambda x: x[0], p[0]) for i, p in got.items()}, found


def gram(a):
    a = np.asarray(a, np.float64)
    return a.T @ a


def test_moments_of_a_dense_layer_are_those_of_numpy():
    x, g, mask = numbers(7, 3), numbers(7, 2, seed=1), jnp.array([1, 1, 0, 1, 1, 0, 1.0])
    params = {"b": jnp.zeros(2), "w": numbers(3, 2, seed=2)}
    got, _ = moments_of(lambda p: x @ p["w"] + p["b"][None], params, g * mask[:, None], mask)
    bordered = np.concatenate([x, np.ones((7, 1))], axis=1)[np.asarray(mask) > 0]
    np.testing.assert_allclose(got[1].first, gram(bordered), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1].last, gram(g[np.asarray(mask) > 0]), rtol=1e-5, atol=1e-5)
    assert float(got[1].rows) == 5
    # without a bias the last coordinate is apart, and x may have more axes than two
    y, h = numbers(4, 5, 3), numbers(4, 5, 2, seed=1)
    got, _ = moments_of(lambda p: y @ p["w"], {"w": params["w"]}, h)
    np.testing.assert_allclose(got[0].first[:3, :3], gram(y.reshape(-1, 3)), rtol=1e-5)
    assert not np.any(got[0].first[3])
    assert float(got[0].rows) == 20


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [((1, 1), "SAME", (1, 1)), ((2, 1), "VALID", (1, 1)), ((1, 2), ((1, 0), (2, 1)), (2, 1))],
)
def test_moments_of_a_convolution_are_those_of_its_patches(strides, padding, dilation, canonical):
    from jdl.models.convolution import conv_general_dilated

    conv = conv_general_dilated if canonical else jax.lax.conv_general_dilated
    x, kernel = numbers(3, 6, 7, 2), numbers(3, 2, 2, 4, seed=1)
    options = {
        "window_strides" if not canonical else "strides": strides,
        "padding": padding,
        "rhs_dilation": dilation,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }

    def predict(p):
        return conv(x, p["kernel"], **options) + p["bias"][None, None, None]

    params = {"kernel": kernel, "bias": jnp.zeros(4)}
    g = numbers(*predict(params).shape, seed=2)
    got, found = moments_of(predict, params, g)
    assert (found.known[1].kind, found.known[1].bias) == ("conv", 0)
    patches = jax.lax.conv_general_dilated_patches(
        x,
        (3, 2),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # theirs are ordered channels first
    rows = patches.reshape(-1, 2, 6).transpose(0, 2, 1).reshape(-1, 12)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    np.testing.assert_allclose(got[1].first, gram(rows), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1].last, gram(g.reshape(-1, 4)), rtol=1e-4, atol=1e-4)
    assert float(got[1].rows) == len(rows) == found.known[1].rows


def test_thinned_patches_estimate_the_same_moments():
    x, g = numbers(4, 24, 24, 1), numbers(4, 24, 24, 2, seed=1)
    params = {"w": numbers(3, 3, 1, 2)}

    def predict(p):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    whole, _ = moments_of(predict, params, g)
    some, _ = moments_of(predict, params, g, max_rows=600)
    assert float(some[0].rows) == 4 * 12 * 12
    a, b = whole[0], some[0]
    scale = float(jnp.trace(a.first) / a.rows)
    np.testing.assert_allclose(a.first / a.rows, b.first / b.rows, atol=0.1 * scale)
    np.testing.assert_allclose(a.last, b.last, atol=0.15 * float(jnp.max(a.last)))


@pytest.mark.parametrize("packed", [False, True])
def test_moments_of_a_scan_are_those_of_the_unrolled_loop(packed):
    x = numbers(4, 6, 3)  # T, B, F
    params = {"u": 0.5 * numbers(2, 2, seed=1), "w": numbers(3, 2, seed=2), "b": numbers(2, seed=3)}

    def step(p, h, x):
        if packed:  # two kernels side by side, as fused cells have them
            both = x @ jnp.concatenate([p["w"], p["w2"]], axis=1)
            y = both[:, :2] + both[:, 2:]
        else:
            y = x @ p["w"]
        return jnp.tanh(y + h @ p["u"] + p["b"][None])

    if packed:
        params["w2"] = numbers(3, 2, seed=4)

    def scanned(p):
        h, _ = jax.lax.scan(lambda h, x: (step(p, h, x), None), jnp.zeros((6, 2)), x)
        return h

    def looped(p):
        h = jnp.zeros((6, 2))
        for row in x:
            h = step(p, h, row)
        return h

    g = numbers(6, 2, seed=5)
    got, found = moments_of(scanned, params, g)
    same, _ = moments_of(looped, params, g)
    assert found.known[1].rows == 24
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, same)
    kernel = names_of(params).index("['w']")
    np.testing.assert_allclose(got[kernel].first[:3, :3], gram(x.reshape(-1, 3)), rtol=1e-4)


def test_columns_cut_from_one_kernel_fill_their_block():
    x, g = numbers(5, 3), numbers(5, 4, seed=1)
    got, _ = moments_of(
        lambda p: jnp.concatenate([x @ p["w"][:, :1], x @ p["w"][:, 1:]], axis=1),
        {"w": numbers(3, 4, seed=2)},
        g,
    )
    want = gram(g)
    want[0, 1:] = want[1:, 0] = 0
    np.testing.assert_allclose(got[0].last, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[0].first[:3, :3] / got[0].rows, gram(x) / 5, rtol=1e-5)


def test_functions_that_hide_their_product_are_tagged():
    x, g = numbers(5, 3), numbers(5, 2, seed=1)
    params = {"b": jnp.ones(2), "w": numbers(3, 2, seed=2)}

    @jax.custom_vjp
    def hidden(x, w, b):
        return x @ w + b[None]

    hidden.defvjp(
        lambda x, w, b: (hidden(x, w, b), (x, w)),
        lambda kept, g: (g @ kept[1].T, kept[0].T @ g, jnp.sum(g, axis=0)),
    )

    def plain(p):
        return x @ p["w"] + p["b"][None]

    def tagged(p):
        return kronecker.tag_dense(hidden(x, p["w"], p["b"]), x, p["w"], p["b"])

    def doubly(p):  # a product in the open, tagged as well, counts once
        return kronecker.tag_dense(x @ p["w"] + p["b"][None], x, p["w"], p["b"])

    assert layers.find(lambda p: hidden(x, p["w"], p["b"]), params).known == {}
    want, _ = moments_of(plain, params, g)
    for predict in (tagged, doubly):
        got, found = moments_of(predict, params, g)
        assert found.known[1].bias == 0
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
        grads = [jax.grad(lambda p, f=f: jnp.sum(f(p) * g))(params) for f in (predict, plain)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *grads)
    image, kernel = numbers(2, 5, 5, 1), numbers(3, 3, 1, 2)

    def conv(p):
        return jax.lax.conv_general_dilated(
            image, p["w"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def tagged_conv(p):  # a kernel that is rescaled first, which nothing could see through
        y = 0.5 * conv({"w": 2.0 * p["w"]})
        return kronecker.tag_conv(y, image, p["w"], strides=(2, 2), padding=((1, 1), (1, 1)))

    assert layers.find(lambda p: conv({"w": 2.0 * p["w"]}), {"w": kernel}).known == {}
    g = numbers(2, 3, 3, 2)
    want, _ = moments_of(conv, {"w": kernel}, g)
    got, found = moments_of(tagged_conv, {"w": kernel}, g)
    assert found.known[0].kind == "conv"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


# ------------------------------------------------------------------ through an objective


def linear(p, batch):
    return batch["x"] @ p["w"] + p["b"][None]


def linear_objective(loss, mask=False, **options):
    batch = {"x": numbers(8, 3), "label": jax.nn.sigmoid(numbers(8, 2, seed=1))}
    if mask:
        batch["mask"] = jnp.array([1, 0, 1, 1, 1, 0, 1, 1.0])
    return Objective.from_fns(linear, loss, batch, **options)


def factors_of(objective, params, **options):
    found = moments.find_layers(objective, params)
    probes = {i: p[0] for i, p in zeros_for(found).items()}
    drawn = jax.jit(
        lambda o, p, key: moments.second_moments(o, p, found, probes, {}, key, **options)[0][1]
    )(objective, params, jax.random.key(0))
    return jax.tree.map(lambda x: x[0], drawn)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_of_one_linear_layer_the_factors_are_the_exact_gauss_newton_matrix(mask, microbatches):
    # Where the outputs' Hessian is the same for all examples the Kronecker product is exact.
    params = {"b": numbers(2, seed=3), "w": numbers(3, 2, seed=2)}
    objective = linear_objective(losses.squared_error, mask, microbatches=microbatches)
    probe = factors_of(objective, params, curvature="gauss_newton")
    product = np.kron(probe.first, probe.last)  # rows of [w; b], then columns
    flat = jnp.concatenate([params["w"], params["b"][None]])

    def f(flat):
        return objective.value({"w": flat[:3].reshape(3, 2), "b": flat[3]})

    truth = jax.jit(jax.hessian(f))(flat).reshape(8, 8)
    np.testing.assert_allclose(product, truth, rtol=1e-4, atol=1e-5)


def test_softmax_at_equal_outputs_is_exact_too():
    batch = {"x": numbers(8, 3), "label": jnp.arange(8) % 2}
    objective = Objective.from_fns(linear, losses.softmax_cross_entropy, batch)
    params = {"b": jnp.zeros(2), "w": jnp.zeros((3, 2))}
    probe = factors_of(objective, params, curvature="gauss_newton")

    def f(flat):
        return objective.value({"w": flat[:3], "b": flat[3]})

    truth = jax.jit(jax.hessian(f))(jnp.zeros((4, 2))).reshape(8, 8)
    np.testing.assert_allclose(np.kron(probe.first, probe.last), truth, rtol=1e-4, atol=1e-6)


def test_drawn_factors_average_to_the_exact_ones_and_empirical_ones_to_numpys():
    params = {"b": numbers(2, seed=3), "w": numbers(3, 2, seed=2)}
    objective = linear_objective(losses.sigmoid_cross_entropy)
    found = moments.find_layers(objective, params)
    probes = {1: zeros_for(found)[1][0]}

    @jax.jit
    def mean(keys):
        draw = lambda key: moments.second_moments(objective, params, found, probes, {}, key)[0][1]  # noqa: E731
        return jax.tree.map(lambda x: jnp.mean(x, axis=0)[0], jax.lax.map(draw, keys))

    drawn = mean(jax.random.split(jax.random.key(0), 3000))
    exact = factors_of(objective, params, curvature="gauss_newton")
    np.testing.assert_allclose(drawn.last, exact.last, atol=0.01)
    np.testing.assert_allclose(drawn.first, exact.first, rtol=1e-4)
    empirical = factors_of(objective, params, curvature="empirical_fisher")
    z = np.asarray(linear(params, objective.batch), np.float64)
    g = 1 / (1 + np.exp(-z)) - np.asarray(objective.batch["label"])
    np.testing.assert_allclose(empirical.last, g.T @ g / 8, rtol=1e-5)


def test_the_quadratic_model_agrees_with_finite_differences_and_gauss_newton_products():
    with jax.enable_x64(True):
        params = {"b": numbers(2), "w": numbers(3, 2, seed=2), "v": numbers(2, 2, seed=3)}
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        batch = {"x": numbers(8, 3), "label": jax.nn.sigmoid(numbers(8, 2, seed=1))}
        batch = jax.tree.map(lambda x: x.astype(jnp.float64), batch)
        batch["mask"] = jnp.array([1, 0, 1, 1, 1, 0, 1, 1.0])
        objective = Objective.from_fns(
            lambda p, b: jnp.tanh(linear(p, b)) @ p["v"],
            losses.sigmoid_cross_entropy,
            batch,
            regularizer=lambda p: jnp.sum(p["w"] ** 4),
            microbatches=2,
        )
        vectors = [jax.tree.map(lambda x, i=i: jnp.cos(i + x), params) for i in (1, 2)]
        model = jax.jit(quadratic.quadratic)(objective, params, vectors)

        @jax.jit
        def f(t, v):
            return objective.value(jax.tree.map(lambda p, v: p + t * v, params, v))

        for i, v in enumerate(vectors):
            difference = (f(1e-5, v) - f(-1e-5, v)) / 2e-5
            np.testing.assert_allclose(model.slopes[i], difference, rtol=1e-7)
            product = jax.jit(objective.gnvp)(params, v)
            for j, w in enumerate(vectors):
                inner = tree.vdot(product, w)
                np.testing.assert_allclose(model.curvature[j, i], inner, rtol=1e-9)
        np.testing.assert_allclose(model.value, objective.value(params), rtol=1e-12)


def test_rows_are_spread_over_the_batch():
    batch = {"x": jnp.arange(12.0), "y": jnp.zeros(12)}
    objective = Objective.from_fns(lambda p, b: p * b["x"], lambda o, b: o, batch)
    assert quadratic.subset(objective, 5).batch["x"].tolist() == [0, 2, 4, 6, 8]
    assert len(quadratic.subset(objective, 99).batch["x"]) == 12
    sliced = Objective.from_fns(lambda p, b: p, lambda o, b: o, batch, microbatches=4)
    few = quadratic.subset(sliced, 5)
    assert (len(few.batch["x"]), few.microbatches) == (4, 2)
