"""A command's settings from a file, .toml or .yaml: the same names as its flags.

The file's entries become command-line arguments before the user's own, so that both are read by
one parser, and the command line wins. A run's own `config.toml` has its command's settings in a
table `[command]`.
"""

import dataclasses
import tomllib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from jdl.core import check

TABLE = "command"
MAX_BYTES = 1 << 20


def expand(arguments: list[str], args_class: type) -> list[str]:
    """The arguments with those of `--config FILE` before them, and `--config` gone."""
    names = [f.name for f in dataclasses.fields(args_class)] if is_dataclass(args_class) else []
    if "config" not in names:  # such as where there are commands of a command
        return arguments
    own, path = _without_config(arguments)
    if path is None:
        return arguments
    settings = read(Path(path))
    known = {_flag(name) for name in names} - {"config", "workdir"}
    given: list[str] = []
    for name, value in settings.items():
        flag = check.one_of(f"a setting in {path}", _flag(name), known)
        if flag == "model":
            if not own or own[0].startswith("-"):
                own = [str(value), *own]
            continue
        given += _as_arguments(flag, value)
    # The positional MODEL stays in front.
    front = [] if not own or own[0].startswith("-") else own[:1]
    return [*front, *given, *own[len(front) :]]


def read(path: Path) -> dict[str, Any]:
    """The settings in a file; a run's own are in its table `[command]`."""
    check.argument(
        path.suffix in (".toml", ".yaml", ".yml"), "--config", "a .toml or .yaml file", str(path)
    )
    check.argument(path.is_file(), "--config", "an existing file", str(path))
    size = path.stat().st_size
    check.argument(size <= MAX_BYTES, "--config", f"of at most {MAX_BYTES} bytes", size)
    try:
        text = path.read_text(encoding="utf-8")
        settings = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise check.DataError(f"{path} is not readable as TOML: {error}.") from error
    if not isinstance(settings, dict):
        raise check.DataError(f"{path} must hold names and values, such as `optimizer: hf`.")
    table = settings.get(TABLE, settings)
    check.argument(isinstance(table, dict), TABLE, "a table of settings", table)
    return dict(table)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise check.DataError(f"--config is not readable as YAML: {error}.") from error


def as_table(args: Any) -> dict[str, Any]:
    """A command's arguments as TOML can hold them; what is None, and where it ran, left out."""
    plain = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in ("config", "workdir") or value is None:
            continue
        value = list(value) if isinstance(value, tuple) else value
        plain[field.name] = str(value) if isinstance(value, Path) else value
    return plain


def _without_config(arguments: list[str]) -> tuple[list[str], str | None]:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[:i] + arguments[i + 2 :], arguments[i + 1]
        if argument.startswith("--config="):
            return arguments[:i] + arguments[i + 1 :], argument.partition("=")[2]
    return arguments, None


def _flag(name: str) -> str:
    return str(name).replace("_", "-")


def _as_arguments(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}"] if value else []
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)] if value else []
    return [] if value is None else [f"--{flag}", str(value)]
