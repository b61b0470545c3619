"""The models that `jdl train` knows by name, with the settings recommended for each."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jdl.core import check, tree
from jdl.core.model import Model, ModelLike
from jdl.core.types import Batch, Key, Params
from jdl.data import Batches
from jdl.models.autoencoder import Autoencoder, Reconstruction, Variational, denoising
from jdl.models.cnn import CNN
from jdl.models.dbn import DBN, starting_at
from jdl.models.gan import GAN, optimizers
from jdl.models.layers import sparse_init
from jdl.models.mlp import MLP
from jdl.models.rbm import RBM
from jdl.models.recursive import TreeLSTM
from jdl.models.resnet import ResNet
from jdl.models.rnn import RNN
from jdl.models.transformer import LanguageModel, ViT
from jdl.recipes import formulas, own, pictures, texts
from jdl.recipes.gan_pictures import draw_from, draw_samples, samples_over_time
from jdl.recipes.tree_pictures import draw_trees
from jdl.train import boltzmann, premade
from jdl.train.estimator import Estimator

Net = MLP | CNN | RNN | ViT | ResNet | Autoencoder | RBM | TreeLSTM | GAN | ModelLike

Shape = tuple[int, ...]
LABELLED = ("classifier", "trees", "cgan")  # kinds of models that learn labels
DREAMING = 0.75  # the temperature of a belief net's samples


class Finished(NamedTuple):
    """What the pictures at the end of a run are drawn from."""

    net: Any  # the model as the recipe built it
    estimator: Estimator  # the trained Estimator
    train: Batches  # one pass over the training split
    held_out: Batches  # one pass over the test split; the training split where there is none
    workdir: Path  # the run directory, where the pictures go


class Drawn(NamedTuple):
    """What samples of a trained run are made from."""

    net: Any  # the model as the recipe built it
    estimator: Estimator  # the trained Estimator, its checkpoint restored
    workdir: Path
    image_shape: Shape
    number: int
    key: Key
    label: jax.Array | None = None  # int[number], for a model of classes
    temperature: float = 1.0
    prompt: bytes = b""  # that texts continue
    length: int = 0  # of texts, in bytes


class Recipe(NamedTuple):
    """How a model is built and trained."""

    build: Callable[[Shape, int], Net]  # `build(image_shape, num_classes) -> net`
    # what the outputs mean: "classifier", "autoencoder", "rbm", "trees", "text", "gan", "cgan" of
    # classes;
    # "own" of a file, whose run may find it a "classifier"
    kind: str
    steps: int  # the recommended number of steps on the bundled digits
    optimizer: str = "adam"  # the recommended optimizer's name
    options: Mapping[str, Any] = {}  # keyword arguments of the recommended optimizer
    batch_size: int = 64  # the recommended batch size
    # `estimator(model, optimizer, **options) -> Estimator`; by default the premade one of the kind
    estimator: Callable[..., Estimator] | None = None
    # `prepare(net, data, workdir, seed) -> model`, called before a run's first step
    prepare: Callable[[Any, Batches, Path, int], Model] | None = None
    # `pictures(finished) -> paths` of the pictures drawn at the end of a run
    pictures: Callable[[Finished], list[Path]] | None = None
    # `sample(drawn) -> images` float32[number, H, W, C] in [0, 1], of a model that makes some; of
    # texts their bytes int32[number, length]
    sample: Callable[[Drawn], ArrayLike] | None = None
    temperature: float = 1.0  # of samples, by default
    of_classes: bool = False  # whether each sample is of a class
    # the default of `--data`: "digits", "trees" or "chain" for generated data, a file, "" for none
    data: str = "digits"
    # of a file: `facts(source, some, classes)`, called before a run, returns fields of `RunConfig`
    facts: Callable[[str, Batch, tuple[str, ...]], dict[str, Any]] | None = None


def recipe(name: str) -> Recipe:
    """The recipe of that name or Python file; an error for an unknown name suggests the nearest."""
    if own.is_file(name):
        file = own.opened(name)
        file.must_define("model", "loss")
        return Recipe(
            file.model,
            "own",
            1000,
            estimator=functools.partial(own.estimator, file),
            data=own.absolute(name) if file.get("data") is not None else "",
            facts=functools.partial(own.facts, file),
        )
    return RECIPES[check.one_of("model", name, RECIPES)]


def _is_large(image_shape: Shape) -> bool:
    """Whether images have at least the pixels of 16 × 16."""
    return math.prod(image_shape) >= 256


def _cnn(image_shape: Shape, num_classes: int) -> CNN:
    return CNN(num_classes=num_classes, units=1024 if min(image_shape[:2]) >= 64 else 128)


def vit(image_shape: Shape, num_classes: int) -> ViT:
    """A vision transformer of at most 8 × 8 patches of the shorter side."""
    patch = max(2, -(-min(image_shape[:2]) // 8))
    width, depth = (192, 6) if min(image_shape[:2]) >= 64 else (64, 4)
    return ViT(num_classes, patch=patch, width=width, depth=depth, heads=4)


def resnet(image_shape: Shape, num_classes: int) -> ResNet:
    """ResNet-18 of half the width; for small images of three groups, and without the pooling."""
    if min(image_shape[:2]) >= 64:
        return ResNet(num_classes, widths=(32, 64, 128, 256))
    return ResNet(num_classes, (2, 2, 2), (16, 32, 64), stem=(3, 1), pool=False)


def _autoencoder(image_shape: Shape, num_classes: int) -> Autoencoder:
    widths = (1000, 500, 250, 30) if _is_large(image_shape) else (128, 64, 16)
    return Autoencoder(widths=widths, kernel_init=sparse_init(15))


def _autoencoder_pictures(run: Finished) -> list[Path]:
    def encode(x: ArrayLike) -> jax.Array:
        return run.net.apply({"params": run.estimator.evaluation_params}, x, method="encode")

    codes = pictures.codes(encode, run.held_out, run.workdir / "codes.png")
    return [*_reconstructions(run), codes]


def _reconstructions(run: Finished) -> list[Path]:
    return [pictures.reconstructions(run.estimator, run.held_out, run.workdir)]


def _vae(image_shape: Shape, num_classes: int) -> Variational:
    large = _is_large(image_shape)
    return Variational((500, 250), 30) if large else Variational((128, 64), 10)


def _vae_pictures(run: Finished) -> list[Path]:
    shape = pictures.some_images(run.held_out, 1)[0].shape[1:]
    drawn = Drawn(run.net, run.estimator, run.workdir, shape, 120, jax.random.key(2))
    images = np.asarray(_of_vae(drawn)).reshape(10, 12, *shape)
    title = "samples: what the decoder makes of codes from N(0, I)"
    return [*_reconstructions(run), pictures.tiles(images, run.workdir / "samples.png", title)]


def _of_vae(drawn: Drawn) -> jax.Array:
    code = drawn.temperature * jax.random.normal(drawn.key, (drawn.number, drawn.net.code))
    variables = {"params": drawn.estimator.evaluation_params}
    return jax.nn.sigmoid(drawn.net.apply(variables, code, drawn.image_shape, method="decode"))


def denoised_by(image_shape: Shape) -> Autoencoder:
    """The net that a `denoising` run trains, without the noise."""
    widths = (1000, 500) if _is_large(image_shape) else (256, 128)
    return Autoencoder(widths=widths, activation="relu", code_activation="relu")


def _denoising(image_shape: Shape, num_classes: int) -> Model:
    return denoising(denoised_by(image_shape))


def _denoising_estimator(
    model: Model, optimizer: optax.GradientTransformation, **options: Any
) -> Estimator:
    def psnr_gain(outputs: Reconstruction, batch: Batch) -> jax.Array:
        """Increase of the peak signal-to-noise ratio over the corrupted input, in decibels."""

        def error(x: Any) -> jax.Array:
            difference = jnp.square(x - batch["image"])
            return jnp.mean(difference.reshape(x.shape[0], -1), axis=1) + 1e-12

        cleaned = jax.nn.sigmoid(outputs.outputs)
        return 10 * (jnp.log10(error(outputs.corrupted)) - jnp.log10(error(cleaned)))

    return premade.autoencoder(model, optimizer, **{"metrics": {"psnr_gain": psnr_gain}, **options})


def _rbm(image_shape: Shape, num_classes: int) -> RBM:
    return RBM(hidden=500 if _is_large(image_shape) else 128, chains=64)


def _rbm_pictures(run: Finished) -> list[Path]:
    return pictures.of_rbm(run.net, run.estimator.evaluation_params, run.held_out, run.workdir)


def _of_rbm(drawn: Drawn) -> jax.Array:
    """Means given the hidden units after 1,000 Gibbs steps from noise, at energy / temperature."""
    net, keys = drawn.net, jax.random.split(drawn.key, 3)
    params = tree.scale(1.0 / drawn.temperature, drawn.estimator.evaluation_params)
    start = jax.random.bernoulli(keys[0], shape=(drawn.number, params["visible_bias"].size))
    v = net.sample(params, keys[1], start.astype(jnp.float32), 1000)
    h = net.draw_hidden(net.hidden_input(params, v), keys[2])
    v = net.visible_mean(net.visible_input(params, h))
    return v.reshape(drawn.number, *drawn.image_shape)


def _dbn(image_shape: Shape, num_classes: int) -> MLP:
    widths = (500, 500, 2000) if _is_large(image_shape) else (128, 128, 256)
    return MLP(widths=widths, num_outputs=num_classes, activation="sigmoid")


def _pretrained(net: MLP, data: Batches, workdir: Path, seed: int) -> Model:
    """The network, starting from a deep belief network trained layer by layer."""
    dbn = _belief_net(net)
    steps = [3000] * (len(net.widths) - 1) + [6000]
    print(f"pretraining: {len(steps)} layers, {', '.join(map(str, steps))} steps", flush=True)
    params = boltzmann.pretrain(
        dbn,
        data,
        steps=steps,
        optimizer=lambda i: boltzmann.momentum_switch(0.3, after=500),
        cost=1e-4,
        seed=seed,
        workdir=workdir / "pretraining",
        log_every=100,
    )
    print(f"picture: {_dreams(dbn, params, data, workdir / 'dreams.png', seed)}")
    return starting_at(net, dbn.unrolled_mlp(params, net.num_outputs)[1])


def _belief_net(net: MLP) -> DBN:
    return DBN(widths=net.widths, num_classes=net.num_outputs, samples=True, k=5)


def _dreams(dbn: DBN, params: Any, data: Batches, path: Path, seed: int) -> Path:
    """Draws samples of each of the first 12 classes."""
    x, _ = pictures.some_images(data, 1)
    names = [str(name) for name in (data.classes or range(dbn.num_classes))][:12]
    label = jnp.repeat(jnp.arange(len(names)), 12)
    dreams = _dreamt(dbn, params, jax.random.key(seed), label, DREAMING)
    title = (
        f"samples of each class: 1,000 steps of the top machine, T = {DREAMING}, labels count 4×"
    )
    return pictures.tiles(dreams.reshape(-1, 12, *x.shape[1:]), path, title, rows=names)


def _dreamt(dbn: DBN, params: Any, key: Key, label: Any, temperature: float) -> jax.Array:
    options: Any = {"label": label, "temperature": temperature, "guidance": 4.0}
    return dbn.generate(params, key, label.size, **options)


def _of_dbn(drawn: Drawn) -> jax.Array:
    """Of the belief net that the run's network started from."""
    blank = {"image": np.zeros((1, *drawn.image_shape), np.float32), "label": np.zeros(1, np.int32)}
    dbn = _belief_net(drawn.net)
    params: list[Params] = []
    for i in range(len(dbn.widths)):
        layer, workdir = dbn.layer(i, params), drawn.workdir / "pretraining" / f"layer_{i}"
        options: Any = {"labels": dbn.rbm(i).num_classes > 0, "devices": jax.devices()[:1]}
        machine = boltzmann.rbm(layer, workdir=workdir, **options)
        next(machine.predict_batches([blank]))  # restores its checkpoint
        params.append(machine.evaluation_params)
    v = _dreamt(dbn, params, drawn.key, drawn.label, drawn.temperature)
    return v.reshape(drawn.number, *drawn.image_shape)


def _dbn_pictures(run: Finished) -> list[Path]:
    x, _ = pictures.some_images(run.held_out, 1)
    kernel = run.estimator.evaluation_params["Dense_0"]["kernel"]
    return [pictures.filters(kernel, x.shape[1:], run.workdir / "filters.png")]


def _recursive(shape: Shape, num_classes: int) -> TreeLSTM:
    """Of generated trees for shapes (vocabulary,), else see `treebanks.learned`."""
    kind = "child_sum" if shape[1:] == (0,) else "nary"
    return TreeLSTM(num_classes, shape[0], 48, kind, every_node=len(shape) > 1)


def _recursive_estimator(
    net: TreeLSTM, optimizer: optax.GradientTransformation, **options: Any
) -> Estimator:
    nodes: Any = {"target": "labels", "ignore": -1} if net.every_node else {}
    return premade.classifier(net, optimizer, inputs=formulas.INPUTS, **nodes, **options)


def _tree_pictures(run: Finished) -> list[Path]:
    if run.net.every_node:  # of a file, with any number of classes
        return []
    net, packed = run.net.clone(every_node=True), formulas.packed_trees("test")
    path = run.workdir / "trees.png"
    return [draw_trees(net, run.estimator.evaluation_params, packed, formulas.WORDS, path)]


def _of_text(drawn: Drawn) -> ArrayLike:
    how: Any = drawn.prompt, drawn.number, drawn.length, drawn.key, drawn.temperature
    return texts.continued(drawn.net, drawn.estimator.evaluation_params, *how)


def _gan(image_shape: Shape, num_classes: int) -> GAN:
    height, width, channels = image_shape
    return GAN.of_shape((height, width, channels))


def _cgan(image_shape: Shape, num_classes: int) -> GAN:
    height, width, channels = image_shape
    return GAN.of_shape((height, width, channels), num_classes=num_classes)


def _of_gan(drawn: Drawn) -> ArrayLike:
    """The averaged generator's; a temperature scales the noise."""
    return draw_from(*drawn[:2], drawn.number, drawn.key, drawn.label, drawn.temperature)


def _gan_estimator(
    gan: GAN,
    optimizer: optax.GradientTransformation,
    *,
    workdir: Path,
    hooks: Any = (),
    ema: float | None = None,
    **options: Any,
) -> Estimator:
    return Estimator(
        gan.model,
        gan.loss,
        optimizers(optimizer, optimizer),
        metrics={"discriminator": gan.discriminator_loss, "generator": gan.generator_loss},
        workdir=workdir,
        inputs=("image", "label") if gan.generator.num_classes else "image",
        ema=0.99 if ema is None else ema,
        hooks=[*hooks, samples_over_time(gan, workdir)],
        **options,
    )


def _gan_pictures(run: Finished) -> list[Path]:
    # Samples are compared with the images they were trained on.
    return draw_samples(run.net, run.estimator, run.train, run.workdir)


_GAN = Recipe(
    _gan,
    "gan",
    3000,
    options={"b1": 0.5},
    estimator=_gan_estimator,
    pictures=_gan_pictures,
    sample=_of_gan,
)
_TEXT: Any = {"estimator": texts.estimator, "sample": _of_text, "data": "chain"}
_GPT = Recipe(lambda *_: LanguageModel(width=128, depth=2), "text", 1000, batch_size=32, **_TEXT)
RECIPES = {
    "mlp": Recipe(lambda _, k: MLP(num_outputs=k, widths=(500, 500)), "classifier", 400),
    "cnn": Recipe(_cnn, "classifier", 400),
    "rnn": Recipe(lambda _, k: RNN(num_outputs=k), "classifier", 600),
    "vit": Recipe(vit, "classifier", 600),
    "resnet": Recipe(resnet, "classifier", 400),
    "autoencoder": Recipe(_autoencoder, "autoencoder", 1500, pictures=_autoencoder_pictures),
    "denoising": Recipe(
        _denoising, "autoencoder", 1500, estimator=_denoising_estimator, pictures=_reconstructions
    ),
    "vae": Recipe(_vae, "autoencoder", 3000, pictures=_vae_pictures, sample=_of_vae),
    "rbm": Recipe(
        _rbm,
        "rbm",
        3000,
        "momentum",
        estimator=boltzmann.rbm,
        pictures=_rbm_pictures,
        sample=_of_rbm,
    ),
    "dbn": Recipe(
        _dbn,
        "classifier",
        3000,
        prepare=_pretrained,
        pictures=_dbn_pictures,
        sample=_of_dbn,
        temperature=DREAMING,
        of_classes=True,
    ),
    "recursive": Recipe(
        _recursive,
        "trees",
        1500,
        estimator=_recursive_estimator,
        pictures=_tree_pictures,
        data="trees",
    ),
    "gpt": _GPT,
    "lstm": _GPT._replace(build=lambda *_: RNN(256, 256, vocabulary=256, every_step=True)),
    "gan": _GAN,
    "cgan": _GAN._replace(build=_cgan, kind="cgan", of_classes=True),
}
