"""Rewrite images as plain, sharded tars, which can be read at random: once, instead of each epoch.

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


@dataclass
class Args:
    """What to pack, to where."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """a folder of images or IDX files, an IDX file, an .npz, a tar (.gz .bz2 .xz .zst too), or -"""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT-%05d.tar")]
    """the tars to write; %05d becomes the shard's number"""
    shard_megabytes: int = 1024
    """a shard's size, at most"""
    shard_images: int | None = None
    """a shard's images, at most; what a WebDataset sample has stays together"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH to resize to; by default images are copied as they are"""
    on_error: Literal["raise", "skip"] = "raise"
    """what to do with an image that cannot be decoded, or with what a damaged archive lost"""
    overwrite: bool = False
    """replace tars that are there; further shards of an earlier run go"""


def run(args: Args) -> None:
    """Writes the tars."""
    from jdl.core import check
    from jdl.data.pack import pack

    check.argument(
        args.shard_megabytes >= 1, "--shard-megabytes", "at least 1", args.shard_megabytes
    )
    size = None
    if args.size is not None:
        from jdl.recipes.datasets import parse_size

        size = parse_size(args.size, args.source)
    said = time.monotonic()

    def progress(members: int) -> None:
        nonlocal said
        if time.monotonic() - said > 5.0:
            said = time.monotonic()
            print(f"{members} members", file=sys.stderr)

    done = pack(
        args.source,
        args.out,
        shard_bytes=args.shard_megabytes << 20,
        shard_images=args.shard_images,
        size=size,
        on_error=args.on_error,
        overwrite=args.overwrite,
        progress=progress,
    )
    first, last = done.shards[0], done.shards[-1]
    where = first if first == last else f"{first} … {last}"
    print(
        f"{done.members} members, {done.bytes / 1e6:.1f} MB in {len(done.shards)} tar(s): {where}"
    )
    for name, why in done.skipped[:20]:
        print(f"skipped {name}: {why}")
    if len(done.skipped) > 20:
        print(f"and {len(done.skipped) - 20} more")
