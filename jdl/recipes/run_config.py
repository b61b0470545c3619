"""The settings of a run of `jdl train`, and the model, Estimator and data made from them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jdl.core import check
from jdl.core.model import Model
from jdl.data import Batches, cutmix, mixup, one_of
from jdl.recipes import config_toml, optimizing, own
from jdl.recipes.datasets import kind, open_images
from jdl.recipes.registry import LABELLED, Drawn, Net, recipe
from jdl.train import premade
from jdl.train.checkpoint import begun
from jdl.train.estimator import Estimator

COMMAND = "command"  # the file's table of resolved flags, which `jdl train --config` reads
MIXED = {"mixup": mixup, "cutmix": cutmix}  # of `--augment`, inside the training step
MAY_CHANGE = ("on_error", "file_sha256")  # when a run is continued

logger = logging.getLogger("jdl.train")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings that a run's results depend on, except its number of steps.

    Fields without a comment are as the flags of `jdl train`.
    """

    model: str
    data: str
    optimizer: str
    batch_size: int
    microbatches: int
    seed: int
    image_shape: tuple[int, ...]  # of one input
    grayscale: bool
    classes: tuple[str, ...]  # names, in the order of the labels
    on_error: str
    learning_rate: float | None = None  # None for the optimizer's own
    curvature_batch_size: int | None = None
    split: str | None = None  # the training split; None for all of the data
    compute_dtype: str | None = None
    ema: float | None = None
    crop: str | None = None
    flip: bool = False
    augment: tuple[str, ...] = ()
    label: str | None = None
    include: str | None = None
    exclude: str | None = None
    words: tuple[str, ...] = ()  # the vocabulary of a file of trees
    option: tuple[str, ...] = ()  # sorted, as `arguments.written` writes them
    weight_decay: float | None = None
    clip: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    decay_to: float = 0.0
    overfit: int | None = None
    init_from: str | None = None
    schedule_steps: int | None = None  # the steps of the schedule; None for a constant one
    file_kind: str | None = None  # of a model from a file: "classifier", or "own"
    file_sha256: str | None = None  # of that file

    def save(self, workdir: Path, command: Mapping[str, Any]) -> None:
        """Writes the settings; raises where the directory holds a run with other settings.

        `command` are the resolved flags, from which `jdl train --config` starts such a run again.
        """
        exists = (workdir / config_toml.FILE).exists()
        if begun(workdir) and not exists:
            raise check.UserError(
                f"{workdir} holds a run that `jdl train` did not make: it has no "
                f"{config_toml.FILE}. Choose another --workdir, or continue it in Python."
            )
        if exists:
            before = RunConfig.load(workdir)  # also refuses to replace another program's file
            if begun(workdir):
                config_toml.check_same(workdir, self, before, MAY_CHANGE)
        config_toml.write(workdir, self, **{COMMAND: dict(command)})

    @classmethod
    def load(cls, workdir: Path) -> "RunConfig":
        """The settings of the run in that directory."""
        table = config_toml.read(workdir)
        if table is None:
            hint = " It was made in Python, where an Estimator with this workdir continues it."
            raise check.UserError(
                f"{workdir} is not a run directory of `jdl train`: it has no {config_toml.FILE}."
                + hint * (workdir / "checkpoints").is_dir()
            )
        config = config_toml.parse(cls, table, workdir, COMMAND)
        if config.file_kind and config.file_sha256 != own.sha256(config.model):
            logger.warning(
                "%s has changed since %s was trained with it; it is used as it is now, and its "
                "parameters must be the same",
                *(config.model, workdir),
            )
        return config

    @property
    def kind(self) -> str:
        """What the outputs mean, see `Recipe`."""
        return self.file_kind or recipe(self.model).kind

    @property
    def learns_labels(self) -> bool:
        """Whether the loss may read labels."""
        of_file = self.file_kind is not None and self.label != "none"
        return of_file or self.kind in LABELLED

    @property
    def which(self) -> dict[str, str | None]:
        """The words of `--include` and `--exclude`."""
        return {"include": self.include, "exclude": self.exclude}

    def build_model(self) -> Net:
        """The model of these settings."""
        return recipe(self.model).build(self.image_shape, len(self.classes))

    def estimator(
        self,
        workdir: Path,
        hooks: Sequence[Callable[..., None]] = (),
        model: Net | Model | None = None,
        **options: Any,
    ) -> Estimator:
        """The Estimator of these settings, with options of `Estimator`.

        `model` is one that the recipe has prepared; by default `build_model()`.
        """
        chosen = recipe(self.model)
        premades = {"classifier": premade.classifier, "autoencoder": premade.autoencoder}
        make: Callable[..., Estimator] = chosen.estimator or premades[chosen.kind]
        mixed = [MIXED[x](num_classes=len(self.classes)) for x in self.augment if x in MIXED]
        if mixed:
            options["batch_transform"] = one_of(*mixed)
        if self.file_kind is not None:
            options["num_classes"] = len(self.classes)
        return make(
            self.build_model() if model is None else model,
            optimizing.transformation(self),
            workdir=workdir,
            seed=self.seed,
            microbatches=self.microbatches,
            curvature_batch_size=self.curvature_batch_size,
            compute_dtype=self.compute_dtype,
            ema=self.ema,
            hooks=hooks,
            **options,
        )

    def sample(
        self, workdir: Path, number: int, seed: int, label: Any, temperature: Any, **of_texts: Any
    ) -> ArrayLike:
        """Samples of the trained run, by its recipe; arguments as for `Drawn`."""
        if not begun(workdir):
            raise check.UserError(f"{workdir} has no checkpoint yet: train it first.")
        estimator, chosen = self.estimator(workdir, devices=jax.devices()[:1]), recipe(self.model)
        image = np.zeros((1, *self.image_shape), np.float32)
        blank = {"image": image, "label": np.zeros(1, np.int32), "tokens": image.astype(np.int32)}
        next(estimator.predict_batches([blank]))  # restores the checkpoint
        label = None if label is None else jnp.asarray(label)
        warm = chosen.temperature if temperature is None else temperature
        net, key = self.build_model(), jax.random.key(seed)
        assert chosen.sample is not None
        first = (net, estimator, workdir, self.image_shape, number, key, label, warm)
        return chosen.sample(Drawn(*first, **of_texts))

    def images(
        self, data: str, split: str | None, *, labelled: bool = True, **options: Any
    ) -> Batches:
        """Data with the run's image size and classes, cropped in the center if it was cropped.

        Batches have labels if `labelled`; `options` are further ones of `jdl.data.from_tar`.
        """
        wanted = kind(self.data)
        check.argument(kind(data) == wanted, "--data", f"{wanted} for this {self.model}", data)
        labelled = labelled and self.label != "none"
        options |= {"classes": self.classes, "label": self.label} if labelled else {"label": "none"}
        if self.crop is not None:
            options["crop"] = "center"
        return open_images(
            data,
            split=split,
            size=self.image_shape[:2],
            grayscale=self.grayscale,
            on_error=self.on_error,
            words=self.words,
            **self.which,
            **options,
        )
