"""Artistic style: a picture painted by optimization, or by a network trained once for all pictures.

Examples:
  jdl style transfer photo.jpg starry.jpg --out painted.png
  jdl style transfer photo.jpg starry.jpg --optimizer adam --steps 500 --out painted.png
  jdl style train starry.jpg mosaic.png --data 'photos-*.tar' --workdir runs/painters
  jdl style apply runs/painters photo.jpg --mix starry:2 mosaic:1 --out painted.png
  jdl style apply runs/painters photos/ --mix mosaic --out painted/
"""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jdl.cli import options
from jdl.core import check

Paintings = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PAINTINGS", help="image files")
]
Content = Annotated[float, tyro.conf.arg(help="weight of the photograph's content")]
Style = Annotated[float, tyro.conf.arg(help="weight of the style")]
Variation = Annotated[float, tyro.conf.arg(help="weight of smoothness")]
KeepColors = Annotated[
    bool, tyro.conf.arg(help="use the painting's brightness only, with the photograph's colours")
]


@dataclass
class Transfer:
    """Paint a photograph in the style of paintings by optimizing its pixels."""

    photograph: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOGRAPH")]
    """an image file"""
    paintings: Paintings
    out: Path = Path("painted.png")
    """the picture to write, a PNG or JPEG"""
    shares: tuple[float, ...] = ()
    """share of each painting's style; by default equal shares"""
    model: options.Network = "vgg16"
    content_layers: tuple[str, ...] = ()
    """layers that compare content; by default relu4_2 for VGG"""
    style_layers: tuple[str, ...] = ()
    """layers that compare style; by default the first rectified layer of each resolution"""
    content: Content = 1.0
    style: Style = 30.0
    variation: Variation = 5.0
    longest: options.Longest = 512
    style_size: int | None = None
    """longer side of the paintings in pixels: larger for larger strokes; by default the photo's"""
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    """the optimizer of the pixels"""
    learning_rate: float | None = None
    """the optimizer's learning rate; by default 1 for lbfgs, 0.02 for adam"""
    steps: int = 100
    """optimizer steps at each scale"""
    scales: int = 1
    """number of sizes, each twice the one before; more paint larger shapes, in less time"""
    start: Literal["photograph", "noise"] = "photograph"
    """the initial picture"""
    keep_colors: KeepColors = False
    seed: int = 0
    """random seed for the noise"""


@dataclass
class Train:
    """Train one network to paint any photograph in the style of each painting."""

    paintings: Paintings
    data: str
    """photographs: a tar, a glob, or a brace range such as a-{00..07}.tar"""
    workdir: Path | None = None
    """the run directory; by default runs/style-NAMES, the paintings' file names"""
    max_steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 4000
    """steps in total; started again, a run continues to there"""
    split: options.Split = None
    include: options.Include = None
    exclude: options.Exclude = None
    batch_size: options.BatchSize = 4
    size: int = 256
    """height and width of the training crops in pixels, a multiple of 4"""
    style_size: int = 384
    """longer side of the paintings in pixels, which sets the strokes' size"""
    model: options.Network = "vgg16"
    content_layers: tuple[str, ...] = ("relu3_3",)
    """layers of --model that compare content"""
    style_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    """layers of --model that compare style"""
    content: Content = 1.0
    style: Style = 10.0
    variation: Variation = 5.0
    filters: tuple[int, int, int] = (32, 64, 128)
    """filters of the network at full, half and quarter size"""
    blocks: int = 5
    """residual blocks of the network"""
    learning_rate: float = 1e-3
    """Adam's learning rate"""
    seed: int = 0
    """random seed for the initial parameters and the crops"""
    on_error: options.OnError = "raise"
    save_every: int = 500
    """steps between checkpoints"""
    export: Path | None = None
    """also write the trained network to one file, which `apply` takes instead of the run"""


@dataclass
class Apply:
    """Paint pictures of any size with a trained network."""

    painter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PAINTER")]
    """the run directory of `jdl style train`, or a file that it exported"""
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """an image, or a folder of images"""
    out: Path
    """the picture to write, a PNG or JPEG, or a folder"""
    mix: tuple[str, ...] = ()
    """STYLE, or several STYLE:SHARE; by default the first style"""
    longest: options.Longest = None
    tile: int = 1024
    """side of the tiles that are painted at once, in pixels; smaller needs less memory"""
    keep_colors: KeepColors = False


Args = (
    Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Apply, tyro.conf.subcommand("apply")]
)


def run(args: Transfer | Train | Apply) -> None:
    """Runs the subcommand."""
    if isinstance(args, Transfer):
        _transfer(args)
    elif isinstance(args, Train):
        _train(args)
    else:
        _apply(args)


def _transfer(args: Transfer) -> None:
    from jdl.cli.progress import StepProgress
    from jdl.optim import registry
    from jdl.vision import images, pretrained, style

    out = images.check_out(args.out)
    options.check_positive(args, "steps", "scales", "longest", "style_size")
    rate = 0.02 if args.learning_rate is None and args.optimizer == "adam" else args.learning_rate
    optimizer = registry.by_name(args.optimizer, rate)
    check.argument(len(args.paintings) > 0, "PAINTINGS", "at least one file", args.paintings)
    photograph = images.read(args.photograph, longest=args.longest)
    longest = args.style_size or max(photograph.shape[:2])
    paintings = [images.read(p, longest=longest) for p in args.paintings]
    trunk = pretrained.load_trunk(args.model)
    layers = style.usual_layers(trunk)
    layers = style.Layers(args.content_layers or layers.content, args.style_layers or layers.style)
    trunk.known(layers.all)
    shares = args.shares or None
    style.mixed(shares, len(paintings))
    weights = style.Weights(args.content, args.style, args.variation).checked()
    began, done = time.monotonic(), itertools.count(1)
    shown = StepProgress(args.steps * args.scales, None)

    def hook(_: int, loss: float) -> None:
        seconds = time.monotonic() - began
        shown({"split": "train", "step": next(done), "loss": loss, "seconds": seconds})

    with shown:
        painted = style.transfer(
            trunk,
            photograph,
            paintings,
            shares=shares,
            weights=weights,
            layers=layers,
            optimizer=optimizer,
            steps=args.steps,
            scales=args.scales,
            start=args.start,
            seed=args.seed,
            hook=hook,
        )
    kept = args.keep_colors
    images.write(out, style.with_colors_of(photograph, painted.image) if kept else painted.image)
    terms = [f"{name} {float(x[0]):.3g}" for name, x in painted.terms._asdict().items()]
    scales = f" at each of {args.scales} scales" if args.scales > 1 else ""
    print(
        f"loss {painted.losses[0]:.4g} → {painted.losses[-1]:.4g} "
        f"({', '.join(terms)}), {args.steps} steps{scales}, "
        f"{time.monotonic() - began:.1f} s\npicture: {out}"
    )


def _train(args: Train) -> None:
    from jdl.cli.progress import StepProgress
    from jdl.data import from_tar, resolve
    from jdl.recipes.datasets import choice
    from jdl.recipes.style_config import StyleConfig
    from jdl.train.plot import draw
    from jdl.vision import images, painter, pretrained
    from jdl.vision.painter_net import STRIDE
    from jdl.vision.style_training import build_estimator, digest

    sizes = ("max_steps", "batch_size", "size", "style_size", "blocks", "save_every")
    options.check_positive(args, *sizes)
    check.argument(args.size % STRIDE == 0, "--size", f"a multiple of {STRIDE}", args.size)
    names = tuple(path.stem for path in args.paintings)
    ok = len(names) > 0 and len({*names}) == len(names) and not any(":" in n for n in names)
    must = "one or several files with different names, none with a colon"
    check.argument(ok, "PAINTINGS", must, names)
    paintings = [images.read(p, longest=args.style_size) for p in args.paintings]
    trunk = pretrained.load_trunk(args.model)
    trunk.known(args.content_layers + args.style_layers)
    photographs = from_tar(
        resolve(args.data),
        label=None,
        split=args.split,
        **choice(None, args.include, args.exclude),
        size=(args.size, args.size),
        crop="random",
        flip=True,
        batch_size=args.batch_size,
        epochs=None,
        seed=args.seed,
        on_error=args.on_error,
    )
    given = {"styles": names, "paintings": tuple(map(digest, paintings)), "trunk": args.model}
    config = options.settings(StyleConfig, args, **given)
    workdir = args.workdir or Path("runs") / f"style-{'-'.join(names)}"
    shown = StepProgress(args.max_steps, args.batch_size)
    how = {"save_every": args.save_every, "hooks": [shown]}
    estimator = build_estimator(config, trunk, paintings, workdir, **how)
    config.save(workdir)
    print(
        f"{' and '.join(names)} from {photographs.num_records} photographs of {args.data}, to step "
        f"{args.max_steps}; writing to {workdir}"
    )
    with shown:
        estimator.train(photographs, max_steps=args.max_steps)
    trained = painter.load_painter(workdir)
    sample = [image / 255.0 for image in next(iter(photographs.once()))["image"][:4]]
    pictures = [p for image in sample for p in (image, *(trained(image, {n: 1}) for n in names))]
    sheet = images.sheet(pictures, columns=1 + len(names), captions=None)
    print(f"{estimator.step} steps, {estimator.seconds:.1f} s of training")
    print(f"metrics: {workdir / 'metrics.jsonl'}")
    print(f"curves:  {draw(workdir / 'metrics.jsonl', workdir / 'curves.png')}")
    print(f"picture: {images.write(workdir / 'samples.png', sheet)}")
    if args.export is not None:
        print(f"export:  {trained.export(args.export)}")
    options.print_skipped(photographs)


def _apply(args: Apply) -> None:
    from jdl.vision import images, painter

    options.check_positive(args, "longest")
    loaded = painter.load_painter(args.painter)
    shares = _shares(args.mix)
    loaded.mixture(shares)

    def paint(source: Path, out: Path) -> None:
        from jdl.vision.style import with_colors_of

        began = time.monotonic()
        picture = images.read(source, longest=args.longest)
        painted = loaded(picture, shares, tile=args.tile)
        if args.keep_colors:
            painted = with_colors_of(picture, painted)
        images.write(out, painted)
        height, width = painted.shape[:2]
        print(f"{out}: {width} × {height}, {time.monotonic() - began:.2f} s")

    if args.source.is_dir():
        _folder(args.source, args.out, paint)
    else:
        images.check_out(args.out)
        paint(args.source, args.out)


def _folder(source: Path, out: Path, paint: Callable[[Path, Path], None]) -> None:
    """Paints all images of a folder; one that cannot be read does not stop the others."""
    from jdl.data.tar.scan import image_name

    check.argument(not out.is_file(), "--out", "a folder, as the source is one", str(out))
    check.argument(out.resolve() != source.resolve(), "--out", "another folder", str(out))
    found = sorted(p for p in source.iterdir() if image_name(os.fsencode(p.name)) and p.is_file())
    if not found:
        raise check.DataError(f"{source} holds no image, by the endings of its files' names.")
    wrong = []
    for path, name in zip(found, _names(found), strict=True):
        try:
            paint(path, out / name)
        except check.DataError as error:
            wrong.append(path.name)
            print(error)
    if wrong:
        which = f"{len(wrong)} of {len(found)} pictures"
        raise check.DataError(f"{which} could not be read: {', '.join(wrong[:10])}.")


def _names(paths: Sequence[Path]) -> list[str]:
    """File names for the results: `a.png` for `a.jpg`, `a.jpg.png` if there is another `a`."""
    stems = [p.stem for p in paths]
    return [f"{p.stem if stems.count(p.stem) == 1 else p.name}.png" for p in paths]


def _shares(mix: Sequence[str]) -> dict[str, float] | None:
    """Style -> share of `NAME` and `NAME:SHARE`."""
    shares: dict[str, float] = {}
    for part in mix:
        name, colon, share = part.partition(":")
        check.argument(name not in shares, "--mix", "styles, each once", " ".join(mix))
        try:
            shares[name] = float(share) if colon else 1.0
        except ValueError:
            check.argument(False, "--mix", "STYLE or STYLE:SHARE, such as starry:2", part)
    return shares or None
