"""Augmentation, against torchvision's: exact where its parameters are given, else by moments."""

import io
import json
import pickle
import shutil
import tarfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from PIL import Image, ImageEnhance, ImageOps

import jdl
from jdl import data as jd
from jdl import losses, metrics
from jdl.core.check import ArgumentError, UserError
from jdl.data import augment as augments
from jdl.data import from_arrays, from_tar, images
from jdl.data.augment import Augmentation
from jdl.models import MLP
from jdl.optim import registry

# A picture with all colors, 24 × 32, without another's random generator.
Y, X = np.mgrid[:24, :32]
PICTURE = np.stack([X * 8, Y * 10, (X * Y) % 256], 2).astype(np.uint8)

SHAPES = [(427, 640), (100, 400), (50, 50), (600, 40)]  # height, width

# (mean, standard error) of what torchvision 0.28 draws, by
#   python -c 'from tests.data.test_augment import *; print(json.dumps(torchvisions()))'
TORCHVISION = json.loads("""{
"random_resized": [[0.39054, 0.001345], [0.03136, 0.001158], [0.49888, 0.000673], [0.49725,
0.001053], [0.18868, 0.001152], [0.02781, 0.000175], [0.25793, 0.00068], [0.26945, 0.001067],
[0.19162, 0.000535], [0.06881, 0.001221], [0.49999, 0.00047], [0.49982, 0.001519], [0.04245,
0.000229], [0.03454, 0.000205], [0.25441, 0.000472], [0.29598, 0.001558], [0.48808, 0.001683],
[-0.00123, 0.001128], [0.50009, 0.000806], [0.49952, 0.000801], [0.29488, 0.001711], [0.02544,
0.000173], [0.26309, 0.000819], [0.26235, 0.000812], [0.08827, 4e-06], [-0.28098, 3.7e-05],
[0.49886, 0.000207], [0.5, 7e-06], [0.00779, 1e-06], [0.07898, 1.8e-05], [0.24972, 0.000212],
[0.25, 7e-06]],
"color_jitter": [[0.47041, 0.001823], [0.44222, 0.001795], [0.37682, 0.001536], [0.25539,
0.001329], [0.24794, 0.001287], [0.25955, 0.00132], [0.23125, 0.001691], [0.20523, 0.001582],
[0.14907, 0.001163], [0.07052, 0.00069], [0.06645, 0.000652], [0.07259, 0.000693], [0.0, 0.0]],
"rand_augment": [[0.45473, 0.001866], [0.43568, 0.001846], [0.35925, 0.001369], [0.28796,
0.000945], [0.27638, 0.000949], [0.27757, 0.000849], [0.21722, 0.001727], [0.20004, 0.001713],
[0.13469, 0.001056], [0.0856, 0.000519], [0.07909, 0.00051], [0.07921, 0.000445], [0.00467,
0.001244]],
"strong": [[0.44103, 0.002552], [0.42151, 0.00258], [0.36014, 0.002354], [0.28459, 0.001544],
[0.2709, 0.001477], [0.27658, 0.001427], [0.21405, 0.002052], [0.19764, 0.00205], [0.14632,
0.001759], [0.08814, 0.000656], [0.07993, 0.000607], [0.0826, 0.000577], [0.06333, 0.004447]],
"mixup": [[0.49628, 0.002999], [0.42612, 0.003052], [0.3431, 0.003357], [0.33435, 0.003336]],
"cutmix": [[0.70346, 0.001284], [0.52785, 0.001725], [0.0, 0.0], [0.14875, 0.002516]]
}""")


def summary(samples):
    samples = np.asarray(samples, np.float64)
    return np.stack([samples.mean(0), samples.std(0) / len(samples) ** 0.5], -1)


def crop_moments(draw, n=20_000):
    """Of crops (top, left, height, width): their areas, ratios, places, and squares of these."""
    found = []
    for height, width in SHAPES:
        top, left, tall, wide = np.array([draw(height, width) for _ in range(n)], float).T
        down, across = (top + tall / 2) / height, (left + wide / 2) / width
        area, ratio = tall * wide / (height * width), np.log(wide / tall)
        values = np.stack([area, ratio, down, across], 1)
        found.append(summary(np.concatenate([values, values**2], 1)))
    return np.concatenate(found)


def picture_moments(change, n=3000):
    """Of changed pictures: channels' means and deviations, their squares, how often nothing."""
    found = []
    for _ in range(n):
        pixels = change()
        values = np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))]) / 255
        found.append([*values, *values**2, np.array_equal(pixels, PICTURE)])
    return summary(found)


def share_moments(draw, n=20_000):
    """Of λ: its mean, its square, and how often it is close to 0 and to 1."""
    share = np.array([draw() for _ in range(n)])
    return summary(np.stack([share, share**2, share < 0.1, share > 0.9], 1))


def torchvisions():
    """The moments of torchvision's transforms."""
    import torch
    from torchvision import transforms
    from torchvision.transforms import v2

    torch.manual_seed(0)
    picture = Image.fromarray(PICTURE)
    jitter, rand = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1), transforms.RandAugment()
    strong = transforms.RandAugment(1, 30)

    def crop(height, width):
        whole = torch.empty(3, height, width)
        return transforms.RandomResizedCrop.get_params(whole, [0.08, 1.0], [3 / 4, 4 / 3])

    def cut(alpha):
        made = v2.CutMix(alpha=alpha, num_classes=2)
        return lambda: made.make_params([torch.empty(2, 3, 24, 32)])["lam_adjusted"]

    def mixed(alpha):
        made = v2.MixUp(alpha=alpha, num_classes=2)
        return lambda: made.make_params([])["lam"]

    return {
        "random_resized": crop_moments(crop).tolist(),
        "color_jitter": picture_moments(lambda: np.asarray(jitter(picture))).tolist(),
        "rand_augment": picture_moments(lambda: np.asarray(rand(picture))).tolist(),
        "strong": picture_moments(lambda: np.asarray(strong(picture))).tolist(),
        "mixup": share_moments(mixed(0.2)).tolist(),
        "cutmix": share_moments(cut(1.0)).tolist(),
    }


def assert_same_moments(ours, theirs):
    (a, da), (b, db) = np.moveaxis(ours, -1, 0), np.moveaxis(np.asarray(theirs), -1, 0)
    assert a.shape == b.shape
    far = np.abs(a - b) / (np.hypot(da, db) + 3e-5)
    assert far.max() < 4.5, far.round(1)


def ours(part):
    """The moments of jdl's, under the same names, of this part of the draws."""
    crops = iter(range(10**9))
    augmentation = Augmentation(crop="random_resized")

    def crop(height, width):
        number = next(crops)
        if number % 1000 == 0:
            crop.draws = augmentation.draws(number, np.arange(1000))
        return augmentation.crop_of(crop.draws[number % 1000]).box(height, width, (8, 8))

    rng = np.random.default_rng(0)
    changes = {
        "color_jitter": partial(jd.color_jitter(), PICTURE, rng),
        "rand_augment": partial(jd.rand_augment(), PICTURE, rng),
        "strong": partial(jd.rand_augment(num_ops=1, magnitude=30), PICTURE, rng),
    }
    return {
        "random_resized": crop_moments(crop, round(20_000 * part)),
        **{name: picture_moments(change, round(3000 * part)) for name, change in changes.items()},
        "mixup": shares(jd.mixup(0.2, num_classes=2)),
        "cutmix": shares(jd.cutmix(1.0, num_classes=2)),
    }


def shares(transform, n=20_000):
    """The moments of λ as the labels show it."""
    batch = {"image": jnp.zeros((2, 24, 32, 3)), "label": jnp.array([0, 1])}
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(jax.vmap(lambda key: transform(batch, key)["label"][0, 0]))
    found = iter(np.asarray(draw(keys)))
    return share_moments(lambda: next(found), n)


@pytest.mark.parametrize("part", [0.15, pytest.param(1, marks=pytest.mark.slow)])
def test_moments_are_those_recorded_of_torchvision(part):
    for name, found in ours(part).items():
        assert_same_moments(found, TORCHVISION[name])


@pytest.mark.slow
def test_moments_are_those_of_the_torchvision_installed():
    pytest.importorskip("torchvision")
    theirs = torchvisions()
    for name, found in ours(1).items():
        assert_same_moments(found, theirs[name])


def test_crops_moments_have_their_closed_forms():
    """In a large square image nearly every attempt fits: the area is uniform, log ratio too."""
    draws = Augmentation(crop="random_resized", crop_area=0.1).draws(0, np.arange(5000))
    augmentation = Augmentation(crop="random_resized", crop_area=0.1, crop_ratio=(0.9, 1 / 0.9))
    boxes = [augmentation.crop_of(row).box(10_000, 10_000, (8, 8)) for row in draws]
    top, left, tall, wide = np.array(boxes).T
    area, ratio = tall * wide / 1e8, np.log(wide / tall)
    fits = area < 0.9  # larger ones may be drawn again
    assert area[fits].mean() == pytest.approx((0.1 + 0.9) / 2, abs=0.01)
    assert ratio[fits].var() == pytest.approx((2 * np.log(1 / 0.9)) ** 2 / 12, rel=0.05)
    assert (top / (10_000 - tall)).mean() == pytest.approx(0.5, abs=0.015)
    assert (left / (10_000 - wide)).var() == pytest.approx(1 / 12, rel=0.05)
    assert (top + tall).max() <= 10_000
    assert (left + wide).max() <= 10_000


# ---------------------------------------------------------------------- pixels


class Drawn(np.random.Generator):
    """In place of a generator: gives what is wanted."""

    def __init__(self, factors=(), order=(), integers=(), signs=()):
        super().__init__(np.random.PCG64())
        self.factors, self.order, self.signs = iter(factors), order, signs
        self._integers = integers

    def uniform(self, low, high):
        factor = next(self.factors)
        assert low <= factor <= high
        return factor

    def permutation(self, n):
        return np.array(self.order)

    def integers(self, n, size):
        assert n == 14
        return np.array(self._integers)

    def choice(self, options, size):
        return np.array(self.signs)


def by_pillow(image, name, factor):
    if name == "hue":
        hue, saturation, value = (np.asarray(band) for band in image.convert("HSV").split())
        turned = ((hue.astype(int) + int(factor * 255)) % 256).astype(np.uint8)
        bands = [Image.fromarray(band) for band in (turned, saturation, value)]
        return Image.merge("HSV", bands).convert("RGB")
    return getattr(ImageEnhance, name)(image).enhance(factor)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_color_jitter_is_pillows_operations_in_the_drawn_order(order):
    factors = {"Brightness": 1.3, "Contrast": 0.7, "Color": 1.37, "hue": -0.07}
    found = jd.color_jitter()(PICTURE, Drawn(factors.values(), order))
    image = Image.fromarray(PICTURE)
    for i in order:
        image = by_pillow(image, *[*factors.items()][i])
    np.testing.assert_array_equal(found, np.asarray(image))
    for name in ("hue", "saturation"):  # a gray image has neither
        gray = PICTURE[:, :, :1]
        off = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
        augment = jd.color_jitter(**{**off, name: 0.5})
        np.testing.assert_array_equal(augment(gray, np.random.default_rng(0)), gray)
    same = jd.color_jitter(brightness=0, contrast=0, saturation=0, hue=0)
    np.testing.assert_array_equal(same(PICTURE, np.random.default_rng(0)), PICTURE)


def moved(across, down):
    """The picture shifted by whole pixels, with black behind."""
    out = np.zeros_like(PICTURE)
    height, width = PICTURE.shape[:2]
    rows = slice(max(down, 0), height + min(down, 0)), slice(max(-down, 0), height - max(down, 0))
    columns = (
        slice(max(across, 0), width + min(across, 0)),
        slice(max(-across, 0), width - max(across, 0)),
    )
    out[rows[0], columns[0]] = PICTURE[rows[1], columns[1]]
    return out


def test_rand_augments_operations_are_pillows():
    image = Image.fromarray(PICTURE)

    def found(which, sign, magnitude=9):
        augment = jd.rand_augment(num_ops=1, magnitude=magnitude)
        return augment(PICTURE, Drawn(integers=[which], signs=[sign]))

    for sign in (1, -1):
        expected = {
            0: image,
            3: moved(sign * int(150 / 331 * 32 * 0.3), 0),
            4: moved(0, sign * int(150 / 331 * 24 * 0.3)),
            5: image.rotate(sign * 9),
            6: ImageEnhance.Brightness(image).enhance(1 + sign * 0.27),
            7: ImageEnhance.Color(image).enhance(1 + sign * 0.27),
            8: ImageEnhance.Contrast(image).enhance(1 + sign * 0.27),
            9: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.27),
            10: ImageOps.posterize(image, 7),
            11: np.where(PICTURE < 178.5, PICTURE, 255 - PICTURE),
            12: ImageOps.autocontrast(image),
            13: ImageOps.equalize(image),
        }
        for which, picture in expected.items():
            np.testing.assert_array_equal(found(which, sign), np.asarray(picture), str(which))
        slanted = found(1, sign), found(2, sign)
        for y, x in ((0, 5), (10, 15), (23, 20)):  # sampled at the middle of a pixel
            source = int(np.floor(x + 0.5 + sign * 0.09 * (y + 0.5)))
            np.testing.assert_array_equal(slanted[0][y, x], PICTURE[y, source])
            source = int(np.floor(y + 0.5 + sign * 0.09 * (x + 0.5)))
            expected_pixel = PICTURE[source, x] if 0 <= source < 24 else [0, 0, 0]
            np.testing.assert_array_equal(slanted[1][y, x], expected_pixel)
    two = jd.rand_augment()(PICTURE, Drawn(integers=[12, 5], signs=[1, -1]))
    np.testing.assert_array_equal(two, np.asarray(ImageOps.autocontrast(image).rotate(-9)))


def test_operations_are_those_of_the_torchvision_installed():
    pytest.importorskip("torchvision")
    from torchvision.transforms import InterpolationMode, RandAugment, autoaugment

    names = "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast"
    names = f"{names} Sharpness Posterize Solarize AutoContrast Equalize".split()
    for size in ((32, 24), (224, 224), (331, 97)):
        image = Image.fromarray(PICTURE).resize(size)
        space = RandAugment()._augmentation_space(31, size[::-1])
        assert {*space} == {*names}
        for operation, name in zip(augments._OPERATIONS, names, strict=True):
            magnitudes, signed = space[name]
            for number in range(31):
                for sign in (1, -1) if signed else (1,):
                    size_ = float(magnitudes[number]) if magnitudes.ndim else 0.0
                    theirs = autoaugment._apply_op(
                        image, name, sign * size_, InterpolationMode.NEAREST, None
                    )
                    found = np.asarray(operation(image, sign * number / 30)).astype(int)
                    off = np.abs(found - np.asarray(theirs))
                    assert off.max() <= 1, (name, number, sign)
                    if name not in ("Brightness", "Color", "Contrast", "Sharpness"):
                        assert off.max() == 0  # the others' magnitudes are float32 there


# ---------------------------------------------------------------------- through from_tar


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(20):
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            out = io.BytesIO()
            small.resize((90 + i, 70), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
            info = tarfile.TarInfo(f"{i % 3}/{i:02d}.jpg")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    return str(tmp_path / "a.tar")


OPTIONS = {
    "crop": "random_resized",
    "flip": True,
    "augment": ["color_jitter", jd.rand_augment(magnitude=5), "rand_augment"],
}


def epochs(path, **options):
    """Of two epochs: record -> image."""
    given = {"size": (24, 24), "batch_size": 6, "epochs": 2, "threads": 0, **OPTIONS, **options}
    data = from_tar(path, label=lambda name: name[2:4], **given)
    found = [{}, {}]
    for number, batch in enumerate(data):
        for image, label, counts in zip(*batch.values(), strict=True):
            if counts:
                found[number // data.steps_per_epoch][int(label)] = image
    return found


def same(a, b):
    return [np.array_equal(a[i], b[i]) for i in range(20)]


def test_the_picture_depends_on_seed_epoch_and_record_alone(pictures):
    one = epochs(pictures)
    assert sorted(one[0]) == [*range(20)]
    for options in ({"threads": 3, "shuffle": True}, {"batch_size": 7}):
        two = epochs(pictures, **options)
        assert all(same(one[0], two[0]) + same(one[1], two[1]))
    assert not any(same(one[0], one[1]))
    assert not any(same(one[0], epochs(pictures, seed=1)[0]))


@pytest.mark.slow
def test_the_picture_is_the_same_in_worker_processes(pictures):
    def batches(workers):
        return [*from_tar(pictures, size=(24, 24), batch_size=6, workers=workers, **OPTIONS)]

    for a, b in zip(batches(0), batches(2), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_the_pictures_are_the_same_after_a_resume(pictures):
    def data():
        return iter(from_tar(pictures, size=(24, 24), batch_size=6, epochs=None, **OPTIONS))

    whole = data()
    next(whole)
    position = whole.get_state()
    expected = [next(whole) for _ in range(6)]
    resumed = data()
    resumed.set_state(position)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed)["image"], batch["image"])


def test_a_random_resized_crop_is_the_window_cut_out_and_resized(pictures, monkeypatch):
    plain = {"flip": False, "augment": None, "exact": True}
    found = epochs(pictures, **plain)[0]
    augmentation = Augmentation(crop="random_resized")
    draws = augmentation.draws(0, np.arange(20))
    if images.simplejpeg is not None:
        monkeypatch.setattr(images, "_with_pillow", None)  # it is not needed
    fast = epochs(pictures, **plain | {"exact": False})[0]
    sizes = set()
    with tarfile.open(pictures) as tar:
        for i, info in enumerate(tar):
            image = Image.open(tar.extractfile(info))
            top, left, tall, wide = augmentation.crop_of(draws[i]).box(70, 90 + i, (24, 24))
            box = (left, top, left + wide, top + tall)
            expected = image.resize((24, 24), Image.Resampling.BILINEAR, box=box)
            np.testing.assert_allclose(found[i], np.asarray(expected), atol=1)
            assert np.abs(fast[i].astype(int) - np.asarray(expected)).mean() < 10
            sizes.add((tall, wide))
    assert len(sizes) > 15


def test_a_resized_crop_has_a_pixel_in_the_narrowest_image():
    for width, height, ratio in ((50, 1, (0.1, 0.3)), (1, 50, (5.0, 6.0))):
        out = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(out, "PNG")
        crop = images.ResizedCrop(1.0, ratio, np.zeros((1, 4)))
        assert crop.box(height, width, (8, 8))[2:] == (1.0, 1.0)
        found = images.decode(out.getvalue(), size=(8, 8), crop=crop)
        assert (found == (255, 0, 0)).all()


def test_augmentations_that_cannot_be_meant_are_refused(pictures):
    options = {"size": (8, 8), "batch_size": 5}
    for wrong in ("colour_jitter", ["color_jitter", "x"], "mixup"):
        with pytest.raises(ArgumentError, match=r"`augment` must be .*color_jitter, rand_augment"):
            from_tar(pictures, augment=wrong, **options)
    with pytest.raises(ArgumentError, match=r"batch_transform=jdl\.data\.mixup"):
        from_tar(pictures, augment="cutmix", **options)
    with pytest.raises(ArgumentError, match=r"`augment` must be .*, got \{'hue': 0\.1\}"):
        augments._named({"hue": 0.1})
    for ratio in ((4 / 3, 3 / 4), (0.0, 1.0), (1.0, 2e3)):
        with pytest.raises(ArgumentError, match="crop_ratio"):
            from_tar(pictures, crop="random_resized", crop_ratio=ratio, **options)
    with pytest.raises(ArgumentError, match="crop_area"):
        from_tar(pictures, crop="random_resized", crop_area=0.0, **options)
    for name, wrong in {
        "hue": 0.6,
        "brightness": -1,
        "contrast": (1, 0.5),
        "saturation": "a",
    }.items():
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            jd.color_jitter(**{name: wrong})
    for wrong in ({"num_ops": 0}, {"magnitude": 31}, {"magnitude": -1}):
        with pytest.raises(ArgumentError, match=f"`{next(iter(wrong))}`"):
            jd.rand_augment(**wrong)


def test_augmentations_can_be_pickled():
    for augment in (jd.color_jitter(hue=0), jd.rand_augment()):
        again = pickle.loads(pickle.dumps(augment))
        a, b = (f(PICTURE, np.random.default_rng(1)) for f in (augment, again))
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------- mixup and cutmix

K = 5
MIXUP, CUTMIX = jd.mixup(1.0, num_classes=K), jd.cutmix(num_classes=K)
JITTED = {f: jax.jit(f) for f in (MIXUP, CUTMIX)}  # compiled once for all masks


def labelled(n=12, mask=None):
    rng = np.random.default_rng(0)
    image = rng.random((n, 9, 7, 3)).astype(np.float32)
    batch = {"image": image, "label": rng.integers(0, K, n).astype(np.int32)}
    return batch if mask is None else {**batch, "mask": np.asarray(mask, np.float32)}


def before(mask):
    """For each row that counts, the one before it; others themselves."""
    rows = np.flatnonzero(mask)
    found = np.arange(len(mask))
    found[rows] = np.roll(rows, 1)
    return found


MASKS = [None, np.ones(12), [1] * 8 + [0] * 4, [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0], [0] * 11 + [1]]


@pytest.mark.parametrize("mask", [*MASKS, np.zeros(12)])
def test_mixup_is_a_sum_of_each_row_and_the_one_before(mask):
    batch = labelled(mask=mask)
    mixed = JITTED[MIXUP](batch, jax.random.key(1))
    share = float(jax.random.beta(jax.random.split(jax.random.key(1))[0], 1.0, 1.0))
    assert 0.05 < share < 0.95
    other = before(np.ones(12) if mask is None else mask)
    expected = share * batch["image"] + (1 - share) * batch["image"][other]
    np.testing.assert_allclose(mixed["image"], expected, rtol=1e-5)
    one_hot = np.eye(K)[batch["label"]]
    np.testing.assert_allclose(mixed["label"], share * one_hot + (1 - share) * one_hot[other], 1e-5)
    assert [*mixed] == [*batch]


@pytest.mark.parametrize("mask", MASKS)
def test_cutmix_mixes_labels_by_the_area_of_its_box(mask):
    batch = labelled(mask=mask)
    other = before(np.ones(12) if mask is None else mask)
    one_hot, areas = np.eye(K)[batch["label"]], set()
    for seed in range(20):
        mixed = JITTED[CUTMIX](batch, jax.random.key(seed))
        image, label = np.asarray(mixed["image"]), np.asarray(mixed["label"])
        there = np.any(image != batch["image"], (0, 3))
        rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        box = np.zeros((9, 7), bool)
        if len(rows):
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        if len({*other}) > 1 and not np.array_equal(other, np.arange(12)):
            np.testing.assert_array_equal(there, box)  # one rectangle, the same in all rows
            areas.add(int(box.sum()))
            share = 1 - box.mean()
            expected = share * one_hot + (1 - share) * one_hot[other]
            np.testing.assert_allclose(label, expected, atol=1e-6)
        expected = np.where(box[None, :, :, None], batch["image"][other], batch["image"])
        np.testing.assert_array_equal(image, expected)
    assert len(areas) > 8 or other.tolist() == [*range(12)]


def scaled(low, high):
    """A transform that compiles fast."""
    return lambda batch, key: {
        **batch,
        "image": batch["image"] * jax.random.uniform(key, minval=low, maxval=high),
    }


def test_one_of_two_transforms_at_each_step():
    both = jax.jit(jd.one_of(scaled(0.0, 1.0), scaled(2.0, 3.0)))
    found = [float(both(labelled(), jax.random.key(seed))["image"].max()) for seed in range(60)]
    assert len({*found}) == 60
    assert 18 < sum(largest < 1 for largest in found) < 42


def test_losses_and_metrics_take_mixed_labels():
    batch = JITTED[MIXUP](labelled(), jax.random.key(1))
    outputs = jnp.asarray(np.random.default_rng(1).normal(size=(12, K)), jnp.float32)
    label = np.asarray(batch["label"])
    expected = -(label * np.log(np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True))).sum(1)
    np.testing.assert_allclose(losses.softmax_cross_entropy(outputs, batch), expected, rtol=1e-5)
    larger = {"label": label.argmax(1)}
    for metric in (metrics.accuracy, metrics.top_k_accuracy(2), metrics.confusion_matrix):
        np.testing.assert_array_equal(metric(outputs, batch), metric(outputs, larger))
        one_hot = {"label": np.eye(K, dtype=np.int32)[larger["label"]]}
        np.testing.assert_array_equal(metric(outputs, one_hot), metric(outputs, larger))


def test_a_class_number_outside_makes_the_loss_nan():
    batch = labelled()
    batch["label"][3] = K
    mixed = JITTED[MIXUP](batch, jax.random.key(0))
    loss = jax.jit(losses.softmax_cross_entropy)(jnp.zeros((12, K)), mixed)
    assert np.isnan(loss).tolist() == [i in (3, 4) for i in range(12)]


def test_batches_that_cannot_be_mixed_are_refused():
    transform = jd.mixup(num_classes=K)
    image, label = labelled().values()
    for batch, said in (
        ({"image": image}, "'image': 'float32"),
        ({"image": image[:, 0], "label": label}, "float32"),
        ({"image": image.astype(np.uint8), "label": label}, "uint8"),
        ({"image": image, "label": label / 2}, "'label': 'float64"),
    ):
        with pytest.raises(UserError, match=f"`batch_transform` must be left out unless .*{said}"):
            transform(batch, jax.random.key(0))
    for wrong in ({"alpha": 0.0, "num_classes": 3}, {"num_classes": 0}):
        with pytest.raises(ArgumentError):
            jd.cutmix(**wrong)


# ---------------------------------------------------------------------- in the training step


def training(optimizer="adam", devices=1, transform=MIXUP, **options):
    net = MLP(widths=(8,), num_outputs=K, dropout=0.2)
    options = {"devices": jax.devices()[:devices], "batch_transform": transform, **options}
    return jdl.classifier(net, optimizer, **options)


def dataset(batch_size=8, n=30):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (n, 4, 4, 1)).astype(np.uint8)
    return from_arrays(image, rng.integers(0, K, n), batch_size=batch_size, epochs=None)


def test_a_resumed_training_transforms_the_same_bit_for_bit(tmp_path):
    def trained(folder):
        transform = jd.one_of(scaled(0.0, 1.0), scaled(2.0, 3.0))
        return training(optax.sgd(0.1), transform=transform, workdir=tmp_path / folder)

    whole = trained("a").train(dataset(), steps=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole.train(dataset(), steps=3)
    resumed = trained("b").train(dataset(), max_steps=5)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lbfgs", "hf", "kfac", "natural_gradient"])
def test_second_order_methods_see_one_mixed_batch_in_a_step(optimizer):
    seen = []

    def keep(batch, key):
        mixed = MIXUP(batch, key)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), mixed["image"])
        return mixed

    estimator = training(registry.by_name(optimizer), transform=keep)
    estimator.train(dataset(), steps=3)
    jax.effects_barrier()
    # Mixed once a step, whatever the method evaluates, and once for the check of the first batch.
    assert len(seen) == 1 + 3
    assert not np.array_equal(seen[1], seen[2])


def test_the_step_is_that_of_the_mixed_batch():
    """One step of gradient descent, from the loss of the batch that the transform gives."""
    held = []

    def keep(batch, key):
        mixed = MIXUP(batch, key)
        jax.debug.callback(lambda x: held.append(x), mixed)
        return mixed

    net = MLP(widths=(), num_outputs=K)
    estimator = jdl.classifier(net, optax.sgd(0.5), batch_transform=keep, devices=jax.devices()[:1])
    start = estimator.initialize(dataset()).params
    estimator.train(dataset(), steps=1)
    jax.effects_barrier()
    *_, mixed = held  # the check of the first batch transforms it too
    x, y = np.asarray(mixed["image"]).reshape(8, -1), np.asarray(mixed["label"])
    (name,) = start
    kernel, bias = (np.asarray(start[name][part]) for part in ("kernel", "bias"))
    slope = (scipy.special.softmax(x @ kernel + bias, axis=1) - y) / 8
    found = estimator.params[name]
    np.testing.assert_allclose(found["kernel"], kernel - 0.5 * x.T @ slope, atol=1e-6)
    np.testing.assert_allclose(found["bias"], bias - 0.5 * slope.sum(0), atol=1e-6)


def test_evaluation_and_prediction_never_mix():
    def refuse(batch, key):
        raise AssertionError

    estimator = training(transform=refuse).initialize(dataset())
    assert 0 <= estimator.evaluate(dataset())["accuracy"] <= 1
    assert estimator.predict(dataset()).shape == (30, K)
    with pytest.raises(AssertionError):
        estimator.train(dataset(), steps=1)


@pytest.mark.slow
def test_a_mesh_mixes_the_global_batch_and_pmap_each_devices_part():
    one = training(optax.sgd(0.1)).train(dataset(), steps=3)
    for mode in ("jit", "fsdp"):
        two = training(optax.sgd(0.1), devices=2, parallel=mode).train(dataset(), steps=3)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), one.params, two.params)

    def halves(batch, key):
        parts = [{k: x[i : i + 4] for k, x in batch.items()} for i in (0, 4)]
        mixed = [MIXUP(part, key) for part in parts]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *mixed)

    options = {"parallel": "pmap", "remat": False}
    net = MLP(widths=(8,), num_outputs=K)
    devices = jax.devices()
    apart = jdl.classifier(net, optax.sgd(0.1), devices=devices[:1], batch_transform=halves)
    two = jdl.classifier(net, optax.sgd(0.1), devices=devices, batch_transform=MIXUP, **options)
    apart.train(dataset(), steps=3)
    two.train(dataset(), steps=3)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), apart.params, two.params)


def test_a_transform_that_is_no_function_of_batches_is_refused():
    wrong = iter((lambda batch: batch["image"], lambda batch: {"image": batch["image"]}))
    estimator = training(transform=lambda batch, key: next(wrong)(batch))
    for _ in range(2):
        with pytest.raises(UserError, match="`batch_transform` must be a function"):
            estimator.train(dataset(), steps=1)
