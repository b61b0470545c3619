"""`config.toml`, which holds a run's settings: reading, writing, and comparing with an earlier one.

Settings are frozen dataclasses. A field with a default may be missing in the file.
"""

import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from jdl import __version__
from jdl.core import check
from jdl.core.files import write_atomically

FILE = "config.toml"

_Config = TypeVar("_Config")


def write(workdir: Path, config: Any, **more: Any) -> None:
    """Writes the settings and what else is given; a setting of None is left out."""
    table = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    write_atomically(workdir / FILE, tomli_w.dumps({"jdl": __version__, **more, **table}))


def read(workdir: Path) -> dict[str, Any] | None:
    """The file's entries; None where there is no file."""
    path = workdir / FILE
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise check.DataError(f"{path} is not readable as TOML: {error}.") from error


def parse(cls: type[_Config], table: Mapping[str, Any], workdir: Path, *others: str) -> _Config:
    """The settings among the file's entries; `others` are entries that are no settings."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    if unknown := sorted(table.keys() - {f.name for f in fields} - {"jdl", *others}):
        raise check.DataError(
            f"{workdir / FILE} has settings that this version of jdl does not know: "
            f"{', '.join(unknown)}. It was written by another version."
        )
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    if missing := sorted(required - table.keys()):
        raise check.DataError(f"{workdir / FILE} lacks {', '.join(missing)}.")
    values = {f.name: table[f.name] for f in fields if f.name in table}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check_same(workdir: Path, now: Any, before: Any, may_change: Collection[str] = ()) -> None:
    """Raises unless the settings equal those of the run that the directory holds."""
    mine, theirs = dataclasses.asdict(now), dataclasses.asdict(before)
    differing = [
        f"{name}: {theirs[name]!r:.200} there, {value!r:.200} now"
        for name, value in mine.items()
        if theirs[name] != value and name not in may_change
    ]
    if differing:
        raise check.UserError(
            f"{workdir} holds a run with other settings ({'; '.join(differing)}). Choose another "
            "--workdir, or the same settings to continue it."
        )
