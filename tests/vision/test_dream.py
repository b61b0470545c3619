"""Dreams: goals and gradients against closed forms and SciPy, tiles against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jdl.core import check
from jdl.vision import dream
from jdl.vision.dream import Goal, Settings
from jdl.vision.layers import addressable
from jdl.vision.trunk import Trunk

PLAIN = Settings(octaves=1, steps=1, jitter=0, smoothing=0.0, natural=False)


@pytest.fixture
def pointwise():
    """Every pixel a feature of its own: gradients by tiles are those of the whole."""
    return Trunk(
        "pixels", ("x",), jnp.float32(3.0), addressable(lambda p, x, note: note("x", p * x))
    )


def test_scores_are_what_they_are_said_to_be():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, 4, 5, 3)), rng.normal(size=(1, 2, 2, 6))
    features = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    found = dream.score(Goal(("a", "b")), features)
    assert float(found) == pytest.approx((a**2).mean() / 2 + (b**2).mean() / 2, rel=1e-5)
    found = dream.score(Goal(("a",), (0, 2)), features)
    assert float(found) == pytest.approx(a[..., [0, 2]].mean(), rel=1e-5)
    guide = rng.normal(size=(7, 3))
    found = dream.score(Goal(("a",), (), {"a": jnp.asarray(guide, jnp.float32)}), features)
    expected = (a.reshape(-1, 3) @ guide.T).max(axis=1).mean() / 3
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_one_step_is_the_formula(pointwise, photograph):
    goal = dream.goal(pointwise, "x", channels=1)
    dreamt = dream.dream(pointwise, photograph, goal, PLAIN._replace(step_size=0.02))
    expected = photograph.copy()
    expected[:, :, 1] += 0.02 * 3  # the gradient is the same at every pixel, of one colour in three
    np.testing.assert_allclose(dreamt, np.clip(expected, 0, 1), atol=1e-5)


def test_a_dream_sees_more_has_the_pictures_size_and_is_repeatable(tiny, photograph):
    goal = dream.goal(tiny, ("relu", "square"))
    how = Settings(octaves=2, steps=3, step_size=0.02, variation=0.1, blur=0.3)
    seen = []
    dreamt = dream.dream(tiny, photograph, goal, how, seed=3, on_step=lambda *s: seen.append(s))
    assert dreamt.shape == photograph.shape
    assert dreamt.dtype == np.float32
    assert dreamt.min() >= 0
    assert dreamt.max() <= 1
    assert seen == [(i, 6) for i in range(1, 7)]
    before, after = (
        float(dream.score(goal, tiny.features(x[None], goal.layers))) for x in (photograph, dreamt)
    )
    assert after > 1.1 * before
    np.testing.assert_array_equal(dream.dream(tiny, photograph, goal, how, seed=3), dreamt)
    assert np.abs(dream.dream(tiny, photograph, goal, how, seed=4) - dreamt).max() > 1e-3


@pytest.mark.parametrize("how", [PLAIN._replace(variation=0.2), PLAIN._replace(blur=1.0)])
def test_priors_smooth(pointwise, photograph, how):
    rough = np.clip(photograph + np.random.default_rng(0).normal(0, 0.05, photograph.shape), 0, 1)
    rough = rough.astype(np.float32)
    plain = dream.dream(pointwise, rough, dream.goal(pointwise, "x"), PLAIN)
    smooth = dream.dream(pointwise, rough, dream.goal(pointwise, "x"), how)
    before, after = (float(dream.total_variation(jnp.asarray(x))) for x in (plain, smooth))
    assert after < 0.95 * before


def test_tiles_give_the_gradient_of_the_whole(pointwise, photograph):
    goal = dream.goal(pointwise, "x")
    whole = dream.dream(pointwise, photograph, goal, PLAIN._replace(step_size=0.05))
    tiled = dream.dream(pointwise, photograph, goal, PLAIN._replace(step_size=0.05, tile=32))
    np.testing.assert_allclose(tiled, whole, atol=2e-3)  # tiles weigh overlaps alike, not pixels


def test_tiles_cover_the_picture_and_stay_inside():
    rng = np.random.default_rng(0)
    for size in ((100, 64), (64, 64), (65, 200), (129, 40)):
        shape = tuple(min(n, 64) for n in size)
        for _ in range(20):
            covered = np.zeros(size, int)
            for down, across in dream._corners(size, shape, rng):
                assert 0 <= down <= size[0] - shape[0]
                assert 0 <= across <= size[1] - shape[1]
                covered[down : down + shape[0], across : across + shape[1]] += 1
            assert covered.min() >= 1


def test_memory_does_not_grow_with_the_picture():
    """Of the compiled program, beyond its arguments: a tile's activations, whatever the picture."""
    trunk = Trunk(
        "wide", ("x",), None, addressable(lambda p, x, note: note("x", jnp.tile(x, (1, 1, 1, 64))))
    )
    used = []
    for size in ((256, 256), (2160, 3840)):
        image = jax.ShapeDtypeStruct((*size, 3), jnp.float32)
        covered = jax.ShapeDtypeStruct((*size, 1), jnp.float32)
        corner = jax.ShapeDtypeStruct((2,), jnp.int32)
        program = {"apply": trunk.apply, "layers": ("x",), "channels": ()}
        program |= {"smoothing": 0.5, "shape": (128, 128)}
        lowered = dream._add_tile.lower(None, image, None, corner, image, covered, **program)
        used.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert used[1] <= used[0] + 4096


def test_nothing_is_compiled_again(pointwise, photograph):
    goal = dream.goal(pointwise, "x")
    how = PLAIN._replace(tile=32, steps=3, jitter=4)
    dream.dream(pointwise, photograph, goal, how)
    programs = (dream._add_tile, dream._shifted_gradient, dream.ascend)
    before = [program._cache_size() for program in programs]
    dream.dream(pointwise, photograph, goal, how._replace(step_size=0.03), seed=5)
    assert [program._cache_size() for program in programs] == before


def test_total_variation_and_its_gradient():
    x = np.random.default_rng(0).uniform(size=(5, 6, 2))
    down, across = np.zeros_like(x), np.zeros_like(x)
    down[:-1], across[:, :-1] = np.diff(x, axis=0), np.diff(x, axis=1)
    expected = np.sqrt(down**2 + across**2).sum()
    with jax.enable_x64(True):
        value_and_slope = jax.jit(jax.value_and_grad(dream.total_variation))
        value, slope = value_and_slope(jnp.asarray(x))
        assert float(value) == pytest.approx(expected, rel=0.02)
        bump = np.zeros_like(x)
        bump[2, 3, 1] = 1e-6
        rise = value_and_slope(jnp.asarray(x + bump))[0] - value_and_slope(jnp.asarray(x - bump))[0]
        assert float(slope[2, 3, 1]) == pytest.approx(float(rise) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("width", [0.5, 1.3])
def test_blur_is_scipys(photograph, width):
    found = jax.jit(dream.blurred, static_argnums=1)(jnp.asarray(photograph), width)
    reach = max(1, int(np.ceil(3 * width)))
    expected = ndimage.gaussian_filter(
        photograph, (width, width, 0), mode="nearest", radius=(reach, reach, 0)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_zoom_gives_frames_that_fly_in(pointwise, photograph):
    how = Settings(octaves=1, steps=1, step_size=1e-6, smoothing=0.0)
    goal = dream.goal(pointwise, "x")
    frames = list(dream.zoom(pointwise, photograph, goal, how, frames=3, zoom=1.25))
    assert [frame.shape for frame in frames] == [photograph.shape] * 3
    middle = photograph[6:-6, 8:-8]
    expected = ndimage.zoom(middle, (1.25, 1.25, 1), order=3, mode="nearest", grid_mode=True)
    inside = (slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(frames[1][inside], expected[inside], atol=0.02)


def test_a_dream_that_changes_nothing_is_refused(tiny, photograph):
    trunk = tiny._replace(
        apply=lambda p, x, layers: jax.lax.stop_gradient(tiny.apply(p, x, layers))
    )
    how = dream.Settings(octaves=2, steps=1)
    with pytest.raises(check.UserError, match="relu has no gradient there"):
        dream.dream(trunk, photograph, dream.goal(trunk, "relu"), how)


def test_bad_arguments_are_told(tiny, photograph):
    with pytest.raises(check.ArgumentError, match="0 to 3, the channels of relu"):
        dream.goal(tiny, "relu", channels=4)
    with pytest.raises(check.ArgumentError, match="nearest: relu"):
        dream.goal(tiny, "relu1")
    goal = dream.goal(tiny, "relu")
    for wrong in ({"octaves": 0}, {"scale": 1.0}, {"steps": 0}, {"step_size": 0.0}, {"tile": 8}):
        with pytest.raises(check.ArgumentError, match=next(iter(wrong))):
            dream.dream(tiny, photograph, goal, Settings(**wrong))
    for wrong in (photograph[:0], photograph * 2, photograph[:, :, :2], photograph * np.nan):
        with pytest.raises(check.ArgumentError, match="image"):
            dream.dream(tiny, wrong, goal)
    gray = np.full((40, 40, 4), 128, np.uint8)
    assert dream.dream(tiny, gray, goal, PLAIN).shape == (40, 40, 3)
