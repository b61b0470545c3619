"""Generators against discriminators: blind groups, every game, scores against their formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import jdl
from jdl.core import check
from jdl.core.objective import Objective
from jdl.data import digits, from_arrays
from jdl.models import CNN, scores
from jdl.models.cnn import Block
from jdl.models.gan import GAN, Judged, optimizers, walk

SHAPE = (8, 8, 1)


def images(n=16, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, *SHAPE)).astype(np.float32)


def objective(gan, batch, inputs="image"):
    arrays = [batch[name] for name in ((inputs,) if isinstance(inputs, str) else inputs)]
    params, state = gan.model.init(jax.random.key(0), *map(jnp.asarray, arrays))
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    return params, Objective(
        gan.model, gan.loss, state, batch, key=jax.random.key(1), inputs=inputs
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("game", "penalty"), [("non_saturating", "r1"), ("hinge", None), ("wasserstein", "gradient")]
)
def test_each_group_is_blind_to_the_other(game, penalty):
    """The one loss's gradient is, group by group, that of each player's own loss alone."""
    gan = GAN.of_shape(SHAPE, width=4, latent=4, game=game, penalty=penalty)
    params, f = objective(gan, {"image": images()})
    grads = jax.jit(f.grad)(params)

    def own(loss, group):
        def value(part):
            outputs, _ = gan.model.apply(
                params | {group: part}, f.model_state, f.batch["image"], key=f.key, train=True
            )
            return jnp.mean(loss(outputs, f.batch))

        return jax.grad(value)(params[group])

    for loss, group in (
        (gan.generator_loss, "generator"),
        (gan.discriminator_loss, "discriminator"),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            grads[group],
            own(loss, group),
        )
    # And the other player's loss has no slope there at all.
    for loss, group in (
        (gan.discriminator_loss, "generator"),
        (gan.generator_loss, "discriminator"),
    ):
        assert all(not np.any(g) for g in jax.tree.leaves(own(loss, group)))


@pytest.mark.slow
def test_both_players_have_slopes_to_go_by():
    gan = GAN.of_shape(SHAPE, width=4, latent=4, penalty=None)
    params, f = objective(gan, {"image": images()})
    grads = jax.jit(f.grad)(params)
    for group in ("generator", "discriminator"):
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[group])) > 1e-6


def test_the_losses_are_their_formulas():
    real, fake = jnp.array([2.0, -0.5]), jnp.array([0.3, -3.0])
    judged = Judged(real, fake, fake, jnp.zeros(2))
    nets = GAN.of_shape(SHAPE)
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731

    def of(**options):
        gan = GAN(nets.generator, nets.discriminator, **options)
        return gan.discriminator_loss(judged, {}), gan.generator_loss(judged, {})

    d, g = of()
    np.testing.assert_allclose(d, -np.log(sigmoid(real)) - np.log(1 - sigmoid(fake)), rtol=1e-5)
    np.testing.assert_allclose(g, -np.log(sigmoid(fake)), rtol=1e-5)
    smooth, _ = of(smoothing=0.1)
    expected = -0.9 * np.log(sigmoid(real)) - 0.1 * np.log(1 - sigmoid(real))
    np.testing.assert_allclose(smooth, expected - np.log(1 - sigmoid(fake)), rtol=1e-5)
    d, g = of(game="hinge")
    np.testing.assert_allclose(d, [1.3, 1.5], rtol=1e-6)
    np.testing.assert_allclose(g, [-0.3, 3.0], rtol=1e-6)
    d, g = of(game="wasserstein")
    np.testing.assert_allclose(d, fake - real, rtol=1e-6)


def test_images_of_any_size_are_made_and_judged():
    """Of every side that photographs are reduced to, and of unequal sides."""
    for shape in [(n, n, 1) for n in (1, 3, *range(28, 65), 100)] + [(9, 50, 3), (41, 28, 1)]:
        gan = GAN.of_shape(shape, width=2, latent=4)

        def both(x, gan=gan):
            params, state = gan.model.init(jax.random.key(0), x)
            return params, state, gan.sample(params, state, jnp.zeros((2, 4)))

        x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        params, state, samples = jax.eval_shape(both, x)
        assert samples.shape == (2, *shape)
        judged, _ = jax.eval_shape(gan.model.apply, params, state, samples)
        assert judged.fake.shape == (2,)


@pytest.mark.parametrize("side", [36, 50])
def test_the_noise_reaches_the_last_row_and_column(side):
    gan = GAN.of_shape((side, side, 1), width=16, latent=4)
    x = jnp.zeros((1, side, side, 1))
    params, state = jax.jit(gan.model.init)(jax.random.key(0), x)

    def edge(z):  # the image's last row and column
        image = gan.sample(params, state, z)[0, :, :, 0]
        return jnp.concatenate([image[-1], image[:, -1]])

    slopes = jax.jit(jax.jacfwd(edge))(jax.random.normal(jax.random.key(1), (1, 4)))
    assert np.all(np.abs(slopes).max(axis=(1, 2)) > 0)


@pytest.mark.parametrize(("penalty", "weight"), [("r1", 0.7), ("gradient", 4.0)])
def test_penalties_are_their_formulas(penalty, weight):
    import flax.linen as nn

    class Slope(nn.Module):
        @nn.compact
        def __call__(self, image, label=None, train=False):
            return self.param("a", lambda key: jnp.float32(3.0)) * jnp.sum(image, axis=(1, 2, 3))

    gan = GAN(GAN.of_shape(SHAPE, width=4).generator, Slope(), penalty=penalty, weight=weight)
    params, f = objective(gan, {"image": images()})
    judged, _ = gan.model.apply(params, f.model_state, f.batch["image"], key=f.key, train=True)
    slope = 3.0 * 8.0  # |∇| of a Σx over 64 pixels
    expected = 0.35 * slope**2 if penalty == "r1" else 4.0 * (slope - 1) ** 2
    np.testing.assert_allclose(judged.penalty, expected, rtol=1e-5)


def test_spectral_norm_bounds_every_layer():
    gan = GAN.of_shape(SHAPE, width=4, spectral_norm=True, game="hinge", penalty=None)
    params, f = objective(gan, {"image": images()})
    state = f.model_state
    apply = jax.jit(partial(gan.model.apply, train=True))
    for _ in range(30):  # each evaluation is one step of power iteration
        _, state = apply(params, state, f.batch["image"], key=f.key)
    for name, layer in params["discriminator"].items():
        matrix = np.asarray(layer["kernel"]).reshape(-1, layer["kernel"].shape[-1])
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        (found,) = [
            v
            for path, v in jax.tree.leaves_with_path(state["discriminator"])
            if name in jax.tree_util.keystr(path) and "sigma" in jax.tree_util.keystr(path)
        ]
        assert float(found) == pytest.approx(largest, rel=0.02)


def train(gan, data, steps, inputs="image", **options):
    adam = optax.adam(2e-3, b1=0.5)
    estimator = jdl.Estimator(
        gan.model, gan.loss, optimizers(adam, adam), inputs=inputs, ema=0.98, **options
    )
    return estimator.train(data, steps=steps)


def classes_of_two(n=512):
    """Bright left halves and bright right halves."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n).astype(np.int32)
    x = rng.uniform(0.0, 0.1, (n, *SHAPE)).astype(np.float32)
    for i, label in enumerate(labels):
        x[i, :, 4 * label : 4 * label + 4] += 0.9
    return x, labels


@pytest.mark.slow
def test_samples_come_near_the_digits():
    """Of the way that pixels' distribution is from the digits', most is gone."""
    gan = GAN.of_shape(SHAPE, width=16, latent=16)
    true = np.concatenate([b["image"] for b in digits(batch_size=100, epochs=1)])
    data = from_arrays(true.astype(np.float32) / 255, batch_size=64, shuffle=True, seed=0)
    z = jax.random.normal(jax.random.key(5), (500, 16))

    def distance(steps):
        estimator = train(gan, data, steps)
        samples = np.asarray(gan.sample(estimator.evaluation_params, estimator.model_state, z))
        flat = data.arrays["image"].reshape(-1, 64)
        return scores.frechet_distance(samples.reshape(-1, 64), flat)

    assert distance(250) < 0.25 * distance(1)


@pytest.mark.slow
def test_a_conditional_generator_makes_the_class_asked_for():
    x, labels = classes_of_two()
    gan = GAN.of_shape(SHAPE, width=8, latent=8, num_classes=2)
    data = from_arrays(x, labels, batch_size=32, shuffle=True, seed=0)
    estimator = train(gan, data, 200, inputs=("image", "label"))
    z, asked = jax.random.normal(jax.random.key(5), (100, 8)), np.arange(100) % 2
    found = np.asarray(
        gan.sample(estimator.evaluation_params, estimator.model_state, z, jnp.asarray(asked))
    )
    brighter = found[:, :, 4:].mean((1, 2, 3)) > found[:, :, :4].mean((1, 2, 3))
    assert (brighter == asked).mean() > 0.95


@pytest.mark.slow
def test_goes_on_from_its_checkpoint(tmp_path):
    x, _ = classes_of_two(64)
    data = from_arrays(x, batch_size=16, shuffle=True, seed=0)

    def gan():
        return GAN.of_shape(SHAPE, width=4, latent=4, spectral_norm=True)

    whole = train(gan(), data, 6)
    train(gan(), data, 3, workdir=tmp_path)
    parts = train(gan(), data, 3, workdir=tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (whole.params, whole.model_state),
        (parts.params, parts.model_state),
    )


def test_walks_end_at_normal_noise_and_keep_their_length():
    z = np.asarray(walk(jax.random.key(0), 5, 9, 50))
    norms = np.linalg.norm(z, axis=-1)
    assert (norms >= 0.8 * np.minimum(norms[:, :1], norms[:, -1:])).all()
    steps = np.linalg.norm(np.diff(z, axis=1), axis=-1)
    assert (steps.max(1) < 2 * steps.min(1)).all()


# ------------------------------------------------------------------ scores


def test_frechet_distance_equals_scipy_matrix_root():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 0.5
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(one @ other).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(one + other - 2 * root)
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert scores.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-8)
    flat = a.copy()
    flat[:, 2] = 1.0  # singular covariance, as of features that never fire
    assert np.isfinite(scores.frechet_distance(flat, b))


def test_features_are_what_the_logits_are_made_of():
    cnn = CNN(num_classes=3, blocks=(Block(filters=4),), units=5)
    x = jnp.asarray(images(7))
    params = cnn.init(jax.random.key(0), x)["params"]
    seen = scores.features(cnn, params, x, batch_size=3)
    logits = seen.features @ params["logits"]["kernel"] + params["logits"]["bias"][None]
    np.testing.assert_allclose(logits, cnn.apply({"params": params}, x), atol=1e-5)
    np.testing.assert_array_equal(seen.classes, np.argmax(logits, axis=1))


def test_calibration_orders_faults_by_gravity():
    true = np.concatenate([b["image"] for b in digits(batch_size=100, epochs=1)])
    cnn = CNN(blocks=(Block(filters=8, kernel_size=(3, 3)),), units=32, dropout=0.0)
    estimator = jdl.classifier(cnn, "adam")
    estimator.train(digits(batch_size=64, epochs=None, shuffle=True), steps=150)
    scale = [x.astype(np.float32) / 255 for x in (true[:700], true[700:1400])]
    found = scores.calibration(cnn, estimator.params, *scale)
    assert found.floor < found.missing_class < found.noise


def test_mode_coverage_sees_collapse():
    even = scores.mode_coverage(np.arange(100) % 10, 10)
    assert even.modes == 10
    assert even.divergence == pytest.approx(0.0, abs=1e-12)
    one = scores.mode_coverage(np.zeros(100, int), 10)
    assert one.modes == 1
    assert one.divergence == pytest.approx(np.log(10))


def test_nearest_equals_sklearn():
    from sklearn.neighbors import NearestNeighbors

    samples, table = images(25, seed=1), images(60, seed=2)
    found = scores.nearest(samples, table, batch_size=10)
    flat = table.reshape(60, -1)
    distance, index = NearestNeighbors(n_neighbors=1).fit(flat).kneighbors(samples.reshape(25, -1))
    np.testing.assert_array_equal(found.place, index[:, 0])
    np.testing.assert_allclose(found.distance, distance[:, 0], rtol=1e-5)


def test_bytes_score_as_the_same_images_in_floats():
    rng = np.random.default_rng(0)
    table, noise = rng.integers(0, 256, (40, 8, 8, 1)), rng.integers(-9, 10, (40, 8, 8, 1))
    table, samples = (np.clip(x, 0, 255).astype(np.uint8) for x in (table, table + noise))
    floats, other = (x.astype(np.float32) / 255 for x in (table, samples))
    cnn = CNN(num_classes=3, blocks=(Block(filters=4),), units=5)
    params = cnn.init(jax.random.key(0), jnp.asarray(floats))["params"]
    a, b = (scores.features(cnn, params, x).features for x in (table, floats))
    np.testing.assert_allclose(a, b, atol=1e-6)
    for x in (samples, other):
        for y in (table, floats):
            found = scores.nearest(x, y)
            np.testing.assert_array_equal(found.place, np.arange(40))
            np.testing.assert_allclose(
                found.distance, scores.nearest(other, floats).distance, rtol=1e-5
            )
    a, b = (scores.calibration(cnn, params, x, y) for x, y in ((table, samples), (floats, other)))
    np.testing.assert_allclose(a, b, atol=1e-6)


NAN = np.full((4, 3), np.nan)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: scores.frechet_distance(NAN, np.ones((4, 3))), "`a` must be of finite numbers"),
        (lambda: scores.frechet_distance([[1.0], [2.0]], [1.0]), r"`b` must be of shape \[n, F\]"),
        (lambda: scores.nearest(NAN, np.ones((4, 3))), "`samples` must be of finite numbers"),
        (lambda: scores.nearest(np.ones((4, 3)), NAN), "`images` must be of finite numbers"),
        (lambda: scores.features(CNN(), {}, NAN), "`images` must be of finite numbers"),
        (lambda: scores.features(CNN(), {}, 2 * images(3)), r"in \[0, 1\], or uint8"),
        (
            lambda: scores.nearest([[1.0, 2.0], [1.0]], np.ones((4, 2))),
            "`samples` must be an array",
        ),
        (lambda: scores.mode_coverage([0, 12], 10), r"`classes` must be int\[n\] in \[0, 10\)"),
        (lambda: scores.mode_coverage([0.5], 10), r"`classes` must be int\[n\] in \[0, 10\)"),
        (lambda: GAN.of_shape(SHAPE, game="non-saturating"), "Did you mean 'non_saturating'"),
        (lambda: GAN.of_shape(SHAPE, penalty="r2"), "one of None, r1"),
        (lambda: GAN.of_shape(SHAPE, game="hinge", smoothing=0.1), "smoothing"),
        (lambda: scores.frechet_distance(np.ones((1, 3)), np.ones((5, 3))), "n ≥ 2"),
        (lambda: scores.nearest(np.ones((1, 3)), np.ones((2, 4))), "shape"),
    ],
)
def test_mistakes_are_reported(make, said):
    with pytest.raises(check.ArgumentError, match=said):
        make()


def test_a_conditional_gan_asks_for_labels():
    gan = GAN.of_shape(SHAPE, num_classes=2)
    with pytest.raises(check.ArgumentError, match="label"):
        gan.model.init(jax.random.key(0), jnp.asarray(images(2)))
    params, state = gan.model.init(jax.random.key(0), jnp.asarray(images(2)), jnp.array([0, 1]))
    stray = jnp.array([0, -1])
    with pytest.raises(check.ArgumentError, match=r"`label` must be numbers in \[0, 2\)"):
        gan.sample(params, state, jnp.zeros((2, 64)), stray)
    found = jax.jit(gan.model.apply)(params, state, jnp.asarray(images(2)), stray)[0]
    for x in (found.real, found.fake):
        assert np.isnan(x).tolist() == [False, True]
