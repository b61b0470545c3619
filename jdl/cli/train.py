"""Train a model on a tar of images, or go on with a run.

Examples:
  jdl train cnn
  jdl train cnn --data 'photos-*.tar' --optimizer adam --max-steps 500 --workdir runs/photos
  jdl train autoencoder --optimizer hf --batch-size 1024 --max-steps 50
  jdl train --config runs/photos/config.toml --seed 1 --workdir runs/photos-1
  mpirun -n 2 jdl train cnn --distributed
"""

import contextlib
import dataclasses
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from jdl.recipes.run_config import RunConfig


# For optimizers whose steps want little sampling noise.
LARGE_BATCH, LARGE_STEPS = 2048, 60


@dataclass
class Args:
    """What to train, on what, how long."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """mlp, cnn, rnn (of an image's rows), autoencoder, denoising, rbm, dbn, recursive, gan"""
    data: str | None = None
    """a tar, a glob, a brace range such as a-{00..07}.tar; by default digits, or generated trees"""
    optimizer: str | None = None
    """sgd adam lbfgs cg hf kfac, or another of `jdl compare --help`; by default the model's"""
    learning_rate: float | None = None
    """by default the optimizer's own"""
    max_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """steps in total, by default what suits the model; started again, a run goes on to there"""
    batch_size: int | None = None
    """images a step; by default what suits the optimizer"""
    curvature_batch_size: int | None = None
    """images of the batch that curvature products use, in hf; by default all"""
    microbatches: int = 1
    """slices that a batch is computed in, to bound memory"""
    seed: int = 0
    """of the initial parameters, the shuffle and all that is random"""
    split: str | None = None
    """first folder of the members to train on; by default train where there is one; all for all"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH to scale images to; by default 128, and 8 for the digits"""
    color: bool = False
    """keep three channels; by default images are made gray"""
    crop: Literal["center", "random"] | None = None
    """a window of the image instead of all of it, stretched: the largest, or one by chance"""
    flip: bool = False
    """mirror half of the training images left to right"""
    workers: int = 0
    """processes that decode, instead of threads; `jdl bench data` tells what is faster"""
    on_error: Literal["raise", "skip"] = "raise"
    """what to do with an image that cannot be read"""
    workdir: Path | None = None
    """the run directory; by default runs/MODEL-DATA-OPTIMIZER"""
    save_every: int = 1000
    """steps between checkpoints"""
    logs: tuple[Literal["csv", "tensorboard"], ...] = ()
    """what to write besides metrics.jsonl: csv for metrics.csv, tensorboard for its event files"""
    compute_dtype: Literal["bfloat16", "float16"] | None = None
    """what the model computes in; parameters, losses and optimizer stay float32"""
    ema: float | None = None
    """decay of an average of the parameters, which evaluation then uses, such as 0.999"""
    remat: bool = False
    """compute activations once more for the gradient instead of keeping them"""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """what to do when a loss is not finite"""
    parallel: Literal["jit", "fsdp", "pmap"] = "jit"
    """how devices share the work; fsdp splits large parameters over them"""
    distributed: bool = False
    """one of several processes that train together, started by SLURM, mpirun or such"""
    deterministic: bool = False
    """have XLA choose reproducible kernels on GPUs, some of them slower"""
    config: Path | None = None
    """flags from a .toml, .yaml or a run's config.toml; the later wins, then flags (--no-X)"""


def run(args: Args) -> None:
    """Trains, evaluates on the test split if there is one, and draws the curves."""
    from jdl.cli import config_file
    from jdl.core import check
    from jdl.optim import registry
    from jdl.recipes.datasets import default_split, input_shape, open_images, parse_size
    from jdl.recipes.registry import recipe
    from jdl.recipes.run_config import RunConfig
    from jdl.train import distributed, parallel

    if args.deterministic:
        parallel.make_deterministic()
    if args.distributed:
        distributed.initialize()
    chosen = recipe(args.model)
    source = args.data or chosen.data
    check.argument(
        (source == "trees") == (chosen.data == "trees"),
        "--data",
        "left out for recursive, which learns generated trees, and images for all others",
        source,
    )
    optimizer = registry.short_name(args.optimizer or chosen.optimizer)
    entry = registry.REGISTRY[optimizer]
    for name in ("max_steps", "batch_size", "curvature_batch_size", "microbatches", "save_every"):
        value = getattr(args, name)
        check.argument(
            value is None or value >= 1, f"--{name.replace('_', '-')}", "at least 1", value
        )
    workdir = args.workdir or Path("runs") / f"{args.model}-{_stem(source)}-{optimizer}"
    size = parse_size(args.size, source)
    split = default_split(source, args.split, "train")

    def images(batch_size: int, **options: Any) -> Any:
        return open_images(
            source,
            size=size,
            grayscale=not args.color,
            on_error=args.on_error,
            batch_size=batch_size,
            **options,
        )

    probe = images(1, split=split)
    number, classes = probe.num_records, tuple(probe.classes)
    suits = chosen.batch_size if entry.batches == "mini" else LARGE_BATCH
    batch_size = args.batch_size or min(suits, number)
    check.argument(
        batch_size <= number, "--batch-size", f"at most the {number} training images", batch_size
    )
    chance = {"crop": args.crop, "flip": args.flip, "workers": args.workers}
    given = {name: value for name, value in chance.items() if value}
    check.argument(
        source != "trees" or not given, f"--{''.join(list(given)[:1])}", "left out for trees", given
    )
    data = images(batch_size, split=split, shuffle=True, seed=args.seed, classes=classes, **given)
    steps = args.max_steps or (chosen.steps if entry.batches == "mini" else LARGE_STEPS)
    config = RunConfig(
        model=args.model,
        data=source,
        optimizer=optimizer,
        learning_rate=args.learning_rate,
        batch_size=batch_size,
        curvature_batch_size=args.curvature_batch_size,
        microbatches=args.microbatches,
        seed=args.seed,
        split=split,
        image_shape=input_shape(source, size, 3 if args.color else 1),
        grayscale=not args.color,
        classes=classes,
        on_error=args.on_error,
        compute_dtype=args.compute_dtype,
        ema=args.ema,
        crop=args.crop,
        flip=args.flip,
    )
    if _leads():
        resolved = dataclasses.replace(
            args, data=source, optimizer=optimizer, max_steps=steps, batch_size=batch_size
        )
        config.save(workdir, config_file.as_table(resolved))
    options = {
        "save_every": args.save_every,
        "logs": args.logs,
        "remat": args.remat,
        "on_nonfinite": args.on_nonfinite,
        "parallel": args.parallel,
    }
    if _leads():
        _train(config, workdir, data, steps, options)
    else:  # the same work, and nothing said of it
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _train(config, workdir, data, steps, options)


def _leads() -> bool:
    """Whether this process is the one that speaks and writes."""
    import jax

    return jax.process_index() == 0


def _train(
    config: "RunConfig", workdir: Path, data: Any, steps: int, options: dict[str, Any]
) -> None:
    from jdl.cli import output, progress
    from jdl.recipes.datasets import default_split
    from jdl.recipes.registry import Finished, recipe
    from jdl.train.checkpoint import begun
    from jdl.train.plot import draw

    chosen = recipe(config.model)

    print(
        f"{config.model} on {data.num_records} examples of {config.data} "
        f"({len(config.classes)} classes), {config.optimizer}, batches of {config.batch_size}, "
        f"to step {steps}; writing to {workdir}"
    )
    shown = progress.StepProgress(steps, config.batch_size)
    model = config.build_model()
    splits = [config.split]
    if config.split == "train" and default_split(config.data, None, "test"):
        splits.append("test")
    # Opened before any training, so that what does not fit is told first.
    held = {
        split or "all": config.images(config.data, split, batch_size=min(config.batch_size, 256))
        for split in splits
    }
    if chosen.prepare is not None and not begun(workdir):
        model = chosen.prepare(model, data, workdir, config.seed)
    estimator = config.estimator(workdir, hooks=[shown], model=model, **options)
    with shown:
        estimator.train(data, max_steps=steps)
    rows = []
    for split, images in held.items():
        # Under a name of its own: the log's `train` rows are of single batches.
        values = estimator.evaluate(images, name="all of train" if split == "train" else split)
        rows.append([split, *(f"{v:.4f}" for v in values.values())])
        columns = ["split", *values]
    output.table(columns, rows, f"{estimator.step} steps, {estimator.seconds:.1f} s of training")
    if not _leads():
        return
    picture = draw(workdir / "metrics.jsonl", workdir / "curves.png")
    print(f"metrics: {workdir / 'metrics.jsonl'}\ncurves:  {picture}")
    if chosen.pictures is not None:
        first, last = next(iter(held.values())), images
        finished = Finished(config.build_model(), estimator, first, last, workdir)
        for path in chosen.pictures(finished):
            print(f"picture: {path}")
    if data.skipped:
        print(f"skipped: {data.skipped} images that could not be read")


def _stem(data: str) -> str:
    """A folder's name for a `--data` argument."""
    name = Path(data).name.removesuffix(".tar")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"
