"""A command's options from a file, .toml or .yaml: the same names as its flags.

The file's entries become command-line arguments before the user's own, so that one parser reads
both and the command line wins; of several files the later one. `--no-FLAG` switches off what a
file switches on. A run's own `config.toml` has its command's options in a table `[command]`.
"""

import argparse
import dataclasses
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

from jdl.core import check
from jdl.recipes.run_config import COMMAND

MAX_BYTES = 1 << 20
ALIASES = {"steps": "max-steps"}
REPEATED = ("option",)  # flags of one value each; in a file a list of texts, or a table


def expand(arguments: list[str], args_class: type) -> list[str]:
    """The arguments with those of `--config FILE` before them, and no `--config` or `--no-FLAG`."""
    hints = get_type_hints(args_class) if dataclasses.is_dataclass(args_class) else {}
    known = {_flag(name): kind for name, kind in hints.items()}
    if "config" not in known:  # the command takes no file
        return arguments
    del known["config"]
    switches = [flag for flag, kind in known.items() if kind is bool]
    parser = argparse.ArgumentParser(prog="jdl", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    found, own = parser.parse_known_args(arguments)
    settings: dict[str, Any] = {}
    for path in found.config:
        settings |= _settings(path, known)
    for argument in own:
        for flag in switches:
            if argument in (f"--{flag}", f"--no-{flag}"):
                settings[flag] = argument == f"--{flag}"
    own = [a for a in own if a not in {f"--{no}{flag}" for flag in switches for no in ("", "no-")}]
    model = settings.pop("model", None)
    if model is not None and (not own or own[0].startswith("-")):
        own = [str(model), *own]
    # The positional MODEL stays in front.
    front = [] if not own or own[0].startswith("-") else own[:1]
    given = [a for flag, value in settings.items() for a in _as_arguments(flag, value)]
    return [*front, *given, *own[len(front) :]]


def _settings(path: str, known: dict[str, Any]) -> dict[str, Any]:
    """Flag -> value of one file, checked against the types of the known flags."""
    settings = {}
    for name, value in read(Path(path)).items():
        flag = _flag(name)
        flag = ALIASES.get(flag, flag) if flag not in known else flag
        flag = check.one_of(f"a setting in {path}", flag, known)
        if flag in REPEATED and isinstance(value, dict):
            value = [f"{key}={x}" for key, x in value.items()]
        must = "true or false" if known[flag] is bool else "a value or a list of them"
        ok = isinstance(value, bool) == (known[flag] is bool) and not isinstance(value, dict)
        check.argument(ok or value is None, f"{name} in {path}", must, value)
        settings[flag] = value
    return settings


def read(path: Path) -> dict[str, Any]:
    """The options in a file, or in its table `[command]`."""
    ok = path.suffix in (".toml", ".yaml", ".yml")
    check.argument(ok, "--config", "a .toml or .yaml file", str(path))
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
    table = settings.get(COMMAND, settings)
    check.argument(isinstance(table, dict), COMMAND, "a table of settings", table)
    return dict(table)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise check.DataError(f"--config is not readable as YAML: {error}.") from error


def as_table(args: Any) -> dict[str, Any]:
    """A command's arguments as TOML can hold them, without None and those of one start alone."""
    plain = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in ("config", "workdir", "try_run") or value is None:
            continue
        value = list(value) if isinstance(value, tuple) else value
        plain[field.name] = str(value) if isinstance(value, Path) else value
    return plain


def _flag(name: str) -> str:
    return str(name).replace("_", "-")


def _as_arguments(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}"] if value else []
    if flag in REPEATED and isinstance(value, list):
        return [word for x in value for word in (f"--{flag}", str(x))]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)] if value else []
    return [] if value is None else [f"--{flag}", str(value)]
