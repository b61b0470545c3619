"""Completion of commands and flags for your shell.

Examples:
  source <(jdl completion bash)
  jdl completion zsh > ~/.zfunc/_jdl
  jdl completion fish > ~/.config/fish/completions/jdl.fish
"""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import tyro

SHELLS = ("bash", "zsh", "fish")


@dataclass
class Args:
    """For which shell."""

    shell: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish"""


def run(args: Args) -> None:
    """Prints the script."""
    from jdl.cli.commands import COMMANDS
    from jdl.core import check

    shell = check.one_of("SHELL", args.shell, SHELLS)
    known = {name: flags(name) for name in COMMANDS}
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](known))


def flags(command: str) -> list[str]:
    """A command's flags, as its help tells them, and its own commands where it has some."""
    args_class = getattr(importlib.import_module(f"jdl.cli.{command}"), "Args", None)
    if dataclasses.is_dataclass(args_class):
        return ["--help", *_flags(args_class)]
    several = [get_args(option) for option in get_args(args_class)]
    names = [mark.name for _, mark in several]
    return [*names, "--help", *sorted({f for option, _ in several for f in _flags(option)})]


def _flags(args_class: Any) -> list[str]:
    hints = get_type_hints(args_class, include_extras=True)
    found = []
    for field in dataclasses.fields(args_class):
        marks = getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Positional in marks:
            continue
        names = [name for mark in marks if (name := getattr(mark, "name", None))]
        found.append("--" + (names[0] if names else field.name).replace("_", "-"))
    return found


def _bash(known: dict[str, Any]) -> str:
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


def _zsh(known: dict[str, Any]) -> str:
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


def _fish(known: dict[str, Any]) -> str:
    lines = [f"complete -c jdl -n __fish_use_subcommand -f -a '{' '.join(known)}'"]
    for name, fs in known.items():
        where = f"'__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c jdl -n {where} -l {flag.removeprefix('--')}" for flag in fs]
    return "\n".join(lines)
