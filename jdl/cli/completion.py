"""Completion of commands and options for your shell.

Examples:
  source <(jdl completion bash)
  jdl completion zsh > ~/.zfunc/_jdl
  jdl completion fish > ~/.config/fish/completions/jdl.fish
"""

# tyro's own scripts complete no files where an option is not a path, such as `--data`, nor any
# positional argument, and start Python for every completion.

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

GLOBAL = ("--help", "--compile-cache")  # what every command takes


@dataclass
class Args:
    """The options of `jdl completion`."""

    shell: Annotated[
        Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")
    ]
    """bash, zsh or fish"""


def run(args: Args) -> None:
    """Prints the script."""
    from jdl.cli.commands import COMMANDS

    known = {name: flags(name) for name in COMMANDS}
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](known))


def flags(command: str) -> list[str]:
    """A command's flags, after its own commands where it has some."""
    args_class = importlib.import_module(f"jdl.cli.{command}").Args
    if dataclasses.is_dataclass(args_class):
        return [*GLOBAL, *_flags(args_class)]
    several = [get_args(option) for option in get_args(args_class)]
    names = [mark.name for _, mark in several]
    return [*names, *GLOBAL, *sorted({f for option, _ in several for f in _flags(option)})]


def _flags(args_class: Any) -> list[str]:
    found = []
    for name, hint in get_type_hints(args_class, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if tyro.conf.Positional in marks:
            continue
        names = [named for mark in marks if (named := getattr(mark, "name", None))]
        found.append("--" + (names[0] if names else name).replace("_", "-"))
    return found


def _bash(known: dict[str, list[str]]) -> str:
    cases = "\n".join(f'    {name}) words="{" ".join(fs)}" ;;' for name, fs in known.items())
    return f"""_jdl() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(known)} --help --version" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if [[ "$current" != -* ]]; then
    COMPREPLY=($(compgen -W "${{words%%--*}}" -- "$current") $(compgen -f -- "$current"))
  fi
}}
complete -o filenames -F _jdl jdl"""


def _zsh(known: dict[str, list[str]]) -> str:
    cases = "\n".join(f"    {name}) words_of=({' '.join(fs)}) ;;" for name, fs in known.items())
    return f"""#compdef jdl
_jdl() {{
  local -a words_of
  if (( CURRENT == 2 )); then
    compadd -- {" ".join(known)} --help --version
    return
  fi
  case "${{words[2]}}" in
{cases}
  esac
  if [[ "${{words[CURRENT]}}" == -* ]]; then compadd -- $words_of; else _files; fi
}}
compdef _jdl jdl"""


def _fish(known: dict[str, list[str]]) -> str:
    lines = [f"complete -c jdl -n __fish_use_subcommand -f -a '{' '.join(known)}'"]
    for name, fs in known.items():
        where = f"'__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c jdl -n {where} -l {flag.removeprefix('--')}" for flag in fs]
    return "\n".join(lines)
