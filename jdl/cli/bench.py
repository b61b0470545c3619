"""How fast this machine is at what a run waits for.

Examples:
  jdl bench data photos.tar
  jdl bench data 'photos-{00..07}.tar' --size 224 --color --seconds 10
"""

import importlib
from dataclasses import dataclass
from typing import Annotated

import tyro

# what -> the module whose `run(args)` measures it
BENCHES = {"data": "jdl.cli.bench_data"}


@dataclass
class Args:
    """What to measure, on what."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """data: images a second out of a tar, by threads and by worker processes"""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A.tar")] = "digits"
    """a tar, a glob, a brace range, or the bundled digits"""
    seconds: float = 3.0
    """of each measurement"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH to scale images to; by default 128, and 8 for the digits"""
    color: bool = False
    """keep three channels"""
    batch_size: int = 64
    """images in a batch"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print one JSON object"""


def run(args: Args) -> None:
    """Measures, and prints a table."""
    from jdl.core import check

    what = check.one_of("what", args.what, BENCHES)
    check.in_range("--seconds", args.seconds, 0.0, 3600.0, open_low=True)
    importlib.import_module(BENCHES[what]).run(args)
