"""The style network against NumPy and Flax; painted in tiles as whole, exported as trained."""

import dataclasses
import functools
import io
import tarfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from PIL import Image

from jdl.core import check
from jdl.data import from_arrays, from_tar
from jdl.recipes.style_config import StyleConfig
from jdl.vision import painter as pt
from jdl.vision import style
from jdl.vision.layers import addressable, conv
from jdl.vision.painter_net import InstanceNorm, StyleNet, by_rows, doubled, reflected
from jdl.vision.style_training import build_estimator, digest, taking_turns
from jdl.vision.trunk import Trunk

NET = StyleNet(filters=(4, 8, 8), blocks=1, styles=2)
STYLES = ("one", "two")


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@functools.cache
def painter():
    """One with random parameters, those of the norms too."""
    images, mixture = jnp.zeros((1, 16, 16, 3)), jnp.ones((1, 2))
    shapes = jax.eval_shape(NET.init, jax.random.key(0), images, mixture)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: (rng.normal(size=s.shape) / np.sqrt(max(s.size / s.shape[-1], 3))).astype("f4"),
        shapes,
    )
    return pt.of_net(NET, params, STYLES)


def test_edges_are_reflected_and_pixels_doubled():
    x = random(2, 5, 7, 3)
    want = np.pad(x, [(0, 0), (4, 4), (4, 4), (0, 0)], mode="reflect")
    np.testing.assert_array_equal(reflected(jnp.asarray(x), 4), want)
    want = np.stack([np.kron(x[..., c], np.ones((1, 2, 2))) for c in range(3)], axis=3)
    np.testing.assert_array_equal(doubled(jnp.asarray(x)), want)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3)])
def test_a_convolution_by_rows_is_one(inputs, outputs):
    x, kernel = random(2, 14, 12, inputs), random(9, 7, inputs, outputs, seed=1)
    found = by_rows(jnp.asarray(x), jnp.asarray(kernel), (1, 1), "VALID")
    for o in range(outputs):
        want = scipy.signal.correlate(x[1], kernel[..., o], "valid")[..., 0]
        np.testing.assert_allclose(found[1, ..., o], want, rtol=1e-5)


def test_the_norm_is_flaxs_and_mixes_its_styles():
    x = jnp.asarray(3 + 2 * random(2, 6, 5, 4))
    params = {"scale": random(2, 4, seed=1), "shift": random(2, 4, seed=2)}
    mixture = jnp.array([[1.0, 0.0], [0.25, 0.75]])
    ours, used = InstanceNorm(2).apply({"params": params}, x, mixture)
    for i, shares in enumerate(np.asarray(mixture)):
        theirs = {"scale": shares @ params["scale"], "bias": shares @ params["shift"]}
        norm = nn.InstanceNorm(epsilon=1e-5)
        want = norm.apply({"params": theirs}, x[i : i + 1])
        np.testing.assert_allclose(ours[i : i + 1], want, atol=2e-5)
    np.testing.assert_allclose(used[:, :4], np.mean(x, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(used[:, 4:], np.var(x, axis=(1, 2)), rtol=1e-4)
    given = jnp.full_like(used, jnp.nan).at[:, 0].set(7.0)
    _, mixed = InstanceNorm(2).apply({"params": params}, x, mixture, given)
    np.testing.assert_array_equal(mixed[:, 0], 7.0)
    np.testing.assert_array_equal(mixed[:, 1:], used[:, 1:])


def test_no_checkerboard_even_before_training():
    gray = np.full((32, 32, 3), 0.4, np.float32)
    painted = painter()(gray)
    # Weights that overlap unevenly would show on an even surface.
    assert np.abs(painted - painted[16, 16]).max() < 1e-3


def test_an_output_sees_as_far_as_reach_says():
    image = random(1, 96, 96, 3)
    mixture, apply = np.array([[0.5, 0.5]], np.float32), painter().apply
    free = np.full((1, NET.statistics_size), np.nan, np.float32)
    before, statistics = apply(painter().params, image, mixture, free)
    farthest = 0
    for at in (48, 49, 50, 51):
        changed = image.copy()
        changed[0, at, at] += 0.5
        after, _ = apply(painter().params, changed, mixture, statistics)
        rows = np.flatnonzero(np.abs(after - before)[0].max(axis=(1, 2)) > 0)
        farthest = max(farthest, at - rows.min(), rows.max() - at)
    assert NET.reach - 4 <= farthest <= NET.reach


def test_tiles_meet_as_if_painted_whole():
    picture, p = random(150, 131, 3), painter()
    shares = {"one": 1.0, "two": 3.0}
    by = 112 / 152
    small = pt.resized(picture, (int(150 * by), int(131 * by)))
    mixture = np.asarray(p.mixture(shares))
    statistics = p._paint(pt.padded(np.clip(small, 0, 1)), mixture)[1]
    whole = p._paint(pt.padded(picture), mixture, statistics)[0][:150, :131]
    tiled = p(picture, shares, tile=112)
    assert tiled.shape == (150, 131, 3)
    np.testing.assert_allclose(tiled, whole, atol=2e-5)
    assert np.abs(whole - p(picture, shares, tile=160)).max() > 1e-4  # statistics are reduced's


def test_any_size_and_kind_of_picture():
    for shape in ((1, 1, 3), (9, 30), (12, 30, 4)):
        assert painter()(random(*shape)).shape == (*shape[:2], 3)
    picture = random(12, 12, 3)
    np.testing.assert_array_equal(painter()(picture), painter()(picture, {"one": 5}))
    assert np.abs(painter()(picture) - painter()(picture, {"two": 1})).max() > 0.01


def test_what_a_painter_refuses():
    for shares, words in (({"tow": 1}, "Did you mean 'two'"), ({"one": -1}, "not negative")):
        with pytest.raises(check.ArgumentError, match=words):
            painter()(random(8, 8, 3), shares)
    for tile in (110, 8, 0):
        with pytest.raises(check.ArgumentError, match="multiple of 4, at least"):
            painter()(random(8, 8, 3), tile=tile)
    with pytest.raises(check.ArgumentError, match="picture"):
        painter()(np.zeros((0, 8, 3)))


def test_an_exported_painter_paints_the_same_at_any_size(tmp_path):
    pytest.importorskip("flatbuffers")
    path = painter().export(tmp_path / "painter.jdl")
    loaded = pt.load_painter(path)
    assert (loaded.styles, loaded.reach) == (STYLES, NET.reach)
    for picture, tile in ((random(20, 33, 3), 1024), (random(150, 131, 3), 112)):
        want = painter()(picture, {"one": 1, "two": 1}, tile=tile)
        got = loaded(picture, {"one": 1, "two": 1}, tile=tile)
        np.testing.assert_allclose(got, want, atol=2e-6)
    damaged = path.read_bytes()[:-2000]
    path.write_bytes(damaged)
    with pytest.raises(check.DataError, match="damaged"):
        pt.load_painter(path)


# ---------------------------------------------------------------------- training


def forward(params, x, note):
    note("relu1", jax.nn.relu(conv(x - 0.5, params)))


@functools.cache
def trunk():
    kernel = np.random.default_rng(3).normal(size=(3, 3, 3, 6)).astype(np.float32) / 5
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(6)}
    return Trunk("tiny", ("relu1",), params, addressable(forward), size=(32, 32))


PAINTINGS = (random(16, 24, 3, seed=5), random(16, 16, 3, seed=6) ** 3)


LAYERS, WEIGHTS = style.Layers(("relu1",), ("relu1",)), style.Weights(1.0, 10.0, 0.1)


def setting(**changes):
    made = StyleConfig(
        styles=STYLES,
        paintings=tuple(digest(p) for p in PAINTINGS),
        trunk="tiny",
        content_layers=("relu1",),
        style_layers=("relu1",),
        content=1.0,
        style=10.0,
        variation=0.1,
        filters=(4, 8, 8),
        blocks=1,
        learning_rate=0.01,
        batch_size=4,
        size=16,
        seed=0,
    )
    return dataclasses.replace(made, **changes)


def photographs(path):
    """A tar of smooth random colours."""
    with tarfile.open(path, "w") as tar:
        for i in range(12):
            file = io.BytesIO()
            pixels = (random(3, 3, 3, seed=i) * 255).astype(np.uint8)
            Image.fromarray(pixels).resize((24, 20)).save(file, "PNG")
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    return from_tar(
        path, label=None, size=(16, 16), crop="random", flip=True, batch_size=4, epochs=None
    )


@pytest.mark.slow
def test_training_from_a_tar_lowers_both_terms_and_the_run_paints(tmp_path):
    run, data = setting(), photographs(tmp_path / "photos.tar")
    workdir = tmp_path / "run"
    run.save(workdir)
    estimator = build_estimator(run, trunk(), PAINTINGS, workdir).initialize(data)
    before = estimator.evaluate(data)
    estimator.train(data, steps=50)
    after = estimator.evaluate(data)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["style"] < 0.5 * before["style"]

    loaded = pt.load_painter(workdir)
    picture = random(13, 18, 3)
    (outputs,) = [
        out for _, out in estimator.predict_batches([{"image": np.zeros((2, 8, 8, 3), np.uint8)}])
    ]
    np.testing.assert_array_equal(outputs["mixture"], np.eye(2))
    for i, name in enumerate(STYLES):
        want = outputs["painting"][i]
        np.testing.assert_allclose(loaded(np.zeros((8, 8, 3)), {name: 1}), want, atol=1e-5)
    assert loaded(picture).shape == picture.shape

    run.save(workdir)  # the same again
    with pytest.raises(check.UserError, match=r"style: 10.0 there, 3.0 now"):
        dataclasses.replace(run, style=3.0).save(workdir)
    with pytest.raises(check.ArgumentError, match="paintings"):
        build_estimator(run, trunk(), PAINTINGS[::-1])


def test_every_style_has_its_turn():
    model = taking_turns(NET)
    images = jnp.asarray(random(6, 8, 8, 3))
    seen = jax.jit(lambda key: model.apply(painter().params, {}, images, key=key)[0]["mixture"])
    found = np.stack([seen(jax.random.key(i)) for i in range(8)])
    assert found.sum(axis=1).tolist() == [[3, 3]] * 8
    assert len(np.unique(found, axis=0)) == 2


def test_the_loss_is_gatys_objective_of_each_example():
    run = setting()
    estimator = build_estimator(run, trunk(), PAINTINGS)
    images, paintings = random(2, 16, 16, 3), random(2, 16, 16, 3, seed=9)
    outputs = {"painting": jnp.asarray(paintings), "mixture": jnp.eye(2)}
    found = estimator.loss(outputs, {"image": jnp.asarray(images)})
    palette = style.palette(trunk(), PAINTINGS, LAYERS)
    f = style.objective(trunk().apply, LAYERS, WEIGHTS)
    for i in range(2):
        features = trunk().features(images[i : i + 1], "relu1")
        target = style.target(palette, jnp.eye(2)[i : i + 1], features)
        want = float(f(jnp.asarray(paintings[i : i + 1]), trunk().params, target))
        assert float(found[i]) == pytest.approx(want, rel=1e-5)


def test_what_is_no_run(tmp_path):
    with pytest.raises(check.UserError, match="not a run directory of `jdl style train`"):
        pt.load_painter(tmp_path)
    with pytest.raises(check.DataError, match="no file"):
        pt.load_painter(tmp_path / "nothing.jdl")
    setting().save(tmp_path)
    with pytest.raises(check.UserError, match="no checkpoint"):
        pt.load_painter(tmp_path)
    (tmp_path / "config.toml").write_text('model = "style"\nstyles = ["a"]')
    with pytest.raises(check.DataError, match=r"lacks .*paintings"):
        pt.load_painter(tmp_path)
    (tmp_path / "config.toml").write_text("model = ")
    with pytest.raises(check.DataError, match="TOML"):
        pt.load_painter(tmp_path)
    pytest.importorskip("flatbuffers")
    import jdl
    from jdl.models import MLP

    data = from_arrays(random(4, 2, 2, 1), np.arange(4, dtype=np.int32) % 2, batch_size=4)
    other = jdl.classifier(MLP(widths=(2,)), "adam").train(data, steps=1)
    with pytest.raises(check.DataError, match="not a style network"):
        pt.load_painter(other.export(tmp_path / "mlp.jdl", data))
