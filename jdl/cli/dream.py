"""A picture changed until a network sees more in it (Inceptionism); or a class's own picture.

MODEL is vgg16 or squeezenet (pip install 'jax-jdl[vision]'), a .safetensors file of torchvision's
or timm's VGG-16, VGG-19, SqueezeNet or ResNet, or a run directory of `jdl train`. Early layers
add strokes and patterns, late ones eyes, animals and buildings. The size stays the same.

Without an IMAGE, `--class` draws the picture that a classifier assigns to that class most surely.

Examples:
  jdl dream photo.jpg --model vgg16 --out dream.png
  jdl dream photo.jpg --model vgg16 --layer relu3_3 --octaves 6 --steps 20 --out strokes.png
  jdl dream photo.jpg --model vgg16 --layer relu4_3 --guide flower.jpg --out flowery.png
  jdl dream photo.jpg --model vgg16 --frames 60 --out zoom.webp
  jdl dream --model squeezenet --class espresso --out espresso.png
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jdl.cli import options, output
from jdl.core import check

if TYPE_CHECKING:
    import numpy as np

_FOR_IMAGE = (
    *("layer", "channel", "guide", "octaves", "scale", "step_size", "jitter", "smoothing"),
    *("any_colors", "variation", "blur", "tile", "longest", "zoom"),
)


@dataclass
class Args:
    """The options of `jdl dream`."""

    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE]")] = None
    """a photograph"""
    model: options.Network = "vgg16"
    layer: str | None = None
    """a layer, or several such as relu4_3,relu5_1; by default the network's usual one"""
    channel: int | None = None
    """increase this channel alone"""
    guide: Path | None = None
    """another picture, whose features are to appear"""
    wanted: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """a class's name or number, whose picture is made from noise; with --size, --steps, --seed"""
    octaves: int = 4
    """number of sizes at which the picture is changed, from small to large"""
    scale: float = 1.4
    """ratio of one octave's size to the size before"""
    steps: int | None = None
    """steps at each octave, by default 12; for a class in all, by default 256"""
    step_size: float = 0.01
    """mean change of a pixel in a step; pixels are in [0, 1]"""
    jitter: int = 16
    """largest random shift of the picture in a step, in pixels"""
    smoothing: float = 0.5
    """standard deviation of the blur of gradients, in pixels"""
    any_colors: bool = False
    """do not favour the colours of photographs"""
    variation: float = 0.0
    """weight of the total-variation prior; 0.3, for example, makes smooth pictures"""
    blur: float = 0.0
    """standard deviation of the blur of the picture after each step, in pixels"""
    tile: int = 512
    """largest side of the tiles in which gradients are computed; smaller needs less memory"""
    longest: options.Longest = None
    frames: int = 0
    """number of frames of a zoom into the picture: a .gif, a .webp or PNGs (zoom-%04d.png)"""
    zoom: float = 1.04
    """enlargement of each frame relative to the frame before"""
    size: int = 224
    """height and width of a class's picture in pixels"""
    seed: int = 0
    """random seed for the shifts"""
    out: Path = Path("dream.png")
    """the picture to write, a PNG or JPEG"""


def run(args: Args) -> None:
    """Writes the picture; the file appears only when it is complete."""
    from jdl.vision import images

    both = [str(x) for x in (args.image, args.wanted) if x is not None]
    check.argument(len(both) == 1, "IMAGE, --class", "given one of them", both)
    check.argument(args.frames >= 0, "--frames", "0 or more", args.frames)
    ok = args.image is not None or not args.frames
    check.argument(ok, "--frames", "0 with --class", args.frames)
    why = "it is for an IMAGE" if args.image is None else "it is for --class"
    options.check_left_out(args, False, why, *(_FOR_IMAGE if args.image is None else ("size",)))
    options.check_left_out(args, args.frames > 0, "it is for --frames", "zoom")
    images.check_frames_out(args.out) if args.frames else images.check_out(args.out)
    if args.image is None:
        written = [images.write(args.out, _class(args, args.wanted or ""))]
    else:
        written = _dreamt(args, images.read(args.image, longest=args.longest))
    more = f" … {written[-1]}" if len(written) > 1 else ""
    print(f"picture: {written[0]}{more}")


def _class(args: Args, wanted: str) -> "np.ndarray":
    from jdl.cli.networks import open_network
    from jdl.vision import activations
    from jdl.vision.reverse import PictureSearch, of_class

    trunk, _ = open_network(args.model, None)
    search = PictureSearch(size=args.size, steps=256 if args.steps is None else args.steps)
    found = of_class(trunk, wanted, search, seed=args.seed, on_step=output.print_tenths)
    name, share = activations.classify(trunk, found, count=1)[0]
    output.say(f"classified as {name} ({share:.1%})")
    return found


def _dreamt(args: Args, photograph: "np.ndarray") -> list[Path]:
    from jdl.cli.networks import open_network
    from jdl.vision import dream, images

    guide = images.read(args.guide, longest=224) if args.guide is not None else None
    trunk, layers = open_network(args.model, args.layer)
    channels = () if args.channel is None else (args.channel,)
    goal = dream.goal(trunk, layers, channels=channels, guide=guide)
    steps = dream.Settings().steps if args.steps is None else args.steps
    natural = not args.any_colors
    settings = options.settings(dream.Settings, args, steps=steps, natural=natural).checked()
    if not args.frames:
        dreamt = dream.dream(
            trunk, photograph, goal, settings, seed=args.seed, on_step=output.print_tenths
        )
        return [images.write(args.out, dreamt)]
    frames = dream.zoom(
        trunk, photograph, goal, settings, frames=args.frames, zoom=args.zoom, seed=args.seed
    )
    return images.write_frames(args.out, _counted(frames, args.frames))


def _counted(frames: "Iterable[np.ndarray]", of: int) -> "Iterator[np.ndarray]":
    for i, frame in enumerate(frames, 1):
        print(f"frame {i}/{of}", file=sys.stderr, flush=True)
        yield frame
