"""A picture dreamt over by a network (Inceptionism), of the same size; or a class's own picture.

MODEL is vgg16 or squeezenet (pip install 'jax-jdl[vision]'), a .safetensors file of torchvision's
or timm's VGG-16, VGG-19, SqueezeNet or ResNet-50, or a run directory of `jdl train`. Early layers
dream strokes and patterns, late ones eyes, animals and buildings.

Without an IMAGE, `--class` draws the picture that a classifier takes most for that class.

Examples:
  jdl dream photo.jpg --model vgg16 --out dream.png
  jdl dream photo.jpg --model vgg16 --layer relu3_3 --octaves 6 --steps 20 --out strokes.png
  jdl dream photo.jpg --model vgg16 --layer relu4_3 --guide flower.jpg --out flowery.png
  jdl dream photo.jpg --model vgg16 --frames 60 --out zoom.webp
  jdl dream --model squeezenet --class espresso --out espresso.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass
class Args:
    """What dreams, of what, how."""

    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE]")] = None
    """a photograph"""
    model: str = "vgg16"
    """vgg16, squeezenet, a .safetensors file or a run directory"""
    layer: str | None = None
    """a layer, or several such as relu4_3,relu5_1; by default one that sees parts of things"""
    channel: int | None = None
    """please only this channel"""
    guide: Path | None = None
    """another picture, whose features are to appear"""
    wanted: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """a class's name or number, to be drawn from noise"""
    octaves: int = 4
    """sizes at which to dream, from small to large"""
    scale: float = 1.4
    """how many times as large an octave is as the one before"""
    steps: int | None = None
    """at each octave, by default 12; for a class altogether, by default 256"""
    step_size: float = 0.01
    """by how much a pixel changes on average at a step, of 1"""
    jitter: int = 16
    """pixels by which the picture is shifted at a step, at most"""
    smoothing: float = 0.5
    """width of the blur of gradients, in pixels"""
    any_colors: bool = False
    """do not favour the colours of photographs"""
    variation: float = 0.0
    """weight of the total-variation prior; 0.3, say, makes smooth pictures"""
    blur: float = 0.0
    """width of the blur of the picture after each step, in pixels"""
    tile: int = 512
    """pixels of a side up to which gradients are taken at once; bounds the memory"""
    longest: int | None = None
    """pixels that a larger photograph's longer side is reduced to; by default it is not"""
    frames: int = 0
    """how many, of a flight into the dream: a .gif, a .webp or numbered PNGs (zoom-%04d.png)"""
    zoom: float = 1.04
    """by how much each frame is enlarged against the one before"""
    size: int = 224
    """pixels of the sides of a class's picture"""
    seed: int = 0
    """of the shifts"""
    out: Path = Path("dream.png")
    """the picture to write"""


def run(args: Args) -> None:
    """Writes the picture; the file appears when it is whole."""
    from jdl.core import check
    from jdl.vision import images

    from_class = args.wanted is not None
    both = [str(x) for x in (args.image, args.wanted) if x is not None]
    check.argument(len(both) == 1, "IMAGE, --class", "given one of them", both)
    check.argument(args.frames >= 0, "--frames", "0 or more", args.frames)
    check.argument(not (from_class and args.frames), "--frames", "0 with --class", args.frames)
    images.check_frames_out(args.out) if args.frames else images.check_out(args.out)
    written = [images.write(args.out, _class(args))] if from_class else _dreamt(args)
    more = f" … {written[-1]}" if len(written) > 1 else ""
    print(f"picture: {written[0]}{more}")


def _class(args: Args) -> Any:
    from jdl.cli import output
    from jdl.cli.networks import open_network
    from jdl.vision import activations
    from jdl.vision.reverse import PictureSearch, of_class

    trunk = open_network(args.model).trunk
    search = PictureSearch(size=args.size, steps=256 if args.steps is None else args.steps)
    found = of_class(trunk, args.wanted or "", search, seed=args.seed, on_step=output.print_tenths)
    name, share = activations.classify(trunk, found, count=1)[0]
    print(f"taken for {name} ({share:.1%})")
    return found


def _dreamt(args: Args) -> list[Path]:
    from jdl.cli import output
    from jdl.cli.networks import open_network
    from jdl.vision import dream, images

    guide = images.read(args.guide, longest=224) if args.guide is not None else None
    trunk, layers, photograph = open_network(args.model, args.layer, args.image, args.longest)
    channels = () if args.channel is None else (args.channel,)
    goal = dream.goal(trunk, layers, channels=channels, guide=guide)
    settings = dream.Settings(
        octaves=args.octaves,
        scale=args.scale,
        steps=dream.Settings().steps if args.steps is None else args.steps,
        step_size=args.step_size,
        jitter=args.jitter,
        smoothing=args.smoothing,
        natural=not args.any_colors,
        variation=args.variation,
        blur=args.blur,
        tile=args.tile,
    ).checked()
    if not args.frames:
        dreamt = dream.dream(
            trunk, photograph, goal, settings, seed=args.seed, on_step=output.print_tenths
        )
        return [images.write(args.out, dreamt)]
    frames = dream.zoom(
        trunk, photograph, goal, settings, frames=args.frames, zoom=args.zoom, seed=args.seed
    )
    return images.write_frames(args.out, _counted(frames, args.frames))


def _counted(frames: Any, of: int) -> Any:
    for i, frame in enumerate(frames, 1):
        print(f"frame {i}/{of}", file=sys.stderr, flush=True)
        yield frame
