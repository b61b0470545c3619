"""A model's parameters with shapes and counts, and the FLOPs of one image by XLA's cost analysis.

Examples:
  jdl summary cnn --size 128
  jdl summary runs/photos
  jdl summary rnn --json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jdl.cli import options, output
from jdl.core import check

if TYPE_CHECKING:
    from jdl.train.summary import Summary


@dataclass
class Args:
    """The options of `jdl summary`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|DIR")]
    """mlp, cnn, rnn or another model of `jdl train`, a .py file, or a run directory"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH of the images; by default 8, as the digits, or as a file's own data"""
    color: bool = False
    """three channels instead of one"""
    classes: int = 10
    """number of classes"""
    batch_size: int = 1
    """images in the batch whose FLOPs are counted; printed are those of one image"""
    as_json: options.Json = False


def run(args: Args) -> None:
    """Prints the table."""
    import jax
    import numpy as np

    from jdl.recipes import own
    from jdl.recipes.datasets import input_shape, parse_size
    from jdl.recipes.registry import RECIPES, recipe
    from jdl.recipes.run_config import RunConfig
    from jdl.train.summary import summarize

    options.check_positive(args, "classes", "batch_size")
    workdir, data = Path(args.model), ""
    if args.model not in RECIPES and workdir.is_dir():
        config = RunConfig.load(workdir)
        options.check_left_out(args, False, "a run has its own", "size", "color", "classes")
        model, shape, classes = config.model, config.image_shape, len(config.classes)
        data = config.data
        what = f"{config.model} of {workdir}"
    else:
        if own.is_file(args.model):
            data = "" if args.size else recipe(args.model).data
        else:
            others = ("a .py file", "a run directory of `jdl train`")
            check.one_of("MODEL", args.model, [*RECIPES, *others])
        size = parse_size(args.size, "digits")
        model, shape, classes = args.model, (*size, 3 if args.color else 1), args.classes
        what = model
    if recipe(model).data == "trees":
        raise check.UserError(f"jdl summary needs a model of images; {model} reads trees.")
    is_text = recipe(model).kind == "text"
    if is_text:
        options.check_left_out(args, False, "a text has none", "size", "color", "classes")
        shape, classes = input_shape(recipe(model).data, (), 0), 0
    dtype = np.dtype(np.int32 if is_text else np.float32)
    given = [jax.ShapeDtypeStruct((args.batch_size, *shape), dtype)]
    if own.is_file(data):
        given, classes = own.inputs(model, data, args.batch_size)
        shape = given[0].shape[1:]
    net: Any = recipe(model).build(shape, classes)
    net = getattr(net, "model", net)  # both networks of a GAN
    if recipe(model).kind == "cgan":
        given.append(jax.ShapeDtypeStruct((args.batch_size,), np.dtype(np.int32)))
    found = summarize(net, *given)
    if args.as_json:
        totals = ("parameters", "bytes", "forward_flops", "gradient_flops")
        about = {"image_shape": list(shape)} | {name: getattr(found, name) for name in totals}
        print(json.dumps(about | {"arrays": [entry._asdict() for entry in found.entries]}))
        return
    one, several = ("a window", "windows of bytes") if is_text else ("an image", "images")
    _show(found, f"{what}, {several} {'×'.join(map(str, shape))}", one)


def _show(found: "Summary", title: str, one: str) -> None:
    rows = []
    for entry in found.entries:
        of_all = f"{entry.size / found.parameters:.1%}" if entry.kind == "params" else "state"
        shape = "×".join(map(str, entry.shape)) or "scalar"
        rows.append([entry.name, shape, entry.dtype, f"{entry.size:,}", of_all])
    output.table(["array", "shape", "type", "elements", "share"], rows, title)
    print(f"parameters: {found.parameters:,} in {_units(float(found.bytes), 1024, 'iB')}")
    for name, flops in (("outputs", found.forward_flops), ("with gradient", found.gradient_flops)):
        text = "not known to this compiler" if flops is None else _units(flops, 1000, "FLOP")
        print(f"{f'{name}, {one}:':25}{text}")


def _units(value: float | int, base: int, unit: str) -> str:
    """A number with three digits and a unit prefix.

    >>> _units(1_234_567, 1000, "FLOP")
    '1.23 MFLOP'
    """
    prefixes = ["", "k" if base == 1000 else "K", "M", "G", "T", "P"]
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    if unit == "iB" and not power:
        return f"{value:.0f} B"
    return f"{value:.3g} {prefixes[power]}{unit}"
