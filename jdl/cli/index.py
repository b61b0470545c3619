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
    from jdl.data import describe, resolve

    found = describe(resolve(args.data))
    if args.as_json:
        account = {
            "members": found.members,
            "images": found.images,
            "classes": found.classes,
            "damage": found.damage,
        }
        print(json.dumps(account))
        return
    from jdl.cli import progress

    print(
        f"{args.data}: {found.members} members, {found.images} images, {len(found.classes)} classes"
    )
    if found.classes:
        progress.table(["class", "images"], [[k, str(n)] for k, n in found.classes.items()])
    for each in found.damage:
        print(f"{each['word']}: {each['name']} at byte {each['offset']}: {each['detail']}")
    if not found.damage:
        print("no damage")
