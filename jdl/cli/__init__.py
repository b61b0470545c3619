"""The command `jdl`. One file a command, imported only when it is the one asked for.

Exit codes: 0 done, 2 the user's mistake, 1 a fault of ours, 75 stopped by SIGTERM after saving,
130 interrupted.
"""

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train one CNN with five optimizers on the bundled digits, and write the report",
    "train": "train a model on a tar of images",
    "evaluate": "loss and metrics of a trained run on a tar of images",
    "curvature": "a trained run's loss landscape: eigenvalues, density, noise, sharpness",
    "predict": "a trained run's predictions, a row an image: .npz, .jsonl or .csv",
    "summary": "a model's parameters, with shapes and counts, and its FLOPs",
    "activations": "what a network's layers see in a picture, and what they prefer",
    "dream": "a picture dreamt over by a network; a class's own picture",
    "style": "a picture in a painter's style, by optimisation or by a network trained for it",
    "compare": "first against second order: one model, several optimizers, one report",
    "index": "what a tar holds: members, classes, damage",
    "pack": "rewrite a folder, IDX files, an .npz or a tar as plain, sharded tars",
    "runs": "the runs below a folder, with their best metrics",
    "doctor": "backend, devices, memory, decoder, extras, and how to get the rest",
    "completion": "completion for bash, zsh or fish",
    "bench": "how fast this machine is: data, train, optim",
}

USAGE = """usage: jdl COMMAND [OPTIONS]

Train JAX models with any optimizer, first or second order, on images streamed from tar archives.

{commands}

examples:
  jdl demo
  jdl train cnn --optimizer hf
  jdl train cnn --data 'photos-*.tar' --optimizer adam --steps 500 --workdir runs/photos
  jdl compare --data photos.tar --model cnn --optimizers sgd,adam,lbfgs,hf --seconds 30

`jdl COMMAND --help` tells a command's options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output left, `jdl … | head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
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
        if any(a.partition("=")[0] == "--config" for a in arguments):
            from jdl.cli.config_file import expand

            arguments = expand(arguments, module.Args)
        parsed = _parse(name, module, arguments)
    except UserError as error:
        return _mistake(str(error), name)
    except SystemExit as end:
        return int(end.code or 0)

    try:
        module.run(parsed)
    except UserError as error:
        code = _mistake(str(error), name)
        if getattr(parsed, "distributed", False):
            from jdl.train import distributed

            distributed.announce(error, code)
        return code
    except SystemExit as end:  # SIGTERM, with everything saved
        if not str(end).isdigit():
            print(f"jdl {name}: {end}", file=sys.stderr)
        return int(end.code or 0)
    except KeyboardInterrupt:
        print(f"jdl {name}: interrupted; what was written stays.", file=sys.stderr)
        return 130
    return 0


def _parse(name: str, module: object, arguments: list[str]) -> object:
    """The command's arguments; a mistake in them ends in one line on stderr."""
    import tyro

    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(
                module.Args,  # type: ignore[attr-defined]
                prog=f"jdl {name}",
                description=module.__doc__,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if end.code not in (0, None):
            _mistake(_without_box(heard.getvalue()), name)
        raise


def _without_box(text: str) -> str:
    """The first paragraph of tyro's framed message, and its suggestion, as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()]
    body = [line for line in lines[1:] if line.strip("─ ")]
    return " ".join(" ".join(body).split())


def _mistake(message: str, command: str = "") -> int:
    print(f"jdl {command}".rstrip() + f": error: {message}", file=sys.stderr)
    return 2
