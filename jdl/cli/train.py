"""Train a model on a tar of images, or continue a run.

Examples:
  jdl train cnn
  jdl train cnn --data 'photos-*.tar' --optimizer adam --max-steps 500 --workdir runs/photos
  jdl train autoencoder --optimizer hf --batch-size 1024 --max-steps 50
  jdl train autoencoder --optimizer hf --option max_cg_iterations=7 --option trust_region=1
  jdl train vit --optimizer sgd --weight-decay 5e-4 --clip 1 --schedule cosine --warmup 100
  jdl train cnn --data pets.tar --init-from runs/photos --learning-rate 1e-4
  jdl train cnn --data photos.tar --max-time 10m --workdir runs/photos
  jdl train cnn --data photos.tar --logs csv wandb --workdir runs/photos
  jdl train cnn --data photos.tar --try
  jdl train cnn --data photos.tar --overfit 1 --max-steps 200
  jdl train recursive --data trees.txt
  jdl train gpt --data book.txt --steps 200
  jdl train my_net.py --data photos.tar
  jdl train --config runs/photos/config.toml --seed 1 --workdir runs/photos-1
  mpirun -n 2 jdl train cnn --distributed
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from jdl.cli import options
from jdl.core import check

if TYPE_CHECKING:
    from jdl.data import Batches
    from jdl.recipes.registry import Recipe
    from jdl.recipes.run_config import RunConfig
    from jdl.train.estimator import Estimator

LARGE_BATCH, LARGE_STEPS = 2048, 60  # for optimizers that are sensitive to gradient noise


@dataclass
class Args:
    """The options of `jdl train`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """mlp, cnn, rnn (of an image's rows), vit, resnet, autoencoder, denoising, vae, rbm, dbn,
    recursive, gan, cgan (a GAN of classes), gpt, lstm (of the bytes of a text); or your own .py
    file, which defines model, loss and, without --data, data"""
    data: str | None = None
    """a tar, a glob, a brace range such as a-{00..07}.tar; by default digits. For recursive a file
    of trees, .txt with one in brackets each line, or .conllu; by default generated trees. For gpt
    and lstm any text file; by default generated letters"""
    optimizer: str | None = None
    """sgd adam lbfgs cg hf kfac, or another of `jdl compare --help`; by default the model's"""
    learning_rate: float | None = None
    """the optimizer's learning rate; by default the optimizer's own"""
    option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")
    ] = ()
    """an argument of the optimizer's function in Python, such as damping=1; may be repeated"""
    weight_decay: float | None = None
    """decoupled weight decay, in units of the learning rate; for methods of first order"""
    clip: float | None = None
    """the largest global norm of the gradient, to which longer ones are scaled"""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """of the learning rate, to --max-steps; wsd is constant but for the last fifth"""
    warmup: int = 0
    """steps over which the learning rate rises from 0"""
    decay_to: float = 0.0
    """where the schedule ends, as a share of the learning rate"""
    max_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """steps in total; by default what suits the model. Started again, a run continues to there"""
    max_time: str | None = None
    """stop and save after this much time in all, such as 90s, 10m or 1.5h"""
    try_run: Annotated[bool, tyro.conf.arg(aliases=["--try"])] = False
    """only try it: one step, validation, a checkpoint and predictions, of which nothing is kept"""
    overfit: int | None = None
    """train and evaluate on the first N batches alone, the same in each epoch"""
    init_from: str | None = None
    """another run's directory, whose parameters this run starts from where path and shape fit"""
    batch_size: int | None = None
    """images in a batch; by default what suits the optimizer"""
    curvature_batch_size: int | None = None
    """images of the batch used for curvature products, as by hf; by default the whole batch"""
    microbatches: int = 1
    """parts in which a batch is computed, one after the other, to save memory"""
    seed: int = 0
    """random seed for the initial parameters, the order of the data, and the model"""
    split: options.TrainSplit = None
    label: options.Label = None
    include: options.Include = None
    exclude: options.Exclude = None
    size: options.Size = None
    color: options.Color = False
    crop: Literal["center", "random", "random_resized"] | None = None
    """crop images to the right shape, in the center or at random, instead of stretching them"""
    flip: bool = False
    """mirror half of the training images left to right"""
    augment: tuple[Literal["color_jitter", "rand_augment", "mixup", "cutmix"], ...] = ()
    """change training images, in this order; of mixup and cutmix together, one at each step"""
    workers: int = 0
    """processes that decode images, instead of threads; `jdl bench data` shows which is faster"""
    on_error: options.OnError = "raise"
    workdir: Path | None = None
    """the run directory; by default runs/MODEL-DATA-OPTIMIZER"""
    save_every: int | None = None
    """steps between checkpoints; by default every 1,000th that is 10 s after the last"""
    keep_every: int | None = None
    """besides the newest checkpoints, keep those whose step is a multiple of this"""
    logs: tuple[Literal["csv", "tensorboard", "wandb", "mlflow"], ...] = ()
    """logs besides metrics.jsonl: metrics.csv, TensorBoard's files, a run of W&B or of MLflow"""
    compute_dtype: Literal["bfloat16", "float16"] | None = None
    """the model's floating-point type; parameters, losses and optimizer stay float32"""
    ema: float | None = None
    """decay of an exponential moving average of the parameters, used to evaluate, such as 0.999"""
    remat: bool = False
    """recompute activations in the backward pass instead of storing them"""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """what to do when a loss is not finite"""
    parallel: Literal["jit", "fsdp", "pmap"] = "jit"
    """how several devices are used; fsdp splits large parameters over them"""
    distributed: bool = False
    """this is one of several processes, started by SLURM, mpirun or similar, that train together"""
    deterministic: bool = False
    """let XLA use only deterministic kernels on GPUs; some are slower"""
    config: Path | None = None
    """read options from a .toml or .yaml file or a run's config.toml; flags given here win"""


class _Job(NamedTuple):
    """A training as the arguments ask for, with all defaults filled in."""

    config: "RunConfig"
    recipe: "Recipe"
    workdir: Path
    data: "Batches"
    max_steps: int
    seconds: float | None  # all that training may take


def run(args: Args) -> None:
    """Trains, evaluates on the test split if there is one, and draws the curves."""
    from jdl.cli import config_file
    from jdl.train import distributed, parallel

    if args.deterministic:
        parallel.make_deterministic()
    if args.distributed:
        distributed.initialize()
    sizes = ("batch_size", "curvature_batch_size", "microbatches")
    options.check_positive(args, "max_steps", "overfit", *sizes, "save_every", "keep_every")
    why = "it is for a single process"
    options.check_left_out(args, not args.distributed, why, "try_run", "init_from")
    job = _job(args)
    names = ("keep_every", "logs", "remat", "on_nonfinite", "parallel")
    how = {name: getattr(args, name) for name in names}
    if args.try_run:
        from jdl.cli.try_out import try_out

        try_out(job.config, job.data, list(_evaluated(job).items())[-1], how)
        print(f"nothing is kept; without --try, to step {job.max_steps} in {job.workdir}")
        return
    if _is_leader():
        resolved_by_job = ("model", "data", "optimizer", "option", "batch_size")
        found = {name: getattr(job.config, name) for name in resolved_by_job}
        resolved = dataclasses.replace(args, max_steps=job.max_steps, **found)
        job.config.save(job.workdir, config_file.as_table(resolved))
    with contextlib.nullcontext() if _is_leader() else _silence():
        _train(job, save_every=args.save_every or "auto", **how)


def _job(args: Args) -> _Job:
    """Opens the data and fills in the defaults."""
    from jdl.optim import registry
    from jdl.recipes import datasets, optimizing, own, treebanks
    from jdl.recipes.registry import LABELLED, recipe
    from jdl.recipes.run_config import MIXED, RunConfig

    chosen = recipe(args.model)
    source = datasets.named(chosen.data if args.data is None else args.data, chosen.kind)
    are_arrays, no_images = datasets.check_suits(source, chosen)
    optimizer = registry.short_name(chosen.optimizer if args.optimizer is None else args.optimizer)
    spec = registry.REGISTRY[optimizer]
    which = {"include": args.include, "exclude": args.exclude}
    size: tuple[int, ...] = datasets.parse_size(args.size, source)
    words: tuple[str, ...] = ()
    if datasets.kind(source) == "a file of trees":
        words, size = treebanks.learned(source, args.on_error)
    split = datasets.default_split(source, args.split, "train", **which)
    augmentation = {name: getattr(args, name) for name in ("crop", "flip", "augment", "workers")}
    given = {name: value for name, value in augmentation.items() if value}
    mixed = [name for name in args.augment if name in MIXED]
    must = "without mixup and cutmix for a model that does not learn classes"
    check.argument(not mixed or chosen.kind == "classifier", "--augment", must, mixed)
    fixed = args.overfit is None or args.crop == "center"
    why = "the batches of --overfit are the same each time"
    options.check_left_out(args, fixed, why, "crop")
    options.check_left_out(args, args.overfit is None, why, "flip", "augment")
    names = (*augmentation, *which, "label")
    options.check_left_out(args, not no_images, "the data are no images", *names)
    names = (*names, "size", "color")
    is_text = chosen.kind == "text"
    options.check_left_out(args, not is_text, "a text has no size or color", "size", "color")
    options.check_left_out(args, not are_arrays, "a file's data are arrays", *names)
    label = args.label
    if label is None and chosen.kind not in LABELLED:
        label = datasets.label_if_any(source, agree=chosen.kind != "own", **which)

    def images(batch_size: int, **more: Any) -> "Batches":
        return datasets.open_images(
            source,
            size=size,
            split=split,
            grayscale=not args.color,
            on_error=args.on_error,
            batch_size=batch_size,
            label=label,
            words=words,
            **which,
            **more,
        )

    probe = images(1, shuffle=no_images)  # of a text as many windows as there are places
    number, classes = probe.num_records, tuple(probe.classes or ())
    must = f"given: {args.model} needs classes"
    check.argument(bool(classes) or chosen.kind not in LABELLED, "--label", must, label)
    is_mini = spec.batches == "mini"
    batch_size = args.batch_size or min(chosen.batch_size if is_mini else LARGE_BATCH, number)
    must = f"at most the {number} training images"
    check.argument(batch_size <= number, "--batch-size", must, batch_size)
    must = f"at most the {number // batch_size} full batches of an epoch"
    check.argument((args.overfit or 0) * batch_size <= number, "--overfit", must, args.overfit)
    of_data: dict[str, Any] = {
        "image_shape": datasets.input_shape(source, size, 3 if args.color else 1),
        "classes": classes,
    }
    if chosen.facts is not None:
        some = next(iter(images(min(number, 256), shuffle=True, seed=args.seed)))
        of_data = chosen.facts(source, some, classes)
    max_steps = args.max_steps or (chosen.steps if is_mini else LARGE_STEPS)
    config = options.settings(
        RunConfig,
        args,
        **optimizing.settings(args, optimizer, max_steps),
        model=own.absolute(args.model),
        data=own.absolute(source),
        optimizer=optimizer,
        batch_size=batch_size,
        split=split,
        grayscale=not args.color,
        label=label,
        words=words,
        **of_data,
    )
    optimizing.transformation(config)  # raises for wrong arguments before anything is written
    augment = [name for name in args.augment if name not in MIXED]
    more = given | {"augment": augment}
    data = images(batch_size, shuffle=True, seed=args.seed, classes=config.classes, **more)
    folder = _folder(args.model, source.removeprefix(datasets.TEXT), optimizer)
    return _Job(
        config=config,
        recipe=chosen,
        workdir=args.workdir or Path("runs") / folder,
        data=data if args.overfit is None else data.first(args.overfit),
        max_steps=max_steps,
        seconds=options.seconds("--max-time", args.max_time),
    )


def _train(job: _Job, **options_of_estimator: Any) -> None:
    from jdl.cli import output, progress
    from jdl.recipes import datasets
    from jdl.recipes.warm_start import first_model
    from jdl.train.checkpoint import begun

    config, workdir = job.config, job.workdir
    about = (_short(config.data), job.data.num_records, len(config.classes))
    print(
        f"{_short(config.model)} on {datasets.told(*about)}, "
        f"{config.optimizer}, batches of {config.batch_size}, "
        f"to step {job.max_steps}; writing to {workdir}"
    )
    # Opened before any training, so that an error in them is raised first.
    evaluated = _evaluated(job)
    model, told = first_model(config, workdir)
    if job.recipe.prepare is not None and config.init_from is None and not begun(workdir):
        model = job.recipe.prepare(model, job.data, workdir, config.seed)
    shown = progress.StepProgress(job.max_steps, config.batch_size)
    estimator = config.estimator(workdir, hooks=[shown], model=model, **options_of_estimator)
    if config.init_from is not None:
        estimator.initialize(job.data)
        print("\n".join(map(output.visible, told)))
    with shown:
        estimator.train(job.data, max_steps=job.max_steps, wall_seconds=job.seconds)
    if job.seconds is not None and estimator.step < job.max_steps:
        print(f"stopped by --max-time at step {estimator.step}; the same command goes on")
    columns, rows = [], []
    for split, images in evaluated.items():
        # Under a name of its own: the log's `train` rows are of single batches.
        values = estimator.evaluate(images, name="all of train" if split == "train" else split)
        rows.append([split, *(f"{v:.4f}" for v in values.values())])
        columns = ["split", *values]
    output.table(columns, rows, f"{estimator.step} steps, {estimator.seconds:.1f} s of training")
    if _is_leader():
        _draw(job, estimator, list(evaluated.values()))


def _evaluated(job: _Job) -> "dict[str, Batches]":
    """The data that the run is evaluated on, by the split's name."""
    from jdl.recipes.datasets import default_split

    config = job.config
    if config.overfit is not None:
        return {"train": job.data}
    splits = [config.split]
    held_out = default_split(config.data, None, "test", **config.which)
    if config.split == "train" and held_out:
        splits.append("test")
    batch_size = min(config.batch_size, 256)
    return {
        split or "all": config.images(config.data, split, batch_size=batch_size) for split in splits
    }


def _draw(job: _Job, estimator: "Estimator", evaluated: "list[Batches]") -> None:
    from jdl.recipes.registry import Finished
    from jdl.train.plot import draw

    log = job.workdir / "metrics.jsonl"
    print(f"metrics: {log}\ncurves:  {draw(log, job.workdir / 'curves.png')}")
    if job.recipe.pictures is not None:
        net = job.config.build_model()
        finished = Finished(net, estimator, evaluated[0], evaluated[-1], job.workdir)
        for path in job.recipe.pictures(finished):
            print(f"picture: {path}")
    options.print_skipped(job.data)


def _is_leader() -> bool:
    """Whether this process is the one that prints and writes."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _folder(*names: str) -> str:
    """A folder's name of a model's, a `--data` argument and an optimizer."""
    stems = [Path(name).name.removesuffix(".tar").removesuffix(".py") for name in names]
    plain = [re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "data" for stem in stems]
    return "-".join(dict.fromkeys(plain))


def _short(name: str) -> str:
    """A model's or data set's name; of a Python file without its folder."""
    return Path(name).name if name.endswith(".py") else name
