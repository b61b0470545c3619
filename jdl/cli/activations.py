"""What a network's layers respond to in a picture, and what they respond to most.

The pictures that --what can ask for:
  maps        the activations of a layer's channels on IMAGE, strongest first
  grad-cam    where in IMAGE a layer finds evidence for a class
  saliency    which pixels of IMAGE change a class's score
  preferred   for each channel, a picture that excites it most, from noise
  exciting    for each channel, images of --data that excite it most

MODEL is vgg16 or squeezenet (pip install 'jax-jdl[vision]'), a .safetensors file of torchvision's
or timm's VGG-16, VGG-19, SqueezeNet or ResNet, or a run directory of `jdl train`. Classes are those
of IMAGE's middle square, or of all of IMAGE for a run that was trained without --crop.

Examples:
  jdl activations squeezenet --list
  jdl activations vgg16 photo.jpg --layer relu3_3
  jdl activations squeezenet photo.jpg --what grad-cam --layer fire9 --class 'Egyptian cat'
  jdl activations runs/cnn-digits-adam digit.png --what grad-cam --layer Conv_1
  jdl activations runs/cnn-digits-adam --what exciting --layer Conv_1 --data digits
  jdl activations vgg16 --what preferred --layer relu4_3 --channels 5,17,80
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jdl.cli import options, output
from jdl.core import check

if TYPE_CHECKING:
    import numpy as np

    from jdl.vision.trunk import Trunk

USED = {  # the options of each picture
    "maps": "layer channels count",
    "grad-cam": "layer wanted",
    "saliency": "wanted seed",
    "preferred": "layer channels count size steps seed",
    "exciting": "layer channels count data split include exclude",
}


@dataclass
class Args:
    """The options of `jdl activations`."""

    model: Annotated[options.Network, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE]")] = None
    """a photograph; required for maps, grad-cam and saliency"""
    layer: str | None = None
    """the layer's name; by default the network's usual one. An error lists the nearest names"""
    what: Literal["maps", "grad-cam", "saliency", "preferred", "exciting"] = "maps"
    """what to draw"""
    names: Annotated[bool, tyro.conf.arg(name="list")] = False
    """draw nothing, but list the layers with the shapes of their activations for one image"""
    channels: str | None = None
    """numbers such as 3,17,80; by default the strongest on IMAGE, or the first"""
    count: int | None = None
    """number of channels where none are named; by default 16, and 8 for exciting"""
    wanted: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """for grad-cam and saliency: a class's name or number; by default the most probable"""
    data: str | None = None
    """for exciting: a tar, a glob, a brace range, or digits"""
    split: options.TestSplit = None
    include: options.Include = None
    exclude: options.Exclude = None
    longest: options.Longest = 512
    size: int = 96
    """height and width of preferred pictures in pixels"""
    steps: int = 128
    """optimization steps for preferred pictures"""
    seed: int = 0
    """random seed for preferred pictures and for saliency's noise"""
    out: Path = Path("activations.png")
    """the picture to write, a PNG or JPEG"""


def run(args: Args) -> None:
    """Draws the picture; the file appears only when it is complete."""
    from jdl.cli.networks import open_network
    from jdl.vision import images

    images.check_out(args.out)
    options.check_positive(args, "count")
    for what, used in USED.items():
        unused = {*used.split()} - {*("" if args.names else USED[args.what]).split()}
        options.check_left_out(args, False, f"it is for --what {what}", *sorted(unused))
    if args.names:
        trunk, _ = open_network(args.model, None)
        shapes = trunk.shapes(trunk.layers)
        rows = [[name, " × ".join(map(str, shape[1:]))] for name, shape in shapes.items()]
        return output.table(["layer", "activations"], rows, f"{args.model}: {len(rows)} layers")
    ok = args.image is not None or args.what in ("preferred", "exciting")
    check.argument(ok, "IMAGE", f"given for {args.what}", None)
    photograph = None if args.image is None else images.read(args.image, longest=args.longest)
    trunk, layers = open_network(args.model, args.layer)
    check.argument(len(layers) == 1, "--layer", "one layer", args.layer)
    draw = {"maps": _maps, "preferred": _preferred, "exciting": _exciting}.get(args.what, _class)
    images.write(args.out, draw(args, trunk, layers[0], photograph))
    print(f"picture: {args.out}")


def _channels(args: Args, trunk: "Trunk", layer: str, photograph: Any) -> list[int]:
    """The channels named; by default the strongest on the photograph, or the first."""
    from jdl.vision import activations

    count = args.count or (8 if args.what == "exciting" else 16)
    if args.channels is None and photograph is not None:
        return list(activations.maps(trunk, photograph, layer, count=count).channels)
    return _named(args) or list(range(min(count, trunk.shapes((layer,))[layer][-1])))


def _named(args: Args) -> list[int] | None:
    if args.channels is None:
        return None
    parts = [part.strip() for part in args.channels.split(",")]
    ok = all(part.isdigit() for part in parts) and len(parts) <= 256
    check.argument(ok, "--channels", "numbers such as 3,17,80", args.channels)
    return [int(part) for part in parts]


def _maps(args: Args, trunk: "Trunk", layer: str, photograph: Any) -> "np.ndarray":
    from jdl.vision import activations

    count = args.count or 16
    found = activations.maps(trunk, photograph, layer, channels=_named(args), count=count)
    height, width = found.values.shape[1:]
    print(f"{layer}: {len(found.channels)} maps of {height} × {width}")
    return activations.drawn(found)


def _class(args: Args, trunk: "Trunk", layer: str, photograph: Any) -> "np.ndarray":
    from jdl.vision import activations, images

    for name, share in activations.classify(trunk, photograph, count=3):
        output.say(f"{share:6.1%}  {name}")
    if args.what == "grad-cam":
        found = activations.grad_cam(trunk, photograph, layer, wanted=args.wanted)
        right = activations.overlaid(photograph, found.heat)
    else:
        found = activations.saliency(trunk, photograph, wanted=args.wanted, seed=args.seed)
        right = images.colored(found.heat)
    captions = [Path(args.image or "").name, f"{trunk.class_name(found.number)} ({args.what})"]
    return images.sheet([photograph, right], columns=2, captions=captions)


def _preferred(args: Args, trunk: "Trunk", layer: str, photograph: Any) -> "np.ndarray":
    from jdl.vision import images
    from jdl.vision.reverse import PictureSearch, preferred

    channels = _channels(args, trunk, layer, photograph)
    search = PictureSearch(size=args.size, steps=args.steps)
    found = preferred(trunk, layer, channels, search, seed=args.seed, on_step=output.print_tenths)
    captions = [f"channel {number}" for number in channels]
    return images.sheet(list(found), captions=captions, side=max(args.size, 96))


def _exciting(args: Args, trunk: "Trunk", layer: str, photograph: Any) -> "np.ndarray":
    from jdl.recipes.datasets import default_split, open_images
    from jdl.vision import activations, images

    check.argument(args.data is not None, "--data", "given for exciting", None)
    data = str(args.data)
    which = {"include": args.include, "exclude": args.exclude}
    pictures = open_images(
        data,
        size=trunk.size or (224, 224),
        split=default_split(data, args.split, "test", **which),
        label="none",
        crop=None if trunk.stretched else "center",
        **which,
        batch_size=32,
    )
    channels = _channels(args, trunk, layer, photograph)
    found = activations.exciting(trunk, pictures, layer, channels, count=8)
    tiles = [image for each in found for image in each.images]
    captions = [f"channel {e.channel}, max {score:.3g}" for e in found for score in e.scores]
    return images.sheet(tiles, columns=len(found[0].images), captions=captions, side=160)
