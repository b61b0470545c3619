"""Artistic style: a picture painted by optimisation, or by a network trained once for all pictures.

Examples:
  jdl style transfer photo.jpg starry.jpg --out painted.png
  jdl style transfer photo.jpg starry.jpg --optimizer adam --steps 500 --out painted.png
  jdl style train starry.jpg mosaic.png --data 'photos-*.tar' --workdir runs/painters
  jdl style apply runs/painters photo.jpg --mix starry:2 mosaic:1 --out painted.png
  jdl style apply runs/painters photos/ --mix mosaic --out painted/
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm")


@dataclass
class Transfer:
    """Paint a photograph in the style of paintings, by optimising its pixels."""

    photograph: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOGRAPH")]
    """JPEG, PNG, WebP, BMP, GIF, PGM or PPM"""
    paintings: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PAINTINGS")]
    """one or several"""
    out: Path = Path("painted.png")
    """the PNG to write"""
    shares: tuple[float, ...] = ()
    """how much of each painting's style; by default as much of each"""
    model: str = "vgg16"
    """vgg16, squeezenet, a .safetensors file, or a run directory"""
    content_layers: tuple[str, ...] = ()
    """of the model; by default relu4_2 for VGG"""
    style_layers: tuple[str, ...] = ()
    """by default the first rectified layer of each resolution"""
    content: float = 1.0
    """weight of the photograph's content"""
    style: float = 30.0
    """weight of the style"""
    variation: float = 5.0
    """weight of smoothness"""
    longest: int = 512
    """pixels that a larger photograph's longer side is reduced to"""
    style_size: int | None = None
    """likewise of the paintings: larger for larger strokes; by default the photograph's"""
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    """what moves the pixels"""
    learning_rate: float | None = None
    """by default 1 for lbfgs, 0.02 for adam"""
    steps: int = 100
    """of the optimizer, at each scale"""
    scales: int = 1
    """begin at half the size, a quarter …, and double: larger shapes, and less time"""
    start: Literal["photograph", "noise"] = "photograph"
    """what the optimizer begins with"""
    keep_colors: bool = False
    """take the painting's brightness only, and the photograph's colours"""
    seed: int = 0
    """of the noise"""


@dataclass
class Train:
    """Train one network to paint any photograph in the style of each painting."""

    paintings: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PAINTINGS")]
    """one or several; their file names name the styles"""
    data: str
    """photographs: a tar, a glob, or a brace range such as a-{00..07}.tar"""
    workdir: Path | None = None
    """the run directory; by default runs/style-NAMES. Started again, a run goes on"""
    max_steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 4000
    """steps in total"""
    batch_size: int = 4
    """photographs a step"""
    size: int = 256
    """pixels of the side of the crops that it learns from, a multiple of 4"""
    style_size: int = 384
    """pixels of the paintings' longer side: larger for larger strokes"""
    model: str = "vgg16"
    """what content and style are measured by: vgg16, squeezenet, a .safetensors file, a run"""
    content_layers: tuple[str, ...] = ("relu3_3",)
    """of the model"""
    style_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    """of the model"""
    content: float = 1.0
    """weight of the photographs' content"""
    style: float = 10.0
    """weight of the style"""
    variation: float = 5.0
    """weight of smoothness"""
    filters: tuple[int, int, int] = (32, 64, 128)
    """of the network at full, half and quarter size"""
    blocks: int = 5
    """residual blocks of the network"""
    learning_rate: float = 1e-3
    """of Adam"""
    seed: int = 0
    """of the initial parameters and of the crops"""
    on_error: Literal["raise", "skip"] = "raise"
    """what to do with a photograph that cannot be read"""
    save_every: int = 500
    """steps between checkpoints"""
    export: Path | None = None
    """also write what has been learned to one file, which `apply` takes as well as the run"""


@dataclass
class Apply:
    """Paint pictures of any size by a trained network."""

    painter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PAINTER")]
    """the run directory of `jdl style train`, or a file that it exported"""
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """an image, or a folder of images"""
    out: Path
    """the PNG to write, or the folder for them"""
    mix: tuple[str, ...] = ()
    """STYLE, or STYLE:SHARE of several; by default the first style"""
    longest: int | None = None
    """pixels that a larger picture's longer side is reduced to; by default it is not"""
    tile: int = 1024
    """pixels of the side of what is painted at once: less for less memory"""
    keep_colors: bool = False
    """take the painting's brightness only, and the photograph's colours"""


Args = (
    Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Apply, tyro.conf.subcommand("apply")]
)


def run(args: Transfer | Train | Apply) -> None:
    """Does what the subcommand says."""
    if isinstance(args, Transfer):
        _transfer(args)
    elif isinstance(args, Train):
        _train(args)
    else:
        _apply(args)


def _transfer(args: Transfer) -> None:
    from jdl.cli.progress import StepProgress
    from jdl.core import check
    from jdl.optim import registry
    from jdl.vision import images, pretrained, style

    out = images.check_out(args.out)
    for name in ("steps", "scales", "longest"):
        check.positive_int(f"--{name}", getattr(args, name))
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
    rate = args.learning_rate or (0.02 if args.optimizer == "adam" else None)
    began = time.monotonic()
    shown = StepProgress(args.steps, 1)

    def hook(step: int, loss: float) -> None:
        seconds = time.monotonic() - began
        shown({"split": "train", "step": step + 1, "loss": loss, "seconds": seconds})

    with shown:
        painted = style.transfer(
            trunk,
            photograph,
            paintings,
            shares=shares,
            weights=weights,
            layers=layers,
            optimizer=registry.by_name(args.optimizer, rate),
            steps=args.steps,
            scales=args.scales,
            start=args.start,
            seed=args.seed,
            hook=hook,
        )
    image = painted.image
    if args.keep_colors:
        image = style.with_colors_of(photograph, image)
    images.write(out, image)
    told = {name: float(x[0]) for name, x in painted.terms._asdict().items()}
    print(
        f"loss {painted.losses[0]:.4g} → {painted.losses[-1]:.4g} "
        f"({', '.join(f'{name} {x:.3g}' for name, x in told.items())}), {args.steps} steps, "
        f"{time.monotonic() - began:.1f} s\npicture: {out}"
    )


def _train(args: Train) -> None:
    from jdl.cli.progress import StepProgress
    from jdl.core import check
    from jdl.data import from_tar, resolve
    from jdl.recipes.style_config import StyleConfig
    from jdl.train.plot import draw
    from jdl.vision import images, painter, pretrained
    from jdl.vision.style_training import build_estimator, digest
    from jdl.vision.transformer import STRIDE

    for name in ("max_steps", "batch_size", "size", "style_size", "blocks", "save_every"):
        check.positive_int(f"--{name.replace('_', '-')}", getattr(args, name))
    check.argument(args.size % STRIDE == 0, "--size", f"a multiple of {STRIDE}", args.size)
    names = tuple(path.stem for path in args.paintings)
    check.argument(
        len(names) > 0 and len({*names}) == len(names) and not any(":" in n for n in names),
        "PAINTINGS",
        "one or several files with different names, none with a colon",
        names,
    )
    paintings = [images.read(p, longest=args.style_size) for p in args.paintings]
    trunk = pretrained.load_trunk(args.model)
    trunk.known(args.content_layers + args.style_layers)
    photographs = from_tar(
        resolve(args.data),
        label=None,
        size=(args.size, args.size),
        crop="random",
        flip=True,
        batch_size=args.batch_size,
        epochs=None,
        seed=args.seed,
        on_error=args.on_error,
    )
    config = StyleConfig(
        styles=names,
        paintings=tuple(digest(p) for p in paintings),
        trunk=args.model,
        content_layers=args.content_layers,
        style_layers=args.style_layers,
        content=args.content,
        style=args.style,
        variation=args.variation,
        filters=args.filters,
        blocks=args.blocks,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        size=args.size,
        seed=args.seed,
    )
    workdir = args.workdir or Path("runs") / f"style-{'-'.join(names)}"
    shown = StepProgress(args.max_steps, args.batch_size)
    estimator = build_estimator(
        config, trunk, paintings, workdir, save_every=args.save_every, hooks=[shown]
    )
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
    if photographs.skipped:
        print(f"skipped: {photographs.skipped} photographs that could not be read")


def _apply(args: Apply) -> None:
    from jdl.core import check
    from jdl.vision import images, painter

    if args.longest is not None:
        check.positive_int("--longest", args.longest)
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
    """Paints all images of a folder; what cannot be read is told, and the others go on."""
    from jdl.core import check

    check.argument(not out.is_file(), "--out", "a folder, as the source is one", str(out))
    check.argument(out.resolve() != source.resolve(), "--out", "another folder", str(out))
    found = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise check.DataError(f"{source} holds no image ({' '.join(SUFFIXES)}).")
    wrong = []
    for path, name in zip(found, _names(found), strict=True):
        try:
            paint(path, out / name)
        except check.DataError as error:
            wrong.append(path.name)
            print(error)
    if wrong:
        raise check.DataError(
            f"{len(wrong)} of {len(found)} pictures could not be read: {', '.join(wrong[:10])}."
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """File names for paintings: `a.png` for `a.jpg`, `a.jpg.png` where there is another `a`."""
    stems = [p.stem for p in paths]
    return [f"{p.stem if stems.count(p.stem) == 1 else p.name}.png" for p in paths]


def _shares(mix: Sequence[str]) -> dict[str, float] | None:
    """Style -> share of `NAME` and `NAME:SHARE`."""
    from jdl.core import check

    shares: dict[str, Any] = {}
    for part in mix:
        name, _, share = part.partition(":")
        try:
            shares[name] = float(share or 1.0)
        except ValueError:
            check.argument(False, "--mix", "STYLE or STYLE:SHARE, such as starry:2", part)
    return shares or None
