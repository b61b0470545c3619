"""The models by name, and the settings recommended for each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jdl.core import check


class Recipe(NamedTuple):
    """A model by name, with sane settings.

    Attributes:
      build: `build(image_shape, num_classes) -> model`.
      kind: "classifier", which `jdl predict` asks for classes, "autoencoder" or another word.
      optimizer: the recommended optimizer's name.
      steps: the recommended number of steps, on the bundled digits.
      batch_size: the recommended batch size.
      estimator: `estimator(model, optimizer, **options) -> Estimator`; by default the premade one
        of the kind.
      prepare: `prepare(model, data, workdir, seed) -> model`, before the first step of a run.
      pictures: `pictures(estimator, data, workdir) -> paths` of what it drew at the end of a run;
        `data` is the last split evaluated.
      options: of the recommended optimizer.
      data: what `--data` means where it is not given: "digits", or "trees" for generated ones.
    """

    build: Callable[[tuple[int, ...], int], Any]
    kind: str
    optimizer: str
    steps: int
    batch_size: int
    estimator: Callable[..., Any] | None = None
    prepare: Callable[[Any, Any, Path, int], Any] | None = None
    pictures: Callable[[Any, Any, Path], list[Path]] | None = None
    options: Mapping[str, Any] = {}
    data: str = "digits"


def recipe(name: str) -> Recipe:
    """The recipe of that name; an unknown name is refused and the nearest told."""
    return RECIPES[check.one_of("model", name, RECIPES)]


def _cnn(image_shape: tuple[int, ...], num_classes: int) -> Any:
    from jdl.models.cnn import CNN

    return CNN(num_classes=num_classes, units=1024 if min(image_shape[:2]) >= 64 else 128)


def _mlp(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del image_shape
    from jdl.models.mlp import MLP

    return MLP(num_outputs=num_classes, widths=(500, 500))


def _rnn(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del image_shape
    from jdl.models.rnn import RNN

    return RNN(num_outputs=num_classes)


def _autoencoder(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del num_classes
    import math

    from jdl.models.autoencoder import Autoencoder
    from jdl.models.layers import sparse_init

    widths = (1000, 500, 250, 30) if math.prod(image_shape) >= 256 else (128, 64, 16)
    return Autoencoder(widths=widths, kernel_init=sparse_init(15))


def _autoencoder_pictures(estimator: Any, data: Any, workdir: Path) -> list[Path]:
    from jdl.cli import pictures

    def encode(x: Any) -> Any:
        net = _autoencoder(x.shape[1:], 0)
        return net.apply({"params": estimator.params}, x, method="encode")

    drawn = pictures.of_autoencoder(estimator, data, workdir)
    return [*drawn, pictures.codes(encode, data, workdir, tuple(data.classes))]


def _denoising(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del num_classes
    import math

    from jdl.models.autoencoder import Autoencoder, denoising

    widths = (1000, 500) if math.prod(image_shape) >= 256 else (256, 128)
    return denoising(Autoencoder(widths=widths, activation="relu", code_activation="relu"))


def _denoising_estimator(model: Any, optimizer: Any, **options: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from jdl.train import premade

    def gain(outputs: Any, batch: Any) -> Any:
        """Decibels that the peak signal-to-noise ratio gains."""

        def error(x: Any) -> Any:
            difference = jnp.square(x - batch["image"])
            return jnp.mean(difference.reshape(x.shape[0], -1), axis=1) + 1e-12

        cleaned = jax.nn.sigmoid(outputs.outputs)
        return 10 * (jnp.log10(error(outputs.corrupted)) - jnp.log10(error(cleaned)))

    return premade.autoencoder(model, optimizer, **{"metrics": {"psnr_gain": gain}, **options})


def _denoising_pictures(estimator: Any, data: Any, workdir: Path) -> list[Path]:
    from jdl.cli import pictures

    return pictures.of_autoencoder(estimator, data, workdir)


def _rbm(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del num_classes
    import math

    from jdl.models.rbm import RBM

    return RBM(hidden=500 if math.prod(image_shape) >= 256 else 128, chains=64)


def _rbm_estimator(model: Any, optimizer: Any, **options: Any) -> Any:
    from jdl.train import boltzmann

    return boltzmann.rbm(model, optimizer, **options)


def _rbm_pictures(estimator: Any, data: Any, workdir: Path) -> list[Path]:
    from jdl.cli import pictures

    x, _ = pictures.some_images(data, 1)
    return pictures.of_rbm(_rbm(x.shape[1:], 0), estimator, data, workdir)


def _dbn(image_shape: tuple[int, ...], num_classes: int) -> Any:
    import math

    from jdl.models.mlp import MLP

    widths = (500, 500, 2000) if math.prod(image_shape) >= 256 else (128, 128, 256)
    return MLP(widths=widths, num_outputs=num_classes, activation="sigmoid")


def _pretrained(model: Any, data: Any, workdir: Path, seed: int) -> Any:
    import jax
    import jax.numpy as jnp

    from jdl.cli import pictures
    from jdl.models.dbn import DBN, starting_at
    from jdl.train import boltzmann

    dbn, steps = DBN(widths=model.widths, k=5), 3000
    print(f"pretraining: {len(model.widths)} layers, {steps} steps each", flush=True)
    params = boltzmann.pretrain(
        dbn,
        data,
        steps=steps,
        optimizer=lambda i: boltzmann.momentum_switch(0.3, after=500),
        seed=seed,
        workdir=workdir / "pretraining",
        log_every=100,
    )
    x, _ = pictures.some_images(data, 48)
    dreams = dbn.generate(params, jax.random.key(seed), 48, steps=300, start=jnp.asarray(x))
    picture = pictures.tiles(dreams.reshape(4, 12, *x.shape[1:]), workdir / "dreams.png")
    print(f"picture: {picture}")
    return starting_at(model, dbn.unrolled_mlp(params, model.num_outputs)[1])


def _dbn_pictures(estimator: Any, data: Any, workdir: Path) -> list[Path]:
    from jdl.cli import pictures

    x, _ = pictures.some_images(data, 1)
    kernel = estimator.params["Dense_0"]["kernel"]
    return [pictures.filters(kernel, x.shape[1:], workdir / "filters.png")]


def _recursive(image_shape: tuple[int, ...], num_classes: int) -> Any:
    from jdl.models.recursive import TreeLSTM

    return TreeLSTM(num_outputs=num_classes, vocabulary=image_shape[0], kind="nary", hidden=48)


def _recursive_estimator(model: Any, optimizer: Any, **options: Any) -> Any:
    from jdl.cli.generated import INPUTS
    from jdl.train.premade import classifier

    return classifier(model, optimizer, inputs=INPUTS, **options)


def _tree_pictures(estimator: Any, data: Any, workdir: Path) -> list[Path]:
    from jdl.cli.generated import WORDS
    from jdl.cli.tree_pictures import draw_trees

    net = _recursive((len(WORDS) + 2,), 2).clone(every_node=True)
    return [draw_trees(net, estimator.params, data.arrays, WORDS, workdir / "trees.png")]


def _gan(image_shape: tuple[int, ...], num_classes: int) -> Any:
    del num_classes
    from jdl.models.gan import GAN

    height, width, channels = image_shape
    return GAN.of_shape((height, width, channels))


def _gan_estimator(
    gan: Any,
    optimizer: Any,
    *,
    workdir: Path,
    hooks: Any = (),
    ema: float | None = None,
    **options: Any,
) -> Any:
    import jax.numpy as jnp

    from jdl.cli.gan_pictures import samples_over_time
    from jdl.models.gan import optimizers
    from jdl.optim import diagnostics
    from jdl.train.estimator import Estimator

    if diagnostics.read(optimizer.init({"x": jnp.zeros(2)})) is not None:
        raise check.UserError(
            "A GAN's loss is no function to be minimized, and second-order methods have nothing to "
            "go by. Choose a first-order --optimizer, such as adam."
        )
    return Estimator(
        gan.model,
        gan.loss,
        optimizers(optimizer, optimizer),
        metrics={"discriminator": gan.discriminator_loss, "generator": gan.generator_loss},
        workdir=workdir,
        ema=0.99 if ema is None else ema,
        hooks=[*hooks, samples_over_time(gan, workdir)],
        **options,
    )


def _gan_pictures(estimator: Any, data: Any, workdir: Path) -> list[Path]:
    from jdl.cli.gan_pictures import draw_samples
    from jdl.cli.run_config import RunConfig

    del data  # samples are compared with what was trained on
    config = RunConfig.load(workdir)
    train = config.images(config.data, config.split, batch_size=256)
    return draw_samples(config.build_model(), estimator, train, workdir)


RECIPES = {
    "mlp": Recipe(_mlp, "classifier", "adam", 400, 64),
    "cnn": Recipe(_cnn, "classifier", "adam", 400, 64),
    "rnn": Recipe(_rnn, "classifier", "adam", 600, 64),
    "autoencoder": Recipe(
        _autoencoder, "autoencoder", "adam", 1500, 64, pictures=_autoencoder_pictures
    ),
    "denoising": Recipe(
        _denoising,
        "autoencoder",
        "adam",
        1500,
        64,
        estimator=_denoising_estimator,
        pictures=_denoising_pictures,
    ),
    "rbm": Recipe(
        _rbm, "rbm", "momentum", 3000, 64, estimator=_rbm_estimator, pictures=_rbm_pictures
    ),
    "dbn": Recipe(
        _dbn, "classifier", "adam", 3000, 64, prepare=_pretrained, pictures=_dbn_pictures
    ),
    "recursive": Recipe(
        _recursive,
        "trees",
        "adam",
        1500,
        64,
        estimator=_recursive_estimator,
        pictures=_tree_pictures,
        data="trees",
    ),
    "gan": Recipe(
        _gan,
        "gan",
        "adam",
        3000,
        64,
        estimator=_gan_estimator,
        pictures=_gan_pictures,
        options={"b1": 0.5},
    ),
}
