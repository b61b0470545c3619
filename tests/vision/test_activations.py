"""Maps, exciting images, Grad-CAM, saliency and preferred pictures against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdl.core import check
from jdl.data import digits, from_arrays
from jdl.models import CNN
from jdl.vision import activations, reverse
from jdl.vision.layers import addressable
from jdl.vision.trunk import Trunk, of_linen


def averaging(weights):
    """A linear head over the means of the layer "maps", which is the image's colours squared."""

    def forward(params, x, note):
        maps = note("maps", jnp.square(x))
        note("logits", jnp.mean(maps, axis=(1, 2)) @ params)

    params = jnp.asarray(weights, jnp.float32)
    return Trunk("averaging", ("maps", "logits"), params, addressable(forward), head="logits")


def test_maps_are_the_strongest_channels(tiny, photograph):
    found = activations.maps(tiny, photograph, "relu", count=2)
    every = np.asarray(tiny.features(photograph[None], "relu")["relu"][0])
    order = np.argsort(-every.mean(axis=(0, 1)))[:2]
    assert found.channels == tuple(order)
    np.testing.assert_array_equal(found.values, every[:, :, order].transpose(2, 0, 1))
    sheet = activations.drawn(found, side=80)
    assert sheet.ndim == 3
    assert sheet.shape[1] >= 80
    assert activations.maps(tiny, photograph, "logits").values.shape == (1, 2, 2)
    with pytest.raises(check.ArgumentError, match="left out for a dense layer"):
        activations.maps(tiny, photograph, "logits", channels=[1])
    with pytest.raises(check.ArgumentError, match="0 to 3"):
        activations.maps(tiny, photograph, "relu", channels=[9])


def test_exciting_images_are_those_of_all(tiny):
    data = digits("test", batch_size=50)
    found = activations.exciting(tiny, data, "relu", [2, 0], count=4)
    images, seen = [], []
    for batch in data.once():
        mask = np.asarray(batch.get("mask", np.ones(len(batch["image"])))) > 0
        images.append(np.asarray(batch["image"])[mask])
    images = np.concatenate(images).astype(np.float32).repeat(3, axis=3) / 255
    assert len(images) == 359
    every = np.asarray(tiny.features(images, "relu")["relu"]).max(axis=(1, 2))
    for each, channel in zip(found, (2, 0), strict=True):
        best = np.sort(every[:, channel])[::-1][:4]
        np.testing.assert_allclose(each.scores, best, rtol=1e-5)
        np.testing.assert_allclose(every[each.positions, channel], best, rtol=1e-5)
        np.testing.assert_allclose(each.images, images[each.positions], atol=1e-6)
        seen.append(each.channel)
    assert seen == [2, 0]


def test_exciting_images_do_not_depend_on_the_batch_size(tiny):
    """Black padding excites channel 0 most here, in batches that are padded a little or mostly."""
    kernel = jnp.zeros((3, 3, 3, 4))
    params = tiny.params | {"conv": {"kernel": kernel.at[1, 1].set(-1.0), "bias": jnp.ones(4)}}
    x = np.linspace(0.1, 1.0, 20, dtype=np.float32).reshape(20, 1, 1, 1)
    x = x * np.ones((1, 6, 6, 1), np.float32)
    for size in (1, 7, 16, 20, 32):
        data = from_arrays(x, np.zeros(20, np.int32), batch_size=size, drop_remainder=False)
        (found,) = activations.exciting(tiny._replace(params=params), data, "conv", [0], count=4)
        assert found.positions.tolist() == [0, 1, 2, 3], size
    gaps = {"image": np.insert(x, [0, 1], 0.0, axis=0), "mask": np.ones(22)}
    gaps["mask"][[0, 2]] = 0.0  # as of unreadable photographs
    data = [gaps, {"image": np.zeros((3, 6, 6, 1), np.float32), "mask": np.zeros(3)}]
    (found,) = activations.exciting(tiny._replace(params=params), data, "conv", [0], count=30)
    assert found.positions.tolist() == [*range(20)]
    with pytest.raises(check.DataError, match="at least one image"):
        activations.exciting(tiny, data[1:], "conv", [0])


def test_grad_cam_of_a_linear_head_is_cam(photograph):
    """Over a linear head on means, Grad-CAM is the weighted sum of the maps (Zhou et al. 2016)."""
    weights = np.array([[1.0, -2.0], [0.5, 1.0], [-1.0, 1.0]])
    trunk = averaging(weights)
    found = activations.grad_cam(trunk, photograph, "maps", wanted=1)
    square = photograph[:, 10:-10]
    expected = np.maximum((square.astype(np.float64) ** 2) @ weights[:, 1], 0)
    np.testing.assert_allclose(found.heat[:, 10:-10], expected / expected.max(), atol=1e-5)
    assert found.heat[:, :10].max() == found.heat[:, -10:].max() == 0
    assert found.number == 1
    likeliest = activations.grad_cam(trunk, photograph, "maps")
    assert likeliest.number == np.argmax((square**2).mean(axis=(0, 1)) @ weights)
    with pytest.raises(check.ArgumentError, match=r"\[N, h, w, C\]"):
        activations.grad_cam(trunk, photograph, "logits")


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("size", [None, (8, 8), (6, 12)])
def test_the_class_explained_is_the_most_probable(size, stretched):
    """A red middle between wider blue sides: the square is red, the whole picture blue."""
    picture = np.zeros((20, 60, 3), np.float32)
    picture[:, :18, 2] = picture[:, 42:, 2] = picture[:, 18:42, 0] = 1.0
    trunk = averaging(np.eye(3))._replace(size=size, stretched=stretched, classes=("r", "g", "b"))
    (name, _), *_ = activations.classify(trunk, picture)
    assert name == ("b" if stretched else "r")
    cam = activations.grad_cam(trunk, picture, "maps")
    pixels = activations.saliency(trunk, picture, samples=2)
    assert trunk.class_name(cam.number) == trunk.class_name(pixels.number) == name
    assert cam.heat.shape == pixels.heat.shape == (20, 60)
    assert (cam.heat[:, :10].max() > 0.5) == (pixels.heat[:, :10].max() > 0.5) == stretched


def test_saliency_is_the_gradients_size(photograph):
    weights = np.array([[1.0, -2.0], [0.5, 1.0], [-1.0, 1.0]])
    found = activations.saliency(averaging(weights), photograph, wanted=0, samples=1, noise=0.0)
    photograph = photograph[:, 10:-10]
    expected = np.abs(2 * photograph * weights[:, 0]).max(axis=2)
    expected = np.clip(expected / np.quantile(expected, 0.995), 0, 1)
    np.testing.assert_allclose(found.heat[:, 10:-10], expected, atol=1e-4)
    many = activations.saliency(averaging(weights), photograph, wanted=0, samples=8, noise=0.2)
    assert np.corrcoef(many.heat.ravel(), expected.ravel())[0, 1] > 0.8


def test_classes_by_name_and_number(tiny, photograph):
    assert tiny.class_number("dog") == tiny.class_number(1) == tiny.class_number("1") == 1
    with pytest.raises(check.ArgumentError, match=r"3 classes of tiny.*nearest: dog"):
        tiny.class_number("dogg")
    with pytest.raises(check.ArgumentError, match="classes"):
        tiny.class_number(3)
    with pytest.raises(check.ArgumentError, match="must be a classifier"):
        tiny._replace(head=None).class_number(0)
    found = activations.classify(tiny, photograph, count=3)
    logits = tiny.features(photograph[None, :, 10:-10], "logits")["logits"][0]
    shares = np.asarray(jax.nn.softmax(logits))
    assert [name for name, _ in found] == [tiny.classes[i] for i in np.argsort(-shares)]
    np.testing.assert_allclose([s for _, s in found], np.sort(shares)[::-1], rtol=1e-4)


@pytest.mark.slow
def test_preferred_pictures_please_their_channels(tiny):
    search = reverse.PictureSearch(size=24, steps=30)
    found = reverse.preferred(tiny, "conv", [0, 3], search, seed=1)
    assert found.shape == (2, 24, 24, 3)
    means = np.asarray(tiny.features(found, "conv")["conv"]).mean(axis=(1, 2))
    gray = np.asarray(tiny.features(np.full((1, 24, 24, 3), 0.5, np.float32), "conv")["conv"])
    for row, channel in zip(means, (0, 3), strict=True):
        assert row[channel] > gray.mean(axis=(0, 1, 2))[channel] + 0.1
    np.testing.assert_array_equal(reverse.preferred(tiny, "conv", [0, 3], search, seed=1), found)


@pytest.mark.slow
@pytest.mark.parametrize("colors", [1, 3])
def test_preferred_pictures_of_a_network_that_sees_no_color_are_gray(colors):
    net = CNN(num_classes=3, units=8)
    shape = (16, 16, colors)
    params = net.init(jax.random.key(0), jnp.ones((1, *shape)))["params"]
    found = of_linen(net, params, image_shape=shape)
    pictures = reverse.preferred(found, "Conv_0", [0, 1], reverse.PictureSearch(size=16, steps=3))
    colourful = np.ptp(pictures, axis=-1).max()
    assert colourful == 0 if colors == 1 else colourful > 0.01


def test_the_prior_smooths_preferred_pictures(tiny):
    search = reverse.PictureSearch(size=24, steps=30)
    found = reverse.preferred(tiny, "conv", [0, 3], search, seed=1)
    smooth = reverse.preferred(tiny, "conv", [0, 3], search._replace(variation=3.0), seed=1)
    assert np.abs(np.diff(smooth, axis=1)).mean() < np.abs(np.diff(found, axis=1)).mean()


@pytest.mark.slow
def test_a_classs_picture_is_taken_for_it(tiny):
    found = reverse.of_class(tiny, "dog", reverse.PictureSearch(size=24, steps=60))
    gray = np.full((24, 24, 3), 0.5, np.float32)
    logits = tiny.features(np.stack([gray, found]), "logits")["logits"]
    assert logits[1, 1] > logits[0, 1]
    with pytest.raises(check.ArgumentError, match="from 16"):
        reverse.of_class(tiny, "cat", reverse.PictureSearch(size=3))


def test_pictures_are_even_in_frequency():
    """Of a white spectrum, the picture's own falls with frequency, as that of photographs."""
    spectrum = 0.01 * jax.random.normal(jax.random.key(0), (1, 64, 33, 3, 2))
    x = np.asarray(reverse.picture(spectrum, 64))[0].mean(axis=2)
    power = np.abs(np.fft.fft2(x - x.mean())) ** 2
    low, high = power[2:4, 2:4].mean(), power[28:30, 28:30].mean()
    assert low > 20 * high
