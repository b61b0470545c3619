"""A trunk: a trained network as a function from images to the activations of named layers.

Published networks, files of weights, runs of `jdl train` and Linen modules all become trunks, and
all of `jdl.vision` works on any trunk.
"""

import difflib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdl.core import check
from jdl.core.jaxpr import CALLS, CUSTOM, Evaluator, Site, bind, depend
from jdl.core.model import Model
from jdl.core.types import ModelState, Params

Features = dict[str, jax.Array]  # layer -> activations, [N, h, w, C] or [N, C]
Edits = Mapping[str, jax.Array]  # layer -> array that is added to its activations

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, in a gray picture


class Trunk(NamedTuple):
    """A network that returns the activations of named layers.

    `apply` is pure: pass it to `jax.jit` and `jax.grad` with `params` as an argument. Images are
    float32 [N, H, W, 3], RGB in [0, 1], of any size; `apply` converts them to the range, channels
    and size that the network was trained on.

    Attributes:
      name: the name it was loaded by.
      layers: names in the order of computation.
      params: the first argument of `apply`.
      apply: `apply(params, images, layers, edits=None) -> {layer: activations}`, which computes no
        more than the last of these layers needs; `edits`, {layer: array}, are added to the
        activations of the layers they name.
      head: the layer of a classifier's logits [N, K], or None.
      scores: the layer whose spatial means are the logits before a final ReLU, or None; they have
        a gradient even where a logit is 0.
      classes: names of the K classes, or () if unknown.
      size: (height, width) of the training images, or None.
      stretched: whether a picture that is classified is stretched to `size`, not cropped.
      blind: layers that do not depend on the images, such as those of a GAN's generator.

    >>> doubled = Trunk("twice", ("twice",), 2.0, lambda p, x, layers: {"twice": p * x})
    >>> doubled.features(jnp.ones((1, 4, 4, 3)), "twice")["twice"].shape
    (1, 4, 4, 3)
    """

    name: str
    layers: tuple[str, ...]
    params: Params
    apply: Callable[..., Features]
    head: str | None = None
    scores: str | None = None
    classes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    stretched: bool = False
    blind: tuple[str, ...] = ()

    def features(self, images: Any, layers: str | Sequence[str]) -> Features:
        """The activations of the layers, for images [N, H, W, 3] in [0, 1].

        Raises:
          ArgumentError: for an unknown layer, with the nearest names; for an array of another
            shape or type.
        """
        names = self.known(layers)
        check_images(images)
        return jax.jit(self.apply, static_argnums=2)(self.params, jnp.asarray(images), names)

    def with_head(self) -> str:
        """The name of the layer of the logits; raises where the network has none."""
        if self.head is None:
            raise check.ArgumentError(f"`model` must be a classifier; {self.name} has no classes.")
        return self.head

    def class_number(self, wanted: int | str) -> int:
        """The number of a class, given by number or name; an error has the nearest names."""
        self.with_head()
        text = str(wanted)
        if text in self.classes:
            return self.classes.index(text)
        if text.isdigit() and (not self.classes or int(text) < len(self.classes)):
            return int(text)
        near = difflib.get_close_matches(text, self.classes, n=4, cutoff=0.4)
        must = f"one of the {len(self.classes)} classes of {self.name}, or its number"
        hint = f"The nearest: {', '.join(near)}." if near else ""
        raise check.ArgumentError(f"`class` must be {must}, got {wanted!r}. {hint}".rstrip())

    def class_name(self, number: int) -> str:
        """The name of a class, or its number if it has no name."""
        return self.classes[number] if number < len(self.classes) else str(number)

    def known(self, layers: str | Sequence[str]) -> tuple[str, ...]:
        """The layers as a tuple; raises unless the trunk has them all."""
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        check.argument(bool(names), "layers", "at least one layer", names)
        for name in names:
            must = f"one that depends on the picture; {self.name} computes this one without it"
            check.argument(name not in self.blind, "layer", must, name)
            if name not in self.layers:
                near = difflib.get_close_matches(str(name), self.layers, n=4, cutoff=0.4)
                raise check.ArgumentError(
                    f"`layer` must be one of the {len(self.layers)} layers of {self.name}, "
                    f"got {name!r}. The nearest: {', '.join(near or self.layers[:4])}."
                )
        return names

    def shapes(self, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of the layers' activations for one image of the training size."""
        example = jax.ShapeDtypeStruct((1, *(self.size or (224, 224)), 3), jnp.float32)
        found = jax.eval_shape(partial(self.apply, layers=tuple(layers)), self.params, example)
        return {name: found[name].shape for name in layers}

    def check_channels(self, layers: Sequence[str], channels: Sequence[int]) -> None:
        """Raises unless every layer has all of the channels."""
        for name, shape in self.shapes(layers).items():
            must = f"an integer from 0 to {shape[-1] - 1}, the channels of {name}"
            for channel in channels:
                check.argument(0 <= channel < shape[-1], "channel", must, channel)


def check_images(images: Any) -> None:
    """Raises unless these are floating-point images [N, H, W, 3] with at least one pixel."""
    shape = tuple(getattr(images, "shape", ()))
    ok = len(shape) == 4 and shape[3] == 3 and all(n > 0 for n in shape)
    check.argument(ok, "images", "of shape [N, H, W, 3], none of them 0", shape)
    floating = jnp.issubdtype(images.dtype, jnp.floating)
    check.argument(floating, "images", "floating-point numbers in [0, 1]", str(images.dtype))


def usual_layer(trunk: Trunk) -> str:
    """A layer of a published network that responds to parts of objects.

    Of other networks the last layer with activations [N, h, w, C], or else the last layer.
    """
    for name in ("relu4_3", "fire8", "layer3.2"):
        if name in trunk.layers:
            return name
    maps = [name for name, shape in trunk.shapes(trunk.layers).items() if len(shape) == 4]
    return (maps or trunk.layers)[-1]


def of_linen(
    module: nn.Module,
    params: Params,
    state: ModelState | None = None,
    *,
    image_shape: tuple[int, int, int],
    name: str = "",
    classes: Sequence[str] = (),
) -> Trunk:
    """The trunk of a trained Linen module.

    Its layers are its submodules' paths, such as "Conv_0" or "encoder/Dense_1", and "output".
    Images are resized to `image_shape`, (height, width, channels), and made gray for one channel.
    `state` are the module's other collections; a classifier's outputs have the names `classes`.

    >>> from jdl.models import CNN
    >>> cnn = CNN(num_classes=3, units=8)
    >>> params = cnn.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))["params"]
    >>> trunk = of_linen(cnn, params, image_shape=(8, 8, 1))
    >>> trunk.layers
    ('Conv_0', 'Conv_1', 'Dense_0', 'Dropout_0', 'logits', 'output')
    >>> trunk.features(jnp.ones((2, 30, 40, 3)), "Conv_1")["Conv_1"].shape
    (2, 4, 4, 32)
    """

    def outputs(variables: Any, images: jax.Array, edits: Edits) -> Features:
        calls: Counter[tuple[str, ...]] = Counter()  # of each submodule

        def edited(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out, path = call(*args, **kwargs), context.module.path
            if context.method_name != "__call__":
                return out
            layer = _layer(path, calls[path])
            calls[path] += 1
            return out + edits[layer] if layer in edits else out

        with nn.intercept_methods(edited):
            x = as_trained(images, image_shape)
            out, caught = module.apply(
                variables, x, capture_intermediates=True, mutable=["intermediates"]
            )
        found: Features = {}
        _collect(caught["intermediates"], (), found)
        if isinstance(out, jax.Array):
            found["output"] = out
        return found

    name = name or type(module).__name__
    return _of_function(outputs, {"params": params, **(state or {})}, image_shape, name, classes)


def of_model(
    model: Model,
    params: Params,
    state: ModelState | None = None,
    *,
    image_shape: tuple[int, int, int],
    name: str = "model",
    classes: Sequence[str] = (),
) -> Trunk:
    """The trunk of any `Model`.

    Its layers are the results of its convolutions and matrix products, numbered in the order of
    computation: "conv_1", "dot_1", and "output". Calls are traced; layers inside loops and branches
    have no name. A function with a custom derivative keeps it, unless a layer in it is edited.

    >>> from jdl.core.model import from_fns
    >>> weights = jnp.ones((12, 5))
    >>> model = from_fns(lambda key, x: weights, lambda w, x: jnp.tanh(x.reshape(-1, 12) @ w))
    >>> of_model(model, weights, image_shape=(2, 2, 3)).layers
    ('dot_1', 'output')
    """

    def outputs(variables: Any, images: jax.Array, edits: Edits) -> Features:
        x = as_trained(images, image_shape)
        run = lambda v, x: model.apply(v["params"], v["state"], x)[0]  # noqa: E731
        program, shape = jax.make_jaxpr(run, return_shape=True)(variables, x)
        leaves, found = _record(program, jax.tree.leaves((variables, x)), edits)
        if isinstance(shape, jax.ShapeDtypeStruct):
            found["output"] = leaves[0]
        return found

    variables = {"params": params, "state": {} if state is None else state}
    return _of_function(outputs, variables, image_shape, name, classes)


def as_trained(images: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
    """RGB images converted to the height, width and channels of a model's training images."""
    height, width, channels = image_shape
    if channels == 1:
        images = images @ jnp.asarray(LUMA, images.dtype).reshape(3, 1)
    if images.shape[1:3] == (height, width):
        return images
    return jax.image.resize(images, (images.shape[0], height, width, channels), "linear")


def _of_function(
    outputs: Callable[[Any, jax.Array, Edits], Features],
    variables: Any,
    image_shape: tuple[int, int, int],
    name: str,
    classes: Sequence[str],
) -> Trunk:
    """The trunk of a function that computes every layer; XLA removes what is not used."""
    ok = len(image_shape) == 3 and image_shape[2] in (1, 3)
    check.argument(ok, "image_shape", "(height, width, channels) with 1 or 3 channels", image_shape)
    height, width = image_shape[:2]
    order: list[str] = []

    def noting_order(variables: Any, images: jax.Array) -> Features:
        found = outputs(variables, images, {})
        order.extend(found)
        return found

    example = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    program, shapes = jax.make_jaxpr(noting_order, return_shape=True)(variables, example)
    marks = depend(program, [*(False for _ in jax.tree.leaves(variables)), True])
    sees = jax.tree.unflatten(jax.tree.structure(shapes), marks)
    if not any(marks):
        raise check.UserError(f"{name} has no layers with names that depend on the picture.")

    def apply(
        variables: Any, images: jax.Array, layers: Sequence[str], edits: Edits | None = None
    ) -> Features:
        found = outputs(variables, images, edits or {})
        return {layer: found[layer] for layer in layers}

    is_classifier = bool(classes) and "output" in shapes and len(shapes["output"].shape) == 2
    return Trunk(
        name=name,
        layers=tuple(layer for layer in order if sees[layer]),
        params=variables,
        apply=apply,
        head="output" if is_classifier else None,
        classes=tuple(classes),
        size=(height, width),
        blind=tuple(layer for layer in order if not sees[layer]),
    )


def _layer(path: tuple[str, ...], call: int) -> str:
    """The name of what a submodule returns, by the number of the call."""
    return "/".join(path) + (f"#{call + 1}" if call else "")


def _collect(tree: Any, path: tuple[str, ...], found: Features) -> None:
    """Adds the arrays that submodules returned; that of a second call is "Dense_0#2"."""
    for key, value in tree.items():
        if key == "__call__":
            for i, out in enumerate(value):
                if path and isinstance(out, jax.Array):
                    found[_layer(path, i)] = out
        elif isinstance(value, dict):
            _collect(value, (*path, key), found)


_LAYERS = {"conv_general_dilated": "conv", "canonical_conv": "conv", "dot_general": "dot"}


def _record(program: Any, args: Sequence[Any], edits: Edits) -> tuple[list[Any], Features]:
    """A program's outputs, and the results of its convolutions and products."""

    def visit(site: Site, inputs: list[Any], found: Features) -> Any:
        if site.name in CALLS:
            return None
        if site.name in CUSTOM:
            outputs, more = evaluator.inside(site, inputs, found)
            edited = edits.keys() & (more.keys() - found.keys())
            return outputs if edited else bind(site.eqn, inputs), more
        outputs = bind(site.eqn, inputs)
        if site.name not in _LAYERS:
            return outputs, found
        kind = _LAYERS[site.name]
        layer = f"{kind}_{1 + sum(each.startswith(f'{kind}_') for each in found)}"
        y = outputs[0] + edits[layer] if layer in edits else outputs[0]
        return [y], found | {layer: y}

    evaluator = Evaluator(visit, custom=True)
    return evaluator.run(program, args, OrderedDict())  # it keeps its order through checkpoints
