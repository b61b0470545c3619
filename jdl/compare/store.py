"""Reads a study from its directory."""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdl.compare.results import EVALUATION, STEP, Results, Trial
from jdl.core import check
from jdl.train.writers import read_jsonl

FORMAT = 5  # of a study's directory; changes when old ones can no longer be read


def trial_directory(
    workdir: str | Path, problem: str, optimizer: str, seed: int, share: float = 1.0
) -> Path:
    """The directory of a trial; of one with a share of the budget with that in its name."""
    name = f"{optimizer}-seed{seed}" + ("" if share == 1.0 else f"-share{share:g}")
    return Path(workdir) / problem / name


def tuning_directory(workdir: str | Path, problem: str, optimizer: str, number: int) -> Path:
    """The directory of a tuning trial."""
    return Path(workdir) / problem / "tuning" / optimizer / str(number)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content; empty if there is no file."""
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise check.DataError(f"{path} is not a valid TOML file: {error}.") from error


def load_results(workdir: str | Path) -> Results:
    """The results in a study's directory.

    Args:
      workdir: the directory.

    Raises:
      DataError: there is no study in it, or one of another format.

    >>> import tempfile
    >>> from jdl.compare import Budget, Study, by_name, table
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     budget = Budget(3, "steps")
    ...     _ = Study(by_name("quadratic"), ["sgd"], budget=budget, workdir=folder).run()
    ...     results = load_results(folder)
    >>> table(results, "quadratic")[1][0][0]
    'sgd'
    """
    workdir = Path(workdir)
    study = read_toml(workdir / "study.toml")
    if not study:
        raise check.DataError(f"{workdir} holds no study: there is no study.toml in it.")
    check_format(workdir, study)
    problems, entries = study["problems"], study["optimizers"]
    names = [entry["name"] for entry in entries]
    ends = study.get("ends", [1.0])
    on = [problem["name"] for problem in problems]
    trials = load_trials(workdir, on, names, study["seeds"], ends)
    tuned = {
        (problem["name"], entry["name"]): load_tuning(
            workdir, problem["name"], entry["search"]["of"], study["tuning"]["trials"]
        )
        for problem in problems
        for entry in entries
        if "search" in entry
    }
    whole = tuple(trial for trial in trials if trial.share == 1.0)
    return Results(study, whole, tuned, tuple(trial for trial in trials if trial.share < 1.0))


def load_trials(
    workdir: Path,
    problems: Iterable[str],
    optimizers: Sequence[str],
    seeds: Sequence[int],
    ends: Sequence[float] = (1.0,),
) -> list[Trial]:
    """All trials of a study, in the order in which they run.

    Seed by seed, so that an interrupted study has compared all optimizers on its first seeds.
    """
    return [
        load_trial(trial_directory(workdir, problem, name, seed, share), problem, name, seed, share)
        for problem in problems
        for seed in seeds
        for share in ends
        for name in optimizers
    ]


def load_tuning(
    workdir: str | Path, problem: str, optimizer: str, trials: int
) -> tuple[Trial, ...]:
    """The first `trials` tuning trials of one optimizer on one problem, in the order they ran.

    An earlier study with more of them may have left others in the directory.
    """
    places = [tuning_directory(workdir, problem, optimizer, number) for number in range(trials)]
    return tuple(
        load_trial(place, problem, optimizer, number)
        for number, place in enumerate(places)
        if place.exists()
    )


def check_format(workdir: Path, study: Mapping[str, Any]) -> None:
    """Raises unless this version can read the study."""
    if study.get("format") != FORMAT:
        raise check.DataError(
            f"The study in {workdir} is of format {study.get('format')!r}; this version of jdl "
            f"reads format {FORMAT}. Choose another work directory, or the version that wrote it."
        )


def same_trial(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two `config.toml` are of one trial.

    The machine is part of a trial with a budget in seconds; of others, only the precision of its
    products, as their rows differ in their seconds alone.

    >>> here, there = {"machine": {"cores": 2}}, {"machine": {"cores": 8}}
    >>> kinds = [{"budget": {"kind": kind}} for kind in ("steps", "seconds")]
    >>> tuple(same_trial(kind | here, kind | there) for kind in kinds)
    (True, False)
    """

    def identity(config: Mapping[str, Any]) -> dict[str, Any]:
        found = {**config, "optimizer": {**config.get("optimizer", {}), "call": ""}}
        if found.get("budget", {}).get("kind") != "seconds":
            found["machine"] = found.get("machine", {}).get("matmul_precision")
        return found

    return identity(one) == identity(other)


def load_trial(
    directory: Path, problem: str, optimizer: str, seed: int, share: float = 1.0
) -> Trial:
    """The trial in a directory; one without a `result.json` has not ended."""
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        result = {"status": "missing", "words": "has not run to its end"}
    rows = read_jsonl(directory / "metrics.jsonl")
    evaluations = tuple(row for row in rows if row["split"] == EVALUATION)
    one = result.get("evaluation_seconds")
    return Trial(
        problem,
        optimizer,
        seed,
        status=result["status"],
        words=result["words"],
        evaluations=evaluations,
        steps=_decided(rows),
        compile_seconds=result.get("compile_seconds", 0.0),
        settings=read_toml(directory / "config.toml"),
        share=share,
        state_bytes=result.get("state_bytes"),
        evaluation_seconds=None if one is None else one * len(evaluations),
        step_seconds=result.get("step_seconds"),
        gradient_seconds=result.get("gradient_seconds"),
    )


def _decided(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The rows of a second-order method's steps, which evaluates f to decide how far to go.

    A first-order method logs the loss of its steps, and SOAP, Shampoo and Muon one evaluation each.
    """
    found = tuple(row for row in rows if row["split"] == STEP and "termination" in row)
    return found if any(row["evaluations"] > row["iterations"] for row in found) else ()
