"""Muon: PyTorch's numbers, and which parameters are whose."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdl
from jdl import losses
from jdl.core.check import ArgumentError
from jdl.core.objective import Objective
from jdl.optim import by_name, diagnostics, muon
from jdl.optim.kronecker import told
from tests.optim.test_soap import REFERENCE, after, arrays, finite, worked


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_ten_steps_are_those_of_torch(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        theirs = REFERENCE["muon"]["options"]
        names = ("square", "another", "wide")
        start, *gradients = (
            {k: jnp.asarray(x[k], dtype) for k in names}
            for x in (REFERENCE["start"], *REFERENCE["gradients"][:10])
        )
        optimizer = muon(
            theirs["lr"],
            beta=theirs["momentum"],
            nesterov=False,
            weight_decay=theirs["weight_decay"],
            eps=theirs["eps"],
        )
        params, _ = after(optimizer, start, gradients)
        for name, expected in REFERENCE["muon"]["10"].items():
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=tolerance)


class Words(nn.Module):
    """Eight words, eight features, eight classes: shapes tell nothing."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(8, 8)(tokens)
        x = x + self.param("table", nn.initializers.normal(), (4, 8))[None]
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.relu(nn.Conv(8, (3,))(x))
        return nn.Dense(8)(nn.LayerNorm()(x)).mean(axis=1)


def words():
    model = jdl.from_linen(Words())
    batch = {"x": jnp.zeros((3, 4), jnp.int32), "label": jnp.zeros(3, jnp.int32)}
    params, state = model.init(jax.random.key(0), batch["x"])
    return Objective(model, losses.softmax_cross_entropy, state, batch, inputs="x"), params


def test_the_model_tells_hidden_kernels_from_embeddings_and_the_head():
    objective, params = words()
    with told(objective, params):
        numbers = muon().init(params).axes.numbers
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): (n.reduction_axis, n.output_axis)
        for (path, _), n in zip(jax.tree_util.tree_leaves_with_path(params), numbers, strict=True)
        if n is not None
    }
    heads = {f"MultiHeadDotProductAttention_0.{x}.kernel": ((0,), (1, 2))
             for x in ("query", "key", "value")}  # fmt: skip
    assert found == {
        **heads,
        "MultiHeadDotProductAttention_0.out.kernel": ((0, 1), (2,)),
        "Conv_0.kernel": ((0, 1), (2,)),
    }


def test_a_hidden_layer_before_a_relu_is_no_head():
    def predict(p, batch):
        return nn.relu(batch["x"] @ p["hidden"]) @ p["last"]

    batch = {"x": jnp.ones((5, 3)), "label": jnp.ones((5, 3))}
    params = {"hidden": jnp.ones((3, 3)), "last": jnp.ones((3, 3))}
    with told(Objective.from_fns(predict, losses.squared_error, batch), params):
        hidden, last = muon().init(params).axes.numbers
    assert hidden == optax.contrib.MuonDimensionNumbers((0,), (1,))
    assert last is None


def test_adam_has_its_own_rate_which_follows_muons_schedule():
    params = {"embedding": jnp.ones((3, 2)), "kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradients = [jax.tree.map(lambda x, i=i: (i + 1.0) * x, params) for i in range(4)]
    schedule = lambda count: 0.02 / (1.0 + count)  # noqa: E731
    for rate in (0.02, schedule):
        ours, _ = after(muon(rate, adam_learning_rate=0.01), params, gradients)
        adams = schedule if callable(rate) else lambda count: 0.02
        alone = optax.adamw(lambda count, f=adams: 0.5 * f(count), nesterov=True, weight_decay=0.0)
        theirs, _ = after(alone, params, gradients)
        for name in ("embedding", "bias"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)
        assert float(jnp.max(jnp.abs(ours["kernel"] - theirs["kernel"]))) > 1e-3


def test_a_gradient_that_is_not_finite_is_left_out():
    start, *gradients = (arrays(x) for x in (REFERENCE["start"], *REFERENCE["gradients"][:3]))
    broken = dict(gradients[0], wide=jnp.full((2, 4), jnp.nan))
    optimizer = muon()
    params, _ = after(optimizer, start, gradients)
    again, state = after(optimizer, start, [broken, *gradients])
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert int(diagnostics.read(state).left_out) == 1
    for tiny in (0.0, 1e-20, 1e-30, 1e18):
        small = [jax.tree.map(lambda x, s=tiny: s * x, g) for g in gradients]
        params, state = after(optimizer, start, small)
        assert finite((params, state.inner))


def test_map_params_sees_the_moments():
    params = arrays(REFERENCE["start"])
    optimizer = by_name("muon")
    mapped = optax.tree.map_params(
        optimizer, lambda x: "a moment", optimizer.init(params), transform_non_params=lambda _: None
    )
    assert jax.tree.leaves(mapped).count("a moment") == 3 + 2 * 1  # mu of 3; mu and nu of 1


def test_options_out_of_range_are_named():
    for options in ({"beta": 1.0}, {"adam_learning_rate": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ArgumentError, match=f"`{next(iter(options))}`"):
            muon(**options)


def test_work_is_that_of_newton_schulz():
    of_w, of_v = 5 * (2 * 9 * 4 + 27), 5 * (2 * 4 * 4 + 8)  # of 3 × 4 and 4 × 2
    assert worked(muon(0.01), steps=2) == pytest.approx(2 * (of_w + of_v), rel=1e-5)
