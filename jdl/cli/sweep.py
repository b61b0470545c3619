"""Train a model with every combination of some flags' values, and list the runs.

Takes the flags of `jdl train`, each with one value or several; several models, too. Each run has a
folder of its own below --workdir, by default runs/sweep. The same command goes on where it was
stopped.

Examples:
  jdl sweep cnn --optimizer sgd adam kfac --max-steps 500 --workdir runs/optimizers
  jdl sweep mlp cnn --learning-rate 0.1 0.01 --seed 0 1 2
  jdl sweep autoencoder --optimizer kfac --option damping=1 damping=10
"""

import itertools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

from jdl.cli import runs, train
from jdl.core import check

Args = train.Args
ONE_RUN = ("--try", "--distributed")  # flags that make no sense for several runs


class Job(NamedTuple):
    """A run of the sweep."""

    name: str  # its folder
    root: Path  # of the sweep
    args: train.Args


def parse(arguments: list[str]) -> list[Job]:
    """The runs that the arguments ask for, all of them checked."""
    from jdl.cli import config_file, main

    if {"-h", "--help"} & {*arguments}:
        main.parse("sweep", sys.modules[__name__], ["--help"])
    models, flags = _given(arguments)
    root = Path(dict(flags).get("--workdir", ["runs/sweep"])[0])
    choices = [[[model] for model in models] or [[]]]
    choices += [_choices(flag, values) for flag, values in flags if flag != "--workdir"]
    check.argument(
        any(len(values) > 1 for values in choices),
        "a flag",
        "given several values, as in `--seed 0 1 2`",
        " ".join(arguments),
        "`jdl train` makes a single run.",
    )
    jobs: dict[str, Job] = {}
    for words in itertools.product(*choices):
        several = [w for w, values in zip(words, choices, strict=True) if len(values) > 1]
        name = ",".join(map(_folder, several))
        check.argument(name not in jobs, "the values of a flag", "different", name)
        line = [*itertools.chain(*words), "--workdir", str(root / name)]
        if "--config" in line:
            line = config_file.expand(line, train.Args)
        jobs[name] = Job(name, root, main.parse("sweep", train, line))
    return list(jobs.values())


def _given(arguments: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The models, and each flag with its values."""
    models: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags.append((flag, [value] if equals else []))
        else:
            (flags[-1][1] if flags else models).append(word)
    names = [flag for flag, _ in flags]
    for flag in names:
        once = names.count(flag) == 1 or flag == "--option"
        check.argument(once, flag, "given once, with all its values after it", names.count(flag))
        check.argument(
            flag not in ONE_RUN, flag, "left out: it is for one run of `jdl train`", True
        )
    return models, flags


def _choices(flag: str, values: list[str]) -> list[list[str]]:
    """The words that each run may have for a flag; one that takes several values has them all."""
    kind = get_type_hints(train.Args).get(flag[2:].replace("-", "_"))
    if not values or (get_origin(kind) is tuple and flag != "--option"):
        return [[flag, *values]]
    return [[flag, value] for value in values]


def _folder(words: list[str]) -> str:
    """A run's part of its folder's name for a choice: "kfac", "seed=1", "damping=10"."""
    *flag, value = words
    value = Path(value).stem if value.endswith((".py", ".tar")) else value
    name = value if flag in ([], ["--option"], ["--optimizer"]) else f"{flag[0][2:]}={value}"
    return re.sub(r"[^\w=.+-]+", "_", name)


def run(jobs: list[Job]) -> None:
    """Trains them one after the other and prints the table of `jdl runs`."""
    from jdl.cli.main import in_flags

    failed: dict[str, Any] = {}
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job.name}", flush=True)
        try:
            train.run(job.args)
        except check.UserError as error:
            failed[job.name] = in_flags(str(error), [*vars(job.args)])
            print(f"failed: {failed[job.name]}", flush=True)
    print()
    if len(failed) < len(jobs):
        runs.run(runs.Args(jobs[0].root))
    if failed:
        first, why = next(iter(failed.items()))
        raise check.UserError(f"{len(failed)} of {len(jobs)} runs failed; {first}: {why}")
