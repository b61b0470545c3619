"""First against second order: several optimizers, the same problems, equal budgets, one report.

Examples:
  jdl compare --seconds 10
  jdl compare --data photos.tar --model cnn --optimizers sgd,adam,lbfgs,hf --seeds 3 --seconds 30
  jdl compare --problem digits-cnn,logistic,mine.py --trials 8 --seeds 3
  jdl compare --problem autoencoder-mnist --data FOLDER --optimizers kfac,adam --seconds 600

Problems:
  digits-cnn, logistic                     the bundled digits
  mnist-mlp, mnist-cnn, autoencoder-mnist  MNIST, named by --data
  autoencoder-faces                        a tar of faces named by --data
  autoencoder-curves, adding-rnn           data made anew
  quadratic, rosenbrock                    no data
  mine.py                                  a file of your own: model, loss, data

Optimizers:
  sgd momentum nesterov adam adamw nadam radam rmsprop adagrad adafactor lamb
  lars lion muon sophia, all optax's; lbfgs cg newton hf gauss_newton lm
  natural_gradient kfac
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Args:
    """What to compare, on what, how long."""

    data: str = "digits"
    """a tar, a glob, a brace range, the bundled digits, or what a named problem needs"""
    problem: str = ""
    """names of the problems above, with commas, in place of --model"""
    model: str = "cnn"
    """mlp, cnn, rnn or dbn"""
    optimizers: str = "sgd,adam,lbfgs,cg,hf"
    """names of those above, with commas"""
    seeds: int = 1
    """how many seeds: 3 or more for a result to publish"""
    seconds: float = 30.0
    """training seconds of each trial, without compilation and evaluation"""
    epochs: float | None = None
    """a budget of passes over the data, in place of seconds"""
    work: float | None = None
    """a budget of work, in gradients of the whole training set, in place of seconds"""
    trials: int = 0
    """values of learning rate or damping to try for each optimizer; 0 for the defaults alone"""
    tuning_share: float = 1.0
    """share of a trial's budget that each tuning trial has"""
    clock: str = "wall"
    """wall, or cpu: the process's CPU time divided by the cores, on a machine that others use"""
    share: str = "1/1"
    """K/N: run the K-th of N shares only, for several processes or hosts with one --workdir"""
    report: bool = False
    """write the report of what --workdir holds, and run nothing"""
    size: str | None = None
    """HEIGHT or HEIGHTxWIDTH to scale images to; by default 128, and 8 for the digits"""
    color: bool = False
    """keep three channels; by default images are made gray"""
    workdir: Path = Path("runs/compare")
    """the directory for trials and report; started again, what is done is skipped"""


def run(args: Args) -> None:
    """Runs the trials, prints the tables, writes the report."""
    from jdl.compare import Tuning, load_results
    from jdl.core import check
    from jdl.optim import registry

    if args.report:
        _show(load_results(args.workdir), args.workdir)
        return
    check.argument(args.seeds >= 1, "--seeds", "at least 1", args.seeds)
    check.argument(args.seconds > 0, "--seconds", "more than 0", args.seconds)
    check.argument(args.trials >= 0, "--trials", "0 or more", args.trials)
    names = _listed("--optimizers", args.optimizers)
    names = [registry.short_name(name, "--optimizers") for name in names]
    others = {"epochs": args.epochs, "work": args.work}
    given = {kind: amount for kind, amount in others.items() if amount is not None}
    check.argument(len(given) <= 1, "--epochs, --work", "given one at a time", given)
    kind, amount = next(iter(given.items()), ("seconds", args.seconds))
    share = _share(args.share)
    problems, failures = _problems(args)
    study(
        problems,
        names,
        args.seeds,
        (amount, kind),
        args.workdir,
        tuning=Tuning(args.trials, args.tuning_share) if args.trials else None,
        clock=args.clock,
        share=share,
    )
    if failures:
        raise check.UserError("Of the problems, some could not be made: " + " ".join(failures))


def _listed(option: str, text: str) -> list[str]:
    from jdl.core import check

    names = [name for name in text.replace(" ", "").split(",") if name]
    check.argument(bool(names), option, "names with commas between them", text)
    return names


def _share(text: str) -> tuple[int, int]:
    from jdl.core import check

    parts = text.split("/")
    ok = len(parts) == 2 and all(part.isdecimal() for part in parts)
    ok = ok and 1 <= int(parts[0]) <= int(parts[1])
    check.argument(ok, "--share", "K/N with 1 ≤ K ≤ N, such as 2/8", text)
    return int(parts[0]), int(parts[1])


def _problems(args: Args) -> tuple[list[Any], list[str]]:
    """The problems that can be made, and what is wrong with the others."""
    from jdl.compare import CATALOGUE, by_name, digits_cnn, tar_problem
    from jdl.core import check
    from jdl.data import resolve
    from jdl.recipes.datasets import parse_size
    from jdl.recipes.registry import RECIPES, recipe

    if args.problem:
        names = _listed("--problem", args.problem)
        for name in names:
            if not name.endswith(".py"):
                check.one_of("--problem", name, CATALOGUE)
        data = None if args.data == "digits" else args.data
        made, failures = [], []
        for name in names:
            try:
                made.append(by_name(name, data))
            except check.UserError as error:
                failures.append(str(error))
                if len(names) > 1:
                    print(f"jdl compare: {name}: {error}", file=sys.stderr)
        if not made:
            raise check.UserError("No problem could be made: " + " ".join(failures))
        return made, failures
    classifiers = [name for name, r in RECIPES.items() if r.kind == "classifier"]
    chosen = recipe(check.one_of("--model", args.model, classifiers))
    if args.data == "digits" and args.model == "cnn" and args.size is None:
        return [digits_cnn()], []
    problem = tar_problem(
        resolve(args.data),
        chosen.build,
        size=parse_size(args.size, args.data),
        grayscale=not args.color,
    )
    return [problem], []


def study(
    problems: Any,
    optimizers: list[Any],
    seeds: int,
    budget: tuple[float, str],
    workdir: Path,
    *,
    tuning: Any = None,
    clock: str = "wall",
    share: tuple[int, int] = (1, 1),
) -> Any:
    """Runs a study with progress on stderr, and shows what came out."""
    from jdl.compare import Budget, Study

    def on_event(event: Any) -> None:
        where = f"[{event.number}/{event.total}] {event.problem}: {event.optimizer}"
        if event.kind == "row":
            row = event.row
            accuracy = row.get("test_accuracy")
            shown = "" if accuracy is None else f"  test accuracy {accuracy:.3f}"
            loss = row.get("train_loss")
            loss_shown = "" if loss is None else f"  train loss {loss:.3g}"
            seconds = f"seed {event.seed}  {row['seconds']:6.1f} s"
            print(f"{where} {seconds}{loss_shown}{shown}", file=sys.stderr)
        elif event.kind == "tune":
            print(f"{where}: tried {event.words}", file=sys.stderr)
        elif event.kind in ("begin", "end", "skip"):
            words = f"seed {event.seed}: {event.kind} {event.words or ''}"
            print(f"{where} {words}".rstrip(), file=sys.stderr)

    results = Study(
        problems,
        optimizers,
        seeds=seeds,
        budget=Budget(*budget),
        workdir=workdir,
        tuning=tuning,
        clock=clock,
        on_event=on_event,
    ).run(share)
    _show(results, workdir)
    return results


def _show(results: Any, workdir: Path) -> None:
    """The tables, and the report's files."""
    from jdl.cli import output
    from jdl.compare import table, write_report
    from jdl.compare.results import headline
    from jdl.compare.tables import tuning_table

    for name in results.problems:
        header, rows = table(results, name)
        output.table(list(header), [list(row) for row in rows], name)
        if (tuned := tuning_table(results, name)) is not None:
            output.table(tuned[0], tuned[1], f"{name}: tuning")
        print(headline(results, name))
    print(f"report:  {write_report(workdir)}")
    print(f"metrics: {workdir / 'metrics.jsonl'}")
