"""Options that several commands share, and what is made of them."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from jdl.core import check

if TYPE_CHECKING:
    from jdl.data import Batches
    from jdl.recipes.run_config import RunConfig

T = TypeVar("T")

Workdir = Annotated[Path, tyro.conf.arg(help="the run directory of `jdl train`")]
RunData = Annotated[
    str | None,
    tyro.conf.arg(
        help="a tar, a glob, a brace range, or digits; by default what the run trained on"
    ),
]
_SPLIT = "such as {0} or ds/{0}, or a part by hash such as {0}:0.1; by default {0} if there is one"
TrainSplit = Annotated[
    str | None,
    tyro.conf.arg(help=f"the folder of members to use, {_SPLIT.format('train')}; all for all"),
]
TestSplit = Annotated[
    str | None,
    tyro.conf.arg(help=f"the folder of members to use, {_SPLIT.format('test')}; all for all"),
]
Split = Annotated[str | None, tyro.conf.arg(help="use only this folder, such as ds/train")]
Label = Annotated[
    str | None,
    tyro.conf.arg(
        help="what the class is read from: folder, a place in the path such as 0 or -2, cls, "
        "json:FIELD, re:PATTERN such as 're:_(cat|dog)', a table of names and classes such as "
        "labels.csv or labels.csv:COLUMN (also .tsv, .json, .jsonl), or none; by default folder"
    ),
]
Include = Annotated[
    str | None,
    tyro.conf.arg(help="use only members that match one of these patterns, such as 'left/,*.png'"),
]
Exclude = Annotated[
    str | None,
    tyro.conf.arg(
        help="leave out members that match, such as 'masks/,*.depth.png', besides hidden ones and "
        "other litter that `jdl index` shows; '!*.seg.*' takes a pattern back, none leaves out none"
    ),
]
BatchSize = Annotated[int, tyro.conf.arg(help="images in a batch")]
Size = Annotated[
    str | None,
    tyro.conf.arg(help="HEIGHT or HEIGHTxWIDTH of images; by default 128, and 8 for the digits"),
]
Color = Annotated[bool, tyro.conf.arg(help="keep three channels; by default images are made gray")]
OnError = Annotated[
    Literal["raise", "skip"], tyro.conf.arg(help="what to do with an image that cannot be read")
]
Json = Annotated[bool, tyro.conf.arg(name="json", help="print JSON instead of a table")]
Network = Annotated[
    str,
    tyro.conf.arg(help="vgg16, squeezenet, a .safetensors file, or a run directory of `jdl train`"),
]
Longest = Annotated[
    int | None,
    tyro.conf.arg(help="reduce larger pictures to this many pixels on their longer side"),
]


def check_positive(args: Any, *names: str) -> None:
    """Raises unless each of these options is at least 1, or None."""
    for name in names:
        value = getattr(args, name)
        check.argument(value is None or value >= 1, _flag(name), "at least 1", value)


def check_left_out(args: Any, allowed: bool, why: str, *names: str) -> None:
    """Raises if one of these options has not its default where it is not allowed."""
    for name in names:
        value, usual = getattr(args, name), getattr(type(args), name)
        check.argument(allowed or value == usual, _flag(name), f"left out: {why}", value)


def _flag(name: str) -> str:
    return f"--{ {'wanted': 'class'}.get(name, name).replace('_', '-') }"


def seconds(option: str, text: str | None) -> float | None:
    """A time such as 90, 90s, 10m or 1.5h, in seconds.

    >>> seconds("--max-time", "10m"), seconds("--max-time", "1.5h")
    (600.0, 5400.0)
    """
    if text is None:
        return None
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        found = float(text if unit is None else text[:-1]) * (unit or 1.0)
    except ValueError:
        found = math.nan
    must = "a time above 0 such as 90s, 10m or 1.5h"
    check.argument(0 < found < math.inf, option, must, text)
    return found


class RunOnData(NamedTuple):
    """A run, and data to apply it to."""

    config: "RunConfig"
    data: str  # what `--data` means
    split: str | None  # what `--split` means
    images: "Batches"  # those data, as the run's model takes them


def open_run(args: Any, split: str, **options: Any) -> RunOnData:
    """Opens the run and the data of `--workdir`, `--data`, `--split` and `--batch-size`.

    `split` is the default if the data have it; `options` are further ones of `RunConfig.images`.
    """
    from jdl.recipes.datasets import default_split, named
    from jdl.recipes.run_config import RunConfig

    check_positive(args, "batch_size")
    given = {name: getattr(args, name, None) for name in ("label", "include", "exclude")}
    config = dataclasses.replace(
        RunConfig.load(args.workdir), **{k: v for k, v in given.items() if v is not None}
    )
    learns = config.learns_labels
    must = "other than none for a classifier" if learns else "left out: no labels are used"
    ok = given["label"] != "none" if learns else given["label"] is None
    check.argument(ok, "--label", must, config.label)
    data = config.data if args.data is None else named(args.data, config.kind)
    chosen = default_split(data, args.split, split, **config.which)
    options = {"labelled": learns} | options
    images = config.images(data, chosen, batch_size=args.batch_size, **options)
    return RunOnData(config, data, chosen, images)


def settings(kind: Callable[..., T], args: Any, **others: Any) -> T:
    """A `kind` made of the command's arguments of the same names, and of others."""
    names = [name for name in inspect.signature(kind).parameters if hasattr(args, name)]
    return kind(**{name: getattr(args, name) for name in names} | others)


def print_skipped(data: "Batches") -> None:
    """Prints how many images could not be read, if any."""
    if data.skipped:
        print(f"skipped: {data.skipped} images that could not be read")
