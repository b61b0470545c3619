"""How fast this machine is at what a run waits for.

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

# what -> the module whose `measure` measures it
BENCHES = {
    "data": "jdl.cli.bench_data",
    "train": "jdl.cli.bench_train",
    "optim": "jdl.cli.bench_optim",
}


@dataclass
class Args:
    """What to measure, on what."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """data: images a second; train: our loop against a bare one; optim: steps, in gradients"""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[A.tar|MODEL]")] = ""
    """for data a tar, glob or brace range, else the digits; for the others cnn, mlp or rnn"""
    seconds: float = 3.0
    """of each measurement of data; of all of them together otherwise"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH of the images; by default 128, and 8 for the digits and optim"""
    color: bool = False
    """keep three channels"""
    batch_size: int = 64
    """images in a batch"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print one JSON object"""


def run(args: Args) -> None:
    """Measures, and prints a table or JSON."""
    from jdl.core import check

    what = check.one_of("WHAT", args.what, BENCHES)
    check.positive_int("--batch-size", args.batch_size)
    check.in_range("--seconds", args.seconds, 0.0, 3600.0, open_low=True)
    report = importlib.import_module(BENCHES[what]).measure(
        args.target,
        size=args.size,
        channels=3 if args.color else 1,
        batch_size=args.batch_size,
        seconds=args.seconds,
    )
    report.show(as_json=args.as_json)
