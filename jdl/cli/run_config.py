"""A run's settings: `config.toml` in its directory, and what is built from them."""

import dataclasses
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdl.cli import config_file
from jdl.core import check

FILE = "config.toml"
MAY_CHANGE = {"on_error"}  # in the middle of a run


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All that a run's results depend on, but for its number of steps."""

    model: str
    data: str
    optimizer: str
    learning_rate: float | None
    batch_size: int
    curvature_batch_size: int | None
    microbatches: int
    seed: int
    split: str | None
    image_shape: tuple[int, ...]
    grayscale: bool
    classes: tuple[str, ...]
    on_error: str
    compute_dtype: str | None = None
    ema: float | None = None
    crop: str | None = None
    flip: bool = False

    def save(self, workdir: Path, command: dict[str, Any] | None = None) -> None:
        """Writes the run's settings, or refuses where a run with others has been saved.

        `command` are the resolved flags, from which `jdl train --config` makes such a run anew.
        """
        import tomli_w

        from jdl import __version__
        from jdl.train.checkpoint import begun
        from jdl.train.writers import write_atomically

        path = workdir / FILE
        if begun(workdir) and not path.exists():
            raise check.UserError(
                f"{workdir} holds a run that `jdl train` did not make: it has no {FILE}. Choose "
                "another --workdir, or go on with it where it was made, in Python."
            )
        if path.exists():
            before = RunConfig.load(workdir)
            mine, theirs = dataclasses.asdict(self), dataclasses.asdict(before)
            differing = [
                f"{k}: {theirs[k]!r} there, {mine[k]!r} now"
                for k in mine
                if mine[k] != theirs[k] and k not in MAY_CHANGE
            ]
            if differing and begun(workdir):
                raise check.UserError(
                    f"{workdir} holds a run with other settings ({'; '.join(differing)}). "
                    "Choose another --workdir, or the same settings to go on with it."
                )
        table = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if command is not None:
            table[config_file.TABLE] = command
        write_atomically(path, tomli_w.dumps({"jdl": __version__, **table}))

    @classmethod
    def load(cls, workdir: Path) -> "RunConfig":
        """The settings of the run in that directory."""
        path = workdir / FILE
        if not path.exists():
            told = f"{workdir} is no run directory of `jdl train`: it has no {FILE}."
            if (workdir / "checkpoints").is_dir():
                told += " It was made in Python, where an Estimator with this workdir takes it up."
            raise check.UserError(told)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise check.DataError(f"{path} is not readable as TOML: {error}.") from error
        fields = {f.name for f in dataclasses.fields(cls)}
        optional = {
            "learning_rate",
            "curvature_batch_size",
            "split",
            "compute_dtype",
            "ema",
            "crop",
        }
        missing = sorted(fields - optional - table.keys() - {"flip"})
        if missing:
            raise check.DataError(f"{path} lacks {', '.join(missing)}.")
        known: dict[str, Any] = dict.fromkeys(optional) | {
            k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k in fields
        }
        return cls(**known)

    def build_model(self) -> Any:
        """The model of these settings."""
        from jdl.cli.recipes import recipe

        return recipe(self.model).build(self.image_shape, len(self.classes))

    def estimator(
        self, workdir: Path, hooks: Sequence[Any] = (), model: Any = None, **options: Any
    ) -> Any:
        """The Estimator of these settings; `model` may be one prepared."""
        from jdl.cli.recipes import recipe
        from jdl.optim import registry
        from jdl.train import premade

        chosen = recipe(self.model)
        premades = {"classifier": premade.classifier, "autoencoder": premade.autoencoder}
        make = chosen.estimator or premades[chosen.kind]
        tuned = chosen.options if self.optimizer == chosen.optimizer else {}
        return make(
            self.build_model() if model is None else model,
            registry.by_name(self.optimizer, self.learning_rate, **tuned),
            workdir=workdir,
            seed=self.seed,
            microbatches=self.microbatches,
            curvature_batch_size=self.curvature_batch_size,
            compute_dtype=self.compute_dtype,
            ema=self.ema,
            hooks=hooks,
            **options,
        )

    def images(self, data: str, split: str | None, *, labelled: bool = True, **options: Any) -> Any:
        """A data set of the images' size and the classes that this run was trained on."""
        options |= {"classes": self.classes} if labelled else {"label": None}
        if self.crop is not None:
            options["crop"] = "center"
        return open_images(
            data,
            split=split,
            size=self.image_shape[:2],
            grayscale=self.grayscale,
            on_error=self.on_error,
            **options,
        )


def open_images(data: str, *, size: tuple[int, ...], **options: Any) -> Any:
    """The data set of a `--data` argument: a tar, a glob, a brace range, `digits`, or `trees`."""
    from jdl.data import from_tar, resolve

    if data == "trees":
        from jdl.cli.generated import trees_of

        return trees_of(**options)

    return from_tar(resolve(data), size=(size[0], size[1]), **options)


def default_split(data: str, wanted: str | None, default: str) -> str | None:
    """The split asked for; else `default` where the archive has it; else none."""
    if wanted is not None:
        return None if wanted == "all" else wanted
    if data == "trees":
        return default
    from jdl.data import resolve, splits

    return default if default in splits(resolve(data)) else None


def parse_size(size: str | None, data: str) -> tuple[int, int]:
    """(height, width) of `--size`: `64` or `64x48`; 128 by default, the digits stay 8×8."""
    if size is None:
        return (8, 8) if data == "digits" else (128, 128)
    parts = size.lower().split("x")
    ok = len(parts) in (1, 2) and all(p.isdigit() and 0 < int(p) <= 65536 for p in parts)
    check.argument(ok, "--size", "HEIGHT or HEIGHTxWIDTH in pixels, such as 128 or 96x128", size)
    return int(parts[0]), int(parts[-1])


def use_compilation_cache() -> None:
    """Keeps compiled programs from one command to the next, as JAX's own variable says or here."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "jdl" / "xla"))
