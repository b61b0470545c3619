"""How fast this machine loads data, trains, and computes optimizers' steps.

Examples:
  jdl bench data photos.tar
  jdl bench data 'photos-{00..07}.tar' --size 224 --color --seconds 10
  jdl bench train cnn --size 64
  jdl bench optim mlp --size 28
"""

import importlib
from dataclasses import dataclass
from typing import Annotated

import tyro

from jdl.cli import options
from jdl.core import check

# The module `bench_WHAT` has `measure(target, *, size, channels, batch_size, seconds)`, which takes
# the values of the options below; for data also those of `from_tar` that choose members.
BENCHES = ("data", "train", "optim")


@dataclass
class Args:
    """The options of `jdl bench`."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """data: images per second; train: our loop against a bare one; optim: costs in gradients"""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[A.tar|MODEL]")] = ""
    """for data a tar, glob or brace range, by default the digits; else cnn, mlp or rnn"""
    seconds: float = 3.0
    """seconds of each measurement of data; for train and optim, of all measurements together"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH of images; by default 128, and 8 for the digits and optim"""
    color: options.Color = False
    batch_size: options.BatchSize = 64
    split: options.Split = None
    include: options.Include = None
    exclude: options.Exclude = None
    as_json: options.Json = False


def run(args: Args) -> None:
    """Measures, and prints a table or JSON."""
    from jdl.recipes.datasets import choice

    what = check.one_of("WHAT", args.what, BENCHES)
    options.check_positive(args, "batch_size")
    check.in_range("--seconds", args.seconds, 0.0, 3600.0, open_low=True)
    which = choice(None, args.include, args.exclude)
    which |= {} if args.split is None else {"split": args.split}
    names = ("split", "include", "exclude")
    options.check_left_out(args, what == "data", "it is for data", *names)
    report = importlib.import_module(f"jdl.cli.bench_{what}").measure(
        args.target,
        size=args.size,
        channels=3 if args.color else 1,
        batch_size=args.batch_size,
        seconds=args.seconds,
        **which,
    )
    report.show(as_json=args.as_json)
