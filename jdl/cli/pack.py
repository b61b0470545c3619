"""Rewrite images once as plain, sharded tars, which can be read in any order at full speed.

Examples:
  jdl pack photos/ photos-%05d.tar
  jdl pack faces.tar.gz faces-%05d.tar --size 128
  jdl pack mnist/ mnist.tar
  curl -s https://example.org/a.tar.zst | jdl pack - a-%05d.tar
"""

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jdl.cli import options, output


@dataclass
class Args:
    """The options of `jdl pack`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """a folder of images or IDX files, an IDX file, an .npz, a tar (.gz .bz2 .xz .zst too), or -"""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT-%05d.tar")]
    """the tars to write; %05d becomes the shard's number"""
    shard_megabytes: int = 1024
    """largest size of a shard"""
    shard_images: int | None = None
    """largest number of images in a shard; members of one WebDataset sample stay together"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH to resize to; by default images are copied unchanged"""
    on_error: Literal["raise", "skip"] = "raise"
    """what to do with an image that cannot be decoded, or that a damaged archive has lost"""
    overwrite: bool = False
    """replace existing tars; further shards of an earlier run are removed"""


def run(args: Args) -> None:
    """Writes the tars."""
    from jdl.data.pack import pack
    from jdl.recipes.datasets import parse_size

    options.check_positive(args, "shard_megabytes")
    printed = time.monotonic()

    def progress(members: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > 5.0:
            printed = time.monotonic()
            print(f"{members} members", file=sys.stderr)

    done = pack(
        args.source,
        args.out,
        shard_bytes=args.shard_megabytes << 20,
        shard_images=args.shard_images,
        size=None if args.size is None else parse_size(args.size, args.source),
        on_error=args.on_error,
        overwrite=args.overwrite,
        progress=progress,
    )
    first, last = done.shards[0], done.shards[-1]
    where = first if first == last else f"{first} … {last}"
    size = f"{done.bytes / 1e6:.1f} MB"
    print(f"{done.members} members, {size} in {len(done.shards)} tar(s): {where}")
    told = [f"left out {name}: {why}" for name, why in done.skipped]
    told += [f"another key than {old!r}, which is taken: {new!r}" for old, new in done.renamed]
    for line in told[:20]:
        output.say(line)
    if len(told) > 20:
        print(f"and {len(told) - 20} more")
