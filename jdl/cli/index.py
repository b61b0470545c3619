"""What a tar holds: members, images, classes with counts, damage. Always finishes.

Examples:
  jdl index photos.tar
  jdl index 'photos-{00..07}.tar' --json
"""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass
class Args:
    """Which archive."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A.tar")]
    """a tar, a glob, a brace range such as a-{00..07}.tar, or the bundled digits"""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """print one JSON object: members, images, classes, damage"""


def run(args: Args) -> None:
    """Prints the account."""
    from jdl.data import describe, digits_path

    found = describe(digits_path() if args.data == "digits" else args.data)
    if args.as_json:
        print(json.dumps(found))
        return
    from jdl.cli import progress

    print(
        f"{args.data}: {found['members']} members, {found['images']} images, "
        f"{len(found['classes'])} classes"
    )
    if found["classes"]:
        rows = [[name, str(count)] for name, count in found["classes"].items()]
        progress.table(["class", "images"], rows)
    for line in found["damage"] or ["no damage"]:
        print(line)
