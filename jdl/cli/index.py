"""What a tar holds, even a damaged one: members, images, classes with counts, damage.

Examples:
  jdl index photos.tar
  jdl index 'photos-{00..07}.tar' --json
  jdl index faces.tar.gz --seekable
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from jdl.cli import options, output

if TYPE_CHECKING:
    from jdl.data import Description


@dataclass
class Args:
    """The options of `jdl index`."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A.tar")]
    """a tar, a URL, a glob, a brace range such as a-{00..07}.tar, -, or the bundled digits"""
    split: options.Split = None
    label: options.Label = None
    include: options.Include = None
    exclude: options.Exclude = None
    as_json: options.Json = False
    seekable: bool = False
    """also write a seek file, which lets a .tar.gz be read in any order, slowly; see `jdl pack`"""


def run(args: Args) -> None:
    """Prints the contents."""
    from jdl.data import describe, resolve
    from jdl.recipes.datasets import choice

    if args.seekable:
        _make_seekable(args.data)
    which = choice(args.label, args.include, args.exclude)
    found = describe(resolve(args.data), split=args.split, **which)
    if args.as_json:
        keys = ("members", "images", "unread", "left_out", "classes", "damage")
        print(json.dumps({key: getattr(found, key) for key in keys}))
    else:
        _print(args.data, found)


def _make_seekable(data: str) -> None:
    from jdl.data.tar.paths import expand
    from jdl.data.tar.seekable import make_seekable

    for path in expand(data):
        file = make_seekable(path)
        share = os.path.getsize(file) / os.path.getsize(path)
        print(f"{file}: {share:.0%} of the archive's size", file=sys.stderr)


_COST = {
    "stream": (
        "read in order and shuffled through a window; continuing from a position reads everything "
        "before it again. `jdl pack` rewrites it once for global shuffling at full speed"
    ),
    "seekable": (
        "read in any order through its seek file, some hundred images a second. `jdl pack` "
        "rewrites it once for full speed"
    ),
}


def _print(data: str, found: "Description") -> None:
    about = f"{found.members} members, {found.images} images, {len(found.classes)} classes"
    output.say(f"{data}: {about}")
    others = {kind: n for kind, n in found.kinds.items() if kind != "image"}
    if others:
        output.say("besides images: " + ", ".join(f"{n} × {kind}" for kind, n in others.items()))
    if found.unread:
        listed = ", ".join(f"{n} × .{kind}" for kind, n in found.unread.items())
        output.say(f"images of a format that is not read: {listed}")
    if found.left_out:
        by = ", ".join(f"{n} by {pattern!r}" for pattern, n in sorted(found.left_out.items()))
        print(f"left out: {by}; --exclude '!PATTERN' takes a pattern back, --exclude none all")
    for archive, mode in found.modes.items():
        if mode in _COST:
            output.say(f"{archive}: {_COST[mode]}")
    if found.classes:
        output.table(["class", "images"], [[k, str(n)] for k, n in found.classes.items()])
    lost = sum(bool(each["lost"]) for each in found.damage)
    if lost:
        print(f"damaged: {lost} problem(s); training on it needs --on-error skip")
    for each in found.damage:
        name = f" {each['name']}" if each["name"] else ""
        where = f" of {each['archive']}" if len(found.archives) > 1 else ""
        output.say(f"{each['word']}:{name} at byte {each['offset']}{where}: {each['detail']}")
    if not found.damage:
        print("no damage")
