"""The entry point of the command `jdl`.

Exit codes: 0 done, 1 a bug, 2 a mistake in the arguments or data, 75 stopped by SIGTERM after
saving, 130 interrupted.
"""

import difflib
import errno
import functools
import importlib
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any, get_args

from jdl.cli.commands import COMMANDS
from jdl.cli.output import visible

USAGE = """usage: jdl COMMAND [OPTIONS]

Train JAX models with any optimizer, first or second order,
on images streamed from tar archives.

{commands}

examples:
  jdl demo
  jdl train cnn --optimizer hf
  jdl train cnn --data 'photos-*.tar' --optimizer adam --max-steps 500 --workdir runs/photos
  jdl compare --data photos.tar --model cnn --optimizers sgd,adam,lbfgs,hf --seconds 30

`jdl COMMAND --help` lists a command's options. Each also takes
`--compile-cache DIR`, the folder that keeps compiled programs for the
next start (`jdl doctor` shows it), or `--compile-cache off`."""

# Errors of a folder or disk that cannot be written, which are the user's to solve.
UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    if argv is None:
        _use_compilation_cache()
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has ended, as in `jdl … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _use_compilation_cache() -> None:
    """Keeps compiled programs between commands; JAX reads the variable when it is imported."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(base, "jdl", "xla"))
    # JAX keeps only what took a second: a second start of the default CNN would win nothing.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _without_cache_flag(arguments: list[str]) -> list[str]:
    """The arguments without `--compile-cache`, which is obeyed here, before JAX is imported."""
    names = [a.partition("=")[0] for a in arguments]
    if "--compile-cache" not in names:
        return arguments
    at = names.index("--compile-cache")
    _, equals, folder = arguments[at].partition("=")
    rest = arguments[at + 1 :]
    if not equals and rest:
        folder, *rest = rest
    if not folder or folder.startswith("-"):
        raise ValueError("--compile-cache must be followed by a folder or by `off`.")
    key, value = "JAX_COMPILATION_CACHE_DIR", os.path.abspath(os.path.expanduser(folder))
    if folder == "off":
        key, value = "JAX_ENABLE_COMPILATION_CACHE", "false"
    os.environ[key] = value
    return arguments[:at] + rest


def _main(argv: Sequence[str] | None) -> int:
    try:
        arguments = _without_cache_flag(list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        return _mistake(str(error))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {c:{width}}  {t}" for c, t in COMMANDS.items())))
        return 0
    if arguments[0] == "--version":
        from jdl import __version__

        print(f"jdl {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return _mistake(f"there is no command {name!r}.{hint} `jdl --help` lists them.")
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    module = importlib.import_module(f"jdl.cli.{name}")
    from jdl.core.check import UserError

    try:
        if hasattr(module, "parse"):
            parsed = module.parse(arguments)
        else:
            if any(a.partition("=")[0] == "--config" or a.startswith("--no-") for a in arguments):
                from jdl.cli.config_file import expand

                arguments = expand(arguments, module.Args)
            parsed = parse(name, module, arguments)
    except UserError as error:
        return _mistake(str(error), name)
    except SystemExit as end:
        return int(end.code or 0)

    try:
        module.run(parsed)
        return 0
    except SystemExit as end:  # SIGTERM, with everything saved
        if not str(end).isdigit():
            print(f"jdl {name}: {end}", file=sys.stderr)
        return int(end.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        code, message = _outcome(error, name, parsed)
        if getattr(parsed, "distributed", False):
            from jdl.train import distributed

            distributed.announce(error, code, message)
        print(message, file=sys.stderr)
        return code


def _outcome(error: BaseException, name: str, args: Any) -> tuple[int, str]:
    """The exit code and the message; raises the error again if it is a bug."""
    from jdl.core.check import SourceError, UserError

    if isinstance(error, KeyboardInterrupt):
        return 130, f"jdl {name}: {str(error) or 'interrupted; what was written stays'}."
    if isinstance(error, OSError):
        if error.errno not in UNWRITABLE:
            raise error
        return 2, f"jdl {name}: error: {error.filename}: {error.strerror}."
    text, names = str(error), [*getattr(args, "__dict__", {})]
    if not isinstance(error, UserError):  # of the user's own file, or a bug
        model_file = sys.modules.get("jdl.train.model_file")
        if model_file is None or (blamed := model_file.blamed(error)) is None:
            raise error
        text, names = blamed, []
    text = "\n".join(map(visible, text.split("\n")))
    names = [] if isinstance(error, SourceError) else names
    return 2, f"jdl {name}: error: {in_flags(text, names)}"


def in_flags(message: str, names: Sequence[str]) -> str:
    """A message about arguments of Python functions, with those of these names as flags.

    >>> in_flags("`on_error` must be … To skip it pass on_error='skip'.", ["on_error"])
    '`--on-error` must be … To skip it pass --on-error skip.'
    """

    def flag(found: re.Match[str]) -> str:
        return "--" + found[1].replace("_", "-")

    def given(found: re.Match[str]) -> str:
        text = next((group for group in found.groups()[1:] if group is not None), "none")
        return f"{flag(found)} {shlex.quote(text)}"

    known = "|".join(map(re.escape, names)) or "(?!)"
    value = r"""(?:'([^']*)'|"([^"]*)"|(-?[0-9.]*[0-9])|None|\(\))"""
    message = re.sub(rf"\b({known})={value}", given, message)
    return re.sub(rf"(?<=`)({known})(?=`)", flag, message)


def parse(name: str, module: ModuleType, arguments: list[str]) -> Any:
    """The command's arguments; `SystemExit` after help, or after a mistake has been printed."""
    import tyro

    return tyro.cli(
        _without_empty_defaults(module.Args),
        prog=f"jdl {name}",
        description=_wrapped(module.__doc__ or ""),
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )


@functools.cache
def _without_empty_defaults(args: Any) -> Any:
    """The class, or union of classes, with help that does not print a default of None or False."""
    import tyro

    def hint(default: str) -> str:
        return "" if default in ("None", "False", "", "''") else f"(default: {default})"

    for part in get_args(args):  # of a union; each may be annotated
        _without_empty_defaults((get_args(part) or (part,))[0])
    for field, kind in getattr(args, "__annotations__", {}).items():
        args.__annotations__[field] = Annotated[kind, tyro.conf.arg(help_behavior_hint=hint)]
    return args


def _wrapped(text: str) -> str:
    """A docstring wrapped, but for lists; later lines are indented so that tyro keeps them."""
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    paragraphs = text.strip().split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if "\n  " not in paragraph:
            paragraphs[i] = textwrap.fill(paragraph, width, subsequent_indent="  ")
    return "\n\n".join(paragraphs)


def _mistake(message: str, command: str = "") -> int:
    print(f"jdl {command}".rstrip() + f": error: {message}", file=sys.stderr)
    return 2
